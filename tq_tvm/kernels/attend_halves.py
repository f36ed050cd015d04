"""Scores of ``attend`` on GPUs from K's codes as pairs of float16, looked up in registers.

What comes out of a look-up are operands of ``mma.m16n8k16``, 16 tokens and 16 coordinates, whose
order only the queries have to share (`FragmentShape.query_word`). Tables have levels alone, so they
are made once; of qjl4 the residual is added, once a row.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from tvm.script import tirx as T

from tq_tvm.kernels.attend_rows import QueryRows
from tq_tvm.kernels.device import (
    PAIR,
    access,
    f32,
    let,
    local,
    mma,
    pointer,
    ptx,
    store,
)
from tq_tvm.kernels.fragment_shape import OPERAND_WORDS, FragmentShape
from tq_tvm.kernels.hadamard_cuda import PRODUCTS
from tq_tvm.kernels.lookup_cuda import (
    Chain,
    LevelTable,
    find_mirrored,
    find_pairs,
    level_pairs,
    looked_up,
    together,
)

if TYPE_CHECKING:
    from tq_tvm.kernels.attend_values import TokenScales

__all__ = ["HalfKeys"]


class HalfKeys:
    """K's levels, and queries in shared memory; logits are scores."""

    unit = None
    score_unit = 1.0

    def __init__(self, shape: FragmentShape, words, lane, unknown_zero) -> None:
        self._shape, self._words, self._lane = shape, words, lane
        self._g = let(T.truncdiv(lane, 4))
        levels = looked_up(shape.key)
        self._pairs = level_pairs(levels, unknown_zero)
        self._table = None if shape.key.residual_sign else LevelTable(self._pairs, len(levels))
        if shape.key_planes > 1:
            # Lanes that are two apart read the same third bits.
            self._later = let(T.cast(T.truncdiv(T.truncmod(lane, 4), 2), "uint32"))

    @property
    def residual_unit(self) -> float:
        """What a residual is times to be in units of levels."""
        return self._shape.spec.head_dim**0.5

    def residual_word(self, residual):
        """What `TokenScales` have of a residual."""
        word = local(1, "uint32")
        ptx(PAIR["float16"], word[0], residual, residual)
        return word[0]

    def leave_queries(self, asked: QueryRows) -> None:
        """Rotate rows of a block to float16, unscaled, and put them where `score` reads them."""
        word = local(1, "uint32")
        for row, coordinate, pair in asked.rotated(f32(asked.unit)):
            ptx(PAIR["float16"], word[0], *pair)
            at = pointer(self._words, self._shape.query_word(row, coordinate))
            ptx("st.shared.u32", at, word[0])

    def start(self) -> None:
        """Rows have no constants."""

    def score(self, codes, scales: TokenScales, scores) -> None:
        """Scores ``[row tile, octet of tokens, place]`` of a lane's words of K ``[octet, word]``.

        A residual is twice in a token's word.
        """
        shape, tiles = self._shape, range(self._shape.row_tiles)
        # Tables of rows take registers, of which 32 rows of queries leave few.
        abreast = 2 if shape.key.residual_sign and shape.row_tiles > 1 else shape.octets
        for first in range(0, shape.octets, abreast):
            octets = range(first, first + abreast)
            tables = [self._table_of(octet, scales) for octet in octets]
            for word in range(shape.key_words):
                places = list(itertools.product(range(shape.key_fields), tiles))
                steps = [m * shape.steps + field * shape.key_words + word for field, m in places]
                operand = self._queries(steps[0])
                found = together(
                    [
                        self._keys(table, codes, octet, word)
                        for octet, table in zip(octets, tables, strict=True)
                    ]
                )
                for (field, m), after in zip(places, [*steps[1:], None], strict=True):
                    # Ahead of the products before its own.
                    following = None if after is None else self._queries(after)
                    for i, octet in enumerate(octets):
                        result = [scores[m, octet, e] for e in range(4)]
                        start = result if word or field else [f32(0)] * 4
                        b = [found[i][field, half] for half in range(2)]
                        mma(PRODUCTS["float16"], result, operand, b, start)
                    operand = following
        self._scale(scores, scales)

    def _scale(self, scores, scales: TokenScales) -> None:
        """Multiply scores by the factors of their tokens."""
        for octet in range(self._shape.octets):
            factors = scales.keys(octet)
            for m, e in itertools.product(range(self._shape.row_tiles), range(4)):
                store(scores, scores[m, octet, e] * factors[e % 2], m, octet, e)

    def _queries(self, step: int) -> list:
        """The operand of a step of a row tile."""
        a = local(4, "uint32")
        registers = [a[e] for e in range(4)]
        at = 4 * self._lane + OPERAND_WORDS * step
        access("ld.shared", registers, pointer(self._words, at))
        return registers

    def _table_of(self, octet: int, scales: TokenScales) -> LevelTable:
        """The table of the lane's row of K; the residual of codes whose top bit is set is added."""
        if self._table is not None:
            return self._table
        pairs, residual = local(4, "uint32"), scales.residual(octet)
        for i in range(4):
            ptx("add.rn.f16x2", pairs[i], self._pairs[i], residual)
        return LevelTable(pairs, 8)

    def _keys(self, table: LevelTable, codes, octet: int, word: int) -> Chain:
        """Values of a word of K's codes, ``[field, half]``."""
        shape = self._shape
        if shape.key_fields == 2:
            return find_mirrored(table, codes[octet, word])
        third = None
        if shape.key_planes > 1:
            third = let(T.shift_right(codes[octet, shape.key_words + word], self._later))
        return find_pairs(table, codes[octet, word], third)
