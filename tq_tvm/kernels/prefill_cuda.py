r"""``prefill`` on NVIDIA GPUs: the threads of ``kernels.prefill``'s equation.

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
    RowBlock,
    Softmax,
    attend_tile,
    load_queries,
)
from tq_tvm.kernels.attend_tiles import TileMemory, Tiles
from tq_tvm.kernels.device import (
    FULL_WARP,
    barrier,
    i32,
    let,
    local,
    loop,
    shared_dynamic,
    shuffle,
    store,
    u32,
    when,
)
from tq_tvm.kernels.prefill_merge import leave_rows, merge_cluster, write_rows
from tq_tvm.kernels.prefill_shape import PrefillConfig, PrefillShape
from tq_tvm.kernels.warp_rows import exchange_words, warp_rows
from tq_tvm.spec import CacheSpec

__all__ = ["prefill_cuda"]


def prefill_cuda(spec: CacheSpec, config: PrefillConfig) -> PrimFunc:
    """The TensorIR for one configuration, all sizes dynamic."""
    shape = PrefillShape(spec, config)
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


def _launch(shape: PrefillShape, blocks, parts, *arguments) -> None:
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
        _attend(shape, *arguments, kv_head, index, thread, rank, count)


def _find_block(shape: PrefillShape, starts, batch, lane, index):
    """The sequence that a CTA works for, and which of its blocks of rows; -1 past the last."""
    group, rows = shape.spec.group_size, shape.rows
    base, before, found, block, count, sums = (local(1, "int32") for _ in range(6))
    for register in (base, before):
        store(register, i32(0))
    store(found, i32(-1))
    store(block, i32(0))
    with loop(T.And(found[0] < 0, base[0] < T.cast(batch, "int32"))):
        at = let(base[0] + lane)
        store(count, i32(0))
        with when(at < T.cast(batch, "int32")):
            tokens = starts[at + 1] - starts[at]
            store(count, T.truncdiv(tokens * group + (rows - 1), rows))
        store(sums, count[0])
        for step in (1, 2, 4, 8, 16):
            lower = let(T.cuda.__shfl_up_sync(u32(FULL_WARP), sums[0], step, 32))
            store(sums, T.Select(lane >= step, sums[0] + lower, sums[0]))
        past = T.cast(before[0] + sums[0] > index, "int32")
        ballot = let(T.cast(T.cuda.ballot_sync(u32(FULL_WARP), past), "int32"))
        with I.If(ballot != 0):
            with I.Then():
                first = let(T.call_pure_extern("int32", "__ffs", ballot) - 1)
                own = let(shuffle(count[0], first))
                start = let(before[0] + shuffle(sums[0], first) - own)
                store(found, base[0] + first)
                # The newest tokens first.
                store(block, own - 1 - (index - start))
            with I.Else():
                store(before, before[0] + shuffle(sums[0], i32(31)))
                store(base, base[0] + 32)
    return found, block


def _attend(
    shape: PrefillShape, q, caches, tables, options: Options, out, lse, batch, kv_head, index,
    thread, rank, parts,
) -> None:  # fmt: skip
    """One CTA, number ``rank`` of ``parts`` that share a block of rows; they take tiles in turn."""
    tile, window, kept = shape.config.tile, options.window_left, options.kept_tokens
    block_table, seq_lens, starts = tables
    warp, lane = let(thread // 32), let(thread % 32)
    g, t = let(lane // 4), let(lane % 4)
    found, block = _find_block(shape, starts, batch, lane, index)
    with when(found[0] >= 0):
        sequence = let(found[0])
        words = shared_dynamic(shape.memory_words, "uint32")
        exchange = shape.exchange + warp * exchange_words(shape.spec)
        query, output = warp_rows(shape.spec, words, exchange)
        memory = TileMemory(shape.tiles, words, shape.rows * shape.warp.row_words, shape.packed)
        rows = RowBlock(shape.spec, shape.rows, sequence, block[0], seq_lens, starts, kv_head)
        seen = rows.seen(options)
        tiles = Tiles(shape.tiles, memory, caches, kv_head, thread, lane)
        number, now, ahead, end = (local(1, "int32") for _ in range(4))
        store(end, rows.last_position + 1)
        # Tiles between those of the kept tokens and the first in the window are passed over.
        oldest = T.truncdiv(T.max(rows.first_position - window, i32(0)), tile)
        before = let(T.truncdiv(kept + (tile - 1), tile))
        passed = let(T.Select(window < 0, i32(0), T.max(oldest - before, i32(0))))

        def first_token():
            """Of the tile by its number among those that are read."""
            return (number[0] + T.Select(number[0] >= before, passed, i32(0))) * tile

        store(number, rank)
        store(now, first_token())
        with when(now[0] < end[0]):
            tiles.ask(block_table, sequence, now[0], seen)
        first_row = let(warp * shape.warp.rows)
        load_queries(
            shape.warp, query, words, 0, q, rows, first_row, shape.warp.rows, lane, options.sm_scale
        )
        softmax = Softmax(shape.warp, g, t, options)
        softmax.start(rows, first_row)
        with loop(now[0] < end[0]):
            tiles.arrive()
            barrier()
            store(number, number[0] + parts)
            store(ahead, first_token())
            with when(ahead[0] < end[0]):
                tiles.ask(block_table, sequence, ahead[0], seen)
            tiles.decode()
            barrier()
            late = now[0] + (tile - 1) > rows.first_position
            masked = T.Or(late, T.And(window >= 0, now[0] < rows.last_position - window))
            attend_tile(shape.warp, words, 0, tiles, softmax, first_row, lane, now[0], masked)
            store(now, ahead[0])
        barrier()
        leave_rows(shape, words, softmax, warp, g, t)
        left = (shape, output, words, rows, options, out, lse, warp, lane)
        if shape.config.cluster:
            merge_cluster(*left, rank, parts)
        else:
            write_rows(*left)
