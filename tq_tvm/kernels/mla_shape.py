"""Decisions and static sizes of ``mla`` on GPUs: who works, and where what is in shared memory.

The two CTAs of a cluster, ranks 0 and 1, have half of every latent and of every rope part each.
Where the codes of a row are in F fields, such as the low and the high nibbles of its bytes, rank r
has the r-th half of the bytes, so of every field: its *columns* are those of field 0, then field 1,
and so on, `HALF` in all.
"""

from __future__ import annotations

import dataclasses

from tvm.script import tirx as T

from tq_tvm.kernels.device import SHARED_BYTES
from tq_tvm.kernels.mbarrier import BARRIER_BYTES
from tq_tvm.kernels.word_codes import code_fields
from tq_tvm.spec import LATENT_DIMS, CacheSpec, Codec

__all__ = [
    "BLOCK",
    "HALF",
    "HALF_ROPE",
    "MULTIPLIERS",
    "RANKS",
    "ROWS",
    "TILE",
    "WARPGROUP",
    "WARPS",
    "MlaConfig",
    "MlaShape",
]

RANKS = 2
"""CTAs of a cluster."""

ROWS = 64
"""Query heads of a warpgroup, rows of its products."""

TILE = 64
"""Tokens of a tile."""

WARPGROUP = 128
"""Threads that multiply together."""

WARPS = WARPGROUP // 32
"""Its warps."""

MULTIPLIERS = 2
"""Warpgroups of a CTA that multiply."""

HALF, HALF_ROPE = (dim // RANKS for dim in LATENT_DIMS)
"""Values of a latent, and of a rope part, that a CTA has."""

BLOCK = 64
"""Values of a row of a block of an operand; those of a rope part are `HALF_ROPE`."""

_REGISTERS = 65536
_MULTIPLIER_REGISTERS = {0: 200, 1: 216}
"""Of a thread that multiplies, by ``ahead``: 128 outputs, 32 scores, 16 weights, and the rest."""


@dataclasses.dataclass(frozen=True)
class MlaConfig:
    """The decisions of one kernel; ``schedules/mla.py`` says what each one trades."""

    decoders: int
    ahead: int
    tiles: int
    reach: int
    overlap: int


@dataclasses.dataclass(frozen=True)
class MlaShape:
    """Static sizes of a kernel."""

    spec: CacheSpec
    config: MlaConfig

    @property
    def codec(self) -> Codec:
        """Of latents."""
        return self.spec.cache_format.key

    @property
    def head_blocks(self) -> int:
        """Blocks of `ROWS` query heads."""
        return -(-self.spec.num_q_heads // ROWS)

    @property
    def shares_tiles(self) -> bool:
        """Whether both warpgroups have the same heads, and take tiles in turn."""
        return self.head_blocks == 1

    @property
    def pairs(self) -> int:
        """Clusters that have all heads between them."""
        return -(-self.head_blocks // MULTIPLIERS)

    @property
    def pieces(self) -> int:
        """Pieces of its heads that a part of a context leaves for the merge."""
        return MULTIPLIERS if self.shares_tiles else 1

    @property
    def query_blocks(self) -> int:
        """Blocks of heads whose queries a CTA has in shared memory."""
        return 1 if self.shares_tiles else MULTIPLIERS

    @property
    def readers(self) -> int:
        """Warps that read a tile before it may be written again."""
        return WARPS if self.shares_tiles else WARPS * MULTIPLIERS

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return MULTIPLIERS * WARPGROUP + 32 * self.config.decoders

    @property
    def multiplier_registers(self) -> int:
        """Registers of a thread that multiplies."""
        return _MULTIPLIER_REGISTERS[self.config.ahead]

    @property
    def decoder_registers(self) -> int:
        """Registers of a thread that decodes: what the launch has beside those that multiply."""
        launched = _REGISTERS // self.threads // 8 * 8 * self.threads
        rest = launched - MULTIPLIERS * WARPGROUP * self.multiplier_registers
        return rest // (32 * self.config.decoders) // 8 * 8

    @property
    def matrix_bytes(self) -> int:
        """Of one CTA's half of `ROWS` queries or, which are as many, `TILE` tokens."""
        return ROWS * 2 * (HALF + HALF_ROPE)

    @property
    def latent_dtype(self) -> str:
        """Of latents that are looked up, their queries and their weights: the one of more bits."""
        return "float16" if self.codec.family == "lloyd_max" else self.spec.dtype

    @property
    def fields(self) -> int:
        """Fields of the codes of a latent, whose coordinates are neighbours."""
        return code_fields(self.codec) if self.codec.packed else 1

    @property
    def code_bytes(self) -> int:
        """Of the codes of a row that a CTA reads: of a second plane all, of others half."""
        if not self.codec.packed:
            return 2 * HALF
        first, *others = (bits * 2 * HALF // 8 for bits in self.codec.plane_bits)
        return first // RANKS + sum(others)

    @property
    def staged_bytes(self) -> int:
        """Of a tile's rows as they are in the cache, a CTA's part, without scales."""
        return TILE * (self.code_bytes + 2 * HALF_ROPE)

    @property
    def tiles_begin(self) -> int:
        """Byte of shared memory where decoded tiles begin."""
        return self.query_blocks * self.matrix_bytes

    @property
    def sums_begin(self) -> int:
        """Where the peer's halves of scores begin, one of each warpgroup."""
        return self.tiles_begin + self.config.tiles * self.matrix_bytes

    @property
    def sums_bytes(self) -> int:
        """Of a warpgroup's scores of a tile."""
        return ROWS * TILE * 4

    @property
    def staged_begin(self) -> int:
        """Where rows as they are in the cache begin."""
        return self.sums_begin + MULTIPLIERS * self.sums_bytes

    @property
    def barriers_begin(self) -> int:
        """Where barriers begin."""
        return self.staged_begin + self.staged_bytes

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return self.barriers_begin + BARRIER_BYTES * 2 * (self.config.tiles + MULTIPLIERS)

    def column_of(self, dim: int, fields: int, coordinate):
        """Rank and column of a coordinate of a row of ``dim`` values, in so many fields."""
        size = dim // fields
        half = size // RANKS
        field, inside = T.truncdiv(coordinate, size), T.truncmod(coordinate, size)
        return T.truncdiv(inside, half), field * half + T.truncmod(inside, half)

    @property
    def unfit(self) -> str | None:
        """Why there can be no such kernel, or None."""
        if self.shared_bytes > SHARED_BYTES:
            return f"{self.shared_bytes} bytes of shared memory exceed {SHARED_BYTES}"
        if self.config.ahead and self.config.decoders > 4:
            # ptxas has products wait for one another where a launch's threads begin with 128.
            return f"{self.threads} threads have too few registers for products ahead"
        if self.config.ahead and self.shares_tiles and self.config.tiles <= MULTIPLIERS:
            return "warpgroups that take turns hold a tile each and wait for another"
        return None
