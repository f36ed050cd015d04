"""Rows with other programs in them: measured, written, tabulated and drawn."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from specs import CPU_SPECS

from tq_tvm.bench import peers
from tq_tvm.bench.baseline import Peer
from tq_tvm.bench.cases import Workload
from tq_tvm.bench.results import read_rows, write_rows
from tq_tvm.bench.roofline import draw
from tq_tvm.bench.run import run_rows
from tq_tvm.bench.table import compare_tables, table
from tq_tvm.errors import ArgumentValueError

SPEC = CPU_SPECS[-1]
DECODE = Workload("decode", SPEC, 2, 48)
RAGGED = Workload("decode", SPEC, 3, 70, shortest=5)
ROTATE = Workload("rotate", SPEC, 64, 1)
REPORT = Path(__file__).parents[2] / "tools" / "report.py"


def dense(factor=1.0):
    def make(inputs):
        want = inputs.dense_attention(torch.float32)
        out = torch.zeros(inputs.q.shape)
        out[inputs.sample] = want * factor
        return Peer(lambda: out, 1000, {"dense": "2.0"}, inputs.sample, [want], 0.05)

    return make


@pytest.fixture(scope="module")
def measured(library):
    """One run with a peer that is right, one that is wrong, and one that is not installed."""
    cpu = torch.device("cpu")
    library(SPEC, cpu)
    chosen = {
        "right": dense(),
        "wrong": dense(1.2),
        "FlashInfer": peers.DECODE["FlashInfer"],
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("flashinfer", "fast_hadamard_transform"):
            patch.setitem(sys.modules, name, None)
        patch.setattr(peers, "DECODE", chosen)
        return run_rows([DECODE, RAGGED, ROTATE], cpu, compare=True, launches=3)


def test_rows_hold_every_baseline_and_the_reasons_of_the_absent(measured):
    decode, ragged, rotate = measured
    assert list(decode.baselines) == ["torch sdpa, dense", "right"]
    assert list(ragged.baselines) == ["right"]
    for row in (decode, ragged):
        assert row.baseline_bytes["right"] == 1000
        assert row.baseline_bytes.keys() == row.baselines.keys()
        assert row.conditions["dense"] == "2.0"
        assert "relative error" in row.peers_absent["wrong"]
        assert row.peers_absent["FlashInfer"].startswith("ModuleNotFoundError: ")
    moved = 2 * 48 * 2 * 128 * 2 * 4 + 2 * 2 * 8 * 128 * 4
    assert decode.baseline_bytes["torch sdpa, dense"] == moved
    assert list(rotate.baselines) == ["torch, x @ H", "torch, butterflies"]
    assert list(rotate.peers_absent) == ["fast_hadamard_transform"]


def test_without_compare_decode_has_torch_alone(library, monkeypatch):
    def make(inputs):
        raise AssertionError("made")

    cpu = torch.device("cpu")
    library(SPEC, cpu)
    monkeypatch.setattr(peers, "DECODE", {"peer": make})
    (row,) = run_rows([DECODE], cpu, launches=3)
    assert list(row.baselines) == ["torch sdpa, dense"]
    assert row.peers_absent == {}


def test_tables_show_torch_and_peers_apart(measured):
    assert "right" not in table(measured)
    tables = compare_tables(measured)
    assert list(tables) == ["decode"]
    header, _, first, second = tables["decode"].splitlines()
    assert header.split() == ["decode", "us", "torch", "sdpa,", "dense", "right"]
    ratio = f"({measured[0].baselines['right'] / measured[0].us:.2f}x)"
    assert "2 x 48, 8/2" in first and ratio in first
    assert "3 x 5..70, 8/2" in second and " - " in second


def test_a_report_has_tables_and_a_picture(measured, tmp_path):
    pytest.importorskip("matplotlib", reason="the plotter (extra 'plot') is not installed")
    bench, readme = tmp_path / "logs" / "bench.json", tmp_path / "README.md"
    write_rows(bench, measured)
    assert read_rows(bench) == measured
    readme.write_text("before\n<!-- bench: begin -->\n<!-- bench: end -->\nafter\n")
    main = runpy.run_path(str(REPORT))["main"]
    result = CliRunner().invoke(main, [str(bench), "--readme", str(readme)])
    assert result.exit_code == 0, result.output
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "torch us" in text and "| right" in text
    assert "dense 2.0" in text
    assert "![bandwidth of decode over bytes moved](logs/roofline.svg)" in text
    picture = (tmp_path / "logs" / "roofline.svg").read_text()
    for label in ("tq_tvm", "torch sdpa, dense", "right", "large copy"):
        assert label in picture
    draw(measured, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == picture


def test_a_report_of_several_runs_names_the_copies_of_all(measured, tmp_path):
    bench, readme = tmp_path / "bench.json", tmp_path / "README.md"
    for reached, said in (
        ((2.5, 2.5), "that run: 2.500"),
        ((3, 2.5), "these runs: 2.500 to 3.000"),
    ):
        rows = [
            msgspec.structs.replace(row, copy_tb_per_s=value)
            for row, value in zip(measured[:2], reached, strict=True)
        ]
        write_rows(bench, rows)
        readme.write_text("<!-- bench: begin -->\n<!-- bench: end -->\n")
        main = runpy.run_path(str(REPORT))["main"]
        options = ["--readme", str(readme), "--no-picture"]
        assert CliRunner().invoke(main, [str(bench), *options]).exit_code == 0
        assert f"Copy bandwidth in {said} TB/s." in readme.read_text()


def test_a_report_of_another_machine_has_marks_of_its_own(measured, tmp_path):
    """And takes other programs from the run that was beside them."""
    bench, readme = tmp_path / "bench.json", tmp_path / "README.md"
    write_rows(bench, measured[:1])
    write_rows(tmp_path / "compare.json", measured[1:2])
    kept = "<!-- bench: begin -->\nkept\n<!-- bench: end -->\n"
    readme.write_text(f"{kept}<!-- other: begin -->\n<!-- other: end -->\n")
    main = runpy.run_path(str(REPORT))["main"]
    options = ["--readme", str(readme), "--name", "other", "--no-picture"]
    result = CliRunner().invoke(main, [str(bench), *options])
    assert result.exit_code == 0, result.output
    text = readme.read_text()
    assert text.startswith(kept)
    timed, beside = text.removeprefix(kept).split("Copy bandwidth", 1)
    assert "2 x 48" in timed and "3 x 5..70" not in timed
    assert "3 x 5..70" in beside and "![" not in text
    result = CliRunner().invoke(main, [str(bench), "--readme", str(readme), "--name", "absent"])
    assert isinstance(result.exception, ArgumentValueError)


def test_rows_of_an_older_bench_are_read(measured, tmp_path):
    """Without bytes of baselines, which are then not drawn."""
    import msgspec

    row = msgspec.to_builtins(measured[0])
    del row["baseline_bytes"], row["peers_absent"]
    path = tmp_path / "bench.json"
    path.write_bytes(msgspec.json.encode([row]))
    (read,) = read_rows(path)
    assert read.baseline_bytes == read.peers_absent == {}
    assert "torch sdpa, dense" in table([read])


def test_a_picture_needs_decode(measured, tmp_path):
    with pytest.raises(ArgumentValueError, match="rows must have some of decode"):
        draw(measured[2:], tmp_path / "roofline.svg")
