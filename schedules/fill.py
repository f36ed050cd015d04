"""The search space of ``fill``: on CPUs see `tq_tvm.schedules.rows`, on GPUs `factories`."""

from __future__ import annotations

from tq_tvm.schedules.decisions import Decide
from tq_tvm.schedules.rows import RowBlocks, schedule_cpu
from tvm.s_tir import Schedule

from tq_tvm.kernels.blocks import stage_names
from tq_tvm.spec import CacheSpec

__all__ = ["DEFAULTS", "apply"]

DEFAULTS = {"llvm": {"chunk": 32, "vector": 8, "unroll": 64}}


def apply(sch: Schedule, function: str, spec: CacheSpec, kind: str, decide: Decide) -> None:
    """Schedule ``fill_slots`` or ``fill_table`` for CPUs."""
    sides = ("k", "v")
    names = RowBlocks(
        row_loads=[f"{s}_load" for s in sides],
        shared=[name for s in sides for name in (f"{s}_widen", *stage_names(s, spec.head_dim))],
    )
    schedule_cpu(sch, names, decide)
