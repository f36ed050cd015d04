r"""``decode``: attention of one new token a sequence over its packed pages.

Equation
    q' = q H / sqrt(D), k and v the dequantised rows (``tq_tvm.formats``), still rotated::

        out = (softmax(sm_scale q' k^T) v) H / sqrt(D)

    with the signs of a signed rotation, or without H, as the format has it,

    computed as online softmax over parts of the context, each of which leaves m = a bound of the
    logits (in units of log2), l = sum 2^(logit - m) and o = sum 2^(logit - m) v; then merged.

Buffers
    ============  ========================================  =======  =====================
    name          shape                                     dtype    use
    ============  ========================================  =======  =====================
    q             [B, HQ, D]                                dtype    in
    k_cache       [P, PS, HK, BK], free page stride         uint8    in; dtype of codec none
    v_cache       [P, PS, HK, BV], free page stride         uint8    in
    k_meta        [P, PS, HK, MK], free page stride         dtype    in; [1] float32 of fp8
    v_meta        [P, PS, HK, MV], free page stride         dtype    in
    block_table   [B, MB]                                   int32    in
    seq_lens      [B]                                       int32    in
    k_window      [S, N, HK, D], with a window of the spec  dtype    in, see ``kernels.attend``
    v_window      [S, N, HK, DV], with it                   dtype    in
    window_slots  [B], with it                              int32    in
    workspace     [W], see ``tq_tvm.splits``                float32  scratch: o, then (m, l)
    out           [B, HQ, DV]                               dtype    out
    num_parts     scalar: splits (CPU), groups (GPU), or    int32    in
                  CTAs of a cluster (GPU)
    sm_scale      scalar                                    float32  in
    ============  ========================================  =======  =====================

Static: format, D, DV, HQ, HK, PS, dtype, layout, window. Dynamic: B, P, MB, lengths, strides,
splits.

Tail
    Tokens past a sequence's end are masked, scales included. An empty sequence gives zeros.

Numerics
    float32 softmax. On a GPU q enters integer products with 16 bits, K's centroids with 8 or, for
    float16 and mse4, 16 bits, and the weights of V with 15: the error is that of rounding the
    output. Of a weight times the norm of its V the 15 bits count from the largest weight times the
    largest norm: a row of V that is hundreds of times longer than others, and has a small weight,
    loses bits (6 % of an output where a row 333 times as long had some 1e-4 of the weights).
    Rows of a spec's window are multiplied in float32.

Cost of one token and KV head (k4v2, D = 128): 102 bytes read; see ``decode_cuda`` for operations.

The structure carries a softmax state from tile to tile, so its decisions are parameters of a
factory: a search samples them on an anchor function (``schedules/decode.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm.tirx import PrimFunc

from tq_tvm.kernels.decode_cluster import decode_cluster
from tq_tvm.kernels.decode_cpu import DecodeCpuConfig, decode_cpu
from tq_tvm.kernels.decode_cuda import decode_cuda
from tq_tvm.kernels.decode_shape import DecodeConfig
from tq_tvm.spec import CacheSpec

__all__ = ["decode"]


def decode(spec: CacheSpec, kind: str, decisions: Mapping[str, int]) -> PrimFunc:
    """The TensorIR of ``decode`` for a target kind and one value of each decision."""
    if kind == "cuda":
        config = DecodeConfig(**decisions)
        return decode_cluster(spec, config) if config.cluster else decode_cuda(spec, config)
    return decode_cpu(spec, DecodeCpuConfig(**decisions))
