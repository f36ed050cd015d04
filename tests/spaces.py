"""Spaces of the tests of ``schedules``: specs, functions with a space, and points of theirs."""

from __future__ import annotations

import tvm
from tq_tvm.schedules import decode
from tq_tvm.schedules.decisions import sampled
from tvm.s_tir import Schedule

from tq_tvm import schedules
from tq_tvm.served import functions_on
from tq_tvm.spec import FUNCTIONS, CacheSpec

__all__ = [
    "ANCHORED",
    "ATTENTION",
    "MODULES",
    "ON_CPU",
    "ON_GPU",
    "ON_KIND",
    "ROW_KERNELS",
    "SCHEDULED",
    "SPEC",
    "anchor",
    "options",
    "sample",
    "shape",
]

SPEC = CacheSpec(128, 4, 2, 16, "bfloat16", "bshd")
ATTENTION = ("decode", "attend", "prefill")
# Which nobody searches: it has the decisions of decode.
FEATURED = "decode_featured"
ROW_KERNELS = [name for name in FUNCTIONS if name not in (*ATTENTION, FEATURED, "mla")]
# A GPU's fill and flatten are made by a factory, see test_factories.py.
SCHEDULED = [*((name, "llvm") for name in ROW_KERNELS), ("rotate", "cuda")]
MODULES = schedules._SPACES
ON_GPU = [name for name in functions_on(SPEC, "cuda") if name != FEATURED]
ON_CPU = functions_on(SPEC, "llvm")
ON_KIND = [*((name, "llvm") for name in ON_CPU), *((name, "cuda") for name in ON_GPU)]
ANCHORED = [(name, kind) for name, kind in ON_KIND if name in ATTENTION]


def shape(function, spec, sequences=2, width=3):
    """Sizes of a workload with full pages."""
    pages = {"batch": sequences, "pages": sequences * width, "table_width": width}
    tokens = sequences * width * spec.page_size
    return {
        "rotate": {"n": tokens + 5},
        "fill_slots": {"tokens": tokens - 5, "pages": pages["pages"]},
        "decode": pages,
        "mla": pages,
        "attend": {"tokens": sequences * 11, **pages},
    }.get(function, {"tokens": tokens, **pages})


def sample(function, spec, kind, seed) -> Schedule:
    """A random point of the space of a function of static sizes, as a search draws it."""
    mod = schedules.search_module(function, spec, kind, shape(function, spec))
    sch = Schedule(mod, seed=seed)
    schedules.space(function, spec, kind)(sch)
    return sch


def anchor(spec, kind, config) -> tvm.IRModule:
    """What a search hands to the builder when it has made these decisions."""
    sch = Schedule(schedules.search_module("decode", spec, kind, shape("decode", spec)))
    decode.apply(sch, "decode", spec, kind, sampled(sch, config))
    return sch.mod


def options(function, spec, kind) -> dict[str, list[int]]:
    """What each decision of the first design may be."""
    offered = {}

    def decide(name, values):
        offered[name] = [int(v) for v in values]
        return values[0]

    probe = Schedule(schedules.search_module(function, spec, kind, None))
    schedules._apply_first(probe, function, spec, kind, decide)
    return offered
