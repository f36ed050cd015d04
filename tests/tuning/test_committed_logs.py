"""The tuning logs that come with the package fit the kernels as they are now."""

from __future__ import annotations

import datetime

import msgspec
import pytest

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm import schedules
from tq_tvm.spec import FUNCTIONS, parse_spec
from tq_tvm.targets import TARGETS, TargetInfo
from tq_tvm.tuning.database import Metadata, entries, find_records, logs_root
from tq_tvm.tuning.workloads import Workload, decision_sizes, workloads


def metadata_of(name) -> Metadata:
    return msgspec.json.decode((logs_root() / name / "metadata.json").read_bytes(), type=Metadata)


def targets() -> list[TargetInfo]:
    """Targets of the log; a GPU that the table misses is described by its architecture."""
    names = sorted(path.parent.name for path in logs_root().glob("*/metadata.json"))
    archs = {name: metadata_of(name).arch for name in names}
    return [
        TARGETS.get(name) or TargetInfo(name, "cuda" if "sm_" in arch else "llvm", arch)
        for name, arch in archs.items()
    ]


def every_entry():
    return [
        pytest.param(target, entry, id=f"{target.name}-{entry.workload}")
        for target in targets()
        for kernel in sorted(set(FUNCTIONS.values()))
        for entry in entries(kernel, target)
    ]


each_target = pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
each_entry = pytest.mark.parametrize(("target", "entry"), every_entry())


@each_entry
def test_the_environment_is_told(target, entry):
    environment = entry.environment
    tools = {"cuda": {"nvcc", "cuda", "driver"}, "llvm": {"cxx"}}[target.kind]
    packages = {"tq_tvm", "apache-tvm", "apache-tvm-ffi", "torch", "xgboost-cpu"}
    assert set(environment.versions) == packages | tools
    assert environment.device and "unknown" not in environment.versions.values()
    assert datetime.date.fromisoformat(environment.date)


@each_target
def test_a_folder_holds_records_of_its_kernel_alone(target):
    for directory in (path for path in (logs_root() / target.name).iterdir() if path.is_dir()):
        kept = entries(directory.name, target)
        assert kept, directory
        assert {FUNCTIONS[entry.function] for entry in kept} == {directory.name}
        assert len({entry.workload for entry in kept}) == len(kept)
        for file in ("database_workload.json", "database_tuning_record.json"):
            assert len((directory / file).read_text().splitlines()) == len(kept), file


@each_entry
def test_a_record_is_found_and_replays(target, entry):
    """Its decisions are those that the summary tells, on the dynamic function."""
    spec = parse_spec(entry.spec)
    records = {r.workload: r for r in find_records(entry.function, spec, target)}
    record = records[entry.workload]
    assert (record.size, record.us) == (entry.size, None if entry.refiled else entry.us)
    sizes = decision_sizes(entry.function, entry.shape, target)
    instance = schedules.instantiate(entry.function, spec, target.kind, record.trace, sizes)
    assert instance.config == entry.config
    default = schedules.instantiate(entry.function, spec, target.kind, None, sizes)
    assert instance.tuned == (instance.config != default.config)


@each_entry
def test_a_summary_is_consistent(target, entry):
    """Named and sized after its workload, right, and no slower than the default."""
    spec = parse_spec(entry.spec)
    workload = Workload(entry.function, spec, entry.shape, "a test")
    assert (entry.workload, entry.size) == (workload.label, workload.size)
    sizes = decision_sizes(entry.function, entry.shape, target)
    default = schedules.instantiate(entry.function, spec, target.kind, None, sizes).config
    assert entry.us <= entry.default_us
    assert entry.us < entry.default_us or entry.config == default
    assert 0 <= entry.failures < entry.trials
    assert 0 <= entry.max_error < {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}[spec.dtype]


@each_entry
def test_its_workload_is_one_that_tune_searches(target, entry):
    """So that `tq-tvm tune` renews the record."""
    spec = parse_spec(entry.spec)
    assert entry.workload in {workload.label for workload in workloads(spec, target)}
