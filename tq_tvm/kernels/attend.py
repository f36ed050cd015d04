r"""``attend``: attention of several new tokens a sequence over packed pages, with what engines ask.

Equation
    Sequence b has n = cu_seqlens_q[b + 1] - cu_seqlens_q[b] query tokens, the newest of its L =
    seq_lens[b]; token i is at position p = L - n + i and sees the positions j <= p, with a window
    w >= 0 to the left only those with j >= p - w or j < kept_tokens. With q' = q H / sqrt(D), k and
    v the dequantised rows (``tq_tvm.formats``), still rotated, and z(j) = sm_scale q' k_j^T::

        z'(j) = c tanh(z(j) / c) + a_h (j - p)          without tanh where the soft cap c is 0
        lse   = log(exp(s_h) + sum_j exp(z'(j)))        s_h: the head's sink, if there are any
        out   = (sum_j exp(z'(j) - lse) v_j) H / sqrt(D)

    computed as online softmax over parts of the context, then merged, as in ``kernels.decode``.

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
    sinks         [HQ], or [0]: none                        float32  in
    alibi_slopes  [HQ], or [0]: none                        float32  in
    k_window      [S, N, HK, D], with a window of the spec  dtype    in: rings of rotated rows
    v_window      [S, N, HK, DV], with it                   dtype    in
    window_slots  [B], with it                              int32    in, ring of each sequence
    workspace     [W], see ``tq_tvm.splits``                float32  scratch
    out           [T, HQ, DV]                               dtype    out
    lse           [T, HQ], or [T, 0]: not wanted            float32  out, natural logarithms
    num_parts     scalar, see ``tq_tvm.splits``             int32    in
    sm_scale      scalar                                    float32  in
    soft_cap      scalar, 0: none                           float32  in
    window_left   scalar, -1: none                          int32    in
    kept_tokens   scalar                                    int32    in
    ============  ========================================  =======  =====================

With a window of the spec, k and v of the positions from L - N on are rows of the sequence's ring,
position j row j % N, and not those of the cache.

Static: format, D, DV, HQ, HK, PS, dtype, layout, the spec's window. Dynamic: T, B, P, MB, lengths,
strides, parts, and every feature: what is not asked for is skipped by a branch that all tasks take
alike.

Tail
    Rows of q past cu_seqlens_q[B] are not read and those of out and lse are left alone. Pages that
    no query sees are not read: their entries of the table may be anything. A query that sees
    nothing gives zeros and lse = -inf, or its sink.

Numerics
    float32 softmax in units of log2, m of no token is -1e30. A row of K or V that is not finite
    reaches only the queries that see it; on a GPU, of V, all of a block of rows that one of them
    sees it in: a weight of zero does not drop what is not a number.

    On a GPU sums are float32, and a row's bound lags behind its largest logit by up to 6 powers of
    two. Of pairs whose codes become operands in registers (`attend_fragments`), all codecs but
    ``none`` and one head_dim of 64, 128 or 256, rotated queries, levels of Lloyd-Max, and weights
    times V's scale are rounded to float16, whatever the dtype: rotated queries have to be below
    65504, and a weight times its scale that is 2^-29 of the largest or less loses bits. Of others
    rotated queries, K and V as ``flatten`` gives them, and weights are rounded to dtype; of a
    spec's window, in any format, rotated queries and weights.

Cost of one token and KV head: the bytes of ``decode`` for every block of query tokens (a CPU's
``block``; on a GPU 16 ``row_tiles`` pairs of a token and a head), and 2 (D + DV) operations a query
row.

A factory as ``decode`` is; a search samples its parameters on an anchor (``schedules/attend.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm.tirx import PrimFunc

from tq_tvm.kernels.attend_cpu import AttendCpuConfig, attend_cpu
from tq_tvm.kernels.attend_cuda import attend_cuda
from tq_tvm.kernels.attend_shape import AttendConfig
from tq_tvm.served import check_target
from tq_tvm.spec import CacheSpec

__all__ = ["attend"]


def attend(spec: CacheSpec, kind: str, decisions: Mapping[str, int]) -> PrimFunc:
    """The TensorIR of ``attend`` for a target kind and one value of each decision."""
    check_target("attend", spec, kind, "attend")
    if kind == "cuda":
        return attend_cuda(spec, AttendConfig(**decisions))
    return attend_cpu(spec, AttendCpuConfig(**decisions))
