r"""``prefill`` on NVIDIA GPUs: the threads of ``kernels.prefill``'s equation.

One launch. Rows of a sequence and KV head are pairs of a query token and a head of the group, token
by token; a CTA has ``16 row_tiles warps`` of them, those of the newest tokens first, since they
attend to most. It walks the tokens that any of its rows attends to, ``tile`` at a time:

1. what was asked for has arrived: codes become rows of the model's dtype in shared memory, once for
   all warps (`prefill_rows`), and the next tile is asked for;
2. scores by ``mma.m16n8k16``: queries on the M side, K's rows by ``ldmatrix`` on the N side;
3. softmax in float32. A row's bound moves only where a logit exceeds it by more than `_SLACK`
   powers of two, so that the output is seldom rescaled;
4. output: weights, as the scores left them, on the M side, V's rows by ``ldmatrix.trans``.

Queries are rotated, scaled by ``sm_scale log2 e / sqrt(D)`` and rounded to the model's dtype in
shared memory at the start. At the end a warp divides its rows by their totals, rotates them back
and writes them.

A tile of 64 tokens and 128 rows (D = 128) takes 1024 products of a tensor core, 256 a warp, and
decodes 128 values a thread.
"""

from __future__ import annotations

import math

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.decode_query import rotate_row, turn_signs
from tq_tvm.kernels.device import (
    FULL_WARP,
    PAIR,
    as_float,
    barrier,
    f32,
    i32,
    let,
    local,
    loop,
    mma,
    ptx,
    shuffle,
    shuffle_xor,
    store,
    u32,
    when,
)
from tq_tvm.kernels.hadamard_cuda import PRODUCTS
from tq_tvm.kernels.prefill_rows import PrefillConfig, PrefillMemory, PrefillShape, Tile
from tq_tvm.spec import CacheSpec

__all__ = ["PrefillConfig", "prefill_cuda", "prefill_shared_bytes"]

_LOWEST = -1e30
"""A bound of logits before the first tile."""

_MASKED = -3e38
"""Logit of a token that is not attended to."""

_SLACK = 6.0
_MINUS_INFINITY = 0xFF800000
_LOG2E = math.log2(math.e)
_NO_WINDOW = -(2**31)


def prefill_shared_bytes(spec: CacheSpec, config: PrefillConfig) -> int:
    """Dynamic shared memory of a CTA."""
    return 4 * PrefillShape(spec, config).memory_words


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
        OUT = T.match_buffer(out, (n, heads, dim), dtype, align=16)
        LSE = T.match_buffer(lse, (n, hl), "float32", strides=[T.int64(), T.int64(1)], align=4)
        for by in T.thread_binding(n * group // rows + b, thread="blockIdx.y"):
            for bx in T.thread_binding(kv_heads, thread="blockIdx.x"):
                for tx in T.thread_binding(shape.threads, thread="threadIdx.x"):
                    T.attr({"tirx.launch_bounds_min_blocks_per_sm": shape.ctas_per_sm})
                    _attend(
                        shape, Q, caches, (BT, SL, CU), (SK, AL), OUT, LSE, b, bx, by, tx,
                        (sm_scale, soft_cap, window_left, kept_tokens),
                    )  # fmt: skip

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


class _Rows:
    """The rows of a CTA, as pairs of token and head."""

    def __init__(self, shape: PrefillShape, sequence, block, tables, kv_head) -> None:
        _, seq_lens, starts = tables
        group = shape.spec.group_size
        self._group = group
        self.start = let(starts[sequence])
        count = let(starts[sequence + 1] - self.start)
        self.seq_len = let(seq_lens[sequence])
        self._past = let(self.seq_len - count)
        self._first = let(block * shape.rows)
        self._total = let(count * group)
        self._head = let(kv_head * group)
        self.first_position = let(self._past + T.truncdiv(self._first, group))
        last = T.min(self._first + shape.rows, self._total) - 1
        self.last_position = let(self._past + T.truncdiv(last, group))

    def exists(self, row):
        """Whether there is such a row."""
        return self._first + row < self._total

    def token(self, row):
        """Index of its token among all."""
        return self.start + T.truncdiv(self._first + row, self._group)

    def head(self, row):
        """Its query head."""
        return self._head + T.truncmod(self._first + row, self._group)

    def position(self, row):
        """The last position that it attends to."""
        return self._past + T.truncdiv(self._first + row, self._group)


class _Softmax:
    """State of a lane's rows, g and g + 8 of each row tile, and their output."""

    def __init__(self, shape: PrefillShape, rows: _Rows, warp, g, t, alibi, options) -> None:
        self._shape, self._g, self._t = shape, g, t
        _, self._cap, window, kept = options
        tiles = shape.config.row_tiles
        self.places = [(tile, half) for tile in range(tiles) for half in range(2)]
        self.bound, self.total, self._slope = (local((tiles, 2), "float32") for _ in range(3))
        self._limit, self._low = (local((tiles, 2), "int32") for _ in range(2))
        self.output = local((tiles, shape.spec.head_dim // 8, 4), "float32")
        self._kept = kept
        self._sloped = let(T.cast(alibi.shape[0], "int32") > 0)
        self._featured = let(T.Or(self._sloped, self._cap > f32(0)))
        for at in self.places:
            tile, half = at
            row = let(warp * shape.warp_rows + 16 * tile + 8 * half + g)
            store(self.bound, f32(_LOWEST), *at)
            store(self.total, f32(0), *at)
            store(self._slope, f32(0), *at)
            store(self._limit, T.Select(rows.exists(row), rows.position(row), i32(-1)), *at)
            low = self._limit[at] - window
            store(self._low, T.Select(window < 0, i32(_NO_WINDOW), low), *at)
            with when(T.And(self._sloped, rows.exists(row))):
                store(self._slope, alibi[rows.head(row)] * f32(_LOG2E), *at)
        for tile in range(tiles):
            for octet in range(shape.spec.head_dim // 8):
                for e in range(4):
                    store(self.output, f32(0), tile, octet, e)

    def weigh(self, scores, first, masked) -> None:
        """Scores, in units of log2, become weights; ``masked`` says if any are not attended to."""
        shape, bound = self._shape, self.bound
        octets = shape.config.tile // 8
        with when(self._featured):
            self._bend(scores, first, octets)
        with when(masked):
            for tile, half in self.places:
                for octet in range(octets):
                    for e in range(2):
                        token = let(first + (8 * octet + e) + 2 * self._t)
                        near = T.Or(token >= self._low[tile, half], token < self._kept)
                        seen = T.And(token <= self._limit[tile, half], near)
                        index = (tile, octet, 2 * half + e)
                        value = T.Select(seen, scores[index], f32(_MASKED))
                        store(scores, value, *index)
        top = local((shape.config.row_tiles, 2), "float32")
        above = T.bool(False)
        for at in self.places:
            tile, half = at
            values = [
                scores[tile, octet, 2 * half + e] for octet in range(octets) for e in range(2)
            ]
            store(top, _highest(values), *at)
            above = T.Or(above, top[at] > bound[at] + f32(_SLACK))
        with when(T.cuda.any_sync(u32(FULL_WARP), T.cast(above, "int32")) != 0):
            self._raise(top)
        for tile, half in self.places:
            for octet in range(octets):
                for e in range(2):
                    index = (tile, octet, 2 * half + e)
                    store(scores, T.exp2(scores[index] - bound[tile, half]), *index)
                    store(self.total, self.total[tile, half] + scores[index], tile, half)

    def _bend(self, scores, first, octets: int) -> None:
        """Soft cap and ALiBi."""
        cap = let(self._cap * f32(_LOG2E))
        inverse = let(T.Select(cap > f32(0), f32(1) / cap, f32(0)))
        value = local(1, "float32")
        for tile, half in self.places:
            for octet in range(octets):
                for e in range(2):
                    index = (tile, octet, 2 * half + e)
                    store(value, scores[index])
                    with when(cap > f32(0)):
                        # tanh x = 1 - 2 / (1 + e^2x)
                        grown = T.exp2(value[0] * inverse * f32(2 * _LOG2E)) + f32(1)
                        store(value, cap - cap * (f32(2) / grown))
                    token = first + (8 * octet + e) + 2 * self._t
                    apart = T.cast(token - self._limit[tile, half], "float32")
                    store(scores, value[0] + self._slope[tile, half] * apart, *index)

    def _raise(self, top) -> None:
        """Move the bounds up to what was found, and the output with them."""
        for at in self.places:
            tile, half = at
            for mask in (1, 2):
                store(top, T.max(top[at], shuffle_xor(top[at], mask)), *at)
            store(top, T.max(top[at], self.bound[at]), *at)
            shrink = let(T.exp2(self.bound[at] - top[at]))
            store(self.bound, top[at], *at)
            store(self.total, self.total[at] * shrink, *at)
            for octet in range(self._shape.spec.head_dim // 8):
                for e in range(2):
                    index = (tile, octet, 2 * half + e)
                    store(self.output, self.output[index] * shrink, *index)


def _highest(values):
    highest = values[0]
    for value in values[1:]:
        highest = T.max(highest, value)
    return highest


def _load_queries(shape: PrefillShape, memory: PrefillMemory, q, rows: _Rows, warp, lane, factor):
    """Rotate a warp's rows, and leave them in shared memory; those that do not exist are zeros."""
    spec, count = shape.spec, shape.row_values
    x, word = local(count, "float32"), local(1, "uint32")
    rotated = spec.cache_format.rotation != "none"
    unit = spec.head_dim**-0.5 if rotated else 1.0
    with I.serial(0, shape.warp_rows) as turn:
        row = let(warp * shape.warp_rows + turn)
        for i in range(count):
            store(x, f32(0), i)
        with when(rows.exists(row)):
            token, head = let(rows.token(row)), let(rows.head(row))
            for i in range(count):
                store(x, T.cast(q[token, head, lane * count + i], "float32"), i)
        if rotated:
            turn_signs(shape, x, lane)
            rotate_row(shape, x, lane)
        for i in range(0, count, 2):
            values = [x[i + e] * (factor * f32(unit)) for e in (1, 0)]
            ptx(PAIR[spec.dtype], word[0], *values)
            at = let(T.truncdiv(lane * count + i, 2))
            chunk = T.bitwise_xor(T.truncdiv(at, 4), T.truncmod(row, 8))
            place = memory.queries + row * shape.row_words + chunk * 4 + T.truncmod(at, 4)
            ptx("st.shared.u32", memory.words.ptr_to([let(place)]), word[0])


def _write_rows(
    shape: PrefillShape, memory: PrefillMemory, softmax: _Softmax, rows: _Rows, sinks, out, lse,
    warp, lane, g, t,
) -> None:  # fmt: skip
    """Divide, rotate back, and write."""
    spec, dim, count = shape.spec, shape.spec.head_dim, shape.row_values
    rotated = spec.cache_format.rotation != "none"
    unit = dim**-0.5 if rotated else 1.0
    wanted = let(T.cast(lse.shape[1], "int32") > 0)
    total, top = local(1, "float32"), local(1, "float32")
    for at in softmax.places:
        tile, half = at
        for mask in (1, 2):
            other = shuffle_xor(softmax.total[at], mask)
            store(softmax.total, softmax.total[at] + other, *at)
        inside = let(16 * tile + 8 * half + g)
        row = let(warp * shape.warp_rows + inside)
        store(top, softmax.bound[at])
        store(total, softmax.total[at])
        with when(T.And(T.cast(sinks.shape[0], "int32") > 0, rows.exists(row))):
            sink = let(sinks[rows.head(row)] * f32(_LOG2E))
            store(top, T.max(top[0], sink))
            shrunk = total[0] * T.exp2(softmax.bound[at] - top[0])
            store(total, shrunk + T.exp2(sink - top[0]))
        shrink = T.exp2(softmax.bound[at] - top[0])
        factor = let(T.Select(total[0] > f32(0), shrink * f32(unit) / total[0], f32(0)))
        for octet in range(dim // 8):
            for e in range(2):
                place = row * dim + (8 * octet + e) + 2 * t
                value = let(softmax.output[tile, octet, 2 * half + e] * factor)
                ptx("st.shared.f32", memory.words.ptr_to([place]), value)
        with when(T.And(T.And(wanted, rows.exists(row)), t == 0)):
            units = T.log2(total[0]) + top[0]
            value = T.Select(
                total[0] > f32(0), units * f32(math.log(2)), as_float(u32(_MINUS_INFINITY))
            )
            store(lse, value, rows.token(row), rows.head(row))
    I.evaluate(T.cuda.warp_sync())
    x, bits = local(count, "float32"), local(1, "uint32")
    with I.serial(0, shape.warp_rows) as turn:
        row = let(warp * shape.warp_rows + turn)
        for i in range(count):
            place = row * dim + lane * count + i
            ptx("ld.shared.u32", bits[0], memory.words.ptr_to([place]))
            store(x, as_float(bits[0]), i)
        if rotated:
            rotate_row(shape, x, lane)
            turn_signs(shape, x, lane)
        with when(rows.exists(row)):
            token, head = let(rows.token(row)), let(rows.head(row))
            for i in range(count):
                store(out, T.cast(x[i], spec.dtype), token, head, lane * count + i)


def _multiply(shape: PrefillShape, memory, tile: Tile, softmax: _Softmax, warp, lane, step) -> None:
    """Scores, weights and output of one tile; ``step`` is (first token, masked)."""
    config, product = shape.config, PRODUCTS[shape.spec.dtype]
    blocks, steps = config.tile // 16, shape.spec.head_dim // 16
    scores = local((config.row_tiles, config.tile // 8, 4), "float32")
    row = let(warp * shape.warp_rows + lane % 16)
    chunk = T.bitwise_xor(lane % 8, lane // 16) * 4
    begin = let(memory.queries + row * shape.row_words + chunk)
    for k in range(steps):
        a = []
        for m in range(config.row_tiles):
            words = local(4, "uint32")
            at = T.bitwise_xor(begin, 8 * k) + 16 * m * shape.row_words
            registers = [words[i] for i in range(4)]
            ptx(
                "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
                *registers,
                memory.words.ptr_to([at]),
            )
            a.append(registers)
        for block in range(blocks):
            for octet, b in enumerate(tile.keys(block, k)):
                for m in range(config.row_tiles):
                    result = [scores[m, 2 * block + octet, e] for e in range(4)]
                    mma(product, result, a[m], b, result if k else [f32(0)] * 4)
    softmax.weigh(scores, *step)
    weights = local((config.row_tiles, 4), "uint32")
    for block in range(blocks):
        for m in range(config.row_tiles):
            for i in range(4):
                pair = [scores[m, 2 * block + i // 2, 2 * (i % 2) + e] for e in (1, 0)]
                ptx(PAIR[shape.spec.dtype], weights[m, i], *pair)
        for k in range(steps):
            for octet, b in enumerate(tile.values(block, k)):
                for m in range(config.row_tiles):
                    result = [softmax.output[m, 2 * k + octet, e] for e in range(4)]
                    mma(product, result, [weights[m, i] for i in range(4)], b, result)


def _attend(
    shape: PrefillShape, q, caches, tables, extras, out, lse, batch, kv_head, index, thread, options
) -> None:
    """One CTA."""
    config = shape.config
    sinks, alibi = extras
    sm_scale, _, window, kept = options
    warp, lane = let(thread // 32), let(thread % 32)
    g, t = let(lane // 4), let(lane % 4)
    found, block = _find_block(shape, tables[2], batch, lane, index)
    with when(found[0] >= 0):
        sequence = let(found[0])
        memory = PrefillMemory(shape)
        rows = _Rows(shape, sequence, block[0], tables, kv_head)
        tile = Tile(shape, memory, caches, kv_head, thread, lane)
        now, ahead, end, near = (local(1, "int32") for _ in range(4))
        store(end, rows.last_position + 1)
        # Tiles between those of the kept tokens and the first in the window are passed over.
        oldest = T.max(rows.first_position - window, i32(0))
        store(near, T.Select(window < 0, i32(0), T.truncdiv(oldest, config.tile) * config.tile))

        def following(first):
            return T.Select(T.And(first >= kept, first < near[0]), near[0], first)

        store(now, following(i32(0)))
        with when(now[0] < end[0]):
            tile.ask(tables[0], sequence, now[0], rows.seq_len)
        _load_queries(shape, memory, q, rows, warp, lane, let(sm_scale * f32(_LOG2E)))
        softmax = _Softmax(shape, rows, warp, g, t, alibi, options)
        with loop(now[0] < end[0]):
            tile.arrive()
            barrier()
            tile.decode()
            barrier()
            store(ahead, following(now[0] + config.tile))
            with when(ahead[0] < end[0]):
                tile.ask(tables[0], sequence, ahead[0], rows.seq_len)
            late = now[0] + (config.tile - 1) > rows.first_position
            masked = T.Or(late, T.And(window >= 0, now[0] < rows.last_position - window))
            _multiply(shape, memory, tile, softmax, warp, lane, (now[0], masked))
            store(now, ahead[0])
        barrier()
        _write_rows(shape, memory, softmax, rows, sinks, out, lse, warp, lane, g, t)
