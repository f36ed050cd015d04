"""The command ``tq-tvm``: what it prints, writes and exits with."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from tq_tvm import hadamard_rotate, reference
from tq_tvm.artifacts import Manifest
from tq_tvm.artifacts.manifest import LIBRARY_NAME
from tq_tvm.cli import main
from tq_tvm.targets import detect

SPEC = "k4v2_d64_hq4_hk2_p16_f32_bshd"


def invoke(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")
    root = tmp_path_factory.mktemp("artifacts")
    name = detect("cpu").name
    result = invoke("build", "--target", name, "--spec", SPEC, "--out", str(root), "--json")
    assert result.exit_code == 0, result.output
    return root, json.loads(result.stdout)


def test_refile_of_no_log_has_nothing_to_say(tmp_path):
    pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")
    result = invoke("refile", "--target", "x86_64", "--logs", str(tmp_path))
    assert (result.exit_code, result.output) == (0, "")


def test_build_writes_a_library_with_every_function(built):
    root, printed = built
    manifest = Manifest.read(root / detect("cpu").name / SPEC)
    assert printed[0]["directory"] == str(root / detect("cpu").name / SPEC)
    assert set(manifest.functions) == {
        "rotate",
        "fill_slots",
        "fill_table",
        "flatten",
        "flatten_unrotated",
        "decode",
        "attend",
    }
    assert manifest.versions["apache-tvm"]


def test_list_and_verify(built, monkeypatch):
    root, _ = built
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(root))
    (listed,) = json.loads(invoke("list", "--json").stdout)
    assert listed["spec"] == SPEC
    assert listed["problem"] is None
    assert SPEC in invoke("list").stdout
    result = invoke("verify")
    assert result.exit_code == 0
    assert "ok" in result.stdout


def test_a_library_of_a_rotation(monkeypatch, tmp_path):
    """It has this function alone, and calls find it."""
    pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(tmp_path))
    result = invoke("build", "--target", detect("cpu").name, "--spec", "rotate_d512_f32", "--json")
    assert result.exit_code == 0, result.output
    (listed,) = json.loads(invoke("list", "--json").stdout)
    assert listed["spec"] == "rotate_d512_f32"
    assert listed["functions"] == {"rotate": [0, 1]}
    assert invoke("verify").exit_code == 0
    x = torch.eye(512)
    assert torch.allclose(hadamard_rotate(x), reference.hadamard_rotate(x))


def test_verify_fails_on_a_changed_byte(built, monkeypatch, tmp_path):
    import shutil

    root, _ = built
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    library = copy / detect("cpu").name / SPEC / LIBRARY_NAME
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(bytes(data))
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(copy))
    result = invoke("verify", "--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout).values()
    assert "sha256" in problem
    assert "tq-tvm build" in problem


def test_nothing_to_list_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(tmp_path))
    assert "tq-tvm build" in invoke("list").stdout


def test_show_config(monkeypatch, tmp_path):
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(tmp_path))
    facts = json.loads(invoke("show-config", "--json").stdout)
    assert facts["artifact directories"] == str(tmp_path)
    assert facts["cpu target"] == detect("cpu").name


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["build", "--spec", "k4v2_d100"], "label must look like"),
        (["build", "--target", "nvidia_x"], "name must be one of"),
        (["tune", "--kernel", "decode2"], "'decode2' is not one of"),
        (["tune", "--trials", "0"], "not in the range"),
        (["build", "--logs", "/nonexistent"], "'/nonexistent' does not exist"),
    ],
)
def test_wrong_usage_exits_with_two(arguments, part):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert part in result.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["bench", "--device", "foo"], "bench: device must be a torch device, got 'foo'"),
        (["bench", "--device", "cuda:99"], "bench: device must be one that torch can use"),
        (
            ["build", "--target", "nvidia_h200", "--spec", SPEC],
            f"float16 or bfloat16), got {SPEC}; use the CPU",
        ),
    ],
)
def test_a_wrong_argument_exits_with_one(arguments, part, monkeypatch, tmp_path):
    pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(tmp_path))
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert part in result.stderr


def test_a_wrong_log_level_exits_with_one(monkeypatch):
    monkeypatch.setenv("TQ_TVM_LOG_LEVEL", "LOUD")
    result = invoke("list")
    assert result.exit_code == 1
    assert "TQ_TVM_LOG_LEVEL must be one of" in result.stderr


def test_tuning_for_another_gpu_is_refused(monkeypatch, tmp_path):
    pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which may be that one")
    monkeypatch.setenv("TQ_TVM_CACHE_DIR", str(tmp_path))
    result = invoke("tune", "--target", "nvidia_a100", "--logs", str(tmp_path))
    assert result.exit_code == 1
    # Once, not for each workload.
    assert result.stderr.count("tune: device must be a nvidia_a100") == 1
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_to_is_told_once(monkeypatch, tmp_path):
    """Before any search."""
    pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")
    from tq_tvm.tuning import search

    def tune(*arguments, **options):
        raise AssertionError("a search")

    monkeypatch.setattr(search, "tune", tune)
    name = detect("cpu").name
    root = tmp_path / name
    root.mkdir()
    (root / "metadata.json").write_text('{"target": "nvidia_h200", "arch": "sm_90a"}')
    result = invoke("tune", "--target", name, "--logs", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.count("got records of nvidia_h200") == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_what_ctrl_c_kept_is_shown(monkeypatch, tmp_path, as_json):
    pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")
    from tq_tvm.tuning import search
    from tq_tvm.tuning.database import Entry, Environment
    from tq_tvm.tuning.interrupt import SearchInterrupted

    def tune(workload, *arguments, **options):
        entry = Entry(
            workload=workload.label,
            function=workload.function,
            spec=workload.spec.label,
            shape=workload.shape,
            size=1,
            us=12.5,
            default_us=13.5,
            search_us=12.0,
            trials=6,
            failures=1,
            max_error=0.0,
            config={"tile": 32},
            environment=Environment("a CPU", {}, "2026-01-01", 1),
        )
        raise SearchInterrupted(entry)

    monkeypatch.setattr(search, "tune", tune)
    arguments = ["tune", "--target", detect("cpu").name, "--kernel", "decode"]
    result = invoke(*arguments, "--logs", str(tmp_path), *(["--json"] if as_json else []))
    assert result.exit_code == 130
    if as_json:
        (entry,) = json.loads(result.stdout)
        assert (entry["trials"], entry["failures"], entry["us"]) == (6, 1, 12.5)
    else:
        assert "12.5" in result.stdout and "tile=32" in result.stdout


def test_bench_times_some_rows_and_keeps_the_others(built, monkeypatch, tmp_path):
    root, _ = built
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(root))
    path = tmp_path / "bench.json"
    bench = ["bench", "--device", "cpu", "--kernel", "rotate", "--launches", "3"]
    assert invoke(*bench, "--json", str(path)).exit_code == 0
    (row,) = rows = json.loads(path.read_text())
    rows.insert(0, row | {"kernel": "fill", "us": 1.0})
    rows.append(row | {"us": 2.0, "workload": row["workload"] | {"graph": True}})
    rows[1] = row | {"us": -1.0}
    path.write_text(json.dumps(rows))
    assert (
        invoke(*bench, "--only", "nothing", "--only", "x 128", "--json", str(path)).exit_code == 0
    )
    after = json.loads(path.read_text())
    assert [after[0], after[2]] == [rows[0], rows[2]]
    assert after[1]["us"] > 0
    path.write_text(json.dumps([row | {"conditions": row["conditions"] | {"device": "other"}}]))
    result = invoke(*bench, "--only", "x 128", "--json", str(path))
    assert result.exit_code == 1
    assert "rows must be of other like the others of the file" in result.stderr
    result = invoke(*bench, "--only", "x 64")
    assert result.exit_code == 1
    assert "only must be in one of 65536 x 128, got x 64" in result.stderr


def test_bench_times_every_row_of_a_kernel(built, monkeypatch, tmp_path):
    root, _ = built
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(root))
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", None)
    path = tmp_path / "bench.json"
    result = invoke(
        "bench", "--device", "cpu", "--kernel", "rotate", "--launches", "3", "--json", str(path)
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads(path.read_text())
    assert row["kernel"] == "rotate"
    assert row["workload"]["rows"] == 65536
    assert row["bytes"] == 65536 * 128 * 2 * 2
    assert row["us"] > 0
    assert row["default_us"] is None
    assert list(row["peers_absent"]) == ["fast_hadamard_transform"]
    assert "not timed: fast_hadamard_transform: ModuleNotFoundError" in result.stderr
    assert row["fraction_of_copy"] == pytest.approx(row["tb_per_s"] / row["copy_tb_per_s"], rel=0.1)
