"""Static sizes of ``attend`` on GPUs where codes become operands in registers; `attend_fragments`.

Also the order that K's codes have in the lanes of a warp, which queries share, and V's in outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from tvm.script import tirx as T

from tq_tvm.kernels.chunk_rows import CHUNK_WORDS, padded
from tq_tvm.kernels.decode_tables import KeyTables, key_tables
from tq_tvm.kernels.lane_rows import multiplies
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["CODE_UNIT", "LINE_WORDS", "OPERAND_WORDS", "FragmentShape"]

_LANES = 4
"""Lanes that share a row of K."""

OPERAND_WORDS = 128
"""Words of the left operand of a product, of 16 rows of queries."""

LINE_WORDS = 32
"""Words of shared memory that are read or written at a time."""

CODE_UNIT = 2.0**-24
"""What a byte with a zero above it is worth as a float16."""


def _lines(words: int) -> int:
    """Up to a whole line of banks, with which tiles have to begin."""
    return -(-words // LINE_WORDS) * LINE_WORDS


@dataclasses.dataclass(frozen=True)
class FragmentShape:
    """Static sizes of a warp's tiles of ``tile`` tokens, for ``row_tiles`` times 16 rows."""

    spec: CacheSpec
    tile: int
    row_tiles: int

    @staticmethod
    def serves(spec: CacheSpec) -> bool:
        """Whether both codecs have codes, and V's planes are whole chunks of 16 bytes.

        K and V have to be of one head_dim, a power of two.
        """
        if not multiplies(spec):
            return False
        fmt = spec.cache_format
        coded = fmt.key.packed and fmt.value.packed
        return coded and all(spec.head_dim * bits // 8 % 16 == 0 for bits in fmt.value.plane_bits)

    @property
    def key(self) -> Codec:
        """K's codec."""
        return self.spec.cache_format.key

    @property
    def value(self) -> Codec:
        """V's codec."""
        return self.spec.cache_format.value

    @property
    def octets(self) -> int:
        """Octets of tokens."""
        return self.tile // 8

    @property
    def pages(self) -> int:
        """Pages that a tile touches."""
        return max(1, self.tile // self.spec.page_size)

    @property
    def key_fields(self) -> int:
        """Codes of K in a byte of the first plane."""
        return 8 // self.key.plane_bits[0]

    @property
    def key_words(self) -> int:
        """Words of a lane in the first plane of a row of K."""
        return self.spec.head_dim // (4 * _LANES * self.key_fields)

    @property
    def key_load(self) -> int:
        """Words of a lane in one load."""
        return min(4, self.key_words)

    @property
    def key_planes(self) -> int:
        """Planes of a row of K: the second has third bits."""
        return len(self.key.plane_bits)

    @property
    def steps(self) -> int:
        """Products that a row of K takes."""
        return self.spec.head_dim // 16

    @property
    def in_bytes(self) -> bool:
        """Whether K's codes become bytes (`attend_bytes`), else halves (`attend_halves`).

        Of keys with signs of residuals, for 16 rows and bfloat16: 201 us of 229 at 64 x 8192 of
        32/8 heads (4 query tokens, k4v2, H200). More rows take more products, of which those of
        integers take twice as long, and so do centroids of two bytes: 439 us of 381 with 8 tokens,
        261 of 218 in tq42.
        """
        coded = self.key.residual_sign and self.spec.dtype == "bfloat16"
        return coded and self.row_tiles == 1

    @functools.cached_property
    def tables(self) -> KeyTables:
        """K's centroids as bytes."""
        return key_tables(self.key.centroids, self.spec.dtype)

    @property
    def byte_steps(self) -> int:
        """Products that bytes of a row of K take, one for each word of eight codes of a lane."""
        return self.spec.head_dim // 32

    @property
    def constants_begin(self) -> int:
        """Where rows' constants begin, four words each: behind high, low, and signs' bytes."""
        return 3 * self.byte_steps * OPERAND_WORDS

    @property
    def start_begin(self) -> int:
        """Where the four words are that sums of bytes start from."""
        return self.constants_begin + 4 * 16

    @property
    def halves_begin(self) -> int:
        """Where queries of float16 begin, which packed rows meet, or only a window's."""
        return self.start_begin + 4 if self.in_bytes else 0

    @property
    def query_words(self) -> int:
        """Words of all rows of queries."""
        halves = self.row_tiles * self.steps * OPERAND_WORDS
        if self.in_bytes and not self.spec.window:
            halves = 0
        sums = 16 * self.row_tiles if self.key_zeros else 0
        return _lines(self.halves_begin + halves + sums)

    @property
    def sums_begin(self) -> int:
        """Where the sums of rows of queries begin, of keys with zeros."""
        return self.halves_begin + self.row_tiles * self.steps * OPERAND_WORDS

    @property
    def key_zeros(self) -> bool:
        """Whether rows of K have zeros."""
        return self.key.family == "affine"

    @property
    def value_zeros(self) -> bool:
        """Whether rows of V have zeros."""
        return self.value.family == "affine"

    @property
    def key_factor(self) -> float:
        """What a row's scale is times, beside its codes in products."""
        return self._factor(self.key)

    @property
    def value_factor(self) -> float:
        """The same of V."""
        factor = self._factor(self.value)
        return factor / self.value_unit if self.value.family == "lloyd_max" else factor

    def _factor(self, codec: Codec) -> float:
        if codec.family == "lloyd_max":
            return self.spec.head_dim**-0.5
        return 1 / CODE_UNIT if codec.family == "affine" else 1.0

    @property
    def value_fields(self) -> int:
        """Codes of V in a byte of the first plane."""
        return 8 // self.value.plane_bits[0]

    @property
    def value_chunks(self) -> int:
        """Chunks of 16 bytes of the first plane of a row of V."""
        return self.spec.head_dim // (16 * self.value_fields)

    @property
    def third_chunks(self) -> int:
        """Chunks of the third bits of a row of V."""
        return self.value_chunks // 2 if len(self.value.plane_bits) > 1 else 0

    @property
    def chunks(self) -> int:
        """Chunks of a row of V."""
        return self.value_chunks + self.third_chunks

    @property
    def row_chunks(self) -> int:
        """Chunks of a row of V in shared memory, a power of two: see `chunk_rows`."""
        return padded(self.chunks)

    @property
    def row_words(self) -> int:
        """Words of a row of V in shared memory."""
        return CHUNK_WORDS * self.row_chunks

    @property
    def value_words(self) -> int:
        """Words of V's codes."""
        return self.tile * self.row_words

    @property
    def scale_words(self) -> int:
        """Words of the factors of scores and of weights, of residuals or zeros of K, and of V's."""
        return self.tile * (2 + (len(self.key.meta) == 2) + self.value_zeros)

    @property
    def words(self) -> int:
        """Words of shared memory of a warp: two tiles of V, and scales of one."""
        return _lines(2 * self.value_words + self.scale_words)

    @functools.cached_property
    def value_unit(self) -> float:
        """What V's levels are multiplied by, so that float16 rounds them least."""
        levels = np.array([c for c in self.value.centroids if c > 0])
        density = np.exp(-np.square(levels) / 2)

        def error(unit: float) -> float:
            rounded = (levels * unit).astype(np.float16)
            apart = len(levels) == 2 and len(set(rounded.view(np.uint16) & 0xFF)) > 1
            off = rounded.astype(np.float64) / unit - levels
            return float(np.sum(density * np.square(off))) + apart

        return min((float(unit) for unit in np.linspace(1, 2, 4001)), key=error)

    def query_word(self, row, coordinate):
        """Where a query's pair of coordinates is, in words: the order in which lanes hold K.

        A step takes four words of every lane: rows g and g + 8 of coordinates that are bytes 0 and
        1 of one of its words of codes, then of bytes 2 and 3.
        """
        field, lane, word, byte = self._place(coordinate)
        step = T.truncdiv(row, 16) * self.steps + field * self.key_words + word
        return self.halves_begin + self._operand_word(step, row, lane, T.truncdiv(byte, 2))

    def code_word(self, row, coordinate):
        """Where the bytes are that codes of 4 bits meet, of ``coordinate`` c of the lower half.

        They are of coordinates c, c + D / 2, c + 1 and c + 1 + D / 2, as K's codes are in a word.
        """
        _, lane, word, byte = self._place(coordinate)
        return self._operand_word(word, row, lane, T.truncdiv(byte, 2))

    def sign_word(self, row, coordinate):
        """Where the bytes of coordinates c to c + 3 are that signs meet."""
        field, lane, word, _ = self._place(coordinate)
        return self._operand_word(2 * self.byte_steps + word, row, lane, field)

    def _place(self, coordinate):
        """Field, lane, word of the lane and byte of the word that have a coordinate of K."""
        plane = self.spec.head_dim // self.key_fields
        byte, field = T.truncmod(coordinate, plane), T.truncdiv(coordinate, plane)
        own = 4 * self.key_load
        first: Any = 0
        if self.key_words > self.key_load:
            # Of each load all lanes are neighbours: they share sectors.
            first = self.key_load * T.truncdiv(byte, own * _LANES)
            byte = T.truncmod(byte, own * _LANES)
        lane, inside = T.truncdiv(byte, own), T.truncmod(byte, own)
        return field, lane, first + T.truncdiv(inside, 4), T.truncmod(inside, 4)

    @staticmethod
    def _operand_word(step, row, lane, half):
        """A word of an operand: rows g and g + 8 of one half of its columns, then of the other."""
        number = T.truncmod(T.truncdiv(row, 8), 2) + half * 2
        return (step * 32 + T.truncmod(row, 8) * 4 + lane) * 4 + number

    def output_coordinate(self, octet: int, column):
        """The coordinate of a column of an octet of outputs."""
        chunk, field, byte = octet // (2 * self.value_fields), octet // 2, octet % 2
        field = field % self.value_fields
        return column * 2 + (16 * chunk + byte + field * (self.spec.head_dim // self.value_fields))
