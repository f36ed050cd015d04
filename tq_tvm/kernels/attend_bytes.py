"""Scores of ``attend`` on GPUs from K's codes as bytes, where rows have signs of residuals.

Queries are 16 bits, two signed bytes a value, relative to the largest of their row. ``prmt`` maps
four codes of K to four signed bytes of a table held in registers, and signs of residuals are bits
of the codes as they lie. With 16 rows of queries as the M side of ``mma.m16n8k32``::

    c = codes q    s = signs q
    score = n (c + g s) unit

Signs meet high bytes alone: residuals are a fifth of a row, so what that leaves out moves logits of
standard deviation 4 by 0.004, less than bfloat16's rounding. Sums start from `MAGIC`, which makes
them floats without a conversion. Those of high and low bytes are added as floats whose last bit is
256: 10^-5 of a score's standard deviation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script import tirx as T

from tq_tvm.kernels.attend_rows import QueryRows
from tq_tvm.kernels.decode_query import FULL_SCALE, MAGIC, MAGIC_BITS, SMALLEST_SCALE
from tq_tvm.kernels.device import (
    FULL_WARP,
    PAIR,
    access,
    as_bits,
    as_float,
    byte_perm,
    f32,
    held,
    i32,
    let,
    local,
    pointer,
    ptx,
    shuffle_xor,
    store,
    u32,
    when,
)
from tq_tvm.kernels.fragment_shape import OPERAND_WORDS, FragmentShape
from tq_tvm.kernels.key_codes import Sums, code_nibbles, key_table

if TYPE_CHECKING:
    from tq_tvm.kernels.attend_values import TokenScales

__all__ = ["ByteKeys"]

_CODES = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
_SIGNS = "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32"
_LOW_TOPS = 0x08080808

_BOTH = 257 * MAGIC
"""What sums of high and low bytes start from, added up."""

_ABREAST = 4
"""Octets of tokens whose sums a lane has at a time."""


class ByteKeys:
    """K's table, and constants of a lane's rows g and g + 8; logits are scores times ``unit``."""

    def __init__(self, shape: FragmentShape, words, lane, unknown_zero) -> None:
        self._shape, self._words, self._lane = shape, words, lane
        self._table = key_table(shape.tables, unknown_zero, lane)
        self.unit, self._codes, self._signs = (local((1, 2), "float32") for _ in range(3))
        start = local(4, "uint32")
        self._start = [start[e] for e in range(4)]

    @property
    def score_unit(self) -> float:
        """What a score of 1 is worth, in units of the centroids and of ``unit``."""
        return self._shape.tables.unit

    @property
    def residual_unit(self) -> float:
        """What a residual is times to be a factor of signs, which are 0 or 8 of high bytes."""
        return self._shape.spec.head_dim**0.5 * 64 / self._shape.tables.unit

    @staticmethod
    def residual_word(residual):
        """What `TokenScales` have of a residual."""
        return as_bits(residual)

    def leave_queries(self, asked: QueryRows) -> None:
        """Rotate rows of a block, quantise them, and put them where `score` reads them.

        Behind a row's bytes its unit, and what its sums of codes and of signs begin with. Codes of
        K lie half a unit off their centroids.
        """
        shape, words, lane = self._shape, self._words, self._lane
        values = asked.query.row_values
        code, own, sums = local(values, "int32"), local(values, "float32"), local(2, "int32")
        top, bits, word = local(1, "float32"), local(1, "uint32"), local(1, "uint32")
        highs, pairs = local(values // 2, "uint32"), local(values // 2, "uint32")
        lower = let(lane < 16)
        coordinate = let(T.bitwise_and(lane, 15) * values)
        # Lanes of the lower half of a row write high bytes, the others low ones.
        selector = let(T.Select(lower, u32(0x5140), u32(0x7362)))
        part = let(T.Select(lower, i32(0), i32(shape.byte_steps * OPERAND_WORDS)))
        for row, x in asked.whole():
            store(top, f32(0))
            for i in range(values):
                store(own, x[i] * f32(asked.unit), i)
                # What is not a number is its row's unit, as codes have none for it.
                ptx("max.NaN.f32", top[0], top[0], T.fabs(own[i]))
            # Of floats that are not negative, bits have their order.
            ptx("redux_sync.max.u32", bits[0], as_bits(top[0]), u32(FULL_WARP))
            store(top, as_float(bits[0]))
            inverse = let(T.Select(top[0] > f32(0), f32(FULL_SCALE) / top[0], f32(0)))
            for n in range(2):
                store(sums, i32(0), n)
            for i in range(values):
                store(code, T.call_pure_extern("int32", "__float2int_rn", own[i] * inverse), i)
                store(sums, sums[0] + code[i], 0)
                store(sums, sums[1] + T.shift_right(code[i] + 128, 8), 1)
            for n in range(2):
                ptx("redux_sync.add.s32", sums[n], sums[n], u32(FULL_WARP))
            for n in range(values // 2):
                two = [T.cast(code[2 * n + e], "uint32") for e in range(2)]
                store(highs, byte_perm(two[0] + u32(128), two[1] + u32(128), 0x0051), n)
                store(pairs, byte_perm(highs[n], byte_perm(two[0], two[1], 0x0040), 0x5410), n)
                other = let(shuffle_xor(pairs[n], 16))
                first, second = (
                    T.Select(lower, a, b) for a, b in ((pairs[n], other), (other, pairs[n]))
                )
                ptx("prmt.b32", word[0], first, second, selector)
                at = part + shape.code_word(row, coordinate + 2 * n)
                ptx("st.shared.u32", pointer(words, at), word[0])
            self._leave_sign_bytes(row, values, highs)
            with when(lane == 0):
                self._leave_constants(row, top[0], sums)
            if shape.spec.window:
                for i in range(0, values, 2):
                    ptx(PAIR["float16"], word[0], own[i + 1], own[i])
                    at = shape.query_word(row, lane * values + i)
                    ptx("st.shared.u32", pointer(words, at), word[0])

    def _leave_sign_bytes(self, row, values: int, highs) -> None:
        """Bytes of four neighbouring coordinates are a word, whose halves two lanes may have."""
        lane = self._lane
        halves = [let(T.bitwise_and(highs[n], u32(0xFFFF))) for n in range(values // 2)]
        if values == 2:
            whole = let(T.bitwise_or(halves[0], T.shift_left(shuffle_xor(halves[0], 1), u32(16))))
            with when(T.bitwise_and(lane, 1) == 0):
                at = pointer(self._words, self._shape.sign_word(row, lane * 2))
                ptx("st.shared.u32", at, whole)
            return
        for n in range(0, values // 2, 2):
            whole = let(byte_perm(halves[n], halves[n + 1], 0x5410))
            at = pointer(self._words, self._shape.sign_word(row, lane * values + 2 * n))
            ptx("st.shared.u32", at, whole)

    def _leave_constants(self, row, top, sums) -> None:
        shape, words = self._shape, self._words
        # A unit that is not zero: a masked score of minus infinity stays so.
        smallest, unit = f32(SMALLEST_SCALE), let(top * f32(1.0 / FULL_SCALE))
        unit = T.Select(unit < smallest, smallest, unit)
        offset = f32(-shape.tables.offset / shape.tables.unit)
        codes = f32(_BOTH) + offset * T.cast(sums[0], "float32")
        signs = f32(MAGIC) + T.cast(sums[1] * 4, "float32")
        constants = local(4, "float32")
        for i, value in enumerate((unit, codes, signs, f32(0))):
            store(constants, value, i)
        at = pointer(words, shape.constants_begin + row * 4)
        access("st.shared", [constants[i] for i in range(4)], at, "f32")
        # From memory: words that are known to be equal would be one register, which is copied for
        # every product.
        at = pointer(words, i32(shape.start_begin))
        access("st.shared", [u32(MAGIC_BITS)] * 4, at)

    def start(self) -> None:
        """Read what `leave_queries` left of the rows of a block."""
        shape, own = self._shape, local(4, "float32")
        for half in range(2):
            row = T.truncdiv(self._lane, 4) + 8 * half
            at = pointer(self._words, shape.constants_begin + row * 4)
            access("ld.shared", [own[e] for e in range(4)], at, "f32")
            for i, kept in enumerate((self.unit, self._codes, self._signs)):
                store(kept, own[i], 0, half)
        access("ld.shared", self._start, pointer(self._words, i32(shape.start_begin)))

    def score(self, codes, scales: TokenScales, scores) -> None:
        """Scores ``[0, octet of tokens, place]`` of a lane's words of K ``[octet, word]``."""
        shape, words = self._shape, self._words
        abreast = min(_ABREAST, shape.octets)
        for first in range(0, shape.octets, abreast):
            sums = [Sums(3, [self._start] * 3) for _ in range(abreast)]
            # An address of their own: queries that are known to be read again stay in registers.
            own = held("int32", 4 * self._lane, self._lane)
            for word in range(shape.key_words):
                queries = []
                for part in range(3):
                    a = local(4, "uint32")
                    at = pointer(words, own + (part * shape.byte_steps + word) * OPERAND_WORDS)
                    access("ld.shared", [a[e] for e in range(4)], at)
                    queries.append([a[e] for e in range(4)])
                # Of all octets before their products, which then need not wait for one another.
                operands = [self._operands(codes[first + i, word]) for i in range(abreast)]
                for own_sums, (found, tops) in zip(sums, operands, strict=True):
                    own_sums.add(0, _CODES, queries[0], found)
                    own_sums.add(1, _CODES, queries[1], found)
                    own_sums.add(2, _SIGNS, queries[2], tops)
            for i, own_sums in enumerate(sums):
                octet, values = first + i, own_sums.values
                factors, residuals = scales.keys(octet), scales.residuals(octet)
                for e in range(4):
                    high, low, signs = (as_float(values[n, e]) for n in range(3))
                    code = high * f32(256) + low - self._codes[0, e // 2]
                    score = residuals[e % 2] * (signs - self._signs[0, e // 2]) + code
                    store(scores, score * factors[e % 2], 0, octet, e)

    def _operands(self, packed) -> tuple[list, list]:
        """Eight codes as bytes of centroids, and their signs as bytes of 0 or 8."""
        selector, found, tops = (local(2, "uint32") for _ in range(3))
        store(selector, code_nibbles(self._shape.key, packed, 0, None), 0)
        store(selector, T.shift_right(selector[0], u32(16)), 1)
        for half in range(2):
            ptx("prmt.b32", found[half], self._table[0], self._table[1], selector[half])
            above = T.shift_right(packed, u32(4)) if half else packed
            store(tops, T.bitwise_and(above, u32(_LOW_TOPS)), half)
        return [found[half] for half in range(2)], [tops[half] for half in range(2)]
