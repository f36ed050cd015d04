"""Search: which library is taken, in which order, and the reasons against the others."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys

import msgspec
import pytest
import torch

from tq_tvm import CacheSpec, hadamard_rotate
from tq_tvm.artifacts import FileRecord, Manifest, Variant, list_artifacts, load, locate
from tq_tvm.errors import ArtifactCorruptError, ArtifactNotFoundError
from tq_tvm.spec import RotateSpec
from tq_tvm.targets import TargetInfo, canonical_gpu_name, detect, get_target

SPEC = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8)
H200 = get_target("nvidia_h200")
FUNCTIONS = ("rotate", "fill_slots", "fill_table", "flatten", "flatten_unrotated", "decode")


def describe(root, target, spec=SPEC, functions=FUNCTIONS):
    """A library of which only the manifest matters; `locate` does not open the others."""
    directory = root / target.name / spec.label
    Manifest(
        spec=spec.label,
        target=target,
        files={"kernels.so": FileRecord(sha256="0" * 64, bytes=0)},
        functions={name: [Variant(symbol=name, size=1, tuned=True)] for name in functions},
    ).write(directory)
    (directory / "kernels.so").touch()
    return directory


@pytest.fixture
def places(tmp_path, monkeypatch):
    roots = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", os.pathsep.join(map(str, roots)))
    return roots


def test_own_gpu_before_same_architecture(places):
    describe(places[0], get_target("nvidia_h100"))
    own = describe(places[1], H200)
    assert locate("decode", SPEC, H200)[0] == own


def test_same_architecture_serves(places):
    other = describe(places[0], get_target("nvidia_h100"))
    assert locate("decode", SPEC, H200)[0] == other


def test_earlier_place_first(places):
    described = [describe(root, H200) for root in places]
    assert locate("decode", SPEC, H200)[0] == described[0]


@pytest.mark.parametrize("available", [["x86_64"], ["x86_64", "x86_64_v3"]])
def test_best_cpu_level(places, available):
    device = detect("cpu")
    if device.name not in ("x86_64_v3", "x86_64"):
        pytest.skip(f"{device.name} is not an x86-64 CPU")
    for name in available:
        describe(places[0], get_target(name))
    best = "x86_64_v3" if "x86_64_v3" in available and device.name == "x86_64_v3" else "x86_64"
    assert locate("decode", SPEC, device)[0].parent.name == best


@pytest.mark.parametrize(
    ("function", "changes", "served"),
    [
        ("rotate", {"num_q_heads": 8, "page_size": 16, "layout": "bhsd"}, True),
        ("rotate", {"dtype": "float16"}, False),
        ("fill_slots", {"num_q_heads": 8}, True),
        ("flatten", {"num_q_heads": 8}, True),
        ("flatten", {"page_size": 16}, False),
        ("decode", {"num_q_heads": 8}, False),
    ],
)
def test_specs_agree_where_it_matters(places, function, changes, served):
    fields = {"head_dim": 128, "num_q_heads": 32, "num_kv_heads": 8} | changes
    directory = describe(places[0], H200, CacheSpec(**fields))
    if served:
        assert locate(function, SPEC, H200)[0] == directory
    else:
        with pytest.raises(ArtifactNotFoundError, match=f"it has {next(iter(changes))}"):
            locate(function, SPEC, H200)


@pytest.mark.parametrize("theirs", [SPEC, SPEC.rotation], ids=lambda s: s.label)
def test_a_rotation_is_found_by_dim_and_dtype_alone(places, theirs):
    """In libraries of caches and of rotations alike."""
    directory = describe(places[0], H200, theirs, theirs.functions)
    assert locate("rotate", RotateSpec(128), H200)[0] == directory
    assert locate("rotate", CacheSpec(128, 2, 1, 16), H200)[0] == directory
    for other, reason in (
        (RotateSpec(1024), "dim 128, not 1024"),
        (RotateSpec(128, "float16"), ""),
    ):
        with pytest.raises(ArtifactNotFoundError, match=f"it has {reason}") as caught:
            locate("rotate", other, H200)
        command = f"run `tq-tvm build --target nvidia_h200 --spec {other.label}`"
        assert command in str(caught.value)


def test_a_library_of_rotations_has_nothing_else(places):
    describe(places[0], H200, SPEC.rotation, ("rotate",))
    with pytest.raises(ArtifactNotFoundError, match="it has no function decode"):
        locate("decode", SPEC, H200)


def test_reason_for_every_candidate(places):
    other_spec = CacheSpec(head_dim=64, num_q_heads=32, num_kv_heads=8, dtype="float16")
    describe(places[0], get_target("nvidia_a100"))
    describe(places[0], get_target("x86_64"))
    describe(places[1], H200, other_spec)
    describe(places[1], H200, functions=("rotate",))
    with pytest.raises(ArtifactNotFoundError) as caught:
        locate("decode", SPEC, H200)
    message = str(caught.value)
    for part in (
        "must serve decode of k4v2_d128_hq32_hk8_p64_bf16_bshd on nvidia_h200 (sm_90a)",
        "tq-tvm build --target nvidia_h200 --spec k4v2_d128_hq32_hk8_p64_bf16_bshd",
        "it is for nvidia_a100 (sm_80), not for nvidia_h200 (sm_90a)",
        "it is for x86_64 (x86-64), not for nvidia_h200 (sm_90a)",
        "it has head_dim 64, not 128; dtype float16, not bfloat16",
        "it has no function decode",
        *map(str, places),
    ):
        assert part in message


def test_cpu_library_for_a_better_cpu(places):
    describe(places[0], TargetInfo("future", "llvm", "x86-64-v9"))
    with pytest.raises(ArtifactNotFoundError, match="it needs a CPU with x86-64-v9"):
        locate("decode", SPEC, detect("cpu"))


def test_nothing_anywhere(places):
    with pytest.raises(ArtifactNotFoundError, match=r"got none in .*first, .*second; run `tq-tvm"):
        locate("decode", SPEC, H200)


def test_unreadable_manifest_of_the_wanted_library(places):
    broken = describe(places[0], H200)
    (broken / "manifest.json").write_text("{")
    with pytest.raises(ArtifactCorruptError, match=str(broken)):
        locate("decode", SPEC, H200)
    # One for another GPU is no more than a rejected candidate.
    with pytest.raises(ArtifactNotFoundError, match=str(broken)):
        locate("decode", SPEC, get_target("nvidia_a100"))


def test_unreadable_manifest_before_a_good_one(places, caplog):
    broken = describe(places[0], H200)
    good = describe(places[1], H200)
    (broken / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING, "tq_tvm"):
        assert locate("decode", SPEC, H200)[0] == good
    assert str(broken) in caplog.text


def test_library_in_the_wrong_directory(places):
    directory = describe(places[0], get_target("nvidia_a100"))
    directory.parent.rename(places[0] / "nvidia_h200")
    with pytest.raises(ArtifactCorruptError, match="must be those of the directory"):
        locate("decode", SPEC, H200)


def test_list(root, library, spec):
    (info,) = list_artifacts(digests=True)
    assert (info.root, info.directory) == (root, library)
    assert (info.target, info.spec) == ("x86_64", spec.label)
    assert info.functions == {"rotate": (1, 2)}
    assert info.bytes == (library / "kernels.so").stat().st_size
    assert info.problem is None
    (library / "kernels.so").unlink()
    (info,) = list_artifacts()
    assert "no such file" in info.problem


def test_load_and_call(library, spec):
    loaded = load("rotate", spec, torch.device("cpu"))
    assert loaded.directory == library
    assert loaded.processors >= 1
    assert [v.symbol for v in loaded.variants] == ["copy_small", "copy_large"]
    # The geometric mean of the two sizes is 64 * 1000.
    assert loaded.nearest(1).symbol == "copy_small"
    assert loaded.nearest(64 * 999).symbol == "copy_small"
    assert loaded.nearest(64 * 1001).symbol == "copy_large"
    assert loaded.nearest(10**12).workload == "large"
    assert load("rotate", spec, torch.device("cpu")) is loaded
    x = torch.randn(3, 5, 64)
    assert torch.equal(hadamard_rotate(x), x)


def test_missing_symbol(library, spec):
    manifest = Manifest.read(library)
    functions = {"rotate": [Variant(symbol="gone", size=1, tuned=False)]}
    msgspec.structs.replace(manifest, functions=functions).write(library)
    with pytest.raises(ArtifactCorruptError, match="must have the symbol gone"):
        load("rotate", spec, torch.device("cpu"))


def test_kernel_that_refuses_valid_arguments(root, library, spec):
    """A manifest that was edited: the kernel behind it takes float32."""
    other = dataclasses.replace(spec, dtype="float16")
    forged = msgspec.structs.replace(Manifest.read(library), spec=other.label)
    moved = library.rename(library.with_name(other.label))
    forged.write(moved)
    with pytest.raises(
        ArtifactCorruptError, match=r"copy_small .* refuses valid arguments"
    ) as error:
        hadamard_rotate(torch.zeros(2, 64, dtype=torch.float16))
    assert f"tq-tvm build --target x86_64 --spec {other.label}" in str(error.value)


def test_library_of_another_version_is_told(library, spec, caplog):
    manifest = Manifest.read(library)
    versions = manifest.versions | {"tq_tvm": "9.0.0"}
    msgspec.structs.replace(manifest, versions=versions).write(library)
    with caplog.at_level(logging.WARNING, "tq_tvm"):
        load("rotate", spec, torch.device("cpu"))
    assert f"{library} were built by tq_tvm 9.0.0" in caplog.text


def test_library_of_another_abi(library, spec):
    manifest = Manifest.read(library)
    msgspec.structs.replace(manifest, abi=manifest.abi + 1).write(library)
    with pytest.raises(ArtifactCorruptError, match="abi of"):
        locate("rotate", spec, get_target("x86_64"))
    (info,) = list_artifacts()
    assert "abi of" in info.problem


def test_threads_of_cpu_kernels(library, spec, monkeypatch):
    monkeypatch.setenv("TQ_TVM_NUM_THREADS", "3")
    assert load("rotate", spec, torch.device("cpu")).processors == 3


def test_loading_needs_no_compiler(library, spec):
    program = (
        "import sys, torch, tq_tvm\n"
        "tq_tvm.hadamard_rotate(torch.randn(2, 64))\n"
        "assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("NVIDIA H200", "nvidia_h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100"),
        ("NVIDIA A100-SXM4-40GB", "nvidia_a100"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090"),
        ("NVIDIA GeForce RTX 4090 D", "nvidia_geforce_rtx_4090_d"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "nvidia_a100_mig_1g"),
    ],
)
def test_canonical_gpu_name(name, canonical):
    assert canonical_gpu_name(name) == canonical
