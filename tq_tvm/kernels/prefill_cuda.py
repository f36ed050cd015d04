r"""``prefill`` on NVIDIA GPUs: the threads of ``kernels.prefill``'s equation.

One launch. A CTA has ``16 row_tiles warps`` rows of a sequence and KV head, see `attend_rows`, of
the newest tokens first, since they attend to most. It walks the tokens that any of its rows
attends to, ``tile`` at a time: codes that have arrived become rows of the model's dtype in shared
memory, once for all warps (`attend_tiles`), while the next tile is on its way; then every warp
attends to them. Where that leaves processors idle, the CTAs of a cluster share a block of rows
(`prefill_cluster`).

Queries are rotated, scaled by ``sm_scale log2 e / sqrt(D)`` and rounded to the model's dtype in
shared memory at the start. At the end a warp divides its rows by their totals, rotates them back
and writes them.

A tile of 64 tokens and 128 rows (D = 128) takes 1024 products of a tensor core, 256 a warp, and
decodes 128 values a thread.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.attend_rows import (
    Options,
    RowBlock,
    RowShape,
    Softmax,
    attend_tile,
    finish_row,
    load_queries,
)
from tq_tvm.kernels.attend_tiles import TileMemory, Tiles, TileShape
from tq_tvm.kernels.device import (
    FULL_WARP,
    barrier,
    i32,
    let,
    local,
    loop,
    ptx,
    shared_dynamic,
    shuffle,
    shuffle_xor,
    store,
    u32,
    warp_barrier,
    when,
)
from tq_tvm.kernels.warp_rows import WarpRow, exchange_words, warp_rows
from tq_tvm.spec import CacheSpec

__all__ = ["PrefillConfig", "PrefillShape", "attend_block", "prefill_cuda", "stats_begin"]

_REGISTERS = 65536
"""Registers of an SM."""


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """The decisions of one kernel; ``schedules/prefill.py`` says what each one trades."""

    warps: int
    row_tiles: int
    tile: int
    lanes: int
    registers: int
    cluster: int


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """Static sizes."""

    spec: CacheSpec
    config: PrefillConfig

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.config.warps

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that hold an SM to the decided number of registers."""
        return max(1, _REGISTERS // (self.threads * self.config.registers))

    @property
    def warp(self) -> RowShape:
        """A warp's rows."""
        return RowShape(self.spec, self.config.row_tiles, self.config.tile)

    @property
    def tiles(self) -> TileShape:
        """Tiles, a CTA's."""
        return TileShape(self.spec, self.config.tile, self.threads, self.config.lanes)

    @property
    def rows(self) -> int:
        """Rows of a CTA."""
        return self.config.warps * self.warp.rows

    @property
    def packed(self) -> int:
        """Words in front of packed tiles: queries, and K and V of the model's dtype."""
        return self.rows * self.warp.row_words + self.tiles.dense_words

    @property
    def memory_words(self) -> int:
        """Words of dynamic shared memory."""
        return self.exchange + self.config.warps * exchange_words(self.spec)

    @property
    def exchange(self) -> int:
        """Words in front of rows that lanes exchange; at the end all are for the output."""
        output = self.rows * (self.spec.value_dim + 2)
        return max(self.packed + 2 * self.tiles.packed_words, output)


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
        for by in T.thread_binding(n * group // rows + b, thread="blockIdx.y"):
            for bx in T.thread_binding(kv_heads, thread="blockIdx.x"):
                for tx in T.thread_binding(shape.threads, thread="threadIdx.x"):
                    T.attr({"tirx.launch_bounds_min_blocks_per_sm": shape.ctas_per_sm})
                    options = T.meta_var(
                        Options(SK, AL, sm_scale, soft_cap, window_left, kept_tokens)
                    )
                    finish = T.meta_var(functools.partial(_finish, shape, options, OUT, LSE))
                    attend_block(
                        shape, Q, caches, (BT, SL, CU), options, b, bx, by, tx, 0, 1, finish
                    )

    return main


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


def stats_begin(shape: PrefillShape) -> int:
    """Words of outputs in shared memory, behind which are a bound and a total of each row."""
    return shape.rows * shape.spec.value_dim


def _finish(shape: PrefillShape, options: Options, out, lse, words, output, rows, warp, lane):
    """A CTA has its rows to itself, and a warp its own."""
    warp_barrier()
    _write_rows(shape, output, words, rows, options, out, lse, warp, lane)


def _leave_rows(shape: PrefillShape, words, softmax: Softmax, warp, g, t) -> None:
    """A warp's output in shared memory, and behind the CTA's its bounds and totals."""
    dim, stats = shape.spec.value_dim, stats_begin(shape)
    for at in softmax.places:
        tile, half = at
        for mask in (1, 2):
            other = shuffle_xor(softmax.total[at], mask)
            store(softmax.total, softmax.total[at] + other, *at)
        row = let(warp * shape.warp.rows + (16 * tile + 8 * half) + g)
        for octet in range(dim // 8):
            for e in range(2):
                place = row * dim + (8 * octet + e) + 2 * t
                value = softmax.output[tile, octet, 2 * half + e]
                ptx("st.shared.f32", words.ptr_to([place]), value)
        with when(t == 0):
            for n, value in enumerate((softmax.bound[at], softmax.total[at])):
                ptx("st.shared.f32", words.ptr_to([stats + 2 * row + n]), value)


def _write_rows(
    shape: PrefillShape, output: WarpRow, words, rows: RowBlock, options: Options, out, lse, warp,
    lane,
) -> None:  # fmt: skip
    """Finish what `_leave_rows` left of the warp's rows."""
    dim, count = output.dim, output.row_values
    x, state = local(count, "float32"), local(2, "float32")
    with I.serial(0, shape.warp.rows) as turn:
        row = let(warp * shape.warp.rows + turn)
        with when(rows.exists(row)):
            for i, base, extra in output.places(lane):
                place = row * dim + base + extra
                ptx("ld.shared.f32", x[i], words.ptr_to([place]))
            for n in range(2):
                ptx("ld.shared.f32", state[n], words.ptr_to([stats_begin(shape) + 2 * row + n]))
            place = let(rows.token(row)), let(rows.head(row))
            finish_row(output, x, state[0], state[1], place, options, out, lse, lane)


def attend_block(
    shape: PrefillShape, q, caches, tables, options: Options, batch, kv_head, index, thread, rank,
    parts, finish: Callable[..., None],
) -> None:  # fmt: skip
    """One CTA, number ``rank`` of ``parts`` that share a block of rows; they take tiles in turn.

    ``finish`` is called when every warp has left its rows in shared memory.
    """
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
        _leave_rows(shape, words, softmax, warp, g, t)
        finish(words, output, rows, warp, lane)
