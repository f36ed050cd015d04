"""The numbers that a ``decode_cuda`` kernel is made of: its decisions, and what follows."""

from __future__ import annotations

import dataclasses
import functools

from tq_tvm.kernels.chunk_rows import CHUNK_WORDS, padded
from tq_tvm.kernels.decode_planes import (
    ValuePlanes,
    four_bit_levels,
    three_bit_planes,
    two_bit_planes,
)
from tq_tvm.kernels.decode_tables import KeyTables, key_tables
from tq_tvm.spec import CacheSpec

__all__ = ["DecodeConfig", "Shape"]

REGISTERS = 65536
"""Registers of an SM."""

_WARP_VALUES = 256
"""Most values of a row of K, and of V, that a warp has registers for."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The decisions of one kernel; ``schedules/decode.py`` says what each one trades."""

    warps: int
    abreast: int
    tile: int
    registers: int
    query_in_shared: int
    headroom: int
    reach: int
    overlap: int
    promoted: int
    cluster: int = 0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes, for a lane unless said otherwise."""

    spec: CacheSpec
    config: DecodeConfig

    @property
    def abreast(self) -> int:
        """KV heads, or parts of their query heads, of a CTA: as decided, or what divides."""
        most = self.config.abreast
        return max(n for n in range(1, most + 1) if self.parts_of_heads % n == 0)

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.part_warps * self.abreast

    @property
    def slices(self) -> int:
        """Warps that share rows: each has a slice of K's and of V's (`decode_slices`)."""
        return -(-self.spec.head_dim // _WARP_VALUES)

    @property
    def slice_dim(self) -> int:
        """Values of a row that are a warp's."""
        return self.spec.head_dim // self.slices

    @property
    def part_warps(self) -> int:
        """Warps that have the same query heads."""
        return self.config.warps * self.slices

    @property
    def columns(self) -> int:
        """Columns of ``warps`` warps in a CTA: of every part of query heads and slice of rows."""
        return self.abreast * self.slices

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that hold an SM to the decided number of registers."""
        return max(1, REGISTERS // (self.threads * self.config.registers))

    @property
    def heads(self) -> int:
        """Query heads that warps work for together.

        4, whose high and low bytes are the 8 columns of the N side, or 8. Rows of 256 values leave
        no registers for the sums of 8.
        """
        return 4 if self.spec.group_size <= 4 or self.spec.head_dim > 128 else 8

    @property
    def packed(self) -> bool:
        """Both bytes of a query, and of a weight, are columns of one product."""
        return self.heads == 4

    @property
    def parts(self) -> int:
        """Products that the two bytes of a query or a weight take."""
        return 1 if self.packed else 2

    @property
    def head_tiles(self) -> int:
        """Parts that the query heads of a KV head are in."""
        return -(-self.spec.group_size // self.heads)

    @property
    def parts_of_heads(self) -> int:
        """KV heads, times the parts of each."""
        return self.spec.num_kv_heads * self.head_tiles

    @property
    def units(self) -> int:
        """CTAs that share the tokens of a group."""
        return self.parts_of_heads // self.abreast

    @property
    def octets(self) -> int:
        """Octets of tokens of a tile; a lane holds one row of K of each."""
        return self.config.tile // 8

    @property
    def score_tiles(self) -> int:
        """Tiles of 16 tokens, the M side of a score's product."""
        return self.config.tile // 16

    @property
    def own_tokens(self) -> int:
        """Tokens of a tile whose weights a lane works out, for two heads."""
        return self.score_tiles if self.packed else self.octets

    @property
    def own_apart(self) -> int:
        """Tokens from one of a lane's own to the next."""
        return 16 if self.packed else 8

    @property
    def key_words(self) -> int:
        """Words of a slice of K, eight codes each; where they are shorter, once they are apart."""
        return self.slice_dim // 32

    @property
    def key_planes(self) -> tuple[int, ...]:
        """Bits of a code of K in each plane of a row."""
        return self.spec.cache_format.key.plane_bits

    @property
    def key_plane_words(self) -> int:
        """Words of a lane in each plane of a slice of K: two of `key_words` are in one of pairs."""
        return self.key_words // (4 // self.key_planes[0])

    @property
    def value_bytes(self) -> int:
        """Bytes of a row of V that a lane has; of three bits, those of pairs of bits."""
        return self.slice_dim // (8 * self.value.fields)

    @property
    def value_chunks(self) -> int:
        """Copies of 16 bytes that a warp's slice of a row of V takes, or of its pairs of bits."""
        return self.value_bytes // 2

    @property
    def third_chunks(self) -> int:
        """Copies of 16 bytes that the third bits of a row of V take; all slices need all."""
        return self.spec.head_dim // 128 if self.spec.cache_format.value.bits == 3 else 0

    @property
    def sharing_lanes(self) -> int:
        """Lanes that share a row of V: as many as it has chunks, or the next power of two."""
        return padded(self.value_chunks + self.third_chunks)

    @property
    def value_row(self) -> int:
        """Words of a row of V in shared memory, a place for every lane that copies it."""
        return CHUNK_WORDS * self.sharing_lanes

    @property
    def value_meta_at(self) -> int:
        """Where V's metas begin in a tile of shared memory, in words."""
        return self.value_row * self.config.tile

    @property
    def value_words(self) -> int:
        """Words of a tile of V in shared memory."""
        return self.value_meta_at + self.config.tile

    @property
    def promoted(self) -> str:
        """Qualifier of reads that says what L2 fetches with them."""
        return f".L2::{self.config.promoted}B" if self.config.promoted else ""

    @property
    def quads(self) -> int:
        """Accumulator tiles of the output: one for a byte of V and two of its fields."""
        return self.value.fields // 2 * self.value_bytes

    @property
    def row_values(self) -> int:
        """Values of a row that a warp shares."""
        return self.spec.head_dim // 32

    @property
    def pages(self) -> int:
        """Pages that a tile touches."""
        return max(1, self.config.tile // self.spec.page_size)

    @property
    def lengths_at_once(self) -> int:
        """Sequences whose lengths a lane asks for together."""
        return 4

    @property
    def least_tiles(self) -> int:
        """Tiles of a group, at least."""
        return self.config.warps * self.config.reach

    @functools.cached_property
    def key(self) -> KeyTables:
        """K's centroids as bytes."""
        return key_tables(self.spec.cache_format.key.centroids, self.spec.dtype)

    @property
    def residual(self) -> bool:
        """Codes of K have a sign of the residual, and rows a scale of it."""
        return self.spec.cache_format.key.residual_sign

    @property
    def wide(self) -> bool:
        """K's centroids have a second byte."""
        return len(self.key.tables) == 2

    @property
    def code_sums(self) -> int:
        """Sums over codes that a score is made of, in steps of 256."""
        return 2 if self.wide or not self.packed else 1

    @property
    def centroid(self) -> float:
        """What a unit of the summed codes is worth, in units of the query's code."""
        # Low bytes times low bytes, the smallest product, are left out where they would cost one:
        # the sums are then a step of 256 up.
        step = 256.0 if self.wide and not self.packed else 1.0
        return self.key.unit * step * self.spec.head_dim**-0.5

    @functools.cached_property
    def value(self) -> ValuePlanes:
        """V's levels, affine in bits or looked up."""
        codec = self.spec.cache_format.value
        make = {2: two_bit_planes, 3: three_bit_planes, 4: four_bit_levels}[codec.bits]
        return make(codec.centroids)
