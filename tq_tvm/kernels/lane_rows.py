r"""Rows of any head_dim in lanes: what ``fill``, ``flatten`` and ``rotate`` of GPUs do with most.

Tensor cores rotate rows whose coordinates are all bits (`hadamard_cuda`). A row of 80, 96, 112 or
192 values has a factor of Paley's in its matrix, which takes additions: so one lane has all of a
row, or two or four lanes have its groups of four neighbours in turn, and each factor is taken
inside a lane, but for bits that tell lanes apart. Of 576 values there are two such factors, and
neighbouring groups of the inner one are in different lanes: values change places to take it.

Rows are read and written 16 bytes at a time by neighbouring lanes, through shared memory, where
they are an odd number of such chunks apart: lanes that read different rows meet different banks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.formats import hadamard_factors, rotation_signs
from tq_tvm.kernels.blocks import paley_rows
from tq_tvm.kernels.device import (
    access,
    f32,
    high_half,
    let,
    local,
    low_half,
    ptx,
    reduce_lanes,
    shuffle_xor,
    store,
    u32,
)
from tq_tvm.spec import CacheSpec

__all__ = [
    "GROUP",
    "MULTIPLIED",
    "LaneRow",
    "copy_turns",
    "factor_rows",
    "multiplies",
    "padded_words",
]

GROUP = 4
"""Neighbouring values that stay in one lane: a word of bytes."""

MULTIPLIED = (64, 128, 256)
"""Dimensions of rows that tensor cores rotate, or shuffles."""

_LANES = {64: 1, 80: 1, 96: 1, 112: 1, 128: 2, 192: 2, 256: 4, 512: 8, 576: 4}
"""Lanes of a row: groups D/4 apart, whose codes share a byte, have to be in one of them; so are
those D/8 apart, whose signs do, but of 576 values, where they are two lanes apart."""

_KEPT = 14
"""Most turns of a copy whose addresses a lane may keep in registers."""


def padded_words(dim: int) -> int:
    """Words of a row of 16-bit values in shared memory: an odd number of chunks of 16 bytes."""
    return (dim // 8 | 1) * 4


def copy_turns(dim: int, rows: int) -> Iterator[Any]:
    """Numbers of the turns in which a warp's lanes copy 16 bytes of some rows each."""
    count = rows * dim // (8 * 32)
    if count <= _KEPT:
        yield from range(count)
        return
    with I.serial(0, count, annotations={"disable_unroll": True}) as turn:
        yield turn


def multiplies(spec: CacheSpec) -> bool:
    """Whether tensor cores rotate the rows of a spec, of K as of V."""
    return spec.head_dim_v is None and spec.head_dim in MULTIPLIED


def factor_rows(order: int, values: list) -> list:
    """A factor of a Hadamard matrix, unscaled, times as many values."""
    if order & (order - 1):
        return [let(total) for total in paley_rows(order, values)]
    for stage in range(order.bit_length() - 1):
        bit = 1 << stage
        values = [
            let(values[i ^ bit] - value if i & bit else value + values[i ^ bit])
            for i, value in enumerate(values)
        ]
    return values


class LaneRow:
    """Which values of a row a lane has; lanes of a row are neighbours."""

    def __init__(self, dim: int) -> None:
        self.dim, self.lanes = dim, _LANES[dim]
        self.values = dim // self.lanes
        self.masks = tuple(1 << i for i in range(self.lanes.bit_length() - 1))

    def slot(self, coordinate: int) -> int:
        """Index of a coordinate among those of a lane."""
        return coordinate // (GROUP * self.lanes) * GROUP + coordinate % GROUP

    def coordinate(self, slot: int) -> int:
        """The coordinate at an index, of lane 0: of others, `GROUP` for each lane later."""
        return slot // GROUP * (GROUP * self.lanes) + slot % GROUP

    def read(self, words, pointer, part) -> None:
        """Read 16-bit values; ``pointer`` is of a word of the row in shared memory."""
        step = 1 if self.lanes > 1 else 2
        for n in range(0, self.values // GROUP, step):
            at = pointer((n * self.lanes + part) * 2)
            registers = [words[2 * n + i] for i in range(2 * step)]
            access("ld.shared", registers, at)

    def write(self, words, pointer, part) -> None:
        """Write 16-bit values where `read` reads."""
        step = 1 if self.lanes > 1 else 2
        for n in range(0, self.values // GROUP, step):
            at = pointer((n * self.lanes + part) * 2)
            registers = [words[2 * n + i] for i in range(2 * step)]
            access("st.shared", registers, at)

    def widen(self, dtype: str, words, value) -> None:
        """Floats of words of two values."""
        for i in range(self.values):
            half = high_half if i % 2 else low_half
            store(value, half(dtype, words[i // 2]), i)

    def turn_signs(self, words, part) -> None:
        """Multiply words of two values by the signs of `rotation_signs`."""
        signs = rotation_signs(self.dim)
        for i in range(self.values // 2):
            masks = []
            for lane in range(self.lanes):
                first = self.coordinate(2 * i) + GROUP * lane
                pair = (signs[first] < 0, signs[first + 1] < 0)
                masks.append(0x8000 * pair[0] | 0x80000000 * pair[1])
            if not any(masks):
                continue
            mask = u32(masks[-1])
            for lane in reversed(range(self.lanes - 1)):
                mask = T.Select(part == lane, u32(masks[lane]), mask)
            store(words, T.bitwise_xor(words[i], mask), i)

    def rotate(self, value, part) -> None:
        """Multiply the row by the Hadamard matrix, unscaled."""
        *orders, power = hadamard_factors(self.dim)
        bit = 1
        while bit < power:
            if GROUP <= bit < GROUP * self.lanes:
                self._across(value, bit // GROUP, part)
            else:
                starts = [c for c in map(self.coordinate, range(self.values)) if not c & bit]
                for c in starts:
                    self._factor(value, [self.slot(c), self.slot(c | bit)])
            bit *= 2
        inner = power
        for order in reversed(orders):
            if inner < GROUP * self.lanes and self.lanes > 1:
                self._neighbours(value, order, part)
            else:
                for c in map(self.coordinate, range(self.values)):
                    if c % (order * inner) < inner:
                        self._factor(value, [self.slot(c + i * inner) for i in range(order)])
            inner *= order

    @staticmethod
    def _factor(value, slots: list[int]) -> None:
        found = factor_rows(len(slots), [let(value[slot]) for slot in slots])
        for slot, result in zip(slots, found, strict=True):
            store(value, result, slot)

    def _neighbours(self, value, order: int, part) -> None:
        """A factor of runs of ``order`` neighbouring groups, which lanes have in turn.

        Of as many runs as there are lanes each gets one from the others, and gives it back.
        """
        own = GROUP * order // self.lanes
        for first in range(0, self.values, own * self.lanes):
            runs = [range(at, at + own) for at in range(first, first + own * self.lanes, own)]
            self._change_places(value, runs, part)
            for c in range(GROUP):
                groups = [divmod(i, self.lanes) for i in range(order)]
                self._factor(value, [runs[lane][GROUP * n + c] for n, lane in groups])
            self._change_places(value, runs, part)

    def _change_places(self, value, runs: list[range], part) -> None:
        """What lane i has of run j, lane j gets as run i."""
        other = local(1, "float32")
        for mask in self.masks:
            upper = let(T.bitwise_and(part, mask) != 0)
            for j in range(self.lanes):
                if j & mask:
                    continue
                for low, high in zip(runs[j], runs[j | mask], strict=True):
                    store(other, shuffle_xor(T.Select(upper, value[low], value[high]), mask))
                    store(value, T.Select(upper, other[0], value[low]), low)
                    store(value, T.Select(upper, value[high], other[0]), high)

    def _across(self, value, mask: int, part) -> None:
        """A bit that tells lanes apart."""
        sign = let(T.Select(T.bitwise_and(part, mask) != 0, f32(-1), f32(1)))
        other = local(1, "float32")
        for i in range(self.values):
            store(other, shuffle_xor(value[i], mask))
            store(value, other[0] + sign * value[i], i)

    def add_up(self, register) -> None:
        """Add one register over the lanes of a row."""
        reduce_lanes(register, 0, lambda a, b: a + b, self.masks)

    def negate(self, value) -> None:
        """Turn signs, but zeros stay positive."""
        for i in range(self.values):
            ptx("fma.rn.f32", value[i], value[i], f32(-1), f32(0))
