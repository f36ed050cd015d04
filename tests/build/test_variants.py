"""Which kernels a library gets: a record's at its size, the default at sizes without one."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.build.library import _variants
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import get_target
from tq_tvm.tuning.database import find_records
from tq_tvm.tuning.workloads import workloads

SPEC = CacheSpec(128, 32, 8, 64, "bfloat16", "bshd")
TARGET = get_target("nvidia_h200")


def test_sizes_that_were_not_searched_get_the_default():
    records = find_records("decode", SPEC, TARGET)[:1]
    functions = {}
    variants = _variants("decode", SPEC, TARGET, records, functions)
    sizes = {w.size for w in workloads(SPEC, TARGET) if w.function == "decode"}
    assert [v.size for v in variants] == sorted(sizes | {r.size for r in records})
    for variant in variants:
        searched = variant.size in {r.size for r in records}
        assert (variant.workload is not None) == searched
        assert variant.tuned <= searched
    assert set(functions) == {v.symbol for v in variants}
    assert len(functions) == len({tuple(v.config.items()) for v in variants})


def test_without_records_there_is_one_kernel():
    functions = {}
    (variant,) = _variants("decode", SPEC, TARGET, [], functions)
    assert not variant.tuned
    assert list(functions) == [variant.symbol]
