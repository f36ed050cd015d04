"""The search space of ``attend``: parameters of the kernel's factory, sampled on an anchor.

================  ==================================================================
decision (CPU)    what it trades
================  ==================================================================
tile              tokens between two updates of the softmax state: fewer rescales,
                  against cache footprint
vector            SIMD width of decoding and of the products
block             query tokens of a task, as far as their heads are at most 128: rows of
                  K and V decoded less often, against parallel work, tokens that only some
                  queries see, and cache footprint
lookup            as of ``decode``
================  ==================================================================

================  ==================================================================
decision (CUDA)   what it trades
================  ==================================================================
warps             tiles of a CTA in parallel, each with shared memory of its own, against
                  the merge at the end of each piece; two, which share one, where V has 512 values,
                  or three, where it has 576
row_tiles         pairs of a query token and a head, by 16, of a block: tokens decoded less
                  often, against registers, and rows that a call does not have
tile              tokens a warp decodes and attends to at a time: fewer votes and bounds,
                  against shared memory
lanes             lanes that make a row of a Lloyd-Max codec in shared memory, where K or V has
                  one: registers, against tables of levels made anew; codes that become operands in
                  registers have four
registers         the most a thread may have: more CTAs on an SM, against spills
reach             tiles of a warp that a group of CTAs gets at least: fewer pieces to merge,
                  against parallel work
overlap           the second launch begins before the first is done
================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tq_tvm.schedules import decode
from tq_tvm.schedules.anchors import annotate, end_points, hash_points
from tq_tvm.schedules.decisions import Decide
from tvm.s_tir import Schedule

from tq_tvm.kernels.attend import attend
from tq_tvm.kernels.attend_cpu import AttendCpuConfig, block_tokens
from tq_tvm.kernels.attend_rows import RowShape
from tq_tvm.kernels.attend_shape import AttendConfig, AttendShape
from tq_tvm.kernels.attend_tiles import TileShape
from tq_tvm.kernels.device import SHARED_BYTES
from tq_tvm.kernels.direct_cuda import DIRECT_LANES
from tq_tvm.kernels.fragment_shape import FragmentShape
from tq_tvm.spec import CacheSpec

__all__ = [
    "DEFAULTS",
    "OPTIONS",
    "apply",
    "defaults",
    "digest",
    "fitted",
    "lane_options",
    "launch",
    "limit_of",
    "options",
    "rejected",
    "unfit",
    "unscaled",
]

_SHORTEST = 16
"""Tokens of a tile, at least."""

_STATIC_SHARED = 2048
"""Most static shared memory of these kernels."""

_OUTPUT = 2 * 256
"""Row tiles times columns: half as many registers of a lane are its output."""

OPTIONS = {
    "cuda": {
        "warps": [2, 4, 8],
        "row_tiles": [1, 2],
        "tile": [16, 32, 64],
        "lanes": [2, 4, 8],
        "registers": [128, 168, 255],
        "reach": [1, 2, 4],
        "overlap": [0, 1],
    },
    "llvm": {"tile": [16, 32, 64], "vector": [8, 16, 32], "block": [4, 8, 16], "lookup": [0, 1]},
}

_LONG_KEYS = [1, 2, 4]
"""Warps of a CTA where keys have more than 256 values: tiles of eight never fit shared memory, nor
do, on GPUs with 99 KiB of it, of two in every format."""

_FEW = 1 << 17
"""Tokens of a batch up to which tiles are shorter: 17.1 us of 18.4 at 1 x 8192 of 32/8 heads, 65 of
69 at 64 x 1024, but 264 of 252 at 64 x 8192 (4 query tokens, k4v2, H100)."""

DEFAULTS = {
    "cuda": {
        "warps": 8,
        "row_tiles": 1,
        "tile": 64,
        "lanes": 4,
        "registers": 255,
        "reach": 1,
        "overlap": 1,
    },
    "llvm": {"tile": 32, "vector": 16, "block": 8, "lookup": 0},
}


def defaults(spec: CacheSpec, kind: str, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """The hand-picked decisions of a spec: `DEFAULTS`, but for rows and tiles of some on GPUs.

    With ``sizes`` those of a batch, whose sequences may have more than 16 rows of queries, on a GPU
    whose CTAs have ``shared_bytes``.

    A CTA of eight warps has an SM to itself, and half as many pieces to merge as two of four have:
    43 us of 70 at 16 x 4096 of 32/8 heads, 69 of 90 at 64 x 1024, 70 of 93 at 1 x 131072 and 250 of
    257 at 64 x 8192 (4 query tokens, k4v2, H100); of rows of 256 values 154 of 198 (64 x 8192, 16/2
    heads, 2 query tokens). Where rows are made in shared memory they take longer.

    Keys of direct codecs: of 8 bits 32 tokens at a time, of which four warps take as long as eight,
    but less of short sequences (int8, one query token, H200: 262 us of 265 at 64 x 8192, 92 of 112
    at 256 x 512, but 45 of 41 at 16 x 4096); of 4 bits 64 at a time (167 of 187 at 64 x 8192), but
    for few tokens (42 of 51 at 64 x 1024, 31 of 43 at 16 x 4096).
    """
    values = dict(DEFAULTS[kind])
    if kind != "cuda":
        return values
    queries = 1 if sizes is None else -(-sizes["tokens"] // sizes["batch"])
    widest = max(spec.head_dim, spec.value_dim)
    tall = queries * spec.group_size > 16 and widest <= 128
    key = spec.cache_format.key
    if not FragmentShape.serves(spec):
        values.update(warps=4, lanes=2, tile=32, registers=255 if tall else 168)
    elif tall:
        # 64 x 8192 of 32/8 heads, 8 tokens, H100: 370 us in tq42; tables of k4v2's rows take
        # registers, so that 32 tokens at a time spill: 486 us, 16 at a time 424.
        short_tiles = spec.cache_format.key.residual_sign
        values.update(tile=16 if short_tiles else 32)
        if short_tiles and sizes is not None and not _is_short(spec, sizes):
            # 387 us of 405 at 64 x 8192 (k4v2, 8 tokens, H200).
            values.update(warps=4)
    elif key.family != "lloyd_max":
        few = sizes is not None and 2 * decode.batch_tokens(spec, sizes) <= _FEW
        values.update(warps=8 if few else 4, tile=64 if key.bits == 4 and not few else 32)
    elif sizes is not None and _is_short(spec, sizes):
        values.update(tile=32)
    if tall:
        values.update(row_tiles=2)
    elif widest > 128:
        # 32 tokens of 256 values would not fit a lane's registers, nor, in shared memory, two CTAs.
        values.update(tile=16, registers=255)
    parts = AttendShape.parts_of(spec)
    if parts > 1:
        # Its warps make the 16 rows of a tile together.
        values.update(warps=parts, lanes=4 if parts == 2 else 8)
    if not FragmentShape.serves(spec) and not _looks_up(spec):
        # Rows that are not packed much take shared memory, which so many warps wait for.
        values.update(tile=16, lanes=DIRECT_LANES)
    return fitted(values, parts, lambda tried: rejected(spec, kind, tried, limit_of(sizes)))


def _is_short(spec: CacheSpec, sizes: Mapping[str, int]) -> bool:
    return decode.batch_tokens(spec, sizes) <= _FEW


def limit_of(sizes: Mapping[str, int] | None) -> int:
    """Shared memory of a CTA: that of a GPU which sizes are given of, or Hopper's."""
    return SHARED_BYTES if sizes is None else sizes.get("shared_bytes", SHARED_BYTES)


def fitted(
    values: dict[str, int], least: int, reason: Callable[[dict[str, int]], str | None]
) -> dict[str, int]:
    """Decisions that there is no reason against: fewer warps, at least some, then shorter tiles."""
    tile = values["tile"]
    while tile >= _SHORTEST:
        warps = values["warps"]
        while warps >= least:
            tried = values | {"warps": warps, "tile": tile}
            if reason(tried) is None:
                return tried
            warps //= 2
        tile //= 2
    return values


def _looks_up(spec: CacheSpec) -> bool:
    fmt = spec.cache_format
    return "lloyd_max" in (fmt.key.family, fmt.value.family)


def lane_options(spec: CacheSpec, values: list[int]) -> list[int]:
    """Lanes of a row: direct codecs have a number of their own."""
    return values if _looks_up(spec) else [DIRECT_LANES]


def options(spec: CacheSpec, kind: str) -> dict[str, list[int]]:
    """What each decision may be for a spec."""
    if kind == "cuda":
        if FragmentShape.serves(spec):
            return {**OPTIONS[kind], "lanes": [4]}
        lanes = lane_options(spec, OPTIONS[kind]["lanes"])
        parts = AttendShape.parts_of(spec)
        warps = _LONG_KEYS if spec.head_dim > 256 else OPTIONS[kind]["warps"]
        warps = warps if parts == 1 else [parts]
        return {**OPTIONS[kind], "warps": warps, "lanes": lanes}
    shared = decode.options(spec, kind)
    return {
        name: shared[name] if name == "lookup" else values for name, values in OPTIONS[kind].items()
    }


def digest(spec: CacheSpec, kind: str) -> str:
    """What the kernels of today are, see `anchors.hash_points`."""
    return hash_points(attend, (spec, kind), end_points(options(spec, kind)))


def apply(sch: Schedule, function: str, spec: CacheSpec, kind: str, decide: Decide) -> None:
    """Write every decision onto the anchor's block."""
    annotate(sch, options(spec, kind), decide)


def rejected(
    spec: CacheSpec, kind: str, config: dict[str, int], limit: int = SHARED_BYTES
) -> str | None:
    """Why a point of the space is not worth compiling, or None; CTAs have ``limit`` bytes."""
    if kind != "cuda":
        return None
    shape = AttendShape(spec, AttendConfig(**config))
    if not shape.in_registers and (reason := unscaled(shape.tiles)):
        return reason
    return unfit(shape.tiles, 4 * shape.memory_words, shape.rows, limit)


def launch(spec: CacheSpec, kind: str, config: dict[str, int]) -> dict[str, int]:
    """What the caller needs to choose a number of parts, see `tq_tvm.splits`."""
    if kind == "cuda":
        shape = AttendShape(spec, AttendConfig(**config))
        return {
            "threads": shape.threads,
            "shared_bytes": 4 * shape.memory_words,
            "units": spec.num_kv_heads,
            "rows": shape.rows.rows,
            "group_tokens": config["tile"] * config["warps"] * config["reach"],
        }
    tokens = block_tokens(spec, AttendCpuConfig(**config))
    return {"ctas_per_sm": 1, "split_tokens": 64, "block_tokens": tokens}


def unscaled(tiles: TileShape) -> str | None:
    """Why not every token of a tile has a thread that reads its scales, or None."""
    if tiles.tile > tiles.threads:
        return f"{tiles.tile} tokens of a tile exceed {tiles.threads} threads"
    return None


def unfit(tiles: TileShape, shared_bytes: int, rows: RowShape, limit: int) -> str | None:
    """Why a tensor-core kernel over decoded tiles cannot be, or None."""
    if shared_bytes + _STATIC_SHARED > limit:
        return f"{shared_bytes} bytes of shared memory exceed {limit - _STATIC_SHARED}"
    if rows.row_tiles * rows.columns >= _OUTPUT:
        return f"{rows.rows} rows of {rows.columns} outputs exceed a lane's registers"
    if tiles.tile * tiles.lanes < tiles.threads:
        return f"{tiles.threads} threads exceed {tiles.lanes} lanes for each of {tiles.tile} rows"
    return None
