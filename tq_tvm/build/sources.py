"""What a library is compiled from, as one digest: a library of another digest is out of date."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

__all__ = ["sources_digest"]

_MODULES = ("tq_tvm.formats", "tq_tvm.spec", "tq_tvm.kernels", "tq_tvm.schedules", "tq_tvm.build")
_SUFFIXES = (".py", ".cpp")


@functools.cache
def sources_digest() -> str:
    """Digest of the formats, kernels, schedules and the build, found without importing them."""
    digest = hashlib.sha256()
    for module in _MODULES:
        found = importlib.util.find_spec(module)
        assert found is not None and found.origin is not None
        origin = Path(found.origin)
        paths = sorted(origin.parent.iterdir()) if found.submodule_search_locations else [origin]
        for path in paths:
            if path.suffix in _SUFFIXES:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{module}/{path.name} {content}\n".encode())
    return digest.hexdigest()
