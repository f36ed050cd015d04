"""Anchors: what a search of a factory's parameters samples its decisions on.

The structure of a factory's kernel changes with its parameters, so MetaSchedule searches on a small
function in its place, whose one block carries the decisions as annotations.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import tvm_ffi
from tq_tvm.schedules.decisions import Decide
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

__all__ = ["Point", "anchor", "annotate", "decisions", "end_points", "hash_points"]

_BLOCK = "decisions"
_PREFIX = "tq_"

Point = tuple[tuple[str, int], ...]
"""Names and values of all decisions."""


def anchor(identity: str) -> PrimFunc:
    """A function that stands for one workload; its block carries the sampled decisions.

    ``identity`` (function, kind, spec, sizes and digest) makes anchors of different workloads
    different.
    """

    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((1,), "float32")):
        # MetaSchedule adds the attribute that is missing, and then finds no record again.
        T.func_attr({"tirx.noalias": True, "tq_tvm.anchor": identity})
        with T.sblock("decisions"):
            T.reads()
            T.writes(a[0])
            a[0] = T.float32(0)

    return main


def annotate(sch: Schedule, options: Mapping[str, list[int]], decide: Decide) -> None:
    """Write every decision onto the anchor's block."""
    block = sch.get_sblock(_BLOCK)
    for name, values in options.items():
        sch.annotate(block, _PREFIX + name, decide(name, values))


def decisions(sch: Schedule) -> dict[str, int]:
    """Read the decisions back."""
    annotations = sch.get(sch.get_sblock(_BLOCK)).annotations
    return {
        k.removeprefix(_PREFIX): int(v) for k, v in annotations.items() if k.startswith(_PREFIX)
    }


def end_points(options: Mapping[str, list[int]]) -> tuple[Point, ...]:
    """Each decision at the first and at the last of its options: both sides of a branch count."""
    return tuple(tuple((name, values[end]) for name, values in options.items()) for end in (0, -1))


@functools.lru_cache(maxsize=256)
def hash_points(
    factory: Callable[..., PrimFunc], arguments: tuple[Any, ...], points: tuple[Point, ...]
) -> str:
    """Tell the TensorIR of a factory from what it once was, as a body does for other kernels.

    ``factory`` takes ``arguments`` and the decisions of a point. Names, formatting and comments do
    not count.
    """
    hashes = [tvm_ffi.structural_hash(factory(*arguments, dict(point))) for point in points]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]
