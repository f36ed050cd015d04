"""The demo: its numbers, its exit code, and the ways in which it comes by kernels."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from tq_tvm import env, targets
from tq_tvm.artifacts import FileRecord, Manifest, Variant, manifest
from tq_tvm.build.sources import sources_digest
from tq_tvm.demo import __main__ as demo
from tq_tvm.demo import prepare
from tq_tvm.errors import BuildError, TQError, TuningLogError
from tq_tvm.quality.theory import expected_distortion
from tq_tvm.served import functions_on
from tq_tvm.spec import K4V2, CacheSpec

LENGTHS = (1, 17, 65, 130)
"""The newest token of the third opens a page; 1600 rows of each kind are enough for 2 %."""

SMALL = CacheSpec(head_dim=64, num_q_heads=8, num_kv_heads=4, page_size=16, dtype="float32")
ON_CPU = functions_on(SMALL, "llvm")


def paper(bits):
    """Theorem 1 of arXiv 2504.19874."""
    return {2: 0.1175, 3: 0.0345}[bits]


def test_theory_of_plain_codebooks_is_that_of_the_paper():
    assert expected_distortion(K4V2.value) == pytest.approx(paper(2), rel=1e-3)
    plain = SimpleNamespace(
        boundaries=K4V2.key.boundaries, centroids=K4V2.key.centroids, residual_sign=False
    )
    assert expected_distortion(plain) == pytest.approx(paper(3), rel=2e-3)


def test_theory_of_the_residual_sign_agrees_with_sampling():
    z = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centroids = torch.tensor(K4V2.key.centroids, dtype=torch.float64)
    nearest = (z[:, None] - centroids).abs().argmin(1)
    residual = z - centroids[nearest]
    error = residual - residual.square().mean().sqrt() * residual.sign()
    assert expected_distortion(K4V2.key) == pytest.approx(float(error.square().mean()), rel=5e-3)


def test_numbers(library, device):
    library(demo.SPEC, device)
    result = demo.run(lengths=LENGTHS, device=device, times=False)
    errors = result.errors
    assert result.problems == []
    assert result.bytes_per_token == 8 * (64 + 32 + 3 * 2)
    assert result.compression == 4096 / 816
    assert errors.k_gaussian == pytest.approx(errors.k_theory, rel=0.1)
    assert errors.v == pytest.approx(errors.v_theory, rel=0.1)
    assert errors.attention_dequantised[1] <= 1e-2
    # Values are independent, so the distortion of V passes to the output as it is.
    assert errors.attention_unquantised[0] == pytest.approx(math.sqrt(errors.v), rel=0.15)


def test_float32_is_held_to_its_own_limit(library):
    device = torch.device("cpu")
    library(SMALL, device)
    result = demo.run(SMALL, LENGTHS, device=device, times=False)
    assert result.problems == []
    assert result.errors.attention_dequantised[1] <= 1e-5


def test_command_prints_every_table(library, device):
    library(demo.SPEC, device)
    arguments = ["--device", str(device), "--lengths", ",".join(map(str, LENGTHS))]
    result = CliRunner().invoke(demo.main, arguments)
    assert result.exit_code == 0, result.output
    for text in (targets.detect(device).name, "found in", "5.02", "0.1175", "torch us", "sdpa"):
        assert text in result.output
    for name in ("rotate", "fill, prefill", "fill, append", "flatten", "decode"):
        # Once with its time, once with its variant.
        assert sum(line.startswith(name) for line in result.output.splitlines()) == 2


def test_a_limit_that_is_exceeded_is_exit_code_1(library, monkeypatch):
    library(demo.SPEC, torch.device("cpu"))
    monkeypatch.setitem(demo.ATTENTION_LIMITS, "bfloat16", 1e-6)
    arguments = ["--device", "cpu", "--no-times", "--lengths", "100,200"]
    result = CliRunner().invoke(demo.main, arguments)
    assert result.exit_code == 1
    assert "decode must be within 1e-06 of float32 attention" in result.output


def test_nan_is_a_problem(library):
    library(demo.SPEC, torch.device("cpu"))
    result = demo.run(lengths=LENGTHS, device="cpu", times=False)
    broken = {**vars(result.errors), "v": math.nan, "attention_dequantised": (math.nan, math.nan)}
    assert len(demo._problems(type(result.errors)(**broken), 1e-2)) == 2


@pytest.mark.parametrize("text", ["", "0", "1,-2", "one"])
def test_bad_lengths_are_wrong_usage(text):
    assert CliRunner().invoke(demo.main, ["--lengths", text]).exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    result = CliRunner().invoke(demo.main, ["--device", "cuda"])
    assert result.exit_code == 1
    assert "sees no CUDA GPU; use one of them or the CPU" in result.output


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """A machine without libraries, and with a cache of its own."""
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(tmp_path / "artifacts"))
    monkeypatch.setenv("TQ_TVM_CACHE_DIR", str(tmp_path / "cache"))
    prepare.ops.clear_cache()
    yield
    prepare.ops.clear_cache()


def test_without_compiler_the_command_to_run_is_told(empty, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(BuildError, match=r"pip install 'tq-tvm\[tune\]'"):
        prepare.prepare(SMALL, torch.device("cpu"))


@pytest.fixture
def search(empty, monkeypatch, tmp_path):
    """A log of chosen functions; a search and a compiler that only note what they are asked for."""
    pytest.importorskip("tvm", reason="the compiler is not installed")
    import tq_tvm.build.library as library
    import tq_tvm.tuning.database as database
    import tq_tvm.tuning.search as search

    state = SimpleNamespace(records=(), searched=[], logs=None, outcome=lambda workload: None)

    def tune(workload, target, device, *, logs, **options):
        assert 0 < options["seconds"] <= 60
        state.searched.append(workload.function)
        state.outcome(workload)
        return SimpleNamespace(us=1.0, default_us=2.0)

    def build_library(spec, target, root, *, logs):
        state.logs = logs
        return root / target.name / spec.label

    def find_records(function, spec, target, logs=None):
        return [object()] if function in state.records else []

    monkeypatch.setattr(search, "tune", tune)
    monkeypatch.setattr(library, "build_library", build_library)
    committed = tmp_path / "committed"
    (committed / targets.detect("cpu").name / "kept").mkdir(parents=True)
    monkeypatch.setattr(database, "logs_root", lambda: committed)
    monkeypatch.setattr(database, "find_records", find_records)
    monkeypatch.setattr(prepare, "_tuned", lambda directory: "stub")
    monkeypatch.setattr(prepare, "_check_served", lambda *arguments: None)
    return state


def test_records_are_built_without_a_search(search, capsys):
    search.records = ON_CPU
    prepare.prepare(SMALL, torch.device("cpu"))
    assert search.searched == []
    assert search.logs.name == "committed"
    assert "built in" in capsys.readouterr().out


@pytest.fixture
def described(search, monkeypatch, tmp_path):
    """A library that serves every function, by its manifest: ``described(sources)``."""
    search.records = ON_CPU

    def describe(sources):
        target = targets.detect("cpu")
        directory = tmp_path / "artifacts" / target.name / SMALL.label
        variants = {f: [Variant(symbol=f, size=1, tuned=True)] for f in ON_CPU}
        files = {"kernels.so": FileRecord(sha256="0" * 64, bytes=0)}
        Manifest(SMALL.label, target, files, variants, sources=sources).write(directory)

    return describe


def test_a_library_of_these_sources_is_taken(search, described, capsys):
    described(sources_digest())
    prepare.prepare(SMALL, torch.device("cpu"))
    assert search.logs is None
    assert "built" not in capsys.readouterr().out


def test_a_library_of_other_sources_is_built_again(search, described, capsys):
    described("of other sources")
    prepare.prepare(SMALL, torch.device("cpu"))
    assert search.logs.name == "committed"
    assert "other sources than these, so they are built again" in capsys.readouterr().out


def test_a_library_of_other_sources_is_taken_where_there_is_no_compiler(
    search, described, monkeypatch, capsys
):
    described("of other sources")
    monkeypatch.setitem(sys.modules, "tvm", None)
    prepare.prepare(SMALL, torch.device("cpu"))
    assert search.logs is None
    assert "there is no compiler" in capsys.readouterr().out


def test_a_library_of_another_interface_is_built_again(search, described, monkeypatch):
    monkeypatch.setattr(manifest, "ABI", manifest.ABI + 1)
    described(sources_digest())
    prepare.prepare(SMALL, torch.device("cpu"))
    assert search.logs.name == "committed"


def test_functions_without_records_are_searched_attention_first(search, capsys):
    search.records = ("rotate", "flatten")
    prepare.prepare(SMALL, torch.device("cpu"))
    assert search.searched[0] == "decode"
    assert set(search.searched) == set(ON_CPU) - set(search.records)
    assert search.logs == env.cache_dir() / "demo" / "tuning_logs"
    # Those that are not searched keep their records.
    assert (search.logs / targets.detect("cpu").name / "kept").is_dir()
    assert "has no records of fill_slots, fill_table" in capsys.readouterr().out


def test_retune_searches_in_spite_of_records(search):
    search.records = ON_CPU
    prepare.prepare(SMALL, torch.device("cpu"), retune=True)
    assert set(search.searched) == set(ON_CPU)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(), TuningLogError()])
def test_interrupt_builds_what_was_found(search, capsys, error):
    def interrupt_second(workload):
        if len(search.searched) == 2:
            # As TVM does it: the handler runs, and its exception comes out as another.
            with pytest.raises(KeyboardInterrupt):
                prepare.signal.raise_signal(prepare.signal.SIGINT)
            raise error

    search.outcome = interrupt_second
    before = prepare.signal.getsignal(prepare.signal.SIGINT)
    prepare.prepare(SMALL, torch.device("cpu"))
    assert len(search.searched) == 2
    assert search.logs is not None
    assert "interrupted; going on with what was found" in capsys.readouterr().out
    assert prepare.signal.getsignal(prepare.signal.SIGINT) is before


def test_a_failed_search_is_told_and_the_others_go_on(search, capsys):
    def fail_decode(workload):
        if workload.function == "decode":
            raise TuningLogError("no candidate is right")

    search.outcome = fail_decode
    prepare.prepare(SMALL, torch.device("cpu"))
    assert set(search.searched) == set(ON_CPU)
    told = capsys.readouterr().err
    assert "keeps the default schedule: no candidate is right" in told


def test_a_bug_in_a_search_is_not_hidden(search):
    def bug(workload):
        raise RuntimeError("bug")

    search.outcome = bug
    with pytest.raises(RuntimeError, match="bug"):
        prepare.prepare(SMALL, torch.device("cpu"))


def test_the_minute_ends(search, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def take(workload):
        now[0] += 35.0

    search.outcome = take
    prepare.prepare(SMALL, torch.device("cpu"))
    # 35 s, 25 s left: one more fits about; then it is over.
    assert len(search.searched) == 2
    assert "not reached: rotate" in capsys.readouterr().out


def test_other_kernels_than_those_just_built_are_refused(empty, monkeypatch, tmp_path):
    target = targets.detect("cpu")
    monkeypatch.setattr(prepare.artifacts, "locate", lambda *a: (tmp_path / "prebuilt", None))
    with pytest.raises(TQError, match="which comes first; run again with TQ_TVM_ARTIFACT_DIR="):
        prepare._check_served(SMALL, target, tmp_path / "mine")
