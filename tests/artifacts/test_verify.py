"""Digests: an altered library is named, with both digests and the command, and never loaded."""

from __future__ import annotations

import hashlib

import pytest
import torch

from tq_tvm.artifacts import Manifest, load, verify_all, verify_directory
from tq_tvm.errors import ArtifactCorruptError

CPU = torch.device("cpu")


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def test_untouched(root, library):
    assert verify_directory(library) == Manifest.read(library)
    assert verify_all([root]) == {library: None}


@pytest.mark.parametrize("damage", [flip_a_byte, truncate])
def test_altered_file_is_not_loaded(library, spec, damage):
    path = library / "kernels.so"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    damage(path)
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ArtifactCorruptError) as caught:
        load("rotate", spec, CPU)
    for part in (path, expected, actual, f"tq-tvm build --target x86_64 --spec {spec.label}"):
        assert str(part) in str(caught.value)


def test_missing_file(library, spec):
    (library / "kernels.so").unlink()
    with pytest.raises(ArtifactCorruptError, match=r"kernels.so must be .* got no such file"):
        load("rotate", spec, CPU)


def test_not_a_library(library, spec):
    path = library / "kernels.so"
    path.write_text("not a library")
    manifest = Manifest.read(library)
    record = type(manifest.files["kernels.so"]).of(path)
    files = {"kernels.so": record}
    type(manifest)(
        spec=manifest.spec, target=manifest.target, files=files, functions=manifest.functions
    ).write(library)
    with pytest.raises(ArtifactCorruptError, match="must be a library of this platform"):
        load("rotate", spec, CPU)


def test_altered_after_a_load_is_seen_when_asked(root, library, spec):
    load("rotate", spec, CPU)
    # Replaced, not written in place: this process has the file mapped.
    path = library / "kernels.so"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + b"\xff")
    problems = verify_all([root])
    assert "sha256 of" in problems[library]


def test_every_library_is_reported(root, library):
    other = root / "x86_64" / "elsewhere"
    other.mkdir()
    (other / "kernels.so").write_bytes(b"")
    problems = verify_all([root, root / "absent"])
    assert problems[library] is None
    assert "manifest.json must be a readable file" in problems[other]
