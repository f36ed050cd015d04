r"""``attend`` on NVIDIA GPUs: the threads of ``kernels.attend``'s equation, for few query tokens.

Two launches. Rows of a sequence and KV head, pairs of a query token and a head of the group, are in
blocks of ``16 row_tiles``. A sequence has as many times its tiles of tokens as it has blocks; those
of all sequences are shared out equally (`decode_work`) among groups of CTAs, one a KV head. A CTA
takes its piece of one block after the other:

1. rotates the block's queries into shared memory (`attend_rows`);
2. lets every warp walk its own tiles: scores, softmax and output by tensor cores, whose operands
   are made of codes in registers (`attend_fragments`) or, where a codec is ``none`` or K and V have
   not one head_dim of 64, 128 or 256, rows of the model's dtype in shared memory (`attend_tiles`).
   Nothing in that loop synchronises warps, unless V has more values than a warp
   has registers for outputs: then a CTA is a team of two, of three at 576, which make the rows of a
   tile together, and each has its part of the columns, with scores of its own;
3. lets them attend to the newest tokens, of a spec with a window, as they are (`attend_window`):
   to a sequence's tiles of packed rows are added those of its window;
4. merges the teams. A block that the CTA has to itself is finished; of a piece, (sum of w v, bound,
   sum of w) goes to the workspace.

The second launch, a CTA or a warp a query row, merges pieces (`attend_merge`). With ``overlap`` it
begins before the first is done, and waits for it where it needs its results.

Tiles that lie between the kept tokens and the window of a sequence's first query are nobody's. What
only some rows of a block see, is masked.

The workspace is ``2 groups HK rows (DV + 2)`` floats: only the first and the last piece of a group
can be parts of a block.
"""

from __future__ import annotations

import dataclasses

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.attend_fragments import Fragments
from tq_tvm.kernels.attend_merge import (
    MERGE_THREADS,
    WarpMemory,
    finish_block,
    leave_warp,
    merge_rows,
)
from tq_tvm.kernels.attend_rows import (
    Options,
    QueryRows,
    Softmax,
    attend_tile,
    load_queries,
)
from tq_tvm.kernels.attend_shape import WINDOW_TILE, AttendConfig, AttendShape, Extent
from tq_tvm.kernels.attend_tiles import TileMemory, Tiles
from tq_tvm.kernels.attend_window import WindowRows
from tq_tvm.kernels.decode_merge import merge_blocks
from tq_tvm.kernels.decode_work import find_share, unknown_zero
from tq_tvm.kernels.device import (
    barrier,
    i32,
    let,
    let_next_launch_begin,
    local,
    loop,
    shared_dynamic,
    store,
    warp_barrier,
    when,
)
from tq_tvm.kernels.warp_rows import exchange_words, warp_rows
from tq_tvm.spec import CacheSpec

__all__ = ["attend_cuda"]


def attend_cuda(spec: CacheSpec, config: AttendConfig) -> PrimFunc:
    """The TensorIR for one configuration, all sizes dynamic."""
    shape = AttendShape(spec, config)
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
        cu_seqlens_q: T.handle,
        sinks: T.handle,
        alibi_slopes: T.handle,
        k_window: T.Optional(T.handle),
        v_window: T.Optional(T.handle),
        window_slots: T.Optional(T.handle),
        workspace: T.handle,
        out: T.handle,
        lse: T.handle,
        num_groups: T.int32,
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
        ws = T.int64()
        Q = T.match_buffer(q, (n, heads, dim), dtype, align=16)
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        CU = T.match_buffer(cu_seqlens_q, (b + 1,), "int32", align=4)
        SK = T.match_buffer(sinks, (hs,), "float32", align=4)
        AL = T.match_buffer(alibi_slopes, (ha,), "float32", align=4)
        rings = T.meta_var(pages.match_rings(spec, (k_window, v_window, window_slots), b))
        WS = T.match_buffer(workspace, (ws,), "float32", align=16)
        OUT = T.match_buffer(out, (n, heads, spec.value_dim), dtype, align=16)
        LSE = T.match_buffer(lse, (n, hl), "float32", strides=[T.int64(), T.int64(1)], align=4)
        options = T.meta_var(Options(SK, AL, sm_scale, soft_cap, window_left, kept_tokens))
        extent = T.meta_var(Extent(shape, SL, CU, options))
        for by in T.thread_binding(num_groups, thread="blockIdx.y"):
            for bx in T.thread_binding(spec.num_kv_heads, thread="blockIdx.x"):
                for tx in T.thread_binding(shape.threads, thread="threadIdx.x"):
                    T.attr({"tirx.launch_bounds_min_blocks_per_sm": shape.ctas_per_sm})
                    _attend(
                        shape, Q, caches, rings, BT, extent, WS, OUT, LSE, b, bx, by, tx,
                        num_groups,
                    )  # fmt: skip
        for by2 in T.thread_binding(n, thread="blockIdx.y"):
            for bx2 in T.thread_binding(merge_blocks(heads, b, num_groups), thread="blockIdx.x"):
                for tx2 in T.thread_binding(MERGE_THREADS, thread="threadIdx.x"):
                    merge_rows(shape, extent, WS, OUT, LSE, b, bx2, by2, tx2, num_groups)

    return main


class _SharedWalk:
    """A warp's walk through tiles of which rows are made in shared memory, with its team."""

    def __init__(self, shape: AttendShape, words, caches, head, warp, lane, options) -> None:
        self._shape, self._words, self._lane, self._options = shape, words, lane, options
        tiles, teams, team = shape.tiles, shape.teams, shape.team_of(warp)
        dense = shape.queries + team * tiles.dense_words
        packed = shape.queries + teams * tiles.dense_words + team * (2 * tiles.packed_words)
        memory = TileMemory(tiles, words, dense, packed)
        thread = lane if shape.parts == 1 else let(warp * 32 + lane)
        column = shape.first_column(warp)
        self._tiles = Tiles(tiles, memory, caches, head, thread, lane, column)

    def _barrier(self) -> None:
        if self._shape.parts == 1:
            warp_barrier()
        else:
            barrier()

    def load_queries(self, asked: QueryRows) -> None:
        load_queries(self._shape.rows, asked, self._words, 0, self._options.sm_scale)

    def begin(self, table, sequence, span, index, seen) -> None:
        self._tiles.begin(table, sequence)
        self._tiles.find_pages(span.first_token(index), seen)
        self.ask(table, sequence, span, index, seen)

    def ask(self, table, sequence, span, index, seen) -> None:
        self._tiles.ask(table, sequence, span.first_token(index), seen)
        after = let(span.first_token(index + self._shape.teams))
        self._tiles.find_pages(after, seen)

    def start(self) -> None:
        """Rows have their unit."""

    def finish(self, softmax) -> None:
        """The output has its unit."""

    def attend(self, softmax, first, masked, ask_next) -> None:
        self._tiles.arrive()
        self._barrier()
        ask_next()
        self._tiles.decode()
        self._barrier()
        attend_tile(
            self._shape.rows, self._words, 0, self._tiles, softmax, i32(0), self._lane, first,
            masked,
        )  # fmt: skip
        self._barrier()


class _RegisterWalk:
    """A warp's walk through tiles whose codes become operands in registers."""

    def __init__(self, shape: AttendShape, words, caches, head, warp, lane, options, zero) -> None:
        self._shape = shape
        begin = let(shape.queries + warp * shape.fragments.words)
        self._tiles = Fragments(
            shape.fragments, words, begin, caches, head, lane, options.sm_scale, zero
        )

    def load_queries(self, asked: QueryRows) -> None:
        self._tiles.load_queries(asked)

    def begin(self, table, sequence, span, index, seen) -> None:
        self._tiles.begin(table, sequence)
        self._tiles.find_pages(span.first_token(index), seen)
        self.ask(table, sequence, span, index, seen)
        self._tiles.turn()

    def ask(self, table, sequence, span, index, seen) -> None:
        self._tiles.ask(span.first_token(index), seen)
        after = let(span.first_token(index + self._shape.teams))
        self._tiles.find_pages(after, seen)

    def start(self) -> None:
        self._tiles.start()

    def finish(self, softmax) -> None:
        self._tiles.finish(softmax)

    def attend(self, softmax, first, masked, ask_next) -> None:
        self._tiles.attend(softmax, first, masked, ask_next)


def _walk(shape: AttendShape, words, caches, head, warp, lane, options, zero):
    """How a warp goes through its tiles."""
    if shape.in_registers:
        return _RegisterWalk(shape, words, caches, head, warp, lane, options, zero)
    return _SharedWalk(shape, words, caches, head, warp, lane, options)


def _attend(
    shape: AttendShape, q, caches, rings, block_table, extent: Extent, workspace, out, lse, batch,
    kv_head, group, thread, groups,
) -> None:  # fmt: skip
    """One CTA of the first launch."""
    config, options = shape.config, extent.options
    warp, lane = let(thread // 32), let(thread % 32)
    g, t = let(lane // 4), let(lane % 4)
    shares, place = find_share(shape, extent.tiles, batch, lane, groups, group)
    if config.overlap:
        let_next_launch_begin()
    words = shared_dynamic(shape.memory_words, "uint32")
    memory = WarpMemory.allocate(shape, words)
    exchange = shape.exchange + warp * exchange_words(shape.spec)
    query, output = warp_rows(shape.spec, words, exchange)
    walk = _walk(shape, words, caches, kv_head, warp, lane, options, unknown_zero(shares.total[0]))
    softmax = Softmax(shape.rows, g, t, options)
    if shape.in_registers and shape.fragments.value_zeros:
        softmax.offset = local((shape.config.row_tiles, 2), "float32")
    now, ahead, last = (local(1, "int32") for _ in range(3))
    window, until = None, last
    if rings is not None:
        column = shape.first_column(warp)
        window = WindowRows(shape, words, rings, kv_head, lane, options.sm_scale, column)
        until = local(1, "int32")
    with loop(place.tile[0] < place.end[0]):
        sequence = place.sequence[0]
        span = extent.of(sequence)
        left = let(span.blocks * span.width - place.offset[0])
        count = local(1, "int32")
        store(count, i32(0))
        with when(left > 0):
            block = let(T.truncdiv(place.offset[0], span.width))
            inside = let(place.offset[0] - block * span.width)
            store(count, T.min(span.width - inside, place.end[0] - place.tile[0]))
            rows = extent.rows(sequence, block, kv_head)
            seen = packed = rows.seen(options)
            earliest = rows.first_position
            store(now, inside + shape.team_of(warp))
            store(last, inside + count[0])
            if window is not None:
                # Tokens of the window are in pages, too, but attended to as they are.
                softmax.end = end = extent.packed_end(rows.seq_len)
                packed = dataclasses.replace(seen, last=let(T.min(seen.last, end - 1)))
                earliest = let(T.min(earliest, end - 1))
                store(until, T.min(last[0], span.packed))
            turns = -(-shape.rows.rows // config.warps)
            own = warp * turns
            if shape.rows.rows % config.warps:
                # Three warps: some rows twice.
                own = T.min(own, shape.rows.rows - turns)
            # Tiles wait for the table, which is read meanwhile.
            asked = QueryRows(query, q, rows, let(own), turns, lane)
            with when(now[0] < until[0]):
                walk.begin(block_table, sequence, span, now[0], packed)
            if window is not None:
                with when(last[0] > until[0]):
                    window.prefetch(sequence, thread, shape.threads)
            walk.load_queries(asked)
            softmax.start(rows, i32(0))
            barrier()
            walk.start()
            with loop(now[0] < until[0]):
                store(ahead, now[0] + shape.teams)
                first = let(span.first_token(now[0]))
                late = first + (config.tile - 1) > earliest
                far = first < rows.last_position - options.window_left
                masked = let(T.Or(late, T.And(options.window_left >= 0, far)))

                def ask_next() -> None:
                    with when(ahead[0] < until[0]):
                        walk.ask(block_table, sequence, span, ahead[0], packed)

                walk.attend(softmax, first, masked, ask_next)
                store(now, ahead[0])
            walk.finish(softmax)
            if window is not None:
                softmax.end = None
                with loop(now[0] < last[0]):
                    first = let(end + (now[0] - span.packed) * WINDOW_TILE)
                    window.attend(softmax, sequence, first, seen)
                    store(now, now[0] + shape.teams)
            leave_warp(shape, memory, softmax, warp, g, t)
            barrier()
            with I.If(count[0] == span.width):
                with I.Then():
                    finish_block(shape, output, memory, rows, options, out, lse, None, warp, lane)
                with I.Else():
                    later = place.tile[0] > group * shares.size[0]
                    slot = let(2 * group + T.Select(later, i32(1), i32(0)))
                    piece = (workspace, groups, slot * shape.spec.num_kv_heads + kv_head)
                    finish_block(shape, output, memory, rows, options, out, lse, piece, warp, lane)
            barrier()
        store(place.tile, place.tile[0] + count[0])
        store(place.offset, place.offset[0] + count[0])
        with when(count[0] == left):
            store(place.sequence, sequence + 1)
            store(place.offset, i32(0))
