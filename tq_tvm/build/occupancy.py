"""How many CTAs of a kernel an SM holds at once: from what ptxas says about it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from tq_tvm.errors import BuildError

__all__ = ["KernelResources", "parse_resources", "with_occupancy"]

_THREADS = {"sm_86": 1536, "sm_89": 1536, "sm_120": 1536}
_MOST_THREADS = 2048
_REGISTERS = 65536
_REGISTER_UNIT = 256
_SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90a": 228, "sm_100a": 228, "sm_120": 100}
_SHARED_OF_A_CTA = 1024
_CTAS = 16

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_USED = re.compile(r"Used (\d+) registers.*?(?:, (\d+) bytes smem|$)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class KernelResources:
    """Registers of a thread and static shared memory of a CTA."""

    registers: int
    shared_bytes: int


def parse_resources(report: str) -> dict[str, KernelResources]:
    """Read the output of ``ptxas -v``: the resources of every kernel, by its name."""
    found = {}
    parts = _ENTRY.split(report)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        used = _USED.search(text)
        if used is None:
            raise BuildError(
                f"parse_resources: ptxas must say what {name} uses, got {text.strip()!r}; "
                "report this with the version of nvcc"
            )
        found[name] = KernelResources(int(used[1]), int(used[2] or 0))
    return found


def _resident(arch: str, threads: int, used: KernelResources) -> int:
    warps = -(-threads // 32)
    registers = -(-used.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT * warps
    shared = _SHARED.get(arch, 100) * 1024 // (used.shared_bytes + _SHARED_OF_A_CTA)
    return max(
        1, min(_CTAS, _THREADS.get(arch, _MOST_THREADS) // threads, _REGISTERS // registers, shared)
    )


def with_occupancy(
    launch: Mapping[str, int], symbol: str, arch: str, resources: Mapping[str, KernelResources]
) -> dict[str, int]:
    """Replace ``threads`` and dynamic ``shared_bytes`` of a CTA by ``ctas_per_sm``.

    Numbers without ``threads`` are returned as they are.
    """
    numbers = dict(launch)
    threads = numbers.pop("threads", None)
    dynamic = numbers.pop("shared_bytes", 0)
    if threads is not None:
        used = resources[f"{symbol}_kernel"]
        used = dataclasses.replace(used, shared_bytes=used.shared_bytes + dynamic)
        numbers["ctas_per_sm"] = _resident(arch, threads, used)
    return numbers
