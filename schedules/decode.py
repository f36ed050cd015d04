"""The search space of ``decode``: parameters of the kernel's factory, sampled on an anchor.

================  ==================================================================
decision (CUDA)   what it trades
================  ==================================================================
warps             tokens of a split walk through a CTA in parallel, against the
                  merge at its end and the shared memory that it takes
tile              tokens a warp handles at a time: fewer page look-ups, maxima and
                  votes a token, against registers
depth             tiles fetched ahead: latency hidden, against registers
registers         the most a thread may have: more CTAs on an SM, against spills
                  and loads in flight
query_in_shared   query fragments in shared memory instead of registers
multiply_shifts   right shifts by multiplication: the integer pipe is the busiest,
                  the multiplier is idle, but takes longer
================  ==================================================================

================  ==================================================================
decision (CPU)    what it trades
================  ==================================================================
tile              tokens between two updates of the softmax state: fewer rescales,
                  against cache footprint
vector            SIMD width of decoding and of the products
unroll            the loop over the group's heads unrolled: code size against reuse
                  of a decoded row in registers
================  ==================================================================
"""

from __future__ import annotations

from tq_tvm.schedules.decisions import Decide
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tq_tvm.kernels.decode_cuda import DecodeConfig, shared_bytes
from tq_tvm.spec import CacheSpec

__all__ = ["DEFAULTS", "OPTIONS", "anchor", "apply", "launch", "rejected"]

OPTIONS = {
    "cuda": {
        "warps": [2, 4, 8],
        "tile": [32, 64],
        "depth": [0, 1],
        "registers": [128, 168, 256],
        "query_in_shared": [0, 1],
        "multiply_shifts": [0, 1],
    },
    "llvm": {"tile": [16, 32, 64], "vector": [8, 16, 32], "unroll": [0, 1]},
}

DEFAULTS = {
    "cuda": {
        "warps": 4,
        "tile": 32,
        "depth": 0,
        "registers": 256,
        "query_in_shared": 1,
        "multiply_shifts": 0,
    },
    "llvm": {"tile": 32, "vector": 16, "unroll": 0},
}

_BLOCK = "decisions"
_PREFIX = "tq_"
_STATIC_SHARED = 48 * 1024


def anchor(identity: str) -> PrimFunc:
    """A function that stands for one workload; its block carries the sampled decisions.

    ``identity`` (function, kind, spec and sizes) makes anchors of different workloads different.
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


def apply(sch: Schedule, function: str, spec: CacheSpec, kind: str, decide: Decide) -> None:
    """Write every decision onto the anchor's block."""
    block = sch.get_sblock(_BLOCK)
    for name, options in OPTIONS[kind].items():
        sch.annotate(block, _PREFIX + name, decide(name, options))


def decisions(sch: Schedule) -> dict[str, int]:
    """Read the decisions back."""
    annotations = sch.get(sch.get_sblock(_BLOCK)).annotations
    return {
        k.removeprefix(_PREFIX): int(v) for k, v in annotations.items() if k.startswith(_PREFIX)
    }


def rejected(spec: CacheSpec, kind: str, config: dict[str, int]) -> str | None:
    """Why a point of the space is not worth compiling, or None."""
    if kind != "cuda":
        return None
    used = shared_bytes(DecodeConfig(**config), spec.head_dim)
    if used > _STATIC_SHARED:
        return f"{used} bytes of shared memory exceed {_STATIC_SHARED}"
    return None


def launch(kind: str, config: dict[str, int]) -> dict[str, int]:
    """What the caller needs to choose a number of splits, see `tq_tvm.splits`.

    On a GPU the compiler knows how many CTAs are resident; here is how large they are.
    """
    if kind != "cuda":
        return {"ctas_per_sm": 1, "split_tokens": 64}
    return {"threads": 32 * config["warps"], "split_tokens": 16}
