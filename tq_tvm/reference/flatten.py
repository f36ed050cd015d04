"""``flatten``: the dequantised rows of a ragged batch, one sequence after another.

Each row as its codec decodes it, in the rotated domain of the format; ``rotate_back`` undoes the
format's rotation.
"""

from __future__ import annotations

import torch

from tq_tvm.reference.codec import decode_rows
from tq_tvm.reference.rotate import rotate_back as undo_rotation
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
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated K ``[length, HK, D]`` and V ``[length, HK, DV]`` of one sequence, float32."""
    used = pages[: -(-length // spec.page_size)].long()
    fmt = spec.cache_format
    sides = []
    for cache, meta, codec, scale in (
        (k_cache, k_meta, fmt.key, k_scale),
        (v_cache, v_meta, fmt.value, v_scale),
    ):
        rows = decode_rows(cache[used], meta[used], codec, tensor_scale=scale)
        if spec.layout == "bhsd":
            rows = rows.transpose(1, 2)
        sides.append(rows.reshape(-1, spec.num_kv_heads, rows.shape[-1])[:length])
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
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float32 K ``[N, HK, D]`` and V ``[N, HK, DV]``.

    Rows past the last sequence are zero.
    """
    lengths = seq_lens.tolist()
    total = sum(lengths) if out_tokens is None else out_tokens
    k, v = (
        torch.zeros((total, spec.num_kv_heads, dim), dtype=torch.float32, device=k_cache.device)
        for dim in (spec.head_dim, spec.value_dim)
    )
    start = 0
    for b, length in enumerate(lengths):
        rows = sequence_rows(
            spec, k_cache, v_cache, k_meta, v_meta, block_table[b], length,
            k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        k[start : start + length], v[start : start + length] = rows
        start += length
    if rotate_back:
        rotation = spec.cache_format.rotation
        k, v = undo_rotation(k, rotation), undo_rotation(v, rotation)
    return k, v
