r"""``prefill`` on NVIDIA GPUs: the launch of both forms, and the threads of the one for all GPUs.

One launch. A CTA has ``16 row_tiles warps`` rows of a sequence and KV head, see `attend_rows`, of
the newest tokens first, since they attend to most. It walks the tokens that any of its rows
attends to, ``tile`` at a time: codes that have arrived become rows of the model's dtype in shared
memory, once for all warps (`attend_tiles`), while the next tile is on its way; then every warp
attends to them. Where that leaves processors idle, the CTAs of a cluster share a block of rows
(`prefill_merge`).

Queries are rotated, scaled by ``sm_scale log2 e / sqrt(D)`` and rounded to the model's dtype in
shared memory at the start. At the end a warp divides its rows by their totals, rotates them back
and writes them.

A tile of 64 tokens and 128 rows (D = 128) takes 1024 products of a tensor core, 256 a warp, and
decodes 128 values a thread.
"""

from __future__ import annotations

import contextlib

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.attend_rows import (
    Options,
    QueryRows,
    RowBlock,
    Softmax,
    attend_tile,
    load_queries,
)
from tq_tvm.kernels.attend_tiles import TileMemory, Tiles
from tq_tvm.kernels.device import (
    barrier,
    let,
    loop,
    shared_dynamic,
    when,
)
from tq_tvm.kernels.prefill_merge import leave_rows, merge_cluster, write_rows
from tq_tvm.kernels.prefill_shape import PrefillShape
from tq_tvm.kernels.prefill_walk import Asker, Walk, find_block
from tq_tvm.kernels.prefill_warpgroups import WarpgroupShape, attend_block
from tq_tvm.kernels.warp_rows import exchange_words, warp_rows

__all__ = ["prefill_cuda"]


def prefill_cuda(shape: PrefillShape | WarpgroupShape) -> PrimFunc:
    """The TensorIR for one configuration, all sizes dynamic."""
    spec = shape.spec
    dim, heads, kv_heads, dtype = spec.head_dim, spec.num_q_heads, spec.num_kv_heads, spec.dtype
    group, rows = spec.group_size, shape.rows

    @T.prim_func(s_tir=True)
    def main(
        q: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        cu_seqlens_q: T.handle,
        sinks: T.handle,
        alibi_slopes: T.handle,
        out: T.handle,
        lse: T.handle,
        num_parts: T.int32,
        sm_scale: T.float32,
        soft_cap: T.float32,
        window_left: T.int32,
        kept_tokens: T.int32,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        b = T.int64()
        w = T.int64()
        p = T.int64()
        hs = T.int64()
        ha = T.int64()
        hl = T.int64()
        Q = T.match_buffer(q, (n, heads, dim), dtype, align=16)
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        CU = T.match_buffer(cu_seqlens_q, (b + 1,), "int32", align=4)
        SK = T.match_buffer(sinks, (hs,), "float32", align=4)
        AL = T.match_buffer(alibi_slopes, (ha,), "float32", align=4)
        OUT = T.match_buffer(out, (n, heads, spec.value_dim), dtype, align=16)
        LSE = T.match_buffer(lse, (n, hl), "float32", strides=[T.int64(), T.int64(1)], align=4)
        options = T.meta_var(Options(SK, AL, sm_scale, soft_cap, window_left, kept_tokens))
        tables = T.meta_var((BT, SL, CU))
        _launch(shape, n * group // rows + b, num_parts, Q, caches, tables, options, OUT, LSE, b)

    return main


def _launch(shape: PrefillShape | WarpgroupShape, blocks, parts, *arguments) -> None:
    """Bind CTAs and threads; with clusters a row of the grid is one of ``parts`` CTAs."""
    heads, clustered = shape.spec.num_kv_heads, shape.config.cluster > 0
    with contextlib.ExitStack() as grid:

        def bind(extent, thread: str):
            return grid.enter_context(I.thread_binding(0, extent, thread=thread))

        index = bind(blocks, "blockIdx.z" if clustered else "blockIdx.y")
        kv_head = bind(heads, "blockIdx.y" if clustered else "blockIdx.x")
        rank, count = 0, 1
        if clustered:
            bind(parts, "clusterCtaIdx.x")
            rank, count = bind(parts, "blockIdx.x"), parts
        thread = bind(shape.threads, "threadIdx.x")
        grid.enter_context(T.attr({"tirx.launch_bounds_min_blocks_per_sm": shape.ctas_per_sm}))
        block = attend_block if isinstance(shape, WarpgroupShape) else _attend_block
        block(shape, *arguments, kv_head, index, thread, rank, count)


def _attend_block(
    shape: PrefillShape, q, caches, tables, options: Options, out, lse, batch, kv_head, index,
    thread, rank, parts,
) -> None:  # fmt: skip
    """One CTA, number ``rank`` of ``parts`` that share a block of rows; they take tiles in turn."""
    spec, tile = shape.spec, shape.config.tile
    block_table, seq_lens, starts = tables
    warp, lane = let(thread // 32), let(thread % 32)
    g, t = let(lane // 4), let(lane % 4)
    found, block = find_block(spec.group_size, shape.rows, starts, batch, lane, index)
    with when(found[0] >= 0):
        sequence = let(found[0])
        words = shared_dynamic(shape.memory_words, "uint32")
        exchange = shape.exchange + warp * exchange_words(spec)
        query, output = warp_rows(spec, words, exchange)
        memory = TileMemory(shape.tiles, words, shape.rows * shape.warp.row_words, shape.packed)
        rows = RowBlock(spec, shape.rows, sequence, block[0], seq_lens, starts, kv_head)
        seen = rows.seen(options)
        tiles = Tiles(shape.tiles, memory, caches, kv_head, thread, lane)
        walk, coming = (Walk(tile, rows, options, rank, parts) for _ in range(2))
        asker = Asker(tiles, coming, block_table, sequence, seen)
        asker.ask()
        first_row = let(warp * shape.warp.rows)
        asked = QueryRows(query, q, rows, first_row, shape.warp.rows, lane)
        load_queries(shape.warp, asked, words, 0, options.sm_scale)
        softmax = Softmax(shape.warp, g, t, options)
        softmax.start(rows, first_row)
        with loop(walk.goes_on):
            tiles.arrive()
            barrier()
            asker.ask()
            tiles.decode()
            barrier()
            attend_tile(
                shape.warp, words, 0, tiles, softmax, first_row, lane, walk.first, walk.masked
            )
            walk.advance()
        barrier()
        leave_rows(shape, words, softmax, warp, g, t)
        left = (shape, output, words, rows, options, out, lse, warp, lane)
        if shape.config.cluster:
            merge_cluster(*left, rank, parts)
        else:
            write_rows(*left)
