"""Leave for kernels whose dynamic and static shared memory exceed 48 KiB together.

TVM's launcher asks the driver for it where the dynamic part alone does.
"""

from __future__ import annotations

import re

__all__ = ["ask_for_shared_memory"]

_CONDITION = re.compile(
    r"^([ \t]*if \(\w+) >= 49152\) \{\n(?=.*cudaFuncAttributeMaxDynamicSharedMemorySize)",
    re.MULTILINE,
)


def ask_for_shared_memory(source: str) -> str:
    """Return CUDA text whose launchers ask for all dynamic shared memory."""
    return _CONDITION.sub(r"\1 > 0) {\n", source)
