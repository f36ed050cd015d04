"""``decode``: out = (softmax(sm_scale q' k^T) v) H / sqrt(D), q' = q H / sqrt(D)."""

from __future__ import annotations

import torch

from tq_tvm.reference.flatten import sequence_rows
from tq_tvm.reference.rotate import hadamard_rotate
from tq_tvm.spec import CacheSpec

__all__ = ["attention", "paged_decode"]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float | None = None
) -> torch.Tensor:
    """Float32 attention of one token ``[HQ, D]`` over dense K and V ``[L, HK, D]``, L >= 1."""
    heads, dim = q.shape
    scale = dim**-0.5 if sm_scale is None else sm_scale
    grouped = q.float().view(k.shape[1], -1, dim)
    logits = torch.einsum("hgd,lhd->hgl", grouped, k.float()) * scale
    return torch.einsum("hgl,lhd->hgd", logits.softmax(-1), v.float()).reshape(heads, dim)


def paged_decode(
    spec: CacheSpec,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """Float32 ``[B, HQ, D]``; an empty sequence gives zeros."""
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for b, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        k, v = sequence_rows(spec, k_cache, v_cache, k_meta, v_meta, block_table[b], length)
        out[b] = hadamard_rotate(attention(hadamard_rotate(q[b]), k, v, sm_scale))
    return out
