"""The search space of ``mla``: parameters of the kernel's factory, sampled on an anchor.

================  ==================================================================
decision (CPU)    what it trades
================  ==================================================================
tile              tokens between two updates of the softmax state: fewer rescales,
                  against cache footprint
vector            SIMD width of decoding and of the products
heads             query heads of a task: latents decoded less often, against parallel
                  work and cache footprint
================  ==================================================================
"""

from __future__ import annotations

from tq_tvm.schedules.anchors import annotate, end_points, hash_points
from tq_tvm.schedules.decisions import Decide
from tvm.s_tir import Schedule

from tq_tvm.kernels.mla import mla
from tq_tvm.spec import CacheSpec

__all__ = ["DEFAULTS", "OPTIONS", "apply", "defaults", "digest", "launch", "options", "rejected"]

OPTIONS = {"llvm": {"tile": [16, 32, 64], "vector": [8, 16, 32], "heads": [4, 8, 16, 32]}}

DEFAULTS = {"llvm": {"tile": 32, "vector": 16, "heads": 16}}


def defaults(spec: CacheSpec, kind: str) -> dict[str, int]:
    """The hand-picked decisions of a spec."""
    return dict(DEFAULTS[kind])


def options(spec: CacheSpec, kind: str) -> dict[str, list[int]]:
    """What each decision may be for a spec."""
    return OPTIONS[kind]


def digest(spec: CacheSpec, kind: str) -> str:
    """What the kernels of today are, see `anchors.hash_points`."""
    return hash_points(mla, (spec, kind), end_points(options(spec, kind)))


def apply(sch: Schedule, function: str, spec: CacheSpec, kind: str, decide: Decide) -> None:
    """Write every decision onto the anchor's block."""
    annotate(sch, options(spec, kind), decide)


def rejected(spec: CacheSpec, kind: str, config: dict[str, int]) -> str | None:
    """Why a point of the space is not worth compiling, or None."""
    return None


def launch(spec: CacheSpec, kind: str, config: dict[str, int]) -> dict[str, int]:
    """What the caller needs to choose a number of splits, see `tq_tvm.splits`."""
    return {"ctas_per_sm": 1, "split_tokens": 64}
