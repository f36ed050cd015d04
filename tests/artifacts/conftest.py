"""A small real library: a ``rotate`` that only copies, compiled for any x86-64 CPU."""

from __future__ import annotations

import shutil

import pytest

from tq_tvm import ops
from tq_tvm.artifacts import FileRecord, Manifest, Variant
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import get_target


@pytest.fixture(scope="session")
def spec():
    return CacheSpec(head_dim=64, num_q_heads=4, num_kv_heads=2, dtype="float32")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, spec):
    """A directory of libraries with one library in it; tests take a copy."""
    pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")
    from tvm.script import tirx as T

    from tq_tvm.build.compile import compile_library

    @T.prim_func(s_tir=True)
    def copy(x: T.handle, y: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        X = T.match_buffer(x, (n, 64), "float32", align=16)
        Y = T.match_buffer(y, (n, 64), "float32", align=16)
        for i, j in T.grid(n, 64):
            with T.sblock("copy"):
                vi, vj = T.axis.remap("SS", [i, j])
                Y[vi, vj] = X[vi, vj]

    root = tmp_path_factory.mktemp("libraries")
    target = get_target("x86_64")
    directory = root / target.name / spec.label
    directory.mkdir(parents=True)
    library = directory / "kernels.so"
    result = compile_library({"copy_small": copy, "copy_large": copy}, target, library)
    variants = [
        Variant(symbol="copy_large", size=64 * 10_000, tuned=True, workload="large", us=1.5),
        Variant(symbol="copy_small", size=64 * 100, tuned=False, config={"rows": 4}),
    ]
    Manifest(
        spec=spec.label,
        target=target,
        files={library.name: FileRecord.of(library)},
        functions={"rotate": variants},
        versions=result.versions,
        flags=result.flags,
    ).write(directory)
    return root


@pytest.fixture
def root(compiled, tmp_path, monkeypatch):
    """A copy of the compiled libraries, as the only place that is searched."""
    copy = tmp_path / "libraries"
    shutil.copytree(compiled, copy)
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(copy))
    ops.clear_cache()
    yield copy
    ops.clear_cache()


@pytest.fixture
def library(root, spec):
    """The directory of the one library."""
    return root / "x86_64" / spec.label
