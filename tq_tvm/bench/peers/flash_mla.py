"""FlashMLA: latent attention over dense pages, in the model's dtype."""

from __future__ import annotations

import torch

from tq_tvm.bench.baseline import Peer
from tq_tvm.bench.peers.inputs import LatentInputs

__all__ = ["dense"]

_TOLERANCE = 0.05


def dense(inputs: LatentInputs) -> Peer:
    """Latents and rope parts in pages of the queries' dtype."""
    import flash_mla

    q, pages, latent_dim = inputs.q, inputs.pages, inputs.latent_dim
    # What a server works out once a step, for all layers.
    metadata, splits = flash_mla.get_mla_metadata(inputs.seq_lens, q.shape[1], 1)

    def call() -> torch.Tensor:
        out, _ = flash_mla.flash_mla_with_kvcache(
            q[:, None], pages, inputs.block_table, inputs.seq_lens, latent_dim, metadata, splits,
            softmax_scale=inputs.sm_scale,
        )  # fmt: skip
        return out[:, 0]

    return Peer(
        call=call,
        bytes=inputs.traffic,
        versions={"flash_mla": flash_mla.__version__},
        rows=inputs.sample,
        wanted=[inputs.attention()],
        tolerance=_TOLERANCE,
    )
