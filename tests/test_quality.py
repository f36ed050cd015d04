"""What formats lose: the measurements against theory, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from tq_tvm.cli import main
from tq_tvm.formats import CODECS, FORMATS
from tq_tvm.quality import codec_table, measure_codecs, measure_preset, preset_table
from tq_tvm.quality.rows import KINDS, make_rows
from tq_tvm.quality.theory import expected_distortion, shannon_bound


@pytest.fixture(scope="module")
def codecs():
    return {(row.codec, row.scale_rule): row for row in measure_codecs(128)}


TABLES = [name for name, codec in CODECS.items() if codec.family == "lloyd_max"]


@pytest.mark.parametrize("name", TABLES)
def test_distortion_is_that_of_theory(codecs, name):
    """Within 2 % at head_dim 128; the limit is that of the paper (arXiv 2504.19874, theorem 1)."""
    row = codecs[name, "norm"]
    assert row.distortion == pytest.approx(row.theory, rel=0.02)
    assert row.theory < row.limit
    paper = {"mse2": 0.1175, "mse3": 0.0345, "mse4": 0.0095}
    if name in paper:
        assert row.limit == pytest.approx(paper[name], abs=6e-5)
        assert shannon_bound(CODECS[name].bits) < row.limit < 2.5 * shannon_bound(CODECS[name].bits)


@pytest.mark.parametrize("name", TABLES)
def test_theory_nears_its_limit(name):
    errors = [
        abs(expected_distortion(CODECS[name], d) / expected_distortion(CODECS[name]) - 1)
        for d in (64, 256, 4096)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 2e-3


def test_slopes(codecs):
    for name in TABLES:
        assert codecs[name, "unbiased"].slope == pytest.approx(1, abs=3e-3)
    assert codecs["qjl4", "norm"].slope == pytest.approx(0.982, abs=3e-3)


def test_rows_are_the_same_for_a_seed():
    for kind in KINDS:
        assert torch.equal(make_rows(kind, 5, 64, 1), make_rows(kind, 5, 64, 1))
        assert not torch.equal(make_rows(kind, 5, 64, 1), make_rows(kind, 5, 64, 2))


def test_presets_are_told_apart():
    """More bits are better, nothing is lost without a format, and tq42 beats k4v2."""
    names = ("none", "tq44", "tq42", "k4v2", "tq22")
    found = {name: measure_preset(name, contexts=[512, 2048], logit_scales=[1.0]) for name in names}
    at = (2048, 1.0)
    assert found["none"].divergence[at] == found["none"].output[at] == 0
    assert found["none"].needle_found > 0.9 and found["none"].needle_weight == 1
    order = ("none", "tq42", "k4v2", "tq22")
    for field in ("divergence", "offset_divergence"):
        losses = [getattr(found[name], field)[at] for name in order]
        assert losses == sorted(losses)
        assert losses[1] < 0.75 * losses[2]
    assert found["tq44"].output[at] < found["tq42"].output[at] < found["tq22"].output[at]
    assert found["tq42"].key["gaussian"] <= 0.0095
    table = preset_table(list(found.values()))
    assert len(table.splitlines()) == 2 + len(names) and "100" in table


def test_the_table_of_codecs(codecs):
    assert len(codec_table(list(codecs.values())).splitlines()) == 2 + len(codecs)


def invoke(*arguments):
    return CliRunner().invoke(main, ["quality", *arguments])


def test_command(tmp_path):
    """Real rows, a README and pictures; keys of the JSON are text."""
    torch.save(torch.randn(64, 64), tmp_path / "rows.pt")
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- quality: begin -->\nold\n<!-- quality: end -->\nb\n")
    result = invoke(
        "--format", "42", "--format", "mse4-mse2-signed-unbiased", "--head-dim", "64",
        "--context", "256", "--rows", str(tmp_path / "rows.pt"), "--readme", str(readme),
        "--pictures", str(tmp_path / "pictures"), "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    presets = json.loads(result.stdout)["presets"]
    assert [p["format"] for p in presets] == ["k4v2", "mse4-mse2-signed-unbiased"]
    assert set(presets[0]["key"]) == {*KINDS, "real"}
    assert set(presets[0]["divergence"]) == {"256, 1", "256, 2", "256, 4"}
    text = readme.read_text()
    assert text.startswith("a\n") and text.endswith("b\n") and "old" not in text
    assert "| k4v2" in text and "| mse4" in text
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {"distortion.svg", "attention.svg"}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--format", "k9"], "must be one of 'k4v2' (42)"),
        (["--format", "43"], "must be one of 'k4v2' (42)"),
        (["--device", "foo"], "quality: device must be a torch device"),
    ],
)
def test_wrong_arguments(arguments, part):
    result = invoke(*arguments)
    assert result.exit_code == 1 and part in result.stderr


def test_rows_of_another_width(tmp_path):
    torch.save(torch.randn(64, 32), tmp_path / "rows.pt")
    result = invoke("--rows", str(tmp_path / "rows.pt"))
    assert result.exit_code == 1
    assert "rows must be a tensor [N, 128], got [64, 32]" in result.stderr


def test_every_preset_is_documented():
    from pathlib import Path

    import tq_tvm

    text = (Path(tq_tvm.__file__).parent / "FORMATS.md").read_text()
    for name, fmt in FORMATS.items():
        assert f"| `{name}` |" in text and f"`{fmt.slug}`" in text
