"""``flatten``: the dequantised rows of a ragged batch, one sequence after another.

k = n (c3[idx]/sqrt(D) + g sign), v = n c2[idx]/sqrt(D), in the rotated domain; ``rotate_back``
multiplies by H / sqrt(D) once more.
"""

from __future__ import annotations

import torch

from tq_tvm.reference.codec import decode_rows
from tq_tvm.reference.rotate import hadamard_rotate
from tq_tvm.spec import CacheSpec

__all__ = ["flatten_kv_cache", "sequence_rows"]


def sequence_rows(
    spec: CacheSpec,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    pages: torch.Tensor,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated K and V of one sequence, float32 ``[length, HK, D]``."""
    used = pages[: -(-length // spec.page_size)].long()
    fmt = spec.cache_format
    sides = []
    for cache, meta, codec in ((k_cache, k_meta, fmt.key), (v_cache, v_meta, fmt.value)):
        rows = decode_rows(cache[used], meta[used], codec)
        if spec.layout == "bhsd":
            rows = rows.transpose(1, 2)
        sides.append(rows.reshape(-1, spec.num_kv_heads, spec.head_dim)[:length])
    return sides[0], sides[1]


def flatten_kv_cache(
    spec: CacheSpec,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    rotate_back: bool = False,
    out_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float32 K and V ``[N, HK, D]``; rows past the last sequence are zero."""
    lengths = seq_lens.tolist()
    total = sum(lengths) if out_tokens is None else out_tokens
    shape = (total, spec.num_kv_heads, spec.head_dim)
    k = torch.zeros(shape, dtype=torch.float32, device=k_cache.device)
    v = torch.zeros_like(k)
    start = 0
    for b, length in enumerate(lengths):
        rows = sequence_rows(spec, k_cache, v_cache, k_meta, v_meta, block_table[b], length)
        k[start : start + length], v[start : start + length] = rows
        start += length
    if rotate_back:
        k, v = hadamard_rotate(k), hadamard_rotate(v)
    return k, v
