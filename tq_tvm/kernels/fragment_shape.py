"""Static sizes of ``attend`` on GPUs where codes become operands in registers; `attend_fragments`.

Also the order that K's codes have in the lanes of a warp, which queries share, and V's in outputs.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from tvm.script import tirx as T

from tq_tvm.kernels.lane_rows import multiplies
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["FragmentShape"]

_LANES = 4
"""Lanes that share a row of K."""


@dataclasses.dataclass(frozen=True)
class FragmentShape:
    """Static sizes of a warp's tiles of ``tile`` tokens."""

    spec: CacheSpec
    tile: int

    @staticmethod
    def serves(spec: CacheSpec) -> bool:
        """Whether both codecs are looked up, and V's planes are whole chunks of 16 bytes.

        K and V have to be of one head_dim, a power of two.
        """
        if not multiplies(spec):
            return False
        fmt = spec.cache_format
        coded = fmt.key.family == fmt.value.family == "lloyd_max"
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
    def key_planes(self) -> int:
        """Planes of a row of K: the second has third bits."""
        return len(self.key.plane_bits)

    @property
    def steps(self) -> int:
        """Products that a row of K takes."""
        return self.spec.head_dim // 16

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
    def value_plane(self) -> int:
        """Words from a chunk of V to the next: padding puts lanes of a copy into other banks."""
        return 4 * self.tile + (4 if self.chunks > 1 else 0)

    @property
    def value_words(self) -> int:
        """Words of V's codes."""
        return self.chunks * self.value_plane

    @property
    def scale_words(self) -> int:
        """Words of the factors of logits and weights, and of residuals."""
        return self.tile * (3 if self.key.residual_sign else 2)

    @property
    def words(self) -> int:
        """Words of shared memory of a warp: two tiles of V, and scales of one."""
        return 2 * self.value_words + self.scale_words

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
        plane = self.spec.head_dim // self.key_fields
        byte, field = T.truncmod(coordinate, plane), T.truncdiv(coordinate, plane)
        own = 4 * self.key_words
        lane, inside = T.truncdiv(byte, own), T.truncmod(byte, own)
        step = field * self.key_words + T.truncdiv(inside, 4)
        step = T.truncdiv(row, 16) * self.steps + step
        number = T.truncmod(T.truncdiv(row, 8), 2) + T.truncmod(T.truncdiv(inside, 2), 2) * 2
        return (step * 32 + T.truncmod(row, 8) * 4 + lane) * 4 + number

    def output_coordinate(self, octet: int, column):
        """The coordinate of a column of an octet of outputs."""
        chunk, field, byte = octet // (2 * self.value_fields), octet // 2, octet % 2
        field = field % self.value_fields
        return column * 2 + (16 * chunk + byte + field * (self.spec.head_dim // self.value_fields))
