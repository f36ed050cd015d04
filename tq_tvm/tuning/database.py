"""The committed records: ``<logs>/<target>/<kernel>/``, MetaSchedule's pair of files and a summary.

``database_workload.json`` and ``database_tuning_record.json`` are one unit and hold the best record
a workload; ``summary.json`` says, for each, what it is and how it was found. ``metadata.json`` of a
target holds the environment. MetaSchedule ignores the target when it looks up a record, so the
folder's target is checked here.
"""

from __future__ import annotations

import importlib.resources
import json
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

from tq_tvm import schedules
from tq_tvm.build.compile import tvm_target
from tq_tvm.errors import TuningLogError
from tq_tvm.spec import FUNCTIONS, CacheSpec
from tq_tvm.targets import TargetInfo

__all__ = [
    "Entry",
    "Metadata",
    "TunedRecord",
    "entries",
    "find_records",
    "logs_root",
    "save_record",
    "search_workload",
]

_SUMMARY = "summary.json"
_METADATA = "metadata.json"


class Entry(msgspec.Struct, frozen=True):
    """One kept record, as ``summary.json`` tells it."""

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


class Metadata(msgspec.Struct, frozen=True):
    """The environment that the records of a target were found in."""

    target: str
    device: str
    arch: str
    versions: dict[str, str]
    date: str
    seed: int


class TunedRecord(msgspec.Struct, frozen=True):
    """A record to build a variant from."""

    workload: str
    size: int
    us: float
    trace: Any


def logs_root() -> Path:
    """Directory of the logs that come with the package."""
    return Path(str(importlib.resources.files("tq_tvm.tuning_logs")))


def search_workload(function: str, spec: CacheSpec, kind: str, shape: dict[str, int]) -> Any:
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


def _database(directory: Path) -> Any:
    return ms.database.JSONDatabase(
        str(directory / "database_workload.json"), str(directory / "database_tuning_record.json")
    )


def _read(path: Path, type_: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except (OSError, msgspec.DecodeError) as error:
        raise TuningLogError(
            f"tuning log: {path} must be a readable {path.name}, got {error}; "
            "restore it or run `tq-tvm tune` again"
        ) from error


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
    metadata = _read(root / _METADATA, Metadata)
    if metadata.target != target.name:
        raise TuningLogError(
            f"tuning log: {root} must hold records of {target.name}, got records of "
            f"{metadata.target}; move it or run `tq-tvm tune --target {target.name}`"
        )
    return _read(root / kernel / _SUMMARY, list[Entry])


def _kind(function: str, spec: CacheSpec) -> tuple[object, ...]:
    """What has to agree for decisions to carry over."""
    kind = (spec.format, spec.head_dim, spec.dtype)
    return (*kind, spec.group_size) if function == "decode" else kind


def _chosen(function: str, spec: CacheSpec, found: list[Entry]) -> list[Entry]:
    """Records of the spec itself; else of the first one that its decisions carry over from.

    Page size and layout change addresses, not what a lane does, and the number of heads neither,
    but for the group in ``decode``, which changes the registers that it takes.
    """
    groups: dict[CacheSpec, list[Entry]] = {}
    for entry in found:
        theirs = CacheSpec.parse(entry.spec)
        if entry.function == function and _kind(function, theirs) == _kind(function, spec):
            groups.setdefault(theirs.relevant_to(function), []).append(entry)
    own = groups.get(spec.relevant_to(function))
    return own or next(iter(groups.values()), [])


def find_records(
    function: str, spec: CacheSpec, target: TargetInfo, logs: Path | None = None
) -> list[TunedRecord]:
    """Records that serve a function of a spec on a target: one a workload of one spec.

    Raises
    ------
    TuningLogError
        The log is malformed, for another target, or no longer fits the kernel.
    """
    kernel = FUNCTIONS[function]
    chosen = _chosen(function, spec, entries(kernel, target, logs))
    if not chosen:
        return []
    directory = (logs or logs_root()) / target.name / kernel
    database = _database(directory)
    records = []
    for entry in chosen:
        mod = search_workload(function, CacheSpec.parse(entry.spec), target.kind, entry.shape)
        found = (
            database.get_top_k(database.commit_workload(mod), 1)
            if database.has_workload(mod)
            else []
        )
        if not found:
            raise TuningLogError(
                f"tuning log: {directory} must hold a record of {entry.workload}, got none for the "
                f"kernel as it is now; run `tq-tvm tune --target {target.name} --kernel {kernel}`"
            )
        records.append(TunedRecord(entry.workload, entry.size, entry.us, found[0].trace))
    return records


def save_record(
    entry: Entry, trace: Trace, target: TargetInfo, metadata: Metadata, logs: Path | None = None
) -> Path:
    """Keep one record, in place of an older one of the same workload; others stay.

    The kernel's folder is replaced in one step.
    """
    kernel = FUNCTIONS[entry.function]
    root = (logs or logs_root()) / target.name
    root.mkdir(parents=True, exist_ok=True)
    directory = root / kernel
    with FileLock(root / ".lock"), tempfile.TemporaryDirectory(dir=root) as scratch:
        (root / _METADATA).write_bytes(
            msgspec.json.format(msgspec.json.encode(metadata), indent=2) + b"\n"
        )
        kept = []
        for old in entries(kernel, target, logs):
            if old.workload != entry.workload:
                spec = CacheSpec.parse(old.spec)
                (record,) = [
                    r
                    for r in find_records(old.function, spec, target, logs)
                    if r.workload == old.workload
                ]
                kept.append((old, record.trace))
        kept.append((entry, trace))
        kept.sort(key=lambda pair: pair[0].workload)
        fresh = Path(scratch) / kernel
        fresh.mkdir()
        database = _database(fresh)
        for item, item_trace in kept:
            mod = search_workload(
                item.function, CacheSpec.parse(item.spec), target.kind, item.shape
            )
            workload = database.commit_workload(mod)
            database.commit_tuning_record(
                ms.database.TuningRecord(
                    item_trace, workload, [item.us * 1e-6], tvm_target(target), []
                )
            )
        (fresh / _SUMMARY).write_bytes(
            msgspec.json.format(msgspec.json.encode([item for item, _ in kept]), indent=2) + b"\n"
        )
        if directory.exists():
            shutil.move(directory, Path(scratch) / "old")
        shutil.move(fresh, directory)
    return directory
