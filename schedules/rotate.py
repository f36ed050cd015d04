"""The search space of ``rotate``: see `tq_tvm.schedules.rows` for what each decision trades."""

from __future__ import annotations

from tq_tvm.schedules.decisions import Decide
from tq_tvm.schedules.rows import RowBlocks, schedule_cpu, schedule_cuda
from tvm.s_tir import Schedule

from tq_tvm.kernels.blocks import stage_names
from tq_tvm.spec import Spec

__all__ = ["DEFAULTS", "apply"]

DEFAULTS = {
    "cuda": {"vector": 8, "access": 8, "rows": 32, "serial": 1},
    "llvm": {"chunk": 32, "vector": 8, "unroll": 64},
}


def apply(sch: Schedule, function: str, spec: Spec, kind: str, decide: Decide) -> None:
    """Schedule ``rotate`` for a target kind."""
    dim = spec.rotation.dim
    names = RowBlocks(
        row_loads=["x_load"],
        shared=["x_widen", *stage_names("x", dim)],
        private=["y_narrow"],
        row_stores=["y_store"],
    )
    if kind == "cuda":
        schedule_cuda(sch, dim, names, decide)
    else:
        schedule_cpu(sch, names, decide)
