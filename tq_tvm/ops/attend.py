"""``attend``: what `paged_decode` calls for more than one plain query token a sequence.

And on GPUs for one, where they have no ``decode`` of the format.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from tq_tvm.artifacts import LoadedFunction, load
from tq_tvm.ops import _check, _check_caches, _values
from tq_tvm.ops._attention import check_attention
from tq_tvm.ops._library import REFUSALS, call_again, destination_op
from tq_tvm.ops.workspace import (
    as_scratch,
    choose_attend_launch,
    choose_launch,
    choose_prefill,
)
from tq_tvm.served import attends_to_one, functions_on
from tq_tvm.spec import CacheSpec
from tq_tvm.splits import attend_floats

__all__ = ["Features", "attend"]

_OP = "paged_decode"
_MOST_TOKENS = 2**31 - 1
_loaded: dict[tuple, tuple[CacheSpec, LoadedFunction, tuple[str, ...]]] = {}
"""The spec of a call's arguments, its kernel, and the functions of its library."""
_starts: dict[torch.device, list[torch.Tensor]] = {}


class Features(NamedTuple):
    """What a call asks for beyond one plain query token a sequence; shapes are checked later."""

    cu_seqlens_q: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    window_left: int = -1
    kept_tokens: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        cu_seqlens_q: Any,
        max_seqlen_q: Any,
        window_left: Any,
        kept_tokens: Any,
        soft_cap: Any,
        sinks: Any,
        alibi_slopes: Any,
        return_lse: Any,
        lse: Any,
    ) -> Features:
        """Take the arguments of a call; lse is allocated if it is to be returned."""
        if cu_seqlens_q is not None:
            cu_seqlens_q = _check.as_tensor(_OP, "cu_seqlens_q", cu_seqlens_q)
        if max_seqlen_q is not None:
            max_seqlen_q = _check.as_integer(_OP, "max_seqlen_q", max_seqlen_q)
            if cu_seqlens_q is None:
                _check.fail(
                    _OP, "max_seqlen_q", "None without cu_seqlens_q", max_seqlen_q, "leave it out"
                )
        left = -1 if window_left is None else window_left
        left = min(_check.as_integer(_OP, "window_left", left, least=-1), _MOST_TOKENS)
        kept = min(_check.as_integer(_OP, "kept_tokens", kept_tokens), _MOST_TOKENS)
        if kept and left < 0:
            _check.fail(_OP, "kept_tokens", "0 without window_left", kept, "leave it out")
        cap = 0.0 if soft_cap is None else _check.as_number(_OP, "soft_cap", soft_cap)
        if not 0 <= cap < math.inf:
            _check.fail(_OP, "soft_cap", "a finite number from 0, which is none", cap, "correct it")
        if sinks is not None:
            sinks = _check.as_tensor(_OP, "sinks", sinks)
        if alibi_slopes is not None:
            alibi_slopes = _check.as_tensor(_OP, "alibi_slopes", alibi_slopes)
        if not isinstance(return_lse, bool):
            _check.fail(_OP, "return_lse", "True or False", repr(return_lse), "pass one of both")
        if lse is not None:
            lse = _check.as_tensor(_OP, "lse", lse)
        elif return_lse:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        return cls(cu_seqlens_q, max_seqlen_q, left, kept, cap, sinks, alibi_slopes, lse)

    @property
    def plain(self) -> bool:
        """Whether it comes down to nothing, which ``decode`` does."""
        tensors = (self.cu_seqlens_q, self.sinks, self.alibi_slopes, self.lse)
        given = any(tensor is not None for tensor in tensors)
        return not given and self.window_left < 0 and self.soft_cap == 0


@destination_op("attend", mutates=["out", "workspace", "lse"])
def attend(
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
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    window_left: int,
    kept_tokens: int,
    soft_cap: float,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    """Write ``out`` and ``lse``: the arguments of ``decode``, and `Features`."""
    tensors = (q, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens, out)
    optional = {
        "cu_seqlens_q": cu_seqlens_q, "sinks": sinks, "alibi_slopes": alibi_slopes, "lse": lse
    }  # fmt: skip
    scales = _check.tensor_scales(_OP, policy, (k_scale, v_scale), q.device)
    window = _check.given(_check.WINDOW_NAMES, (k_window, v_window, window_slots))

    def check() -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
        return _check_arguments(
            tensors, layout, policy, scales, window, optional, window_left, kept_tokens
        )

    pages = k_cache.shape
    size_of_window = k_window.shape[1:2] if k_window is not None else ()
    # A kernel takes sinks, slopes and lse of any length: which ones are right was checked once.
    lengths = tuple(None if t is None else t.shape[-1:] for t in (sinks, alibi_slopes, lse))
    key = (
        q.shape[1:], pages, out.shape[2:], size_of_window, *lengths, q.dtype, q.device, layout,
        policy,
    )  # fmt: skip
    found = _loaded.get(key)
    if (
        found is None
        or not q.is_cuda
        or block_table.ndim != 2
        or (cu_seqlens_q is None and q.shape[:1] != seq_lens.shape)
        or _check.suspect_rows(q, out, compact=True, apart=True)
        or _check_caches.suspect_caches(k_cache, v_cache, k_meta, v_meta)
        or _check_caches.suspect_window(window)
    ):
        spec, inputs = check()
        if found is None:
            served = functions_on(spec, "cuda" if q.is_cuda else "llvm")
            found = _loaded[key] = (spec, load("attend", spec, q.device), served)
    else:
        caches = _check_caches.kernel_caches((k_cache, v_cache, k_meta, v_meta), scales)
        inputs = (q, *caches, block_table, seq_lens, *window.values())
    spec, loaded, served = found
    tokens, batch = q.shape[0], seq_lens.shape[0]
    if tokens == 0 or batch == 0:
        return
    context = block_table.shape[1] * spec.page_size
    if context == 0 or pages[0] == 0:
        _write_nothing(out, lse, sinks, cu_seqlens_q)
        return
    if max_seq_len is not None:
        context = max(min(context, max_seq_len), 1)
    none = torch.empty(0, dtype=torch.float32, device=q.device)
    features: tuple[torch.Tensor, ...] = (
        none if sinks is None else sinks,
        none if alibi_slopes is None else alibi_slopes,
    )
    written: tuple[torch.Tensor, ...] = (out, none.expand(tokens, 0) if lse is None else lse)
    numbers: tuple[float | int, ...] = (sm_scale, soft_cap, window_left, kept_tokens)
    chunk, floats = None, 0
    if cu_seqlens_q is not None and "prefill" in served:
        # Without a bound, chunks are taken to be alike.
        most = -(-tokens // batch) if max_seqlen_q is None else min(max_seqlen_q, tokens)
        prefill = load("prefill", spec, q.device)
        chunk = choose_prefill(prefill, tokens, batch, context, most)
    # In a window to the left ``decode`` attends to one run of packed tokens: with no kept ones
    # before it, and no unquantised ones behind.
    one_run = window_left < 0 or (kept_tokens == 0 and not spec.window)
    seen = context if window_left < 0 else min(context, window_left + 1)
    alone = cu_seqlens_q is None and one_run and "decode_featured" in served
    if alone and not attends_to_one(spec, seen):
        loaded = load("decode_featured", spec, q.device)
        variant, parts, floats = choose_launch(loaded, batch, seen)
        numbers = (parts, sm_scale, soft_cap, window_left)
    else:
        starts, longest = cu_seqlens_q, max_seqlen_q
        if starts is None:
            starts, longest = _single_starts(batch, q.device), 1
        features = (starts, *features)
        if chunk is not None:
            loaded, (variant, parts) = prefill, chunk
        else:
            variant, parts = choose_attend_launch(loaded, tokens, batch, context, longest)
            floats = attend_floats(spec, tokens, parts, variant.launch)
        numbers = (parts, *numbers)
    if chunk is None:
        if workspace is None:
            scratch = torch.empty(floats, dtype=torch.float32, device=q.device)
        else:
            todo = "allocate paged_decode_workspace_size(..., max_tokens=...) bytes"
            scratch = as_scratch(_OP, workspace, floats, q.device, todo)
        written = (scratch, *written)

    def ordered(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | int | float, ...]:
        return (*inputs[:7], *features, *inputs[7:], *written, *numbers)

    try:
        variant.call(*ordered(inputs))
    except REFUSALS:
        call_again(loaded, variant, ordered(check()[1]))


def _single_starts(batch: int, device: torch.device) -> torch.Tensor:
    """Where the queries of B sequences begin that have one each: B + 1 numbers from 0.

    They are made once for all batches up to a size, and kept for graphs that have seen them. What
    is allocated while a graph is captured has to be its own.
    """
    made = _starts.setdefault(device, [])
    if not made or len(made[-1]) <= batch:
        size = max(1024, 1 << (batch + 1).bit_length())
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return torch.arange(batch + 1, dtype=torch.int32, device=device)
        # A copy from the host is done when it returns, on whichever stream it is used then.
        made.append(torch.arange(size, dtype=torch.int32).to(device))
    return made[-1][: batch + 1]


def _write_nothing(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> None:
    """Results where no sequence can have a token; rows of no sequence are left alone."""
    count = len(out) if starts is None else starts[-1]
    used = (torch.arange(out.shape[0], device=out.device) < count)[:, None]
    out.masked_fill_(used[..., None], 0)
    if lse is not None:
        nothing = torch.full((), -math.inf, device=lse.device) if sinks is None else sinks
        lse.copy_(torch.where(used, nothing, lse))


def _check_arguments(
    tensors: tuple[torch.Tensor, ...],
    layout: str,
    policy: str,
    scales: _check.Scales,
    window: dict[str, torch.Tensor],
    optional: dict[str, torch.Tensor | None],
    window_left: int,
    kept_tokens: int,
) -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
    """Check everything but the workspace; return the spec and the kernel's input tensors.

    Those are q, caches, table and lengths, then the window's.
    """
    q, k_cache, table, lens, out = (tensors[i] for i in (0, 1, 5, 6, 7))
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    starts = given.get("cu_seqlens_q")
    spec, inputs = check_attention(
        _OP, "attend", tensors, layout, policy, scales, window, given, ragged=starts is not None
    )
    tokens, heads = q.shape[:2]
    batch = lens.shape[0]
    if starts is not None:
        _check.check_index(_OP, "cu_seqlens_q", starts, "[B + 1]", (batch + 1,), torch.int32)
    for name in ("sinks", "alibi_slopes"):
        if name in given:
            _check.check_index(_OP, name, given[name], "[HQ]", (heads,), torch.float32)
    if "lse" in given:
        lse = given["lse"]
        _check.check_index(_OP, "lse", lse, "[T, HQ]", (tokens, heads), torch.float32)
        _check.check_apart(_OP, {"q": q, "out": out, "lse": lse})
    if q.device.type == "cpu" and batch:
        _values.check_lengths(_OP, lens, table.shape[1] * spec.page_size)
        if starts is None:
            counts = torch.ones_like(lens)
        else:
            counts = _values.check_query_starts(_OP, starts, tokens, "cu_seqlens_q")
            _values.check_new_tokens(_OP, counts, lens)
        first = torch.zeros_like(lens)
        seen = torch.where(counts > 0, lens, 0)
        if window_left >= 0:
            low = (lens - counts - window_left).clamp_min(0)
            kept = torch.minimum(low, torch.full_like(low, kept_tokens)).minimum(seen)
            _values.check_table(_OP, table, first, kept, spec.page_size, k_cache.shape[0])
            first = low
        _values.check_table(_OP, table, first, seen, spec.page_size, k_cache.shape[0])
        _values.check_rings(_OP, inputs[7:])
    return spec, inputs
