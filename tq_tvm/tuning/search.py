"""Search one workload: MetaSchedule proposes, workers build and run, the best is kept."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tq_tvm import _fast_stack as _fast_stack

# isort: split
import torch
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from tq_tvm import env, schedules
from tq_tvm.build.compile import tvm_target
from tq_tvm.errors import TQError, TuningLogError
from tq_tvm.targets import TargetInfo, detect
from tq_tvm.tuning.candidates import KeepMeasured, make_builder, make_runner
from tq_tvm.tuning.cost_model import DecisionModel
from tq_tvm.tuning.database import (
    Entry,
    check_log,
    open_database,
    save_record,
    search_workload,
)
from tq_tvm.tuning.environment import environment
from tq_tvm.tuning.finalists import compare
from tq_tvm.tuning.interrupt import Interrupt, SearchInterrupted, shield_workers
from tq_tvm.tuning.progress import Progress
from tq_tvm.tuning.strategy import (
    Evolutionary,
    Exhaustive,
    Feasible,
    RedrawDecision,
    space_size,
)
from tq_tvm.tuning.workloads import Workload, decision_sizes

__all__ = ["check_tunable", "tune"]

_log = logging.getLogger("tq_tvm")

_FINALISTS = 4
"""Best records of a search that are built as they ship and timed beside the default."""


def _work_dir(workload: Workload, target: TargetInfo, fresh: bool) -> Path:
    directory = env.cache_dir() / "tuning" / target.name / workload.label
    if fresh:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def check_tunable(
    kernels: Iterable[str], target: TargetInfo, device: torch.device, logs: Path | None = None
) -> None:
    """Refuse a search whose record could not be kept, before any time is spent on it.

    Raises
    ------
    TuningLogError
        The device is another target, or a log is malformed or another target's.
    """
    local = detect(device if torch.cuda.is_available() else "cpu")
    if local.kind != target.kind or (target.kind == "cuda" and local.name != target.name):
        raise TuningLogError(
            f"tune: device must be a {target.name}, got a {local.name}; "
            f"run `tq-tvm tune --target {local.name}`"
        )
    for kernel in kernels:
        check_log(kernel, target, logs)


def tune(
    workload: Workload,
    target: TargetInfo,
    device: torch.device,
    *,
    trials: int = 96,
    seconds: float = 600.0,
    seed: int = 1,
    fresh: bool = False,
    logs: Path | None = None,
) -> Entry:
    """Search a workload on the local device and keep the best record.

    The finalists and the default schedule are built as they ship, checked and timed together; where
    none of them is faster than the default, the record says that the default is the best.

    Every measured candidate goes to a database in the cache directory: a search that was stopped,
    by Ctrl-C or by its budget, keeps what it found and goes on from there the next time.

    Parameters
    ----------
    workload, target, device
        What to search, and where; ``device`` must be a ``target``.
    trials, seconds
        Budgets. A space of at most ``trials`` points is searched exhaustively; of a larger one an
        evolutionary search measures ``trials``, guided by XGBoost.
    seed
        Seed of inputs and search.
    fresh
        Forget what an earlier search measured.
    logs
        Directory of tuning logs; None takes the package's in a clone, else this user's.

    Returns
    -------
    The kept record's summary.

    Raises
    ------
    TuningLogError
        See `check_tunable`; or no candidate was right.
    SearchInterrupted
        After Ctrl-C, once the best record so far is kept. A second Ctrl-C raises KeyboardInterrupt
        at once.
    """
    check_tunable([workload.kernel], target, device, logs)
    # The bar tells what MetaSchedule's tables would; its log files stay in the work directory.
    logging.getLogger("tvm.s_tir.meta_schedule").setLevel(logging.WARNING)
    work_dir = _work_dir(workload, target, fresh)
    database = open_database(work_dir, "run again with --fresh, which forgets it", create=True)
    mod = _searched(workload, target)
    sizes = decision_sizes(workload.function, workload.shape, target)
    space = schedules.space(workload.function, workload.spec, target.kind, sizes)
    points = sum(space_size(design) for design in space(Schedule(mod)))
    progress = Progress(workload.label, min(points, trials))
    deadline = time.monotonic() + seconds
    exhaustive = points <= trials
    shield_workers()
    # Few enough that Ctrl-C and the deadline lose little, enough for every worker.
    batch = min(points, trials, max(4, 2 * (os.cpu_count() or 1)))
    entry = None
    with Interrupt() as interrupt, tempfile.TemporaryDirectory(prefix="tq_tvm_tune_") as scratch:
        runner = make_runner(workload, str(device), seed, interrupt, progress.report)
        try:
            ms.tir_integration.tune_tir(
                mod,
                tvm_target(target),
                str(work_dir),
                max_trials_global=min(points, trials),
                num_trials_per_iter=batch,
                builder=make_builder(target, Path(scratch)),
                runner=runner,
                measure_callbacks=[
                    KeepMeasured(database, tvm_target(target), interrupt, progress.report),
                    ms.measure_callback.RemoveBuildArtifact(),
                    ms.measure_callback.UpdateCostModel(),
                ],
                database=database,
                space=ms.space_generator.ScheduleFn(
                    space,
                    sch_rules=[],
                    # VerifyGPUCode rejects buffers of scope warp; every point on offer keeps
                    # within 1024 threads, and the compiler judges what is feasible.
                    postprocs=[Feasible()],
                    mutator_probs={RedrawDecision(): 1.0},
                ),
                strategy=Exhaustive(deadline) if exhaustive else Evolutionary(deadline),
                cost_model=_cost_model(
                    schedules.has_factory(workload.function, workload.spec, target.kind),
                    exhaustive,
                    seed,
                ),
                num_tuning_cores=1,
                seed=seed,
            )
        except (KeyboardInterrupt, RuntimeError) as error:
            # Out of a callback of TVM, KeyboardInterrupt comes as a RuntimeError.
            if not interrupt.came:
                raise
            if interrupt.insisted:
                raise KeyboardInterrupt from error
            _log.warning("tune: interrupted; keeping the best of %d trials", progress.trials)
        finally:
            progress.close()
        interrupt.hold()
        runner.close()
        try:
            entry = _keep_best(workload, target, device, database, progress, seed, logs)
        except TQError as error:
            if not interrupt.came:
                raise
            _log.warning("%s", error)
    if interrupt.came or entry is None:
        raise SearchInterrupted(entry)
    return entry


def _cost_model(made: bool, exhaustive: bool, seed: int) -> Any:
    if exhaustive:
        return "random"  # nothing asks it
    return DecisionModel(seed) if made else "xgb"


def _searched(workload: Workload, target: TargetInfo) -> Any:
    return search_workload(workload.function, workload.spec, target.kind, workload.shape)


def _keep_best(
    workload: Workload,
    target: TargetInfo,
    device: torch.device,
    database: Any,
    progress: Progress,
    seed: int,
    logs: Path | None,
) -> Entry:
    """Keep the fastest of the best records and the default."""
    found = database.get_top_k(database.commit_workload(_searched(workload, target)), _FINALISTS)
    if not found:
        raise TuningLogError(
            f"tune: {workload.label} must have a candidate with right results, got none of "
            f"{progress.trials}; the last one failed with: {progress.last_error}"
        )
    unchanged = Schedule(_searched(workload, target))
    sizes = decision_sizes(workload.function, workload.shape, target)
    schedules.default(workload.function, workload.spec, target.kind, sizes)(unchanged)
    traces = [unchanged.trace, *[record.trace for record in found]]
    finalists = compare(workload, target, device, traces, seed)
    default = finalists[0]
    # The first of those that are equal: a tie is the default's own.
    best = min(finalists, key=lambda finalist: finalist.us)
    _log.info("%s: %.1f us, default %.1f us", workload.label, best.us, default.us)
    entry = Entry(
        workload=workload.label,
        function=workload.function,
        spec=workload.spec.label,
        shape=dict(workload.shape),
        size=workload.size,
        us=round(best.us, 3),
        default_us=round(default.us, 3),
        search_us=round(float(found[0].run_secs[0]) * 1e6, 3),
        trials=progress.trials,
        failures=progress.failures,
        max_error=best.error,
        config=best.config,
        environment=environment(device, best.versions, seed),
    )
    save_record(entry, best.trace, target, logs)
    return entry
