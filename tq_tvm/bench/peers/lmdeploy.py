"""lmdeploy: its Triton decode of the same format, policy 42, on the very tensors of our cache."""

from __future__ import annotations

import torch

from tq_tvm import reference
from tq_tvm.bench.baseline import Peer
from tq_tvm.bench.peers.inputs import DecodeInputs

__all__ = ["k4v2"]

_TOLERANCE = 0.05


def k4v2(inputs: DecodeInputs) -> Peer:
    """Attention over the packed cache.

    lmdeploy's fill and flatten scale K's centroids by 1/sqrt(D), as the format does, its decode
    by 1/sqrt(2 D). Both results count as right: the time is the same.
    """
    import lmdeploy
    import triton
    from lmdeploy.messages import QuantPolicy
    from lmdeploy.pytorch.kernels.cuda.pagedattention import flash_attn_with_kvcache

    spec, cache = inputs.spec, inputs.cache
    no_residual = cache.k_meta.clone()
    no_residual[..., 1] = 0

    def rows(sequence: int, k_meta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.sequence_rows(
            spec,
            cache.k_cache,
            cache.v_cache,
            k_meta,
            cache.v_meta,
            inputs.block_table[sequence],
            inputs.lengths[sequence],
        )

    def smaller_centroids(sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = rows(sequence, cache.k_meta)
        return k - (1 - 0.5**0.5) * rows(sequence, no_residual)[0], v

    def call() -> torch.Tensor:
        return flash_attn_with_kvcache(
            inputs.q,
            cache.k_cache,
            cache.v_cache,
            inputs.seq_lens,
            inputs.block_table,
            k_scales_zeros=cache.k_meta,
            v_scales_zeros=cache.v_meta,
            quant_policy=QuantPolicy.TURBO_QUANT,
            kv_layout=spec.layout,
        )

    return Peer(
        call=call,
        bytes=inputs.traffic(spec.bytes_per_token_head),
        versions={"lmdeploy": lmdeploy.__version__, "triton": triton.__version__},
        rows=inputs.sample,
        wanted=[
            inputs.attention(lambda sequence: rows(sequence, cache.k_meta), rotated=True),
            inputs.attention(smaller_centroids, rotated=True),
        ],
        tolerance=_TOLERANCE,
    )
