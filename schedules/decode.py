"""The search space of ``decode``: parameters of the kernel's factory, sampled on an anchor.

================  ==================================================================
decision (CUDA)   what it trades
================  ==================================================================
warps             tokens of a group of CTAs in parallel, against the merge at the end of each
                  piece and the shared memory that it takes
abreast           KV heads of a CTA: sectors that they share are read once, against more pieces to
                  merge
tile              tokens a warp handles at a time: fewer look-ups, maxima and votes a token,
                  against registers
registers         the most a thread may have: more CTAs on an SM, against spills and loads
                  in flight
query_in_shared   query fragments in shared memory instead of registers
headroom          bits of a weight that a rising maximum may use up: fewer moves of the bound,
                  against precision
reach             tiles of a warp that a group of CTAs gets at least: fewer pieces to merge,
                  against parallel work
overlap           the second launch begins before the first is done: less waiting, against
                  CTAs that hold an SM while they wait
promoted          bytes around a read that L2 fetches with it: whole lines of memory for the
                  heads that follow, against lines that are dropped before
cluster           0, or the most CTAs of a cluster that merges one sequence in shared memory
                  (`tq_tvm.kernels.decode_cluster`), in one launch: less latency, against shares
                  that are equal whatever the lengths; only for short contexts
================  ==================================================================

================  ==================================================================
decision (CPU)    what it trades
================  ==================================================================
tile              tokens between two updates of the softmax state: fewer rescales,
                  against cache footprint
vector            SIMD width of decoding and of the products
unroll            the loop over the group's heads unrolled: code size against reuse
                  of a decoded row in registers
lookup            codes of k4v2 become values by AVX2's permutation of a register, eight
                  at a time, in place of selections: for CPUs that have it
================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

from tq_tvm.schedules.anchors import annotate, end_points, hash_points
from tq_tvm.schedules.decisions import Decide
from tvm.s_tir import Schedule

from tq_tvm.kernels.decode import decode
from tq_tvm.kernels.decode_cuda import decode_shared_bytes
from tq_tvm.kernels.decode_shape import DecodeConfig, Shape
from tq_tvm.spec import CacheSpec

__all__ = [
    "DEFAULTS",
    "OPTIONS",
    "SHORT",
    "apply",
    "batch_tokens",
    "completed",
    "defaults",
    "digest",
    "is_short",
    "launch",
    "options",
    "rejected",
]

OPTIONS = {
    "cuda": {
        "warps": [1, 2, 4, 8],
        "abreast": [1, 2, 4],
        "tile": [32, 64],
        "registers": [128, 168, 256],
        "query_in_shared": [0, 1],
        "headroom": [1, 2],
        "reach": [1, 2, 4],
        "overlap": [0, 1],
        "promoted": [0, 128, 256],
        "cluster": [0, 8, 16],
    },
    "llvm": {"tile": [16, 32, 64], "vector": [8, 16, 32], "unroll": [0, 1], "lookup": [0, 1]},
}

DEFAULTS = {
    "cuda": {
        "warps": 4,
        "abreast": 1,
        "tile": 64,
        "registers": 256,
        "query_in_shared": 1,
        "headroom": 1,
        "reach": 1,
        "overlap": 1,
        "promoted": 128,
        "cluster": 0,
    },
    "llvm": {"tile": 32, "vector": 16, "unroll": 0, "lookup": 0},
}

SHORT = (
    (1 << 11, {"warps": 4, "tile": 32, "registers": 128, "cluster": 16}),
    (1 << 15, {"warps": 4, "tile": 64, "registers": 256, "cluster": 16}),
)
"""Defaults of a batch up to so many tokens on GPUs with clusters, where they are others."""

_NARROW_KEYS = {"abreast": 2}
_WIDE_VALUES = {"abreast": 2, "tile": 32, "reach": 2, "promoted": 256}
_TWO_WARPS = {"warps": 2, "query_in_shared": 0, "headroom": 2, "promoted": 256}
_SMALL_CTAS = _WIDE_VALUES | _TWO_WARPS

_MANY = 1 << 19
"""Tokens of a batch from which on CTAs of two warps take less, too, with values of 2 bits."""

_BRIEF = 1 << 10
"""Tokens of a sequence up to which CTAs have less to do than to begin and to end."""

_LONG_ROWS = {
    "tile": 32,
    "registers": 256,
    "query_in_shared": 0,
    "headroom": 2,
    "reach": 4,
    "promoted": 256,
}

_YOUNGER = {"cluster": 0}
"""Decisions that older records lack, and what these had."""

_STATIC_SHARED = 48 * 1024
_LEAST_SHARED = 99 * 1024
"""Shared memory of a CTA of any GPU here that has no clusters: of an L4, or a GeForce card."""

_THREADS = 512


def is_short(spec: CacheSpec, sizes: Mapping[str, int] | None) -> bool:
    """Whether a workload of these sizes may take clusters; without sizes it may not."""
    return sizes is not None and batch_tokens(spec, sizes) <= SHORT[-1][0]


def batch_tokens(spec: CacheSpec, sizes: Mapping[str, int]) -> int:
    """Most tokens of a batch of these sizes."""
    return sizes["batch"] * sizes["table_width"] * spec.page_size


def defaults(spec: CacheSpec, kind: str, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """The hand-picked decisions of a spec: `DEFAULTS`, but for some codecs on GPUs.

    Rows of keys of 2 bits are one sector each, which two heads of a CTA fetch as lines: 143 us of
    195 at 64 x 8192 of 32/8 heads on an H100; rows of 48 and 64 bytes take 0 to 4 % longer in
    pairs. But with values of 4 bits, of which a token takes most, pairs and short tiles take less:
    262 of 283 with keys of 4 bits, 234 of 239 with those of 3, 224 of 247 with those of 2. These
    are times from an L2 full of written lines, which adds some 10 us; others are from a clean one.

    CTAs of two warps, which the search found for k4v2 at 256 x 512, are faster where arithmetic
    bounds most: head_dim 64 at every size (110 us of 140 at 64 x 8192, 24 of 26 at 64 x 1024, 46 of
    53 at 256 x 512), values of 3 bits (tq33 195 of 209 at 64 x 8192, tq43 215 of 231, with qjl4's
    keys 213 of 238; on an H200, clean, 31 of 38, 35 of 38 and 31 of 37 at 64 x 1024, and with keys
    of mse2 160 of 171 at 64 x 8192), those of 4 bits up to 2^17 tokens (43 of 52 and 99 of 111; 255
    of 252 at 64 x 8192). So they are for many sequences of up to `_BRIEF` tokens, of which more are
    resident: at 64 x 1024, 128 x 1024 and 256 x 512 on an H200 k4v2 takes 26 us of 29, 43 of 54 and
    51 of 65, tq22 24 of 28, 40 of 54 and 48 of 67, tq42 28 of 32, 49 of 60 and 56 of 70. Of longer
    ones they take as long or longer (32 x 2048: 27 of 25), but for batches of `_MANY` tokens: k4v2
    126 of 128 at 64 x 8192 and 124 of 124 at 16 x 32768, 167 of 178 at 128 x 4096 of 64/8 heads (51
    of 35 at 64 x 1024 of these), tq22 106 of 110 and 104 of 104.

    With ``sizes``, which stand for a GPU that has clusters, those of `SHORT` where they are short.
    Rows of 512 values leave room for few warps' sums; their decisions took 711 us of 848 with
    tiles of 64 tokens and queries in shared memory in a search (64 x 8192, 32/8 heads, H100).
    """
    values = dict(DEFAULTS[kind])
    if kind != "cuda":
        return values
    # A batch of no known size is a large one.
    tokens = 1 << 30 if sizes is None else batch_tokens(spec, sizes)
    short = is_short(spec, sizes)
    if short:
        values |= next(other for most, other in SHORT if tokens <= most)
    if Shape(spec, DecodeConfig(**values)).slices > 1:
        values |= _LONG_ROWS
    while values["warps"] > 1 and rejected(spec, kind, values) is not None:
        values["warps"] //= 2
    if short:
        return values
    fmt = spec.cache_format
    bits, dim, narrow = fmt.value.bits, spec.head_dim, fmt.key.bits == 2
    brief = dim == 128 and sizes is not None and tokens <= _BRIEF * sizes["batch"]
    brief = brief and (bits == 2 or (bits == 3 and narrow)) and spec.group_size <= 4
    many = dim == 128 and sizes is not None and tokens >= _MANY and bits == 2
    small = (
        (bits == 2 and dim == 64)
        or (bits == 3 and dim == 128 and not brief)
        or (bits == 4 and dim == 128 and tokens <= 1 << 17)
    )
    for wanted, others in (
        (narrow, _NARROW_KEYS),
        (bits == 4, _WIDE_VALUES),
        (brief or many, _TWO_WARPS),
        (small and spec.group_size <= 4, _SMALL_CTAS),
    ):
        # Two heads of more than 4 queries, or of 256 values, exceed shared memory.
        if wanted and rejected(spec, kind, values | others) is None:
            values |= others
    if sizes is None and sum(decode_shared_bytes(spec, DecodeConfig(**values))) > _LEAST_SHARED:
        values["tile"] = 32
    return values


def options(spec: CacheSpec, kind: str, *, short: bool = False) -> dict[str, list[int]]:
    """What each decision may be for a spec; clusters are for `is_short` workloads alone."""
    fmt = spec.cache_format
    looked_up = (fmt.key.name, fmt.value.name) == ("qjl4", "mse2") and not spec.window
    whole = spec.head_dim % 32 == 0 and spec.value_dim % 32 == 0
    left_out = set()
    if not (looked_up and whole):
        left_out.add("lookup")
    if not short:
        left_out.add("cluster")
    offered = {name: [0] if name in left_out else values for name, values in OPTIONS[kind].items()}
    # What does not fit, whatever the rest is, would waste trials: most of them with rows of 512.
    least = {name: values[0] for name, values in offered.items()}
    return {
        name: [value for value in values if rejected(spec, kind, least | {name: value}) is None]
        for name, values in offered.items()
    }


def digest(spec: CacheSpec, kind: str, *, short: bool = False) -> str:
    """What the kernels of today are, see `anchors.hash_points`.

    Where clusters are offered, with and without them.
    """
    offered = options(spec, kind, short=short)
    clusters = offered.pop("cluster", [0])
    points = tuple(
        (*point, *((("cluster", cluster),) if cluster else ()))
        for cluster in sorted({clusters[0], clusters[-1]})
        for point in end_points(offered)
    )
    return hash_points(decode, (spec, kind), points)


def apply(
    sch: Schedule, function: str, spec: CacheSpec, kind: str, decide: Decide, *, short: bool = False
) -> None:
    """Write every decision onto the anchor's block; see `options`."""
    annotate(sch, options(spec, kind, short=short), decide)


def completed(kind: str, found: dict[str, int]) -> dict[str, int]:
    """Decisions of a record, with those that it is too old to have."""
    return found | {
        name: value
        for name, value in _YOUNGER.items()
        if name in OPTIONS[kind] and name not in found
    }


def rejected(spec: CacheSpec, kind: str, config: dict[str, int]) -> str | None:
    """Why a point of the space is not worth compiling, or None."""
    if kind != "cuda":
        return None
    threads = Shape(spec, DecodeConfig(**config)).threads
    if threads > _THREADS:
        return f"{threads} threads of a CTA exceed {_THREADS}"
    static, _ = decode_shared_bytes(spec, DecodeConfig(**config))
    if static > _STATIC_SHARED:
        return f"{static} bytes of static shared memory exceed {_STATIC_SHARED}"
    return None


def launch(spec: CacheSpec, kind: str, config: dict[str, int]) -> dict[str, int]:
    """What the caller needs to choose a number of parts, see `tq_tvm.splits`.

    On a GPU the compiler knows how many CTAs are resident; here is how large they are.
    """
    if kind != "cuda":
        return {"ctas_per_sm": 1, "split_tokens": 64}
    decided = DecodeConfig(**config)
    shape = Shape(spec, decided)
    at_once = decided.tile * decided.warps
    numbers = {
        "threads": shape.threads,
        "shared_bytes": decode_shared_bytes(spec, decided)[1],
        "units": shape.units,
    }
    if decided.cluster:
        return {**numbers, "cluster": decided.cluster, "cta_tokens": at_once}
    return {**numbers, "group_tokens": at_once * decided.reach}
