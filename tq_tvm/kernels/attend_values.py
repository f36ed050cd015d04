"""V of ``attend`` on GPUs, looked up in registers, and scales of tokens in shared memory.

``ldmatrix`` transposes bytes: of tokens 8 i + 2 t and 8 i + 2 t + 1 a lane gets bytes 2 g and
2 g + 1 of each 16, and looks up both tokens' codes together, so that a word has one coordinate of
two tokens.

Weights, times V's factors, are float16, whatever the model's dtype, and sums float32. V's levels
are in a unit that rounds them least; of two bits, in one that gives both magnitudes the same low
byte, which then needs no look-up.

Tried on an H200 (64 x 8192 of 32/8 heads, 4 query tokens): weights times factors as pairs of halves
(207 us of 202 in k4v2, 219 of 218 in tq42), and what they add up to by a product with ones (213 and
231): half as many instructions, which wait for one another.
"""

from __future__ import annotations

import itertools
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels.attend_direct import TOKENS, find_direct
from tq_tvm.kernels.attend_rows import Softmax
from tq_tvm.kernels.chunk_rows import CHUNK_WORDS, turned
from tq_tvm.kernels.device import (
    PAIR,
    access,
    byte_perm,
    let,
    local,
    mma,
    pointer,
    ptx,
    store,
    u32,
)
from tq_tvm.kernels.fragment_shape import LINE_WORDS, FragmentShape
from tq_tvm.kernels.hadamard_cuda import PRODUCTS
from tq_tvm.kernels.lookup_cuda import (
    Chain,
    HighTable,
    LevelTable,
    find_mirrored,
    find_pairs,
    half_bits,
    level_pairs,
    looked_up,
    together,
)

__all__ = ["FragmentValues", "TokenScales"]


class TokenScales:
    """Factors of a tile's tokens, from word ``begin`` on: of scores, then of weights.

    For keys with signs of residuals, or zeros, then a word of each token's; for values with zeros
    what those add to a weight of 1.
    """

    def __init__(self, shape: FragmentShape, words, begin, g, t) -> None:
        self._shape, self._words, self._g, self._t = shape, words, g, t
        self._keys, self._values = begin, begin + shape.tile
        self._residuals = begin + 2 * shape.tile
        self._offsets = self._residuals + (shape.tile if len(shape.key.meta) == 2 else 0)

    def leave_key(self, token, factor) -> None:
        """The factor of a token's scores."""
        ptx("st.shared.f32", pointer(self._words, self._keys + token), factor)

    def leave_residual(self, token, word) -> None:
        """What is to be known of a token's residual."""
        ptx("st.shared.u32", pointer(self._words, self._residuals + token), word)

    def leave_value(self, token, factor) -> None:
        """The factor of a token's weights."""
        ptx("st.shared.f32", pointer(self._words, self._values + token), factor)

    def leave_offset(self, token, offset) -> None:
        """What a token's zero adds to the output, times its weight."""
        ptx("st.shared.f32", pointer(self._words, self._offsets + token), offset)

    def offsets(self, octet: int):
        """What was left of tokens 2 t and 2 t + 1 of an octet."""
        return self._pair(self._offsets, octet)

    def keys(self, octet: int):
        """Factors of scores of tokens 2 t and 2 t + 1 of an octet."""
        return self._pair(self._keys, octet)

    def residuals(self, octet: int):
        """Residuals, as floats, of tokens 2 t and 2 t + 1 of an octet."""
        return self._pair(self._residuals, octet)

    def residual(self, octet: int):
        """The word of token g of an octet."""
        word = local(1, "uint32")
        at = pointer(self._words, self._residuals + 8 * octet + self._g)
        ptx("ld.shared.u32", word[0], at)
        return word[0]

    def values(self, octet: int):
        """Factors of weights of tokens 2 t and 2 t + 1 of an octet."""
        return self._pair(self._values, octet)

    def _pair(self, begin, octet: int):
        factors = local(2, "float32")
        at = pointer(self._words, begin + 8 * octet + 2 * self._t)
        access("ld.shared", [factors[0], factors[1]], at, "f32")
        return factors


class FragmentValues:
    """V's table, and what a lane adds of a tile of it in shared memory."""

    def __init__(self, shape: FragmentShape, words, lane, unknown_zero) -> None:
        self._shape, self._words, self._lane = shape, words, lane
        self._table = None
        if shape.value.family == "lloyd_max":
            self._table = self._table_of_levels(unknown_zero)

    def _table_of_levels(self, unknown_zero) -> LevelTable | HighTable:
        levels = [c * self._shape.value_unit for c in looked_up(self._shape.value)]
        if len(levels) > 4:
            return LevelTable(level_pairs(levels, unknown_zero), len(levels))
        halves = half_bits(levels)
        (low,) = {half & 0xFF for half in halves}
        high = sum((half >> 8) << (8 * i) for i, half in enumerate(halves))
        hidden = [let(T.bitwise_or(u32(w), unknown_zero)) for w in (low * 0x01010101, high)]
        return HighTable(*hidden)

    def add(self, softmax: Softmax, scores, tile, scales: TokenScales) -> None:
        """Add the tile from word ``tile`` on, whose weights are in ``scores``, to the output."""
        shape = self._shape
        product = PRODUCTS["float16"]
        octets = 4 if shape.tile >= 32 and shape.row_tiles == 1 else 2
        for first in range(0, shape.octets, octets):
            read = self._read(tile, first, octets)
            factors = [scales.values(first + octet) for octet in range(octets)]
            if shape.value_zeros:
                self._add_offsets(softmax, scores, scales, range(first, first + octets))
            weights = [
                self._weights(scores, factors[2 * step : 2 * step + 2], m, first + 2 * step)
                for step in range(octets // 2)
                for m in range(shape.row_tiles)
            ]
            for chunk in range(shape.value_chunks):
                found = together([self._values(read[i], chunk) for i in range(octets)])
                for step, field, byte, m in itertools.product(
                    range(octets // 2), range(shape.value_fields), range(2), range(shape.row_tiles)
                ):
                    octet = (chunk * shape.value_fields + field) * 2 + byte
                    result = [softmax.output[m, octet, e] for e in range(4)]
                    b = [found[2 * step + half][field, byte] for half in range(2)]
                    mma(product, result, weights[step * shape.row_tiles + m], b, result)

    def _add_offsets(self, softmax: Softmax, scores, scales: TokenScales, octets: range) -> None:
        """Add up what zeros of tokens add to every value of a row."""
        for octet in octets:
            own = scales.offsets(octet)
            for m, e in itertools.product(range(self._shape.row_tiles), range(4)):
                total = softmax.offset[m, e // 2] + scores[m, octet, e] * own[e % 2]
                store(softmax.offset, total, m, e // 2)

    @staticmethod
    def _weights(scores, factors, m: int, first: int) -> list:
        """Weights of two octets, times V's factors, as an operand."""
        a = local(4, "uint32")
        for i in range(4):
            own, half = factors[i // 2], 2 * (i % 2)
            pair = [scores[m, first + i // 2, half + e] * own[e] for e in (1, 0)]
            ptx(PAIR["float16"], a[i], *pair)
        return [a[i] for i in range(4)]

    def _read(self, tile, first: int, octets: int) -> list[list[Any]]:
        """Codes of V ``[octet][chunk]``: bytes 2 g, then 2 g + 1, of two tokens.

        Of values with zeros both bytes of a token, then of the other one.
        """
        shape = self._shape
        read: list[list[Any]] = [[None] * shape.chunks for _ in range(octets)]
        # Four matrices at a time: of 32 tokens and a chunk, or of 16 tokens and two.
        abreast = 4 // octets
        token, other = T.truncmod(self._lane, 8 * octets), T.truncdiv(self._lane, 8 * octets)
        moved = turned(token, shape.row_chunks)
        if abreast > 1 and shape.row_chunks > 1:
            moved = T.bitwise_xor(moved, other)
        row, moved = let(token * shape.row_words), let(CHUNK_WORDS * moved)
        for chunk in range(0, shape.chunks, abreast):
            words = local(4, "uint32")
            place = T.bitwise_xor(moved, CHUNK_WORDS * (chunk % 8)) + LINE_WORDS * (chunk // 8)
            at = tile + row + place + 8 * first * shape.row_words
            name = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
            ptx(name, *[words[i] for i in range(4)], pointer(self._words, at))
            for i in range(octets * min(abreast, shape.chunks - chunk)):
                own = words[i] if shape.value_zeros else byte_perm(words[i], u32(0), 0x3120)
                read[i % octets][chunk + i // octets] = let(own)
        return read

    def _values(self, codes, chunk: int) -> Chain:
        """Values of an octet of tokens and a chunk of V, ``[field, byte]``: of two tokens each."""
        shape = self._shape
        if self._table is None:
            return find_direct(shape.value, codes[chunk], TOKENS)
        if shape.value_fields == 2:
            return find_mirrored(self._table, codes[chunk])
        third = None
        if shape.third_chunks:
            # A byte has the bits of two bytes of pairs: a half of the chunks, then the other.
            later = chunk // shape.third_chunks
            third = codes[shape.value_chunks + chunk % shape.third_chunks]
            third = let(T.shift_right(third, u32(1))) if later else third
        return find_pairs(self._table, codes[chunk], third)
