"""Lloyd-Max rows in lanes by look-ups: what `flatten_cuda`, `attend_cuda` and `prefill_cuda` share.

A row of 4-bit codes has 16 different values, a value and its negative eight times:
``-value(code) = value(code ^ 15)``. So a lane works out the 8 values of codes whose top bit is set
(a positive residual of qjl4, a positive value of mse4) once, low and high bytes apart in four
words, and ``prmt`` looks up four codes' bytes at a time; other codes are turned before, and the
signs of what was found after. Codes of 2 and 3 bits have four and eight values and no turning;
those of mse3 are put together of their planes first. Two more ``prmt`` put the bytes of four values
together, in the order of the coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from tvm.script import tirx as T

from tq_tvm.kernels.device import (
    PAIR,
    access,
    byte_perm,
    f32,
    from_half,
    high_half,
    let,
    local,
    low_half,
    ptx,
    store,
    u32,
)
from tq_tvm.spec import Codec

__all__ = [
    "CodedRow",
    "HighTable",
    "LevelTable",
    "alone",
    "find_mirrored",
    "find_pairs",
    "half_bits",
    "level_pairs",
    "looked_up",
    "row_residual",
    "row_scale",
    "scaled_levels",
    "together",
    "unit_levels",
]

GLOBAL = "ld.global.nc"
"""State space of codes in a cache."""


Chain = Generator[None, None, Any]
"""Instructions that wait for one another; ``yield`` is where others may come between."""


def alone(chain: Chain) -> Any:
    """The result of a chain, nothing between its instructions."""
    (result,) = together([chain])
    return result


def together(chains: list[Chain]) -> list[Any]:
    """Results of chains of the same steps, whose instructions take turns: each waits less."""
    results: list[Any] = [None] * len(chains)
    running = dict(enumerate(chains))
    while running:
        for number, chain in list(running.items()):
            try:
                next(chain)
            except StopIteration as end:
                results[number] = end.value
                del running[number]
    return results


def looked_up(codec: Codec) -> list[float]:
    """Levels that a table has: of 16, the positive ones."""
    levels = list(codec.centroids)
    return levels[len(levels) // 2 :] if len(levels) == 16 else levels


def half_bits(levels: list[float]) -> list[int]:
    """Bits of levels as float16."""
    return [int(bits) for bits in np.array(levels).astype(np.float16).view(np.uint16)]


def level_pairs(levels: list[float], unknown_zero):
    """Words of two levels in registers that the compiler cannot know: see `key_codes`."""
    halves = half_bits(levels)
    pairs = local(len(levels) // 2, "uint32")
    for i in range(len(levels) // 2):
        word = halves[2 * i] | halves[2 * i + 1] << 16
        store(pairs, T.bitwise_or(u32(word), unknown_zero), i)
    return pairs


def row_scale(dtype: str, codec: Codec, meta):
    """The scale in a row's word of scales."""
    return low_half(dtype, meta) if codec.residual_sign else from_half(dtype, meta)


def row_residual(dtype: str, codec: Codec, meta):
    """The length of a row's residual, or None for a codec without its signs."""
    return let(high_half(dtype, meta)) if codec.residual_sign else None


def scaled_levels(codec: Codec, dim: int, scale, residual) -> list:
    """Values of a table of a row; ``residual`` is added to codes whose top bit is set."""
    values = [scale * f32(c * dim**-0.5) for c in looked_up(codec)]
    return values if residual is None else _shifted(values, scale * residual)


def unit_levels(codec: Codec, dim: int, residual) -> list:
    """`scaled_levels` without the scale and 1 / sqrt(D)."""
    values = [f32(c) for c in looked_up(codec)]
    return values if residual is None else _shifted(values, residual * f32(dim**0.5))


def _shifted(values: list, shift) -> list:
    shift = let(shift)
    return [value + shift for value in values]


class LevelTable:
    """Values by code, as words of low and of high bytes; ``pairs`` has them as words of two."""

    def __init__(self, pairs, count: int) -> None:
        self.low, self.high = (local(2, "uint32") for _ in range(2))
        for i in range(count // 4):
            store(self.low, byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x6420), i)
            store(self.high, byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7531), i)
        if count == 4:
            store(self.low, self.low[0], 1)
            store(self.high, self.high[0], 1)

    @classmethod
    def rounded(cls, dtype: str, values: list) -> LevelTable:
        """Of floats that the kernel works out."""
        pairs = local(len(values) // 2, "uint32")
        for i in range(len(values) // 2):
            ptx(PAIR[dtype], pairs[i], values[2 * i + 1], values[2 * i])
        return cls(pairs, len(values))

    def find(self, selector, signs=None) -> Chain:
        """Four values as words: of codes 0 and 2 of the selector, and of codes 1 and 3."""
        low, high, words = (local(n, "uint32") for n in (1, 1, 2))
        ptx("prmt.b32", low[0], self.low[0], self.low[1], selector)
        ptx("prmt.b32", high[0], self.high[0], self.high[1], selector)
        if signs is not None:
            yield
            store(high, T.bitwise_xor(high[0], signs))
        yield
        store(words, byte_perm(low[0], high[0], 0x6240), 0)
        store(words, byte_perm(low[0], high[0], 0x7351), 1)
        return words


class HighTable:
    """Four values whose low bytes are alike: ``low`` has it four times, ``high`` the others."""

    def __init__(self, low, high) -> None:
        self.low, self.high = low, high

    def find(self, selector) -> Chain:
        """Four values as words, see `LevelTable.find`."""
        high, words = local(1, "uint32"), local(2, "uint32")
        ptx("prmt.b32", high[0], self.high, self.high, selector)
        yield
        store(words, byte_perm(self.low, high[0], 0x6240), 0)
        store(words, byte_perm(self.low, high[0], 0x7351), 1)
        return words


def find_mirrored(table: LevelTable, word) -> Chain:
    """Values of a word of 4-bit codes: ``[nibble, half]``, two neighbouring coordinates each."""
    turned, selector, signs = (local(n, "uint32") for n in (1, 2, 2))
    found = local((2, 2), "uint32")
    # The top bit of every nibble that has none, and seven below it.
    store(turned, T.bitwise_and(T.bitwise_not(word), u32(0x88888888)))
    yield
    sevens = let(turned[0] - T.shift_right(turned[0], u32(3)))
    fifteens = let(turned[0] + sevens)
    store(selector, T.bitwise_and(T.bitwise_xor(word, sevens), u32(0x77777777)), 0)
    store(selector, T.shift_right(selector[0], u32(16)), 1)
    for half in range(2):
        nibbles = fifteens if half == 0 else T.shift_right(fifteens, u32(16))
        # 0 for a nibble of 0, and for 15 eight times the sign of the top byte. Both words are
        # operands as they are: the compiler copies other ones that it knows for every ``prmt``.
        ptx("prmt.b32", signs[half], u32(0), u32(0x80000000), nibbles)
        store(signs, T.bitwise_and(signs[half], u32(0x80808080)), half)
        yield
        words = yield from table.find(selector[half], signs[half])
        for nibble in range(2):
            store(found, words[nibble], nibble, half)
    return found


def find_pairs(table: LevelTable | HighTable, word, third) -> Chain:
    """Values of a word of 2-bit codes: ``[field, half]``.

    ``third``, if not None, has a third bit of every code at the lowest of its two.
    """
    found, selector = local((4, 2), "uint32"), local(2, "uint32")
    for odd in range(2):
        fields = T.shift_right(word, u32(2)) if odd else word
        store(selector, T.bitwise_and(fields, u32(0x33333333)), 0)
        if third is not None:
            above = third if odd else T.shift_left(third, u32(2))
            above = T.bitwise_and(above, u32(0x44444444))
            store(selector, T.bitwise_or(selector[0], above), 0)
        store(selector, T.shift_right(selector[0], u32(16)), 1)
        for half in range(2):
            yield
            words = yield from table.find(selector[half])
            for upper in range(2):
                store(found, words[upper], 2 * upper + odd, half)
    return found


class CodedRow:
    """A lane's part of a row: codes and scales in registers, and the values that they stand for.

    ``lanes`` have a row between them, each ``bytes`` of every field in turn; ``dtype`` is of scales
    and, without a ``value_dtype``, of values; ``space`` is where `read_codes` reads.
    """

    def __init__(
        self,
        dim: int,
        dtype: str,
        codec: Codec,
        lanes: int,
        space: str = GLOBAL,
        value_dtype: str | None = None,
    ) -> None:
        self.dim, self.dtype, self.codec, self._space = dim, dtype, codec, space
        self._value_dtype = dtype if value_dtype is None else value_dtype
        self.field = codec.plane_bits[0]
        self.plane = dim * self.field // 8
        self.bytes = self.plane // lanes
        self._lanes = lanes
        self.codes = local(max(1, self.bytes // 4), "uint32")
        self.meta = local(1, "uint32")
        if self.planes > 1:
            self.third = local(max(1, self.bytes // 4), "uint32")

    @property
    def planes(self) -> int:
        """Planes of a row; the second one is the third bit of the codes in the first."""
        return len(self.codec.plane_bits)

    @property
    def wide(self) -> str:
        """Instruction that reads words of codes."""
        return f"{self._space}.L1::no_allocate" if self._space == GLOBAL else self._space

    def read_codes(self, pointer: Callable[[Any], Any], part) -> None:
        """Read the codes of lane ``part``; ``pointer`` is of a byte of the row."""
        self._read(self.codes, pointer, T.cast(part * self.bytes, "int64"))
        if self.planes > 1:
            # Lanes of both halves of the first plane have the same bytes of the second.
            half = self._lanes // 2
            inside = T.cast(part % half * self.bytes + self.plane, "int64")
            self._read(self.third, pointer, inside)
            self._align(range(max(1, self.bytes // 4)), part // half)

    def read_planes(self, first: Callable[[int], Any], second: Callable[[int], Any], half) -> None:
        """Read the codes, of which ``first`` and ``second`` are the n-th 16 bytes of each plane.

        ``half`` is that of the first plane in which they are.
        """
        planes = [(self.codes, first)]
        if self.planes > 1:
            planes.append((self.third, second))
        for words, pointer in planes:
            for n in range(0, self.bytes // 4, 4):
                four = [words[i] for i in range(n, min(n + 4, self.bytes // 4))]
                access(self.wide, four, pointer(n // 4))
        if self.planes > 1:
            self._align(range(self.bytes // 4), half)

    def _read(self, words, pointer: Callable[[Any], Any], at) -> None:
        count = self.bytes // 4
        if count == 0:
            short = local(1, "uint16")
            ptx(f"{self._space}.u16", short[0], pointer(at))
            store(words, T.cast(short[0], "uint32"))
        for first in range(0, count, 4):
            place = pointer(at + T.int64(4 * first) if first else at)
            access(self.wide, [words[i] for i in range(first, min(first + 4, count))], place)

    def _align(self, which, half) -> None:
        """Shift bytes of the second plane to the codes of a half of the first."""
        for i in which:
            store(self.third, T.shift_right(self.third[i], T.cast(half, "uint32")), i)

    def _find(self, table: LevelTable, i: int):
        """Values of word ``i``: ``[field, half]``."""
        if self.field == 4:
            return alone(find_mirrored(table, self.codes[i]))
        third = self.third[i] if self.planes > 1 else None
        return alone(find_pairs(table, self.codes[i], third))

    def _scales(self):
        """Scale and, for a codec with signs, residual."""
        scale = let(row_scale(self.dtype, self.codec, self.meta[0]))
        return scale, row_residual(self.dtype, self.codec, self.meta[0])

    def chunks(self):
        """Four words of values at a time, as soon as they are found: their field and number in it.

        Of rows of which a lane has 8 bytes or more of every plane.
        """
        table = self._table()
        for i in range(0, self.bytes // 4, 2):
            pair = [self._find(table, i + n) for n in range(2)]
            for field in range(8 // self.field):
                yield field, i // 2, [found[field, half] for found in pair for half in range(2)]

    def lines(self, part):
        """Of each field: the coordinate of the lane's first value, and words of two values."""
        table = self._table()
        fields, words = 8 // self.field, max(1, self.bytes // 2)
        found = local((fields, 2 * max(1, self.bytes // 4)), "uint32")
        for i in range(max(1, self.bytes // 4)):
            part_found = self._find(table, i)
            for field in range(fields):
                for half in range(2):
                    store(found, part_found[field, half], field, 2 * i + half)
        for field in range(fields):
            first = field * (self.dim // fields)
            yield first + part * self.bytes, [found[field, i] for i in range(words)]

    def _table(self) -> LevelTable:
        """Values of the row by code."""
        scale, residual = self._scales()
        levels = scaled_levels(self.codec, self.dim, scale, residual)
        return LevelTable.rounded(self._value_dtype, levels)
