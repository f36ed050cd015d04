"""Which tokens a CTA of ``decode`` or ``attend`` attends to: equal shares, whatever the lengths.

The tiles of all sequences, one after another, are cut into ``groups`` equal shares, which cross
sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.device import (
    FULL_WARP,
    i32,
    let,
    local,
    loop,
    reduce_lanes,
    shuffle_xor,
    store,
    u32,
    when,
)

__all__ = [
    "Place",
    "Shares",
    "find_place",
    "share_out",
    "shared_lengths",
    "tiles_by_length",
    "tiles_of",
]


@dataclasses.dataclass(frozen=True)
class Shares:
    """All tiles, the tiles of a group, and the tiles before one sequence."""

    total: Any
    size: Any
    before: Any


@dataclasses.dataclass(frozen=True)
class Place:
    """Registers that walk through a share: the next tile, the last but one, and where it lies."""

    tile: Any
    end: Any
    sequence: Any
    offset: Any


def tiles_of(shape: Shape, length):
    """Tiles of a sequence of a length."""
    return (length + (shape.config.tile - 1)) // shape.config.tile


def shared_lengths(seq_lens, features):
    """Tokens of each sequence that are shared out: those before a window to the left are not."""
    return seq_lens if features is None or features.sliding is None else features.sliding


def tiles_by_length(shape: Shape, seq_lens) -> Callable[[Any], Any]:
    """`tiles_of` a sequence, by its number."""
    return lambda sequence: tiles_of(shape, seq_lens[sequence])


def share_out(shape, tiles_of_sequence, batch, lane, groups, sequence=None) -> Shares:
    """Add up the tiles; every lane gets the sums. ``before`` counts up to ``sequence``.

    ``tiles_of_sequence`` tells how many a sequence has; ``shape.least_tiles`` are a group's.
    """
    total, before, at, tiles = (local(1, "int32") for _ in range(4))
    store(total, i32(0))
    store(before, i32(0))
    store(at, lane)
    with loop(at[0] < batch):
        store(tiles, tiles_of_sequence(at[0]))
        store(total, total[0] + tiles[0])
        if sequence is not None:
            store(before, before[0] + T.Select(at[0] < sequence, tiles[0], i32(0)))
        store(at, at[0] + 32)
    reduce_lanes(total, 0, lambda a, b: a + b)
    if sequence is not None:
        reduce_lanes(before, 0, lambda a, b: a + b)
    size = local(1, "int32")
    share = T.truncdiv(total[0] + groups - 1, groups)
    store(size, T.max(share, i32(shape.least_tiles)))
    return Shares(total, size, before)


def find_place(shares: Shares, tiles_of_sequence, batch, lane, group) -> Place:
    """Find the sequence in which the share of a group begins, 32 sequences at a time."""
    tile, end, sequence, offset = (local(1, "int32") for _ in range(4))
    store(tile, group * shares.size[0])
    store(end, T.min(shares.total[0], tile[0] + shares.size[0]))
    store(sequence, i32(0))
    store(offset, i32(0))
    base, before, found, tiles, sums = (local(1, "int32") for _ in range(5))
    store(base, i32(0))
    store(before, i32(0))
    store(found, i32(0))
    # A group without a share has nothing to find.
    with when(tile[0] < end[0]), loop(found[0] == 0):
        at = let(base[0] + lane)
        store(tiles, i32(0))
        with when(at < batch):
            store(tiles, tiles_of_sequence(at))
        store(sums, tiles[0])
        for step in (1, 2, 4, 8, 16):
            lower = let(T.cuda.__shfl_up_sync(u32(FULL_WARP), sums[0], step, 32))
            store(sums, T.Select(lane >= step, sums[0] + lower, sums[0]))
        past = T.cast(before[0] + sums[0] > tile[0], "int32")
        ballot = let(T.cast(T.cuda.ballot_sync(u32(FULL_WARP), past), "int32"))
        with I.If(ballot != 0):
            with I.Then():
                first = let(T.call_pure_extern("int32", "__ffs", ballot) - 1)
                start = T.cuda.__shfl_sync(u32(FULL_WARP), sums[0] - tiles[0], first, 32)
                store(sequence, base[0] + first)
                store(offset, tile[0] - before[0] - start)
                store(found, i32(1))
            with I.Else():
                store(before, before[0] + T.cuda.__shfl_sync(u32(FULL_WARP), sums[0], 31, 32))
                store(base, base[0] + 32)
    return Place(tile, end, sequence, offset)


def unknown_zero(shares: Shares):
    """A zero that the compiler cannot know."""
    return T.cast(shuffle_xor(T.shift_right(shares.total[0], 31), 1), "uint32")
