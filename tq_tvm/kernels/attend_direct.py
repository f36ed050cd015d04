"""Scores of ``attend`` on GPUs from K's codes that are numbers, ``int4``, ``int8`` and ``fp8``.

A byte q with a zero above it is the float16 q 2^-24, below its normal numbers, which products take
as exactly as others; so ``prmt`` makes operands of ``mma.m16n8k16`` of codes and nothing is
subtracted from them. A row's zero is subtracted from the score, times the sum of the query::

    affine   score = scale (q codes - zero sum q)        fp8   score = scale q codes

`float8_e4m3fn` is converted as such.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from tvm.script import tirx as T

from tq_tvm.kernels.attend_halves import HalfKeys
from tq_tvm.kernels.attend_rows import QueryRows
from tq_tvm.kernels.device import (
    PAIR,
    as_bits,
    byte_perm,
    f32,
    high_half,
    let,
    local,
    low_half,
    pointer,
    ptx,
    reduce_lanes,
    store,
    u32,
    when,
)
from tq_tvm.kernels.direct_cuda import e4m3_halves, nibbles
from tq_tvm.kernels.fragment_shape import CODE_UNIT, FragmentShape
from tq_tvm.kernels.lookup_cuda import Chain
from tq_tvm.spec import Codec

if TYPE_CHECKING:
    from tq_tvm.kernels.attend_values import TokenScales

__all__ = ["NEIGHBOURS", "TOKENS", "DirectKeys", "find_direct"]

NEIGHBOURS = (0x4140, 0x4342)
"""What ``prmt`` selects of four bytes in order: the first two and the last two, zeros above."""

TOKENS = (0x4240, 0x4341)
"""The same of two bytes of one token and two of the next: both tokens' first, and their second."""


def find_direct(codec: Codec, word, selectors: tuple[int, int]) -> Chain:
    """Values of a word of codes: ``[field, half]``, two in each; of fp8 in their order."""
    fields = 8 // codec.bits
    found = local((fields, 2), "uint32")
    for field, half in itertools.product(range(fields), range(2)):
        yield
        if codec.family == "fp8":
            value = e4m3_halves(T.shift_right(word, u32(16)) if half else word)
        else:
            codes = word if fields == 1 else nibbles(word, field)
            value = byte_perm(codes, u32(0), selectors[half])
        store(found, value, field, half)
    return found


class DirectKeys(HalfKeys):
    """K's codes as they are, and sums of queries, which zeros are times."""

    def __init__(self, shape: FragmentShape, words, lane, unknown_zero) -> None:
        self._shape, self._words, self._lane = shape, words, lane
        self._sums = local((shape.row_tiles, 2), "float32")

    @property
    def residual_unit(self) -> float:
        """What a zero is times to be in units of codes as operands."""
        return CODE_UNIT

    def residual_word(self, residual):
        """What `TokenScales` have of a zero."""
        return as_bits(residual)

    def leave_queries(self, asked: QueryRows) -> None:
        """As of `HalfKeys`, and the sum of each row."""
        shape, lane, values = self._shape, self._lane, asked.query.row_values
        if not shape.key_zeros:
            super().leave_queries(asked)
            return
        word, total = local(1, "uint32"), local(1, "float32")
        for row, own in asked.whole():
            store(total, f32(0))
            for i in range(0, values, 2):
                pair = [own[i + e] * f32(asked.unit) for e in (1, 0)]
                ptx(PAIR["float16"], word[0], *pair)
                at = shape.query_word(row, let(lane * values + i))
                ptx("st.shared.u32", pointer(self._words, at), word[0])
                # As they were rounded.
                both = low_half("float16", word[0]) + high_half("float16", word[0])
                store(total, total[0] + both)
            reduce_lanes(total, 0, lambda a, b: a + b)
            with when(lane == 0):
                ptx("st.shared.f32", pointer(self._words, shape.sums_begin + row), total[0])

    def start(self) -> None:
        """Read the sums of the lane's rows."""
        shape = self._shape
        if not shape.key_zeros:
            return
        for m, half in itertools.product(range(shape.row_tiles), range(2)):
            row = T.truncdiv(self._lane, 4) + (16 * m + 8 * half)
            at = pointer(self._words, shape.sums_begin + row)
            ptx("ld.shared.f32", self._sums[m, half], at)

    def _keys(self, table, codes, octet: int, word: int) -> Chain:
        """Values of a word of K's codes, ``[field, half]``."""
        return find_direct(self._shape.key, codes[octet, word], NEIGHBOURS)

    def _table_of(self, octet: int, scales: TokenScales) -> None:
        """There is none."""

    def _scale(self, scores, scales: TokenScales) -> None:
        if self._shape.key_zeros:
            for octet in range(self._shape.octets):
                zeros = scales.residuals(octet)
                for m, e in itertools.product(range(self._shape.row_tiles), range(4)):
                    less = scores[m, octet, e] - zeros[e % 2] * self._sums[m, e // 2]
                    store(scores, less, m, octet, e)
        super()._scale(scores, scales)
