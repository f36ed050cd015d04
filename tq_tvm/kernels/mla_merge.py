"""The second launch of ``mla`` on GPUs: pieces of a query head become its output."""

from __future__ import annotations

from tvm.script import tirx as T

from tq_tvm.kernels.attend_rows import finish_row
from tq_tvm.kernels.device import (
    LOWEST,
    access,
    barrier,
    f32,
    let,
    local,
    loop,
    reduce_lanes,
    shared,
    store,
    wait_for_launch_before,
    when,
)
from tq_tvm.kernels.mla_shape import HALF, RANKS, MlaShape
from tq_tvm.kernels.warp_rows import WarpRow

__all__ = ["MERGE_THREADS", "merge_pieces"]

MERGE_THREADS = 128
_WARPS = MERGE_THREADS // 32
_AHEAD = 4
"""Pieces that a warp reads at a time, 16 values a lane each."""


def merge_pieces(
    shape: MlaShape, workspace, out, lse, batch, head, sequence, thread, parts
) -> None:
    """One CTA: merge the pieces of a query head, and finish it."""
    spec = shape.spec
    dim = RANKS * HALF
    output = WarpRow(spec.latent_parts[0], dim, None, 0)
    count = output.row_values
    warp, lane = let(thread // 32), let(thread % 32)
    pieces = let(parts * shape.pieces)
    sequence, head = let(T.cast(sequence, "int32")), let(T.cast(head, "int32"))
    lines = T.cast(batch, "int64") * T.int64(spec.num_q_heads)
    line = T.cast(sequence * spec.num_q_heads + head, "int64")
    row = let(line * T.cast(pieces, "int64"))
    stats = let(lines * T.cast(pieces, "int64") * T.int64(dim) + row * 2)
    # Neighbours of a lane are neighbours of the columns.
    owner, column = shape.column_of(dim, shape.fields, let(lane * count))
    begin = let(row * T.int64(dim) + T.cast(owner * HALF + column, "int64"))
    if shape.config.overlap:
        wait_for_launch_before()
    partial, totals = shared((_WARPS, dim), "float32"), shared(_WARPS, "float32")
    top, total, at = local(1, "float32"), local(1, "float32"), local(1, "int32")
    x = local(count, "float32")
    store(top, f32(LOWEST))
    store(at, lane)
    with loop(at[0] < pieces):
        store(top, T.max(top[0], workspace[stats + T.cast(at[0] * 2, "int64")]))
        store(at, at[0] + 32)
    reduce_lanes(top, 0, T.max)
    store(total, f32(0))
    for i in range(count):
        store(x, f32(0), i)
    weight, piece = local(_AHEAD, "float32"), local((_AHEAD, count), "float32")
    store(at, warp)
    with loop(at[0] < pieces):
        for n in range(_AHEAD):
            index = let(T.cast(T.min(at[0] + n * _WARPS, pieces - 1), "int64"))
            raised = T.exp2(workspace[stats + index * 2] - top[0])
            store(weight, T.Select(at[0] + n * _WARPS < pieces, raised, f32(0)), n)
            store(total, total[0] + weight[n] * workspace[stats + index * 2 + 1])
            for i in range(0, count, 4):
                four = [piece[n, i + e] for e in range(4)]
                access("ld.global", four, workspace.ptr_to([begin + index * dim + i]), "f32")
        for n in range(_AHEAD):
            for i in range(count):
                store(x, x[i] + weight[n] * piece[n, i], i)
        store(at, at[0] + _AHEAD * _WARPS)
    for i in range(count):
        store(partial, x[i], warp, i * 32 + lane)
    with when(lane == 0):
        store(totals, total[0], warp)
    barrier()
    with when(warp == 0):
        for other in range(1, _WARPS):
            store(total, total[0] + totals[other])
            for i in range(count):
                store(x, x[i] + partial[other, i * 32 + lane], i)
        finish_row(output, x, top[0], total[0], (sequence, head), None, out, lse, lane)
