"""``flatten``: the torch call `flatten_kv_cache`."""

from __future__ import annotations

from typing import Any

import torch

from tq_tvm.artifacts import LoadedFunction, load
from tq_tvm.ops import _check, _values
from tq_tvm.ops._library import call_kernel, destination_op
from tq_tvm.spec import CacheSpec, QuantPolicy

__all__ = ["flatten_kv_cache"]

_OP = "flatten_kv_cache"
_NAMES = (*_check.CACHE_NAMES, "block_table", "seq_lens")
_loaded: dict[tuple, LoadedFunction] = {}


def flatten_kv_cache(
    k_cache: Any,
    v_cache: Any,
    k_meta: Any,
    v_meta: Any,
    block_table: Any,
    seq_lens: Any,
    *,
    out_tokens: int,
    start_loc: Any = None,
    rotate_back: bool = False,
    layout: str = "bshd",
    policy: int | str = QuantPolicy.TURBO_QUANT,
    out: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    """Gather the pages of a ragged batch and dequantise them into dense K and V.

    Parameters
    ----------
    k_cache, v_cache
        ``[P, PS, HK, D/2]`` and ``[P, PS, HK, D/4]``, uint8. The page stride is free,
        below 2**31 elements.
    k_meta, v_meta
        ``[P, PS, HK, 2]`` and ``[P, PS, HK, 1]``, float16 or bfloat16 (on the CPU also float32),
        which is the dtype of the result. The page stride is free,
        below 2**31 elements.
    block_table
        ``[B, MB]`` int32: pages of each sequence.
    seq_lens
        ``[B]`` int32.
    out_tokens
        N, rows of the result: sum(seq_lens), or an upper bound of it that the host knows. Rows past
        the last sequence are zero.
    start_loc
        ``[B]`` int32: first row of each sequence, the exclusive cumulative sums of ``seq_lens``.
        None computes them on the device, in two more launches.
    rotate_back
        Rotate the rows back. Otherwise they stay in the rotated domain, which serves attention
        with rotated queries.
    layout
        ``"bshd"``, or ``"bhsd"`` for pages ``[HK, PS, ...]``.
    policy
        Cache format, by its number or its name.
    out
        K and V to write into, each ``[N, HK, D]``; the token stride is free. They must not overlap.

    Returns
    -------
    ``out``, or two new tensors ``[N, HK, D]``.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape, stride, alignment (16 bytes; 4 for metas) or device.
    UnsupportedSpecError
        No kernel is generated for these shapes.
    ArtifactNotFoundError, ArtifactCorruptError
        No library serves the call.

    Notes
    -----
    One launch on torch's current stream; it can be captured in a CUDA graph after one call outside
    of it. Tensors may be any objects with ``__dlpack__``.

    Page numbers and lengths have to be inside the cache and ``out_tokens``. On the CPU they are
    checked; on a GPU they cannot be without waiting for it, and a wrong page reads out of bounds.
    """
    _check.check_layout(_OP, layout)
    policy = _check.as_policy(_OP, policy)
    out_tokens = _check.as_integer(_OP, "out_tokens", out_tokens)
    k_cache, v_cache, k_meta, v_meta, block_table, seq_lens = _check.as_tensors(
        _OP, _NAMES, (k_cache, v_cache, k_meta, v_meta, block_table, seq_lens)
    )
    if start_loc is None:
        _check.check_strided(_OP, "seq_lens", seq_lens)
        start_loc = torch.cumsum(seq_lens, 0, dtype=torch.int32) - seq_lens
    start_loc = _check.as_tensor(_OP, "start_loc", start_loc)
    if out is None:
        if k_cache.ndim != 4:
            _check.check_shape(_OP, "k_cache", k_cache, "[P, PS, HK, D/2]", (None,) * 4)
        heads, head_dim = k_cache.shape[1 if layout == "bhsd" else 2], k_cache.shape[3] * 2
        k_out, v_out = (k_meta.new_empty((out_tokens, heads, head_dim)) for _ in "kv")
    else:
        out = _pair(out)
        k_out, v_out = _check.as_tensors(_OP, ("out[0]", "out[1]"), out)
        if k_out.ndim and k_out.shape[0] != out_tokens:
            _check.fail(
                _OP, "out[0]", f"of out_tokens = {out_tokens} rows", k_out.shape[0], "slice it"
            )
    _flatten(
        k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, start_loc, k_out, v_out,
        bool(rotate_back), layout, policy,
    )  # fmt: skip
    return (k_out, v_out) if out is None else out


def _pair(out: Any) -> tuple[Any, Any]:
    try:
        k_out, v_out = out
    except (TypeError, ValueError):
        actual = f"{len(out)} of them" if hasattr(out, "__len__") else type(out).__name__
        _check.fail(_OP, "out", "a pair of tensors", actual, "pass K and V to write into")
    return k_out, v_out


@destination_op("flatten", mutates=["k_out", "v_out"])
def _flatten(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    start_loc: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    rotate_back: bool,
    layout: str,
    policy: int,
) -> None:
    tensors: tuple[torch.Tensor, ...] = (
        k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, start_loc, k_out, v_out,
    )  # fmt: skip
    arguments = tensors
    key = (rotate_back, k_cache.shape, k_meta.dtype, k_meta.device, layout, policy)
    loaded = _loaded.get(key)
    if (
        loaded is None
        or not k_cache.is_cuda
        or _check.suspect_rows(k_out, v_out, apart=True)
        or _check.suspect_caches(k_cache, v_cache, k_meta, v_meta)
    ):
        spec, tensors = _check_arguments(arguments, layout, policy)
        if loaded is None:
            function = "flatten_unrotated" if rotate_back else "flatten"
            loaded = _loaded[key] = load(function, spec, k_cache.device)
    size = k_out.numel()
    if size == 0:
        return
    if block_table.numel() == 0 or k_cache.numel() == 0:
        k_out.zero_()
        v_out.zero_()
        return
    call_kernel(
        loaded,
        loaded.nearest(size),
        tensors,
        (),
        lambda: _check_arguments(arguments, layout, policy)[1],
    )


def _check_arguments(
    tensors: tuple[torch.Tensor, ...], layout: str, policy: int
) -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
    """Check everything; return the spec and the kernel's tensors."""
    k_cache, v_cache, k_meta, v_meta, table, lens, starts, k_out, v_out = tensors
    outputs = {"out[0]": k_out, "out[1]": v_out}
    named = dict(zip((*_NAMES, "start_loc"), tensors, strict=False)) | outputs
    device = _check.check_device(_OP, named)
    _check.check_model_dtype(_OP, "k_meta", k_meta)
    head_dim = 2 * k_cache.shape[-1] if k_cache.ndim else 0
    spec = _check.cache_spec(_OP, k_cache, head_dim, None, k_meta.dtype, layout, policy)
    caches = _check.check_caches(_OP, spec, (k_cache, v_cache, k_meta, v_meta))
    _check.check_table_arguments(_OP, table, lens)
    _check.check_index(_OP, "start_loc", starts, "[B]", (table.shape[0],), torch.int32)
    rows = k_out.shape[0] if k_out.ndim else 0
    for name, tensor in outputs.items():
        _check.check_dtype(_OP, name, tensor, k_meta.dtype)
        shape = (rows, spec.num_kv_heads, spec.head_dim)
        _check.check_shape(_OP, name, tensor, "[N, HK, D]", shape)
        _check.check_compact(_OP, name, tensor, first=1)
        _check.check_alignment(_OP, name, tensor, 16, free_axes=1)
    _check.check_apart(_OP, outputs)
    if device.type == "cpu" and table.shape[0]:
        _values.check_lengths(_OP, lens, table.shape[1] * spec.page_size)
        first = torch.zeros_like(lens)
        _values.check_table(_OP, table, first, lens, spec.page_size, k_cache.shape[0])
        _values.check_starts(_OP, starts, lens, rows)
    rows_out = (_check.canonical(tensor, first=1) for tensor in (k_out, v_out))
    return spec, (*caches, table, lens, starts, *rows_out)
