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
cluster           0, or where there are clusters the most CTAs that share a block of rows
                  (`tq_tvm.kernels.prefill_cluster`): one choice each, a call decides how many
================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

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
        "cluster": [0],
    },
}

_CLUSTER = 8
"""CTAs of a cluster that every GPU with clusters has."""

DEFAULTS = {
    "cuda": {"warps": 8, "row_tiles": 2, "tile": 64, "lanes": 8, "registers": 255, "cluster": 0},
}


def defaults(spec: CacheSpec, kind: str, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """The hand-picked decisions of a spec; ``sizes`` stand for a GPU that has clusters."""
    values = dict(DEFAULTS[kind])
    if sizes is not None:
        values["cluster"] = _CLUSTER
    if max(spec.head_dim, spec.value_dim) > 128:
        values["row_tiles"] = 1
    return values


def options(
    spec: CacheSpec, kind: str, sizes: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """What each decision may be for a spec; ``sizes`` as of `defaults`."""
    offered = {**OPTIONS[kind], "lanes": lane_options(spec, OPTIONS[kind]["lanes"])}
    return offered if sizes is None else {**offered, "cluster": [_CLUSTER]}


def digest(spec: CacheSpec, kind: str) -> str:
    """What the kernels of today are, see `anchors.hash_points`: with clusters and without."""
    points = (*end_points(options(spec, kind)), *end_points(options(spec, kind, {})))
    return hash_points(prefill, (spec, kind), points)


def apply(
    sch: Schedule, function: str, spec: CacheSpec, kind: str, decide: Decide,
    sizes: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """Write every decision onto the anchor's block; see `options`."""
    annotate(sch, options(spec, kind, sizes), decide)


def rejected(spec: CacheSpec, kind: str, config: dict[str, int]) -> str | None:
    """Why a point of the space is not worth compiling, or None."""
    shape = PrefillShape(spec, PrefillConfig(**config))
    return unfit(shape.tiles, 4 * shape.memory_words, shape.warp)


def launch(spec: CacheSpec, kind: str, config: dict[str, int]) -> dict[str, int]:
    """What the caller chooses this kernel by, and the CTAs of a cluster, see `tq_tvm.splits`."""
    shape = PrefillShape(spec, PrefillConfig(**config))
    if not config["cluster"]:
        return {"rows": shape.rows}
    return {
        "threads": shape.threads,
        "shared_bytes": 4 * shape.memory_words,
        "units": spec.num_kv_heads,
        "rows": shape.rows,
        "cluster": config["cluster"],
        "cta_tokens": config["tile"],
    }
