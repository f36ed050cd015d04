"""``tuning.search`` from end to end, on spaces of a few points and inputs of a few rows."""

from __future__ import annotations

import json
import logging
import signal
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules import decode
from tq_tvm.schedules.decisions import sampled
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from tq_tvm import schedules
from tq_tvm.artifacts.manifest import Manifest
from tq_tvm.build.compile import tvm_target
from tq_tvm.build.library import build_library
from tq_tvm.errors import TuningLogError
from tq_tvm.served import functions_on
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import detect, get_target
from tq_tvm.tuning import candidates
from tq_tvm.tuning.candidates import make_runner
from tq_tvm.tuning.database import entries, find_records, search_workload
from tq_tvm.tuning.inputs import make_case
from tq_tvm.tuning.interrupt import Interrupt, SearchInterrupted
from tq_tvm.tuning.progress import Progress
from tq_tvm.tuning.search import tune
from tq_tvm.tuning.workloads import Workload

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SPEC = CacheSpec(128, 2, 1, 16, "float32", "bshd")
ROTATE = Workload("rotate", SPEC, {"n": 16}, "a test")
DECODE = Workload("decode", SPEC, {"batch": 1, "pages": 2, "table_width": 2}, "a test")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Where measured candidates and kept records go, not those of this user."""
    monkeypatch.setenv("TQ_TVM_CACHE_DIR", str(tmp_path / "cache"))
    # A search stops it, pytest hangs a handler without a name on every logger that has stopped it,
    # and the next search looks for the names of all handlers.
    monkeypatch.setattr(logging.getLogger("tvm.s_tir.meta_schedule"), "propagate", True)
    return tmp_path / "cache", tmp_path / "logs"


def measured(cache, workload) -> list[dict[str, int]]:
    """Decisions of the candidates in the work database, and that each has a time."""
    directory = cache / "tuning" / detect(CPU).name / workload.label
    configs = []
    for record in ms.database.JSONDatabase(work_dir=str(directory)).get_all_tuning_records():
        assert all(0 < float(s) < 60 for s in record.run_secs)
        configs.append(schedules.instantiate(workload.function, SPEC, "llvm", record.trace).config)
    return configs


def small_space(monkeypatch, **options):
    """Few points, so that a search measures them all."""
    monkeypatch.setitem(decode.OPTIONS, "llvm", {**options, "lookup": [0]})


def test_a_record_is_searched_kept_found_and_built(folders, tmp_path):
    cache, logs = folders
    target = detect(CPU)
    entry = tune(ROTATE, target, CPU, trials=4, seed=5, logs=logs)
    assert (entry.workload, entry.function, entry.spec) == (ROTATE.label, "rotate", SPEC.label)
    assert (entry.trials, entry.failures, entry.size) == (4, 0, ROTATE.size)
    assert entry.max_error < 1e-5
    assert entry.us <= entry.default_us, "the default is one of the finalists"
    configs = measured(cache, ROTATE)
    assert len(configs) == len({tuple(c.values()) for c in configs}) == 4
    default = schedules.instantiate("rotate", SPEC, "llvm", None).config
    assert entry.config in [default, *configs]

    assert entries("rotate", target, logs) == [entry]
    (record,) = find_records("rotate", SPEC, target, logs)
    assert schedules.instantiate("rotate", SPEC, "llvm", record.trace).config == entry.config
    metadata = json.loads((logs / target.name / "metadata.json").read_text())
    assert metadata == {"target": target.name, "arch": target.arch}
    assert {"apache-tvm", "apache-tvm-ffi", "torch", "cxx"} <= set(entry.environment.versions)
    assert entry.environment.seed == 5

    directory = build_library(SPEC, target, tmp_path / "artifacts", logs=logs)
    functions = Manifest.read(directory).functions
    assert set(functions) == set(functions_on(SPEC, "llvm"))
    (variant,) = (v for v in functions["rotate"] if v.workload is not None)
    assert (variant.workload, variant.us) == (ROTATE.label, entry.us)
    assert variant.tuned == (entry.config != default)
    assert variant.config == entry.config
    assert not any(v.tuned for found in functions.values() for v in found if v is not variant)


def test_a_search_goes_on_where_one_stopped(folders, monkeypatch):
    """Three of four points were measured before: the fourth one is."""
    cache, logs = folders
    target = detect(CPU)
    small_space(monkeypatch, tile=[16, 32], vector=[16], unroll=[0, 1])
    mod = search_workload("decode", SPEC, target.kind, DECODE.shape)
    directory = cache / "tuning" / target.name / DECODE.label
    directory.mkdir(parents=True)
    database = ms.database.JSONDatabase(work_dir=str(directory))
    workload = database.commit_workload(mod)
    before = [(16, 16, 0, 0), (16, 16, 1, 0), (32, 16, 1, 0)]
    for point in before:
        sch = Schedule(mod)
        values = dict(zip(("tile", "vector", "unroll", "lookup"), point, strict=True))
        decode.apply(sch, "decode", SPEC, target.kind, sampled(sch, values))
        database.commit_tuning_record(
            ms.database.TuningRecord(sch.trace, workload, [1.0], tvm_target(target), [])
        )
    entry = tune(DECODE, target, CPU, trials=4, logs=logs)
    assert (entry.trials, entry.failures) == (1, 0)
    points = [tuple(c.values()) for c in measured(cache, DECODE)]
    assert sorted(points) == sorted([*before, (32, 16, 0, 0)])
    assert tuple(entry.config.values()) in points
    assert entries("decode", target, logs) == [entry]


@pytest.fixture
def press(monkeypatch):
    """Ctrl-C while the candidate after the first ``measured`` ones is reported."""

    def after(measured, times=1):
        report = Progress.report

        def pressed(self, us, error):
            if self.trials == measured:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            report(self, us, error)

        monkeypatch.setattr(Progress, "report", pressed)

    return after


@pytest.fixture
def handler():
    """The handler of Ctrl-C, which is the same one afterwards."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_inside_a_batch_keeps_what_was_measured(folders, monkeypatch, press, handler):
    """The candidate that is being measured is the last one; all four are one batch."""
    cache, logs = folders
    small_space(monkeypatch, tile=[16, 32], vector=[16], unroll=[0, 1])
    press(2)
    with pytest.raises(SearchInterrupted) as stop:
        tune(DECODE, detect(CPU), CPU, trials=4, logs=logs)
    assert len(measured(cache, DECODE)) == 3
    assert entries("decode", detect(CPU), logs) == [stop.value.entry]
    assert (stop.value.entry.trials, stop.value.entry.failures) == (3, 0)


def test_a_second_ctrl_c_keeps_nothing(folders, monkeypatch, press, handler):
    _, logs = folders
    small_space(monkeypatch, tile=[16, 32], vector=[16], unroll=[0, 1])
    press(2, times=2)
    with pytest.raises(KeyboardInterrupt) as stop:
        tune(DECODE, detect(CPU), CPU, trials=4, logs=logs)
    assert stop.type is KeyboardInterrupt
    assert not logs.exists()


def test_ctrl_c_before_anything_was_measured(folders, monkeypatch, handler):
    """While the first batch is built."""
    cache, logs = folders

    def build(self, inputs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(candidates._Builder._cls, "build", build)
    with pytest.raises(SearchInterrupted) as stop:
        tune(ROTATE, detect(CPU), CPU, trials=4, logs=logs)
    assert stop.value.entry is None
    assert measured(cache, ROTATE) == []
    assert not logs.exists()


def test_what_cannot_be_built_is_a_failure(folders, monkeypatch):
    cache, logs = folders
    small_space(monkeypatch, tile=[16, 32], vector=[16], unroll=[0, 1])
    build = candidates._Builder._cls.build

    def one_fails(self, inputs):
        _, *others = build(self, inputs)
        return [ms.builder.BuilderResult(None, "a build that failed"), *others]

    monkeypatch.setattr(candidates._Builder._cls, "build", one_fails)
    entry = tune(DECODE, detect(CPU), CPU, trials=4, logs=logs)
    assert (entry.trials, entry.failures) == (4, 1)
    assert len(measured(cache, DECODE)) == 3


def test_a_wrong_kernel_is_a_failure(folders, monkeypatch):
    """Vectors of 24 values leave out the end of a row of 128: fast, and wrong."""
    _, logs = folders
    small_space(monkeypatch, tile=[32], vector=[24], unroll=[0])
    with pytest.raises(
        TuningLogError, match=r"(?s)right results, got none of 1; .*WrongResultError: decode"
    ):
        tune(DECODE, detect(CPU), CPU, trials=4, logs=logs)
    assert not logs.exists()


def test_the_seed_makes_the_inputs_of_candidates(monkeypatch):
    """Of the worker, too."""
    runner = make_runner(ROTATE, "cpu", 7, Interrupt(), lambda us, error: None)._inst
    submitted = []

    def submit(function, *arguments):
        submitted.append(arguments[1:])
        return SimpleNamespace(result=lambda: 1.0)

    monkeypatch.setattr(runner._pool, "submit", submit)
    for future in runner.run([SimpleNamespace(artifact_path="x.so")]):
        future._inst.result()
    assert submitted == [(ROTATE, "cpu", 7)]
    one, other = (candidates._case(ROTATE, "cpu", seed).arguments({})[0] for seed in (7, 8))
    assert torch.equal(one, make_case(ROTATE, CPU, 7).arguments({})[0])
    assert not torch.equal(one, other)


def test_no_search_for_the_log_of_another_target(folders):
    """Which would be a log of two targets."""
    cache, logs = folders
    target = detect(CPU)
    (logs / target.name).mkdir(parents=True)
    path = logs / target.name / "metadata.json"
    path.write_text(json.dumps({"target": "nvidia_h200", "arch": "sm_90a"}))
    before = path.read_bytes()
    with pytest.raises(TuningLogError, match="got records of nvidia_h200; move it away"):
        tune(ROTATE, target, CPU, trials=4, logs=logs)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == before
    assert not cache.exists()


def test_a_malformed_work_database(folders):
    """What a killed search may leave."""
    cache, logs = folders
    directory = cache / "tuning" / detect(CPU).name / ROTATE.label
    directory.mkdir(parents=True)
    (directory / "database_workload.json").write_text('["1')
    with pytest.raises(TuningLogError, match=rf"{directory} must hold a readable.*--fresh"):
        tune(ROTATE, detect(CPU), CPU, trials=4, logs=logs)


def test_the_device_must_be_the_target(folders):
    _, logs = folders
    with pytest.raises(TuningLogError, match="device must be a nvidia_h200, got a x86_64"):
        tune(ROTATE, get_target("nvidia_h200"), CPU, logs=logs)
    assert not logs.exists()
