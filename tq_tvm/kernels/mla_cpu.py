r"""``mla`` on CPUs: the loops of ``kernels.mla``'s equation, for every format of latents.

One parallel loop over (sequence, block of query heads, split): the heads of a block share every
latent and rope part that the pieces of ``rows_cpu`` decode. A second parallel loop over query heads
merges the splits and rotates back.
"""

from __future__ import annotations

import dataclasses
import math

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.device import LOG2E
from tq_tvm.kernels.rows_cpu import CpuRows, sources
from tq_tvm.spec import CacheSpec

__all__ = ["MlaCpuConfig", "mla_cpu"]


@dataclasses.dataclass(frozen=True)
class MlaCpuConfig:
    """The decisions of one kernel; ``schedules/mla.py`` says what each one trades."""

    tile: int
    vector: int
    heads: int


def mla_cpu(spec: CacheSpec, config: MlaCpuConfig) -> PrimFunc:
    """The TensorIR of ``mla`` for one configuration, all sizes dynamic."""
    HQ, dtype = spec.num_q_heads, spec.dtype
    D, R = spec.head_dim, spec.value_dim
    TILE = config.tile
    HEADS = min(config.heads, HQ)
    BLOCKS = -(-HQ // HEADS)
    latent_spec, rope_spec = spec.latent_parts
    latents = CpuRows(latent_spec, TILE, config.vector, lookup=False)
    ropes = CpuRows(rope_spec, TILE, config.vector, lookup=False)

    def query(Q, sequence, head):
        return lambda j: Q[sequence, head, j]

    def finish(merged, scratch, best, weight, OUT, LSE, sequence, head):
        """Output and lse of a query row, from its m and l."""
        none = T.EQ(weight, T.float32(0))
        with I.If(LSE.shape[1] > 0), I.Then():
            lse = (best + T.log2(weight)) * T.float32(1 / LOG2E)
            lse = T.if_then_else(none, T.float32(-math.inf), lse)
            I.buffer_store(LSE, lse, [sequence, head])
        latents.rotate(merged, scratch, 0, D)
        inverse = T.Select(none, T.float32(0), T.float32(latents.value_scale) / weight)
        latents.write(merged, 0, inverse, OUT, sequence, head)

    @T.prim_func(s_tir=True)
    def main(
        q_latent: T.handle,
        q_rope: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        workspace: T.handle,
        out: T.handle,
        lse: T.handle,
        num_splits: T.int32,
        sm_scale: T.float32,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        b = T.int64()
        w = T.int64()
        p = T.int64()
        ws = T.int64()
        hl = T.int64()
        QL = T.match_buffer(q_latent, (b, HQ, D), dtype, align=16)
        QR = T.match_buffer(q_rope, (b, HQ, R), dtype, align=16)
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        WS = T.match_buffer(workspace, (ws,), "float32", align=16)
        OUT = T.match_buffer(out, (b, HQ, D), dtype, align=16)
        LSE = T.match_buffer(lse, (b, hl), "float32", align=4)
        of_latents, of_ropes = T.meta_var(sources(caches, BT))
        for task in T.parallel(b * BLOCKS * num_splits):
            bz: T.let = T.truncdiv(task, BLOCKS * num_splits)
            first: T.let = T.truncmod(T.truncdiv(task, num_splits), BLOCKS) * HEADS
            split: T.let = T.cast(T.truncmod(task, num_splits), "int32")
            heads: T.let = T.min(HEADS, HQ - first)
            state = T.meta_var(latents.allocate(HEADS))
            rope = T.meta_var(ropes.allocate(HEADS))
            for i in T.serial(heads):
                latents.start(state, i, query(QL, bz, first + i), sm_scale)
                ropes.start(rope, i, query(QR, bz, first + i), sm_scale)
            length: T.int32 = SL[bz]
            tiles: T.int32 = T.truncdiv(length + (TILE - 1), TILE)
            share: T.int32 = T.truncdiv(tiles + num_splits - 1, num_splits)
            tile: T.int32 = split * share
            last: T.int32 = T.min(tiles, (split + 1) * share)
            while tile < last:
                count: T.int32 = T.min(TILE, length - tile * TILE)
                for r in T.serial(count):
                    position: T.let = tile * TILE + r
                    norm = T.meta_var(latents.read_key(state, of_latents, bz, position, length, 0))
                    one = T.meta_var(ropes.read_key(rope, of_ropes, bz, position, length, 0))
                    for i in T.serial(heads):
                        dot = T.meta_var(latents.dot(state, i))
                        more = T.meta_var(ropes.dot(rope, i))
                        state.score[i, r] = dot * norm + more * one
                for i in T.serial(heads):
                    latents.weigh(state, i, count, masked=False)
                for r in T.serial(count):
                    position2: T.let = tile * TILE + r
                    latents.read_value(state, of_latents, bz, position2, length, 0)
                    for i in T.serial(heads):
                        latents.add(state, i, r)
                tile = tile + 1
            for i in T.serial(heads):
                latents.leave(
                    state, WS, i, (bz * HQ + first + i) * num_splits + split, b * HQ * num_splits
                )
        for line in T.parallel(b * HQ):
            pieces = T.meta_var(b * HQ * num_splits)
            merged = T.meta_var(latents.collect(WS, line, num_splits, pieces))
            finish(*merged, OUT, LSE, T.truncdiv(line, HQ), T.truncmod(line, HQ))

    return main
