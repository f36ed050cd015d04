"""Build and run candidates: workers that outlive batches, and a runner that checks before it times.

A candidate is compiled exactly as it ships (``tq_tvm.build.compile``), in worker processes. It is
run in one worker, which keeps a workload's inputs between candidates and is replaced if a candidate
crashes or hangs. A candidate with a wrong result is a failure, however fast.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tq_tvm import _fast_stack as _fast_stack

# isort: split
import torch
import tvm_ffi
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenPoolExecutor

from tq_tvm import schedules
from tq_tvm.bench.timing import time_us
from tq_tvm.build.compile import compile_library
from tq_tvm.build.occupancy import with_occupancy
from tq_tvm.targets import TargetInfo, get_target
from tq_tvm.tuning.inputs import Case, make_case
from tq_tvm.tuning.interrupt import Interrupt
from tq_tvm.tuning.workloads import Workload

__all__ = ["KeepMeasured", "checked_call", "make_builder", "make_runner"]

_BUILD_SECONDS = 180
_RUN_SECONDS = 60
_SYMBOL = "main"


def _worker_init() -> None:
    """Cheapen ``inspect.stack`` for what a build parses."""
    from tq_tvm import _fast_stack as _fast_stack


def _build(target_name: str, directory: str, mod: Any) -> str:
    """Compile one candidate in a worker; returns the library's path."""
    (func,) = schedules.candidate(mod).functions.values()
    # A directory of its own: MetaSchedule removes the one that the library is in.
    path = Path(tempfile.mkdtemp(dir=directory)) / "kernel.so"
    built = compile_library({_SYMBOL: func}, get_target(target_name), path)
    launch = with_occupancy(
        schedules.candidate_launch(mod), _SYMBOL, get_target(target_name).arch, built.resources
    )
    path.with_suffix(".json").write_text(json.dumps(launch))
    return str(path)


@functools.cache
def _builders() -> PopenPoolExecutor:
    """A worker for each core but one; to start one takes as long as a build."""
    return PopenPoolExecutor(
        max_workers=max(1, (os.cpu_count() or 2) - 1),
        timeout=_BUILD_SECONDS,
        initializer=_worker_init,
    )


@derived_object
class _Builder(ms.builder.PyBuilder):
    """Builds a batch in `_builders`, which MetaSchedule's own starts anew for every batch."""

    def __init__(self, target: TargetInfo, directory: Path) -> None:
        super().__init__()
        self._arguments = (target.name, str(directory))

    def build(self, build_inputs: list[Any]) -> list[Any]:
        """Paths of libraries, or why there is none."""
        futures = [_builders().submit(_build, *self._arguments, item.mod) for item in build_inputs]
        return [_built(future) for future in futures]


def _built(future: Any) -> Any:
    try:
        return ms.builder.BuilderResult(future.result(), None)
    except TimeoutError:
        return ms.builder.BuilderResult(None, f"build: killed after {_BUILD_SECONDS} seconds")
    except Exception as error:
        return ms.builder.BuilderResult(None, f"build: {error}")


def make_builder(target: TargetInfo, directory: Path) -> Any:
    """A builder of candidates for a target; libraries go below ``directory``."""
    return _Builder(target, directory)


@functools.lru_cache(maxsize=1)
def _case(workload: Workload, device: str, seed: int) -> Case:
    return make_case(workload, torch.device(device), seed)


def checked_call(
    library: Path, case: Case, launch: dict[str, int]
) -> tuple[Callable[[], None], float]:
    """A compiled kernel on its arguments, and its relative error; raises if results are wrong."""
    function = tvm_ffi.load_module(str(library))[_SYMBOL]
    arguments = case.arguments(launch)
    case.poison()
    function(*arguments)
    return lambda: function(*arguments), case.check()


def _run(path: str, workload: Workload, device: str, seed: int) -> float:
    """Time of one candidate in us, in the worker."""
    launch = json.loads(Path(path).with_suffix(".json").read_text())
    call, _ = checked_call(Path(path), _case(workload, device, seed), launch)
    return time_us(call, torch.device(device), launches=30, seconds=2.0)


Report = Callable[[float | None, str | None], None]
"""Told of each candidate: its time in us, or None and the error."""


@derived_object
class _Future(ms.runner.PyRunnerFuture):
    """One candidate, which is run when its result is asked for, unless Ctrl-C came first."""

    def __init__(self, run: Callable[[], float], interrupt: Interrupt, report: Report) -> None:
        super().__init__()
        self._run = run
        self._interrupt = interrupt
        self._report = report

    def done(self) -> bool:
        """Whether asking for the result makes sense: always, it is not there before."""
        return True

    def result(self) -> ms.runner.RunnerResult:
        """Run the candidate."""
        if self._interrupt.came:
            return ms.runner.RunnerResult(None, "interrupted")
        try:
            us = self._run()
        except Exception as error:
            self._report(None, f"{type(error).__name__}: {error}")
            return ms.runner.RunnerResult(None, str(error))
        self._report(us, None)
        return ms.runner.RunnerResult([us * 1e-6], None)


@derived_object
class _Runner(ms.runner.PyRunner):
    """Runs candidates one after another in a worker process."""

    def __init__(
        self,
        workload: Workload,
        device: str,
        seed: int,
        interrupt: Interrupt,
        report: Report,
    ) -> None:
        super().__init__()
        self._arguments = (workload, device, seed)
        self._interrupt = interrupt
        self._report = report
        self._pool = PopenPoolExecutor(
            max_workers=1, timeout=_RUN_SECONDS, initializer=_worker_init
        )

    def run(self, runner_inputs: list[Any]) -> list[Any]:
        """Take the candidates that were built; Ctrl-C waits until they are in the database."""
        self._interrupt.hold()
        return [
            _Future(
                functools.partial(self._measure, str(item.artifact_path)),
                self._interrupt,
                self._report,
            )
            for item in runner_inputs
        ]

    def _measure(self, path: str) -> float:
        return float(self._pool.submit(_run, path, *self._arguments).result())

    def close(self) -> None:
        """End the worker, which would share the device with what is timed next."""
        self._pool.shutdown()


def make_runner(
    workload: Workload, device: str, seed: int, interrupt: Interrupt, report: Report
) -> Any:
    """A runner on one workload's inputs; to be closed."""
    return _Runner(workload, device, seed, interrupt, report)


@derived_object
class KeepMeasured(ms.measure_callback.PyMeasureCallback):
    """Puts what was measured into the database, then lets Ctrl-C end the search.

    MetaSchedule's own callback files a candidate that was not run as one that failed.
    """

    def __init__(self, database: Any, target: Any, interrupt: Interrupt, report: Report) -> None:
        super().__init__()
        self._database = database
        self._target = target
        self._interrupt = interrupt
        self._report = report

    def apply(
        self,
        task_scheduler: Any,
        task_id: int,
        measure_candidates: list[Any],
        builder_results: list[Any],
        runner_results: list[Any],
    ) -> None:
        """Commit a batch; report those that could not be built, which no runner saw."""
        workload = self._database.commit_workload(task_scheduler.tasks_[task_id].ctx.mod)
        for candidate, result in zip(measure_candidates, runner_results, strict=True):
            if result.run_secs is not None:
                self._database.commit_tuning_record(
                    ms.database.TuningRecord(
                        candidate.sch.trace,
                        workload,
                        result.run_secs,
                        self._target,
                        candidate.args_info,
                    )
                )
        for built in builder_results:
            if built.error_msg is not None:
                self._report(None, str(built.error_msg))
        self._interrupt.release()
