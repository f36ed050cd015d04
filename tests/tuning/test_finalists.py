"""``tuning.finalists``: what decides between the best records of a search and the default."""

from __future__ import annotations

import statistics

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules import decode
from tq_tvm.schedules.decisions import sampled
from tvm.s_tir import Schedule

from tq_tvm import schedules
from tq_tvm.errors import BuildError
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import detect
from tq_tvm.tuning import finalists
from tq_tvm.tuning.database import search_workload
from tq_tvm.tuning.inputs import WrongResultError
from tq_tvm.tuning.workloads import Workload

CPU = torch.device("cpu")
SPEC = CacheSpec(128, 2, 1, 16, "float32", "bshd")
DECODE = Workload("decode", SPEC, {"batch": 1, "pages": 2, "table_width": 2}, "a test")
DEFAULT = {"tile": 32, "vector": 16, "unroll": 0, "lookup": 0}
OTHER = {**DEFAULT, "unroll": 1}
WRONG = {**DEFAULT, "vector": 24}
"""Leaves out the end of a row of 128."""
UNBUILDABLE = {**DEFAULT, "vector": 7}


@pytest.fixture
def trace(monkeypatch):
    """The trace of given decisions, those not on offer too."""
    monkeypatch.setitem(
        decode.OPTIONS,
        "llvm",
        {"tile": [32], "vector": [7, 16, 24], "unroll": [0, 1], "lookup": [0]},
    )
    mod = search_workload("decode", SPEC, "llvm", DECODE.shape)

    def make(config):
        sch = Schedule(mod)
        decode.apply(sch, "decode", SPEC, "llvm", sampled(sch, config))
        return sch.trace

    return make


def compare(traces):
    return finalists.compare(DECODE, detect(CPU), CPU, traces, 1)


@pytest.fixture
def unbuildable(monkeypatch):
    instantiate = schedules.instantiate

    def build(function, spec, kind, trace):
        instance = instantiate(function, spec, kind, trace)
        if instance.config == UNBUILDABLE:
            raise BuildError("a build that failed")
        return instance

    monkeypatch.setattr(schedules, "instantiate", build)


def test_one_that_is_wrong_or_cannot_be_built_is_left_out(trace, unbuildable, caplog):
    configs = [DEFAULT, WRONG, UNBUILDABLE, OTHER]
    kept = compare([trace(config) for config in configs])
    assert [finalist.config for finalist in kept] == [DEFAULT, OTHER]
    assert all(finalist.us > 0 and finalist.error < 1e-5 for finalist in kept)
    assert "a build that failed" in caplog.text and "relative error" in caplog.text


def test_a_wrong_default_is_an_error(trace):
    with pytest.raises(WrongResultError):
        compare([trace(WRONG), trace(OTHER)])


def test_the_default_is_no_rival_of_its_own(trace):
    """Of two equal kernels noise would choose one."""
    assert [f.config for f in compare([trace(DEFAULT), trace(DEFAULT)])] == [DEFAULT]


def test_a_drift_meets_all_alike(monkeypatch):
    """A machine that slows down for good in the first round, and a spike in a later one."""
    timed = []

    def time_us(call, device, **budget):
        timed.append(call)
        load = 2.0 if len(timed) > 2 else 1.0
        return 100.0 if len(timed) == 6 else load * call()

    monkeypatch.setattr(finalists, "time_us", time_us)
    slow, fast, faster = (lambda: 3.0), (lambda: 2.0), (lambda: 1.9)
    assert finalists.time_in_rounds([slow, fast, faster], CPU) == [6.0, 4.0, 3.8]
    assert timed[:6] == [slow, fast, faster] * 2
    assert len(timed) // 3 >= 5 and statistics.multimode(timed) == [slow, fast, faster]
