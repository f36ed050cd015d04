"""Merging in ``attend`` on GPUs: teams of warps of a CTA, then the pieces of a block of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels import pages
from tq_tvm.kernels.attend_rows import Options, RowBlock, Softmax, finish_row
from tq_tvm.kernels.attend_shape import AttendShape, Extent
from tq_tvm.kernels.decode_work import share_out
from tq_tvm.kernels.device import (
    LOWEST,
    barrier,
    f32,
    i32,
    let,
    local,
    loop,
    pointer,
    ptx,
    reduce_lanes,
    shared,
    shared_dynamic,
    shuffle_xor,
    store,
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
        apart = shape.rows.rows * shape.spec.value_dim
        return cls(words, shape.queries, apart, shared(size, "float32"), shared(size, "float32"))


def leave_warp(shape: AttendShape, memory: WarpMemory, softmax: Softmax, warp, g, t) -> None:
    """Leave a warp's output; tiles of others may be in the way, so a barrier comes first."""
    dim, team, own = shape.spec.value_dim, shape.team_of(warp), shape.first_column(warp)
    barrier()
    for at in softmax.places:
        tile, half = at
        for mask in (1, 2):
            other = shuffle_xor(softmax.total[at], mask)
            store(softmax.total, softmax.total[at] + other, *at)
        row = let((16 * tile + 8 * half) + g)
        for octet in range(shape.rows.columns // 8):
            for e in range(2):
                coordinate = own + shape.output_coordinate(octet, 2 * t + e)
                place = memory.begin + team * memory.apart + row * dim + coordinate
                value = softmax.output[tile, octet, 2 * half + e]
                ptx("st.shared.f32", pointer(memory.words, place), value)
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
    x, part = local(count, "float32"), local(1, "float32")
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
                for i, base, extra in output.places(lane):
                    place = memory.begin + team * memory.apart + row * dim + base + extra
                    ptx("ld.shared.f32", part[0], pointer(memory.words, place))
                    store(x, x[i] + part[0] * raised, i)
            if piece is None:
                place = let(rows.token(row)), let(rows.head(row))
                finish_row(output, x, top[0], total[0], place, options, out, lse, lane)
            else:
                workspace, groups, slot = piece
                at = let(T.cast(slot * shape.rows.rows + row, "int64"))
                for i, base, extra in output.places(lane):
                    store(workspace, x[i], at * dim + T.cast(base + extra, "int64"))
                with when(lane == 0):
                    stats = let(_stats_start(shape, groups) + at * 2)
                    store(workspace, top[0], stats)
                    store(workspace, total[0], stats + 1)


def _stats_start(shape: AttendShape, groups):
    """Where, behind the slots' outputs, their bounds and totals are."""
    slot = shape.spec.num_kv_heads * shape.rows.rows * shape.spec.value_dim
    return T.cast(groups, "int64") * (2 * slot)


def merge_rows(
    shape: AttendShape, extent: Extent, workspace, out, lse, batch, head, token, thread, groups
) -> None:
    """One CTA of the second launch: merge the pieces of a query row, and finish it.

    A row in one piece is finished; one that sees nothing gets zeros.
    """
    spec = shape.spec
    output = WarpRow(spec, spec.value_dim, None, 0)
    if output.rotated and not output.by_shuffles:
        output = WarpRow(spec, spec.value_dim, shared_dynamic(output.dim, "uint32"), 0)
    count, dim = output.row_values, output.dim
    rows, group_size = shape.rows.rows, shape.spec.group_size
    warp, lane = let(thread // 32), let(thread % 32)
    token = let(T.cast(token, "int32"))
    found = local(1, "int32")
    store(found, i32(0))
    pages.find_last_start(found, extent.starts, batch, token)
    sequence = let(found[0])
    shares = share_out(shape, extent.tiles, batch, lane, groups, sequence)
    span = extent.of(sequence)
    index = let((token - extent.starts[sequence]) * group_size + T.truncmod(head, group_size))
    block = let(T.truncdiv(index, rows))
    begin = let(shares.before[0] + block * span.width)
    first, last = local(1, "int32"), local(1, "int32")
    store(first, T.truncdiv(begin, shares.size[0]))
    past = T.truncdiv(begin + span.width - 1, shares.size[0]) + 1
    store(last, T.Select(span.width > 0, past, first[0]))
    begins_later = let(begin > first[0] * shares.size[0])
    stats = let(_stats_start(shape, groups))

    def row(group):
        later = T.And(group == first[0], begins_later)
        slot = 2 * group + T.Select(later, i32(1), i32(0))
        unit = slot * spec.num_kv_heads + T.truncdiv(head, group_size)
        return T.cast(unit * rows + T.truncmod(index, rows), "int64")

    # All CTAs wait: the launch is not done before the one that it overlaps.
    if shape.config.overlap:
        wait_for_launch_before()
    partial, totals = shared((_WARPS, dim), "float32"), shared(_WARPS, "float32")
    top, total, at = local(1, "float32"), local(1, "float32"), local(1, "int32")
    x = local(count, "float32")
    weight, piece = local(_AHEAD, "float32"), local((_AHEAD, count), "float32")
    exists = token < extent.starts[T.cast(batch, "int32")]
    with when(T.And(exists, T.Or(span.width == 0, last[0] - first[0] > 1))):
        store(top, f32(LOWEST))
        store(at, first[0] + lane)
        with loop(at[0] < last[0]):
            store(top, T.max(top[0], workspace[stats + row(at[0]) * 2]))
            store(at, at[0] + 32)
        reduce_lanes(top, 0, T.max)
        for i in range(count):
            store(x, f32(0), i)
        store(total, f32(0))
        store(at, first[0] + warp)
        with loop(at[0] < last[0]):
            for n in range(_AHEAD):
                group = let(T.min(at[0] + n * _WARPS, last[0] - 1))
                raised = T.exp2(workspace[stats + row(group) * 2] - top[0])
                store(weight, T.Select(at[0] + n * _WARPS < last[0], raised, f32(0)), n)
                store(total, total[0] + weight[n] * workspace[stats + row(group) * 2 + 1])
                for i, base, extra in output.places(lane):
                    store(piece, workspace[row(group) * dim + base + extra], n, i)
            for n in range(_AHEAD):
                for i in range(count):
                    store(x, x[i] + weight[n] * piece[n, i], i)
            store(at, at[0] + _AHEAD * _WARPS)
        for i, base, extra in output.places(lane):
            store(partial, x[i], warp, base + extra)
        with when(lane == 0):
            store(totals, total[0], warp)
        barrier()
        with when(warp == 0):
            for w in range(1, _WARPS):
                store(total, total[0] + totals[w])
                for i, base, extra in output.places(lane):
                    store(x, x[i] + partial[w, base + extra], i)
            finish_row(output, x, top[0], total[0], (token, head), extent.options, out, lse, lane)
