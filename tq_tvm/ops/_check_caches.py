"""Checks of cache tensors and windows, and the spec that they are of.

None of them waits for the GPU. What ``suspect_*`` lets pass is right.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tq_tvm.ops._check import (
    CACHE_NAMES,
    canonical,
    check_alignment,
    check_compact,
    check_dtype,
    check_index,
    check_layout,
    check_shape,
    dtype_name,
    fail,
    format_of,
    make_spec,
    suspect_rows,
)
from tq_tvm.served import check_target
from tq_tvm.spec import HEAD_DIMS, CacheSpec, Codec

__all__ = [
    "cache_spec",
    "check_caches",
    "check_scales",
    "check_window",
    "kernel_caches",
    "suspect_caches",
    "suspect_window",
]

_PAGE_STRIDES = 1 << 31
"""Strides of pages, in elements, are below this: kernels may keep them in 31 bits."""


def cache_spec(
    op: str,
    function: str,
    k_cache: torch.Tensor,
    dims: tuple[int, int],
    num_q_heads: int | None,
    dtype: torch.dtype,
    layout: str,
    policy: str,
    k_window: torch.Tensor | None = None,
) -> CacheSpec:
    """Derive the spec from the key cache and the model's rows, and refuse one without kernels.

    Parameters
    ----------
    function
        The function of a library that is going to be called.
    dims
        D and DV; a DV that no row can have stands for D.
    num_q_heads
        None stands for the number of KV heads, where queries do not matter.
    k_window
        Its second axis is the window.
    """
    check_layout(op, layout)
    fmt = format_of(op, policy)
    if k_cache.ndim != 4:
        axes = "P, PS, HK" if layout == "bshd" else "P, HK, PS"
        symbols = f"[{axes}, {_columns(fmt.key)}]"
        check_shape(op, "k_cache", k_cache, symbols, (None,) * 4)
    if k_window is not None and (k_window.ndim != 4 or k_window.shape[1] == 0):
        check_shape(op, "k_window", k_window, "[S, N, HK, D], N from 1", (None,) * 4)
        fail(op, "k_window", "of shape [S, N, HK, D], N from 1", list(k_window.shape), "enlarge it")
    page_size, heads = k_cache.shape[1:3] if layout == "bshd" else k_cache.shape[1:3][::-1]
    head_dim, head_dim_v = dims
    spec = make_spec(
        op,
        CacheSpec,
        head_dim=head_dim,
        num_q_heads=heads if num_q_heads is None else num_q_heads,
        num_kv_heads=heads,
        page_size=page_size,
        dtype=dtype_name(dtype),
        layout=layout,
        format=fmt.name,
        head_dim_v=head_dim_v if head_dim_v in HEAD_DIMS else None,
        window=0 if k_window is None else k_window.shape[1],
    )
    if k_cache.is_cuda:
        check_target(op, spec, "cuda", function)
    return spec


def _columns(codec: Codec, dim: str = "D") -> str:
    """The last axis of a cache tensor in symbols."""
    names = {2: f"{dim}/4", 3: f"3{dim}/8", 4: f"{dim}/2"}
    return names.get(codec.bits, dim) if codec.packed else dim


def check_caches(
    op: str, spec: CacheSpec, caches: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Check the four cache tensors; return them with `canonical` strides."""
    caches = tuple(caches)
    inner = "PS, HK" if spec.layout == "bshd" else "HK, PS"
    shapes = spec.tensor_shapes(caches[0].shape[0])
    fmt = spec.cache_format
    dim = "D" if spec.head_dim_v is None else "DV"
    symbols = (
        _columns(fmt.key), _columns(fmt.value, dim), len(fmt.key.meta), len(fmt.value.meta)
    )  # fmt: skip
    for name, last, tensor in zip(CACHE_NAMES, symbols, caches, strict=True):
        shape, dtype = shapes[name]
        check_dtype(op, name, tensor, getattr(torch, dtype))
        check_shape(op, name, tensor, f"[P, {inner}, {last}]", shape)
        check_compact(op, name, tensor, first=1)
        # Codes are read 16 bytes at a time, the scales of a row as words.
        aligned = 16 if name.endswith("cache") else max(4, shape[-1] * tensor.element_size())
        check_alignment(op, name, tensor, aligned, free_axes=1)
        if tensor.shape[0] > 1 and tensor.stride(0) >= _PAGE_STRIDES:
            fail(
                op,
                name,
                f"of a page stride below {_PAGE_STRIDES} elements",
                tensor.stride(0),
                "put the pages closer together",
            )
    return tuple(canonical(tensor, first=1) for tensor in caches)


def kernel_caches(
    caches: tuple[torch.Tensor, ...], scales: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, ...]:
    """The four cache arguments of a kernel: a tensor's scale takes the place of its metas."""
    k_cache, v_cache, k_meta, v_meta = caches
    k_scale, v_scale = scales
    return (
        k_cache,
        v_cache,
        k_meta if k_scale is None else k_scale,
        v_meta if v_scale is None else v_scale,
    )


def check_scales(op: str, scales: dict[str, torch.Tensor]) -> None:
    """Check the scales of whole tensors."""
    for name, scale in scales.items():
        check_index(op, name, scale, "[1]", (1,), torch.float32)


def check_window(
    op: str, spec: CacheSpec, window: dict[str, torch.Tensor], batch: int
) -> tuple[torch.Tensor, ...]:
    """Check the tensors of a window; return them as a kernel takes them."""
    if not window:
        return ()
    rings = window["k_window"].shape[0]
    for name, dim, symbol in (
        ("k_window", spec.head_dim, "D"),
        ("v_window", spec.value_dim, "D" if spec.head_dim_v is None else "DV"),
    ):
        tensor = window[name]
        check_dtype(op, name, tensor, getattr(torch, spec.dtype))
        shape = (rings, spec.window, spec.num_kv_heads, dim)
        check_shape(op, name, tensor, f"[S, N, HK, {symbol}]", shape)
        check_compact(op, name, tensor)
        check_alignment(op, name, tensor, 16)
    slots = window["window_slots"]
    check_index(op, "window_slots", slots, "[B]", (batch,), torch.int32)
    return window["k_window"], window["v_window"], slots


def suspect_caches(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_meta: torch.Tensor, v_meta: torch.Tensor
) -> bool:
    """Whether `check_device` or `check_caches` may refuse what a kernel of a GPU would not.

    Scales have 2 bytes there; the kernel compares dtypes itself.
    """
    try:
        # All strides are read in half the time that one by its axis takes.
        codes = k_cache.stride()[0] | v_cache.stride()[0]
        scales = k_meta.stride()[0] | v_meta.stride()[0]
        return (
            (k_cache.data_ptr() | v_cache.data_ptr() | codes) & 15 != 0
            or (k_meta.data_ptr() | v_meta.data_ptr() | 2 * scales) & 3 != 0
            or codes | scales >= _PAGE_STRIDES
            or k_meta.is_neg()
            or v_meta.is_neg()
        )
    except (IndexError, RuntimeError):  # a scalar, a tensor without memory
        return True


def suspect_window(window: dict[str, torch.Tensor]) -> bool:
    """Whether `check_window` may refuse what a kernel of a GPU would not; nothing is no window."""
    return bool(window) and suspect_rows(window["k_window"], window["v_window"], compact=True)
