r"""``attend``: attention of several query tokens a sequence, with what engines ask of it.

The N query tokens are the newest of a sequence's L; token i is at position p = L - N + i. With
z(j) = sm_scale q.k_j, position j has the logit ::

    z'(j) = c tanh(z(j) / c) + a_h (j - p)      c: soft cap, a_h: ALiBi slope of query head h

without the cap where c is 0, and is seen where j <= p and, with a window w >= 0 to the left, where
j >= p - w or j < kept. A sink s_h is one more logit, whose value is zero::

    lse = log(exp(s_h) + sum_j exp(z'(j))),   out = sum_j exp(z'(j) - lse) v_j

Nothing to attend to and no sink: lse = -inf and out = 0.
"""

from __future__ import annotations

import torch

from tq_tvm.reference.fill import Window
from tq_tvm.reference.flatten import sequence_rows
from tq_tvm.reference.rotate import rotate_back, rotate_rows
from tq_tvm.spec import CacheSpec

__all__ = ["attend", "merge_attention_states", "paged_attend"]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float | None = None,
    *,
    window_left: int = -1,
    kept_tokens: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 ``[N, HQ, DV]`` and lse ``[N, HQ]`` of q ``[N, HQ, D]``, K ``[L, HK, D]``, V alike.

    ``sinks`` and ``alibi_slopes`` are ``[HQ]``. A ``window_left`` of -1 is no window.
    """
    tokens, heads, dim = q.shape
    length, kv_heads = k.shape[:2]
    scale = dim**-0.5 if sm_scale is None else sm_scale
    position = torch.arange(length - tokens, length, device=q.device)[:, None]
    j = torch.arange(length, device=q.device)
    seen = j <= position
    if window_left >= 0:
        seen &= (j >= position - window_left) | (j < kept_tokens)
    # What nobody sees may be anything.
    used = seen.any(0)[:, None, None]
    k, v = (torch.where(used, rows.float(), 0) for rows in (k, v))
    grouped = q.float().view(tokens, kv_heads, heads // kv_heads, dim)
    logits = torch.einsum("nhgd,lhd->nhgl", grouped, k).reshape(tokens, heads, length) * scale
    if soft_cap > 0:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if alibi_slopes is not None:
        logits = logits + alibi_slopes.float()[:, None] * (j - position)[:, None]
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().expand_as(lse))
    weights = torch.where((lse == -torch.inf)[..., None], 0, (logits - lse[..., None]).exp())
    weights = weights.view(tokens, kv_heads, heads // kv_heads, length)
    return torch.einsum("nhgl,lhd->nhgd", weights, v).reshape(tokens, heads, v.shape[-1]), lse


def paged_attend(
    spec: CacheSpec,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    sm_scale: float | None = None,
    window_left: int = -1,
    kept_tokens: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window: Window | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 ``[T, HQ, DV]`` and lse ``[T, HQ]``, in the model's domain.

    Sequence b has the query tokens ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``, one where that
    is None. Rows of no sequence are 0 and -inf. With ``window``, the rows of a sequence's newest
    tokens are those of its ring, see ``fill``.
    """
    batch = len(seq_lens)
    starts = list(range(batch + 1)) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    out = torch.zeros((*q.shape[:2], spec.value_dim), dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    rotation = spec.cache_format.rotation
    for b, length in enumerate(seq_lens.tolist()):
        new = slice(starts[b], starts[b + 1])
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
        rotated, lse[new] = attend(
            rotate_rows(q[new], rotation), k, v, sm_scale, window_left=window_left,
            kept_tokens=kept_tokens, soft_cap=soft_cap, sinks=sinks, alibi_slopes=alibi_slopes,
        )  # fmt: skip
        out[new] = rotate_back(rotated, rotation)
    if sinks is not None:
        # An empty sequence has its sinks alone.
        for b in (seq_lens == 0).nonzero()[:, 0].tolist():
            lse[starts[b] : starts[b + 1]] = sinks.float()
    return out, lse


def merge_attention_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of tokens from that over each: float32 ``[..., D]`` and ``[...]``."""
    lse = torch.logaddexp(lse_a.float(), lse_b.float())
    out = torch.zeros(out_a.shape, dtype=torch.float32, device=out_a.device)
    for part, own in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.where(lse == -torch.inf, 0, (own.float() - lse).exp())
        out += weight[..., None] * part.float()
    return out, lse
