"""What an eager call costs the host: everything before the kernel runs on its own.

Calls are made in torch's inference mode, as engines make them: without it a view of a tensor takes
twice as long. On a GPU a call returns once the kernel is launched, so a batch of calls that the
launch queue holds is timed without waiting. On a CPU the kernel runs within the call, and the
arguments are checked in full, which a GPU's kernel does itself; inputs are as small as they can be,
and the kernel alone is timed beside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch

from tq_tvm import ops
from tq_tvm.artifacts import LoadedVariant
from tq_tvm.ops import PagedKVCache, paged_decode_workspace_size
from tq_tvm.spec import CacheSpec

__all__ = ["HostCost", "host_costs"]

_BATCH = 100
"""Calls between two waits: a GPU queues several times as many launches."""


class HostCost(NamedTuple):
    """Times of one call in microseconds.

    Parameters
    ----------
    call
        The public function.
    kernel
        The kernel's function in the library, with the same arguments: on a GPU its launch.
    through_torch
        The public function where the registered torch op is called, as under ``torch.compile``.
    """

    name: str
    call: float
    kernel: float
    through_torch: float


@torch.inference_mode()
def host_costs(spec: CacheSpec, device: torch.device, batches: int = 50) -> Iterator[HostCost]:
    """Time each call; medians over batches.

    Raises
    ------
    ArtifactNotFoundError, ArtifactCorruptError
        No library serves a call.
    """
    for name, (module, call) in _calls(spec, device).items():
        call()
        kernel = _kernel_call(module, call)
        with _through_torch():
            through = _time_us(call, device, batches)
        yield HostCost(
            name, _time_us(call, device, batches), _time_us(kernel, device, batches), through
        )


def _calls(
    spec: CacheSpec, device: torch.device
) -> dict[str, tuple[ModuleType, Callable[[], object]]]:
    """Calls for one token, each with the module that calls its kernel."""
    dtype = getattr(torch, spec.dtype)
    cache = PagedKVCache(spec, 2, device)
    tensors = cache.tensors()
    rows = torch.zeros(1, spec.num_kv_heads, spec.head_dim, dtype=dtype, device=device)
    k, v = rows, rows.clone()
    flat, turned = rows[0], torch.empty_like(rows[0])
    q = torch.zeros(1, spec.num_q_heads, spec.head_dim, dtype=dtype, device=device)
    out = torch.empty_like(q)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    lengths = torch.ones(1, dtype=torch.int32, device=device)
    starts, slots = torch.zeros_like(lengths), torch.zeros(1, dtype=torch.int64, device=device)
    size = paged_decode_workspace_size(spec, 1, spec.page_size, device)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    pair = (torch.empty_like(rows), torch.empty_like(rows))
    return {
        "hadamard_rotate": (ops.rotate, lambda: ops.hadamard_rotate(flat, out=turned)),
        "fill_kv_cache": (
            ops.fill,
            lambda: ops.fill_kv_cache(k, v, *tensors, slot_mapping=slots, layout=spec.layout),
        ),
        "flatten_kv_cache": (
            ops.flatten,
            lambda: ops.flatten_kv_cache(
                *tensors,
                table,
                lengths,
                out_tokens=1,
                start_loc=starts,
                layout=spec.layout,
                out=pair,
            ),
        ),
        "paged_decode": (
            ops.decode,
            lambda: ops.paged_decode(
                q, *tensors, table, lengths, layout=spec.layout, out=out, workspace=workspace
            ),
        ),
    }


def _kernel_call(module: ModuleType, call: Callable[[], object]) -> Callable[[], object]:
    """What ``call`` comes down to, with its arguments."""
    seen: list[tuple[Callable[..., object], tuple]] = []

    def recording(kernel: Callable[..., object]) -> Callable[..., object]:
        def record(*arguments: object) -> object:
            seen.append((kernel, arguments))
            return kernel(*arguments)

        return record

    kernels = [(variant, variant.call) for variant in _variants(module)]
    try:
        for variant, kernel in kernels:
            object.__setattr__(variant, "call", recording(kernel))
        call()
    finally:
        for variant, kernel in kernels:
            object.__setattr__(variant, "call", kernel)
    ((launch, given),) = seen
    return lambda: launch(*given)


def _variants(module: ModuleType) -> Iterator[LoadedVariant]:
    """All that the calls of a module have loaded."""
    for found in module._loaded.values():
        yield from getattr(found, "loaded", found).variants


@contextmanager
def _through_torch() -> Iterator[None]:
    """Let calls take the way that `torch.compile` traces."""
    original = torch.compiler.is_compiling
    torch.compiler.is_compiling = lambda: True
    try:
        yield
    finally:
        torch.compiler.is_compiling = original


def _time_us(call: Callable[[], object], device: torch.device, batches: int) -> float:
    times = []
    for number in range(batches + 3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(_BATCH):
            call()
        if number >= 3:
            times.append((time.perf_counter() - begin) / _BATCH * 1e6)
    return statistics.median(times)
