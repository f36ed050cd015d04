"""The committed records: ``<logs>/<target>/<kernel>/``, MetaSchedule's pair of files and a summary.

``database_workload.json`` and ``database_tuning_record.json`` are one unit and hold the best record
a workload; ``summary.json`` says, for each, what it is, how it was found and in which environment.
MetaSchedule ignores the target when it looks up a record, so ``metadata.json`` of a target's folder
names it, and is checked here.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock

from tq_tvm import _fast_stack as _fast_stack

# isort: split
import tvm
from tvm.s_tir import Trace
from tvm.s_tir import meta_schedule as ms

from tq_tvm import env, schedules
from tq_tvm.build.compile import tvm_target
from tq_tvm.errors import TuningLogError, UnsupportedSpecError
from tq_tvm.spec import FUNCTIONS, RotateSpec, Spec, parse_spec
from tq_tvm.targets import TargetInfo
from tq_tvm.tuning.workloads import decision_sizes

__all__ = [
    "Entry",
    "Environment",
    "Metadata",
    "TunedRecord",
    "check_log",
    "entries",
    "find_records",
    "logs_root",
    "open_database",
    "own_logs",
    "refile",
    "save_record",
    "search_workload",
]

_log = logging.getLogger("tq_tvm")

_SUMMARY = "summary.json"
_METADATA = "metadata.json"


class Environment(msgspec.Struct, frozen=True):
    """What a record was found with: ``versions`` are of packages, compilers and the driver."""

    device: str
    versions: dict[str, str]
    date: str
    seed: int


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One kept record, as ``summary.json`` tells it.

    Of a ``refiled`` one the kernel has changed since: it has the decisions, but its times, error
    and environment are those of the kernel before.
    """

    workload: str
    function: str
    spec: str
    shape: dict[str, int]
    size: int
    us: float
    default_us: float
    search_us: float
    trials: int
    failures: int
    max_error: float
    config: dict[str, int]
    environment: Environment
    refiled: bool = False


class Metadata(msgspec.Struct, frozen=True):
    """Which target the records of a folder are for."""

    target: str
    arch: str


class TunedRecord(msgspec.Struct, frozen=True):
    """A record to build a variant from; ``us`` is None if the kernel has changed since."""

    workload: str
    shape: dict[str, int]
    size: int
    us: float | None
    trace: Any


def logs_root() -> Path:
    """Directory of the logs that come with the package."""
    return Path(str(importlib.resources.files("tq_tvm.tuning_logs")))


def own_logs() -> Path:
    """Directory that records are written to: the package's in a clone, else this user's."""
    packaged = logs_root()
    is_clone = (packaged.parent / "pyproject.toml").is_file()
    return packaged if is_clone and os.access(packaged, os.W_OK) else env.user_logs_dir()


def search_workload(function: str, spec: Spec, kind: str, shape: dict[str, int]) -> Any:
    """The module that is searched for a workload, as MetaSchedule stores it."""
    mod = schedules.search_module(function, spec, kind, dict(shape))
    return ms.tune_context._normalize_mod(_without_spans(mod))


def _without_spans(mod: Any) -> Any:
    """Drop source locations: they are most of a stored module, and name the builder's paths."""
    graph = json.loads(tvm.ir.save_json(mod))
    for node in graph["nodes"]:
        if isinstance(node.get("data"), dict) and "span" in node["data"]:
            node["data"]["span"] = 0
    return tvm.ir.load_json(json.dumps(graph))


def open_database(directory: Path, advice: str, *, create: bool = False) -> Any:
    """MetaSchedule's pair of files in a directory; ``advice`` ends the error about them.

    Raises
    ------
    TuningLogError
        A file is missing, unless ``create``, or malformed.
    """
    files = [directory / "database_workload.json", directory / "database_tuning_record.json"]
    try:
        return ms.database.JSONDatabase(*map(str, files), allow_missing=create)
    except Exception as error:  # TVM raises what its JSON reader and its type checks raise
        raise TuningLogError(
            f"tuning log: {directory} must hold a readable {files[0].name} and {files[1].name}, "
            f"got {str(error).strip().splitlines()[-1]}; {advice}"
        ) from error


def _read(path: Path, type_: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except (OSError, msgspec.DecodeError) as error:
        raise TuningLogError(
            f"tuning log: {path} must be a readable {path.name}, got {error}; "
            f"{_repair(path.parent)}"
        ) from error


def _repair(directory: Path) -> str:
    return f"restore it, or remove {directory} and run `tq-tvm tune` again"


def entries(kernel: str, target: TargetInfo, logs: Path | None = None) -> list[Entry]:
    """Summary of the kept records of a kernel; empty where there is no log.

    Raises
    ------
    TuningLogError
        A file is malformed, or the log is for another target.
    """
    root = (logs or logs_root()) / target.name
    if not (root / kernel / _SUMMARY).exists():
        return []
    _check_target(root, target)
    return _read(root / kernel / _SUMMARY, list[Entry])


def _check_target(root: Path, target: TargetInfo) -> None:
    metadata = _read(root / _METADATA, Metadata)
    if metadata.target != target.name:
        raise TuningLogError(
            f"tuning log: {root} must hold records of {target.name}, got records of "
            f"{metadata.target}; move it away and run `tq-tvm tune --target {target.name}`"
        )


def check_log(kernel: str, target: TargetInfo, logs: Path | None = None) -> None:
    """Refuse what `save_record` would refuse, before a search is spent on it.

    Raises
    ------
    TuningLogError
        A file is malformed, or the log is for another target.
    """
    logs = logs or own_logs()
    root = logs / target.name
    if (root / _METADATA).exists():
        _check_target(root, target)
    _stored(kernel, target, logs)


def _kind(function: str, spec: Spec) -> tuple[object, ...]:
    """What has to agree for decisions to carry over."""
    spec = spec.relevant_to(function)
    if isinstance(spec, RotateSpec):
        return (spec.dim, spec.dtype)
    kind = (spec.format, spec.head_dim, spec.dtype)
    return (*kind, spec.group_size) if function in ("decode", "attend", "prefill") else kind


def _chosen(function: str, spec: Spec, found: list[Entry]) -> list[Entry]:
    """Records of the spec itself; else of the first one that its decisions carry over from.

    Page size and layout change addresses, not what a lane does, and the number of heads neither,
    but for the group in attention, which changes the registers that it takes.
    """
    groups: dict[Spec, list[Entry]] = {}
    for entry in found:
        theirs = parse_spec(entry.spec)
        if entry.function == function and _kind(function, theirs) == _kind(function, spec):
            groups.setdefault(theirs.relevant_to(function), []).append(entry)
    own = groups.get(spec.relevant_to(function))
    return own or next(iter(groups.values()), [])


def _stored(
    kernel: str, target: TargetInfo, logs: Path, only: list[Entry] | None = None
) -> list[tuple[Entry, Trace | None]]:
    """Entries of a kernel, or ``only`` those, with the trace of each.

    None stands for a record that is missing, or that was made for the kernel as it was once.
    """
    chosen = entries(kernel, target, logs) if only is None else only
    if not chosen:
        return []
    directory = logs / target.name / kernel
    database = open_database(directory, _repair(directory))

    def trace(entry: Entry) -> Trace | None:
        spec = parse_spec(entry.spec)
        mod = search_workload(entry.function, spec, target.kind, entry.shape)
        if not database.has_workload(mod):
            return None
        found = database.get_top_k(database.commit_workload(mod), 1)
        return found[0].trace if found else None

    return [(entry, trace(entry)) for entry in chosen]


def find_records(
    function: str, spec: Spec, target: TargetInfo, logs: Path | None = None
) -> list[TunedRecord]:
    """Records that serve a function of a spec on a target: one a workload of one spec.

    With ``logs`` None those of this user come first, workload by workload, then the package's.

    Raises
    ------
    TuningLogError
        The log is malformed, for another target, or no longer fits the kernel.
    """
    kernel = FUNCTIONS[function]
    found: dict[str, tuple[Entry, Path]] = {}
    for root in [logs] if logs else [own_logs(), logs_root()]:
        for entry in entries(kernel, target, root):
            found.setdefault(entry.workload, (entry, root))
    records = []
    for chosen in _chosen(function, spec, [entry for entry, _ in found.values()]):
        root = found[chosen.workload][1]
        ((entry, trace),) = _stored(kernel, target, root, [chosen])
        if trace is None:
            raise TuningLogError(
                f"tuning log: {root / target.name / kernel} must hold a record of "
                f"{entry.workload}, got none for the kernel as it is now; run `tq-tvm tune "
                f"--target {target.name} --kernel {kernel} --spec {entry.spec}`"
            )
        us = None if entry.refiled else entry.us
        records.append(TunedRecord(entry.workload, entry.shape, entry.size, us, trace))
    return records


def save_record(entry: Entry, trace: Trace, target: TargetInfo, logs: Path | None = None) -> Path:
    """Keep one record, in place of an older one of the same workload; others stay.

    Those that no longer fit the kernel are dropped. The kernel's folder is replaced in one step.

    Raises
    ------
    TuningLogError
        The log is malformed or for another target: nothing is written.
    """
    kernel = FUNCTIONS[entry.function]
    logs = logs or own_logs()
    check_log(kernel, target, logs)
    root = logs / target.name
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"), tempfile.TemporaryDirectory(dir=root) as scratch:
        kept = [(entry, trace)]
        for old, old_trace in _stored(kernel, target, logs):
            if old.workload == entry.workload:
                continue
            if old_trace is None:
                _log.warning(
                    "tuning log: %s has no record for the kernel as it is now and is dropped",
                    old.workload,
                )
            else:
                kept.append((old, old_trace))
        _replace(root, kernel, kept, target, Path(scratch))
        (root / _METADATA).write_bytes(_json(Metadata(target.name, target.arch)))
    return root / kernel


def refile(kernel: str, target: TargetInfo, logs: Path | None = None) -> list[Entry]:
    """File records whose kernel has changed for the kernel as it is now; return these.

    A new search, which takes the hardware, replaces them; until then their decisions, which have to
    be on offer, are better than none. See `Entry.refiled` for what is not theirs any more. Records
    of the default, than which nothing was faster, are dropped where it is another one now.

    Raises
    ------
    TuningLogError
        The log is malformed or for another target, or decisions are gone: nothing is written.
    """
    logs = logs or own_logs()
    check_log(kernel, target, logs)
    root = logs / target.name
    directory = root / kernel
    if not directory.exists():
        return []
    kept, changed, dropped = [], [], []
    with FileLock(root / ".lock"), tempfile.TemporaryDirectory(dir=root) as scratch:
        for entry, trace in _stored(kernel, target, logs):
            if entry.us == entry.default_us and entry.config != _default(entry, target):
                dropped.append(entry.workload)
                _log.warning("refile: %s is of an older default and is dropped", entry.workload)
            elif trace is None or _replayed(entry, trace, target) != entry.config:
                changed.append(msgspec.structs.replace(entry, refiled=True))
                kept.append((changed[-1], _trace_of(entry, target)))
            else:
                kept.append((entry, trace))
        if changed or dropped:
            _replace(root, kernel, kept, target, Path(scratch))
    return changed


def _default(entry: Entry, target: TargetInfo) -> dict[str, int]:
    """The default decisions of a workload as they are now."""
    sizes = decision_sizes(entry.function, entry.shape, target)
    spec = parse_spec(entry.spec)
    return schedules.instantiate(entry.function, spec, target.kind, None, sizes).config


def _replayed(entry: Entry, trace: Trace, target: TargetInfo) -> dict[str, int] | None:
    """Decisions of a trace on the kernel as it is now; None if it was made for another."""
    sizes = decision_sizes(entry.function, entry.shape, target)
    spec = parse_spec(entry.spec)
    try:
        return schedules.instantiate(entry.function, spec, target.kind, trace, sizes).config
    except UnsupportedSpecError:
        return None


def _trace_of(entry: Entry, target: TargetInfo) -> Trace:
    """A trace with the decisions of an entry, on the kernel as it is now."""
    spec, kind, shape = parse_spec(entry.spec), target.kind, entry.shape
    sch = tvm.s_tir.Schedule(search_workload(entry.function, spec, kind, shape))
    with contextlib.suppress(KeyError):
        schedules.point(entry.function, spec, kind, entry.config, shape)(sch)
        if _replayed(entry, sch.trace, target) == entry.config:
            return sch.trace
    raise TuningLogError(
        f"refile: decisions of {entry.workload} must be on offer for the kernel as it is now, got "
        f"{entry.config}; run `tq-tvm tune --target {target.name} --kernel "
        f"{FUNCTIONS[entry.function]} --spec {entry.spec}`"
    )


def _replace(
    root: Path, kernel: str, kept: list[tuple[Entry, Trace]], target: TargetInfo, scratch: Path
) -> None:
    """Put a kernel's records in place of those that there are, in one step."""
    _write(scratch / kernel, sorted(kept, key=lambda pair: pair[0].workload), target)
    if (root / kernel).exists():
        shutil.move(root / kernel, scratch / "old")
    shutil.move(scratch / kernel, root / kernel)


def _write(directory: Path, kept: list[tuple[Entry, Trace]], target: TargetInfo) -> None:
    directory.mkdir()
    database = open_database(directory, "", create=True)
    for entry, trace in kept:
        spec = parse_spec(entry.spec)
        mod = search_workload(entry.function, spec, target.kind, entry.shape)
        workload = database.commit_workload(mod)
        database.commit_tuning_record(
            ms.database.TuningRecord(trace, workload, [entry.us * 1e-6], tvm_target(target), [])
        )
    (directory / _SUMMARY).write_bytes(_json([entry for entry, _ in kept]))


def _json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
