"""Search spaces: what MetaSchedule may decide about each kernel, and how decisions become code.

``rotate``, ``fill`` and ``flatten`` are schedulable blocks: a trace found on a function of static
shape is replayed on the dynamic function that ships. ``decode``, ``attend`` and ``prefill`` sample
the parameters of their factories on anchors (`anchors`), and the factory makes the kernel. On GPUs
the others are made by factories as well (`factories`); short rows of ``rotate`` have both designs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tq_tvm.schedules import attend, decode, factories, fill, flatten, mla, prefill, rotate
from tq_tvm.schedules.anchors import anchor, decisions
from tq_tvm.schedules.decisions import Decide, decided, sampled
from tq_tvm.schedules.rows import ROW_MULTIPLE
from tvm.s_tir import Schedule, Trace
from tvm.tirx import PrimFunc

from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.kernels import FUNCTIONS
from tq_tvm.kernels.attend import attend as attend_kernel
from tq_tvm.kernels.decode import decode as decode_kernel
from tq_tvm.kernels.decode_featured import decode_featured
from tq_tvm.kernels.decode_shape import DecodeConfig
from tq_tvm.kernels.fill import fill_slots, fill_table
from tq_tvm.kernels.flatten import flatten as flatten_kernel
from tq_tvm.kernels.lane_rows import MULTIPLIED
from tq_tvm.kernels.mla import mla as mla_kernel
from tq_tvm.kernels.prefill import prefill as prefill_kernel
from tq_tvm.kernels.rotate import rotate as rotate_kernel
from tq_tvm.served import check_target
from tq_tvm.spec import CacheSpec, Spec

__all__ = [
    "Instance",
    "candidate",
    "candidate_launch",
    "default",
    "featured",
    "has_factory",
    "instantiate",
    "is_feasible",
    "point",
    "search_module",
    "space",
    "unscheduled",
]

_SPACES: dict[str, Any] = {
    "rotate": rotate,
    "fill": fill,
    "flatten": flatten,
    "decode": decode,
    "attend": attend,
    "prefill": prefill,
    "mla": mla,
}

_ANCHORED: dict[str, Callable[..., PrimFunc]] = {
    "decode": decode_kernel,
    "attend": attend_kernel,
    "prefill": prefill_kernel,
    "mla": mla_kernel,
}
"""Functions whose decisions are sampled on an anchor, and the factories of their kernels."""

_SIZED = ("decode", "attend", "prefill")
"""Of these, functions whose defaults depend on the size."""


@dataclasses.dataclass(frozen=True)
class Instance:
    """A kernel ready to compile, and the decisions in it; ``tuned`` if the default's are others."""

    func: PrimFunc
    config: dict[str, int]
    launch: dict[str, int]
    tuned: bool


def unscheduled(
    function: str, spec: Spec, kind: str, shape: dict[str, int] | None = None
) -> PrimFunc:
    """The TensorIR of a row kernel before any schedule; ``shape`` fixes its sizes."""
    sizes: dict[str, Any] = {"row_multiple": ROW_MULTIPLE[kind], **(shape or {})}
    if "pages" in sizes:
        sizes["num_pages"] = sizes.pop("pages")
    if function == "rotate":
        return rotate_kernel(spec.rotation, **sizes)
    if function == "fill_slots":
        return fill_slots(spec, **sizes)
    if function == "fill_table":
        return fill_table(spec, **sizes)
    if function in ("flatten", "flatten_unrotated"):
        return flatten_kernel(spec, unrotated=function == "flatten_unrotated", **sizes)
    raise UnsupportedSpecError(
        f"unscheduled: function must be one of {', '.join(FUNCTIONS)} but "
        f"{' and '.join(_ANCHORED)}, got {function!r}"
    )


def _identity(function: str, spec: Spec, kind: str, shape: dict[str, int] | None) -> str:
    if shape is None:  # no workload, so nothing is filed under it
        return f"{function}/{kind}/{spec.label}//"
    sizes = ",".join(f"{k}={v}" for k, v in sorted(shape.items()))
    if function == "decode":
        digest = decode.digest(spec, kind, short=decode.is_short(spec, shape))
    else:
        digest = _SPACES[function].digest(spec, kind)
    return f"{function}/{kind}/{spec.label}/{sizes}/{digest}"


def search_module(
    function: str, spec: Spec, kind: str, shape: dict[str, int] | None
) -> tvm.IRModule:
    """What MetaSchedule searches: the function of static sizes, or an anchor in its place.

    Raises
    ------
    UnsupportedSpecError
        The target kind has no kernels of the spec.
    """
    check_target(function, spec, kind, function)
    if function in _ANCHORED:
        func = anchor(_identity(function, spec, kind, shape))
    else:
        func = unscheduled(function, spec, kind, shape)
    return tvm.IRModule({"main": func})


def space(
    function: str,
    spec: Spec,
    kind: str,
    shape: dict[str, int] | None = None,
) -> Callable[[Schedule], list[Schedule]]:
    """The search space of a function: samples every decision, of every design.

    The first design is applied to the schedule itself, others to copies of it. ``shape`` has the
    sizes of a workload of ``decode`` on a GPU with clusters, which short ones may take.
    """

    def apply(sch: Schedule) -> list[Schedule]:
        designs = [sch]
        if _has_both(function, spec, kind):
            designs.append(sch.copy())
            factories.apply(designs[1], function, spec, sampled(designs[1]))
        _apply_first(sch, function, spec, kind, sampled(sch), shape)
        return designs

    return apply


def _has_both(function: str, spec: Spec, kind: str) -> bool:
    """Rows that `tq_tvm.schedules.rows` can give to the lanes of a warp."""
    dim = spec.rotation.dim
    short = dim in MULTIPLIED
    return kind == "cuda" and function == "rotate" and short


def _only_a_factory(function: str, spec: Spec, kind: str) -> bool:
    made = kind == "cuda" and function not in _ANCHORED
    return made and not _has_both(function, spec, kind)


def _apply_first(
    sch: Schedule,
    function: str,
    spec: Spec,
    kind: str,
    decide: Decide,
    shape: dict[str, int] | None = None,
) -> None:
    if _only_a_factory(function, spec, kind):
        factories.apply(sch, function, spec, decide)
    elif function == "decode":
        decode.apply(sch, function, spec, kind, decide, short=decode.is_short(spec, shape))
    elif function == "prefill":
        prefill.apply(sch, function, spec, kind, decide, shape)
    else:
        _SPACES[FUNCTIONS[function]].apply(sch, function, spec, kind, decide)


def has_factory(function: str, spec: Spec, kind: str) -> bool:
    """Whether a point of the space may be a factory's parameters, which loops say nothing of."""
    made = kind == "cuda" and factories.options(function, spec) is not None
    return function in _ANCHORED or made


def default(
    function: str, spec: Spec, kind: str, shape: dict[str, int] | None = None
) -> Callable[[Schedule], None]:
    """The point of the space with the hand-picked decisions, correct on every target.

    With ``shape``, see `space`, those of a size.
    """
    if function in _SIZED:
        values = _SPACES[function].defaults(spec, kind, shape)
    elif function in _ANCHORED:
        values = _SPACES[function].defaults(spec, kind)
    elif _only_a_factory(function, spec, kind):
        values = factories.defaults(function, spec, shape)
    else:
        values = _SPACES[FUNCTIONS[function]].DEFAULTS[kind]
    return point(function, spec, kind, values, shape)


def point(
    function: str,
    spec: Spec,
    kind: str,
    values: Mapping[str, int],
    shape: dict[str, int] | None = None,
) -> Callable[[Schedule], None]:
    """The point of the space with some decisions; of what is not on offer, the next one below."""

    def apply(sch: Schedule) -> None:
        decide = sampled(sch, values)
        if "factory" in values:
            factories.apply(sch, function, spec, decide)
        else:
            _apply_first(sch, function, spec, kind, decide, shape)

    return apply


def _anchored(mod: tvm.IRModule) -> tuple[str, str, CacheSpec, dict[str, int]] | None:
    """Function, kind, spec and decisions of a scheduled anchor; None for any other function."""
    (func,) = mod.functions.values()
    identity = (func.attrs or {}).get("tq_tvm.anchor")
    if identity is None:
        return None
    function, kind, label, *_ = str(identity).split("/")
    return function, kind, CacheSpec.parse(label), _decisions(function, kind, Schedule(mod))


def candidate_launch(mod: tvm.IRModule) -> dict[str, int]:
    """Launch numbers of a `candidate`, see `tq_tvm.build.occupancy`."""
    anchored = _anchored(mod)
    if anchored is None:
        return {}
    function, kind, spec, config = anchored
    return _SPACES[function].launch(spec, kind, config)


def is_feasible(mod: tvm.IRModule) -> bool:
    """Whether `candidate` has a kernel for a scheduled `search_module`; the compiler may not."""
    anchored = _anchored(mod)
    if anchored is None:
        return True
    function, kind, spec, config = anchored
    return _SPACES[function].rejected(spec, kind, config) is None


def candidate(mod: tvm.IRModule) -> tvm.IRModule:
    """What to compile for a scheduled `search_module`: itself, or what a factory makes of it.

    Raises
    ------
    UnsupportedSpecError
        The anchor's decisions exclude each other.
    """
    anchored = _anchored(mod)
    if anchored is None:
        found = factories.made(Schedule(mod))
        if found is None:
            return mod
        return tvm.IRModule({"main": factories.make(found.function, found.spec, found.config)})
    function, kind, spec, config = anchored
    reason = _SPACES[function].rejected(spec, kind, config)
    if reason is not None:
        raise UnsupportedSpecError(f"{function}: decisions {config} must be feasible: {reason}")
    return tvm.IRModule({"main": _ANCHORED[function](spec, kind, config)})


def _row_config(trace: Trace, function: str, spec: Spec, kind: str) -> dict[str, int]:
    """Names and values of the decisions of a row kernel's trace."""
    names: list[str] = []

    def record(name: str, options: Any) -> int:
        names.append(name)
        return options[0]

    probe = Schedule(search_module(function, spec, kind, None))
    _SPACES[FUNCTIONS[function]].apply(probe, function, spec, kind, record)
    return dict(zip(names, decided(trace), strict=True))


def _decisions(function: str, kind: str, sch: Schedule) -> dict[str, int]:
    """What an anchor carries; of ``decode`` also what older records lack."""
    return decode.completed(kind, decisions(sch)) if function == "decode" else decisions(sch)


def _config(sch: Schedule, function: str, spec: Spec, kind: str) -> dict[str, int]:
    """Names and values of the decisions that a schedule has made."""
    if function in _ANCHORED:
        return _decisions(function, kind, sch)
    found = factories.made(sch)
    return _row_config(sch.trace, function, spec, kind) if found is None else found.config


def _hashable(shape: dict[str, int] | None) -> tuple[tuple[str, int], ...] | None:
    return tuple(sorted(shape.items())) if shape else None


@functools.lru_cache(maxsize=64)
def _default_config(
    function: str, spec: Spec, kind: str, sizes: tuple[tuple[str, int], ...] | None = None
) -> dict[str, int]:
    sch = Schedule(search_module(function, spec, kind, None))
    default(function, spec, kind, dict(sizes) if sizes else None)(sch)
    return _config(sch, function, spec, kind)


def instantiate(
    function: str,
    spec: Spec,
    kind: str,
    trace: Trace | None,
    shape: dict[str, int] | None = None,
    symbol: str = "main",
) -> Instance:
    """Turn decisions into a kernel: a record's trace, or the defaults where ``trace`` is None.

    With ``shape`` None the result is the dynamic function that ships. A factory's always is; the
    shape says which defaults are meant, see `space`. ``decode_featured``, which is not searched,
    has the defaults of ``decode``; see `featured` for others.
    """
    if function == "decode_featured":
        return featured(spec, _default_config("decode", spec, kind), symbol)
    if function in _ANCHORED:
        return _anchored_instance(function, spec, kind, trace, shape, symbol)
    sch = Schedule(search_module(function, spec, kind, shape))
    if trace is None:
        default(function, spec, kind, shape)(sch)
    else:
        trace.apply_to_schedule(sch, remove_postproc=True)
    config = _config(sch, function, spec, kind)
    made = factories.made(sch) is not None
    func = factories.make(function, spec, config) if made else sch.mod["main"]
    tuned = config != _default_config(function, spec, kind, _hashable(shape))
    return Instance(func.with_attr("global_symbol", symbol), config, {}, tuned)


def _anchored_instance(
    function: str,
    spec: CacheSpec,
    kind: str,
    trace: Trace | None,
    shape: dict[str, int] | None,
    symbol: str,
) -> Instance:
    default_config = _default_config(function, spec, kind, _hashable(shape))
    config = default_config
    if trace is not None:
        sch = Schedule(search_module(function, spec, kind, None))
        trace.apply_to_schedule(sch, remove_postproc=True)
        config = _decisions(function, kind, sch)
    func = _ANCHORED[function](spec, kind, config).with_attr("global_symbol", symbol)
    launch = _SPACES[function].launch(spec, kind, config)
    return Instance(func, dict(config), launch, config != default_config)


def featured(spec: CacheSpec, config: dict[str, int], symbol: str) -> Instance:
    """``decode_featured`` with the decisions of a kernel of ``decode``, but for clusters."""
    config = config | {"cluster": 0}
    func = decode_featured(spec, DecodeConfig(**config)).with_attr("global_symbol", symbol)
    launch = decode.launch(spec, "cuda", config)
    return Instance(func, config, launch, tuned=False)
