r"""Rows of direct codecs in lanes: ``int8``, ``int4``, ``fp8`` and ``none``, without look-ups.

Equation
    ``tq_tvm.reference.codec``::

        affine   y^ = (q - zero) scale        fp8   y^ = q scale        none   y^ = q

Buffers
    What `lookup_cuda.CodedRow` reads: the codes of a row and its scales in a word, low half first.
    ``fp8`` has one scale, a float, for all rows.

Numerics
    float32, one rounding to the model's dtype. A byte q in the second byte of 2^15 is the float
    2^15 + q, and in the third byte of 2^7 2^7 + q, if q has 4 bits; so ``prmt`` makes a float of a
    code, and the multiplication by the scale subtracts that power + zero as well. The product of
    such a sum and a scale in bfloat16 mostly fits a float; in float16 it does not, and the
    difference, which is exact, comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels.device import (
    PAIR,
    access,
    as_float,
    byte_perm,
    f32,
    high_half,
    let,
    local,
    low_half,
    ptx,
    store,
    u32,
)
from tq_tvm.spec import Codec

__all__ = ["DIRECT_LANES", "E4M3_HALVES", "AffineCodes", "DirectRow", "e4m3_halves", "nibbles"]

DIRECT_LANES = 8
"""Lanes of a row: their pieces of 8 values are neighbours, in codes and in what they make."""

_SHIFTS = {8: (2.0**15, 0x47000000, 0x7404, 4), 4: (2.0**7, 0x43000000, 0x7044, 8)}
"""Of each number of bits: a power of two, its bits, and of ``prmt`` the selector and place."""

E4M3_HALVES = """
static __device__ __forceinline__ unsigned tq_e4m3_halves(unsigned codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  unsigned halves = 0;
  for (int i = 0; i < 2; ++i) {
    unsigned code = codes >> 8 * i & 0xFF, size = code & 0x7F;
    // A normal number's exponent is 8 larger in float16; others are normal numbers there.
    unsigned bits = (size << 7) + (8 << 10);
    if (size == 0x7F) {
      bits = 0x7FFF;
    } else if (size < 8) {
      int shift = size >= 4 ? 1 : size >= 2 ? 2 : 3;
      bits = size ? (9 - shift) << 10 | (size << shift & 7) << 7 : 0;
    }
    halves |= ((code & 0x80) << 8 | bits) << 16 * i;
  }
  return halves;
#else
  unsigned halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((unsigned short)codes));
  return halves;
#endif
}
"""
"""Before compute capability 8.9 there is no such instruction."""


def e4m3_halves(word):
    """The two float8_e4m3fn in the low half of a word as float16."""
    return T.cuda.func_call("tq_e4m3_halves", word, source_code=E4M3_HALVES, return_type="uint32")


class AffineCodes:
    """Floats of the codes of a row: ``(q - zero) scale``."""

    def __init__(self, dtype: str, bits: int, scale, zero) -> None:
        self._dtype, self._scale = dtype, scale
        power, self._power_bits, self._selector, self._place = _SHIFTS[bits]
        self._zero = let(zero + f32(power))
        self._start = let(-self._zero * scale)

    def value(self, word, byte: int):
        """Of one byte of a word of codes."""
        selector = self._selector | byte << self._place
        shifted = as_float(byte_perm(word, u32(self._power_bits), selector))
        if self._dtype == "bfloat16":
            value = local(1, "float32")
            ptx("fma.rn.f32", value[0], shifted, self._scale, self._start)
            return value[0]
        return (shifted - self._zero) * self._scale


class DirectRow:
    """A lane's part of a row, as `lookup_cuda.CodedRow` has it.

    Parameters
    ----------
    lanes
        They have pieces of a row in turn.
    scale
        Of ``fp8``.
    piece
        Elements of a piece, bytes of codes or values, at most.
    """

    def __init__(
        self, dim: int, dtype: str, codec: Codec, lanes: int, space: str, scale=None, piece: int = 8
    ) -> None:
        self.dim, self.dtype, self.codec = dim, dtype, codec
        self._lanes, self._space, self._scale = lanes, space, scale
        self.elements = codec.packed_bytes(dim)
        self.piece = min(piece, self.elements // lanes)
        self.pieces = self.elements // (lanes * self.piece)
        self._words = self.piece * (1 if codec.packed else 2) // 4
        self.codes = local(self.pieces * self._words, "uint32")
        self.meta = local(1, "uint32")

    def read_codes(self, pointer: Callable[[Any], Any], part) -> None:
        """Read the codes of lane ``part``; ``pointer`` is of an element of the row."""
        apart = self._lanes * self.piece
        self.read_pieces(lambda n: pointer(T.cast(part * self.piece + n * apart, "int64")))

    def read_pieces(self, pointer: Callable[[int], Any]) -> None:
        """Read the codes; ``pointer`` is of the lane's n-th piece."""
        for n in range(self.pieces):
            words = [self.codes[n * self._words + i] for i in range(self._words)]
            access(self._space, words, pointer(n))

    def blank(self) -> None:
        """Codes and scales of a row of zeros."""
        for i in range(self.pieces * self._words):
            store(self.codes, u32(0), i)
        store(self.meta, u32(0))

    def lines(self, part):
        """The coordinate of the lane's first value, and words of two values, of each piece."""
        for first, line in self.pieces_of_lines():
            yield first + part * self.piece, line

    def pieces_of_lines(self):
        """The same of lane 0's coordinates."""
        for field, line in enumerate(self._lines()):
            words = len(line) // self.pieces
            for n in range(self.pieces):
                first = field * self.elements + n * self._lanes * self.piece
                yield first, line[n * words : (n + 1) * words]

    def _lines(self) -> list[list]:
        """Words of two values each, of each field of the codes."""
        family, words = self.codec.family, range(self.pieces * self._words)
        if family == "none":
            return [[self.codes[i] for i in words]]
        if family == "fp8":
            return [[pair for i in words for pair in self._fp8_pairs(self.codes[i])]]
        scale, zero = low_half(self.dtype, self.meta[0]), high_half(self.dtype, self.meta[0])
        affine = AffineCodes(self.dtype, self.codec.bits, let(scale), let(zero))
        if self.codec.bits == 8:
            return [[pair for i in words for pair in self._affine_pairs(affine, self.codes[i])]]
        halves = [[let(nibbles(self.codes[i], field)) for i in words] for field in range(2)]
        return [[p for word in line for p in self._affine_pairs(affine, word)] for line in halves]

    def _affine_pairs(self, affine: AffineCodes, word) -> list:
        return self._pairs([affine.value(word, i) for i in range(4)])

    def _fp8_pairs(self, word) -> list:
        values = []
        for half in range(2):
            halves = let(e4m3_halves(T.shift_right(word, u32(16)) if half else word))
            values += [low_half("float16", halves), high_half("float16", halves)]
        return self._pairs([value * self._scale for value in values])

    def _pairs(self, values: list) -> list:
        """Round to the model's dtype."""
        pairs = local(len(values) // 2, "uint32")
        for i in range(len(values) // 2):
            ptx(PAIR[self.dtype], pairs[i], values[2 * i + 1], values[2 * i])
        return [pairs[i] for i in range(len(values) // 2)]


def nibbles(word, field: int):
    """Codes of 4 bits as bytes: the low ones of a word, or the high ones."""
    moved = T.shift_right(word, u32(4)) if field else word
    return T.bitwise_and(moved, u32(0x0F0F0F0F))
