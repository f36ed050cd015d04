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
                  (`tq_tvm.kernels.prefill_merge`): one choice each, a call decides how many
================  ==================================================================

Where warpgroups multiply (`tq_tvm.kernels.prefill_warpgroups`: Hopper, packed rows of 64 or 128
values), in place of ``warps`` and ``row_tiles``:

================  ==================================================================
multipliers       rows of a CTA, by 64, for which a tile is decoded once: those that a
                  sequence has, or blocks that are as many as processors
decoders          warps that decode: more rows on their way, against registers
places            decoded tiles that wait to be multiplied, against shared memory
registers         of a thread that multiplies; those that decode have the rest
================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

from tq_tvm.schedules.anchors import annotate, end_points, hash_points
from tq_tvm.schedules.attend import fitted, lane_options, limit_of, unfit, unscaled
from tq_tvm.schedules.decisions import Decide
from tvm.s_tir import Schedule

from tq_tvm.kernels.device import SHARED_BYTES
from tq_tvm.kernels.prefill import prefill, shape_of
from tq_tvm.kernels.prefill_shape import PrefillConfig, PrefillShape
from tq_tvm.kernels.prefill_warpgroups import WARPGROUP_ROWS, WarpgroupConfig, WarpgroupShape
from tq_tvm.spec import CacheSpec

__all__ = ["DEFAULTS", "OPTIONS", "apply", "defaults", "digest", "launch", "options", "rejected"]

OPTIONS = {
    "cuda": {
        "warps": [1, 2, 4, 8],
        "row_tiles": [1, 2],
        "tile": [16, 32, 64],
        "lanes": [2, 4, 8],
        "registers": [128, 168, 255],
        "cluster": [0],
    },
}

WARPGROUP_OPTIONS = {
    "multipliers": [1, 2, 3],
    "decoders": [4, 8],
    "tile": [32, 64],
    "places": [2, 3],
    "lanes": [2, 4],
    "registers": [144, 168, 184],
}

_CLUSTER = 8
"""CTAs of a cluster that every GPU with clusters has."""

DEFAULTS = {
    "cuda": {"warps": 8, "row_tiles": 2, "tile": 64, "lanes": 8, "registers": 255, "cluster": 0},
}

WARPGROUP_DEFAULTS = {
    "multipliers": 2,
    "decoders": 4,
    "tile": 64,
    "places": 3,
    "lanes": 2,
    "registers": 184,
}
_ONE_BLOCK = {"multipliers": 1, "places": 2, "registers": 168}
"""Of so few rows a sequence that one warpgroup has them: two CTAs are on an SM."""


def defaults(spec: CacheSpec, kind: str, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """The hand-picked decisions of a spec; ``sizes`` as of `options`."""
    if _multiplies_together(spec, sizes):
        assert sizes is not None
        rows = -(-sizes["tokens"] // sizes["batch"]) * spec.group_size
        few = _ONE_BLOCK if rows <= WARPGROUP_ROWS else {}
        lanes = {"lanes": lane_options(spec, [WARPGROUP_DEFAULTS["lanes"]])[0]}
        return {**WARPGROUP_DEFAULTS, **few, **lanes, "cluster": _CLUSTER}
    values = dict(DEFAULTS[kind])
    values["cluster"] = _cluster_of(sizes)
    if max(spec.head_dim, spec.value_dim) > 128:
        values["row_tiles"] = 1
    return fitted(values, 1, lambda tried: rejected(spec, kind, tried, limit_of(sizes)))


def _multiplies_together(spec: CacheSpec, sizes: Mapping[str, int] | None) -> bool:
    return sizes is not None and "wgmma" in sizes and WarpgroupShape.serves(spec)


def _cluster_of(sizes: Mapping[str, int] | None) -> int:
    return _CLUSTER if sizes is not None and "clusters" in sizes else 0


def options(
    spec: CacheSpec, kind: str, sizes: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """What each decision may be for a spec.

    ``sizes`` may say that a GPU has ``clusters`` and ``wgmma``, and how many ``shared_bytes`` a CTA
    of it has.
    """
    if _multiplies_together(spec, sizes):
        lanes = lane_options(spec, WARPGROUP_OPTIONS["lanes"])
        return {**WARPGROUP_OPTIONS, "lanes": lanes, "cluster": [_CLUSTER]}
    offered = {**OPTIONS[kind], "lanes": lane_options(spec, OPTIONS[kind]["lanes"])}
    return {**offered, "cluster": [_cluster_of(sizes)]}


def digest(spec: CacheSpec, kind: str) -> str:
    """What the kernels of today are, see `anchors.hash_points`: of every form."""
    forms: tuple[dict[str, int], ...] = ({}, {"clusters": 1}, {"clusters": 1, "wgmma": 1})
    points = [point for form in forms for point in end_points(options(spec, kind, form))]
    return hash_points(prefill, (spec, kind), tuple(points))


def apply(
    sch: Schedule, function: str, spec: CacheSpec, kind: str, decide: Decide,
    sizes: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """Write every decision onto the anchor's block; see `options`."""
    annotate(sch, options(spec, kind, sizes), decide)


def rejected(
    spec: CacheSpec, kind: str, config: dict[str, int], limit: int = SHARED_BYTES
) -> str | None:
    """Why a point of the space is not worth compiling, or None; CTAs have ``limit`` bytes."""
    if "multipliers" in config:
        return WarpgroupShape(spec, WarpgroupConfig(**config)).unfit
    shape = PrefillShape(spec, PrefillConfig(**config))
    if reason := unscaled(shape.tiles):
        return reason
    return unfit(shape.tiles, 4 * shape.memory_words, shape.warp, limit)


def launch(spec: CacheSpec, kind: str, config: dict[str, int]) -> dict[str, int]:
    """What the caller chooses this kernel by, and the CTAs of a cluster, see `tq_tvm.splits`."""
    shape = shape_of(spec, config)
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
