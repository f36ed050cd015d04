"""``fill``: the torch call `fill_kv_cache`."""

from __future__ import annotations

from typing import Any

import torch

from tq_tvm.artifacts import LoadedFunction, load
from tq_tvm.ops import _check, _values
from tq_tvm.ops._library import call_kernel, destination_op
from tq_tvm.spec import CacheSpec, QuantPolicy

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
    policy: int | str = QuantPolicy.TURBO_QUANT,
) -> None:
    """Rotate, quantise and pack new K and V rows, and write them into their pages, in place.

    Rows are addressed either by ``slot_mapping`` or by ``block_table``, ``seq_lens`` and
    ``q_start_loc``. Nothing but the addressed rows changes.

    Parameters
    ----------
    k, v
        ``[T, HK, D]``, float16 or bfloat16 (on the CPU also float32); new rows of a ragged batch.
        The token stride is free, so slices of a fused projection are accepted.
    k_cache, v_cache
        ``[P, PS, HK, D/2]`` and ``[P, PS, HK, D/4]``, uint8, written. The page stride is free,
        below 2**31 elements.
    k_meta, v_meta
        ``[P, PS, HK, 2]`` and ``[P, PS, HK, 1]``, dtype of ``k``, written. The page stride is free,
        below 2**31 elements.
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
        Cache format, by its number or its name.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape, stride, alignment (16 bytes; 4 for metas) or device, or not
        exactly one addressing. Nothing has been written.
    UnsupportedSpecError
        No kernel is generated for these shapes.
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
    table = (block_table, seq_lens, q_start_loc)
    if slot_mapping is not None and block_table is seq_lens is q_start_loc is None:
        slot_mapping = _check.as_tensor(_OP, "slot_mapping", slot_mapping)
        _fill_slots(k, v, k_cache, v_cache, k_meta, v_meta, slot_mapping, layout, policy)
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
        layout, policy,
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
    policy: int,
) -> None:
    rows, caches = (k, v), (k_cache, v_cache, k_meta, v_meta)
    _fill("fill_slots", rows, caches, {"slot_mapping": slot_mapping}, layout, policy)


@destination_op("fill_table", mutates=_CACHES)
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
    policy: int,
) -> None:
    index = {"block_table": block_table, "seq_lens": seq_lens, "q_start_loc": q_start_loc}
    _fill("fill_table", (k, v), (k_cache, v_cache, k_meta, v_meta), index, layout, policy)


def _fill(
    function: str,
    rows: tuple[torch.Tensor, ...],
    caches: tuple[torch.Tensor, ...],
    index: dict[str, torch.Tensor],
    layout: str,
    policy: int,
) -> None:
    k, v = rows
    key = (function, k.shape[1:], caches[0].shape, k.dtype, k.device, layout, policy)
    loaded = _loaded.get(key)
    tensors = (*rows, *caches, *index.values())
    if (
        loaded is None
        or not k.is_cuda
        or _check.suspect_rows(k, v)
        or _check.suspect_caches(*caches)
    ):
        spec, tensors = _check_arguments(rows, caches, index, layout, policy)
        if loaded is None:
            loaded = _loaded[key] = load(function, spec, k.device)
    size = k.numel()
    if size == 0 or not all(map(torch.Tensor.numel, index.values())):
        return
    call_kernel(
        loaded,
        loaded.nearest(size),
        tensors,
        (),
        lambda: _check_arguments(rows, caches, index, layout, policy)[1],
    )


def _check_arguments(
    rows: tuple[torch.Tensor, ...],
    caches: tuple[torch.Tensor, ...],
    index: dict[str, torch.Tensor],
    layout: str,
    policy: int,
) -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
    """Check everything; return the spec and the kernel's tensors."""
    k, k_cache = rows[0], caches[0]
    named = dict(zip(_NAMES, (*rows, *caches), strict=True)) | index
    device = _check.check_device(_OP, named)
    _check.check_model_dtype(_OP, "k", k)
    if k.ndim != 3:
        _check.check_shape(_OP, "k", k, "[T, HK, D]", (None,) * 3)
    tokens, _, head_dim = k.shape
    spec = _check.cache_spec(_OP, k_cache, head_dim, None, k.dtype, layout, policy)
    for name, tensor in zip(("k", "v"), rows, strict=True):
        _check.check_dtype(_OP, name, tensor, k.dtype)
        _check.check_shape(
            _OP, name, tensor, "[T, HK, D]", (tokens, spec.num_kv_heads, spec.head_dim)
        )
        _check.check_compact(_OP, name, tensor, first=1)
        _check.check_alignment(_OP, name, tensor, 16, free_axes=1)
    caches = _check.check_caches(_OP, spec, caches)
    _check.check_apart(_OP, dict(zip(_check.CACHE_NAMES, caches, strict=True)))
    if "slot_mapping" in index:
        _check.check_index(
            _OP, "slot_mapping", index["slot_mapping"], "[T]", (tokens,), torch.int64
        )
    else:
        _check.check_table_arguments(_OP, index["block_table"], index["seq_lens"])
        batch = index["block_table"].shape[0]
        starts = index["q_start_loc"]
        _check.check_index(_OP, "q_start_loc", starts, "[B + 1]", (batch + 1,), torch.int32)
    if device.type == "cpu":
        _check_values(spec, index, tokens, k_cache.shape[0])
    rows = tuple(_check.canonical(tensor, first=1) for tensor in rows)
    return spec, (*rows, *caches, *index.values())


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
