r"""Codes and scales of 8 rotated rows of a warp: what ``fill`` does with a Lloyd-Max codec on GPUs.

A lane has D/4 values w of a row, unscaled: w = -sqrt(D) y. With n the row's norm, b the boundaries
and c the levels of positive values::

    level = #{|w| > n b}        code = middle +- (level + 1/2), the sign that of y
    |y| = |w| / sqrt(D)         |y^| = scale c / sqrt(D)

Levels
    A steep difference, cut off at 0 and 1, is a comparison f on the multiplier's pipe. The level is
    searched a bit at a time, highest first: boundaries of a step are b + f (b' - b) of those
    before, and c itself is picked likewise. Bits times powers of two add up, in float32, to two
    bytes of a word of levels.

Planes
    Signs, and of qjl4 those of residuals, are the highest bits of registers, which one shift of two
    registers appends to a word, in the fields of the levels. Codes of opposite values mirror each
    other: a word of them is its levels, flipped where values are negative, with signs above; of
    qjl4 with one bit more, whether value and residual have the same sign. mse3 has signs in its
    second plane, interleaved with those of the word D/8 bytes on, which another lane has below
    D = 256.

A value of K of ``k4v2`` takes 13 instructions, one of V three. 64 x 8192 of 8 KV heads took 758 us
with them on an H200, and 814 when signs and levels were added up together (15 and four).

Scales
    Rules other than ``norm`` need sum c^2, which is counted in the words of levels: c^2 is a sum
    over the products of the level's bits, so one population count a product of bit planes is
    enough, weighed by integers of 2^-20. ``least_squares`` and ``unbiased`` need sum |w| c too, an
    addition a value; qjl4 sum |r| and sum c sign(r)::

        D <y^, y^> / scale^2 = sum c^2 + 2 e sum c sign(r) + D e^2        e = sum |r| / (n D)
        D <y, y^> / scale    = sum |w| c + e (sum |r| + n sum c sign(r))  r = |w| - n c
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels.device import (
    as_bits,
    as_float,
    byte_perm,
    f32,
    let,
    local,
    ptx,
    reduce_lanes,
    shuffle_xor,
    store,
    u32,
)
from tq_tvm.kernels.hadamard_cuda import RowBits
from tq_tvm.kernels.lane_rows import LaneRow
from tq_tvm.spec import NORM_EPS, Codec

__all__ = ["Encoded", "Encoder"]

_STEEP = 2.0**60
"""A difference of floats times this is above one, if it is not zero."""

_MAGIC = 2.0**23
"""A float of this size has a unit of one."""

_SQUARE = 20
"""Squares of levels are counted in units of 2^-20: those of a row fit 32 bits, since they are at
most 2.4 times those of its values, which are D."""

_UNITS = {2: 0x55555555, 4: 0x11111111}
"""The lowest bit of every field of a word."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A lane's words of each plane of its row, and the row's scales."""

    planes: list
    scales: list


class Encoder:
    """One codec under one scale rule.

    Parameters
    ----------
    sign
        A register that holds the sign of a float.
    """

    def __init__(self, row: RowBits | LaneRow, codec: Codec, scale_rule: str | None, sign) -> None:
        self._row, self._codec, self._rule, self._sign = row, codec, scale_rule, sign
        self._levels = [c for c in codec.centroids if c > 0]
        self._bounds = [b for b in codec.boundaries if b > 0]
        self._level_bits = len(self._levels).bit_length() - 1
        self._field = codec.plane_bits[0]

    def encode(self, value, t, squared_norm) -> Encoded:
        """Codes and scales of the row whose unscaled values are minus ``value``."""
        codec, dim, row = self._codec, self._row.dim, self._row
        norm = let(T.sqrt(squared_norm + f32(NORM_EPS)))
        self._prepare(norm)
        bytes_ = dim * self._field // 8
        mine = [c for c in map(row.coordinate, range(row.values)) if c < bytes_]
        levels, signs, words = (local(len(mine) // 4, "uint32") for _ in range(3))
        for w in range(len(mine) // 4):
            self._find_word(value, mine[4 * w : 4 * w + 4], bytes_, levels, signs, w)
            store(words, self._codes(levels[w], signs[w]), w)
        planes = [words]
        if len(codec.plane_bits) > 1:
            for w in range(len(mine) // 4):
                positive = T.shift_right(signs[w], u32(self._field - 1))
                store(signs, T.bitwise_and(positive, u32(_UNITS[self._field])), w)
            planes.append(self._second_plane(signs, mine, t))
        return Encoded(planes, self._scales(norm, squared_norm, levels))

    def _prepare(self, norm) -> None:
        """Boundaries and levels times the norm, and sums of the lane's values."""
        # The residual is in units of the values; products of a value and a level are not.
        plain = self._rule != "norm" and not self._codec.residual_sign
        self._step = self._table(self._levels, None if plain else norm)
        self._bound = []
        for n in range(self._level_bits):
            apart = len(self._levels) >> n
            middles = self._bounds[apart // 2 - 1 :: apart]
            self._bound.append(self._table([-b * _STEEP for b in middles], norm))
        self._squares = self._sum()
        if self._rule != "norm":
            self._distances, self._turned, self._products = (self._sum() for _ in range(3))

    @staticmethod
    def _table(values: list[float], norm) -> list:
        """What `_pick` picks from: values times the norm, if there is one."""
        registers = local(len(values), "float32")
        for i, value in enumerate(_moebius(values)):
            store(registers, f32(value) if norm is None else norm * f32(value), i)
        return [registers[i] for i in range(len(values))]

    @staticmethod
    def _sum():
        register = local(1, "float32")
        store(register, f32(0))
        return register

    # --- codes

    def _find_word(self, value, mine: list[int], bytes_: int, levels, signs, w: int) -> None:
        """Levels of the values of four bytes, and above them, in the same fields, signs."""
        sums = local(2, "float32")
        for half in range(2):
            store(sums, f32(_MAGIC), half)
        fields = range(8 // self._field)
        for n, (byte, field) in enumerate(itertools.product((3, 2, 1, 0), reversed(fields))):
            one = value[self._row.slot(mine[byte] + field * bytes_)]
            above, residual = self._find(let(T.fabs(one)))
            for bit, is_above in enumerate(reversed(above)):
                weight = float(1 << (8 * (byte % 2) + self._field * field + bit))
                store(sums, sums[byte // 2] + is_above * f32(weight), byte // 2)
            ahead = self._field
            if residual is not None:
                _append(signs, w, residual, 1, first=n == 0)
                ahead -= 1
            _append(signs, w, one, ahead, first=n == 0 and residual is None)
        halves = [as_bits(sums[half]) for half in range(2)]
        store(levels, byte_perm(halves[0], halves[1], 0x5410), w)

    def _codes(self, levels, signs):
        """A word of the first plane, of its values' levels and signs."""
        unit, top = _UNITS[self._field], self._field - 1
        if not self._codec.residual_sign:
            negative = let(T.bitwise_and(T.bitwise_not(signs), u32(unit << top)))
            lowest = let(T.shift_right(negative, u32(top)))
            if len(self._codec.plane_bits) > 1:
                # The sign itself is in the other plane.
                return T.bitwise_xor(levels, negative + lowest)
            flipped = T.bitwise_xor(levels, negative - lowest)
            return T.bitwise_or(flipped, T.bitwise_and(signs, u32(unit << top)))
        negative = let(T.bitwise_and(T.bitwise_not(signs), u32(unit << top - 1)))
        flipped = T.bitwise_xor(levels, negative - T.shift_right(negative, u32(top - 1)))
        # The highest bit says whether value and residual have the same sign.
        same = T.bitwise_and(T.shift_left(signs, u32(1)), u32(unit << top))
        high = T.bitwise_and(T.bitwise_xor(signs, same), u32(unit << top | unit << top - 1))
        return T.bitwise_or(flipped, high)

    def _find(self, magnitude):
        """Bits of the level of a magnitude, highest first, each 0 or 1, and the residual."""
        above: list = []
        for bound in self._bound:
            bit = local(1, "float32")
            ptx("fma.rn.ftz.sat.f32", bit[0], magnitude, f32(_STEEP), self._pick(bound, above))
            above.append(bit[0])
        summed = self._rule in ("least_squares", "unbiased")
        if not self._codec.residual_sign and not summed:
            return above, None
        level = self._pick(self._step, above)
        if summed:
            store(self._products, self._products[0] + magnitude * level)
        if not self._codec.residual_sign:
            return above, None
        residual = let(magnitude - level)
        if self._rule == "norm":
            store(self._squares, self._squares[0] + residual * residual)
        else:
            turn = T.bitwise_and(as_bits(residual), self._sign)
            turned = as_float(T.bitwise_xor(as_bits(level), turn))
            store(self._turned, self._turned[0] + turned)
            store(self._distances, self._distances[0] + T.fabs(residual))
        return above, residual

    @staticmethod
    def _pick(table: list, above: list):
        """The value of a table at the index whose highest bits are given."""
        for bit in above:
            half = len(table) // 2
            table = [let(table[i] + bit * table[i + half]) for i in range(half)]
        return table[0]

    # --- planes

    def _second_plane(self, positive, mine: list[int], t):
        """The plane of signs: in byte j those of bytes j and j + D/8 of the first, in turn."""
        eighth = self._row.dim // 8
        if eighth % 4:
            return self._straddled(positive, eighth)
        if isinstance(self._row, LaneRow) and eighth // 4 % self._row.lanes:
            return self._shared(positive, eighth // 4, t)
        if eighth in mine:
            count = mine.index(eighth) // 4
            words = local(count, "uint32")
            for i in range(count):
                later = T.shift_left(positive[i + count], u32(1))
                store(words, T.bitwise_or(positive[i], later), i)
            return words
        words = local(len(mine) // 4, "uint32")
        for i in range(len(mine) // 4):
            own = let(T.shift_left(positive[i], T.cast(t // 2, "uint32")))
            store(words, T.bitwise_or(own, shuffle_xor(own, 2)), i)
        return words

    @staticmethod
    def _straddled(positive, eighth: int):
        """The plane of a row in one lane whose halves begin inside a word."""
        count, last = -(-eighth // 4), int(positive.shape[0]) - 1
        words = local(count, "uint32")
        for i in range(count):
            at = (eighth + 4 * i) // 4
            selector = sum((eighth % 4 + b) << 4 * b for b in range(4))
            later = byte_perm(positive[at], positive[min(at + 1, last)], selector)
            store(words, T.bitwise_or(positive[i], T.shift_left(later, u32(1))), i)
        return words

    @staticmethod
    def _shared(positive, half: int, t):
        """The plane of a row in four lanes that have words in turn, halves of which are two apart.

        At the end two lanes have a word that is not in the plane.
        """
        count, last = -(-half // 4), int(positive.shape[0]) - 1
        words = local(count, "uint32")
        for i in range(count):
            # Lanes of the upper two are behind the others of a turn, which need those of the next.
            after = i + half // 4
            sent = let(T.Select(t >= 2, positive[after], positive[min(after + 1, last)]))
            later = T.shift_left(shuffle_xor(sent, 2), u32(1))
            store(words, T.bitwise_or(positive[i], later), i)
        return words

    # --- scales

    def _scales(self, norm, squared_norm, levels) -> list:
        dim, residual = self._row.dim, self._codec.residual_sign
        if self._rule == "norm":
            if not residual:
                return [norm]
            self._reduce(self._squares)
            inverse = let(f32(dim**-0.5) / norm)
            mean = self._squares[0] * inverse * inverse + f32(NORM_EPS)
            return [norm, let(T.sqrt(mean) * f32(dim**-0.5))]
        size = self._squared_levels(levels)
        if self._rule != "matched":
            self._reduce(self._products)
        product, gap = self._products[0], None
        if residual:
            self._reduce(self._distances)
            self._reduce(self._turned)
            inverse = let(f32(1) / norm)
            turned = let(self._turned[0] * inverse)
            gap = let(self._distances[0] * inverse * f32(1 / dim))
            size = let(size + gap * (turned * f32(2) + gap * f32(dim)))
            product = let(product * inverse + gap * (self._distances[0] + self._turned[0]))
        under = let((product if self._rule == "unbiased" else size) * f32(1 / dim))
        over = product * f32(1 / dim) if self._rule == "least_squares" else squared_norm
        # A row of zeros has a scale of zero, and rounding may leave less; nan stays.
        scale = let(T.Select(under <= f32(0), f32(0), over / under))
        if self._rule == "matched":
            scale = let(T.sqrt(scale))
        return [scale] if gap is None else [scale, let(gap * f32(dim**-0.5))]

    def _reduce(self, register) -> None:
        reduce_lanes(register, 0, lambda a, b: a + b, self._row.masks)

    def _squared_levels(self, levels):
        """Sum of the squares of the row's levels."""
        weights = [round(w * 2**_SQUARE) for w in _moebius([c * c for c in self._levels])]
        unit, count = _UNITS[self._field], int(levels.shape[0])
        total = local(1, "uint32")
        store(total, u32(0))
        for first in range(0, count, self._field):
            # As many words as a field has bits make one full plane of each bit of the level.
            several = [levels[w] for w in range(first, min(first + self._field, count))]
            planes = [
                let(
                    _any(
                        T.bitwise_and(_shift(word, i - bit), u32(unit << i))
                        for i, word in enumerate(several)
                    )
                )
                for bit in range(self._level_bits)
            ]
            for subset in range(1, len(self._levels)):
                chosen = [plane for bit, plane in enumerate(planes) if subset >> bit & 1]
                both = chosen[0]
                for plane in chosen[1:]:
                    both = T.bitwise_and(both, plane)
                weight = u32(weights[subset] & 0xFFFFFFFF)
                store(total, total[0] + T.popcount(both) * weight)
        self._reduce(total)
        least = self._row.dim * weights[0]
        return let(T.cast(total[0] + u32(least), "float32") * f32(2.0**-_SQUARE))


def _append(words, w: int, value, count: int, first: bool) -> None:
    """Shift the highest bits of a value into a word from below: one shift of two registers."""
    bits = T.shift_right(as_bits(value), u32(32 - count))
    store(words, bits if first else T.bitwise_or(T.shift_left(words[w], u32(count)), bits), w)


def _moebius(values: list[float]) -> list[float]:
    """Coefficients of the products of bits whose sum is a value of an index with these bits."""
    out = list(values)
    for bit in range(len(out).bit_length() - 1):
        for i in range(len(out)):
            if i >> bit & 1:
                out[i] -= out[i ^ 1 << bit]
    return out


def _shift(word, left: int):
    if left == 0:
        return word
    return T.shift_left(word, u32(left)) if left > 0 else T.shift_right(word, u32(-left))


def _any(words: Any):
    """Bitwise or of several words."""
    first, *others = words
    for word in others:
        first = T.bitwise_or(first, word)
    return first
