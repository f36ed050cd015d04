"""Compile PrimFuncs into one library that needs apache-tvm-ffi alone.

CUDA: TVM writes the kernels and their launchers into one translation unit, which nvcc compiles; no
GPU is needed. CPU: LLVM objects are linked with ``cpu_runtime.cpp``, the thread pool and allocator
that parallel loops call, so that the TVM runtime need not be present.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import tvm
import tvm_ffi.libinfo
from tvm.target.codegen import llvm_get_system_triple
from tvm.tirx import PrimFunc

from tq_tvm.build.occupancy import KernelResources, parse_resources
from tq_tvm.build.overlap import overlap_launches
from tq_tvm.build.pipeline import build_module
from tq_tvm.build.shared_memory import ask_for_shared_memory
from tq_tvm.errors import BuildError
from tq_tvm.targets import CPU_LEVELS, TargetInfo

__all__ = ["CompileResult", "compile_library", "tvm_target"]

_CPU_RUNTIME = Path(__file__).with_name("cpu_runtime.cpp")
_CXX_FLAGS = ["-std=c++17", "-O2", "-shared", "-fPIC", "-pthread"]
_NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-shared",
    "-Xcompiler",
    "-fPIC",
    "-cudart",
    "static",
    "--use_fast_math",
    "-diag-suppress",
    "174",
    "-Xptxas",
    "-v",
]


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """Flags and tool versions that a library was compiled with, and what its GPU kernels use."""

    flags: list[str]
    versions: dict[str, str]
    resources: dict[str, KernelResources] = dataclasses.field(default_factory=dict)


def tvm_target(target: TargetInfo) -> tvm.target.Target:
    """The TVM target of a device model."""
    if target.kind == "cuda":
        return tvm.target.Target(
            {"kind": "cuda", "arch": target.arch, **target.attrs}, host="cuda_host"
        )
    if target.arch in CPU_LEVELS:
        return tvm.target.Target({"kind": "llvm", "mcpu": target.arch})
    # A machine without levels is compiled for where it is. LLVM knows no CPU of its name, and TVM
    # tells the vector instructions by the triple.
    triple = llvm_get_system_triple()
    return tvm.target.Target({"kind": "llvm", "mcpu": "generic", "mtriple": triple})


def _tool(name: str, purpose: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"compile_library: {name} must be on PATH to {purpose}; install it")
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(
            f"compile_library: {' '.join(command)} failed with code {done.returncode}:\n"
            f"{done.stderr[-4000:]}"
        )
    return done.stdout + done.stderr


def _version(tool: str) -> str:
    lines = _run([tool, "--version"]).strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0])


def compile_library(
    functions: Mapping[str, PrimFunc], target: TargetInfo, path: Path
) -> CompileResult:
    """Compile ``functions`` (by symbol) for ``target`` into the shared library ``path``.

    Raises
    ------
    BuildError
        A tool is missing or failed.
    """
    mod = tvm.IRModule(
        {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    )
    built = build_module(mod, tvm_target(target))
    with tempfile.TemporaryDirectory(prefix="tq_tvm_") as scratch:
        if target.kind == "cuda":
            return _compile_cuda(built, target, path, Path(scratch))
        return _compile_cpu(built, target, path, Path(scratch))


def _compile_cuda(
    built: tvm.runtime.Module, target: TargetInfo, path: Path, scratch: Path
) -> CompileResult:
    from tvm.backend.cuda import export_cuda_host

    nvcc = _tool("nvcc", "compile CUDA kernels (CUDA toolkit 12 or newer)")
    source = scratch / "kernels.cu"
    text = ask_for_shared_memory(export_cuda_host(built))
    source.write_text(overlap_launches(text, target.arch))
    sm = target.arch.removeprefix("sm_")
    flags = [*_NVCC_FLAGS, "-gencode", f"arch=compute_{sm},code=sm_{sm}"]
    include = tvm_ffi.libinfo.find_include_path()
    report = _run([nvcc, *flags, "-I", include, str(source), "-o", str(path)])
    return CompileResult(flags, {"nvcc": _version(nvcc)}, parse_resources(report))


def _compile_cpu(
    built: tvm.runtime.Module, target: TargetInfo, path: Path, scratch: Path
) -> CompileResult:
    cxx = _tool("g++", "link CPU kernels")
    objects = scratch / "kernels.o"
    built.write_to_file(str(objects), "o")
    include = tvm_ffi.libinfo.find_include_path()
    _run([cxx, *_CXX_FLAGS, "-I", include, str(objects), str(_CPU_RUNTIME), "-o", str(path)])
    cpu = tvm_target(target).attrs["mcpu"]
    return CompileResult([f"-mcpu={cpu}", *_CXX_FLAGS], {"cxx": _version(cxx)})
