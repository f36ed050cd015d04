r"""``mla``: multi-head latent attention, one query a head against latents that all heads share.

With latents c_j of 512 values and rope parts r_j of 64 (DeepSeek-V2, arXiv 2405.04434, section
2.1, the up-projections absorbed into queries and outputs)::

    z(j) = sm_scale (q.c_j + p.r_j),   lse = log(sum_j exp(z(j))),   out = sum_j exp(z(j) - lse) c_j

No tokens: lse = -inf and out = 0.
"""

from __future__ import annotations

import torch

from tq_tvm.reference.attend import attend
from tq_tvm.reference.flatten import sequence_rows
from tq_tvm.reference.rotate import rotate_back
from tq_tvm.spec import CacheSpec

__all__ = ["paged_mla"]


def paged_mla(
    spec: CacheSpec,
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float,
    k_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 ``[B, HQ, 512]`` and lse ``[B, HQ]`` of a latent cache, in the model's domain."""
    out = torch.zeros(q_latent.shape, dtype=torch.float32, device=q_latent.device)
    lse = torch.full(q_latent.shape[:2], -torch.inf, dtype=torch.float32, device=q_latent.device)
    rotation = spec.cache_format.rotation
    for b, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        latent, rope = (
            rotate_back(rows, rotation)
            for rows in sequence_rows(
                spec, k_cache, v_cache, k_meta, v_meta, block_table[b], length, k_scale=k_scale
            )
        )
        q = torch.cat([q_latent[b], q_rope[b]], dim=-1)[None]
        keys = torch.cat([latent, rope], dim=-1)
        (out[b],), (lse[b],) = attend(q, keys, latent, sm_scale)
    return out, lse
