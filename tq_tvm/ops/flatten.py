"""``flatten``: the torch call `flatten_kv_cache`."""

from __future__ import annotations

from typing import Any

import torch

from tq_tvm.artifacts import LoadedFunction, load
from tq_tvm.ops import _check, _check_caches, _values
from tq_tvm.ops._library import REFUSALS, call_again, destination_op
from tq_tvm.spec import CacheFormat, CacheSpec, QuantPolicy

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
    policy: int | str | CacheFormat = QuantPolicy.TURBO_QUANT,
    k_scale: Any = None,
    v_scale: Any = None,
    out: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    """Gather the pages of a ragged batch and dequantise them into dense K and V.

    Parameters
    ----------
    k_cache, v_cache
        ``[P, PS, HK, BK]`` and ``[P, PS, HK, BV]``: bytes of codes, uint8, or the
        model's dtype where a codec is ``none``; D/2 and D/4 bytes in ``k4v2``. The page stride is
        free, below 2**31 elements.
    k_meta, v_meta
        ``[P, PS, HK, MK]`` and ``[P, PS, HK, MV]``, float16 or bfloat16 (on the CPU also float32),
        which is the dtype of the result. The page stride is free,
        below 2**31 elements.
    block_table
        ``[B, MB]`` int32: pages of each sequence; entries past its last one may be anything.
    seq_lens
        ``[B]`` int32.
    out_tokens
        N, rows of the result: sum(seq_lens), or an upper bound of it that the host knows. Rows past
        the last sequence are zero.
    start_loc
        ``[B]`` int32: first row of each sequence, the exclusive cumulative sums of ``seq_lens``.
        None computes them on the device, in two more launches.
    rotate_back
        Undo the format's rotation. Otherwise rows stay in the rotated domain, which serves
        attention with rotated queries.
    layout
        ``"bshd"``, or ``"bhsd"`` for pages ``[HK, PS, ...]``.
    policy
        Cache format: its number, a preset's name, a slug or a `CacheFormat`.
    k_scale, v_scale
        Scale of all keys, of all values, in ``fp8``: a number (None is 1), or a float32 tensor
        ``[1]`` on the device, which saves a launch. None in other formats.
    out
        K and V to write into, ``[N, HK, D]`` and ``[N, HK, DV]``; the token stride is free.
        They must not overlap.

    Returns
    -------
    ``out``, or two new tensors ``[N, HK, D]`` and ``[N, HK, DV]``.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape, stride, alignment (16 bytes; 4 for metas) or device.
    UnsupportedSpecError
        No kernel is generated for this format and these shapes, or not for this device.
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
    scales = (
        _check.as_scale(_OP, "k_scale", k_scale, k_cache.device),
        _check.as_scale(_OP, "v_scale", v_scale, k_cache.device),
    )
    codecs = _check.codecs_of(_OP, policy)
    if out is None:
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if cache.ndim != 4:
                _check.check_shape(_OP, name, cache, "[P, PS, HK, elements of a row]", (None,) * 4)
        heads = k_cache.shape[1 if layout == "bhsd" else 2]
        k_out, v_out = (
            k_meta.new_empty((out_tokens, heads, codec.head_dim_of(cache.shape[3])))
            for codec, cache in zip(codecs, (k_cache, v_cache), strict=True)
        )
    else:
        out = _pair(out)
        k_out, v_out = _check.as_tensors(_OP, ("out[0]", "out[1]"), out)
        if k_out.ndim and k_out.shape[0] != out_tokens:
            _check.fail(
                _OP, "out[0]", f"of out_tokens = {out_tokens} rows", k_out.shape[0], "slice it"
            )
    _flatten(
        k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, start_loc, k_out, v_out,
        bool(rotate_back), layout, policy, *scales,
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
    policy: str,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    caches = (k_cache, v_cache, k_meta, v_meta)
    scales = _check.tensor_scales(_OP, policy, (k_scale, v_scale), k_cache.device)
    others = (block_table, seq_lens, start_loc, k_out, v_out)
    arguments = (*caches, *others)
    tensors: tuple[torch.Tensor, ...] = (*_check_caches.kernel_caches(caches, scales), *others)
    shapes = (k_cache.shape, v_out.shape[2:])
    key = (rotate_back, shapes, k_meta.dtype, k_meta.device, layout, policy)
    loaded = _loaded.get(key)
    if (
        loaded is None
        or not k_cache.is_cuda
        or _check.suspect_rows(k_out, v_out, apart=True)
        or _check_caches.suspect_caches(k_cache, v_cache, k_meta, v_meta)
    ):
        spec, tensors = _check_arguments(arguments, layout, policy, scales)
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
    variant = loaded.nearest(size)
    try:
        variant.call(*tensors)
    except REFUSALS:
        call_again(loaded, variant, _check_arguments(arguments, layout, policy, scales)[1])


def _check_arguments(
    tensors: tuple[torch.Tensor, ...],
    layout: str,
    policy: str,
    scales: _check.Scales,
) -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
    """Check everything; return the spec and the kernel's tensors."""
    k_cache, v_cache, k_meta, v_meta, table, lens, starts, k_out, v_out = tensors
    outputs = {"out[0]": k_out, "out[1]": v_out}
    scaled = _check.given(_check.SCALE_NAMES, scales)
    named = dict(zip((*_NAMES, "start_loc"), tensors, strict=False)) | outputs | scaled
    device = _check.check_device(_OP, named)
    _check.check_model_dtype(_OP, "k_meta", k_meta)
    fmt = _check.format_of(_OP, policy)
    head_dim = fmt.key.head_dim_of(k_cache.shape[-1]) if k_cache.ndim else 0
    dims = (head_dim, v_out.shape[-1] if v_out.ndim else head_dim)
    spec = _check_caches.cache_spec(
        _OP, "flatten", k_cache, dims, None, k_meta.dtype, layout, policy
    )
    _check_caches.check_scales(_OP, scaled)
    caches = _check_caches.check_caches(_OP, spec, (k_cache, v_cache, k_meta, v_meta))
    _check.check_table_arguments(_OP, table, lens)
    _check.check_index(_OP, "start_loc", starts, "[B]", (table.shape[0],), torch.int32)
    rows = k_out.shape[0] if k_out.ndim else 0
    for (name, tensor), dim in zip(outputs.items(), (spec.head_dim, spec.value_dim), strict=True):
        _check.check_dtype(_OP, name, tensor, k_meta.dtype)
        shape = (rows, spec.num_kv_heads, dim)
        symbol = "DV" if name == "out[1]" and spec.head_dim_v is not None else "D"
        _check.check_shape(_OP, name, tensor, f"[N, HK, {symbol}]", shape)
        _check.check_compact(_OP, name, tensor, first=1)
        _check.check_alignment(_OP, name, tensor, 16, free_axes=1)
    _check.check_apart(_OP, outputs)
    if device.type == "cpu" and table.shape[0]:
        _values.check_lengths(_OP, lens, table.shape[1] * spec.page_size)
        first = torch.zeros_like(lens)
        _values.check_table(_OP, table, first, lens, spec.page_size, k_cache.shape[0])
        _values.check_starts(_OP, starts, lens, rows)
    rows_out = (_check.canonical(tensor, first=1) for tensor in (k_out, v_out))
    return spec, (*_check_caches.kernel_caches(caches, scales), table, lens, starts, *rows_out)
