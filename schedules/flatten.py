"""The search space of ``flatten``: on CPUs see `tq_tvm.schedules.rows`, on GPUs `factories`."""

from __future__ import annotations

from tq_tvm.schedules.decisions import Decide
from tq_tvm.schedules.rows import RowBlocks, schedule_cpu
from tvm.s_tir import Schedule

from tq_tvm.kernels.blocks import stage_names
from tq_tvm.spec import CacheSpec

__all__ = ["DEFAULTS", "apply"]

DEFAULTS = {"llvm": {"chunk": 32, "vector": 8, "unroll": 64}}


def apply(sch: Schedule, function: str, spec: CacheSpec, kind: str, decide: Decide) -> None:
    """Schedule ``flatten`` or ``flatten_unrotated`` for CPUs."""
    sides = {"k": spec.head_dim, "v": spec.value_dim}
    unrotated = function == "flatten_unrotated" and spec.cache_format.rotation != "none"
    names = RowBlocks(
        shared=[
            name
            for s, dim in sides.items()
            for name in (f"{s}_value", *(stage_names(s, dim) if unrotated else ()))
        ],
        row_stores=[f"{s}_store" for s in sides],
    )
    schedule_cpu(sch, names, decide)
