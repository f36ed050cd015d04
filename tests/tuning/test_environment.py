"""``tuning.environment``: what a record says that it was found with."""

from __future__ import annotations

import datetime

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.tuning import environment as module
from tq_tvm.tuning.environment import environment

PACKAGES = {"tq_tvm", "apache-tvm", "apache-tvm-ffi", "torch", "xgboost-cpu"}


def test_on_a_cpu():
    found = environment(torch.device("cpu"), {"cxx": "g++ 12"}, 7)
    assert set(found.versions) == PACKAGES | {"cxx"}
    assert (found.versions["cxx"], found.seed) == ("g++ 12", 7)
    assert found.device
    assert datetime.date.fromisoformat(found.date) <= datetime.date.today()


def test_on_a_gpu(monkeypatch):
    """With the driver, which compiles nothing but sets clocks and schedules."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(module, "driver_version", lambda: "580.1")
    found = environment(torch.device("cuda"), {"nvcc": "13"}, 1)
    assert found.device == "NVIDIA H200"
    assert set(found.versions) == PACKAGES | {"nvcc", "cuda", "driver"}
    assert found.versions["driver"] == "580.1"
