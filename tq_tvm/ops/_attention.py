"""Checks of what `paged_decode` takes in all its forms."""

from __future__ import annotations

import torch

from tq_tvm.ops import _check, _check_caches
from tq_tvm.spec import CacheSpec

__all__ = ["NAMES", "check_attention"]

NAMES = ("q", *_check.CACHE_NAMES, "block_table", "seq_lens")


def check_attention(
    op: str,
    function: str,
    tensors: tuple[torch.Tensor, ...],
    layout: str,
    policy: str,
    scales: _check.Scales,
    window: dict[str, torch.Tensor],
    others: dict[str, torch.Tensor] | None = None,
    *,
    ragged: bool = False,
) -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
    """Check shapes, dtypes, strides, addresses and devices of a call.

    Parameters
    ----------
    function
        The function of a library that is going to be called.
    tensors
        Those of `NAMES`, and ``out``.
    others
        More tensors, which have to be on the same device.
    ragged
        Sequences may have other numbers of queries than one.

    Returns
    -------
    The spec, and the kernel's inputs: queries, caches, table, lengths and the three of a window.
    """
    q, k_cache, v_cache, k_meta, v_meta, table, lens, out = tensors
    scaled = _check.given(_check.SCALE_NAMES, scales)
    named = dict(zip((*NAMES, "out"), tensors, strict=True)) | scaled | window | (others or {})
    _check.check_device(op, named)
    _check.check_model_dtype(op, "q", q)
    first = "T" if ragged else "B"
    if q.ndim != 3:
        _check.check_shape(op, "q", q, f"[{first}, HQ, D]", (None,) * 3)
    queries, num_q_heads, head_dim = q.shape
    dims = (head_dim, out.shape[-1] if out.ndim else head_dim)
    spec = _check_caches.cache_spec(
        op, function, k_cache, dims, num_q_heads, q.dtype, layout, policy, window.get("k_window")
    )
    _check_caches.check_scales(op, scaled)
    caches = _check_caches.check_caches(op, spec, (k_cache, v_cache, k_meta, v_meta))
    _check.check_dtype(op, "out", out, q.dtype)
    value_symbol = "D" if spec.head_dim_v is None else "DV"
    for name, tensor, symbol, dim in (
        ("q", q, "D", head_dim),
        ("out", out, value_symbol, spec.value_dim),
    ):
        shape = (queries, num_q_heads, dim)
        _check.check_shape(op, name, tensor, f"[{first}, HQ, {symbol}]", shape)
        _check.check_compact(op, name, tensor)
        _check.check_alignment(op, name, tensor, 16)
    _check.check_apart(op, {"q": q, "out": out})
    _check.check_table_arguments(op, table, lens, None if ragged else queries)
    rings = _check_caches.check_window(op, spec, window, table.shape[0])
    return spec, (q, *_check_caches.kernel_caches(caches, scales), table, lens, *rings)
