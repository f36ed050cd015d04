"""What is timed: calls of the public operations on valid inputs, and torch's way of doing the same.

A baseline of torch works on the dense data of the model's dtype: what a server without this cache
would do in its place. On a CPU those of ``rotate`` and ``fill`` do the same steps (`steps`). Other
programs, where they are installed, are in `tq_tvm.bench.peers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from tq_tvm.bench.baseline import Baseline
from tq_tvm.bench.peers import DecodeInputs, LatentInputs, decode_peers, mla_peers, rotate_peers
from tq_tvm.bench.steps import fill_steps, rotate_steps
from tq_tvm.bench.workloads import Workload
from tq_tvm.ops import (
    PagedKVCache,
    hadamard_rotate,
    mla_decode,
    paged_decode_workspace_size,
)
from tq_tvm.served import attends_to_one, functions_on, gpus_decode
from tq_tvm.spec import CacheSpec

__all__ = ["Case", "make_case"]

_SCALE_SPREAD = 0.1
_WINDOW = 4096
_FUSED_DIM = 256


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload's call, the bytes it has to move, and who else does it.

    ``function``, ``size`` and, of ``attend``, the ``rows`` of a sequence's queries say which
    compiled variant serves the call. A function of ``peers``
    brings the inputs into a program's form and checks its result; what it raises is why the
    program cannot be timed.
    """

    call: Callable[[], object]
    bytes: int
    function: str
    size: int
    baselines: dict[str, Baseline]
    peers: dict[str, Callable[[], Baseline]] = dataclasses.field(default_factory=dict)
    rows: int | None = None


def make_case(
    workload: Workload, device: torch.device, seed: int = 0, *, compare: bool = False
) -> Case:
    """Allocate a workload's tensors on a device; ``compare`` adds peers with caches."""
    torch.manual_seed(seed)
    makers = {
        "rotate": _rotate,
        "fill": _fill,
        "flatten": _flatten,
        "decode": _decode,
        "attend": _attend,
        "prefill": _attend,
        "mla": _mla,
    }
    case = makers[workload.kernel](workload, device)
    # The rotation's peer costs nothing where it is missing; those of decode fill whole caches.
    return case if compare or workload.kernel == "rotate" else dataclasses.replace(case, peers={})


def _rotate(workload: Workload, device: torch.device) -> Case:
    spec = workload.spec.rotation
    dtype = getattr(torch, spec.dtype)
    x = torch.randn(workload.batch, spec.dim, device=device, dtype=dtype)
    out = torch.empty_like(x)
    moved = 2 * x.numel() * x.element_size()
    copy = {"torch copy": lambda: out.copy_(x)}
    calls = copy if device.type == "cuda" else rotate_steps(x, out)
    return Case(
        call=lambda: hadamard_rotate(x, out=out),
        bytes=moved,
        function="rotate",
        size=x.numel(),
        baselines={name: Baseline(call, moved) for name, call in calls.items()},
        peers=rotate_peers(x),
    )


def _pages(workload: Workload, device: torch.device) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Number of pages, a permuted block table, and lengths."""
    width = -(-workload.context // workload.cache_spec.page_size)
    pages = workload.batch * width
    table = torch.randperm(pages, device=device).int().view(workload.batch, width)
    lengths = torch.full((workload.batch,), workload.context, dtype=torch.int32, device=device)
    if workload.shortest is not None:
        ratio = workload.shortest / workload.context
        lengths = (lengths * ratio ** torch.rand(workload.batch, device=device)).int()
    return pages, table, lengths


def _random_cache(
    spec: CacheSpec, pages: int, device: torch.device, batch: int = 0
) -> PagedKVCache:
    """Codes are uniform, scales those of Gaussian rows: every program takes the same time.

    A spec with a window gets a ring for each of ``batch`` sequences.
    """
    cache = PagedKVCache(spec, pages, device, sequences=batch if spec.window else 0)
    for ring in cache.window() or ():
        ring.normal_()
    fmt, root = spec.cache_format, spec.head_dim**0.5
    sides = (fmt.key, cache.k_cache, cache.k_meta), (fmt.value, cache.v_cache, cache.v_meta)
    for codec, codes, metas in sides:
        if not codec.packed:
            codes.normal_()
            continue
        # Of fp8 positive numbers below 448: no code is what is no number.
        codes.random_(0, 127 if codec.tensor_scale else 256)
        if codec.family == "affine":
            levels = 2**codec.bits - 1
            metas[..., 0].uniform_(6 / levels * (1 - _SCALE_SPREAD), 6 / levels)
            metas[..., 1] = levels / 2
            continue
        metas.uniform_(root * (1 - _SCALE_SPREAD), root * (1 + _SCALE_SPREAD))
        metas[..., 1:] *= 0.18 / spec.head_dim
    return cache


def _dense_bytes(spec: CacheSpec) -> int:
    """One K and one V row of the model."""
    return 2 * spec.head_dim * getattr(torch, spec.dtype).itemsize


def _more_bytes(spec: CacheSpec) -> int:
    """What a row of a window has beyond its packed form."""
    return _dense_bytes(spec) - spec.bytes_per_token_head


def _rings(spec: CacheSpec, batch: int, device: torch.device) -> torch.Tensor | None:
    """The ring of each sequence, of a spec with a window."""
    return torch.randperm(batch, device=device).int() if spec.window else None


def _row_bytes(spec: CacheSpec) -> int:
    """One K and one V row of the model, and their packed form."""
    return _dense_bytes(spec) + spec.bytes_per_token_head


def _fill(workload: Workload, device: torch.device) -> Case:
    spec, tokens = workload.cache_spec, workload.batch * workload.context
    pages, table, lengths = _pages(workload, device)
    cache = PagedKVCache(spec, pages, device)
    shape = (tokens, spec.num_kv_heads, spec.head_dim)
    dtype = getattr(torch, spec.dtype)
    k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    starts = torch.arange(workload.batch + 1, device=device, dtype=torch.int32) * workload.context
    starts = starts.int()
    capacity = pages * spec.page_size
    slots = torch.randperm(capacity, device=device)[:tokens]
    # The same rows into a paged cache of the model's dtype.
    dense = torch.empty((2, capacity, *shape[1:]), device=device, dtype=dtype)

    def scatter() -> None:
        dense[0].index_copy_(0, slots, k)
        dense[1].index_copy_(0, slots, v)

    if workload.context == 1:
        function = "fill_slots"

        def call() -> None:
            cache.fill(k, v, slot_mapping=slots)

    else:
        function = "fill_table"

        def call() -> None:
            cache.fill(k, v, block_table=table, seq_lens=lengths, q_start_loc=starts)

    calls = (
        {"torch index_copy, dense": scatter}
        if device.type == "cuda"
        else fill_steps(cache, k, v, slots)
    )
    moved = 2 * tokens * spec.num_kv_heads * _dense_bytes(spec)
    return Case(
        call=call,
        bytes=tokens * spec.num_kv_heads * _row_bytes(spec),
        function=function,
        size=k.numel(),
        baselines={name: Baseline(torch_call, moved) for name, torch_call in calls.items()},
    )


def _flatten(workload: Workload, device: torch.device) -> Case:
    spec, tokens = workload.cache_spec, workload.batch * workload.context
    pages, table, lengths = _pages(workload, device)
    cache = _random_cache(spec, pages, device)
    shape = (tokens, spec.num_kv_heads, spec.head_dim)
    dtype = getattr(torch, spec.dtype)
    out = (
        torch.empty(shape, device=device, dtype=dtype),
        torch.empty(shape, device=device, dtype=dtype),
    )
    starts = (lengths.cumsum(0) - lengths).int()
    dense = torch.zeros((2, pages, spec.page_size, *shape[1:]), device=device, dtype=dtype)
    order = table.flatten().long()

    def gather() -> None:
        for source, target in zip(dense, out, strict=True):
            torch.index_select(source, 0, order, out=target.view(pages, *source.shape[1:]))

    return Case(
        call=lambda: cache.flatten(
            table,
            lengths,
            out_tokens=tokens,
            start_loc=starts,
            rotate_back=workload.rotate_back,
            out=out,
        ),
        bytes=tokens * spec.num_kv_heads * _row_bytes(spec),
        function="flatten_unrotated" if workload.rotate_back else "flatten",
        size=out[0].numel(),
        baselines={
            "torch index_select, dense": Baseline(
                gather, 2 * tokens * spec.num_kv_heads * _dense_bytes(spec)
            )
        },
    )


def _decode(workload: Workload, device: torch.device) -> Case:
    spec, batch = workload.cache_spec, workload.batch
    pages, table, lengths = _pages(workload, device)
    cache = _random_cache(spec, pages, device, batch)
    dtype = getattr(torch, spec.dtype)
    q = torch.randn(batch, spec.num_q_heads, spec.head_dim, device=device, dtype=dtype)
    out = torch.empty_like(q)
    size = paged_decode_workspace_size(spec, batch, workload.context, device)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    inputs = DecodeInputs(spec, cache, q, table, lengths)
    baselines = {}
    # Of longer rows torch has no fused attention: it would repeat K and V for all query heads.
    if workload.shortest is None and spec.head_dim <= _FUSED_DIM:
        shape = (2, batch, spec.num_kv_heads, workload.context, spec.head_dim)
        k, v = torch.randn(shape, device=device, dtype=dtype)
        query = q.view(batch, spec.num_q_heads, 1, spec.head_dim)
        # On lengths that differ, torch would have to pad.
        baselines["torch sdpa, dense"] = Baseline(
            lambda: F.scaled_dot_product_attention(query, k, v, enable_gqa=True),
            inputs.traffic(_dense_bytes(spec)),
        )
    codecs = spec.cache_format.key, spec.cache_format.value
    rings = _rings(spec, batch, device)
    dense = int(lengths.clamp(max=spec.window).sum()) * spec.num_kv_heads
    decodes = gpus_decode(*codecs, spec.head_dim, spec.value_dim)
    decodes = decodes and not attends_to_one(spec, workload.context)
    by_attend = device.type == "cuda" and not decodes
    return Case(
        call=lambda: cache.decode(
            q, table, lengths, out=out, workspace=workspace, window_slots=rings
        ),
        bytes=inputs.traffic(spec.bytes_per_token_head) + dense * _more_bytes(spec),
        function="attend" if by_attend else "decode",
        rows=spec.group_size if by_attend else None,
        size=batch * spec.num_kv_heads * table.shape[1] * spec.page_size * spec.head_dim,
        baselines=baselines,
        # No other program keeps a window.
        peers={} if spec.window else decode_peers(inputs),
    )


def _attend(workload: Workload, device: torch.device) -> Case:
    spec, batch, new = workload.cache_spec, workload.batch, workload.new_tokens
    pages, table, lengths = _pages(workload, device)
    cache = _random_cache(spec, pages, device, batch)
    dtype = getattr(torch, spec.dtype)
    tokens, heads = batch * new, spec.num_q_heads
    q = torch.randn(tokens, heads, spec.head_dim, device=device, dtype=dtype)
    starts = (torch.arange(batch + 1, device=device) * new).int()
    choices: dict[str, dict[str, Any]] = {
        "": {},
        "lse": {"lse": torch.empty(tokens, heads, device=device)},
        "soft cap": {"soft_cap": 30.0},
        "sinks": {"sinks": torch.zeros(heads, device=device)},
        "ALiBi": {"alibi_slopes": torch.full((heads,), 2.0**-10, device=device)},
        "window of 4096": {"window_left": _WINDOW - 1},
    }
    features = choices[workload.feature]
    out = torch.empty_like(q)
    size = paged_decode_workspace_size(spec, batch, workload.context, device, max_tokens=tokens)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    seen = min(workload.context, _WINDOW) if "window_left" in features else workload.context
    rows = batch * seen * spec.num_kv_heads
    dense = batch * min(seen, spec.window) * spec.num_kv_heads
    queries = 2 * q.numel() * q.element_size()
    baselines = {}
    if not features:
        shape = (2, batch, spec.num_kv_heads, workload.context, spec.head_dim)
        k, v = torch.randn(shape, device=device, dtype=dtype)
        query = q.view(batch, new, heads, spec.head_dim).transpose(1, 2)
        mask = causal_lower_right(new, workload.context)
        baselines["torch sdpa, dense"] = Baseline(
            lambda: F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True),
            rows * _dense_bytes(spec) + queries,
        )
    # A plain token a sequence is decode's, but for the starts.
    if new > 1 or not features:
        features = {**features, "cu_seqlens_q": starts, "max_seqlen_q": new}
    features["window_slots"] = _rings(spec, batch, device)
    single = "cu_seqlens_q" not in features
    bent = single and "decode_featured" in functions_on(spec, device.type)
    return Case(
        call=lambda: cache.decode(q, table, lengths, out=out, workspace=workspace, **features),
        bytes=rows * spec.bytes_per_token_head + dense * _more_bytes(spec) + queries,
        function="decode_featured" if bent else workload.kernel,
        rows=None if bent or workload.kernel == "prefill" else new * spec.group_size,
        size=tokens * spec.num_kv_heads * seen * spec.head_dim,
        baselines=baselines,
    )


def _mla(workload: Workload, device: torch.device) -> Case:
    spec, batch = workload.cache_spec, workload.batch
    pages, table, lengths = _pages(workload, device)
    cache = _random_cache(spec, pages, device)
    dtype = getattr(torch, spec.dtype)
    dims, heads = (spec.head_dim, spec.value_dim), spec.num_q_heads
    queries = [torch.randn(batch, heads, dim, device=device, dtype=dtype) for dim in dims]
    out = torch.empty_like(queries[0])
    # A latent is key and value; all heads share it, as query tokens of one head would.
    rows = torch.randn(batch, 1, workload.context, sum(dims), device=device, dtype=dtype)
    query = torch.cat(queries, dim=-1)
    scale = 192**-0.5

    def dense() -> torch.Tensor:
        values = rows[..., : spec.head_dim]
        return F.scaled_dot_product_attention(query[:, None], rows, values, scale=scale)

    inputs: tuple[Any, ...] = (*queries, *cache.tensors(), table, lengths)
    moved = 2 * out.numel() * out.element_size() + queries[1].numel() * out.element_size()
    # The pages of a peer are those of torch, each sequence's one after another.
    peers = {}
    if workload.context % spec.page_size == 0:
        paged = rows.view(-1, spec.page_size, 1, sum(dims))
        order = torch.arange(len(paged), device=device, dtype=torch.int32).view(batch, -1)
        peers = mla_peers(LatentInputs(query, spec.head_dim, paged, order, lengths, scale))
    return Case(
        call=lambda: mla_decode(*inputs, sm_scale=scale, policy=spec.format, out=out),
        bytes=batch * workload.context * spec.bytes_per_token + moved,
        function="mla",
        size=batch * table.shape[1] * spec.page_size * spec.head_dim,
        baselines={
            "torch sdpa, dense": Baseline(dense, rows.numel() * rows.element_size() + moved)
        },
        peers=peers,
    )
