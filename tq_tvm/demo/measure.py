"""Errors of the batch's cache, and times of the calls beside torch's way of doing the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tq_tvm import reference
from tq_tvm.artifacts import LoadedVariant, load
from tq_tvm.bench.timing import time_us
from tq_tvm.demo.batch import Batch
from tq_tvm.ops import hadamard_rotate
from tq_tvm.quality.theory import expected_distortion

__all__ = ["Call", "Errors", "calls", "measure_errors", "time_call"]

_SECONDS = 1.0
"""Time for each measured call: the median of about 50 launches on most machines."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """What quantisation, and what the kernels, change.

    Distortions are relative squared errors of a row, in the mean over rows: measured, and by
    theory for Gaussian rows. Attention errors are relative, of float32 attention over the
    unquantised rows and over the dequantised cache: of all sequences, and of the worst.
    """

    k_gaussian: float
    k_offset: float | None
    v: float
    k_theory: float
    v_theory: float
    attention_unquantised: tuple[float, float]
    attention_dequantised: tuple[float, float]


def _distortion(rows: torch.Tensor, restored: torch.Tensor) -> float:
    error = (restored.float() - rows.float()).square().sum(-1)
    return float((error / rows.float().square().sum(-1)).mean())


def _relative(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """(error over all sequences, error of the worst sequence), by the Euclidean norm."""
    error, size = (got.float() - want).flatten(1), want.flatten(1)
    worst = (error.norm(dim=1) / size.norm(dim=1)).max()
    return float(error.norm() / size.norm()), float(worst)


def measure_errors(batch: Batch) -> Errors:
    """Flatten and decode the filled cache, and compare with the rows and with float32 attention."""
    spec, cache = batch.spec, batch.cache
    k, v = cache.flatten(
        batch.block_table, batch.seq_lens, out_tokens=len(batch.k), rotate_back=True
    )
    heads = batch.gaussian_heads
    out = cache.decode(batch.q, batch.block_table, batch.seq_lens)
    dequantised = reference.paged_decode(
        spec, batch.q, *cache.tensors(), batch.block_table, batch.seq_lens
    )
    sequences = zip(
        batch.q, batch.k.split(batch.lengths), batch.v.split(batch.lengths), strict=True
    )
    unquantised = torch.stack([reference.attention(*sequence) for sequence in sequences])
    some_offset = heads < spec.num_kv_heads
    return Errors(
        k_gaussian=_distortion(batch.k[:, :heads], k[:, :heads]),
        k_offset=_distortion(batch.k[:, heads:], k[:, heads:]) if some_offset else None,
        v=_distortion(batch.v, v),
        k_theory=expected_distortion(spec.cache_format.key),
        v_theory=expected_distortion(spec.cache_format.value),
        attention_unquantised=_relative(out, unquantised),
        attention_dequantised=_relative(out, dequantised),
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a kernel on the batch, the variant that serves it, and torch's ways to do it."""

    name: str
    variant: LoadedVariant
    run: Callable[[], object]
    torch: dict[str, Callable[[], object]]


def time_call(call: Call, device: torch.device) -> tuple[float, str, float]:
    """(us of the call, torch's fastest way, us of that)."""
    us = time_us(call.run, device, seconds=_SECONDS)
    ways = {name: time_us(way, device, seconds=_SECONDS) for name, way in call.torch.items()}
    fastest = min(ways, key=lambda name: ways[name])
    return us, fastest, ways[fastest]


def calls(batch: Batch) -> list[Call]:
    """Every kernel on the batch, outputs and workspace allocated before."""
    spec, cache, device = batch.spec, batch.cache, batch.cache.device
    row = spec.num_kv_heads * spec.head_dim

    def variant(function: str, size: int, sequences: int | None = None) -> LoadedVariant:
        return load(function, spec.relevant_to(function), device).nearest(size, sequences)

    rotated = torch.empty_like(batch.k)
    matrix = reference.hadamard_matrix(spec.head_dim, device).to(batch.k.dtype)
    prefill, append = batch.prefill_arguments(), batch.append_arguments()
    prefill_slots = batch.slots[batch.prefill_rows()]
    flat = (torch.empty_like(batch.k), torch.empty_like(batch.v))
    starts = (batch.seq_lens.cumsum(0) - batch.seq_lens).int()
    out = torch.empty_like(batch.q)
    capacity = batch.block_table.shape[1] * spec.page_size
    workspace = torch.empty(
        cache.workspace_size(len(batch.q), capacity), dtype=torch.uint8, device=device
    )
    # The same rows in a paged cache of the model's dtype.
    dense = torch.empty(
        (2, cache.num_pages * spec.page_size, *batch.k.shape[1:]),
        dtype=batch.k.dtype,
        device=device,
    )

    def scatter(rows: dict[str, torch.Tensor], slots: torch.Tensor) -> None:
        dense[0].index_copy_(0, slots, rows["k"])
        dense[1].index_copy_(0, slots, rows["v"])

    def gather() -> None:
        for source, target in zip(dense, flat, strict=True):
            torch.index_select(source, 0, batch.slots, out=target)

    return [
        Call(
            "rotate",
            variant("rotate", batch.k.numel()),
            lambda: hadamard_rotate(batch.k, out=rotated),
            {"matmul with H": lambda: torch.matmul(batch.k, matrix, out=rotated)},
        ),
        Call(
            "fill, prefill",
            variant("fill_table", max(prefill["k"].numel(), 1)),
            lambda: cache.fill(**prefill),
            {"index_copy": lambda: scatter(prefill, prefill_slots)},
        ),
        Call(
            "fill, append",
            variant("fill_slots", append["k"].numel()),
            lambda: cache.fill(**append),
            {"index_copy": lambda: scatter(append, append["slot_mapping"])},
        ),
        Call(
            "flatten",
            variant("flatten", len(batch.k) * row),
            lambda: cache.flatten(
                batch.block_table,
                batch.seq_lens,
                out_tokens=len(batch.k),
                start_loc=starts,
                out=flat,
            ),
            {"index_select": gather},
        ),
        Call(
            "decode",
            variant("decode", len(batch.q) * capacity * row, len(batch.q)),
            lambda: cache.decode(
                batch.q, batch.block_table, batch.seq_lens, out=out, workspace=workspace
            ),
            _dense_attention(batch),
        ),
    ]


def _dense_attention(batch: Batch) -> dict[str, Callable[[], object]]:
    """Ways of torch's attention over dense rows: what lies how in memory is made ready before.

    A decode step has no causal mask, so the query heads of a group may as well be query rows.
    """
    spec = batch.spec
    heads, dim, longest = spec.num_kv_heads, spec.head_dim, max(batch.lengths)
    sides = []
    for rows in (batch.k, batch.v):
        sides.append([x.transpose(0, 1)[None].contiguous() for x in rows.split(batch.lengths)])
    padded = torch.zeros(
        (2, len(batch.q), heads, longest, dim), dtype=batch.k.dtype, device=batch.k.device
    )
    for side, sequences in zip(padded, sides, strict=True):
        for target, rows in zip(side, sequences, strict=True):
            target[:, : rows.shape[2]] = rows[0]
    mask = torch.arange(longest, device=batch.k.device) < batch.seq_lens[:, None]
    mask = mask[:, None, None]
    k, v = padded
    grouped = batch.q.view(len(batch.q), heads, -1, dim)
    single = batch.q[:, :, None]

    def loop(q: torch.Tensor, gqa: bool) -> None:
        for i, (k_rows, v_rows) in enumerate(zip(*sides, strict=True)):
            F.scaled_dot_product_attention(q[i : i + 1], k_rows, v_rows, enable_gqa=gqa)

    return {
        "sdpa a sequence": lambda: loop(single, True),
        "sdpa a sequence, group as rows": lambda: loop(grouped, False),
        "sdpa padded": lambda: F.scaled_dot_product_attention(
            single, k, v, attn_mask=mask, enable_gqa=True
        ),
        "sdpa padded, group as rows": lambda: F.scaled_dot_product_attention(
            grouped, k, v, attn_mask=mask
        ),
    }
