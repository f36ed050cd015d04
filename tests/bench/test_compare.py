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
from tq_tvm.bench.results import read_rows, write_rows
from tq_tvm.bench.roofline import draw
from tq_tvm.bench.run import run_rows
from tq_tvm.bench.table import all_tables, compare_tables, headline, table
from tq_tvm.bench.workloads import Workload
from tq_tvm.errors import ArgumentValueError

SPEC = CPU_SPECS[-1]
DECODE = Workload("decode", SPEC, 2, 48)
RAGGED = Workload("decode", SPEC, 3, 70, shortest=5)
ROTATE = Workload("rotate", SPEC, 64, 1)
ROOT = Path(__file__).parents[2]
REPORT = ROOT / "tools" / "report.py"
TARGETS = sorted(path.parent for path in ROOT.glob("tuning_logs/*/bench.json"))


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
    assert header.split() == ["decode", "us", "of", "copy", "torch", "sdpa,", "dense", "right"]
    ratio = f"({measured[0].baselines['right'] / measured[0].us:.2f}x)"
    assert "2 x 48, 8/2" in first and ratio in first
    assert "3 x 5..70, 8/2" in second and " - " in second


def test_a_row_beside_torch_alone_is_in_one_table(measured):
    decode, ragged, _ = measured
    alone = msgspec.structs.replace(decode, baselines={"torch sdpa, dense": 1.0})
    assert "2 x 48" in table([alone, ragged])
    assert "2 x 48" not in compare_tables([alone, ragged])["decode"]
    assert compare_tables([alone]) == {}


def beside_flashinfer(rows):
    """The same rows, as if the peer had been FlashInfer, in bfloat16 and in fp8."""
    names = {"right": "FlashInfer"}
    for row in rows:
        times, moved = (
            {names.get(name, name): value for name, value in by_name.items()}
            for by_name in (row.baselines, row.baseline_bytes)
        )
        if row.kernel == "decode":
            times |= {"FlashInfer fp8": 1.0, "another": 2.0}
        yield msgspec.structs.replace(row, baselines=times, baseline_bytes=moved)


def report(folder, *options):
    """Run the program on a bench.json; returns the complete file's text and the headline file's."""
    complete, readme = folder / "README.md", folder.parent / "README.md"
    for path, name in ((complete, "bench"), (readme, f"bench {folder.name}")):
        path.write_text(f"before\n<!-- {name}: begin -->\nstale\n<!-- {name}: end -->\nafter\n")
    main = runpy.run_path(str(REPORT))["main"]
    arguments = [str(folder / "bench.json"), "--readme", str(readme), *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    texts = complete.read_text(), readme.read_text()
    for text in texts:
        assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    return texts


def test_a_report_has_tables_and_a_picture(measured, tmp_path):
    pytest.importorskip("matplotlib", reason="the plotter (extra 'plot') is not installed")
    folder = tmp_path / "gpu"
    rows = list(beside_flashinfer(measured))
    write_rows(folder / "bench.json", rows)
    assert read_rows(folder / "bench.json") == rows
    complete, few = report(folder, "--picture")
    assert "torch us" in complete and "| another" in complete and "64 x 128" in complete
    assert "dense 2.0" in complete
    assert "![bandwidth of decode over bytes moved](roofline.svg)" in complete
    header = next(line for line in few.splitlines() if line.startswith("|"))
    names = ["decode", "us", "of copy", "torch sdpa, dense", "FlashInfer", "FlashInfer fp8"]
    assert [cell.strip() for cell in header.strip("|").split("|")] == names
    assert "dense 2.0" in few and "64 x 128" not in few and "![" not in few
    picture = (folder / "roofline.svg").read_text()
    for label in ("tq_tvm", "torch sdpa, dense", "FlashInfer", "large copy"):
        assert label in picture
    draw(rows, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == picture


def test_a_report_of_several_runs_names_the_copies_of_all(measured, tmp_path):
    for reached, said in (
        ((2.5, 2.5), "that run: 2.500"),
        ((3, 2.5), "these runs: 2.500 to 3.000"),
    ):
        rows = [
            msgspec.structs.replace(row, copy_tb_per_s=value)
            for row, value in zip(beside_flashinfer(measured[:2]), reached, strict=True)
        ]
        write_rows(tmp_path / "gpu" / "bench.json", rows)
        for text in report(tmp_path / "gpu"):
            assert f"Copy bandwidth in {said} TB/s." in text
            assert "![" not in text


def test_a_report_takes_other_programs_from_the_run_beside_them(measured, tmp_path):
    folder = tmp_path / "gpu"
    write_rows(folder / "bench.json", measured[:1])
    write_rows(folder / "compare.json", list(beside_flashinfer(measured[1:2])))
    complete, few = report(folder)
    timed, beside = complete.split("Copy bandwidth", 1)
    assert "2 x 48" in timed and "3 x 5..70" not in timed
    for text in (beside, few):
        assert "3 x 5..70" in text and "2 x 48" not in text


def test_a_report_needs_marks_and_flashinfer(measured, tmp_path):
    bench, readme = tmp_path / "bench.json", tmp_path / "README.md"
    main = runpy.run_path(str(REPORT))["main"]
    readme.write_text("no marks")
    arguments = [str(bench), "--readme", str(readme)]
    for rows, message in (
        (measured, "must have some of decode beside FlashInfer"),
        (list(beside_flashinfer(measured)), "must have one <!-- bench: begin -->"),
    ):
        write_rows(bench, rows)
        with pytest.raises(ArgumentValueError, match=message):
            CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert readme.read_text() == "no marks"


@pytest.mark.parametrize("target", TARGETS, ids=lambda path: path.name)
def test_the_committed_tables_are_of_the_committed_rows(target):
    """Else run tools/report.py."""
    rows = read_rows(target / "bench.json")
    beside = target / "compare.json"
    compared = read_rows(beside) if beside.exists() else None
    picture = "roofline.svg" if (target / "roofline.svg").exists() else ""
    for folder, name, text in (
        (target, "bench", all_tables(rows, compared, picture)),
        (ROOT, f"bench {target.name}", headline(compared or rows)),
    ):
        marked = f"<!-- {name}: begin -->\n{text}\n<!-- {name}: end -->"
        assert (folder / "README.md").read_text().count(marked) == 1


def test_rows_of_an_older_bench_are_read(measured, tmp_path):
    """Without bytes of baselines, which are then not drawn."""
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
