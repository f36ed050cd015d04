"""Launches that begin while the one before still runs (programmatic dependent launch).

TVM's launcher has no way to ask for it, so the attribute is put into its text: for every kernel
that waits for the launch before where it needs its results.
"""

from __future__ import annotations

import re

__all__ = ["overlap_launches"]

_WAIT = "tq_wait_for_launch_before()"
_KERNEL = re.compile(
    r'^extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\([^;]*\) \{$', re.MULTILINE
)
# Names of configurations are local to a launcher: the launch follows on the next line.
_LAUNCH = re.compile(
    r"^([ \t]*)(cuda_config\w*)\.stream = \w+;\n(?=.*tvm_cuda_host_launch\(::(\w+), &\2,)",
    re.MULTILINE,
)


def overlap_launches(source: str, arch: str) -> str:
    """Return CUDA text whose waiting kernels are launched early, from compute capability 9.0 on."""
    if int(re.sub(r"\D", "", arch)) < 90:
        return source
    starts = [*_KERNEL.finditer(source)]
    ends = [match.start() for match in starts[1:]] + [len(source)]
    waiting = {
        match[1]
        for match, end in zip(starts, ends, strict=True)
        if _WAIT in source[match.end() : end]
    }

    def attribute(match: re.Match[str]) -> str:
        indent, config, kernel = match.groups()
        if kernel not in waiting:
            return match[0]
        lines = [
            f"cudaLaunchAttribute {config}_early = {{}};",
            f"{config}_early.id = cudaLaunchAttributeProgrammaticStreamSerialization;",
            f"{config}_early.val.programmaticStreamSerializationAllowed = 1;",
            f"{config}.attrs = &{config}_early;",
            f"{config}.numAttrs = 1;",
        ]
        return match[0] + "".join(f"{indent}{line}\n" for line in lines)

    return _LAUNCH.sub(attribute, source)
