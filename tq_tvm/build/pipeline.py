"""The lowering pipeline: TVM's default one with three changes.

Two are for ``warp`` scope buffers. A row that several lanes share lives in them, and TVM turns them
into shuffles (`LowerWarpMemory`). That pass, in apache-tvm 0.27,

* reads the lane's coefficient off the store index, so common subexpressions must still be inline;
* rewrites one allocation a run, so it runs until none is left.

Both are invisible to a function without ``warp`` buffers.

Functions without blocks, which factories make, have buffers of the size that they need:
`CompactBufferAllocation` is left out, which takes 35 of 47 seconds of lowering ``attend``, since it
joins the regions of all accesses.
"""

from __future__ import annotations

import functools

import tvm
from tvm import tirx
from tvm.s_tir import SBlockRealize
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


def _lower_apart(lower: tvm.ir.transform.Pass) -> tvm.ir.transform.Pass:
    """``lower``, without `CompactBufferAllocation` for functions that have no blocks."""

    @tvm.transform.module_pass(opt_level=0)
    def run(mod: tvm.IRModule, context: tvm.transform.PassContext) -> tvm.IRModule:
        scheduled: dict[tvm.ir.GlobalVar, tirx.PrimFunc] = {}
        made: dict[tvm.ir.GlobalVar, tirx.PrimFunc] = {}
        for name, func in mod.functions.items():
            # What has blocks has one around all of them.
            (scheduled if isinstance(func.body, SBlockRealize) else made)[name] = func
        result = lower(tvm.IRModule(scheduled, attrs=mod.attrs))
        disabled = [*context.disabled_pass, "s_tir.CompactBufferAllocation"]
        with tvm.transform.PassContext(config=context.config, disabled_pass=disabled):
            result.update(lower(tvm.IRModule(made, attrs=mod.attrs)))
        if len(mod.functions) > 1:
            # A function that is alone becomes a library's entry, of which there can be one.
            for name, func in result.functions.items():
                result[name] = func.without_attr("tirx.is_entry_func")
        return result

    return run


@functools.cache
def _register() -> str:
    lower, finalize_host, _ = default_pipeline.default_s_tir_pipeline()
    name = "tq_tvm"
    tirx.register_tir_pipeline(
        name, lambda: (_lower_apart(lower), finalize_host, _finalize_device_passes)
    )
    return name


def build_module(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.runtime.Module:
    """Lower and generate code for ``mod``: CUDA text for ``cuda`` targets, objects for ``llvm``."""
    config = {"tirx.disable_cse_tir": True} if target.kind.name == "cuda" else {}
    with tvm.transform.PassContext(config=config), target:
        return tvm.tirx.build(mod, target=target, pipeline=_register())
