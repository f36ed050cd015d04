"""Devices that kernels are compiled for, and which of them a torch device is.

A *target* is named after the GPU, not after its architecture: tuned decisions are found on one
chip. A GPU that the table misses gets a target derived from its compute capability.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tq_tvm import env
from tq_tvm.errors import ArgumentValueError, UnsupportedSpecError
from tq_tvm.served import functions_on
from tq_tvm.spec import Spec

if TYPE_CHECKING:
    import torch

__all__ = [
    "CPU_LEVELS",
    "TARGETS",
    "TargetInfo",
    "as_device",
    "canonical_gpu_name",
    "cpu_features",
    "cpu_threads",
    "detect",
    "driver_version",
    "get_target",
    "missing_cpu_features",
    "processors",
]


@dataclasses.dataclass(frozen=True)
class TargetInfo:
    """One device to compile for.

    Parameters
    ----------
    name
        Directory name of its libraries and tuning logs.
    kind
        ``"cuda"`` or ``"llvm"``.
    arch
        ``sm_XY`` for CUDA; for a CPU the LLVM name of its level, or the machine's name where there
        are no levels.
    attrs
        Further attributes of a TVM target: limits that a schedule has to keep.
    """

    name: str
    kind: str
    arch: str
    attrs: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def has_wgmma(self) -> bool:
        """Whether four warps can multiply together, as ``mla`` does: Hopper alone."""
        return self.arch == "sm_90a"

    def functions(self, spec: Spec) -> tuple[str, ...]:
        """Functions of a spec that kernels are generated of for this device: of a library of it.

        Those of `tq_tvm.served.functions_on`, but for ``mla`` on a GPU that has no `has_wgmma`.
        """
        served = functions_on(spec, self.kind)
        if self.kind == "cuda" and not self.has_wgmma:
            return tuple(name for name in served if name != "mla")
        return served

    @property
    def has_clusters(self) -> bool:
        """Whether CTAs can read one another's shared memory, 16 of them: Hopper and B200."""
        return self.arch.startswith(("sm_90", "sm_100"))


def _cuda(name: str, arch: str, shared: int, l2_mib: float) -> TargetInfo:
    return TargetInfo(name, "cuda", arch, _cuda_attrs(shared, int(l2_mib * 2**20)))


def _cuda_attrs(shared_bytes: int, l2_bytes: int) -> dict[str, int]:
    return {
        "max_shared_memory_per_block": shared_bytes,
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "registers_per_block": 65536,
        "l2_cache_size_bytes": l2_bytes,
    }


# Shared memory is the opt-in limit of one block, not the 48 KB that need no attribute.
TARGETS: dict[str, TargetInfo] = {
    target.name: target
    for target in (
        _cuda("nvidia_h200", "sm_90a", 232448, 50),
        _cuda("nvidia_h100", "sm_90a", 232448, 50),
        _cuda("nvidia_a100", "sm_80", 166912, 40),
        _cuda("nvidia_a10", "sm_86", 101376, 6),
        _cuda("nvidia_l4", "sm_89", 101376, 48),
        _cuda("nvidia_l40s", "sm_89", 101376, 96),
        _cuda("nvidia_geforce_rtx_4090", "sm_89", 101376, 72),
        _cuda("nvidia_geforce_rtx_3090", "sm_86", 101376, 6),
        _cuda("nvidia_geforce_rtx_5090", "sm_120", 101376, 96),
        _cuda("nvidia_b200", "sm_100a", 232448, 126.5),
        TargetInfo("x86_64_v3", "llvm", "x86-64-v3"),
        TargetInfo("x86_64", "llvm", "x86-64"),
    )
}

CPU_LEVELS: dict[str, frozenset[str]] = {
    "x86-64-v3": frozenset({"avx2", "fma", "f16c", "bmi2"}),
    "x86-64": frozenset(),
}
"""Instruction sets that code of each CPU level may use, best level first."""

# Words of a marketing name that do not change the chip: memory, its kind, the form factor.
_NOT_THE_CHIP = re.compile(r"\d+gb|hbm\d\w?|sxm\d?|pcie|nvl")

# Compute capabilities whose full instruction set needs the architecture-specific target.
_ARCH_SPECIFIC = {(9, 0), (10, 0)}


def canonical_gpu_name(name: str) -> str:
    """Turn a GPU's marketing name into a target name.

    >>> canonical_gpu_name("NVIDIA H100 80GB HBM3")
    'nvidia_h100'
    >>> canonical_gpu_name("NVIDIA GeForce RTX 4090 Laptop GPU")
    'nvidia_geforce_rtx_4090_laptop_gpu'
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "_".join(word for word in words if not _NOT_THE_CHIP.fullmatch(word))


def get_target(name: str) -> TargetInfo:
    """Look up a name in `TARGETS`.

    Raises
    ------
    UnsupportedSpecError
        No such target; the message lists the known ones.
    """
    if name not in TARGETS:
        raise UnsupportedSpecError(
            f"get_target: name must be one of {', '.join(TARGETS)}, got {name!r}; "
            "a missing GPU is detected on a machine that has it"
        )
    return TARGETS[name]


@functools.cache
def cpu_features() -> frozenset[str]:
    """Names of the instruction sets of this CPU, as Linux spells them; of those in `CPU_LEVELS`."""
    known = frozenset().union(*CPU_LEVELS.values())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
        return known & frozenset(match[1].split()) if match else frozenset()
    import torch

    # Elsewhere torch tells the level of its own kernels, which need AVX2, FMA and F16C together;
    # every CPU with those has BMI2.
    return known if torch.backends.cpu.get_cpu_capability().startswith("AVX") else frozenset()


def missing_cpu_features(arch: str) -> list[str]:
    """List what this CPU lacks to run code of a CPU level (``TargetInfo.arch``)."""
    if arch not in CPU_LEVELS or not _is_x86_64():
        return [] if arch == _machine() else [arch]
    return sorted(CPU_LEVELS[arch] - cpu_features())


def as_device(op: str, device: torch.device | str | None = None) -> torch.device:
    """Return a torch device that is there, with its index if it is a GPU.

    Parameters
    ----------
    op
        The operation that asks, for its errors.
    device
        None is the current GPU, or the CPU where there is none.

    Raises
    ------
    ArgumentValueError
        torch knows no such device, or sees no such GPU.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentValueError(
            f"{op}: device must be a torch device, got {device!r} ({reason}); name cuda or cpu"
        ) from None
    if found.type != "cuda":
        return found
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        seen = f"{count} CUDA GPUs" if count else "no CUDA GPU"
        raise ArgumentValueError(
            f"{op}: device must be one that torch can use, got {found} with torch "
            f"{torch.__version__}, which sees {seen}; use one of them or the CPU"
        )
    return torch.device("cuda", torch.cuda.current_device()) if found.index is None else found


def detect(device: torch.device | str | None = None) -> TargetInfo:
    """Find the target of a device: its entry in `TARGETS`, or one derived from the device.

    Parameters
    ----------
    device
        A torch device; None is the current GPU, or the CPU where there is none.

    Raises
    ------
    ArgumentValueError
        torch has no such device.
    UnsupportedSpecError
        Neither an NVIDIA GPU nor a CPU.
    """
    import torch

    device = as_device("detect", device)
    if device.type == "cpu":
        return _detect_cpu()
    if device.type != "cuda" or torch.version.hip is not None:
        raise UnsupportedSpecError(
            f"detect: device must be an NVIDIA GPU or the CPU, got {device}; move the tensors there"
        )
    return _detect_gpu(device.index)


def cpu_threads() -> int:
    """Threads of the CPU kernels."""
    import torch

    return env.num_threads() or torch.get_num_threads()


def processors(device: torch.device) -> int:
    """What runs in parallel on a device: multiprocessors of a GPU, threads of the CPU kernels."""
    import torch

    if device.type == "cpu":
        return cpu_threads()
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def driver_version() -> str:
    """Version of the NVIDIA driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


@functools.cache
def _detect_gpu(index: int) -> TargetInfo:
    import torch

    properties = torch.cuda.get_device_properties(index)
    name = canonical_gpu_name(properties.name)
    if name in TARGETS:
        return TARGETS[name]
    capability = (properties.major, properties.minor)
    arch = f"sm_{properties.major}{properties.minor}" + "a" * (capability in _ARCH_SPECIFIC)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    attrs = _cuda_attrs(shared or properties.shared_memory_per_block, properties.L2_cache_size)
    return TargetInfo(name, "cuda", arch, attrs)


@functools.cache
def _detect_cpu() -> TargetInfo:
    for target in TARGETS.values():
        if target.kind == "llvm" and not missing_cpu_features(target.arch):
            return target
    return TargetInfo(_machine(), "llvm", _machine())


def _machine() -> str:
    return platform.machine().lower()


def _is_x86_64() -> bool:
    return _machine() in ("x86_64", "amd64")
