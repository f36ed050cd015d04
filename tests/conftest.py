"""Devices and libraries: the same tests run on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from filelock import FileLock

from tq_tvm.targets import detect


def pytest_configure(config) -> None:
    """Share the cores between processes of pytest-xdist; kernels keep more than one thread.

    Idle threads of torch spin: with too many a test of 3 s took 150.
    """
    if hasattr(config, "workerinput"):
        threads = max(1, (os.cpu_count() or 1) // config.workerinput["workercount"])
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ["TQ_TVM_NUM_THREADS"] = str(max(2, threads))
        torch.set_num_threads(threads)


def _gpu_reason() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA GPU on this machine"


@pytest.fixture(
    scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=str
)
def device(request) -> torch.device:
    if request.param == "cuda":
        if _gpu_reason():
            pytest.skip(_gpu_reason())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@pytest.fixture(scope="session")
def library_root(tmp_path_factory, request):
    """Where libraries of this session are built; ``TQ_TVM_ARTIFACT_DIR`` brings built ones.

    Processes of pytest-xdist have one folder, so that none builds what another has built.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if hasattr(request.config, "workerinput") else base) / "artifacts"
    root.mkdir(exist_ok=True)
    return os.environ.get("TQ_TVM_ARTIFACT_DIR"), root


@pytest.fixture(scope="session")
def library(library_root):
    """Make sure that a library of a spec is found on a device: ``library(spec, device)``."""
    chosen, root = library_root
    built = set()

    def ensure(spec, device) -> None:
        if device.type == "cuda" and spec.dtype == "float32":
            pytest.skip("float32 kernels are for the CPU")
        if chosen is not None or (spec, device.type) in built:
            return
        pytest.importorskip("tvm", reason="the compiler is not installed; set TQ_TVM_ARTIFACT_DIR")
        from tq_tvm.build.library import build_library

        done = root / f"{device.type}_{spec.label}.done"
        with FileLock(done.with_suffix(".lock")):
            if not done.exists():
                build_library(spec, detect(device), root)
                done.touch()
        built.add((spec, device.type))
        os.environ["TQ_TVM_ARTIFACT_DIR"] = str(root)

    yield ensure
    if chosen is None:
        os.environ.pop("TQ_TVM_ARTIFACT_DIR", None)
