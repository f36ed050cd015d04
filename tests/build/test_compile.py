"""Libraries of `tq_tvm.build.compile`: compiled here, run in processes that have no TVM."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

tvm = pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tvm.s_tir import Schedule  # noqa: E402
from tvm.script import tirx as T  # noqa: E402
from tvm.target import codegen  # noqa: E402

from tq_tvm.build.compile import CompileResult, compile_library, tvm_target  # noqa: E402
from tq_tvm.errors import BuildError  # noqa: E402
from tq_tvm.targets import TargetInfo, detect, get_target  # noqa: E402


def scale_rows(parallel: bool):
    """B = alpha A + 1, with a temporary of run-time size, so that scratch memory is asked for."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle, alpha: T.float32):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        A = T.match_buffer(a, (n, 64), "float32", align=16)
        B = T.match_buffer(b, (n, 64), "float32", align=16)
        C = T.sblock_alloc_buffer((n, 64), "float32")
        for i, j in T.grid(n, 64):
            with T.sblock("c"):
                vi, vj = T.axis.remap("SS", [i, j])
                C[vi, vj] = A[vi, vj] * alpha
        for i, j in T.grid(n, 64):
            with T.sblock("b"):
                vi, vj = T.axis.remap("SS", [i, j])
                B[vi, vj] = C[vi, vj] + T.float32(1)

    sch = Schedule(main)
    if parallel:
        for block in ("c", "b"):
            sch.parallel(sch.get_loops(block)[0])
    return sch.mod["main"]


def launch_rows():
    """The same on a GPU, without the temporary."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle, alpha: T.float32):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        A = T.match_buffer(a, (n, 64), "float32", align=16)
        B = T.match_buffer(b, (n, 64), "float32", align=16)
        for i, j in T.grid(n, 64):
            with T.sblock("b"):
                vi, vj = T.axis.remap("SS", [i, j])
                B[vi, vj] = A[vi, vj] * alpha + T.float32(1)

    sch = Schedule(main)
    i, j = sch.get_loops("b")
    sch.bind(i, "blockIdx.x")
    sch.bind(j, "threadIdx.x")
    return sch.mod["main"]


def failing_rows():
    """A parallel loop whose iterations fail where their value is negative."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        A = T.match_buffer(a, (n,), "float32", align=4)
        for i in T.parallel(n):
            assert A[i] >= T.float32(0), "a row is negative"
            A[i] = A[i] + T.float32(1)

    return main


@pytest.fixture(scope="module")
def cpu_libraries(tmp_path_factory) -> tuple[list[Path], CompileResult]:
    folder = tmp_path_factory.mktemp("libraries")
    target = detect("cpu")
    paths = [folder / "one.so", folder / "two.so"]
    functions = {
        "rows": scale_rows(parallel=True),
        "rows_serial": scale_rows(parallel=False),
        "fails": failing_rows(),
    }
    result = None
    for path in paths:
        result = compile_library(functions, target, path)
    assert result is not None
    return paths, result


_CHECK = """
def check(function, n=1000):
    x, y = torch.randn(n, 64), torch.full((n, 64), float("nan"))
    function(x, y, 2.0)
    torch.testing.assert_close(y, 2 * x + 1)
"""


def run(paths: list[Path], body: str, imports: str = "") -> str:
    """Run ``body`` in a fresh process that has torch, tvm_ffi and the libraries' paths."""
    lines = [
        "import ctypes, os, sys, threading",
        imports,
        "import torch, tvm_ffi",
        "torch.set_num_threads(1)  # so that torch starts no thread",
        f"paths = {[str(p) for p in paths]!r}",
        _CHECK,
        body,
    ]
    script = paths[0].with_suffix(".py")  # a file: TVMScript reads its source
    script.write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_result_tells_flags_and_versions(cpu_libraries):
    _, result = cpu_libraries
    assert any(flag.startswith("-mcpu=") for flag in result.flags)
    assert "cxx" in result.versions


def test_runs_without_tvm(cpu_libraries):
    paths, _ = cpu_libraries
    run(
        paths,
        """
module = tvm_ffi.load_module(paths[0])
for _ in range(50):
    check(module["rows"])
check(module["rows_serial"])
check(module["rows"], 1)
assert "tvm" not in sys.modules
""",
    )


def test_two_libraries_have_their_own_pools(cpu_libraries):
    paths, _ = cpu_libraries
    run(
        paths,
        """
def threads():
    return len(os.listdir("/proc/self/task"))
modules = [tvm_ffi.load_module(p) for p in paths]
for path, count in zip(paths, (3, 5)):
    assert ctypes.CDLL(path).tq_tvm_set_num_threads(count) == count
before = threads()
check(modules[0]["rows"])
assert threads() == before + 2, (before, threads())
check(modules[1]["rows"])
assert threads() == before + 6, (before, threads())
check(modules[0]["rows"])
check(modules[1]["rows"])
""",
    )


def test_leaves_tvm_alone(cpu_libraries):
    paths, _ = cpu_libraries
    run(
        paths,
        """
@T.prim_func(s_tir=True)
def main(a: T.handle):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    n = T.int64()
    A = T.match_buffer(a, (n,), "float32", align=4)
    for i in T.parallel(n):
        A[i] = A[i] + T.float32(1)
module = tvm_ffi.load_module(paths[0])
check(module["rows"])
jit = tvm.compile(main, target="llvm")
x = torch.zeros(10000)
jit["main"](x)
assert bool((x == 1).all())
ctypes.CDLL(paths[0]).tq_tvm_set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
check(module["rows"])
assert len(os.listdir("/proc/self/task")) <= before + 1
""",
        imports="from tq_tvm import _fast_stack\nimport tvm\nfrom tvm.script import tirx as T",
    )


def test_default_number_of_threads_is_the_affinity_mask(cpu_libraries):
    paths, _ = cpu_libraries
    out = run(
        paths,
        """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(ctypes.CDLL(paths[0]).tq_tvm_set_num_threads(0))
check(tvm_ffi.load_module(paths[0])["rows"])
""",
    )
    assert out.strip() == "1"


def test_survives_fork(cpu_libraries):
    paths, _ = cpu_libraries
    run(
        paths,
        """
module = tvm_ffi.load_module(paths[0])
ctypes.CDLL(paths[0]).tq_tvm_set_num_threads(4)
check(module["rows"])
for _ in range(5):
    child = os.fork()
    if child == 0:
        check(module["rows"])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
check(module["rows"])
""",
    )


def test_concurrent_callers(cpu_libraries):
    paths, _ = cpu_libraries
    run(
        paths,
        """
module = tvm_ffi.load_module(paths[0])
ctypes.CDLL(paths[0]).tq_tvm_set_num_threads(3)
failures = []
def work():
    try:
        for _ in range(50):
            check(module["rows"], 257)
    except BaseException as error:
        failures.append(error)
callers = [threading.Thread(target=work) for _ in range(4)]
[c.start() for c in callers]
[c.join() for c in callers]
assert not failures, failures
""",
    )


def test_error_in_a_task_reaches_the_caller(cpu_libraries):
    paths, _ = cpu_libraries
    run(
        paths,
        """
module = tvm_ffi.load_module(paths[0])
ctypes.CDLL(paths[0]).tq_tvm_set_num_threads(4)
x = torch.zeros(4096)
module["fails"](x)
assert bool((x == 1).all())
for row in (0, 4095):
    x = torch.zeros(4096)
    x[row] = -1
    try:
        module["fails"](x)
    except Exception as error:
        assert "a row is negative" in str(error), error
    else:
        raise AssertionError("no error")
check(module["rows"])
""",
    )


def test_unloads_and_exits(cpu_libraries):
    paths, _ = cpu_libraries
    run(
        paths,
        """
import gc
before = len(os.listdir("/proc/self/task"))
for _ in range(20):
    module = tvm_ffi.load_module(paths[0])
    rows = module["rows"]
    check(rows)
    del module, rows
    gc.collect()
assert len(os.listdir("/proc/self/task")) <= before + 64
""",
    )


def test_target_of_a_cpu_level():
    target = tvm_target(get_target("x86_64_v3"))
    assert target.attrs["mcpu"] == "x86-64-v3"


def test_target_of_a_machine_without_levels(tmp_path):
    """``aarch64`` names a machine, no CPU that LLVM knows."""
    machine = TargetInfo("aarch64", "llvm", "aarch64")
    target = tvm_target(machine)
    assert target.attrs["mcpu"] == "generic"
    assert target.attrs["mtriple"] == codegen.llvm_get_system_triple()
    result = compile_library({"rows": scale_rows(parallel=False)}, machine, tmp_path / "rows.so")
    assert "-mcpu=generic" in result.flags
    run([tmp_path / "rows.so"], 'check(tvm_ffi.load_module(paths[0])["rows"])')


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_library_loads_without_a_gpu(tmp_path):
    path = tmp_path / "cuda.so"
    result = compile_library({"rows": launch_rows()}, get_target("nvidia_h200"), path)
    assert "nvcc" in result.versions
    assert "arch=compute_90a,code=sm_90a" in result.flags
    run(
        [path],
        """
module = tvm_ffi.load_module(paths[0])
try:
    module["rows"](torch.zeros(4, 64), torch.zeros(4, 64), 1.0)
except Exception as error:
    assert "device" in str(error), error
else:
    raise AssertionError("CPU tensors were accepted")
assert "tvm" not in sys.modules
""",
    )


@pytest.mark.parametrize(("target", "tool"), [("nvidia_h200", "nvcc"), ("x86_64", "g++")])
def test_missing_compiler_says_what_to_install(tmp_path, monkeypatch, target, tool):
    monkeypatch.setenv("PATH", str(tmp_path))
    func = launch_rows() if tool == "nvcc" else scale_rows(parallel=True)
    with pytest.raises(BuildError, match=f"{tool.replace('+', '.')} must be on PATH.*install"):
        compile_library({"rows": func}, get_target(target), tmp_path / "x.so")
