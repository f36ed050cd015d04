"""The search space of ``fill``: see `tq_tvm.schedules.rows` for what each decision trades."""

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
    """Schedule ``fill_slots`` or ``fill_table`` for a target kind."""
    fmt = spec.cache_format
    sides = {"k": fmt.key, "v": fmt.value}
    scaled = [side for side, codec in sides.items() if codec.residual_sign]
    names = RowBlocks(
        row_loads=[f"{s}_load" for s in sides],
        shared=[name for s in sides for name in (f"{s}_widen", *stage_names(s, spec.head_dim))],
        private=[f"{s}_code" for s in sides],
        packs=[f"{s}_pack" for s in sides],
        code_stores=[f"{s}_store" for s in sides],
        sums=[f"{s}_square" for s in sides] + [f"{s}_residual_square" for s in scaled],
        scalars=[
            *(["sequence"] if function == "fill_table" else []),
            "slot",
            *[f"{s}_{step}" for s in sides for step in ("norm", "inverse", "scale")],
            *[f"{s}_residual_norm" for s in scaled],
        ],
        metas=[f"{s}_meta" for s, codec in sides.items() if len(codec.meta) > 1],
    )
    if kind == "cuda":
        schedule_cuda(sch, spec.head_dim, names, decide)
    else:
        schedule_cpu(sch, names, decide)
