"""``fill``: the torch call `fill_kv_cache`."""

from __future__ import annotations

from typing import Any

import torch

from tq_tvm.artifacts import LoadedFunction, load
from tq_tvm.ops import _check, _check_caches, _values
from tq_tvm.ops._library import REFUSALS, call_again, destination_op
from tq_tvm.spec import CacheFormat, CacheSpec, QuantPolicy

__all__ = ["fill_kv_cache"]

_OP = "fill_kv_cache"
_NAMES = ("k", "v", *_check.CACHE_NAMES)
_loaded: dict[tuple, LoadedFunction] = {}


def fill_kv_cache(
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    k_meta: Any,
    v_meta: Any,
    *,
    slot_mapping: Any = None,
    block_table: Any = None,
    seq_lens: Any = None,
    q_start_loc: Any = None,
    layout: str = "bshd",
    policy: int | str | CacheFormat = QuantPolicy.TURBO_QUANT,
    k_scale: Any = None,
    v_scale: Any = None,
    window: tuple[Any, Any, Any] | None = None,
) -> None:
    """Rotate, quantise and pack new K and V rows, and write them into their pages, in place.

    Rows are addressed either by ``slot_mapping`` or by ``block_table``, ``seq_lens`` and
    ``q_start_loc``. Nothing but the addressed rows changes.

    Parameters
    ----------
    k, v
        ``[T, HK, D]`` and ``[T, HK, DV]``, float16 or bfloat16 (on the CPU also float32); new rows
        of a ragged batch.
        The token stride is free, so slices of a fused projection are accepted.
    k_cache, v_cache
        ``[P, PS, HK, BK]`` and ``[P, PS, HK, BV]``, written: bytes of codes, uint8, or the
        model's dtype where a codec is ``none``; D/2 and D/4 bytes in ``k4v2``. The page stride is
        free, below 2**31 elements.
    k_meta, v_meta
        ``[P, PS, HK, MK]`` and ``[P, PS, HK, MV]``, dtype of ``k``, written. The page stride
        is free, below 2**31 elements.
    slot_mapping
        ``[T]`` int64: page * PS + offset of each token; a negative slot skips the token.
    block_table
        ``[B, MB]`` int32: pages of each sequence.
    seq_lens
        ``[B]`` int32: lengths *after* these rows are appended.
    q_start_loc
        ``[B + 1]`` int32: cumulative number of new tokens. Tokens past the last one, and those
        that would sit before position 0, are skipped.
    layout
        ``"bshd"``, or ``"bhsd"`` for pages ``[HK, PS, ...]``.
    policy
        Cache format: its number, a preset's name, a slug or a `CacheFormat`.
    k_scale, v_scale
        Scale of all keys, of all values, in ``fp8``: a number (None is 1), or a float32 tensor
        ``[1]`` on the device, which saves a launch. None in other formats.
    window
        ``k_window`` ``[S, N, HK, D]``, ``v_window`` ``[S, N, HK, DV]`` in the model's dtype and
        ``window_slots`` ``[B]`` int32, written too: the rotated rows of the newest N tokens of each
        sequence, unquantised. Position p of sequence b goes to row p % N of ring window_slots[b];
        no two sequences share one. By block table only.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape, stride, alignment (16 bytes; 4 for metas) or device, or not
        exactly one addressing. Nothing has been written.
    UnsupportedSpecError
        No kernel is generated for this format and these shapes, or not for this device.
    ArtifactNotFoundError, ArtifactCorruptError
        No library serves the call.

    Notes
    -----
    One launch on torch's current stream, nothing allocated; it can be captured in a CUDA graph
    after one call outside of it. Tensors may be any objects with ``__dlpack__``.

    Slots and page numbers have to be inside the cache. On the CPU they are checked before anything
    is written; on a GPU they cannot be without waiting for it, and a wrong one writes elsewhere.
    """
    _check.check_layout(_OP, layout)
    policy = _check.as_policy(_OP, policy)
    k, v, k_cache, v_cache, k_meta, v_meta = _check.as_tensors(
        _OP, _NAMES, (k, v, k_cache, v_cache, k_meta, v_meta)
    )
    scales = (
        _check.as_scale(_OP, "k_scale", k_scale, k_cache.device),
        _check.as_scale(_OP, "v_scale", v_scale, k_cache.device),
    )
    table = (block_table, seq_lens, q_start_loc)
    if slot_mapping is not None and window is not None:
        _check.fail(
            _OP, "window", "None with slot_mapping, which has no positions", "one",
            "pass block_table, seq_lens and q_start_loc",
        )  # fmt: skip
    if slot_mapping is not None and block_table is seq_lens is q_start_loc is None:
        slot_mapping = _check.as_tensor(_OP, "slot_mapping", slot_mapping)
        _fill_slots(k, v, k_cache, v_cache, k_meta, v_meta, slot_mapping, layout, policy, *scales)
        return
    if slot_mapping is not None or any(tensor is None for tensor in table):
        given = [("slot_mapping", slot_mapping), *zip(_TABLE_NAMES, table, strict=True)]
        _check.fail(
            _OP,
            "addressing",
            "slot_mapping alone, or block_table, seq_lens and q_start_loc",
            ", ".join(name for name, tensor in given if tensor is not None) or "none",
            "pass exactly one of the two",
        )
    block_table, seq_lens, q_start_loc = _check.as_tensors(_OP, _TABLE_NAMES, table)
    _fill_table(
        k, v, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, q_start_loc,
        layout, policy, *scales, *_check.as_window(_OP, window),
    )  # fmt: skip


_TABLE_NAMES = ("block_table", "seq_lens", "q_start_loc")
_CACHES = ["k_cache", "v_cache", "k_meta", "v_meta"]


@destination_op("fill_slots", mutates=_CACHES)
def _fill_slots(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: str,
    policy: str,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    rows, caches = (k, v), (k_cache, v_cache, k_meta, v_meta)
    index = {"slot_mapping": slot_mapping}
    _fill("fill_slots", rows, caches, index, layout, policy, (k_scale, v_scale), {})


@destination_op("fill_table", mutates=[*_CACHES, "k_window", "v_window"])
def _fill_table(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    q_start_loc: torch.Tensor,
    layout: str,
    policy: str,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    k_window: torch.Tensor | None,
    v_window: torch.Tensor | None,
    window_slots: torch.Tensor | None,
) -> None:
    rows, caches = (k, v), (k_cache, v_cache, k_meta, v_meta)
    index = {"block_table": block_table, "seq_lens": seq_lens, "q_start_loc": q_start_loc}
    window = _check.given(_check.WINDOW_NAMES, (k_window, v_window, window_slots))
    _fill("fill_table", rows, caches, index, layout, policy, (k_scale, v_scale), window)


def _fill(
    function: str,
    rows: tuple[torch.Tensor, ...],
    caches: tuple[torch.Tensor, ...],
    index: dict[str, torch.Tensor],
    layout: str,
    policy: str,
    scales: _check.Scales,
    window: dict[str, torch.Tensor],
) -> None:
    k, v = rows
    scales = _check.tensor_scales(_OP, policy, scales, k.device)
    size_of_window = window["k_window"].shape[1:2] if window else ()
    shapes = (k.shape[1:], v.shape[2:], caches[0].shape, size_of_window)
    key = (function, shapes, k.dtype, k.device, layout, policy)
    loaded = _loaded.get(key)
    tensors = (
        *rows,
        *_check_caches.kernel_caches(caches, scales),
        *index.values(),
        *window.values(),
    )
    if (
        loaded is None
        or not k.is_cuda
        or _check.suspect_rows(k, v)
        or _check_caches.suspect_caches(*caches)
        or _check_caches.suspect_window(window)
    ):
        spec, tensors = _check_arguments(rows, caches, index, layout, policy, scales, window)
        if loaded is None:
            loaded = _loaded[key] = load(function, spec, k.device)
    size = k.numel()
    if size == 0 or not all(map(torch.Tensor.numel, index.values())):
        return
    variant = loaded.nearest(size)
    try:
        variant.call(*tensors)
    except REFUSALS:
        tensors = _check_arguments(rows, caches, index, layout, policy, scales, window)[1]
        call_again(loaded, variant, tensors)


def _check_arguments(
    rows: tuple[torch.Tensor, ...],
    caches: tuple[torch.Tensor, ...],
    index: dict[str, torch.Tensor],
    layout: str,
    policy: str,
    scales: _check.Scales,
    window: dict[str, torch.Tensor],
) -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
    """Check everything; return the spec and the kernel's tensors."""
    (k, v), k_cache = rows, caches[0]
    scaled = _check.given(_check.SCALE_NAMES, scales)
    named = dict(zip(_NAMES, (*rows, *caches), strict=True)) | index | scaled | window
    device = _check.check_device(_OP, named)
    _check.check_model_dtype(_OP, "k", k)
    if k.ndim != 3:
        _check.check_shape(_OP, "k", k, "[T, HK, D]", (None,) * 3)
    tokens, _, head_dim = k.shape
    dims = (head_dim, v.shape[-1] if v.ndim else head_dim)
    spec = _check_caches.cache_spec(
        _OP, "fill_table", k_cache, dims, None, k.dtype, layout, policy, window.get("k_window")
    )
    value_symbol = "D" if spec.head_dim_v is None else "DV"
    for name, tensor, symbol, dim in (
        ("k", k, "D", spec.head_dim),
        ("v", v, value_symbol, spec.value_dim),
    ):
        _check.check_dtype(_OP, name, tensor, k.dtype)
        shape = (tokens, spec.num_kv_heads, dim)
        _check.check_shape(_OP, name, tensor, f"[T, HK, {symbol}]", shape)
        _check.check_compact(_OP, name, tensor, first=1)
        _check.check_alignment(_OP, name, tensor, 16, free_axes=1)
    caches = _check_caches.check_caches(_OP, spec, caches)
    _check.check_apart(_OP, dict(zip(_check.CACHE_NAMES, caches, strict=True)))
    _check_caches.check_scales(_OP, scaled)
    if "slot_mapping" in index:
        _check.check_index(
            _OP, "slot_mapping", index["slot_mapping"], "[T]", (tokens,), torch.int64
        )
    else:
        _check.check_table_arguments(_OP, index["block_table"], index["seq_lens"])
        batch = index["block_table"].shape[0]
        starts = index["q_start_loc"]
        _check.check_index(_OP, "q_start_loc", starts, "[B + 1]", (batch + 1,), torch.int32)
    batch = index["seq_lens"].shape[0] if "seq_lens" in index else 0
    rings = _check_caches.check_window(_OP, spec, window, batch)
    if device.type == "cpu":
        _check_values(spec, index, tokens, k_cache.shape[0])
        _values.check_rings(_OP, rings)
    rows = tuple(_check.canonical(tensor, first=1) for tensor in rows)
    return spec, (*rows, *_check_caches.kernel_caches(caches, scales), *index.values(), *rings)


def _check_values(
    spec: CacheSpec, index: dict[str, torch.Tensor], tokens: int, num_pages: int
) -> None:
    if "slot_mapping" in index:
        _values.check_slots(_OP, index["slot_mapping"], num_pages * spec.page_size)
        return
    table, lens = index["block_table"], index["seq_lens"]
    if table.shape[0] == 0:
        return
    _values.check_lengths(_OP, lens, table.shape[1] * spec.page_size)
    new = _values.check_query_starts(_OP, index["q_start_loc"], tokens)
    _values.check_table(_OP, table, lens - new, lens, spec.page_size, num_pages)
