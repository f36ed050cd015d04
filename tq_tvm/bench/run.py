"""Time the rows of `tq_tvm.bench.workloads`: tuned, default, baselines and peers in turn."""

from __future__ import annotations

import contextlib
import gc
import logging
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tq_tvm import env, ops
from tq_tvm._version import __version__
from tq_tvm.artifacts import load
from tq_tvm.bench.baseline import Baseline
from tq_tvm.bench.cases import make_case
from tq_tvm.bench.results import Row
from tq_tvm.bench.timing import capture, copy_tb_per_s, time_us
from tq_tvm.bench.workloads import Workload
from tq_tvm.errors import ArtifactNotFoundError
from tq_tvm.targets import cpu_threads, driver_version

__all__ = ["conditions", "run_rows"]

_log = logging.getLogger("tq_tvm")


@contextlib.contextmanager
def _libraries(root: Path) -> Iterator[None]:
    """Let calls find the libraries below ``root`` alone."""
    with env.only_artifact_dir(root):
        ops.clear_cache()
        try:
            yield
        finally:
            ops.clear_cache()


def _time(call: Callable[[], object], device: torch.device, graph: bool, launches: int) -> float:
    call()  # loads the library, which a capture must not
    return time_us(capture(call) if graph else call, device, launches=launches)


def _time_peer(
    make: Callable[[], Baseline], device: torch.device, graph: bool, launches: int
) -> tuple[float, int, dict[str, str]]:
    """Time in us, bytes and versions of a peer, whose caches end with this call."""
    baseline = make()
    return (
        _time(baseline.call, device, graph, launches),
        baseline.bytes,
        baseline.versions,
    )


def _why_absent(name: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    level = logging.INFO if isinstance(error, ImportError) else logging.WARNING
    _log.log(level, "bench: %s is left out: %s", name, reason)
    return reason


def conditions(device: torch.device) -> dict[str, str]:
    """Say what a time was measured on."""
    facts = {"tq_tvm": __version__, "torch": str(torch.__version__), "cache": "L2 cold and clean"}
    if device.type == "cpu":
        return {"device": platform.processor() or platform.machine(), **facts} | {
            "threads": str(cpu_threads())
        }
    return {"device": torch.cuda.get_device_name(device), "driver": driver_version(), **facts}


def run_rows(
    rows: list[Workload],
    device: torch.device,
    *,
    defaults: Path | None = None,
    compare: bool = False,
    launches: int = 50,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measure rows one after another.

    Parameters
    ----------
    rows
        What to measure.
    device
        Where.
    defaults
        Directory of libraries with the default schedules (``tq-tvm build --no-records``); None
        leaves ``default_us`` out.
    compare
        Time other programs' decode too, where they are installed.
    launches
        Launches of each median.
    report
        Called with every finished row.

    Raises
    ------
    ArtifactNotFoundError, ArtifactCorruptError
        No library serves a row; nothing is skipped.
    """
    copy = copy_tb_per_s(device)
    facts = conditions(device)
    done = []
    for workload in rows:
        case = make_case(workload, device, compare=compare)
        loaded = load(case.function, workload.spec, device)
        if case.rows is not None and device.type == "cuda":
            loaded = loaded.of_rows(case.rows)
        variant = loaded.nearest(case.size, workload.batch)
        us = _time(case.call, device, workload.graph, launches)
        default_us = None
        if defaults is not None:
            with _libraries(defaults):
                try:
                    # A workspace sized for one library may be too small for another.
                    plain = make_case(workload, device)
                    default_us = _time(plain.call, device, workload.graph, launches)
                    del plain
                except ArtifactNotFoundError as error:
                    _log.warning("no default library: %s", str(error).splitlines()[0])
        times: dict[str, float] = {}
        moved: dict[str, int] = {}
        absent: dict[str, str] = {}
        versions: dict[str, str] = {}
        for name, baseline in case.baselines.items():
            try:
                times[name] = _time(baseline.call, device, workload.graph, launches)
            # Beside its dense rows a small GPU may have no memory for torch's scores.
            except torch.OutOfMemoryError as error:
                absent[name] = _why_absent(name, error)
            else:
                moved[name] = baseline.bytes
        for name, make in case.peers.items():
            try:
                timed = _time_peer(make, device, workload.graph, launches)
            # Another program may fail in any way, and the rows are not about it.
            except Exception as error:
                absent[name] = _why_absent(name, error)
            else:
                times[name], moved[name] = timed[:2]
                versions |= timed[2]
        speed = case.bytes / us / 1e6
        row = Row(
            kernel=workload.kernel,
            workload=workload.describe(),
            us=round(us, 3),
            bytes=case.bytes,
            tb_per_s=round(speed, 4),
            copy_tb_per_s=round(copy, 4),
            fraction_of_copy=round(speed / copy, 4),
            tuned=variant.tuned,
            record=variant.workload,
            default_us=None if default_us is None else round(default_us, 3),
            baselines={name: round(time, 3) for name, time in times.items()},
            conditions=facts | versions,
            baseline_bytes=moved,
            peers_absent=absent,
        )
        report(row)
        done.append(row)
        del case
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return done
