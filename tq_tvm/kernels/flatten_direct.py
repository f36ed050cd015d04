"""Sides of ``flatten`` on GPUs under a direct codec: what `flatten_cuda` has for look-ups.

In the rotated domain, or without a rotation, eight lanes take a row (`direct_cuda`). To rotate
back, four lanes take a row as operands of tensor cores (`hadamard_cuda`): halves of codes less
zero, of half that, so that the largest is one too; of fp8 codes as they are; of none the values
themselves. The scale is applied in float32 at the end.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels.device import (
    PAIR,
    access,
    f32,
    high_half,
    let,
    local,
    low_half,
    ptx,
    store,
    u32,
)
from tq_tvm.kernels.direct_cuda import AffineCodes, DirectRow, e4m3_halves, nibbles
from tq_tvm.kernels.hadamard_cuda import RowBits, RowSigns, rotate_rows
from tq_tvm.kernels.lookup_cuda import GLOBAL
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["DirectSide", "RotatedDirectSide"]

_READ = f"{GLOBAL}.L1::no_allocate"


class DirectSide(DirectRow):
    """K or V of a lane's part of a row: codes, scales, and what becomes of them."""

    def __init__(
        self, spec: CacheSpec, codec: Codec, cache: Any, lanes: int, piece: int = 8
    ) -> None:
        scale = let(cache.metas[0]) if codec.tensor_scale else None
        super().__init__(spec.head_dim, spec.dtype, codec, lanes, _READ, scale, piece)
        self.spec, self._cache = spec, cache

    def load(self, page, place, part) -> None:
        """Read codes and scales of the row at ``place`` of a page."""
        cache, count = self._cache, len(self.codec.meta)
        codes = let(page * cache.code_stride + T.cast(place * self.elements, "int64"))
        self.read_codes(lambda at: cache.codes.ptr_to([codes + at]), part)
        if count:
            at = page * cache.meta_stride + T.cast(place * count, "int64")
            ptx("ld.global.nc.u32", self.meta[0], cache.metas.ptr_to([at]))

    def write(self, out, row, part) -> None:
        """Write the values; ``row`` is the index of the row's first element."""
        for first, found in self.lines(part):
            at = row + T.cast(first, "int64")
            line = local(len(found), "uint32")
            for i, word in enumerate(found):
                store(line, word, i)
            access("st.global", [line[i] for i in range(len(found))], out.ptr_to([at]))


class RotatedDirectSide(DirectSide):
    """The same, rotated back: the warp writes 8 rows together.

    ``ones`` are the words of the Hadamard matrix, in float16 and in the model's dtype.
    """

    def __init__(
        self, spec: CacheSpec, codec: Codec, cache: Any, row: RowBits, ones: dict[str, Any],
        signs: RowSigns | None,
    ) -> None:  # fmt: skip
        super().__init__(spec, codec, cache, 4, row.piece)
        self._row, self._signs = row, signs
        self._dtype = "float16" if codec.packed else spec.dtype
        self._ones = ones[self._dtype]

    def _operands(self):
        """Words of two values of the lane in order of their coordinates, and their unit."""
        row, dim, codec = self._row, self.dim, self.codec
        if codec.family == "none":
            return self.codes, f32(1)
        words = local(dim // 8, "uint32")
        if codec.family == "fp8":
            for i in range(dim // 16):
                for half in range(2):
                    code = T.shift_right(self.codes[i], u32(16)) if half else self.codes[i]
                    store(words, e4m3_halves(code), 2 * i + half)
            return words, self._scale
        zero = let(high_half(self.dtype, self.meta[0]))
        codes = AffineCodes("float16", codec.bits, f32(0.5), zero)
        fields = 8 // codec.bits
        for i in range(dim // (16 * fields)):
            for field in range(fields):
                word = let(nibbles(self.codes[i], field)) if fields > 1 else self.codes[i]
                for half in range(2):
                    place = row.coordinate(4 * i) + 2 * half + field * (dim // fields)
                    pair = [codes.value(word, 2 * half + e) for e in (1, 0)]
                    ptx(PAIR["float16"], words[row.slot(place) // 2], *pair)
        return words, let(low_half(self.dtype, self.meta[0]) * f32(2))

    def rotated(self):
        """Values of a lane in order of their coordinates, in pairs of the model's dtype."""
        dim = self.dim
        words, unit = self._operands()
        value = local(dim // 4, "float32")
        rotate_rows(self._row, self._dtype, words, self._ones, value)
        scale = let(unit * f32(-(dim**-0.5)))
        pairs = local(dim // 8, "uint32")
        for i in range(dim // 8):
            ptx(PAIR[self.dtype], pairs[i], value[2 * i + 1] * scale, value[2 * i] * scale)
        if self._signs is not None:
            self._signs.turn(pairs)
        return pairs
