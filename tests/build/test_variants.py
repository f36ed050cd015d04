"""Which kernels a library gets: a record's at its size, the default at sizes without one."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules.decode import defaults, is_short
from tvm.s_tir import Schedule

from tq_tvm import schedules
from tq_tvm.build.library import _featured_variants, _variants
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import get_target
from tq_tvm.tuning.database import TunedRecord, search_workload
from tq_tvm.tuning.workloads import workloads

SPEC = CacheSpec(128, 32, 8, 64, "bfloat16", "bshd")
TARGET = get_target("nvidia_h200")


def record_of(workload) -> TunedRecord:
    """Of a random point."""
    mod = search_workload(workload.function, SPEC, TARGET.kind, workload.shape)
    sch = Schedule(mod, seed=1)
    schedules.space(workload.function, SPEC, TARGET.kind)(sch)
    return TunedRecord(workload.label, workload.shape, workload.size, 1.0, sch.trace)


def test_sizes_that_were_not_searched_get_the_default():
    searched, *_ = (w for w in workloads(SPEC, TARGET) if w.function == "decode")
    records = [record_of(searched)]
    functions = {}
    variants = _variants("decode", SPEC, TARGET, records, functions)
    sizes = {w.size for w in workloads(SPEC, TARGET) if w.function == "decode"}
    assert {v.size for v in variants} == sizes
    assert [v.size for v in variants] == sorted(v.size for v in variants)
    batches = {(w.size, w.batch) for w in workloads(SPEC, TARGET) if w.function == "decode"}
    assert {(v.size, v.batch) for v in variants} == batches
    for variant in variants:
        is_searched = (variant.size, variant.batch) == (searched.size, searched.batch)
        assert (variant.workload == searched.label) == is_searched
        assert variant.tuned == (variant.workload is not None)
    assert set(functions) == {v.symbol for v in variants}
    assert len(functions) == len({tuple(v.config.items()) for v in variants})


def test_without_records_there_is_one_kernel():
    functions = {}
    (variant,) = _variants("decode", SPEC, get_target("nvidia_a100"), [], functions)
    assert not variant.tuned
    assert list(functions) == [variant.symbol]


def test_short_contexts_take_clusters_where_there_are_any():
    """One kernel for all sizes that the defaults treat alike."""
    functions = {}
    variants = _variants("decode", SPEC, TARGET, [], functions)
    found = {(v.size, v.batch): v for v in variants}
    sizes = {(w.size, w.batch): w for w in workloads(SPEC, TARGET) if w.function == "decode"}
    assert set(found) == set(sizes)
    for place, variant in found.items():
        short = is_short(SPEC, sizes[place].shape)
        assert (variant.config["cluster"] > 0) == short == ("cluster" in variant.launch)
        assert not variant.tuned
    assert {True, False} == {"cluster" in v.launch for v in variants}
    assert set(functions) == {v.symbol for v in variants}
    assert len(functions) == len({tuple(v.config.items()) for v in variants})


def test_features_take_the_defaults():
    """Whatever was found for calls without them."""
    functions = {}
    variants = _featured_variants(SPEC, TARGET, functions)
    assert {v.symbol for v in variants} == set(functions)
    plain = {(v.size, v.batch): v for v in _variants("decode", SPEC, TARGET, [], {})}
    for variant in variants:
        config = plain[variant.size, variant.batch].config
        assert variant.config == config | {"cluster": 0}
    assert defaults(SPEC, "cuda") in [v.config for v in variants]
    assert not any(v.tuned for v in variants)


def test_a_record_of_a_size_is_compared_with_its_own_default():
    short = next(w for w in workloads(SPEC, TARGET) if w.function == "decode" and w.size < 2**24)
    sch = Schedule(search_workload("decode", SPEC, TARGET.kind, short.shape))
    schedules.default("decode", SPEC, TARGET.kind, short.shape)(sch)
    record = TunedRecord(short.label, short.shape, short.size, 1.0, sch.trace)
    variants = _variants("decode", SPEC, TARGET, [record], {})
    (variant,) = (v for v in variants if v.workload == short.label)
    assert variant.config["cluster"] > 0
    assert not variant.tuned
