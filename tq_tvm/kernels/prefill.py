r"""``prefill``: attention of long chunks of new tokens over packed pages, on GPUs.

Equation
    That of ``attend`` (``tq_tvm.reference.attend``), whose call and features these are too, for
    sequences with so many new tokens that K and V are better decoded for many of them at once.
    q' = q R, R the format's rotation, over tiles of tokens::

        s = sm_scale log2(e) q' k^T          soft cap and ALiBi, where wanted, in the same units
        m' = max(m, max_j s_j - slack)       o = o 2^(m - m') + 2^(s - m') v, l alike
        out = o / l R^-1                     lse = (m + log2 l) ln 2

Buffers
    ============  ========================================  =======  =====================
    name          shape                                     dtype    use
    ============  ========================================  =======  =====================
    q             [T, HQ, D]                                dtype    in
    k_cache       [P, PS, HK, BK], free page stride         uint8    in; dtype of codec none
    v_cache       [P, PS, HK, BV], free page stride         uint8    in
    k_meta        [P, PS, HK, MK], free page stride         dtype    in; [1] float32 of fp8
    v_meta        [P, PS, HK, MV], free page stride         dtype    in
    block_table   [B, MB]                                   int32    in
    seq_lens      [B]                                       int32    in
    cu_seqlens_q  [B + 1]                                   int32    in
    sinks         [HQ] or [0]                               float32  in
    alibi_slopes  [HQ] or [0]                               float32  in
    out           [T, HQ, D]                                dtype    out
    lse           [T, HQ] or [T, 0]                         float32  out
    num_parts     scalar, CTAs of a cluster, or 1           int32    in
    sm_scale      scalar                                    float32  in
    soft_cap      scalar, 0 for none                        float32  in
    window_left   scalar, -1 for none                       int32    in
    kept_tokens   scalar                                    int32    in
    ============  ========================================  =======  =====================

Static: format, D, HQ, HK, PS, dtype, layout. Dynamic: T, B, P, MB, lengths, strides.

Tail
    Tiles that no row of a CTA sees are not read, nor are pages looked up that have no token which
    one sees; scales of other tokens, or without scales rows, count as zeros. Rows of q past
    ``cu_seqlens_q[B]`` are left alone; a token that sees nothing gets zeros, and -inf or its sink.

Numerics
    Rotated queries, K and V as ``flatten`` gives them, and weights are rounded to dtype; sums are
    float32. A row's bound lags behind its largest logit by up to 6 powers of two.

Cost of one query token and head over one token (D = 128): 512 operations of a tensor core. K and V
are read and decoded once for each ``rows / G`` query tokens.

Two forms: warps that decode a tile together and then multiply (`prefill_cuda`), and on Hopper, of
packed rows of 64 or 128 values, warps that decode beside warpgroups that multiply
(`prefill_warpgroups`).
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm.tirx import PrimFunc

from tq_tvm.kernels.prefill_cuda import prefill_cuda
from tq_tvm.kernels.prefill_shape import PrefillConfig, PrefillShape
from tq_tvm.kernels.prefill_warpgroups import WarpgroupConfig, WarpgroupShape
from tq_tvm.served import check_target
from tq_tvm.spec import CacheSpec

__all__ = ["prefill", "shape_of"]


def prefill(spec: CacheSpec, kind: str, decisions: Mapping[str, int]) -> PrimFunc:
    """The TensorIR of ``prefill`` for a target kind and one value of each decision."""
    check_target("prefill", spec, kind, "prefill")
    return prefill_cuda(shape_of(spec, decisions))


def shape_of(spec: CacheSpec, decisions: Mapping[str, int]) -> PrefillShape | WarpgroupShape:
    """The sizes of the kernel that decisions are of."""
    if "multipliers" in decisions:
        return WarpgroupShape(spec, WarpgroupConfig(**decisions))
    return PrefillShape(spec, PrefillConfig(**decisions))
