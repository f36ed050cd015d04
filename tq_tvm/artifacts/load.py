"""Load the compiled variants of a kernel function, once a process.

Only apache-tvm-ffi and the driver are needed; the compiler is not imported.
"""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import functools
import itertools
import logging
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

from tq_tvm import targets
from tq_tvm._version import __version__
from tq_tvm.artifacts.locate import locate
from tq_tvm.artifacts.manifest import LIBRARY_NAME, Manifest
from tq_tvm.artifacts.verify import verify_file
from tq_tvm.errors import ArtifactCorruptError
from tq_tvm.spec import Spec

__all__ = ["LoadedFunction", "LoadedVariant", "clear_cache", "load"]

_log = logging.getLogger("tq_tvm")

_BATCH_WEIGHT = 0.25
"""Of log(batch) beside log(size).

Many short sequences want fewer warps a CTA than one long sequence of as many tokens; but all short
problems want clusters, whatever their batch.
"""


@dataclasses.dataclass(frozen=True)
class LoadedVariant:
    """One variant, ready to be called; the other fields are those of its manifest entry."""

    call: Callable[..., None]
    symbol: str
    size: int
    tuned: bool
    workload: str | None
    us: float | None
    config: Mapping[str, int]
    launch: Mapping[str, int]
    batch: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedFunction:
    """All variants of a function, by size, and where they come from. Hashed by identity.

    Parameters
    ----------
    spec
        What it was asked for.
    variants
        In ascending order of ``size``.
    directory, manifest
        The library.
    processors
        What runs in parallel on the device: multiprocessors of a GPU, threads of the CPU kernels.
    """

    function: str
    spec: Spec
    variants: tuple[LoadedVariant, ...]
    directory: Path
    manifest: Manifest
    processors: int

    @functools.cached_property
    def _middles(self) -> list[float]:
        """Halfway between neighbouring sizes in logarithms: their geometric means."""
        sizes = [variant.size for variant in self.variants]
        return [math.sqrt(a * b) for a, b in itertools.pairwise(sizes)]

    def nearest(self, size: int, batch: int | None = None) -> LoadedVariant:
        """Return the variant tuned nearest to ``size``, in log(size).

        And to ``batch``, if it is given and variants have one: that counts a quarter as much.
        """
        if batch is None or any(variant.batch is None for variant in self.variants):
            return self.variants[bisect.bisect_left(self._middles, size)]

        def distance(variant: LoadedVariant) -> float:
            assert variant.batch is not None
            sequences = _BATCH_WEIGHT * math.log(batch / variant.batch)
            return math.hypot(math.log(size / variant.size), sequences)

        return min(self.variants, key=distance)

    def of_rows(self, rows: int) -> LoadedFunction:
        """Those of the fewest rows a block that ``rows`` fit in, else of the most."""
        heights = {variant.launch["rows"] for variant in self.variants}
        best = min((h for h in heights if h >= rows), default=max(heights))
        fitting = tuple(v for v in self.variants if v.launch["rows"] == best)
        return dataclasses.replace(self, variants=fitting)


_lock = threading.RLock()
_functions: dict[tuple[str, Spec, torch.device], LoadedFunction] = {}
_modules: dict[tuple[Path, str], Any] = {}
_warned: set[tuple[str, str]] = set()


def load(function: str, spec: Spec, device: torch.device) -> LoadedFunction:
    """Return the variants of a kernel function for a spec on a device.

    The search, the check of the digest and the load happen at the first call with these arguments;
    do that before a CUDA graph is captured.

    Parameters
    ----------
    function
        ``rotate``, ``fill_slots``, ``fill_table``, ``flatten``, ``flatten_unrotated``, ``decode``,
        ``attend``.
    spec
        Its specialisation.
    device
        Where the tensors are.

    Raises
    ------
    ArtifactNotFoundError
        No library serves it; the message lists every candidate with the reason.
    ArtifactCorruptError
        The library is not the one that its manifest describes.
    UnsupportedSpecError
        The device is neither an NVIDIA GPU nor a CPU.
    """
    key = (function, spec, device)
    loaded = _functions.get(key)
    if loaded is None:
        with _lock:
            loaded = _functions.get(key)
            if loaded is None:
                loaded = _functions[key] = _load(function, spec, device)
    return loaded


def clear_cache() -> None:
    """Forget what was loaded, so that the search path is read again; libraries stay mapped."""
    with _lock:
        _functions.clear()


def _load(function: str, spec: Spec, device: torch.device) -> LoadedFunction:
    target = targets.detect(device)
    directory, manifest = locate(function, spec, target)
    _warn_if_other_gpu(manifest.target, target)
    _warn_if_other_version(directory, manifest)
    module = _load_module(directory, manifest)
    variants = []
    for variant in sorted(manifest.functions[function], key=lambda v: v.size):
        try:
            call = module[variant.symbol]
        except AttributeError as error:
            raise ArtifactCorruptError(
                f"load: {directory / LIBRARY_NAME} must have the symbol {variant.symbol}, "
                f"got none; run `{manifest.build_command}` to build it again"
            ) from error
        variants.append(
            LoadedVariant(
                call=call,
                symbol=variant.symbol,
                size=variant.size,
                tuned=variant.tuned,
                workload=variant.workload,
                us=variant.us,
                config=variant.config,
                launch=variant.launch,
                batch=variant.batch,
            )
        )
    _log.info("%s of %s on %s: %s", function, spec.label, device, directory)
    return LoadedFunction(
        function, spec, tuple(variants), directory, manifest, targets.processors(device)
    )


def _load_module(directory: Path, manifest: Manifest) -> Any:
    path, record = directory / LIBRARY_NAME, manifest.files[LIBRARY_NAME]
    key = (path.resolve(), record.sha256)
    module = _modules.get(key)
    if module is None:
        for name, other in manifest.files.items():
            verify_file(directory / name, other, manifest.build_command)
        try:
            module = tvm_ffi.load_module(str(path))
        except Exception as error:
            raise ArtifactCorruptError(
                f"load: {path} must be a library of this platform, got: {error}; "
                f"run `{manifest.build_command}` to build it again"
            ) from error
        if manifest.target.kind == "llvm":
            _set_threads(path)
        _modules[key] = module
    return module


def _set_threads(path: Path) -> None:
    """Size the thread pool of a CPU library; one without parallel loops has none."""
    set_num_threads = getattr(ctypes.CDLL(str(path)), "tq_tvm_set_num_threads", None)
    if set_num_threads is not None:
        set_num_threads(ctypes.c_int(targets.cpu_threads()))


def _warn_if_other_gpu(target: targets.TargetInfo, device: targets.TargetInfo) -> None:
    pair = (target.name, device.name)
    if target.kind != "cuda" or target.name == device.name or pair in _warned:
        return
    _warned.add(pair)
    _log.warning(
        "Kernels tuned on %s run on %s, of the same architecture (%s); "
        "`tq-tvm tune --target %s` finds better ones.",
        target.name,
        device.name,
        device.arch,
        device.name,
    )


def _warn_if_other_version(directory: Path, manifest: Manifest) -> None:
    version = manifest.versions.get("tq_tvm", "unknown")
    if version == __version__ or (str(directory), version) in _warned:
        return
    _warned.add((str(directory), version))
    _log.warning(
        "Kernels in %s were built by tq_tvm %s and run under %s, with the same interface; "
        "`%s` builds those of this version.",
        directory,
        version,
        __version__,
        manifest.build_command,
    )
