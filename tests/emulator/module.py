"""Compile the CUDA kernels of PrimFuncs with g++, and call them on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tvm_ffi
import tvm_ffi.libinfo

from emulator.translate import translate

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

__all__ = ["EmulatedModule", "compile_functions", "compile_source"]

_INCLUDE = Path(__file__).with_name("include")
_FLAGS = [
    "-std=c++17", "-Og", "-shared", "-fPIC", "-w",
    # Kernels read vectors through pointers to other types; libraries keep their threads apart.
    "-fno-strict-aliasing", "-fvisibility=hidden", "-fno-gnu-unique",
    # Checked longjmp takes a switch to another stack for an error.
    "-U_FORTIFY_SOURCE",
    "-ffp-contract=off",
]  # fmt: skip
_POISON = "-ftrivial-auto-var-init=pattern"  # what a kernel reads before it has written it, shows
_POISON_VERSION = 12
_CUDA = 2
_DEVICE_TYPE_OFFSET = ctypes.sizeof(ctypes.c_void_p)


def _as_cuda(tensor: torch.Tensor) -> tvm_ffi.Tensor:
    """The same memory, said to be on a GPU, as launchers want it."""
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = get(capsule, b"dltensor") + _DEVICE_TYPE_OFFSET
    ctypes.c_int32.from_address(address).value = _CUDA
    return tvm_ffi.from_dlpack(capsule)


class EmulatedModule:
    """Kernels in a library: ``module["decode"](*arguments)`` runs one on CPU tensors.

    One call at a time: the threads that it plays are the library's own. With ``descending`` they
    run in the other order, which shows a barrier that is missing.

    Attributes
    ----------
    source
        Path of the C++ that was compiled; errors of kernels name its lines.
    """

    def __init__(self, library: Path, source: Path) -> None:
        self.source = source
        self._module = tvm_ffi.load_module(str(library))
        self._library = ctypes.CDLL(str(library))

    def __getitem__(self, name: str):
        function = self._module[name]

        def call(*arguments: Any, descending: bool = False) -> None:
            self._library.emulated_descending(int(descending))
            function(*(_as_cuda(a) if isinstance(a, torch.Tensor) else a for a in arguments))

        return call


def compile_functions(
    functions: Mapping[str, PrimFunc],
    directory: Path | None = None,
    *,
    target: str = "nvidia_h200",
    flags: tuple[str, ...] = (),
) -> EmulatedModule:
    """Generate CUDA for ``functions`` (by symbol), and compile it for the CPU.

    Parameters
    ----------
    functions, target
        As `tq_tvm.build.compile.compile_library` takes them.
    directory
        Where source and library are kept; None makes a directory.
    flags
        More flags for g++.
    """
    # Translating and compiling source needs no TVM.
    import tvm
    from tvm.backend.cuda import export_cuda_host

    from tq_tvm.build.compile import tvm_target
    from tq_tvm.build.pipeline import build_module
    from tq_tvm.targets import get_target

    mod = tvm.IRModule(
        {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    )
    source = export_cuda_host(build_module(mod, tvm_target(get_target(target))))
    return compile_source(source, directory, flags=flags)


def compile_source(
    source: str, directory: Path | None = None, *, flags: tuple[str, ...] = ()
) -> EmulatedModule:
    """Compile exported CUDA source for the CPU."""
    compiler, standard_flags = _compiler()
    scratch = Path(tempfile.mkdtemp(prefix="emulator_", dir=directory))
    path, library = scratch / "kernels.cpp", scratch / "kernels.so"
    path.write_text(translate(source))
    include = ["-I", str(_INCLUDE), "-I", tvm_ffi.libinfo.find_include_path()]
    command = [compiler, *standard_flags, *flags, *include, str(path), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compile_source: {' '.join(command)} failed:\n{done.stderr[:4000]}")
    return EmulatedModule(library, path)


@functools.cache
def _compiler() -> tuple[str, list[str]]:
    path = shutil.which("g++")
    if path is None:
        raise RuntimeError("compile_source: g++ must be on PATH, got none; install it")
    version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True, check=True)
    poison = [_POISON] if int(version.stdout.split(".")[0]) >= _POISON_VERSION else []
    return path, [*_FLAGS, *poison]
