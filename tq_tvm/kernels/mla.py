r"""``mla``: multi-head latent attention of one new token a sequence over a packed latent cache.

Equation
    A token is a latent c of 512 values, packed, and a rope part r of 64, as it is; all query heads
    share both (DeepSeek-V2, section 2.1, with the up-projections absorbed into queries and
    outputs). With q' and p' the rotated queries, c and r as dequantised, still rotated::

        z(j) = sm_scale (q' c_j^T + p' r_j^T)
        lse  = log(sum_j exp(z(j))),   out = (sum_j exp(z(j) - lse) c_j) H / sqrt(512)

    with the signs of a signed rotation, or without H, as the format has it.

Buffers
    ============  ===============================  =======  ================================
    name          shape                            dtype    use
    ============  ===============================  =======  ================================
    q_latent      [B, HQ, 512]                     dtype    in
    q_rope        [B, HQ, 64]                      dtype    in
    k_cache       [P, PS, 1, BK], free page str.   uint8    in: latents; dtype of codec none
    v_cache       [P, PS, 1, 64], free page str.   dtype    in: rope parts
    k_meta        [P, PS, 1, MK], free page str.   dtype    in; [1] float32 of fp8
    v_meta        [P, PS, 1, 0]                    dtype    in, empty
    block_table   [B, MB]                          int32    in
    seq_lens      [B]                              int32    in
    workspace     [W], see ``tq_tvm.splits``       float32  scratch: o, then (m, l)
    out           [B, HQ, 512]                     dtype    out
    lse           [B, HQ], or [B, 0]: not wanted   float32  out, natural logarithms
    num_parts     scalar, see ``tq_tvm.splits``    int32    in
    sm_scale      scalar                           float32  in
    ============  ===============================  =======  ================================

    Layout ``bhsd`` swaps PS and 1. The cache is that of ``CacheSpec(512, HQ, 1, head_dim_v=64)``
    in a format whose value codec is ``none``: ``fill`` writes it, with latents as k and rope parts
    as v.

Static: format, HQ, PS, dtype, layout. Dynamic: B, P, MB, lengths, strides, splits.

Tail
    Tokens past a sequence's end are not read. An empty sequence gives zeros and lse = -inf.

Numerics
    float32 on CPUs; m of no token is -1e30. On GPUs rotated queries, latents and weights are
    rounded to float16 where the codec is a Lloyd-Max one, whatever the dtype: queries times
    sm_scale and dequantised latents have to be below 65504. With other codecs, and in rope parts,
    they are rounded to dtype. Sums are float32, and a row's bound lags behind its largest logit by
    up to 6 powers of two.

Cost of one token (mse4, bf16): 386 bytes read, and 2 (512 + 64) + 2 512 operations a query head.

A factory as ``decode`` is; a search samples its parameters on an anchor (``schedules/mla.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm.tirx import PrimFunc

from tq_tvm.kernels.mla_cpu import MlaCpuConfig, mla_cpu
from tq_tvm.kernels.mla_cuda import mla_cuda
from tq_tvm.kernels.mla_shape import MlaConfig
from tq_tvm.served import check_target
from tq_tvm.spec import CacheSpec

__all__ = ["mla"]


def mla(spec: CacheSpec, kind: str, decisions: Mapping[str, int]) -> PrimFunc:
    """The TensorIR of ``mla`` for a target kind and one value of each decision."""
    check_target("mla", spec, kind, "mla")
    if kind == "cuda":
        return mla_cuda(spec, MlaConfig(**decisions))
    return mla_cpu(spec, MlaCpuConfig(**decisions))
