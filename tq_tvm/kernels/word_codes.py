"""Words of codes on GPUs, one at a time, at any head_dim: four codes of each field.

`lookup_cuda` and `direct_cuda` give lanes the same share of a row, of which there has to be a power
of two; a row of 80 values has five words of 2-bit codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels.device import (
    PAIR,
    high_half,
    let,
    local,
    low_half,
    ptx,
    u32,
)
from tq_tvm.kernels.direct_cuda import AffineCodes, e4m3_halves, nibbles
from tq_tvm.kernels.lane_rows import GROUP
from tq_tvm.kernels.lookup_cuda import (
    LevelTable,
    alone,
    find_mirrored,
    find_pairs,
    row_residual,
    row_scale,
    scaled_levels,
    unit_levels,
)
from tq_tvm.spec import Codec

__all__ = ["WordCodes", "code_fields", "code_words", "third_bits"]


def code_fields(codec: Codec) -> int:
    """Codes in a byte of the first plane."""
    return 8 // codec.plane_bits[0]


def code_words(dim: int, codec: Codec) -> int:
    """Words of the first plane of a row."""
    return dim // (GROUP * code_fields(codec))


def third_bits(dim: int, read: Callable[[Any, int], Any], word):
    """Third bits of the codes of a word of the first plane, where `find_pairs` takes them.

    ``read(at, size)`` reads 2 or 4 bytes of the row. Byte j of the plane has those of bytes j and
    j + D/8 of the first plane, in turn.
    """
    eighth, plane = dim // 8, dim // 4
    size = 4 if eighth % 4 == 0 else 2
    parts = []
    for first in range(0, 4, size):
        byte = 4 * word + first
        fixed = isinstance(byte, int)
        half = byte // eighth if fixed else T.truncdiv(byte, eighth)
        at = byte % eighth if fixed else T.truncmod(byte, eighth)
        bits = read(plane + at, size)
        parts.append(T.shift_right(bits, u32(half) if fixed else T.cast(half, "uint32")))
    if size == 4:
        return let(parts[0])
    return let(T.bitwise_or(parts[0], T.shift_left(parts[1], u32(16))))


class WordCodes:
    """What the codes of one row stand for.

    Parameters
    ----------
    meta
        A word of the row's scales.
    scale
        Of ``fp8``.
    unit
        Of a Lloyd-Max codec: leave out the scale and 1 / sqrt(D).
    """

    def __init__(
        self, dim: int, dtype: str, codec: Codec, meta, scale=None, unit: bool = False
    ) -> None:
        self._dim, self._dtype, self._codec, self._scale = dim, dtype, codec, scale
        self._unit = unit
        self._fields = code_fields(codec)
        if codec.family == "lloyd_max":
            self._table = self._levels(meta)
        elif codec.family == "affine":
            factor, zero = let(low_half(dtype, meta)), let(high_half(dtype, meta))
            self._affine = AffineCodes(dtype, codec.bits, factor, zero)

    def _levels(self, meta) -> LevelTable:
        codec, dim = self._codec, self._dim
        residual = row_residual(self._dtype, codec, meta)
        if self._unit:
            return LevelTable.rounded("float16", unit_levels(codec, dim, residual))
        scale = let(row_scale(self._dtype, codec, meta))
        return LevelTable.rounded(self._dtype, scaled_levels(codec, dim, scale, residual))

    def pairs(self, word, third=None) -> list[list]:
        """Of each field two words of two values of the model's dtype."""
        if self._codec.family == "lloyd_max":
            return self._find(word, third)
        packed = []
        for values in self.floats(word):
            words = local(2, "uint32")
            for i in range(2):
                ptx(PAIR[self._dtype], words[i], values[2 * i + 1], values[2 * i])
            packed.append([words[0], words[1]])
        return packed

    def floats(self, word, third=None) -> list[list]:
        """Of each field four values."""
        family = self._codec.family
        if family == "lloyd_max":
            dtype = "float16" if self._unit else self._dtype
            return [
                [let(half(dtype, pair)) for pair in pairs for half in (low_half, high_half)]
                for pairs in self._find(word, third)
            ]
        if family == "fp8":
            halves = [let(e4m3_halves(w)) for w in (word, T.shift_right(word, u32(16)))]
            both = [half("float16", w) for w in halves for half in (low_half, high_half)]
            return [[let(value * self._scale) for value in both]]
        fields = [word] if self._fields == 1 else [let(nibbles(word, f)) for f in range(2)]
        return [[let(self._affine.value(w, i)) for i in range(4)] for w in fields]

    def _find(self, word, third) -> list[list]:
        if self._codec.plane_bits[0] == 4:
            found = alone(find_mirrored(self._table, word))
        else:
            found = alone(find_pairs(self._table, word, third))
        return [[found[field, half] for half in range(2)] for field in range(self._fields)]
