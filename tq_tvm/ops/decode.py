"""``decode``: the torch call `paged_decode`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tq_tvm.artifacts import LoadedFunction, load
from tq_tvm.ops import _check, _check_caches, _values
from tq_tvm.ops._attention import NAMES, check_attention
from tq_tvm.ops._library import REFUSALS, call_again, destination_op
from tq_tvm.ops.attend import Features, attend
from tq_tvm.ops.workspace import as_scratch, choose_launch
from tq_tvm.served import attends_to_one, gpus_decode
from tq_tvm.spec import HEAD_DIMS, CacheFormat, CacheSpec, Codec, QuantPolicy

__all__ = ["paged_decode"]

_OP = "paged_decode"
_PLAIN: tuple[Any, ...] = tuple(Features())


class _Found(NamedTuple):
    """What serves calls of some shapes.

    Parameters
    ----------
    scaled
        Whether a cache tensor of the format has a scale.
    nothing
        A workspace of no floats.
    """

    spec: CacheSpec
    loaded: LoadedFunction
    scaled: bool
    nothing: torch.Tensor


_loaded: dict[tuple, _Found] = {}


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
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    window_left: int | None = None,
    kept_tokens: int = 0,
    soft_cap: float | None = None,
    sinks: Any = None,
    alibi_slopes: Any = None,
    return_lse: bool = False,
    lse: Any = None,
    layout: str = "bshd",
    policy: int | str | CacheFormat = QuantPolicy.TURBO_QUANT,
    k_scale: Any = None,
    v_scale: Any = None,
    window: tuple[Any, Any, Any] | None = None,
    out: Any = None,
    workspace: Any = None,
) -> Any:
    """Attention of the newest tokens of each sequence over its packed pages.

    Queries are rotated, the context is split over the device, and merged outputs are rotated
    back: queries and outputs are in the original domain.

    One query token a sequence is decoding. With ``cu_seqlens_q`` a sequence has any number n of
    them, its newest tokens, whose own keys and values are in the cache already: speculative
    decoding, a chunk of prefill over a packed past, or new tokens after a prefix that is reused.
    Token i of them is at position p = seq_lens - n + i and attends to positions j <= p. With
    z = sm_scale q k the logit of j is soft_cap tanh(z / soft_cap) + alibi_slopes[h] (j - p).

    Parameters
    ----------
    q
        ``[B, HQ, D]``, contiguous, float16 or bfloat16 (on the CPU also float32). With
        ``cu_seqlens_q`` ``[T, HQ, D]``, the tokens of one sequence after those of another.
    k_cache, v_cache
        ``[P, PS, HK, BK]`` and ``[P, PS, HK, BV]``: bytes of codes, uint8, or the
        model's dtype where a codec is ``none``; D/2 and D/4 bytes in ``k4v2``. The page stride is
        free, below 2**31 elements.
    k_meta, v_meta
        ``[P, PS, HK, MK]`` and ``[P, PS, HK, MV]``, dtype of ``q``. The page stride is free,
        below 2**31 elements.
    block_table
        ``[B, MB]`` int32: pages of each sequence; entries past its last one may be anything.
    seq_lens
        ``[B]`` int32: tokens of each sequence, with those of its queries. The output of an empty
        sequence is zero.
    sm_scale
        Factor of the logits; None is 1/sqrt(D).
    max_seq_len
        Upper bound of ``seq_lens`` that the host knows; None is MB * PS. It chooses the number of
        splits, so a bound that is wrong costs time, not correctness.
    cu_seqlens_q
        ``[B + 1]`` int32, from 0: the query tokens of sequence b are rows ``cu_seqlens_q[b]`` to
        ``cu_seqlens_q[b + 1]``. Rows past the last are left alone. None: one token a sequence.
    max_seqlen_q
        Upper bound of the query tokens of a sequence that the host knows, with ``cu_seqlens_q``;
        None is T. Like ``max_seq_len`` it is a matter of time alone.
    window_left
        A query at position p attends to positions j >= p - window_left only, beside the kept ones;
        None or -1: to all. Pages that no query attends to may have been freed: their entries of
        ``block_table`` are not read.
    kept_tokens
        First tokens of every sequence to which queries attend in spite of the window.
    soft_cap
        Bound of the scaled logits, see above; None or 0: none.
    sinks
        ``[HQ]`` float32: a logit of each query head that takes part in the softmax with a value of
        zero.
    alibi_slopes
        ``[HQ]`` float32: slope of each query head's linear bias, see above.
    return_lse
        Return ``(out, lse)``. lse is the natural logarithm of the sum of exponentials of all
        logits, sink included: what `tq_tvm.merge_attention_states` takes. -inf where a token
        attends to nothing.
    lse
        ``[T, HQ]`` float32, contiguous, where lse is written; None allocates it if it is returned.
    layout
        ``"bshd"``, or ``"bhsd"`` for pages ``[HK, PS, ...]``.
    policy
        Cache format: its number, a preset's name, a slug or a `CacheFormat`.
    k_scale, v_scale
        Scale of all keys, of all values, in ``fp8``: a number (None is 1), or a float32 tensor
        ``[1]`` on the device, which saves a launch. None in other formats.
    window
        ``k_window``, ``v_window`` and ``window_slots`` as `tq_tvm.fill_kv_cache` writes them: the
        newest N tokens of each sequence are attended from there, the others from the cache.
    out
        ``[B, HQ, DV]``, or ``[T, HQ, DV]``, contiguous, dtype of ``q``; it must not overlap ``q``.
    workspace
        Contiguous tensor of at least `paged_decode_workspace_size` bytes, of any dtype; float32
        saves the host a view of it. None allocates it with torch. Concurrent calls need one each.
        A call that needs none does not look at it.

    Returns
    -------
    ``out``, or a new tensor; with ``return_lse`` that and lse.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape, stride, alignment (16 bytes; 4 for metas) or device, or too small
        a workspace.
    UnsupportedSpecError
        No kernel is generated for this format and these shapes, or not for this device, or not of
        what was asked for: calls with any of ``cu_seqlens_q`` to ``lse`` need the function
        ``attend`` of a library, others ``decode``, in whose place GPUs have ``attend`` of formats
        that are not Lloyd-Max's.
    ArtifactNotFoundError, ArtifactCorruptError
        No library serves the call.

    Notes
    -----
    At most two launches on torch's current stream. It can be captured in a CUDA graph after one
    call outside of it; with ``out`` and ``workspace`` nothing is allocated. A graph keeps the
    splits of its shapes, so replays may have any lengths that the table holds, and any
    ``cu_seqlens_q`` of its T and B. There is no gradient. Tensors may be any objects with
    ``__dlpack__``.

    With a spec's ``window`` of unquantised rows, those are the newest of the sequence at the time
    of the call: all its queries read them so.

    On a GPU the weights of V have 15 bits, from the largest softmax weight times the largest norm
    of V: where norms differ by less than 30 times, the error is that of rounding the output. Those
    of several query tokens, and of one in a group of more than 8 heads over 2048 tokens and more,
    are float16.

    Page numbers and lengths have to be inside the cache and the table, ``cu_seqlens_q`` must not
    fall, and a sequence must have as many tokens as queries, or none. On the CPU this is checked;
    on a GPU it cannot be without waiting for it, and a wrong number reads out of bounds.

    Examples
    --------
    A chunk of 70 new tokens after 300 that are in the cache, and its merge with a shared prefix::

        starts = torch.tensor([0, 70], dtype=torch.int32, device="cuda")
        out, lse = paged_decode(q, *cache, table, lens, cu_seqlens_q=starts, return_lse=True)
        out, lse = merge_attention_states(out, lse, *prefix)
    """
    _check.check_layout(_OP, layout)
    policy = _check.as_policy(_OP, policy)
    q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens = _check.as_tensors(
        _OP, NAMES, (q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens)
    )
    if not (k_scale is v_scale is None):
        k_scale = _check.as_scale(_OP, "k_scale", k_scale, k_cache.device)
        v_scale = _check.as_scale(_OP, "v_scale", v_scale, k_cache.device)
    result = (
        _new_result(q, v_cache, _check.codecs_of(_OP, policy)[1])
        if out is None
        else _check.as_tensor(_OP, "out", out)
    )
    if workspace is not None:
        workspace = _check.as_tensor(_OP, "workspace", workspace)
    if sm_scale is None:
        shape = q.shape
        sm_scale = shape[-1] ** -0.5 if shape and shape[-1] else 1.0
    else:
        sm_scale = _check.as_number(_OP, "sm_scale", sm_scale)
    if max_seq_len is not None:
        max_seq_len = _check.as_integer(_OP, "max_seq_len", max_seq_len)
    k_window, v_window, window_slots = _check.as_window(_OP, window)
    arguments: tuple[Any, ...] = (
        q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, result, workspace,
        sm_scale, max_seq_len, layout, policy, k_scale, v_scale, k_window, v_window, window_slots,
    )  # fmt: skip
    returned = result if out is None else out
    if (
        cu_seqlens_q is max_seqlen_q is window_left is soft_cap is sinks is alibi_slopes is lse
        is None and kept_tokens == 0 and return_lse is False
    ):  # fmt: skip
        _decode(*arguments)
        return returned
    features = Features.of(
        q, cu_seqlens_q, max_seqlen_q, window_left, kept_tokens, soft_cap, sinks, alibi_slopes,
        return_lse, lse,
    )  # fmt: skip
    if features.plain:
        _decode(*arguments)
    else:
        # Not a sum: torch.compile does not add a named tuple.
        attend(*(*arguments, *features))
    if not return_lse:
        return returned
    return returned, features.lse if lse is None else lse


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
    tensors = (q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens)
    shape, pages = q.shape, k_cache.shape
    size_of_window = k_window.shape[1:2] if k_window is not None else ()
    key = (shape[1:], pages, out.shape[2:], size_of_window, q.dtype, q.device, layout, policy)
    found = _loaded.get(key)
    # Nearly every call has none of these: looking at them costs a tenth of it.
    scales: _check.Scales = (k_scale, v_scale)
    window: dict[str, torch.Tensor] = {}
    inputs: tuple[torch.Tensor, ...] = tensors
    if (
        found is None
        or found.scaled
        or not (k_scale is v_scale is k_window is v_window is window_slots is None)
    ):
        scales = _check.tensor_scales(_OP, policy, scales, q.device)
        window = _check.given(_check.WINDOW_NAMES, (k_window, v_window, window_slots))
        caches = _check_caches.kernel_caches(tensors[1:5], scales)
        inputs = (q, *caches, block_table, seq_lens, *window.values())

    if (
        found is None
        or not q.is_cuda
        or block_table.ndim != 2
        or _check.suspect_rows(q, out, compact=True, apart=True)
        or _check_caches.suspect_caches(k_cache, v_cache, k_meta, v_meta)
        or (window and _check_caches.suspect_window(window))
    ):
        codecs = _check.codecs_of(_OP, policy)
        shaped = q.is_cuda and q.ndim and out.ndim
        if shaped and not gpus_decode(*codecs, q.shape[-1], out.shape[-1]):
            attend(
                q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, out, workspace,
                sm_scale, max_seq_len, layout, policy, k_scale, v_scale,
                k_window, v_window, window_slots, *_PLAIN,
            )  # fmt: skip
            return
        spec, inputs = _check_arguments((*tensors, out), layout, policy, scales, window)
        if found is None:
            scaled = any(codec.tensor_scale for codec in codecs)
            nothing = torch.empty(0, dtype=torch.float32, device=q.device)
            found = _loaded[key] = _Found(spec, load("decode", spec, q.device), scaled, nothing)
    spec, loaded, _, nothing = found
    batch = shape[0]
    if batch == 0:
        return
    context = block_table.shape[1] * spec.page_size
    if context == 0 or pages[0] == 0:
        out.zero_()
        return
    if max_seq_len is not None:
        context = max(min(context, max_seq_len), 1)
    if q.is_cuda and attends_to_one(spec, context):
        attend(
            q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, out, workspace,
            sm_scale, max_seq_len, layout, policy, k_scale, v_scale,
            k_window, v_window, window_slots, *_PLAIN,
        )  # fmt: skip
        return
    variant, parts, floats = choose_launch(loaded, batch, context)
    if floats == 0:
        scratch = nothing
    elif workspace is None:
        scratch = torch.empty(floats, dtype=torch.float32, device=q.device)
    else:
        todo = "allocate paged_decode_workspace_size(...) bytes"
        scratch = as_scratch(_OP, workspace, floats, q.device, todo)
    rest = (scratch, out, parts, sm_scale)
    try:
        variant.call(*inputs, *rest)
    except REFUSALS:
        _, inputs = _check_arguments((*tensors, out), layout, policy, scales, window)
        call_again(loaded, variant, (*inputs, *rest))


def _check_arguments(
    tensors: tuple[torch.Tensor, ...],
    layout: str,
    policy: str,
    scales: _check.Scales,
    window: dict[str, torch.Tensor],
) -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
    """Check everything but the workspace; return the spec and the kernel's input tensors."""
    spec, inputs = check_attention(_OP, "decode", tensors, layout, policy, scales, window)
    q, k_cache, table, lens = tensors[0], tensors[1], tensors[5], tensors[6]
    if q.device.type == "cpu" and len(q):
        _values.check_lengths(_OP, lens, table.shape[1] * spec.page_size)
        first = torch.zeros_like(lens)
        _values.check_table(_OP, table, first, lens, spec.page_size, k_cache.shape[0])
        _values.check_rings(_OP, inputs[7:])
    return spec, inputs
