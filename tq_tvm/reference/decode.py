"""``decode``: out = R^-1 (softmax(sm_scale q' k^T) v), q' = R q, R the format's rotation.

With a window the newest rows of k and v are those of the sequence's ring, see ``fill``.
"""

from __future__ import annotations

import torch

from tq_tvm.reference.fill import Window
from tq_tvm.reference.flatten import sequence_rows
from tq_tvm.reference.rotate import rotate_back, rotate_rows
from tq_tvm.spec import CacheSpec

__all__ = ["attention", "paged_decode"]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float | None = None
) -> torch.Tensor:
    """Float32 ``[HQ, DV]``: one query ``[HQ, D]``, K ``[L, HK, D]``, V ``[L, HK, DV]``, L >= 1."""
    heads, dim = q.shape
    scale = dim**-0.5 if sm_scale is None else sm_scale
    grouped = q.float().view(k.shape[1], -1, dim)
    logits = torch.einsum("hgd,lhd->hgl", grouped, k.float()) * scale
    return torch.einsum("hgl,lhd->hgd", logits.softmax(-1), v.float()).reshape(heads, v.shape[-1])


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
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window: Window | None = None,
) -> torch.Tensor:
    """Float32 ``[B, HQ, DV]``; an empty sequence gives zeros."""
    out = torch.zeros((*q.shape[:2], spec.value_dim), dtype=torch.float32, device=q.device)
    rotation = spec.cache_format.rotation
    for b, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        k, v = sequence_rows(
            spec, k_cache, v_cache, k_meta, v_meta, block_table[b], length,
            k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        if window is not None:
            k_window, v_window, window_slots = window
            newest = torch.arange(max(length - spec.window, 0), length, device=q.device)
            ring = int(window_slots[b])
            k[newest] = k_window[ring, newest % spec.window].float()
            v[newest] = v_window[ring, newest % spec.window].float()
        out[b] = rotate_back(attention(rotate_rows(q[b], rotation), k, v, sm_scale), rotation)
    return out
