r"""``decode`` on NVIDIA GPUs with thread-block clusters: the form for short contexts, one launch.

A cluster has one sequence and the heads of a CTA. Its CTAs take the sequence's tiles in turn, a
tile a warp, merge their warps as in `decode_cuda`, and then read one another's results through
distributed shared memory: no workspace, no second launch, no shares to work out. ``num_parts`` is
the CTAs of a cluster, up to the decision ``cluster``.

Where a call takes ten microseconds, what waits for what decides. Before a warp knows anything, it
asks for its sequence's length, the pages of its first tile and its queries, which do not depend on
one another; then for K and V, which are on their way while the queries are rotated and quantised.
No sums are moved for a warp's first tile, and reductions over lanes go side by side.

With a window of the spec this is over the tokens before it, and it is added to a row that is
finished (`decode_window`).

Lengths that differ leave CTAs idle, and a cluster's CTAs are resident all at once: for long
contexts and full batches `decode_cuda` is faster.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.decode_merge import MergedMemory, merge_cluster, merge_warps
from tq_tvm.kernels.decode_pages import KeyTile, PageReader, ValueRing
from tq_tvm.kernels.decode_query import Query, QueryMemory
from tq_tvm.kernels.decode_score import score
from tq_tvm.kernels.decode_shape import DecodeConfig, Shape
from tq_tvm.kernels.decode_slices import ScoreExchange
from tq_tvm.kernels.decode_threads import Standing
from tq_tvm.kernels.decode_values import SumMemory, Values
from tq_tvm.kernels.decode_window import Window, find_window
from tq_tvm.kernels.decode_work import tiles_of, unknown_zero
from tq_tvm.kernels.device import (
    arrive_at_cluster,
    barrier,
    i32,
    let,
    local,
    loop,
    ptx,
    store,
    wait_for_cluster,
    when,
)
from tq_tvm.kernels.key_codes import key_table
from tq_tvm.spec import CacheSpec

__all__ = ["decode_cluster"]


def decode_cluster(spec: CacheSpec, config: DecodeConfig) -> PrimFunc:
    """The TensorIR for one configuration, all sizes dynamic; the workspace is not touched."""
    shape = Shape(spec, config)
    dim, heads, dtype = spec.head_dim, spec.num_q_heads, spec.dtype

    @pages.jit(spec, s_tir=True)
    def main(
        q: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        k_window: T.Optional(T.handle),
        v_window: T.Optional(T.handle),
        window_slots: T.Optional(T.handle),
        workspace: T.handle,
        out: T.handle,
        num_ctas: T.int32,
        sm_scale: T.float32,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        b = T.int64()
        w = T.int64()
        p = T.int64()
        ws = T.int64()
        Q = T.match_buffer(q, (b, heads, dim), dtype, align=16)
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        rings = T.meta_var(pages.match_rings(spec, (k_window, v_window, window_slots), b))
        WS = T.match_buffer(workspace, (ws,), "float32", align=16)
        OUT = T.match_buffer(out, (b, heads, dim), dtype, align=16)
        window = T.meta_var(find_window(shape, Q, rings, SL, sm_scale))
        for bz in T.thread_binding(b, thread="blockIdx.z"):
            for by in T.thread_binding(shape.units, thread="blockIdx.y"):
                # A row of the grid is a cluster.
                for _ in T.thread_binding(num_ctas, thread="clusterCtaIdx.x"):
                    for bx in T.thread_binding(num_ctas, thread="blockIdx.x"):
                        for tx in T.thread_binding(shape.threads, thread="threadIdx.x"):
                            T.attr({"tirx.launch_bounds_min_blocks_per_sm": shape.ctas_per_sm})
                            _attend(
                                shape, Q, caches, BT, SL, OUT, w, by, bz, bx, num_ctas, tx,
                                sm_scale, window,
                            )  # fmt: skip

    return main


def _attend(
    shape: Shape, q, caches, block_table, seq_lens, out, table_width, unit, sequence, rank, ctas,
    thread, sm_scale, window: Window | None,
) -> None:  # fmt: skip
    """One CTA: number ``rank`` of ``ctas`` in its cluster."""
    spec, warps = shape.spec, shape.config.warps
    own = Standing.of(shape, unit, thread)
    lane = own.lane
    query_memory, sum_memory = QueryMemory.allocate(shape), SumMemory.allocate(shape)
    merged = MergedMemory.allocate(shape)
    seq_len, now, ahead, last = (local(1, "int32") for _ in range(4))
    step = let(ctas * warps)
    store(now, rank * warps + own.warp)
    ring = ValueRing(shape, let(thread // 32), own)
    reader = PageReader(shape, caches, block_table, own, ring)
    reader.begin(sequence)
    query = Query(shape, query_memory, own)
    # None of these waits for another.
    ptx("ld.global.nc.s32", seq_len[0], seq_lens.ptr_to([sequence]))
    reader.find_first_pages(sequence, now[0], T.cast(table_width, "int32"), reader.page)
    query.load(q, sequence)
    zero = let(unknown_zero(ctas))
    table = key_table(shape.key, zero, lane)
    values = Values(shape, query, sum_memory, own, let(thread // 32))
    values.find_metas(reader, own.kv_head)
    values.hold_table(zero)
    values.start()
    tile, exchange = KeyTile.allocate(shape), ScoreExchange(shape, own)
    if window is not None:
        store(seq_len, T.max(seq_len[0] - spec.window, i32(0)))
    store(last, tiles_of(shape, seq_len[0]))
    with when(now[0] < last[0]):
        reader.keep_existing(now[0], seq_len[0])
        reader.load_k(tile, now[0])
        reader.copy_v(now[0])
        reader.find_pages(now[0] + step, seq_len[0])
    ring.turn()
    if window is not None:
        window.prefetch(sequence, own.kv_head, own.inside, 32 * shape.part_warps)
    query.quantise()
    barrier()
    query.prepare(sm_scale)
    # Scores that are exchanged may lie where the codes of queries were.
    if shape.config.query_in_shared or shape.slices > 1:
        barrier()
    with loop(now[0] < last[0]):
        store(ahead, now[0] + step)
        score(shape, query, table, tile, values.scores)
        exchange.add(values.scores)
        with when(ahead[0] < last[0]):
            reader.load_k(tile, ahead[0])
            reader.copy_v(ahead[0])
            reader.find_pages(ahead[0] + step, seq_len[0])
        ring.turn()
        ring.wait()
        values.add(ring, now[0] * shape.config.tile, seq_len[0])
        store(now, ahead[0])
    values.finish()
    barrier()
    merge_warps(shape, sum_memory, merged, own)
    arrive_at_cluster(release=True)
    wait_for_cluster()
    merge_cluster(shape, merged, out, sequence, unit, rank, ctas, let(thread // 32), lane, window)
    # Nobody leaves while others read what it has.
    arrive_at_cluster(release=False)
    wait_for_cluster()
