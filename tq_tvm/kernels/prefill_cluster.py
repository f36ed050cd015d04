"""``prefill`` on GPUs with thread-block clusters: a block of rows is a cluster's.

Few long sequences have few blocks of rows: 512 new tokens of one sequence are 64 of them with 32
query heads, for 132 processors of an H100. The CTAs of a cluster take the tiles of a block in turn,
each with the softmax of its own ones, and read one another's outputs from shared memory at the end:
no workspace, and no second launch. ``num_parts`` is the CTAs of a cluster.

1 x 512 over 32768, 32/8 heads, k4v2, H100: 859 us with two CTAs a cluster, 1698 with one.
"""

from __future__ import annotations

import functools

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.attend_rows import Options, RowBlock, finish_row
from tq_tvm.kernels.device import (
    LOWEST,
    access,
    arrive_at_cluster,
    f32,
    i32,
    let,
    local,
    loop,
    ptx,
    remote_address,
    store,
    wait_for_cluster,
    when,
)
from tq_tvm.kernels.prefill_cuda import PrefillConfig, PrefillShape, attend_block, stats_begin
from tq_tvm.kernels.warp_rows import WarpRow
from tq_tvm.spec import CacheSpec

__all__ = ["prefill_cluster"]


def prefill_cluster(spec: CacheSpec, config: PrefillConfig) -> PrimFunc:
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
        for bz in T.thread_binding(n * group // rows + b, thread="blockIdx.z"):
            for by in T.thread_binding(kv_heads, thread="blockIdx.y"):
                # A row of the grid is a cluster.
                for _ in T.thread_binding(num_parts, thread="clusterCtaIdx.x"):
                    for bx in T.thread_binding(num_parts, thread="blockIdx.x"):
                        for tx in T.thread_binding(shape.threads, thread="threadIdx.x"):
                            T.attr({"tirx.launch_bounds_min_blocks_per_sm": shape.ctas_per_sm})
                            options = T.meta_var(
                                Options(SK, AL, sm_scale, soft_cap, window_left, kept_tokens)
                            )
                            finish = T.meta_var(
                                functools.partial(_merge, shape, options, OUT, LSE, bx, num_parts)
                            )
                            attend_block(
                                shape, Q, caches, (BT, SL, CU), options, b, by, bz, tx, bx,
                                num_parts, finish,
                            )  # fmt: skip

    return main


def _merge(
    shape: PrefillShape, options: Options, out, lse, rank, parts, words, output: WarpRow,
    rows: RowBlock, warp, lane,
) -> None:  # fmt: skip
    """Finish the CTA's share of every warp's rows, of which all CTAs of the cluster have parts."""
    arrive_at_cluster(release=True)
    wait_for_cluster()
    count, dim = output.row_values, output.dim
    x, part = local(count, "float32"), local(1, "float32")
    top, total, state = local(1, "float32"), local(1, "float32"), local(2, "float32")
    own, other = local(1, "int32"), local(1, "int32")
    store(own, rank)
    with loop(own[0] < shape.warp.rows):
        row = let(warp * shape.warp.rows + own[0])
        with when(rows.exists(row)):
            store(top, f32(LOWEST))
            store(total, f32(0))
            for i in range(count):
                store(x, f32(0), i)
            store(other, i32(0))
            with loop(other[0] < parts):
                stats = remote_address(words.ptr_to([stats_begin(shape) + 2 * row]), other[0])
                access("ld.shared::cluster", [state[0], state[1]], stats, "f32")
                highest = let(T.max(top[0], state[0]))
                shrink, raised = let(T.exp2(top[0] - highest)), let(T.exp2(state[0] - highest))
                store(top, highest)
                store(total, total[0] * shrink + state[1] * raised)
                begin = let(remote_address(words.ptr_to([row * dim]), other[0]))
                for i, base, extra in output.places(lane):
                    at = begin + T.cast(4 * (base + extra), "uint32")
                    ptx("ld.shared::cluster.f32", part[0], at)
                    store(x, x[i] * shrink + part[0] * raised, i)
                store(other, other[0] + 1)
            place = let(rows.token(row)), let(rows.head(row))
            finish_row(output, x, top[0], total[0], place, options, out, lse, lane)
        store(own, own[0] + parts)
    # Nobody leaves while others read what it has.
    arrive_at_cluster(release=False)
    wait_for_cluster()
