r"""Codes and scales of 8 rotated rows of a warp: what ``fill`` does with a Lloyd-Max codec on GPUs.

A lane has D/4 values w of a row, unscaled: w = -sqrt(D) y. With n the row's norm, b the boundaries
and c the levels of positive values::

    level = #{|w| > n b}        code = middle +- (level + 1/2), the sign that of y
    |y| = |w| / sqrt(D)         |y^| = scale c / sqrt(D)

Comparisons
    A steep difference, cut off at 0 and 1, is a comparison f on the multiplier's pipe. Of three
    boundaries or one the level is the sum of f. Seven are searched in three steps: a boundary is
    b + f (b' - b) of those before. Codes of opposite values mirror each other, so a code is the
    middle of its range plus a distance with the value's sign: level + 1/2, of qjl4 with 4 more or
    less as the residual's magnitude is positive or negative, of the low plane of mse3 level - 3/2.
    Distances times powers of two add up, in float32, to two bytes at a time.

Planes
    The second plane of mse3 is the sign. Signs of a word of the first plane are shifted together,
    and interleaved with those of the word D/8 bytes on, which another lane has below D = 256.

Scales
    Rules other than ``norm`` need sum c^2, which is counted in the packed words: c^2 is a sum over
    the products of the level's bits, so one population count a product of bit planes is enough,
    weighed by integers of 2^-20. ``least_squares`` and ``unbiased`` need sum |w| c too, an addition
    a level and value; qjl4 sum |r| and sum c sign(r)::

        D <y^, y^> / scale^2 = sum c^2 + 2 e sum c sign(r) + D e^2        e = sum |r| / (n D)
        D <y, y^> / scale    = sum |w| c + e (sum |r| + n sum c sign(r))  r = |w| - n c
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
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

_MAGIC = 1.5 * 2**22
"""A float of this size has a unit of a half."""

_SQUARE = 20
"""Squares of levels are counted in units of 2^-20: those of a row fit 32 bits, since they are at
most 2.4 times those of its values, which are D."""

_UNITS = {2: 0x55555555, 4: 0x11111111}
"""The lowest bit of every field of a word."""


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


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
        per_byte = 8 // self._field
        bytes_ = dim // per_byte
        mine = [c for c in map(row.coordinate, range(row.values)) if c < bytes_]
        sums = local(len(mine) // 2, "float32")
        for n, byte in enumerate(mine):
            if n % 2 == 0:
                # Every code starts from the middle of its range.
                store(sums, f32(_MAGIC + 32767.5), n // 2)
            for field in range(per_byte):
                one = value[row.slot(byte + field * bytes_)]
                weight = float(1 << (8 * (n % 2) + self._field * field))
                store(sums, sums[n // 2] - self._code(one) * f32(weight), n // 2)
        words = local(len(mine) // 4, "uint32")
        for w in range(len(mine) // 4):
            halves = [let(T.shift_right(as_bits(sums[2 * w + i]), u32(1))) for i in range(2)]
            store(words, byte_perm(halves[0], halves[1], 0x5410), w)
        planes, positive = [words], None
        if len(codec.plane_bits) > 1:
            positive = self._positive(value, mine, bytes_)
            planes.append(self._second_plane(positive, mine, t))
        return Encoded(planes, self._scales(norm, squared_norm, words, positive))

    def _prepare(self, norm) -> None:
        """Boundaries and steps between levels times the norm, and sums of the lane's values."""
        bounds, levels = self._bounds, self._levels
        self._bound = local(len(bounds), "float32")
        self._step = local(len(levels), "float32")
        scaled = [-b * _STEEP for b in (_tree(bounds) if len(bounds) == 7 else bounds)]
        for i, b in enumerate(scaled):
            store(self._bound, norm * f32(b), i)
        steps = _moebius(levels) if len(levels) == 8 else _differences(levels)
        for i, step in enumerate(steps):
            # The residual is in units of the values; products of a value and a level are not.
            plain = self._rule != "norm" and not self._codec.residual_sign
            store(self._step, f32(step) if plain else norm * f32(step), i)
        self._squares = self._sum()
        if self._rule != "norm":
            self._distances, self._turned, self._products = (self._sum() for _ in range(3))

    @staticmethod
    def _sum():
        register = local(1, "float32")
        store(register, f32(0))
        return register

    # --- codes

    def _code(self, value):
        """Distance of a code from the middle of its range, with the sign of ``value``."""
        searched = len(self._bounds) == 7
        count = 3 if searched else len(self._bounds)
        above, code, rest = (local(n, "float32") for n in (count, 1, 2))
        magnitude = let(T.fabs(value))
        # The sign of a code in two planes is not in the first.
        store(code, f32(0.5 if len(self._codec.plane_bits) == 1 else 0.5 - len(self._levels) // 2))
        if searched:
            self._search(magnitude, above)
            for i, weight in enumerate((4, 2, 1)):
                store(code, code[0] + above[i] * f32(weight))
        else:
            for i in range(count):
                self._compare(magnitude, self._bound[i], above, i)
                store(code, code[0] + above[i])
        if self._codec.residual_sign or self._rule in ("least_squares", "unbiased"):
            self._find_level(above, rest)
        if self._rule in ("least_squares", "unbiased"):
            store(self._products, self._products[0] + magnitude * rest[0])
        if self._codec.residual_sign:
            store(code, code[0] + self._residual(magnitude, rest))
        signed = local(1, "uint32")
        store(signed, T.bitwise_xor(as_bits(code[0]), T.bitwise_and(as_bits(value), self._sign)))
        return as_float(signed[0])

    @staticmethod
    def _compare(magnitude, bound, above, i: int) -> None:
        """One where the magnitude is above the boundary, else zero."""
        ptx("fma.rn.ftz.sat.f32", above[i], magnitude, f32(_STEEP), bound)

    def _search(self, magnitude, above) -> None:
        """The bits of a level of eight, highest first."""
        bound = self._bound
        self._compare(magnitude, bound[0], above, 0)
        self._compare(magnitude, let(bound[1] + above[0] * bound[2]), above, 1)
        low = let(bound[3] + above[0] * bound[4])
        step = let(bound[5] + above[0] * bound[6])
        self._compare(magnitude, let(low + above[1] * step), above, 2)

    def _find_level(self, above, rest) -> None:
        """``rest[0]`` becomes the level of a magnitude."""
        step = self._step
        if len(self._levels) == 8:
            pairs = [let(step[i] + above[0] * step[i + 4]) for i in range(4)]
            ends = [let(pairs[i] + above[1] * pairs[i + 2]) for i in range(2)]
            store(rest, ends[0] + above[2] * ends[1], 0)
            return
        store(rest, step[0], 0)
        for i in range(len(self._bounds)):
            store(rest, rest[0] + above[i] * step[i + 1], 0)

    def _residual(self, magnitude, rest):
        """What a residual, whose level is in ``rest``, adds to the distance of a code."""
        level = None if self._rule == "norm" else let(rest[0])
        store(rest, magnitude - rest[0], 0)
        if level is None:
            store(self._squares, self._squares[0] + rest[0] * rest[0])
        else:
            turn = T.bitwise_and(as_bits(rest[0]), self._sign)
            turned = as_float(T.bitwise_xor(as_bits(level), turn))
            store(self._turned, self._turned[0] + turned)
            store(self._distances, self._distances[0] + T.fabs(rest[0]))
        store(rest, self._with_sign_of(rest[0], float(len(self._levels))), 1)
        return rest[1]

    def _with_sign_of(self, value, magnitude: float):
        word = local(1, "uint32")
        sign = T.bitwise_and(as_bits(value), self._sign)
        store(word, T.bitwise_or(sign, u32(_bits(magnitude))))
        return as_float(word[0])

    # --- planes

    def _positive(self, value, mine: list[int], bytes_: int):
        """Words of ones at the lowest bits of the fields of positive values."""
        words = local(len(mine) // 4, "uint32")
        for w in range(len(mine) // 4):
            for n, (byte, field) in enumerate(itertools.product((3, 2, 1, 0), repeat=2)):
                bits = as_bits(value[self._row.slot(mine[4 * w + byte] + field * bytes_)])
                # A sign and a bit of the exponent, which is cut out below.
                pair = T.shift_right(bits, u32(30))
                shifted = T.bitwise_or(T.shift_left(words[w], u32(2)), pair)
                store(words, shifted if n else pair, w)
            store(words, T.bitwise_and(T.shift_right(words[w], u32(1)), u32(_UNITS[2])), w)
        return words

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

    def _scales(self, norm, squared_norm, words, positive) -> list:
        dim, residual = self._row.dim, self._codec.residual_sign
        if self._rule == "norm":
            if not residual:
                return [norm]
            self._reduce(self._squares)
            inverse = let(f32(dim**-0.5) / norm)
            mean = self._squares[0] * inverse * inverse + f32(NORM_EPS)
            return [norm, let(T.sqrt(mean) * f32(dim**-0.5))]
        size = self._squared_levels(words, positive)
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

    def _squared_levels(self, words, positive):
        """Sum of the squares of the row's levels."""
        weights = [round(w * 2**_SQUARE) for w in _moebius([c * c for c in self._levels])]
        unit, count = _UNITS[self._field], int(words.shape[0])
        total = local(1, "uint32")
        store(total, u32(0))
        for first in range(0, count, self._field):
            # As many words as a field has bits make one full plane of each bit of the level.
            several = [
                self._magnitudes(words, positive, w)
                for w in range(first, min(first + self._field, count))
            ]
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

    def _magnitudes(self, words, positive, w: int):
        """A word with the bits of levels in its fields, and others above them."""
        unit, bits = u32(_UNITS[self._field]), u32(self._level_bits)
        if positive is not None:
            negative = let(T.bitwise_xor(positive[w], unit))
        else:
            negative = let(T.bitwise_and(T.shift_right(T.bitwise_not(words[w]), bits), unit))
        # Codes of negative values count down.
        flipped = T.shift_left(negative, bits) - negative if self._level_bits > 1 else negative
        return let(T.bitwise_xor(words[w], flipped))


def _differences(values: list[float]) -> list[float]:
    return [v - values[i - 1] if i else v for i, v in enumerate(values)]


def _moebius(values: list[float]) -> list[float]:
    """Coefficients of the products of bits whose sum is a value of an index with these bits."""
    out = list(values)
    for bit in range(len(out).bit_length() - 1):
        for i in range(len(out)):
            if i >> bit & 1:
                out[i] -= out[i ^ 1 << bit]
    return out


def _tree(bounds: list[float]) -> list[float]:
    """Constants of `Encoder._search` for seven boundaries."""
    low = bounds[4] - bounds[0]
    return [
        bounds[3],
        *(bounds[1], bounds[5] - bounds[1]),
        *(bounds[0], low, bounds[2] - bounds[0], bounds[6] - bounds[2] - low),
    ]


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
