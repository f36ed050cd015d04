"""``attend`` as a kernel: every GQA group, pages of 8 tokens, head_dim 512, several splits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

import tvm_ffi

from tq_tvm import schedules
from tq_tvm.build.compile import compile_library
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import detect
from tq_tvm.tuning.inputs import make_case
from tq_tvm.tuning.workloads import Workload

GROUPS = [*range(1, 17), 24, 32, 64, 71]
SPECS = [
    *(CacheSpec(64, group, 1, 8, "float32", format="int8") for group in GROUPS),
    CacheSpec(512, 4, 2, 8, "float16", format="tq42"),
]
# Of decode some groups that GPUs are not tested at.
DECODED = [spec for spec in SPECS if spec.group_size in (3, 24, 71)] + SPECS[-1:]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The default kernels, in one library, with their launch numbers."""
    wanted = [("attend", spec) for spec in SPECS] + [("decode", spec) for spec in DECODED]
    found = {
        (function, spec): schedules.instantiate(function, spec, "llvm", None)
        for function, spec in wanted
    }
    names = {key: f"kernel_{number}" for number, key in enumerate(found)}
    path = tmp_path_factory.mktemp("attend") / "kernels.so"
    functions = {names[key]: instance.func for key, instance in found.items()}
    compile_library(functions, detect("cpu"), path)
    module = tvm_ffi.load_module(str(path))
    return {key: (module[names[key]], instance.launch) for key, instance in found.items()}


def check(kernel, launch, function, spec, **shape):
    workload = Workload(function, spec, shape, "a test")
    case = make_case(workload, torch.device("cpu"))
    case.poison()
    kernel(*case.arguments(launch))
    case.check()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.label)
def test_every_group_and_small_pages(kernels, spec):
    """More tokens than a block of queries has, with one split and with several."""
    kernel, launch = kernels["attend", spec]
    assert launch["block_tokens"] * spec.group_size <= 128
    for numbers in (launch, {**launch, "ctas_per_sm": 64, "split_tokens": 1}):
        check(kernel, numbers, "attend", spec, tokens=22, batch=2, pages=13, table_width=6)


@pytest.mark.parametrize("spec", DECODED, ids=lambda s: s.label)
def test_decode_of_such_shapes(kernels, spec):
    kernel, launch = kernels["decode", spec]
    check(kernel, launch, "decode", spec, batch=2, pages=13, table_width=6)
