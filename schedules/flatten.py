"""The search space of ``flatten``: see `tq_tvm.schedules.rows` for what each decision trades."""

from __future__ import annotations

from tq_tvm.schedules.decisions import Decide
from tq_tvm.schedules.rows import RowBlocks, schedule_cpu, schedule_cuda
from tvm.s_tir import Schedule

from tq_tvm.kernels.blocks import stage_names
from tq_tvm.spec import CacheSpec

__all__ = ["DEFAULTS", "apply"]

DEFAULTS = {
    "cuda": {"vector": 8, "access": 8, "rows": 32, "serial": 1},
    "llvm": {"chunk": 32, "vector": 8, "unroll": 64},
}


def apply(sch: Schedule, function: str, spec: CacheSpec, kind: str, decide: Decide) -> None:
    """Schedule ``flatten`` or ``flatten_unrotated`` for a target kind."""
    sides = ("k", "v")
    unrotated = function == "flatten_unrotated"
    names = RowBlocks(
        code_loads=[f"{s}_load" for s in sides],
        shared=[
            name
            for s in sides
            for name in (f"{s}_value", *(stage_names(s, spec.head_dim) if unrotated else ()))
        ],
        private=[f"{s}_narrow" for s in sides],
        row_stores=[f"{s}_store" for s in sides],
        scalars=["sequence", "slot", *[f"{s}_scales" for s in sides]],
    )
    if kind == "cuda":
        schedule_cuda(sch, spec.head_dim, names, decide)
    else:
        schedule_cpu(sch, names, decide)
