r"""``decode`` on CPUs: the loops of ``kernels.decode``'s equation, for every format.

One parallel loop over (sequence, KV head, split): the pieces of ``rows_cpu`` on the group's
queries. A second parallel loop over query heads merges the splits and rotates back.

    ============  ================================  =======  =========================
    name          shape                             dtype    use
    ============  ================================  =======  =========================
    k_window      [S, N, HK, D]                     dtype    in, N = window
    v_window      [S, N, HK, DV]                    dtype    in
    window_slots  [B], ring of each sequence        int32    in
    ============  ================================  =======  =========================
"""

from __future__ import annotations

import dataclasses

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.rows_cpu import CpuRows, sources
from tq_tvm.spec import CacheSpec

__all__ = ["DecodeCpuConfig", "decode_cpu"]


@dataclasses.dataclass(frozen=True)
class DecodeCpuConfig:
    """The decisions of one decode kernel; ``schedules/decode.py`` says what each one trades."""

    tile: int
    vector: int
    unroll: int
    lookup: int


def decode_cpu(spec: CacheSpec, config: DecodeCpuConfig) -> PrimFunc:
    """The TensorIR of ``decode`` for one configuration, all sizes dynamic."""
    D, HQ, HK, dtype = spec.head_dim, spec.num_q_heads, spec.num_kv_heads, spec.dtype
    G = spec.group_size
    DV = spec.value_dim
    TILE = config.tile
    rows = CpuRows(spec, TILE, config.vector, bool(config.lookup))
    head_loop = T.unroll if config.unroll else T.serial

    def query(Q, sequence, head):
        return lambda j: Q[sequence, head, j]

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
        num_splits: T.int32,
        sm_scale: T.float32,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        b = T.int64()
        w = T.int64()
        p = T.int64()
        ws = T.int64()
        Q = T.match_buffer(q, (b, HQ, D), dtype, align=16)
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        rings = T.meta_var(pages.match_rings(spec, (k_window, v_window, window_slots), b))
        WS = T.match_buffer(workspace, (ws,), "float32", align=16)
        OUT = T.match_buffer(out, (b, HQ, DV), dtype, align=16)
        keys, values = T.meta_var(sources(caches, BT, rings))
        for task in T.parallel(b * HK * num_splits):
            bz: T.let = T.truncdiv(task, HK * num_splits)
            h: T.let = T.truncmod(T.truncdiv(task, num_splits), HK)
            split: T.let = T.cast(T.truncmod(task, num_splits), "int32")
            state = T.meta_var(rows.allocate(G))
            for i in T.serial(G):
                rows.start(state, i, query(Q, bz, h * G + i), sm_scale)
            length: T.int32 = SL[bz]
            tiles: T.int32 = T.truncdiv(length + (TILE - 1), TILE)
            share: T.int32 = T.truncdiv(tiles + num_splits - 1, num_splits)
            tile: T.int32 = split * share
            last: T.int32 = T.min(tiles, (split + 1) * share)
            while tile < last:
                count: T.int32 = T.min(TILE, length - tile * TILE)
                for r in T.serial(count):
                    position: T.let = tile * TILE + r
                    norm = T.meta_var(rows.read_key(state, keys, bz, position, length, h))
                    for i in head_loop(G):
                        dot = T.meta_var(rows.dot(state, i))
                        state.score[i, r] = dot * norm
                for i in T.serial(G):
                    rows.weigh(state, i, count, masked=False)
                for r in T.serial(count):
                    position2: T.let = tile * TILE + r
                    rows.read_value(state, values, bz, position2, length, h)
                    for i in head_loop(G):
                        rows.add(state, i, r)
                tile = tile + 1
            for i in T.serial(G):
                rows.leave(
                    state, WS, i, (bz * HQ + h * G + i) * num_splits + split, b * HQ * num_splits
                )
        for line in T.parallel(b * HQ):
            pieces = T.meta_var(b * HQ * num_splits)
            merged = T.meta_var(rows.collect(WS, line, num_splits, pieces))
            weight = T.meta_var(merged[3])
            rows.rotate(merged[0], merged[1], 0, DV)
            inverse = T.Select(
                weight > T.float32(0), T.float32(rows.value_scale) / weight, T.float32(0)
            )
            rows.write(merged[0], 0, inverse, OUT, T.truncdiv(line, HQ), T.truncmod(line, HQ))

    return main
