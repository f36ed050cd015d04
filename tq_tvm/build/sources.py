"""What a library is compiled from, as one digest: a library of another digest is out of date."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

__all__ = ["sources_digest"]

_PACKAGES = ("tq_tvm.kernels", "tq_tvm.schedules", "tq_tvm.build")
_SUFFIXES = (".py", ".cpp")


@functools.cache
def sources_digest() -> str:
    """Digest of the kernels, their schedules and the build, found without importing them."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        found = importlib.util.find_spec(package)
        for folder in (found and found.submodule_search_locations) or ():
            for path in sorted(Path(folder).iterdir()):
                if path.suffix in _SUFFIXES:
                    content = hashlib.sha256(path.read_bytes()).hexdigest()
                    digest.update(f"{package}/{path.name} {content}\n".encode())
    return digest.hexdigest()
