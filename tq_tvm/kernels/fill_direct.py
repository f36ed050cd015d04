r"""Codes and scales of 8 rotated rows of a warp under a direct codec: ``fill`` on GPUs.

Equation
    ``tq_tvm.reference.codec``, L = 2^bits - 1::

        affine   lo = min y, hi = max y    scale = (hi - lo)/L    zero = -lo/scale
                 q = trunc(y/scale + zero + 0.5)       a constant row: scale = |m|, zero = -sign m
        fp8      q = e4m3(y/scale)         none   y

Buffers
    A lane has D/4 values y of a row in registers, see `hadamard_cuda.RowBits`.

Numerics
    Every float is rounded as the reference rounds it. A quotient is a product with the reciprocal,
    which is rounded to nearest, and the remainder of that product times the reciprocal: Markstein's
    division, exact where nothing underflows. A sum with 2^23, rounded towards zero, truncates.
"""

from __future__ import annotations

from tvm.script import tirx as T

from tq_tvm.kernels.device import (
    PAIR,
    as_bits,
    as_float,
    byte_perm,
    f32,
    let,
    local,
    ptx,
    shuffle_xor,
    store,
    u32,
)
from tq_tvm.kernels.fill_codes import Encoded
from tq_tvm.kernels.hadamard_cuda import RowBits
from tq_tvm.kernels.lane_rows import LaneRow
from tq_tvm.spec import Codec

__all__ = ["TO_E4M3", "DirectEncoder", "Quotient", "row_words"]

_CONSTANT = 2.0**-8
_NAN = 0x7FC00000
_INFINITY = 0x7F800000
_UNIT = 2.0**23
"""A float of this size has a unit of one."""

TO_E4M3 = """
static __device__ __forceinline__ unsigned tq_to_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  unsigned codes = 0;
  for (int i = 0; i < 2; ++i) {
    float value = i ? high : low, size = fminf(fabsf(value), 448.0f);
    unsigned bits = __float_as_uint(size);
    // Rounded at the third bit of the fraction; below 2^-6 at 2^-9, the unit of 2^14.
    unsigned normal = ((bits + (bits >> 20 & 1) + 0x7FFFF) >> 20) - (120 << 3);
    unsigned small = __float_as_uint(size + 16384.0f) & 15;
    unsigned code = size < 0.015625f ? small : normal;
    bool broken = (__float_as_uint(value) & 0x7FFFFFFF) > 0x7F800000;
    codes |= (broken ? 0x7F : code | (__float_as_uint(value) >> 24 & 0x80)) << 8 * i;
  }
  return codes;
#else
  unsigned short codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#endif
}
"""
"""Before compute capability 8.9 there is no such instruction."""


def _divide(a, b):
    """A quotient, rounded to nearest."""
    result = local(1, "float32")
    ptx("div.rn.f32", result[0], a, b)
    return result[0]


class Quotient:
    """Quotients of many values by one."""

    def __init__(self, divisor) -> None:
        self._divisor, self._negative = divisor, let(-divisor)
        self._inverse = _divide(f32(1), divisor)

    def of(self, value):
        """The quotient, and a first one, which is infinite where the quotient is."""
        first = let(value * self._inverse)
        rest, result = local(1, "float32"), local(1, "float32")
        ptx("fma.rn.f32", rest[0], first, self._negative, value)
        ptx("fma.rn.f32", result[0], rest[0], self._inverse, first)
        return result[0], first


def row_words(row: RowBits | LaneRow, dtype: str, value, unit: float | None = None):
    """Words of a lane's values in the model's dtype, times ``unit``."""
    count = row.values // 2
    words = local(count, "uint32")
    for i in range(count):
        pair = [value[2 * i + e] for e in (1, 0)]
        ptx(PAIR[dtype], words[i], *(pair if unit is None else [x * f32(unit) for x in pair]))
    return words


class DirectEncoder:
    """One codec; ``scale`` is of the tensor, where it has one."""

    def __init__(self, row: RowBits | LaneRow, dtype: str, codec: Codec, scale) -> None:
        self._row, self._dtype, self._codec = row, dtype, codec
        self._divide = None if scale is None else Quotient(scale)

    def encode(self, value) -> Encoded:
        """Codes and scales of the row of a lane's values."""
        if self._codec.family == "none":
            return Encoded([row_words(self._row, self._dtype, value)], [])
        if self._codec.family == "fp8":
            return Encoded([self._e4m3(value)], [])
        return self._affine(value)

    def _e4m3(self, value):
        words = local(self._row.values // 4, "uint32")
        for w in range(self._row.values // 4):
            pairs = []
            for i in (4 * w, 4 * w + 2):
                both = []
                for e in range(2):
                    quotient, first = self._divide.of(value[i + e])
                    # Of an infinite value the remainder is not a number.
                    both.append(let(T.Select(T.fabs(first) < f32(1e30), quotient, first)))
                source = {"source_code": TO_E4M3, "return_type": "uint32"}
                pairs.append(let(T.cuda.func_call("tq_to_e4m3", *both, **source)))
            store(words, byte_perm(pairs[0], pairs[1], 0x5410), w)
        return words

    def _affine(self, value) -> Encoded:
        row, bits = self._row, self._codec.bits
        levels = float((1 << bits) - 1)
        low, high = self._extremes(value)
        widest = let(T.max(T.fabs(low), T.fabs(high)))
        apart, middle = let(high - low), let((low + high) * f32(0.5))
        constant = let(apart <= widest * f32(_CONSTANT))
        whole = let(as_bits(widest) < u32(_INFINITY))
        scale = let(T.Select(constant, T.fabs(middle), _divide(apart, f32(levels))))
        sign = T.Select(middle > f32(0), f32(-1), T.Select(middle < f32(0), f32(1), f32(0)))
        zero = let(T.Select(constant, sign, _divide(let(-low), scale)))
        top = let(T.Select(T.And(whole, T.Not(constant)), f32(levels), f32(0)))
        divide = Quotient(scale)
        codes = local(row.values, "uint32")
        for i in range(row.values):
            exact = let(divide.of(value[i])[0] + zero + f32(0.5))
            # In this order what is not a number becomes 0.
            kept = let(T.min(T.max(exact, f32(0)), top))
            sum_ = local(1, "float32")
            ptx("add.rz.f32", sum_[0], kept, f32(_UNIT))
            store(codes, as_bits(sum_[0]), i)
        nan = as_float(u32(_NAN))
        scales = [let(T.Select(whole, x, nan)) for x in (scale, zero)]
        return Encoded([self._bytes(codes)], scales)

    def _extremes(self, value):
        """Least and largest value of the row, neither a number if one is not."""
        found = local(2, "float32")
        for n, name in enumerate(("min.NaN.f32", "max.NaN.f32")):
            store(found, value[0], n)
            for i in range(1, self._row.values):
                ptx(name, found[n], found[n], value[i])
            for mask in self._row.masks:
                ptx(name, found[n], found[n], let(shuffle_xor(found[n], mask)))
        return found[0], found[1]

    def _bytes(self, codes):
        """Words of the lowest bytes of registers; of 4 bits, two codes in each."""
        row = self._row
        slots = list(range(row.values))
        if self._codec.bits == 4:
            half = row.dim // 2
            slots = [slot for slot in slots if row.coordinate(slot) < half]
            for slot in slots:
                other = codes[row.slot(row.coordinate(slot) + half)]
                store(codes, T.bitwise_or(codes[slot], T.shift_left(other, u32(4))), slot)
        words = local(len(slots) // 4, "uint32")
        for w in range(len(slots) // 4):
            a, b, c, d = (codes[slot] for slot in slots[4 * w : 4 * w + 4])
            store(words, byte_perm(byte_perm(a, b, 0x40), byte_perm(c, d, 0x40), 0x5410), w)
        return words
