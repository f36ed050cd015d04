"""Merging in ``attend`` on GPUs: teams of warps of a CTA, then the pieces of a block of rows.

Four query tokens at 256 x 512 of 32/8 heads took 214 us on an H200 when every row had a CTA of the
second launch, which searched for its sequence in eight steps; 148 as it is here, 55 of 66 at 64 x
1024. Rows of outputs are padded in shared memory, where rows of 128 values were in the same banks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.attend_rows import Options, RowBlock, Softmax, finish_row
from tq_tvm.kernels.attend_shape import AttendShape, Extent
from tq_tvm.kernels.decode_merge import add_warps, merge_blocks
from tq_tvm.kernels.decode_work import share_out
from tq_tvm.kernels.device import (
    FULL_WARP,
    LOWEST,
    access,
    barrier,
    f32,
    i32,
    let,
    local,
    loop,
    pointer,
    reduce_lanes,
    shared,
    shared_dynamic,
    shuffle_xor,
    store,
    u32,
    wait_for_launch_before,
    when,
)
from tq_tvm.kernels.warp_rows import WarpRow

__all__ = ["MERGE_THREADS", "WarpMemory", "finish_block", "leave_warp", "merge_rows"]

MERGE_THREADS = 128
_WARPS = MERGE_THREADS // 32
_AHEAD = 4
"""Pieces that a warp of the second launch reads at a time."""


@dataclasses.dataclass(frozen=True)
class WarpMemory:
    """Where each team leaves its output, in the place of its tiles, and bounds and totals."""

    words: Any
    begin: int
    apart: int
    bound: Any
    total: Any

    @classmethod
    def allocate(cls, shape: AttendShape, words) -> WarpMemory:
        """Shared memory for every team."""
        size = (shape.teams, shape.rows.rows)
        return cls(
            words,
            shape.queries,
            shape.output_words,
            shared(size, "float32"),
            shared(size, "float32"),
        )


def leave_warp(shape: AttendShape, memory: WarpMemory, softmax: Softmax, warp, g, t) -> None:
    """Leave a warp's output; tiles of others may be in the way, so a barrier comes first."""
    team, own = shape.team_of(warp), shape.first_column(warp)
    together = shape.octets_together
    barrier()
    for at in softmax.places:
        tile, half = at
        for mask in (1, 2):
            other = shuffle_xor(softmax.total[at], mask)
            store(softmax.total, softmax.total[at] + other, *at)
        row = let((16 * tile + 8 * half) + g)
        begin = memory.begin + team * memory.apart + row * shape.output_row + own
        for octet in range(0, shape.rows.columns // 8, together):
            place = pointer(memory.words, begin + shape.output_coordinate(octet, 2 * t))
            values = [
                softmax.output[tile, octet + n, 2 * half + e]
                for e in range(2)
                for n in range(together)
            ]
            access("st.shared", values, place, "f32")
        # All warps of a team have the same ones.
        with when(t == 0 if shape.parts == 1 else T.And(t == 0, warp == 0)):
            store(memory.bound, softmax.bound[at], team, row)
            store(memory.total, softmax.total[at], team, row)


def finish_block(
    shape: AttendShape, output: WarpRow, memory: WarpMemory, rows: RowBlock, options: Options, out,
    lse, piece, warp, lane,
) -> None:  # fmt: skip
    """Merge the teams, a warp a row, and write rows or, to ``piece`` of the workspace, a piece."""
    warps, dim, count = shape.config.warps, output.dim, output.row_values
    x, part = local(count, "float32"), local(count, "float32")
    top, total = local(1, "float32"), local(1, "float32")
    with I.serial(0, -(-shape.rows.rows // warps)) as turn:
        row = let(turn * warps + warp)
        exists = rows.exists(row)
        if shape.rows.rows % warps:
            exists = T.And(row < shape.rows.rows, exists)
        with when(exists):
            store(top, f32(LOWEST))
            for team in range(shape.teams):
                store(top, T.max(top[0], memory.bound[team, row]))
            store(total, f32(0))
            for i in range(count):
                store(x, f32(0), i)
            for team in range(shape.teams):
                raised = let(T.exp2(memory.bound[team, row] - top[0]))
                store(total, total[0] + memory.total[team, row] * raised)
                begin = memory.begin + team * memory.apart + row * shape.output_row
                for i, coordinate, wide in output.runs(lane):
                    place = pointer(memory.words, begin + coordinate)
                    access("ld.shared", [part[i + n] for n in range(wide)], place, "f32")
                    for n in range(i, i + wide):
                        store(x, x[n] + part[n] * raised, n)
            if piece is None:
                place = let(rows.token(row)), let(rows.head(row))
                finish_row(output, x, top[0], total[0], place, options, out, lse, lane)
            else:
                workspace, groups, slot = piece
                at = let(T.cast(slot * shape.rows.rows + row, "int64"))
                for i, coordinate, wide in output.runs(lane):
                    place = workspace.ptr_to([at * dim + T.cast(coordinate, "int64")])
                    access("st.global", [x[i + n] for n in range(wide)], place, "f32")
                with when(lane == 0):
                    stats = let(_stats_start(shape, groups) + at * 2)
                    store(workspace, top[0], stats)
                    store(workspace, total[0], stats + 1)


def _stats_start(shape: AttendShape, groups):
    """Where, behind the slots' outputs, their bounds and totals are."""
    slot = shape.spec.num_kv_heads * shape.rows.rows * shape.spec.value_dim
    return T.cast(groups, "int64") * (2 * slot)


def merge_rows(
    shape: AttendShape, extent: Extent, workspace, out, lse, batch, unit, token, thread, groups
) -> None:
    """One CTA of the second launch: merge the pieces of a query token's heads, and finish them.

    As in `decode_merge.merge_pieces`, the warps share a head's pieces, or have a head each. A row
    in one piece is finished; one that sees nothing gets zeros.
    """
    spec = shape.spec
    output = WarpRow(spec, spec.value_dim, None, 0)
    warp, lane = let(thread // 32), let(thread % 32)
    if output.rotated and not output.by_shuffles:
        exchanged = shared_dynamic(_WARPS * output.dim, "uint32")
        output = WarpRow(spec, spec.value_dim, exchanged, let(warp * output.dim))
    count, dim = output.row_values, output.dim
    rows, group_size, heads = shape.rows.rows, spec.group_size, spec.num_q_heads
    token = let(T.cast(token, "int32"))
    sequence = _sequence_of(extent.starts, batch, token, lane)
    shares = share_out(shape, extent.tiles, batch, lane, groups, sequence)
    size = shares.size[0]
    span = extent.of(sequence)
    stats = let(_stats_start(shape, groups))
    several = let(merge_blocks(heads, batch, groups) < heads)
    alone = let(T.And(several, T.truncdiv(span.width + size - 2, size) < _AHEAD))
    head, end = local(1, "int32"), local(1, "int32")
    begin = let(T.Select(several, unit * _WARPS, unit))
    store(head, begin + T.Select(alone, warp, i32(0)))
    store(end, T.min(T.Select(several, begin + _WARPS, begin + 1), i32(heads)))
    store(end, T.Select(alone, T.min(end[0], head[0] + 1), end[0]))
    step = let(T.Select(alone, i32(1), i32(_WARPS)))
    first, last, later = (local(1, "int32") for _ in range(3))
    line = local(1, "int32")

    def find_pieces() -> None:
        """Those of the row of ``head``."""
        index = let(
            (token - extent.starts[sequence]) * group_size + T.truncmod(head[0], group_size)
        )
        block = T.truncdiv(index, rows)
        start = let(shares.before[0] + block * span.width)
        store(first, T.truncdiv(start, size))
        past = T.truncdiv(start + span.width - 1, size) + 1
        store(last, T.Select(span.width > 0, past, first[0]))
        store(later, T.Select(start > first[0] * size, i32(1), i32(0)))
        store(line, T.truncdiv(head[0], group_size) * rows + T.truncmod(index, rows))

    def row(group):
        slot = 2 * group + T.Select(group == first[0], later[0], i32(0))
        return T.cast(slot * (spec.num_kv_heads * rows) + line[0], "int64")

    # All CTAs wait: the launch is not done before the one that it overlaps.
    if shape.config.overlap:
        wait_for_launch_before()
    partial, totals = shared((_WARPS, dim), "float32"), shared(_WARPS, "float32")
    top, total, at = local(1, "float32"), local(1, "float32"), local(1, "int32")
    x = local(count, "float32")
    weight, piece = local(_AHEAD, "float32"), local((_AHEAD, count), "float32")

    def columns():
        return ((i, base + extra) for i, base, extra in output.places(lane))

    def merge() -> None:
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
                for i, coordinate, wide in output.runs(lane):
                    place = workspace.ptr_to([row(group) * dim + T.cast(coordinate, "int64")])
                    access("ld.global", [piece[n, i + e] for e in range(wide)], place, "f32")
            for n in range(_AHEAD):
                for i in range(count):
                    store(x, x[i] + weight[n] * piece[n, i], i)
            store(at, at[0] + _AHEAD * step)
        with when(T.Not(alone)):
            add_warps(partial, totals, x, total, warp, lane, columns)
        with when(T.Or(alone, warp == 0)):
            place = (token, head[0])
            finish_row(output, x, top[0], total[0], place, extent.options, out, lse, lane)

    exists = token < extent.starts[T.cast(batch, "int32")]
    with when(T.And(exists, T.Or(span.width == 0, T.truncdiv(span.width + size - 2, size) > 0))):
        with loop(head[0] < end[0]):
            find_pieces()
            with when(T.Or(span.width == 0, last[0] - first[0] > 1)):
                merge()
            store(head, head[0] + 1)


def _sequence_of(starts, batch, token, lane):
    """The last of the sequences that start at or before ``token``, which all lanes ask for."""
    found, apart = local(1, "int32"), local(1, "int32")
    count = let(T.cast(batch, "int32"))
    store(found, i32(0))
    store(apart, count)
    with loop(apart[0] > 1):
        store(apart, T.truncdiv(apart[0] + 31, 32))
        probe = let(found[0] + lane * apart[0])
        before = T.And(probe < count, starts[T.min(probe, count - 1)] <= token)
        lanes = T.cuda.ballot_sync(u32(FULL_WARP), T.cast(before, "int32"))
        passed = T.cast(T.popcount(T.cast(lanes, "uint32")), "int32")
        store(found, found[0] + (passed - 1) * apart[0])
    return let(found[0])
