"""Row kernels of GPUs that a factory makes; short rows of ``rotate`` have a schedule as well.

MetaSchedule searches on the function before any schedule: these decisions are written onto its
block ``row``, and whoever builds a candidate or a record calls the factory.

================  ==================================================================
decision (fill)   what it trades
================  ==================================================================
factory           1: tells the designs apart
warps             rows of a CTA in parallel, against CTAs resident on an SM
tiles             times that a warp takes 8 rows: constants made once for more of
                  them, against parallel work
contracted        bits of the coordinate that the tensor core takes beyond its four:
                  fewer additions, against twice the products for each
sides             one warp for K and V, or one each: fewer slots to look up, against
                  parallel work
stages            rows on their way beside those that are worked on, plus one: latency
                  hidden, against shared memory
registers         the most a thread may have: more CTAs on an SM, against spills and
                  loads in flight
================  ==================================================================

``flatten`` decides ``warps``, ``tiles`` and ``registers`` too; ``rows``, which a lane reads before
it writes the first, unless it rotates back, and ``contracted`` only then. Without a rotation
``fill`` has one choice of it.

``rotate`` decides ``warps``, ``contracted`` and ``registers`` too; ``values`` of a lane: more loads
at once and fewer exchanges, against warps on an SM; and ``tiles`` of a CTA, each read while the one
before is written. Rows longer than a head have this design alone.

Rows in lanes, of dimensions that are no power of two or of K and V of different ones, have neither
``contracted`` nor ``stages``, ``rows`` and ``values``: these have one choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tq_tvm.schedules.anchors import end_points, hash_points
from tq_tvm.schedules.decisions import Decide
from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc

from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.kernels.fill_cuda import FillConfig, fill_cuda
from tq_tvm.kernels.flatten_cuda import FlattenConfig, flatten_cuda
from tq_tvm.kernels.lane_rows import LaneRow, multiplies
from tq_tvm.kernels.rotate_cuda import RotateConfig, rotate_cuda
from tq_tvm.spec import FUNCTIONS, CacheSpec, RotateSpec, Spec, parse_spec

__all__ = ["DEFAULTS", "Made", "apply", "defaults", "made", "make", "options"]

_FILL = {
    "factory": 1,
    "warps": 4,
    "tiles": 8,
    "contracted": 1,
    "sides": 1,
    "stages": 2,
    "registers": 80,
}
_APPEND = {
    "factory": 1,
    "warps": 2,
    "tiles": 1,
    "contracted": 0,
    "sides": 2,
    "stages": 1,
    "registers": 128,
}
_APPENDED = 1024
"""Most tokens of a workload that has these: a warp takes 8 rows, once. With those of chunks, which
take 8 times as many, 64 tokens of 8 KV heads took 14.2 us of 4.8 on an H100."""

_FLATTEN = {"factory": 1, "warps": 8, "tiles": 1, "registers": 64}

DEFAULTS = {
    "rotate": {
        "factory": 1,
        "values": 64,
        "warps": 4,
        "tiles": 1,
        "contracted": 2,
        "registers": 128,
    },
    "fill_slots": _FILL,
    "fill_table": _FILL,
    "flatten": {**_FLATTEN, "rows": 2},
    "flatten_unrotated": {**_FLATTEN, "rows": 1, "contracted": 1},
}
"""Of each function; of ``rotate`` where it has no schedule."""

_LANES = {"factory": [1], "warps": [2, 4, 8], "tiles": [1, 2, 4], "registers": [128, 168, 255]}
_LANE_OPTIONS: dict[str, dict[str, list[int]]] = {
    "rotate": {**_LANES, "values": [64], "contracted": [0]},
    "fill": {**_LANES, "contracted": [0], "sides": [1, 2], "stages": [1]},
    "flatten": {**_LANES, "rows": [1], "contracted": [0]},
}
_LANE_DEFAULTS = {"warps": 4, "tiles": 1, "registers": 168, "sides": 2}
"""Of rows in lanes, by kernel: what else a factory is asked for has one value."""

_MANY = 96
"""Values of a lane that, with what is made of them, do not fit 168 registers."""

_BLOCK = "row"
_PREFIX = "tq_"
_DESIGN = "tq_design"


@dataclasses.dataclass(frozen=True)
class Made:
    """What a factory's annotations say: function, the spec it was searched at, decisions."""

    function: str
    spec: Spec
    config: dict[str, int]


def options(function: str, spec: Spec) -> dict[str, list[int]] | None:
    """What each decision may be; None where there is no factory."""
    dim = spec.rotation.dim
    contracted = [0, 1] if dim == 64 else [0, 1, 2]
    if _in_lanes(function, spec):
        return _LANE_OPTIONS.get(FUNCTIONS[function])
    if function == "rotate":
        values = [16, 32, 64] if dim <= 256 else [32, 64] if dim < 4096 else [64]
        return {
            "factory": [1],
            "values": values,
            # Enough for a row.
            "warps": [w for w in (1, 2, 4) if 32 * w * values[0] >= dim],
            "tiles": [1, 2, 4],
            "contracted": contracted,
            "registers": [64, 96, 128],
        }
    if function in ("fill_slots", "fill_table"):
        return {
            "factory": [1],
            "warps": [1, 2, 4, 8],
            "tiles": [1, 2, 4, 8, 16],
            "contracted": contracted if _rotates(spec) else [1],
            "sides": [1, 2],
            "stages": [1, 2, 3],
            "registers": [64, 80, 96, 128],
        }
    if function in ("flatten", "flatten_unrotated"):
        shared = {
            "factory": [1],
            "warps": [2, 4, 8],
            "tiles": [1, 4, 16],
            "registers": [48, 64, 96],
        }
        if function == "flatten_unrotated" and _rotates(spec):
            return {**shared, "rows": [1], "contracted": contracted}
        return {**shared, "rows": [1, 2, 4]}
    return None


def defaults(function: str, spec: Spec, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """The hand-picked decisions of a spec, at some sizes if they are given."""
    if not _in_lanes(function, spec):
        appends = FUNCTIONS[function] == "fill" and sizes and sizes["tokens"] <= _APPENDED
        return _APPEND if appends else DEFAULTS[function]
    table = _LANE_OPTIONS[FUNCTIONS[function]]
    values = {name: _LANE_DEFAULTS.get(name, options[0]) for name, options in table.items()}
    dims = (spec.rotation.dim, spec.value_dim if isinstance(spec, CacheSpec) else spec.dim)
    own = dims[:1] if function == "rotate" else dims
    if max(LaneRow(dim).values for dim in own) >= _MANY:
        values["registers"] = 255
    return values


def _in_lanes(function: str, spec: Spec) -> bool:
    """Whether rows are in lanes (``lane_rows``), which have fewer decisions to make."""
    if function == "rotate":
        return bool(spec.rotation.dim & (spec.rotation.dim - 1))
    return isinstance(spec, CacheSpec) and not multiplies(spec)


def _rotates(spec: Spec) -> bool:
    return isinstance(spec, RotateSpec) or spec.cache_format.rotation != "none"


def make(function: str, spec: Spec, config: Mapping[str, int]) -> PrimFunc:
    """The kernel of some decisions, on functions of dynamic shape."""
    values = {name: value for name, value in config.items() if name != "factory"}
    if function == "rotate":
        return rotate_cuda(spec.rotation, RotateConfig(**values))
    if function in ("fill_slots", "fill_table"):
        return fill_cuda(spec, FillConfig(**values), function == "fill_table")
    return flatten_cuda(spec, FlattenConfig(**values), function == "flatten_unrotated")


def apply(sch: Schedule, function: str, spec: Spec, decide: Decide) -> None:
    """Write the design and its decisions onto the row's block."""
    block = sch.get_sblock(_BLOCK)
    sch.annotate(block, _DESIGN, f"{function}/{spec.label}/{_digest(function, spec)}")
    for name, values in (options(function, spec) or {}).items():
        sch.annotate(block, _PREFIX + name, decide(name, values))


def made(sch: Schedule) -> Made | None:
    """Read the annotations back; None for a function that was scheduled.

    Raises
    ------
    UnsupportedSpecError
        The factory makes other kernels now than when the decisions were found.
    """
    annotations = sch.get(sch.get_sblock(_BLOCK)).annotations
    if _DESIGN not in annotations:
        return None
    function, label, digest = str(annotations[_DESIGN]).split("/")
    spec = parse_spec(label)
    if digest != _digest(function, spec):
        raise UnsupportedSpecError(
            f"{function}: decisions must be of the kernel as it is now, got those of {digest}; "
            "run `tq-tvm tune` again"
        )
    config = {
        key.removeprefix(_PREFIX): int(value)
        for key, value in annotations.items()
        if key.startswith(_PREFIX) and key != _DESIGN
    }
    return Made(function, spec, config)


def _digest(function: str, spec: Spec) -> str:
    """What the kernels of today are, see `anchors.hash_points`."""
    return hash_points(make, (function, spec), end_points(options(function, spec) or {}))
