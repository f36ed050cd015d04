"""Make sure that this machine has kernels: find a library, build one, or tune for a minute."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from tq_tvm import artifacts, env, ops
from tq_tvm.build.sources import sources_digest
from tq_tvm.errors import ArtifactCorruptError, ArtifactNotFoundError, BuildError, TQError
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import TargetInfo, detect

__all__ = ["find_library", "prepare"]

_SECONDS = 60.0

# What a minute does not reach keeps the default schedule, so attention comes first.
_ORDER = (
    "decode",
    "flatten",
    "rotate",
    "fill_slots",
    "fill_table",
    "flatten_unrotated",
    "attend",
    "prefill",
)


def find_library(spec: CacheSpec, target: TargetInfo) -> list[Path] | None:
    """Directories that serve the functions of a spec; None if a function has none."""
    try:
        found = [
            artifacts.locate(f, spec.relevant_to(f), target)[0] for f in target.functions(spec)
        ]
    except (ArtifactCorruptError, ArtifactNotFoundError):
        return None
    return list(dict.fromkeys(found))


def prepare(spec: CacheSpec, device: torch.device, *, retune: bool = False, seed: int = 1) -> None:
    """Make sure that every call with a spec finds its kernel, and print how that was done.

    Parameters
    ----------
    spec, device
        What the kernels are for.
    retune
        Search for a minute even where there are kernels.
    seed
        Seed of the search.

    Raises
    ------
    BuildError
        There is no library, and no compiler to make one.
    TuningLogError
        The tuning log cannot be read, or does not fit the kernels.
    """
    target = detect(device)
    found = None if retune else find_library(spec, target)
    if found is not None:
        _say("Kernels", f"found in {', '.join(map(str, found))}")
        if not _outdated(found):
            return
        if _compiler_missing():
            _say(
                "", "built from other sources than these; there is no compiler to build them again"
            )
            return
        _say("", "built from other sources than these, so they are built again")
    _require_compiler(spec, target)
    from tq_tvm.build.library import build_library
    from tq_tvm.tuning.database import find_records, logs_root

    logs = logs_root()
    served = target.functions(spec)
    missing = [f for f in served if not find_records(f, spec, target, logs)]
    if retune or (missing and target.kind == "llvm"):
        chosen = list(served) if retune else missing
        why = "asked for" if retune else f"the tuning log has no records of {', '.join(missing)}"
        _say("Tuning", f"about a minute ({why}); Ctrl-C goes on with what was found")
        logs = _own_logs(target, logs, keep=len(missing) < len(served))
        _tune(spec, target, device, chosen, seed, logs)
    begin = time.monotonic()
    directory = build_library(spec, target, env.user_artifact_dir(), logs=logs)
    seconds = time.monotonic() - begin
    _say("Kernels", f"built in {seconds:.0f} s from {logs / target.name}: {_tuned(directory)}")
    _say("", f"library {directory}")
    ops.clear_cache()
    _check_served(spec, target, directory)


def _say(title: str, text: str) -> None:
    click.echo(f"{title:<8} {text}")


def _outdated(found: list[Path]) -> bool:
    """Whether a library was built from other kernels, schedules or compiler passes."""
    digest = sources_digest()
    return any(artifacts.Manifest.read(directory).sources != digest for directory in found)


def _compiler_missing() -> ImportError | None:
    try:
        import tvm  # noqa: F401
    except ImportError as error:
        return error
    return None


def _require_compiler(spec: CacheSpec, target: TargetInfo) -> None:
    error = _compiler_missing()
    if error is not None:
        raise BuildError(
            f"demo: a library of {spec.label} for {target.name}, or the compiler that builds it, "
            f"must be installed, got neither in {', '.join(map(str, env.artifact_dirs()))} "
            f"({error}); run `pip install 'tq-tvm[tune]'` (in a clone `pip install -e '.[tune]'`)"
        ) from error


def _tuned(directory: Path) -> str:
    """What the records say of each function of a library."""
    words: dict[str, list[str]] = {}
    for function, variants in artifacts.Manifest.read(directory).functions.items():
        # The first word, in this order, that is true of a variant.
        word = min(
            (artifacts.schedule_word(v.tuned, v.workload) for v in variants),
            key=("tuned", "default is best", "default").index,
        )
        words.setdefault(word, []).append(function)
    return "; ".join(f"{word} {', '.join(names)}" for word, names in words.items())


def _check_served(spec: CacheSpec, target: TargetInfo, directory: Path) -> None:
    """Refuse to show other kernels than those that were just built."""
    served, _ = artifacts.locate("decode", spec, target)
    if served.resolve() != directory.resolve():
        raise BuildError(
            f"demo: calls must find the library built in {directory}, got {served}, which comes "
            f"first; run again with TQ_TVM_ARTIFACT_DIR={env.user_artifact_dir()}"
        )


def _own_logs(target: TargetInfo, committed: Path, keep: bool) -> Path:
    """A directory of this user for records; what is not searched keeps its committed record.

    It starts anew each time: what earlier searches measured is in their databases.
    """
    logs = env.cache_dir() / "demo" / "tuning_logs"
    shutil.rmtree(logs / target.name, ignore_errors=True)
    logs.mkdir(parents=True, exist_ok=True)
    if keep:
        shutil.copytree(committed / target.name, logs / target.name)
    return logs


def _tune(
    spec: CacheSpec,
    target: TargetInfo,
    device: torch.device,
    functions: list[str],
    seed: int,
    logs: Path,
) -> None:
    """Search one workload after the other until the minute is over."""
    from tq_tvm.tuning.search import tune
    from tq_tvm.tuning.workloads import workloads

    todo = [w for f in _ORDER if f in functions for w in workloads(spec, target) if w.function == f]
    # One batch of candidates, so that it ends; on many cores they are built in parallel.
    trials = max(8, 2 * (os.cpu_count() or 1))
    begin = time.monotonic()
    longest = 0.0
    with _noted_interrupt() as interrupted:
        while todo:
            left = begin + _SECONDS - time.monotonic()
            if left < longest / 2:
                break
            workload = todo.pop(0)
            started = time.monotonic()
            try:
                entry = tune(
                    workload, target, device, trials=trials, seconds=left, seed=seed, logs=logs
                )
                _say("", f"{_short(workload)}: {entry.us:.0f} us, default {entry.default_us:.0f}")
            except KeyboardInterrupt:
                interrupted.set()
            except Exception as error:
                # Ctrl-C inside TVM comes out as a RuntimeError, before a first result as a TQError.
                if not interrupted.is_set():
                    if not isinstance(error, TQError):
                        raise
                    click.echo(f"{_short(workload)} keeps the default schedule: {error}", err=True)
            if interrupted.is_set():
                _say("", "interrupted; going on with what was found (Ctrl-C again ends the demo)")
                return
            longest = max(longest, time.monotonic() - started)
    if todo:
        names = ", ".join(dict.fromkeys(w.function for w in todo))
        _say("", f"not reached: {names}; `tq-tvm tune` searches all")


def _short(workload: Any) -> str:
    """A workload's label without the spec."""
    return str(workload.label).removesuffix(f"-{workload.spec.label}")


@contextlib.contextmanager
def _noted_interrupt() -> Iterator[threading.Event]:
    """Tell whether Ctrl-C came: the search may report it as another error."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        event.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
