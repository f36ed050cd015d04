"""``decode``: out = R^-1 (softmax(sm_scale q' k^T) v), q' = R q, R the format's rotation.

``attend`` of one query token a sequence, without more.
"""

from __future__ import annotations

import torch

from tq_tvm.reference.attend import attend, paged_attend
from tq_tvm.reference.fill import Window
from tq_tvm.spec import CacheSpec

__all__ = ["attention", "paged_decode"]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float | None = None
) -> torch.Tensor:
    """Float32 ``[HQ, DV]``: one query ``[HQ, D]``, K ``[L, HK, D]``, V ``[L, HK, DV]``, L >= 1."""
    return attend(q[None], k, v, sm_scale)[0][0]


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
    out, _ = paged_attend(
        spec, q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens,
        sm_scale=sm_scale, k_scale=k_scale, v_scale=v_scale, window=window,
    )  # fmt: skip
    return out
