"""The search space of ``prefill``: parameters of the kernel's factory, sampled on an anchor.

================  ==================================================================
decision (CUDA)   what it trades
================  ==================================================================
warps             rows of a CTA, by ``16 row_tiles``, for which a tile is decoded once,
                  against CTAs on an SM, one of which multiplies while another decodes
row_tiles         rows of a warp, by 16: each operand of K and V read for more products,
                  against registers
tile              tokens decoded and attended to between two barriers, against shared memory
lanes             as of ``attend``
registers         the most a thread may have: more CTAs on an SM, against spills
================  ==================================================================
"""

from __future__ import annotations

from tq_tvm.schedules.anchors import annotate, end_points, hash_points
from tq_tvm.schedules.attend import lane_options, unfit
from tq_tvm.schedules.decisions import Decide
from tvm.s_tir import Schedule

from tq_tvm.kernels.prefill import prefill
from tq_tvm.kernels.prefill_cuda import PrefillConfig, PrefillShape
from tq_tvm.spec import CacheSpec

__all__ = ["DEFAULTS", "OPTIONS", "apply", "defaults", "digest", "launch", "options", "rejected"]

OPTIONS = {
    "cuda": {
        "warps": [4, 8],
        "row_tiles": [1, 2],
        "tile": [32, 64],
        "lanes": [2, 4, 8],
        "registers": [128, 168, 255],
    },
}

DEFAULTS = {
    "cuda": {"warps": 8, "row_tiles": 2, "tile": 64, "lanes": 8, "registers": 255},
}


def defaults(spec: CacheSpec, kind: str) -> dict[str, int]:
    """The hand-picked decisions of a spec."""
    values = dict(DEFAULTS[kind])
    if max(spec.head_dim, spec.value_dim) > 128:
        values["row_tiles"] = 1
    return values


def options(spec: CacheSpec, kind: str) -> dict[str, list[int]]:
    """What each decision may be for a spec."""
    return {**OPTIONS[kind], "lanes": lane_options(spec, OPTIONS[kind]["lanes"])}


def digest(spec: CacheSpec, kind: str) -> str:
    """What the kernels of today are, see `anchors.hash_points`."""
    return hash_points(prefill, (spec, kind), end_points(options(spec, kind)))


def apply(sch: Schedule, function: str, spec: CacheSpec, kind: str, decide: Decide) -> None:
    """Write every decision onto the anchor's block."""
    annotate(sch, options(spec, kind), decide)


def rejected(spec: CacheSpec, kind: str, config: dict[str, int]) -> str | None:
    """Why a point of the space is not worth compiling, or None."""
    shape = PrefillShape(spec, PrefillConfig(**config))
    return unfit(shape.tiles, 4 * shape.memory_words, shape.warp)


def launch(spec: CacheSpec, kind: str, config: dict[str, int]) -> dict[str, int]:
    """What the caller chooses this kernel by: the rows of a CTA."""
    return {"rows": PrefillShape(spec, PrefillConfig(**config)).rows}
