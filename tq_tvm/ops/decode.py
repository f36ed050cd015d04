"""``decode``: the torch call `paged_decode`."""

from __future__ import annotations

from typing import Any

import torch

from tq_tvm.artifacts import LoadedFunction, load
from tq_tvm.ops import _check, _values
from tq_tvm.ops._library import call_kernel, destination_op
from tq_tvm.ops.workspace import choose_launch
from tq_tvm.spec import CacheSpec, QuantPolicy
from tq_tvm.splits import workspace_floats

__all__ = ["paged_decode"]

_OP = "paged_decode"
_NAMES = ("q", *_check.CACHE_NAMES, "block_table", "seq_lens")
_loaded: dict[tuple, tuple[CacheSpec, LoadedFunction]] = {}


def paged_decode(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k_meta: Any,
    v_meta: Any,
    block_table: Any,
    seq_lens: Any,
    *,
    sm_scale: float | None = None,
    max_seq_len: int | None = None,
    layout: str = "bshd",
    policy: int | str = QuantPolicy.TURBO_QUANT,
    out: Any = None,
    workspace: Any = None,
) -> Any:
    """Attention of one new query a sequence over its packed pages.

    The query is rotated, the context is split over the device, and the merged output is rotated
    back: queries and outputs are in the original domain.

    Parameters
    ----------
    q
        ``[B, HQ, D]``, contiguous, float16 or bfloat16 (on the CPU also float32).
    k_cache, v_cache
        ``[P, PS, HK, D/2]`` and ``[P, PS, HK, D/4]``, uint8. The page stride is free,
        below 2**31 elements.
    k_meta, v_meta
        ``[P, PS, HK, 2]`` and ``[P, PS, HK, 1]``, dtype of ``q``. The page stride is free,
        below 2**31 elements.
    block_table
        ``[B, MB]`` int32: pages of each sequence.
    seq_lens
        ``[B]`` int32: tokens to attend to, with the query's own. The output of an empty sequence
        is zero.
    sm_scale
        Factor of the logits; None is 1/sqrt(D).
    max_seq_len
        Upper bound of ``seq_lens`` that the host knows; None is MB * PS. It chooses the number of
        splits, so a bound that is wrong costs time, not correctness.
    layout
        ``"bshd"``, or ``"bhsd"`` for pages ``[HK, PS, ...]``.
    policy
        Cache format, by its number or its name.
    out
        ``[B, HQ, D]``, contiguous, dtype of ``q``; it must not overlap ``q``.
    workspace
        Contiguous tensor of at least `paged_decode_workspace_size` bytes, of any dtype. None
        allocates it with torch. Concurrent calls need one each.

    Returns
    -------
    ``out``, or a new tensor.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape, stride, alignment (16 bytes; 4 for metas) or device, or too small
        a workspace.
    UnsupportedSpecError
        No kernel is generated for these shapes.
    ArtifactNotFoundError, ArtifactCorruptError
        No library serves the call.

    Notes
    -----
    At most two launches on torch's current stream. It can be captured in a CUDA graph after one
    call outside of it; with ``out`` and ``workspace`` nothing is allocated. A graph keeps the
    splits of its shapes, so replays may have any lengths that the table holds. There is no
    gradient. Tensors may be any objects with ``__dlpack__``.

    Page numbers and lengths have to be inside the cache and the table. On the CPU they are checked;
    on a GPU they cannot be without waiting for it, and a wrong one reads out of bounds.
    """
    _check.check_layout(_OP, layout)
    policy = _check.as_policy(_OP, policy)
    q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens = _check.as_tensors(
        _OP, _NAMES, (q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens)
    )
    result = torch.empty_like(q) if out is None else _check.as_tensor(_OP, "out", out)
    if workspace is not None:
        workspace = _check.as_tensor(_OP, "workspace", workspace)
    if sm_scale is None:
        sm_scale = q.shape[-1] ** -0.5 if q.numel() and q.ndim else 1.0
    else:
        sm_scale = _check.as_number(_OP, "sm_scale", sm_scale)
    if max_seq_len is not None:
        max_seq_len = _check.as_integer(_OP, "max_seq_len", max_seq_len)
    _decode(
        q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, result, workspace,
        sm_scale, max_seq_len, layout, policy,
    )  # fmt: skip
    return result if out is None else out


@destination_op("decode", mutates=["out", "workspace"])
def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    sm_scale: float,
    max_seq_len: int | None,
    layout: str,
    policy: int,
) -> None:
    arguments = (q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, out)
    inputs: tuple[torch.Tensor, ...] = arguments[:-1]
    shape, pages = q.shape, k_cache.shape
    key = (shape[1:], pages, q.dtype, q.device, layout, policy)
    found = _loaded.get(key)
    if (
        found is None
        or not q.is_cuda
        or block_table.ndim != 2
        or _check.suspect_rows(q, out, compact=True, apart=True)
        or _check.suspect_caches(k_cache, v_cache, k_meta, v_meta)
    ):
        spec, inputs = _check_arguments(arguments, layout, policy)
        if found is None:
            found = _loaded[key] = (spec, load("decode", spec, q.device))
    spec, loaded = found
    if q.numel() == 0:
        return
    context = block_table.shape[1] * spec.page_size
    if context == 0 or pages[0] == 0:
        out.zero_()
        return
    if max_seq_len is not None:
        context = max(min(context, max_seq_len), 1)
    variant, parts = choose_launch(loaded, spec, shape[0], context)
    floats = workspace_floats(spec, shape[0], parts, variant.launch)
    if workspace is None:
        scratch = torch.empty(floats, dtype=torch.float32, device=q.device)
    else:
        scratch = _as_scratch(workspace, floats, q.device)
    call_kernel(
        loaded,
        variant,
        (*inputs, scratch, out),
        (parts, sm_scale),
        lambda: (*_check_arguments(arguments, layout, policy)[1], scratch, out),
    )


def _as_scratch(workspace: torch.Tensor, floats: int, device: torch.device) -> torch.Tensor:
    """View the workspace as the kernel's float32 vector, which may be longer than it needs."""
    size = workspace.numel() * workspace.element_size()
    if (
        workspace.ndim == 1
        and workspace.device == device
        and workspace.is_contiguous()
        and size >= 4 * floats
        and not (size & 3 or workspace.data_ptr() & 15)
    ):
        return workspace if workspace.dtype == torch.float32 else workspace.view(torch.float32)
    if workspace.device != device:
        _check.fail(_OP, "workspace", f"on {device} like q", workspace.device, "move it there")
    _check.check_strided(_OP, "workspace", workspace)
    _check.check_compact(_OP, "workspace", workspace)
    _check.check_alignment(_OP, "workspace", workspace, 16)
    if size < 4 * floats:
        _check.fail(
            _OP,
            "workspace",
            f"at least {4 * floats} bytes",
            f"{size} bytes",
            "allocate paged_decode_workspace_size(...) bytes",
        )
    return workspace.view(-1).view(torch.uint8)[: 4 * floats].view(torch.float32)


def _check_arguments(
    tensors: tuple[torch.Tensor, ...], layout: str, policy: int
) -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
    """Check everything but the workspace; return the spec and the kernel's input tensors."""
    q, k_cache, v_cache, k_meta, v_meta, table, lens, out = tensors
    named = dict(zip((*_NAMES, "out"), tensors, strict=True))
    device = _check.check_device(_OP, named)
    _check.check_model_dtype(_OP, "q", q)
    if q.ndim != 3:
        _check.check_shape(_OP, "q", q, "[B, HQ, D]", (None,) * 3)
    batch, num_q_heads, head_dim = q.shape
    spec = _check.cache_spec(_OP, k_cache, head_dim, num_q_heads, q.dtype, layout, policy)
    caches = _check.check_caches(_OP, spec, (k_cache, v_cache, k_meta, v_meta))
    _check.check_dtype(_OP, "out", out, q.dtype)
    for name, tensor in (("q", q), ("out", out)):
        _check.check_shape(_OP, name, tensor, "[B, HQ, D]", q.shape)
        _check.check_compact(_OP, name, tensor)
        _check.check_alignment(_OP, name, tensor, 16)
    _check.check_apart(_OP, {"q": q, "out": out})
    _check.check_table_arguments(_OP, table, lens, batch)
    if device.type == "cpu" and batch:
        _values.check_lengths(_OP, lens, table.shape[1] * spec.page_size)
        first = torch.zeros_like(lens)
        _values.check_table(_OP, table, first, lens, spec.page_size, k_cache.shape[0])
    return spec, (q, *caches, table, lens)
