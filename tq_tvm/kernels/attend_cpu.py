r"""``attend`` on CPUs: the loops of ``kernels.attend``'s equation, for every format.

One parallel loop over (block of query tokens, KV head, split): a block has up to ``block`` tokens
of one sequence, whose heads of the group share every row of K and V that the pieces of ``rows_cpu``
decode. It walks the tokens that its queries see: those that are kept, then those from the first
query's window to the last query. Scores are masked a query and token, and what a query does not see
is not added to it, so that rows of later tokens cannot touch it, whatever is in them.

Blocks of ragged sequences are found without a pass over the batch: sequence b has the blocks from
cu_seqlens_q[b] / block + b on, of which at least as many as it needs come before the next one's;
T / block + B are enough for all, and those left over have no tokens.

With one split a task writes its outputs itself and ``workspace`` is not touched. With more, a
second parallel loop over (query token, head) merges them.
"""

from __future__ import annotations

import dataclasses
import math

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.device import LOG2E, LOWEST, local, loop, store
from tq_tvm.kernels.rows_cpu import CpuRows, sources
from tq_tvm.spec import CacheSpec

__all__ = ["AttendCpuConfig", "attend_cpu", "block_tokens"]

_MOST_ROWS = 128
"""Query rows of a task: more would not stay in the caches beside a tile."""


@dataclasses.dataclass(frozen=True)
class AttendCpuConfig:
    """The decisions of one kernel; ``schedules/attend.py`` says what each one trades."""

    tile: int
    vector: int
    block: int
    lookup: int


def block_tokens(spec: CacheSpec, config: AttendCpuConfig) -> int:
    """Query tokens of a task: the decision, as far as their heads are not too many."""
    return max(1, min(config.block, _MOST_ROWS // spec.group_size))


def attend_cpu(spec: CacheSpec, config: AttendCpuConfig) -> PrimFunc:
    """The TensorIR of ``attend`` for one configuration, all sizes dynamic."""
    D, HQ, HK, dtype = spec.head_dim, spec.num_q_heads, spec.num_kv_heads, spec.dtype
    G = spec.group_size
    DV = spec.value_dim
    TILE = config.tile
    BLOCK = block_tokens(spec, config)
    rows = CpuRows(spec, TILE, config.vector, bool(config.lookup))

    def query(Q, token, head):
        return lambda j: Q[token, head, j]

    def find_sequence(CU, batch, unit):
        """The last sequence whose blocks begin at or before ``unit``."""
        found, past, probe = local(1, "int64"), local(1, "int64"), local(1, "int64")
        store(found, T.int64(0))
        store(past, batch)
        with loop(past[0] - found[0] > 1):
            store(probe, T.truncdiv(found[0] + past[0], T.int64(2)))
            begin = T.truncdiv(T.cast(CU[probe[0]], "int64"), T.int64(BLOCK)) + probe[0]
            with I.If(begin <= unit):
                with I.Then():
                    store(found, probe[0])
                with I.Else():
                    store(past, probe[0])
        return found[0]

    def finish(x, scratch, row, best, total, SINKS, OUT, LSE, token, head):
        """Output and lse of a query row, from its m and l."""
        top, weight, factor = (local(1, "float32") for _ in range(3))
        store(top, best)
        store(weight, total)
        store(factor, T.float32(1))
        with I.If(SINKS.shape[0] > 0), I.Then():
            sink = I.bind(SINKS[head] * T.float32(LOG2E))
            store(top, T.max(best, sink))
            store(factor, T.exp2(best - top[0]))
            store(weight, total * factor[0] + T.exp2(sink - top[0]))
        with I.If(LSE.shape[1] > 0), I.Then():
            none = T.EQ(weight[0], T.float32(0))
            lse = (top[0] + T.log2(weight[0])) * T.float32(1 / LOG2E)
            I.buffer_store(LSE, T.if_then_else(none, T.float32(-math.inf), lse), [token, head])
        rows.rotate(x, scratch, row, DV)
        scale = factor[0] * T.float32(rows.value_scale) / weight[0]
        store(factor, T.if_then_else(T.EQ(weight[0], T.float32(0)), T.float32(0), scale))
        rows.write(x, row, factor[0], OUT, token, head)

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
        num_parts: T.int32,
        sm_scale: T.float32,
        soft_cap: T.float32,
        window_left: T.int32,
        kept_tokens: T.int32,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        tokens = T.int64()
        b = T.int64()
        w = T.int64()
        p = T.int64()
        hs = T.int64()
        ha = T.int64()
        ws = T.int64()
        hl = T.int64()
        Q = T.match_buffer(q, (tokens, HQ, D), dtype, align=16)
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        CU = T.match_buffer(cu_seqlens_q, (b + 1,), "int32", align=4)
        SINKS = T.match_buffer(sinks, (hs,), "float32", align=4)
        ALIBI = T.match_buffer(alibi_slopes, (ha,), "float32", align=4)
        rings = T.meta_var(pages.match_rings(spec, (k_window, v_window, window_slots), b))
        WS = T.match_buffer(workspace, (ws,), "float32", align=16)
        OUT = T.match_buffer(out, (tokens, HQ, DV), dtype, align=16)
        LSE = T.match_buffer(lse, (tokens, hl), "float32", align=4)
        keys, values = T.meta_var(sources(caches, BT, rings))
        pieces = T.meta_var(tokens * HQ * num_parts)
        for task in T.parallel((T.truncdiv(tokens, T.int64(BLOCK)) + b) * HK * num_parts):
            unit: T.let = T.truncdiv(task, HK * num_parts)
            h: T.let = T.truncmod(T.truncdiv(task, num_parts), HK)
            split: T.let = T.cast(T.truncmod(task, num_parts), "int32")
            bz: T.let = find_sequence(CU, b, unit)
            first: T.int32 = CU[bz]
            new: T.int32 = CU[bz + 1] - first
            skipped: T.int32 = BLOCK * T.cast(
                unit - bz - T.cast(T.truncdiv(first, BLOCK), "int64"), "int32"
            )
            queries: T.int32 = T.min(BLOCK, new - skipped)
            if queries > 0:
                state = T.meta_var(rows.allocate(G * BLOCK))
                for t in T.serial(queries):
                    for g in T.serial(G):
                        rows.start(
                            state, t * G + g, query(Q, first + skipped + t, h * G + g), sm_scale
                        )
                length: T.int32 = SL[bz]
                # Positions of the queries are from `since` to `end` - 1.
                since: T.int32 = length - new + skipped
                end: T.int32 = since + queries
                # They see [0, kept) and [low, end).
                low: T.int32 = 0
                kept: T.int32 = 0
                if window_left >= 0:
                    low = T.max(since - window_left, 0)
                    kept = T.min(kept_tokens, low)
                kept_tiles: T.int32 = T.truncdiv(kept + (TILE - 1), TILE)
                tiles: T.int32 = kept_tiles + T.truncdiv(T.max(end - low, 0) + (TILE - 1), TILE)
                share: T.int32 = T.truncdiv(tiles + num_parts - 1, num_parts)
                tile: T.int32 = split * share
                last: T.int32 = T.min(tiles, (split + 1) * share)
                while tile < last:
                    begin: T.int32 = tile * TILE
                    past: T.int32 = kept
                    if tile >= kept_tiles:
                        begin = low + (tile - kept_tiles) * TILE
                        past = end
                    count: T.int32 = T.min(TILE, past - begin)
                    for r in T.serial(count):
                        position: T.let = begin + r
                        norm = T.meta_var(rows.read_key(state, keys, bz, position, length, h))
                        for t in T.serial(queries):
                            age: T.let = since + t - position
                            near: T.let = T.Or(
                                T.Or(window_left < 0, age <= window_left), position < kept_tokens
                            )
                            if T.And(age >= 0, near):
                                for g in T.serial(G):
                                    dot = T.meta_var(rows.dot(state, t * G + g))
                                    logit: T.float32 = dot * norm
                                    if soft_cap > T.float32(0):
                                        cap: T.let = soft_cap * T.float32(LOG2E)
                                        logit = cap * T.tanh(logit / cap)
                                    if ALIBI.shape[0] > 0:
                                        logit = logit - ALIBI[h * G + g] * (
                                            T.float32(LOG2E) * T.cast(age, "float32")
                                        )
                                    state.score[t * G + g, r] = logit
                            else:
                                for g in T.serial(G):
                                    state.score[t * G + g, r] = T.float32(LOWEST)
                    for i in T.serial(queries * G):
                        rows.weigh(state, i, count, masked=True)
                    for r in T.serial(count):
                        position2: T.let = begin + r
                        rows.read_value(state, values, bz, position2, length, h)
                        for i in T.serial(queries * G):
                            # A nan is not 0 either.
                            if T.NE(state.score[i, r], T.float32(0)):
                                rows.add(state, i, r)
                    tile = tile + 1
                for t in T.serial(queries):
                    for g in T.serial(G):
                        token: T.let = T.cast(first + skipped + t, "int64")
                        head: T.let = h * G + g
                        i2: T.let = t * G + g
                        if num_parts == 1:
                            finish(
                                state.acc, state.scratch, i2, state.top[i2], state.total[i2],
                                SINKS, OUT, LSE, token, head,
                            )  # fmt: skip
                        else:
                            rows.leave(
                                state, WS, i2, (token * HQ + head) * num_parts + split, pieces
                            )
        if num_parts > 1:
            # Rows past the last sequence's have no pieces.
            for line in T.parallel(T.cast(CU[b], "int64") * HQ):
                merged = T.meta_var(rows.collect(WS, line, num_parts, pieces))
                finish(
                    merged[0], merged[1], 0, merged[2], merged[3], SINKS, OUT, LSE,
                    T.truncdiv(line, HQ), T.truncmod(line, HQ),
                )  # fmt: skip

    return main
