"""``decode``: the torch call `paged_decode`."""

from __future__ import annotations

from typing import Any

import torch

from tq_tvm.artifacts import LoadedFunction, load
from tq_tvm.ops import _check, _values
from tq_tvm.ops._library import call_kernel, destination_op
from tq_tvm.ops.workspace import choose_launch
from tq_tvm.spec import HEAD_DIMS, CacheFormat, CacheSpec, Codec, QuantPolicy
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
    policy: int | str | CacheFormat = QuantPolicy.TURBO_QUANT,
    k_scale: Any = None,
    v_scale: Any = None,
    window: tuple[Any, Any, Any] | None = None,
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
        ``[P, PS, HK, BK]`` and ``[P, PS, HK, BV]``: bytes of codes, uint8, or the
        model's dtype where a codec is ``none``; D/2 and D/4 bytes in ``k4v2``. The page stride is
        free, below 2**31 elements.
    k_meta, v_meta
        ``[P, PS, HK, MK]`` and ``[P, PS, HK, MV]``, dtype of ``q``. The page stride is free,
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
        Cache format: its number, a preset's name, a slug or a `CacheFormat`.
    k_scale, v_scale
        Scale of all keys, of all values, in ``fp8``: a number (None is 1), or a float32 tensor
        ``[1]`` on the device, which saves a launch. None in other formats.
    window
        ``k_window``, ``v_window`` and ``window_slots`` as `tq_tvm.fill_kv_cache` writes them: the
        newest N tokens of each sequence are attended from there, the others from the cache. On the
        CPU.
    out
        ``[B, HQ, DV]``, contiguous, dtype of ``q``; it must not overlap ``q``.
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
        No kernel is generated for this format and these shapes, or not for this device.
    ArtifactNotFoundError, ArtifactCorruptError
        No library serves the call.

    Notes
    -----
    At most two launches on torch's current stream. It can be captured in a CUDA graph after one
    call outside of it; with ``out`` and ``workspace`` nothing is allocated. A graph keeps the
    splits of its shapes, so replays may have any lengths that the table holds. There is no
    gradient. Tensors may be any objects with ``__dlpack__``.

    On a GPU the weights of V have 15 bits, from the largest softmax weight times the largest norm
    of V: where norms differ by less than 30 times, the error is that of rounding the output.

    Page numbers and lengths have to be inside the cache and the table. On the CPU they are checked;
    on a GPU they cannot be without waiting for it, and a wrong one reads out of bounds.
    """
    _check.check_layout(_OP, layout)
    policy = _check.as_policy(_OP, policy)
    q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens = _check.as_tensors(
        _OP, _NAMES, (q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens)
    )
    scales = (
        _check.as_scale(_OP, "k_scale", k_scale, k_cache.device),
        _check.as_scale(_OP, "v_scale", v_scale, k_cache.device),
    )
    _, codec = _check.codecs_of(_OP, policy)
    result = _new_result(q, v_cache, codec) if out is None else _check.as_tensor(_OP, "out", out)
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
        sm_scale, max_seq_len, layout, policy, *scales, *_check.as_window(_OP, window),
    )  # fmt: skip
    return result if out is None else out


def _new_result(q: torch.Tensor, v_cache: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Where the output goes; its width follows the values' where that is a head_dim."""
    dim = codec.head_dim_of(v_cache.shape[-1]) if v_cache.ndim else 0
    if q.ndim == 0 or dim == q.shape[-1] or dim not in HEAD_DIMS:
        return torch.empty_like(q)
    return q.new_empty((*q.shape[:-1], dim))


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
    policy: str,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    k_window: torch.Tensor | None,
    v_window: torch.Tensor | None,
    window_slots: torch.Tensor | None,
) -> None:
    arguments = (q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, out)
    scales = _check.tensor_scales(_OP, policy, (k_scale, v_scale), q.device)
    window = _check.given(_check.WINDOW_NAMES, (k_window, v_window, window_slots))
    caches = _check.kernel_caches((k_cache, v_cache, k_meta, v_meta), scales)
    inputs: tuple[torch.Tensor, ...] = (q, *caches, block_table, seq_lens, *window.values())
    shape, pages = q.shape, k_cache.shape
    size_of_window = k_window.shape[1:2] if k_window is not None else ()
    key = (shape[1:], pages, out.shape[2:], size_of_window, q.dtype, q.device, layout, policy)
    found = _loaded.get(key)
    if (
        found is None
        or not q.is_cuda
        or block_table.ndim != 2
        or _check.suspect_rows(q, out, compact=True, apart=True)
        or _check.suspect_caches(k_cache, v_cache, k_meta, v_meta)
    ):
        spec, inputs = _check_arguments(arguments, layout, policy, scales, window)
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
        lambda: (
            *_check_arguments(arguments, layout, policy, scales, window)[1],
            scratch,
            out,
        ),
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
    tensors: tuple[torch.Tensor, ...],
    layout: str,
    policy: str,
    scales: _check.Scales,
    window: dict[str, torch.Tensor],
) -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
    """Check everything but the workspace; return the spec and the kernel's input tensors."""
    q, k_cache, v_cache, k_meta, v_meta, table, lens, out = tensors
    scaled = _check.given(_check.SCALE_NAMES, scales)
    named = dict(zip((*_NAMES, "out"), tensors, strict=True)) | scaled | window
    device = _check.check_device(_OP, named)
    _check.check_model_dtype(_OP, "q", q)
    if q.ndim != 3:
        _check.check_shape(_OP, "q", q, "[B, HQ, D]", (None,) * 3)
    batch, num_q_heads, head_dim = q.shape
    dims = (head_dim, out.shape[-1] if out.ndim else head_dim)
    spec = _check.cache_spec(
        _OP, "decode", k_cache, dims, num_q_heads, q.dtype, layout, policy,
        window.get("k_window"),
    )  # fmt: skip
    _check.check_scales(_OP, scaled)
    caches = _check.check_caches(_OP, spec, (k_cache, v_cache, k_meta, v_meta))
    _check.check_dtype(_OP, "out", out, q.dtype)
    value_symbol = "D" if spec.head_dim_v is None else "DV"
    for name, tensor, symbol, dim in (
        ("q", q, "D", head_dim),
        ("out", out, value_symbol, spec.value_dim),
    ):
        shape = (batch, num_q_heads, dim)
        _check.check_shape(_OP, name, tensor, f"[B, HQ, {symbol}]", shape)
        _check.check_compact(_OP, name, tensor)
        _check.check_alignment(_OP, name, tensor, 16)
    _check.check_apart(_OP, {"q": q, "out": out})
    _check.check_table_arguments(_OP, table, lens, batch)
    rings = _check.check_window(_OP, spec, window, batch)
    if device.type == "cpu" and batch:
        _values.check_lengths(_OP, lens, table.shape[1] * spec.page_size)
        first = torch.zeros_like(lens)
        _values.check_table(_OP, table, first, lens, spec.page_size, k_cache.shape[0])
        _values.check_rings(_OP, rings)
    return spec, (q, *_check.kernel_caches(caches, scales), table, lens, *rings)
