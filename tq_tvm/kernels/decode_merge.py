"""Merging in ``decode_planes``: the warps of a column, then the pieces of a sequence."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.decode_query import rotate_row
from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.decode_values import LOWEST, WEIGHT_TOP, SumMemory
from tq_tvm.kernels.decode_work import share_out, tiles_of
from tq_tvm.kernels.device import (
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

__all__ = ["MERGE_THREADS", "merge_pieces", "merge_warps"]

MERGE_THREADS = 128
_WARPS = MERGE_THREADS // 32
_AHEAD = 4
"""Pieces that a warp of the second launch reads at a time."""


def merge_warps(
    shape: Shape, memory: SumMemory, column, workspace, stats, first_row, heads, thread
) -> None:
    """Write the sum of a column's outputs of every head, its bound and its total.

    ``thread`` counts those of the column. Row ``first_row + head`` of the workspace has the output,
    two floats from ``stats`` on the rest.
    """
    warps, dim = shape.config.warps, shape.spec.head_dim
    threads = 32 * warps
    first = let(column * warps)
    inner, outer = shape.value_levels
    unit = dim**-0.5 / WEIGHT_TOP
    lanes = 2 if shape.packed else 4
    pieces = shape.quads * 8 * lanes
    output, high, low = (local(4, "float32") for _ in range(3))
    top, factor, weights = (local(2, "float32") for _ in range(3))
    for turn in range(-(-pieces // threads)):
        piece = let(thread + turn * threads)
        with when(piece < pieces):
            t, g, quad = let(piece % lanes), let(piece // lanes % 8), let(piece // (lanes * 8))
            for j in range(2):
                store(top, f32(LOWEST), j)
                for w in range(warps):
                    store(top, T.max(top[j], memory.bound[first + w, 2 * t + j]), j)
                store(weights, f32(0), j)
            for e in range(4):
                store(output, f32(0), e)
            for w in range(warps):
                for j in range(2):
                    raised = T.exp2(memory.bound[first + w, 2 * t + j] - top[j])
                    store(factor, raised * memory.norm[first + w], j)
                    store(weights, weights[j] + factor[j] * memory.weights[first + w, 2 * t + j], j)
                with I.vectorized(0, 4) as e:
                    store(high, memory.values[first + w, quad, g * 4 + t, e], e)
                if shape.packed:
                    with I.vectorized(0, 4) as e:
                        store(low, memory.values[first + w, quad, g * 4 + t + 2, e], e)
                for e in range(4):
                    value = high[e] * f32(256) + low[e] if shape.packed else high[e]
                    store(output, output[e] + factor[e % 2] * value, e)
            for e in range(4):
                head = 2 * t + e % 2
                field = 2 * (quad % 2) + e // 2
                coordinate = shape.value_bytes * g + quad // 2 + dim // 4 * field
                level = output[e] * f32((outer - inner) * unit)
                with when(head < heads):
                    store(
                        workspace,
                        level - weights[e % 2] * f32(outer * unit),
                        (first_row + head) * dim + coordinate,
                    )
    with when(thread < heads):
        store(top, f32(LOWEST), 0)
        store(weights, f32(0), 0)
        for w in range(warps):
            store(top, T.max(top[0], memory.bound[first + w, thread]), 0)
        for w in range(warps):
            raised = T.exp2(memory.bound[first + w, thread] - top[0])
            store(weights, weights[0] + memory.total[first + w, thread] * raised, 0)
        store(workspace, top[0], stats + (first_row + thread) * 2)
        store(workspace, weights[0], stats + (first_row + thread) * 2 + 1)


def merge_pieces(shape: Shape, seq_lens, workspace, out, batch, head, sequence, thread, groups):
    """One CTA of the second launch: merge a sequence's pieces of a query head and rotate back."""
    spec, count = shape.spec, shape.row_values
    dim, heads = spec.head_dim, spec.num_q_heads
    warp, lane = let(thread // 32), let(thread % 32)
    stats = let((T.cast(batch, "int64") + T.cast(groups, "int64")) * (heads * dim))
    shares = share_out(shape, seq_lens, batch, lane, groups, sequence)
    first, last = local(1, "int32"), local(1, "int32")
    own = let(tiles_of(shape, seq_lens[sequence]))
    store(first, T.truncdiv(shares.before[0], shares.size[0]))
    past = T.truncdiv(shares.before[0] + own - 1, shares.size[0]) + 1
    # Slots of the sequence: none where it is empty.
    store(last, sequence + T.Select(own > 0, past, first[0]))
    store(first, sequence + first[0])

    def row(slot):
        return T.cast(slot, "int64") * heads + head

    if shape.config.overlap:
        wait_for_launch_before()
    top, total, at = local(1, "float32"), local(1, "float32"), local(1, "int32")
    store(top, f32(LOWEST))
    store(at, first[0] + lane)
    with loop(at[0] < last[0]):
        store(top, T.max(top[0], workspace[stats + row(at[0]) * 2]))
        store(at, at[0] + 32)
    reduce_lanes(top, 0, T.max)
    x = local(count, "float32")
    for i in range(count):
        store(x, f32(0), i)
    store(total, f32(0))
    store(at, first[0] + warp)
    weight, piece = local(_AHEAD, "float32"), local((_AHEAD, count), "float32")
    with loop(at[0] < last[0]):
        for n in range(_AHEAD):
            slot = let(T.min(at[0] + n * _WARPS, last[0] - 1))
            raised = T.exp2(workspace[stats + row(slot) * 2] - top[0])
            store(weight, T.Select(at[0] + n * _WARPS < last[0], raised, f32(0)), n)
            store(total, total[0] + weight[n] * workspace[stats + row(slot) * 2 + 1])
            for i in range(count):
                store(piece, workspace[row(slot) * dim + lane * count + i], n, i)
        for n in range(_AHEAD):
            for i in range(count):
                store(x, x[i] + weight[n] * piece[n, i], i)
        store(at, at[0] + _AHEAD * _WARPS)
    partial = shared((_WARPS, dim), "float32")
    totals = shared(_WARPS, "float32")
    for i in range(count):
        store(partial, x[i], warp, lane * count + i)
    with when(lane == 0):
        store(totals, total[0], warp)
    barrier()
    with when(warp == 0):
        for w in range(1, _WARPS):
            store(total, total[0] + totals[w])
            for i in range(count):
                store(x, x[i] + partial[w, lane * count + i], i)
        rotate_row(shape, x, lane)
        inverse = let(T.Select(total[0] > f32(0), f32(dim**-0.5) / total[0], f32(0)))
        for i in range(count):
            value = T.cast(x[i] * inverse, spec.dtype)
            store(out, value, sequence, head, lane * count + i)
