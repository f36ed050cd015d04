"""``fill``: rotate and encode new K and V rows, and write them at their slots.

slot = page * PS + offset; a negative slot is skipped. Token t of sequence b, by ``q_start_loc``, is
at position seq_lens[b] - (q_start_loc[b+1] - q_start_loc[b]) + t - q_start_loc[b] of its sequence.
"""

from __future__ import annotations

import torch

from tq_tvm.reference.codec import encode_rows
from tq_tvm.reference.rotate import rotate_rows
from tq_tvm.spec import CacheSpec

__all__ = ["Window", "fill_kv_cache", "token_slots"]

Window = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""``k_window`` [S, N, HK, D], ``v_window`` [S, N, HK, DV] and ``window_slots`` [B] int32."""


def token_slots(
    block_table: torch.Tensor, seq_lens: torch.Tensor, q_start_loc: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Slot of every new token, int64 ``[q_start_loc[-1]]``."""
    slots = []
    starts = q_start_loc.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        count = starts[b + 1] - starts[b]
        positions = torch.arange(length - count, length, device=block_table.device)
        slots.append(_position_slots(block_table[b], positions, page_size))
    return torch.cat(slots) if slots else torch.empty(0, dtype=torch.long)


def _position_slots(table: torch.Tensor, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    pages = table[positions.clamp(min=0) // page_size].long()
    return torch.where(positions < 0, -1, pages * page_size + positions % page_size)


def _rows_by_slot(cache: torch.Tensor, spec: CacheSpec) -> torch.Tensor:
    """A cache tensor as ``[P, PS, HK, ...]``, sharing memory."""
    return cache if spec.layout == "bshd" else cache.transpose(1, 2)


def fill_kv_cache(
    spec: CacheSpec,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    *,
    slot_mapping: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    q_start_loc: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window: Window | None = None,
) -> None:
    """Write rows ``[T, HK, D]`` in place, by slots or by block table."""
    if slot_mapping is None:
        assert block_table is not None and seq_lens is not None and q_start_loc is not None
        slot_mapping = token_slots(block_table, seq_lens, q_start_loc, spec.page_size)
        if window is not None:
            _fill_window(spec, k, v, window, seq_lens, q_start_loc)
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    pages, offsets = slots // spec.page_size, slots % spec.page_size
    fmt = spec.cache_format
    for rows, codec, cache, meta, scale in (
        (k, fmt.key, k_cache, k_meta, k_scale),
        (v, fmt.value, v_cache, v_meta, v_scale),
    ):
        rotated = rotate_rows(rows[: len(kept)][kept], fmt.rotation)
        packed, scales = encode_rows(
            rotated, codec, fmt.scale_rule, tensor_scale=scale, dtype=cache.dtype
        )
        _rows_by_slot(cache, spec)[pages, offsets] = packed
        _rows_by_slot(meta, spec)[pages, offsets] = scales.to(meta.dtype)


def _fill_window(
    spec: CacheSpec,
    k: torch.Tensor,
    v: torch.Tensor,
    window: Window,
    seq_lens: torch.Tensor,
    q_start_loc: torch.Tensor,
) -> None:
    k_window, v_window, window_slots = window
    starts, size = q_start_loc.tolist(), spec.window
    for b, length in enumerate(seq_lens.tolist()):
        first = max(length - (starts[b + 1] - starts[b]), length - size, 0)
        at = torch.arange(first, length, device=k.device) % size
        for rows, ring in ((k, k_window), (v, v_window)):
            new = rows[starts[b + 1] - (length - first) : starts[b + 1]]
            rotated = rotate_rows(new, spec.cache_format.rotation)
            ring[window_slots[b].long(), at] = rotated.to(ring.dtype)
