"""The last round of a search: its best records beside the default, built as they ship."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tvm.s_tir import Trace

from tq_tvm import schedules
from tq_tvm.bench.timing import time_us
from tq_tvm.build.compile import compile_library
from tq_tvm.build.occupancy import with_occupancy
from tq_tvm.targets import TargetInfo
from tq_tvm.tuning.candidates import checked_call
from tq_tvm.tuning.inputs import make_case
from tq_tvm.tuning.workloads import Workload

__all__ = ["Finalist", "compare", "time_in_rounds"]

_log = logging.getLogger("tq_tvm")

_ROUNDS = 7
_LAUNCHES = 10
_SECONDS = 0.5
"""Of each finalist in each round."""


@dataclasses.dataclass(frozen=True)
class Finalist:
    """One kernel that is right, and its time."""

    trace: Trace
    config: dict[str, int]
    us: float
    error: float
    versions: dict[str, str]


def compare(
    workload: Workload,
    target: TargetInfo,
    device: torch.device,
    traces: Sequence[Trace],
    seed: int,
) -> list[Finalist]:
    """Build, check and time kernels; the first trace is the default's, and so is the first result.

    A kernel that cannot be built or is wrong is left out with a warning, unless it is the default.
    Traces with the same decisions count once.
    """
    case = make_case(workload, device, seed)
    pending: list[tuple[Trace, schedules.Instance, Path, concurrent.futures.Future]] = []
    right: list[tuple[Callable[[], None], Finalist]] = []
    with (
        tempfile.TemporaryDirectory(prefix="tq_tvm_final_") as scratch,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        for number, trace in enumerate(traces):
            with _left_out(workload, required=number == 0):
                instance = schedules.instantiate(
                    workload.function, workload.spec, target.kind, trace
                )
                if any(instance.config == other.config for _, other, _, _ in pending):
                    continue
                path = Path(scratch) / f"{number}.so"
                built = pool.submit(compile_library, {"main": instance.func}, target, path)
                pending.append((trace, instance, path, built))
        for trace, instance, path, built in pending:
            with _left_out(workload, required=trace is traces[0]):
                result = built.result()
                launch = with_occupancy(instance.launch, "main", target.arch, result.resources)
                call, error = checked_call(path, case, launch)
                right.append((call, Finalist(trace, instance.config, 0.0, error, result.versions)))
        times = time_in_rounds([call for call, _ in right], device)
    return [
        dataclasses.replace(finalist, us=us) for (_, finalist), us in zip(right, times, strict=True)
    ]


@contextlib.contextmanager
def _left_out(workload: Workload, *, required: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if required:
            raise
        _log.warning("tune: %s goes on without one of its finalists: %s", workload.label, error)


def time_in_rounds(calls: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
    """Time of each call in us: the median over rounds, each of which times all of them.

    A clock that drifts then meets all alike.
    """
    rounds = [
        [time_us(call, device, launches=_LAUNCHES, seconds=_SECONDS) for call in calls]
        for _ in range(_ROUNDS)
    ]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
