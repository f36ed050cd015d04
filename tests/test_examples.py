"""Examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib.util
import pkgutil

import pytest
import torch

import tq_tvm
from tq_tvm.spec import RotateSpec

NEEDED = {"tq_tvm.ops.rotate": RotateSpec(128, "float32")}
"""Libraries that a module's examples call."""


def _modules() -> list[str]:
    """Those of the package that load without the compiler and have examples."""
    names = [info.name for info in pkgutil.walk_packages(tq_tvm.__path__, "tq_tvm.")]
    return [n for n in names if ">>> " in importlib.util.find_spec(n).loader.get_source(n)]


@pytest.mark.parametrize("name", _modules())
def test_examples(name, library):
    if name in NEEDED:
        library(NEEDED[name], torch.device("cpu"))
    done = doctest.testmod(importlib.import_module(name))
    assert done.attempted and not done.failed
