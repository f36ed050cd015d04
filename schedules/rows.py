"""What the schedules of ``rotate``, ``fill`` and ``flatten`` share: how rows meet the hardware.

On a GPU, where only ``rotate`` has this schedule, ``threadIdx.x`` counts the lanes that share
a row, ``threadIdx.y`` the rows of a CTA. A lane owns ``vector`` neighbouring values of each quarter
of the row, so only log2(lanes) butterflies of the rotation are shuffles.

============  ======================================================================
decision      what it trades
============  ======================================================================
vector        registers and work a lane, against lanes a row: fewer lanes mean fewer
              shuffles, more lanes mean more loads in flight
access        values a load or store: wide ones are fewer, narrow ones spread a
              warp's accesses over fewer cache lines
rows          rows of a CTA: occupancy granularity against tail and launch cost
serial        rows a lane handles one after another: independent loads to overlap,
              against parallelism
chunk (CPU)   rows a task: load balance against scheduling cost
vector (CPU)  SIMD width of the butterflies
unroll (CPU)  code size against loop overhead
============  ======================================================================
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tq_tvm.schedules.decisions import Decide
from tvm.s_tir import Schedule

__all__ = ["ROW_MULTIPLE", "RowBlocks", "schedule_cpu", "schedule_cuda"]

ROW_MULTIPLE = {"cuda": 128, "llvm": 1}
"""Rows are padded to this; every ``rows * serial`` on offer divides it."""

_WARP = 32
_PARTS = 4


@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """Block names of a row kernel, by what a schedule does with them."""

    row_loads: Sequence[str] = ()
    """Copy a row of the model's dtype in: loops (part, m)."""
    row_stores: Sequence[str] = ()
    """Copy a row of the model's dtype out: loops (part, m)."""
    shared: Sequence[str] = ()
    """Compute values that other lanes of the row may read: loops (m, part)."""
    private: Sequence[str] = ()
    """Compute values that stay with their lane: loops (m, part)."""


def _vectors(dim: int) -> list[int]:
    """Values of each quarter a lane may own: at least two lanes a row, at most a warp."""
    quarter = dim // _PARTS
    return [v for v in (8, 16, 32) if 2 <= quarter // v <= _WARP]


def schedule_cuda(sch: Schedule, dim: int, names: RowBlocks, decide: Decide) -> None:
    """Bind rows and lanes; every buffer of a row lives in registers."""
    vector = decide("vector", _vectors(dim))
    access = decide("access", [2, 4, 8])
    rows = decide("rows", [8, 16, 32, 64])
    serial = decide("serial", [1, 2])

    row = sch.get_sblock("row")
    (loop,) = sch.get_loops(row)
    block, repeat, thread = sch.split(loop, [None, serial, rows])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.y")
    sch.reorder(block, thread, repeat)

    def lanes_of(name: str, m_first: bool) -> tuple:
        target = sch.get_sblock(name)
        outer, inner = sch.get_loops(target)[-2:]
        m, part = (outer, inner) if m_first else (inner, outer)
        lane, value = sch.split(m, [None, vector])
        sch.reorder(lane, part, value)
        sch.bind(lane, "threadIdx.x")
        sch.unroll(part)
        return target, value

    for name in [*names.row_loads, *names.row_stores]:
        target, value = lanes_of(name, m_first=False)
        sch.vectorize(sch.split(value, [None, access])[-1])
        if name in names.row_loads:
            sch.set_scope(target, 0, "local")
    for name in [*names.shared, *names.private]:
        target, value = lanes_of(name, m_first=True)
        sch.unroll(value)
        for index in range(len(sch.get(target).writes)):
            sch.set_scope(target, index, "warp" if name in names.shared else "local")


def schedule_cpu(sch: Schedule, names: RowBlocks, decide: Decide) -> None:
    """Rows in parallel, each row's loops vectorised."""
    chunk = decide("chunk", [1, 8, 32, 128])
    vector = decide("vector", [4, 8, 16])
    unroll = decide("unroll", [0, 64, 512])

    row = sch.get_sblock("row")
    (loop,) = sch.get_loops(row)
    task, inner = sch.split(loop, [None, chunk])
    sch.parallel(task)
    sch.annotate(inner, "pragma_auto_unroll_max_step", unroll)
    sch.annotate(inner, "pragma_unroll_explicit", 1)

    for name in [*names.row_loads, *names.row_stores]:
        loop = sch.get_loops(sch.get_sblock(name))[-1]
        # A width that divides the row: a predicate would be scalar code.
        width = math.gcd(8, int(sch.get(loop).extent))
        sch.vectorize(sch.split(loop, [None, width])[-1])
    for name in names.shared:
        target = sch.get_sblock(name)
        m, part = sch.get_loops(target)[-2:]
        sch.vectorize(sch.split(sch.fuse(m, part), [None, vector])[-1])
