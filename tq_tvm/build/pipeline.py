"""The lowering pipeline: TVM's default one with two changes that ``warp`` scope buffers need.

A row that several lanes share lives in buffers of scope ``warp``, which TVM turns into shuffles
(`LowerWarpMemory`). That pass, in apache-tvm 0.27,

* reads the lane's coefficient off the store index, so common subexpressions must still be inline;
* rewrites one allocation a run, so it runs until none is left.

Both changes are invisible to a function without ``warp`` buffers.
"""

from __future__ import annotations

import functools

import tvm
from tvm import tirx
from tvm.s_tir import pipeline as default_pipeline

__all__ = ["build_module"]

_MAX_WARP_BUFFERS = 64
"""Runs of `LowerWarpMemory`; fill at head_dim 256 has 23 buffers of scope ``warp``."""


def _finalize_device_passes() -> tvm.ir.transform.Pass:
    return tvm.ir.transform.Sequential(
        [
            *[tirx.transform.LowerWarpMemory()] * _MAX_WARP_BUFFERS,
            tirx.transform.StmtSimplify(),
            tirx.transform.LowerIntrin(),
        ]
    )


@functools.cache
def _register() -> str:
    lower, finalize_host, _ = default_pipeline.default_s_tir_pipeline()
    name = "tq_tvm"
    tirx.register_tir_pipeline(name, lambda: (lower, finalize_host, _finalize_device_passes))
    return name


def build_module(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.runtime.Module:
    """Lower and generate code for ``mod``: CUDA text for ``cuda`` targets, objects for ``llvm``."""
    config = {"tirx.disable_cse_tir": True} if target.kind.name == "cuda" else {}
    with tvm.transform.PassContext(config=config), target:
        return tvm.tirx.build(mod, target=target, pipeline=_register())
