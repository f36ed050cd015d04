"""What a record was found with: it explains a time that another machine does not repeat."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from pathlib import Path

import torch

from tq_tvm._version import __version__
from tq_tvm.targets import driver_version
from tq_tvm.tuning.database import Environment

__all__ = ["environment"]

_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "xgboost-cpu")


def environment(device: torch.device, tools: dict[str, str], seed: int) -> Environment:
    """The environment of a search that ends now; ``tools`` are versions of compilers."""
    versions = {"tq_tvm": __version__, **tools}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions["cuda"] = str(torch.version.cuda)
        versions["driver"] = driver_version()
    else:
        name = _cpu_name()
    today = datetime.date.today().isoformat()
    return Environment(device=name, versions=versions, date=today, seed=seed)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return platform.processor() or platform.machine()
