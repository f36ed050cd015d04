"""How anything is timed here: median over launches that each start from a cold, clean L2.

On a GPU, events around one launch; on a CPU, the wall clock around one call; before each, a buffer
larger than any cache is read. Were it written, what a cache keeps of it would have to go to memory
first: on an H100 that adds 10 us to whatever reads 428 MB (torch's maximum of as many bytes: 159 us
instead of 149), and serving has its weights there before attention, which are read, too.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["capture", "copy_tb_per_s", "time_us"]

_FLUSH_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    words = _FLUSH_BYTES[device.type] // 4
    return torch.zeros(words, dtype=torch.int32, device=device)


def time_us(
    call: Callable[[], object],
    device: torch.device,
    *,
    launches: int = 50,
    warmup: int = 3,
    seconds: float = 10.0,
) -> float:
    """Median time of ``call`` in us, L2 cold; fewer launches where ``seconds`` run out."""
    for _ in range(warmup):
        call()
    flush = _flush_buffer(device)
    times = []
    deadline = time.monotonic() + seconds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        pairs = []
        for _ in range(launches):
            torch.amax(flush)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
            if len(pairs) % 10 == 0:
                torch.cuda.synchronize(device)
                if time.monotonic() > deadline:
                    break
        torch.cuda.synchronize(device)
        times = [start.elapsed_time(end) * 1e3 for start, end in pairs]
    else:
        for _ in range(launches):
            torch.amax(flush)
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e6)
            if time.monotonic() > deadline:
                break
    return statistics.median(times)


def capture(call: Callable[[], object]) -> Callable[[], None]:
    """Capture ``call`` in a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_tb_per_s(device: torch.device) -> float:
    """Copy bandwidth, bytes read plus bytes written, of a buffer several times the L2."""
    source = torch.empty(
        1 << (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device
    )
    source.zero_()
    target = torch.empty_like(source)
    us = time_us(lambda: target.copy_(source), device, launches=30)
    return 2 * source.numel() / us / 1e6
