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

================  ==================================================================
decision (CUDA)   what it trades
================  ==================================================================
decoders          warps that decode: more hide each other's waiting, against registers
ahead             scores of the next tile multiplied before this tile's values: they cross the
                  cluster meanwhile, against a place of the ring
tiles             places of the ring of decoded tiles: how far decoding may be ahead,
                  against shared memory
reach             least tiles of a part: fewer pieces to merge, against idle processors
overlap           the merge begins before the first launch is done, and waits there
================  ==================================================================
"""

from __future__ import annotations

from tq_tvm.schedules.anchors import annotate, end_points, hash_points
from tq_tvm.schedules.decisions import Decide
from tvm.s_tir import Schedule

from tq_tvm.kernels.mla import mla
from tq_tvm.kernels.mla_shape import RANKS, TILE, MlaConfig, MlaShape
from tq_tvm.spec import CacheSpec

__all__ = ["DEFAULTS", "OPTIONS", "apply", "defaults", "digest", "launch", "options", "rejected"]

OPTIONS = {
    "llvm": {"tile": [16, 32, 64], "vector": [8, 16, 32], "heads": [4, 8, 16, 32]},
    "cuda": {
        "decoders": [4, 8],
        "ahead": [0, 1],
        "tiles": [2, 3, 4],
        "reach": [1, 2, 4, 8],
        "overlap": [0, 1],
    },
}

DEFAULTS = {
    "llvm": {"tile": 32, "vector": 16, "heads": 16},
    "cuda": {"decoders": 4, "ahead": 1, "tiles": 3, "reach": 4, "overlap": 1},
}


def defaults(spec: CacheSpec, kind: str) -> dict[str, int]:
    """The hand-picked decisions of a spec."""
    values = dict(DEFAULTS[kind])
    if kind == "cuda":
        if MlaShape(spec, MlaConfig(**values)).shares_tiles:
            # With few heads decoding is what takes long.
            values |= {"decoders": 8, "ahead": 0}
        if rejected(spec, kind, values):
            values["tiles"] = 2
    return values


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
    return MlaShape(spec, MlaConfig(**config)).unfit if kind == "cuda" else None


def launch(spec: CacheSpec, kind: str, config: dict[str, int]) -> dict[str, int]:
    """What the caller needs to choose a number of parts, see `tq_tvm.splits`."""
    if kind == "cuda":
        shape = MlaShape(spec, MlaConfig(**config))
        return {
            "threads": shape.threads,
            "shared_bytes": shape.shared_bytes,
            "units": RANKS * shape.pairs,
            "part_tokens": TILE * config["reach"],
            "pieces": shape.pieces,
        }
    return {"ctas_per_sm": 1, "split_tokens": 64}
