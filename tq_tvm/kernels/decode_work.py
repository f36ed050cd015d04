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
    ptx,
    shuffle,
    shuffle_xor,
    store,
    u32,
    when,
)

__all__ = [
    "Place",
    "Shares",
    "find_share",
    "share_out",
    "shared_lengths",
    "tiles_by_length",
    "tiles_of",
]


@dataclasses.dataclass(frozen=True)
class Shares:
    """All tiles, the tiles of a group, and the tiles before one sequence, where that was asked."""

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


def share_out(shape, tiles_of_sequence, batch, lane, groups, sequence) -> Shares:
    """Add up the tiles; every lane gets the sums. ``before`` counts up to ``sequence``.

    ``tiles_of_sequence`` tells how many a sequence has. A group gets ``shape.least_tiles`` at
    least, and a lane asks for the lengths of ``shape.lengths_at_once`` sequences together: they may
    all have to come from memory.
    """
    total, before, at = (local(1, "int32") for _ in range(3))
    store(total, i32(0))
    store(before, i32(0))
    store(at, lane)
    count = let(T.cast(batch, "int32"))
    with loop(at[0] < count):
        numbers = [at[0] + 32 * n for n in range(shape.lengths_at_once)]
        tiles = _tiles(tiles_of_sequence, numbers, count, count)
        for n, number in enumerate(numbers):
            store(total, total[0] + tiles[n])
            store(before, before[0] + T.Select(number < sequence, tiles[n], i32(0)))
        store(at, at[0] + 32 * len(numbers))
    for sums in (total, before):
        ptx("redux_sync.add.s32", sums[0], sums[0], u32(FULL_WARP))
    return Shares(total, _share(shape, total[0], groups), before)


def find_share(shape, tiles_of_sequence, batch, lane, groups, group) -> tuple[Shares, Place]:
    """The share of a group, and the sequence in which it begins.

    A lane adds up the tiles of neighbouring sequences. A scan over lanes finds those in which the
    share begins, and a scan over these the sequence: as many steps for 64 sequences as for 1024.
    """
    own, at, total = (local(1, "int32") for _ in range(3))
    tile, end, sequence, offset = (local(1, "int32") for _ in range(4))
    count = let(T.cast(batch, "int32"))
    block = let(T.truncdiv(count + 31, 32))
    first = let(lane * block)
    past = let(T.min(first + block, count))
    store(own, i32(0))
    store(at, i32(0))
    with loop(at[0] < block):
        numbers = [first + at[0] + n for n in range(shape.lengths_at_once)]
        tiles = _tiles(tiles_of_sequence, numbers, past, count)
        for n in range(len(numbers)):
            store(own, own[0] + tiles[n])
        store(at, at[0] + len(numbers))
    sums = _scan(own[0], lane)
    store(total, shuffle(sums, 31))
    size = _share(shape, total[0], groups)
    store(tile, group * size[0])
    store(end, T.min(total[0], tile[0] + size[0]))
    store(sequence, i32(0))
    store(offset, i32(0))
    # A group without a share has nothing to find.
    with when(tile[0] < end[0]):
        found = _first_beyond(sums, tile[0])
        store(sequence, found * block)
        store(offset, tile[0] - shuffle(sums - own[0], found))
        with when(block > 1):
            walk = Place(tile, end, sequence, offset)
            _find_among_neighbours(tiles_of_sequence, walk, lane, count)
    return Shares(total, size, None), Place(tile, end, sequence, offset)


def _find_among_neighbours(tiles_of_sequence, place: Place, lane, count) -> None:
    """Go on from the first sequence of a block, which has the place, to the one that has it."""
    sequence, offset = place.sequence, place.offset
    searching = local(1, "int32")
    store(searching, i32(1))
    with loop(searching[0] != 0):
        (tiles,) = _tiles(tiles_of_sequence, [sequence[0] + lane], count, count)
        sums = _scan(tiles, lane)
        past = let(shuffle(sums, 31))
        with I.If(past > offset[0]):
            with I.Then():
                found = _first_beyond(sums, offset[0])
                store(offset, offset[0] - shuffle(sums - tiles, found))
                store(sequence, sequence[0] + found)
                store(searching, i32(0))
            with I.Else():
                store(offset, offset[0] - past)
                store(sequence, sequence[0] + 32)


def _tiles(tiles_of_sequence, numbers: list, past, count) -> list:
    """Tiles of sequences, none from number ``past`` on; without branches, so read together."""
    tiles = local(len(numbers), "int32")
    for n, number in enumerate(numbers):
        known = tiles_of_sequence(T.min(number, count - 1))
        store(tiles, T.Select(number < past, known, i32(0)), n)
    return [tiles[n] for n in range(len(numbers))]


def _share(shape, total, groups):
    size = local(1, "int32")
    share = T.truncdiv(total + groups - 1, groups)
    store(size, T.max(share, i32(shape.least_tiles)))
    return size


def _scan(value, lane):
    """The sum of the values of this lane and those before it."""
    sums = local(1, "int32")
    store(sums, value)
    for step in (1, 2, 4, 8, 16):
        lower = let(T.cuda.__shfl_up_sync(u32(FULL_WARP), sums[0], step, 32))
        store(sums, T.Select(lane >= step, sums[0] + lower, sums[0]))
    return sums[0]


def _first_beyond(sums, limit):
    """The first lane whose sum exceeds ``limit``, which the last one's does."""
    beyond = T.cuda.ballot_sync(u32(FULL_WARP), T.cast(sums > limit, "int32"))
    return let(T.call_pure_extern("int32", "__ffs", T.cast(beyond, "int32")) - 1)


def unknown_zero(count):
    """A zero that the compiler cannot know, from a number that is not negative."""
    return T.cast(shuffle_xor(T.shift_right(count, 31), 1), "uint32")
