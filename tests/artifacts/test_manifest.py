"""Manifests: what is written is read back, and what cannot be read says why."""

from __future__ import annotations

import json

import pytest

from tq_tvm.artifacts import FileRecord, Manifest, Variant, schedule_word
from tq_tvm.artifacts.manifest import ABI
from tq_tvm.errors import ArtifactCorruptError
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import get_target

SPEC = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8)


@pytest.fixture
def manifest():
    return Manifest(
        spec=SPEC.label,
        target=get_target("nvidia_h200"),
        files={"kernels.so": FileRecord(sha256="0" * 64, bytes=3)},
        functions={
            "rotate": [
                Variant(symbol="r0", size=1024, tuned=True, workload="w", us=2.5, config={"a": 1}),
                Variant(symbol="r1", size=4096, tuned=False, launch={"tile": 64}),
            ]
        },
        versions={"tq_tvm": "0.1.0"},
        flags=["-O3"],
    )


@pytest.fixture
def directory(manifest, tmp_path):
    directory = tmp_path / "nvidia_h200" / SPEC.label
    manifest.write(directory)
    return directory


def edit(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_write_then_read(manifest, directory):
    assert Manifest.read(directory) == manifest
    assert manifest.parsed_spec == SPEC
    assert manifest.counts() == {"rotate": (1, 2)}
    assert [p.name for p in directory.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("tuned", "workload", "word"),
    [(True, "w", "tuned"), (False, "w", "default is best"), (False, None, "default")],
)
def test_the_word_for_a_schedule(tuned, workload, word):
    """A search that found nothing faster than the default did not tune it."""
    assert schedule_word(tuned, workload) == word


def test_fields_of_later_writers_are_ignored(manifest, directory):
    edit(directory, signature="x")
    assert Manifest.read(directory) == manifest


def test_newer_format(directory):
    # Fields may mean something else there, so the format is looked at first.
    edit(directory, format=2, files=[])
    with pytest.raises(ArtifactCorruptError, match=r"format of .* must be 1, got 2; update tq_tvm"):
        Manifest.read(directory)


@pytest.mark.parametrize("abi", [0, ABI - 1, ABI + 1])
def test_other_abi(directory, abi):
    edit(directory, abi=abi)
    expected = rf"abi of .* must be {ABI}, got {abi}; .* run `tq"
    with pytest.raises(ArtifactCorruptError, match=expected):
        Manifest.read(directory)


def test_manifest_without_an_abi(directory):
    path = directory / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["abi"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ArtifactCorruptError, match=rf"abi of .* must be {ABI}, got 0"):
        Manifest.read(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": "k4v2"}, "label must look like"),
        ({"files": {}}, "no digest of kernels.so"),
        ({"files": {"../kernels.so": {"sha256": "", "bytes": 0}}}, "which is a path"),
        ({"functions": {"rotate": []}}, "no variant"),
        ({"functions": {"rotate": [{"symbol": "r", "size": 0, "tuned": True}]}}, "without a size"),
        ({"functions": {"rotate": [{"symbol": "r"}]}}, "missing required field `size`"),
        ({"target": "nvidia_h200"}, "Expected `object`"),
    ],
)
def test_malformed(directory, changes, message):
    edit(directory, **changes)
    with pytest.raises(ArtifactCorruptError, match=message) as caught:
        Manifest.read(directory)
    assert str(directory / "manifest.json") in str(caught.value)
    assert f"tq-tvm build --target nvidia_h200 --spec {SPEC.label}" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "\xff", '{"format": 1'])
def test_truncated(directory, text):
    (directory / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactCorruptError, match=r"manifest\.json must be"):
        Manifest.read(directory)


def test_missing(tmp_path):
    with pytest.raises(ArtifactCorruptError, match="must be a readable file, got No such file"):
        Manifest.read(tmp_path / "nvidia_h200" / SPEC.label)
