"""Merging in ``decode`` on GPUs: the warps of a column, then the pieces of a sequence.

Pieces lie in the workspace, for a second launch, or in the shared memory of a cluster's CTAs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.decode_query import rotate_row, turn_signs
from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.decode_threads import Standing
from tq_tvm.kernels.decode_values import WEIGHT_TOP, SumMemory
from tq_tvm.kernels.decode_work import share_out, shared_lengths, tiles_by_length
from tq_tvm.kernels.device import (
    LOWEST,
    access,
    barrier,
    f32,
    i32,
    let,
    local,
    loop,
    ptx,
    reduce_lanes,
    reduce_together,
    remote_address,
    shared,
    shuffle,
    store,
    u32,
    wait_for_launch_before,
    when,
)

if TYPE_CHECKING:
    from tq_tvm.kernels.decode_featured import Featured
    from tq_tvm.kernels.decode_window import Window

__all__ = [
    "MERGE_THREADS",
    "MergedMemory",
    "add_warps",
    "finish_row",
    "merge_blocks",
    "merge_cluster",
    "merge_pieces",
    "merge_warps",
    "piece_slot",
    "write_output",
    "write_piece",
]

MERGE_THREADS = 128
_WARPS = MERGE_THREADS // 32
_AHEAD = 4
"""Pieces that a warp of the second launch reads at a time."""

_AT_ONCE = 8
"""Pieces that a warp reads at a time from the CTAs of its cluster."""


@dataclasses.dataclass(frozen=True)
class MergedMemory:
    """Shared memory of each part of a CTA: outputs of its heads, their bounds and totals."""

    output: Any
    bound: Any
    total: Any

    @classmethod
    def allocate(cls, shape: Shape) -> MergedMemory:
        """Shared memory for all parts."""
        heads = (shape.abreast, shape.heads)
        return cls(
            output=shared((*heads, shape.spec.head_dim), "float32"),
            bound=shared(heads, "float32"),
            total=shared(heads, "float32"),
        )


def merge_warps(shape: Shape, sums: SumMemory, merged: MergedMemory, at: Standing) -> None:
    """Merge the warps of every column; barriers go around this."""
    warps, dim = shape.config.warps, shape.spec.head_dim
    threads, thread = 32 * warps, at.column_thread
    first = let(at.column * warps)
    unit = dim**-0.5 / WEIGHT_TOP
    lanes = 2 if shape.packed else 4
    pieces = shape.quads * 8 * lanes
    of_byte = shape.value.fields // 2
    output, high, low = (local(4, "float32") for _ in range(3))
    top, factor, weights = (local(2, "float32") for _ in range(3))
    for turn in range(-(-pieces // threads)):
        piece = let(thread + turn * threads)
        with when(piece < pieces):
            t, g, quad = let(piece % lanes), let(piece // lanes % 8), let(piece // (lanes * 8))
            for j in range(2):
                store(top, f32(LOWEST), j)
                for w in range(warps):
                    store(top, T.max(top[j], sums.bound[first + w, 2 * t + j]), j)
                store(weights, f32(0), j)
            for e in range(4):
                store(output, f32(0), e)
            for w in range(warps):
                for j in range(2):
                    raised = T.exp2(sums.bound[first + w, 2 * t + j] - top[j])
                    store(factor, raised * sums.norm[first + w], j)
                    store(weights, weights[j] + factor[j] * sums.weights[first + w, 2 * t + j], j)
                with I.vectorized(0, 4) as e:
                    store(high, sums.values[first + w, quad, g * 4 + t, e], e)
                if shape.packed:
                    with I.vectorized(0, 4) as e:
                        store(low, sums.values[first + w, quad, g * 4 + t + 2, e], e)
                for e in range(4):
                    value = high[e] * f32(256) + low[e] if shape.packed else high[e]
                    store(output, output[e] + factor[e % 2] * value, e)
            for e in range(4):
                field = 2 * (quad % of_byte) + e // 2
                coordinate = 16 * (quad // (2 * of_byte)) + 2 * g + quad // of_byte % 2
                coordinate = coordinate + dim // shape.value.fields * field
                coordinate = coordinate + at.slice * (8 * shape.value_bytes)
                level = output[e] * f32(shape.value.unit * unit)
                level = level - weights[e % 2] * f32(shape.value.offset * unit)
                store(merged.output, level, at.part, 2 * t + e % 2, coordinate)
    # Bounds and totals of all slices are the same.
    with when(at.inside < shape.heads):
        store(top, f32(LOWEST), 0)
        store(weights, f32(0), 0)
        for w in range(warps):
            store(top, T.max(top[0], sums.bound[first + w, at.inside]), 0)
        for w in range(warps):
            raised = T.exp2(sums.bound[first + w, at.inside] - top[0])
            store(weights, weights[0] + sums.total[first + w, at.inside] * raised, 0)
        store(merged.bound, top[0], at.part, at.inside)
        store(merged.total, weights[0], at.part, at.inside)


def write_output(
    shape: Shape, merged: MergedMemory, at: Standing, out, sequence,
    features: Featured | Window | None = None,
) -> None:  # fmt: skip
    """Finish a sequence that no other CTA has a piece of: a warp a head rotates back."""
    count, lane = shape.row_values, at.lane
    x = local(count, "float32")
    with I.serial(0, -(-shape.heads // shape.part_warps)) as turn:
        head = let(turn * shape.part_warps + at.part_warp)
        with when(head < at.heads):
            for i in range(count):
                store(x, merged.output[at.part, head, lane * count + i], i)
            place = (sequence, at.first_head + head)
            total = merged.total[at.part, head]
            if features is None:
                finish_row(shape, x, total, out, place, lane)
            else:
                features.finish(x, merged.bound[at.part, head], total, out, place, lane)


def finish_row(shape: Shape, x, total, out, where, lane) -> None:
    """Divide by the total, rotate back and write; no weights give zeros."""
    rotate_row(shape, x, lane)
    turn_signs(shape, x, lane)
    scale = f32(shape.spec.head_dim**-0.5)
    # What is not a number stays so.
    inverse = let(T.Select(total == f32(0), f32(0), scale / total))
    for i in range(shape.row_values):
        value = T.cast(x[i] * inverse, shape.spec.dtype)
        store(out, value, *where, lane * shape.row_values + i)


def piece_slot(group, begins_later):
    """Slot of a group's piece: of its first one, or of its last, if that is another one.

    Pieces between them are whole sequences, which have none.
    """
    return 2 * group + T.Select(begins_later, i32(1), i32(0))


def stats_start(shape: Shape, groups):
    """Where, behind the slots' outputs, their bounds and totals are."""
    return T.cast(groups, "int64") * (2 * shape.spec.num_q_heads * shape.spec.head_dim)


def write_piece(shape: Shape, merged: MergedMemory, at: Standing, workspace, groups, slot) -> None:
    """Leave a piece of a sequence to the second launch."""
    dim, threads, thread = shape.spec.head_dim, 32 * shape.part_warps, at.inside
    stats = let(stats_start(shape, groups))
    row = let(T.cast(slot * shape.spec.num_q_heads + at.first_head, "int64"))
    for turn in range(-(-shape.heads * dim // threads)):
        element = let(thread + turn * threads)
        with when(element < at.heads * dim):
            value = merged.output[at.part, element // dim, element % dim]
            store(workspace, value, row * dim + T.cast(element, "int64"))
    with when(thread < at.heads):
        to = let(stats + (row + T.cast(thread, "int64")) * 2)
        store(workspace, merged.bound[at.part, thread], to)
        store(workspace, merged.total[at.part, thread], to + 1)


def merge_blocks(heads: int, batch, groups):
    """CTAs of the second launch for each sequence, or query token, of so many heads.

    One a query head where sequences are in many pieces; otherwise one for as many heads as it has
    warps, or a large batch would have thousands of CTAs that have nothing to do.
    """
    many = groups > T.cast(batch, "int32") * (_AHEAD - 1)
    return T.Select(many, i32(heads), i32(-(-heads // _WARPS)))


def merge_pieces(
    shape: Shape, seq_lens, workspace, out, batch, block, sequence, thread, groups,
    features: Featured | Window | None = None,
):  # fmt: skip
    """One CTA of the second launch: merge a sequence's pieces of its heads and rotate back.

    A head's pieces are shared among the warps; of a few pieces a warp has a head to itself, if the
    CTA has as many. A sequence in one piece is finished; one of no tokens gets zeros.
    """
    count, dim, heads = shape.row_values, shape.spec.head_dim, shape.spec.num_q_heads
    warp, lane = let(thread // 32), let(thread % 32)
    stats = let(stats_start(shape, groups))
    tiles = tiles_by_length(shape, shared_lengths(seq_lens, features))
    shares = share_out(shape, tiles, batch, lane, groups, sequence)
    own = let(tiles(sequence))
    first, last = local(1, "int32"), local(1, "int32")
    store(first, T.truncdiv(shares.before[0], shares.size[0]))
    past = T.truncdiv(shares.before[0] + own - 1, shares.size[0]) + 1
    store(last, T.Select(own > 0, past, first[0]))
    begins_later = let(shares.before[0] > first[0] * shares.size[0])
    pieces = let(last[0] - first[0])
    several = let(merge_blocks(heads, batch, groups) < heads)
    alone = let(T.And(several, pieces <= _AHEAD))
    head, end = local(1, "int32"), local(1, "int32")
    begin = let(T.Select(several, block * _WARPS, block))
    store(head, begin + T.Select(alone, warp, i32(0)))
    store(end, T.min(T.Select(several, begin + _WARPS, begin + 1), i32(heads)))
    store(end, T.Select(alone, T.min(end[0], head[0] + 1), end[0]))

    def row(group):
        slot = piece_slot(group, T.And(group == first[0], begins_later))
        return T.cast(slot * heads + head[0], "int64")

    # All CTAs wait: the launch is not done before the one that it overlaps.
    if shape.config.overlap:
        wait_for_launch_before()
    partial, totals = shared((_WARPS, dim), "float32"), shared(_WARPS, "float32")
    top, total, at = local(1, "float32"), local(1, "float32"), local(1, "int32")
    x = local(count, "float32")
    weight, piece = local(_AHEAD, "float32"), local((_AHEAD, count), "float32")
    step = let(T.Select(alone, i32(1), i32(_WARPS)))
    with when(T.Or(own == 0, pieces > 1)), loop(head[0] < end[0]):
        store(top, f32(LOWEST))
        store(at, first[0] + lane)
        with loop(at[0] < last[0]):
            store(top, T.max(top[0], workspace[stats + row(at[0]) * 2]))
            store(at, at[0] + 32)
        reduce_lanes(top, 0, T.max)
        for i in range(count):
            store(x, f32(0), i)
        store(total, f32(0))
        store(at, first[0] + T.Select(alone, i32(0), warp))
        with loop(at[0] < last[0]):
            for n in range(_AHEAD):
                group = let(T.min(at[0] + n * step, last[0] - 1))
                raised = T.exp2(workspace[stats + row(group) * 2] - top[0])
                store(weight, T.Select(at[0] + n * step < last[0], raised, f32(0)), n)
                store(total, total[0] + weight[n] * workspace[stats + row(group) * 2 + 1])
                for i in range(count):
                    store(piece, workspace[row(group) * dim + lane * count + i], n, i)
            for n in range(_AHEAD):
                for i in range(count):
                    store(x, x[i] + weight[n] * piece[n, i], i)
            store(at, at[0] + _AHEAD * step)
        with when(T.Not(alone)):
            columns = [(i, lane * count + i) for i in range(count)]
            add_warps(partial, totals, x, total, warp, lane, lambda: columns)
        with when(T.Or(alone, warp == 0)):
            place = (sequence, head[0])
            if features is None:
                finish_row(shape, x, total[0], out, place, lane)
            else:
                features.finish(x, top[0], total[0], out, place, lane)
        store(head, head[0] + 1)


def add_warps(
    partial, totals, x, total, warp, lane, columns: Callable[[], Iterable[tuple[int, Any]]]
) -> None:
    """Give the first warp the sum of what the warps of a CTA have of a row, through shared memory.

    ``columns`` says which column each value of a lane is.
    """
    for i, column in columns():
        store(partial, x[i], warp, column)
    with when(lane == 0):
        store(totals, total[0], warp)
    barrier()
    with when(warp == 0):
        for w in range(1, _WARPS):
            store(total, total[0] + totals[w])
            for i, column in columns():
                store(x, x[i] + partial[w, column], i)
    barrier()


def merge_cluster(
    shape: Shape, merged: MergedMemory, out, sequence, unit, rank, ctas, warp, lane,
    window: Window | None = None,
) -> None:  # fmt: skip
    """Finish a share of a cluster's heads, which every CTA has left in its shared memory.

    A head is a warp's: it reads the pieces of all CTAs, merges them and rotates back.
    """
    spec, count = shape.spec, shape.row_values
    job, at = local(1, "int32"), local(1, "int32")
    x, total, bound = local(count, "float32"), local(1, "float32"), local(1, "float32")
    weight, piece = local(1, "float32"), local((_AT_ONCE, count), "float32")
    top = local(1, "float32")
    width = min(count, 4)

    def read(own_part, head) -> None:
        """Pieces from ``at`` on; those past the last one have a weight of zero."""
        own = merged.output.ptr_to([own_part, head, lane * count])
        for n in range(_AT_ONCE):
            remote = remote_address(own, T.min(at[0] + n, ctas - 1))
            for i in range(0, count, width):
                values = [piece[n, i + e] for e in range(width)]
                access("ld.shared::cluster", values, remote + u32(4 * i), "f32")

    def add() -> None:
        for n in range(_AT_ONCE):
            factor = let(shuffle(weight[0], at[0] + n))
            for i in range(count):
                store(x, x[i] + factor * piece[n, i], i)
        store(at, at[0] + _AT_ONCE)

    store(job, rank + ctas * warp)
    with loop(job[0] < shape.abreast * shape.heads):
        own_part, head = let(job[0] // shape.heads), let(job[0] % shape.heads)
        # A lane has the bound and the total of a CTA; of 32 lanes the upper half repeats the last.
        for own, value in ((merged.bound, bound), (merged.total, total)):
            remote = remote_address(own.ptr_to([own_part, head]), T.min(lane, ctas - 1))
            ptx("ld.shared::cluster.f32", value[0], remote)
        store(at, i32(0))
        read(own_part, head)
        store(top, bound[0])
        reduce_together([(top, 0)], T.max, (1, 2, 4, 8))
        store(weight, T.Select(lane < ctas, T.exp2(bound[0] - top[0]), f32(0)))
        store(total, total[0] * weight[0])
        reduce_together([(total, 0)], lambda a, b: a + b, (1, 2, 4, 8))
        for i in range(count):
            store(x, f32(0), i)
        add()
        with loop(at[0] < ctas):
            read(own_part, head)
            add()
        part = let(unit * shape.abreast + own_part)
        tile = let(part % shape.head_tiles)
        first = let(part // shape.head_tiles * spec.group_size + tile * shape.heads)
        with when(tile * shape.heads + head < spec.group_size):
            # Lanes of the lower half have all CTAs between them.
            store(total, shuffle(total[0], 0))
            place = (sequence, first + head)
            if window is None:
                finish_row(shape, x, total[0], out, place, lane)
            else:
                window.finish(x, shuffle(top[0], 0), total[0], out, place, lane)
        store(job, job[0] + ctas * shape.config.warps * shape.columns)
