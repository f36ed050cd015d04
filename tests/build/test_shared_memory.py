"""``build.shared_memory``: which launchers ask the driver for dynamic shared memory."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

import tvm
from tvm.backend.cuda import export_cuda_host
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from tq_tvm.build.compile import tvm_target
from tq_tvm.build.pipeline import build_module
from tq_tvm.build.shared_memory import ask_for_shared_memory
from tq_tvm.targets import get_target

REQUEST = re.compile(
    r"if \((\w+ [^)]+)\) \{\n.*cudaFuncAttributeMaxDynamicSharedMemorySize, (\w+)\)"
)


def copy_rows(values: int, scope: str) -> str:
    """Text of a kernel that copies float32 rows by way of shared memory."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        A = T.match_buffer(a, (n, values), "float32", align=16)
        B = T.match_buffer(b, (n, values), "float32", align=16)
        for i, j in T.grid(n, values):
            with T.sblock("b"):
                vi, vj = T.axis.remap("SS", [i, j])
                B[vi, vj] = A[vi, vj]

    sch = Schedule(main)
    row, _ = sch.get_loops("b")
    sch.compute_at(sch.cache_read("b", 0, scope), row)
    sch.bind(row, "blockIdx.x")
    target = tvm_target(get_target("nvidia_h200"))
    return export_cuda_host(build_module(tvm.IRModule({"main": sch.mod["main"]}), target))


@pytest.mark.parametrize("kib", [1, 40, 64])
def test_dynamic_shared_memory_of_any_size_is_asked_for(kib):
    """Static memory, which the condition does not know, may come to it."""
    source = copy_rows(kib * 256, "shared.dyn")
    ((before, size),) = REQUEST.findall(source)
    assert before == f"{size} >= 49152"
    assert f"{size} = (int64_t){kib * 1024};" in source
    after = ask_for_shared_memory(source)
    assert REQUEST.findall(after) == [(f"{size} > 0", size)]
    assert after.replace(f"{size} > 0", before) == source, "nothing else has changed"


def test_a_launch_without_dynamic_shared_memory_stays():
    source = copy_rows(256, "shared")
    assert "__shared__" in source
    assert ask_for_shared_memory(source) == source
