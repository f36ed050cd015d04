"""Softmax and weighted sums of V of a tile in ``decode_cuda``, in integers.

V's levels of two and three bits are affine in the bits of a code and their parity
(`decode_planes`): no look-up is needed, one AND leaves bits of four tokens as bytes, and each plane
of bits has weights of its own in the same unit, which add up in one integer sum. The constant is a
sum of weights. A field (pair of bits) has sums 4^field too large, which is put right at the end,
and of nested planes the last one has the other fields' sums in its own. Levels of four bits are
looked up as two signed bytes.

Weights are 15-bit integers, high and low byte apart: one column each in packed kernels, else a
product each. They are cut off, not rounded, after a constant in [0, 1) was added that differs from
lane to lane, so that thousands of weights below one unit do not vanish or double together. A float
between 2^15 and 2^16 holds such an integer in its two middle bytes.

Weights are relative to a running bound of logits and of V's norms. Where a tile exceeds it, and
before sums of 2^31 could come about, the sums are added to floats in shared memory, and start anew.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels.decode_pages import PageReader, ValueRing, value_bytes
from tq_tvm.kernels.decode_planes import Plane
from tq_tvm.kernels.decode_query import Query
from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.decode_threads import Standing
from tq_tvm.kernels.device import (
    FULL_WARP,
    LOWEST,
    MASKED,
    access,
    as_bits,
    as_float,
    byte_perm,
    f32,
    from_half,
    held,
    i32,
    let,
    local,
    mma,
    ptx,
    reduce_together,
    shared,
    shuffle_xor,
    store,
    u32,
    when,
)

__all__ = ["WEIGHT_TOP", "SumMemory", "Values"]

_PRODUCT = "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32"
_SIGNED_PRODUCT = "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32"
_LOW_NIBBLES = 0x0F0F0F0F
_OTHER_TABLE = 0x88888888
_TRANSPOSE = "movmatrix.sync.aligned.m8n8.trans.b16"

WEIGHT_TOP = 32766.0
"""Largest weight: with what is added to it, below 2^15."""

WEIGHT_BASE = 32768.0

NORM_MARGIN = 1.25
"""Norms of V differ little: with this margin their bound seldom moves."""


@dataclasses.dataclass(frozen=True)
class SumMemory:
    """Shared memory of a CTA's warps: sums as they lie in registers, and the softmax state."""

    values: Any
    bound: Any
    total: Any
    weights: Any
    norm: Any

    @classmethod
    def allocate(cls, shape: Shape) -> SumMemory:
        """Shared memory for every warp."""
        warps = shape.config.warps * shape.columns
        return cls(
            values=shared((warps, shape.quads, 32, 4), "float32"),
            bound=shared((warps, shape.heads), "float32"),
            total=shared((warps, shape.heads), "float32"),
            weights=shared((warps, shape.heads), "float32"),
            norm=shared(warps, "float32"),
        )


class Values:
    """A warp's sums, and the softmax state of a lane's two columns.

    ``bound`` is in units of log2; ``reach`` is the same in units of the scores. ``weights`` sums
    the weights of V, ``total`` those of the softmax. ``own`` is the first of the lane's tokens.
    """

    def __init__(self, shape: Shape, query: Query, memory: SumMemory, own: Standing, warp) -> None:
        """``warp`` counts those of the CTA."""
        self._shape, self._query, self._memory = shape, query, memory
        g, t = own.g, own.t
        self._slice, self._warp, self._lane, self._g, self._t = own.slice, warp, own.lane, g, t
        self.sums = local((shape.parts, shape.quads, 4), "uint32")
        self.scores = local((shape.own_tokens, 2), "float32")
        self._norms = local(shape.own_tokens, "float32")
        self._bound, self._reach, self._total, self._weights = (
            local(2, "float32") for _ in range(4)
        )
        self._norm, self._unit = local(1, "float32"), local(1, "float32")
        self._tiles = local(1, "int32")
        self.own = own.token
        self._meta_half = local(1, "uint32")
        self._low_columns = let(g >= 4)
        self._dither = local(2, "float32")
        # Of the lanes that weigh for one head: their mean is a half, or sums would drift.
        spread = let((g % 2) * 4 + (g // 2 % 2) * 2 + g // 4)
        steps = 8
        if shape.packed:
            spread, steps = let(spread * 2 + t // 2), 16
        for i in range(2):
            part = (T.cast(spread, "float32") + f32(0.25 + 0.5 * i)) * f32(1 / steps)
            store(self._dither, part + f32(WEIGHT_BASE), i)
        # Selectors of the byte that a lane's column wants, and of the one that its partner's wants.
        self._select = local(2, "uint32")
        for i, (high, low) in enumerate(((0x7531, 0x6420), (0x6420, 0x7531))):
            store(self._select, held("uint32", T.Select(g < 4, u32(high), u32(low)), own.lane), i)

    def hold_table(self, unknown_zero) -> None:
        """Look-ups of values, if there are any, in registers, as `key_codes.key_table`'s."""
        words = [word for pair in self._shape.value.tables for word in pair]
        if words:
            self._table = local(len(words), "uint32")
            for i, word in enumerate(words):
                hidden = T.bitwise_or(u32(word), unknown_zero)
                store(self._table, held("uint32", hidden, self._lane), i)

    def find_metas(self, reader: PageReader, kv_head) -> None:
        """Work out which half of its word is V's meta of the lane's own tokens."""
        selectors = (0x1044, 0x3244) if self._shape.spec.dtype == "bfloat16" else (0x4410, 0x4432)
        odd = reader.odd_meta(kv_head, self.own)
        selector = T.Select(odd, u32(selectors[1]), u32(selectors[0]))
        store(self._meta_half, held("uint32", selector, self._lane))

    def start(self) -> None:
        """No tokens yet."""
        for j in range(2):
            store(self._bound, f32(LOWEST), j)
            store(self._reach, f32(MASKED), j)
            store(self._total, f32(0), j)
            store(self._weights, f32(0), j)
        store(self._norm, f32(1e-30))
        store(self._unit, f32(0))
        store(self._tiles, i32(-1))
        self._clear()
        for quad in range(self._shape.quads):
            access("st.shared", [f32(0)] * 4, self._address(quad), "f32")

    def _clear(self) -> None:
        for part in range(self._shape.parts):
            for quad in range(self._shape.quads):
                for e in range(4):
                    store(self.sums, u32(0), part, quad, e)

    def _address(self, quad: int):
        # By instruction, not by TVM's stores: TVM would want a barrier between lanes' own words.
        return self._memory.values.ptr_to([self._warp, quad, self._lane, 0])

    def add(self, ring: ValueRing, first_token, seq_len, low=None) -> None:
        """Add the tokens of a tile, whose scores are in ``scores``: none before ``low``."""
        metas = local(self._shape.own_tokens, "uint32")
        ring.metas(metas)
        self._mask(metas, first_token, seq_len, low)
        self._move_bound()
        # Ahead of the weights, whose making hides how long it takes.
        rows = [ring.codes(step) for step in range(self._shape.score_tiles // 2)]
        weights = self._weigh()
        for step, read in enumerate(rows):
            self._multiply(read, self._operands(weights, step))

    def _mask(self, metas, first_token, seq_len, low) -> None:
        """Widen V's norms; drop tokens past the end or before ``low``, whatever their metas are."""
        shape, norms = self._shape, self._norms
        apart = shape.own_apart
        for n in range(shape.own_tokens):
            # bfloat16 becomes the upper half of a float, float16 is widened.
            ptx("prmt.b32", metas[n], metas[n], u32(0), self._meta_half[0])
            if shape.spec.dtype == "bfloat16":
                store(norms, as_float(metas[n]), n)
            else:
                store(norms, from_half(shape.spec.dtype, metas[n]), n)
        some = first_token + shape.config.tile > seq_len
        if low is not None:
            some = T.Or(some, first_token < low)
        with when(some):
            for n in range(shape.own_tokens):
                token = first_token + self.own + apart * n
                outside = token >= seq_len
                if low is not None:
                    outside = T.Or(outside, token < low)
                with when(outside):
                    for j in range(2):
                        store(self.scores, f32(MASKED), n, j)
                    store(norms, f32(0), n)

    def _move_bound(self) -> None:
        """Seldom does more than compare, once the bounds have settled."""
        shape, scale = self._shape, self._query.scale
        bound, reach, norm = self._bound, self._reach, self._norm
        peak = local(3, "float32")
        for j in range(3):
            values = [
                self.scores[n, j] if j < 2 else self._norms[n] for n in range(shape.own_tokens)
            ]
            highest = values[0]
            for value in values[1:]:
                highest = T.max(highest, value)
            store(peak, highest, j)
        store(self._tiles, self._tiles[0] + 1)
        full = self._tiles[0] > shape.value.tokens // shape.config.tile
        higher = T.Or(peak[0] > reach[0], peak[1] > reach[1])
        move = T.cast(T.Or(higher, T.Or(peak[2] > norm[0], full)), "int32")
        with when(T.cuda.any_sync(u32(FULL_WARP), move) != 0):
            lanes = (2, 4, 8, 16) if shape.packed else (4, 8, 16)
            reduce_together([(peak, j) for j in range(3)], T.max, lanes)
            factor = local(2, "float32")
            widest = let(T.Select(peak[2] > norm[0], peak[2] * f32(NORM_MARGIN), norm[0]))
            for j in range(2):
                above = peak[j] * scale[j] + f32(float(shape.config.headroom))
                highest = let(T.Select(peak[j] > reach[j], above, bound[j]))
                shrink = let(T.exp2(bound[j] - highest))
                store(factor, shrink * (norm[0] / widest), j)
                store(self._total, self._total[j] * shrink, j)
                store(self._weights, self._weights[j] * factor[j], j)
                store(bound, highest, j)
                store(reach, highest / scale[j], j)
            store(norm, widest)
            store(self._unit, f32(WEIGHT_TOP) / widest)
            # The first tile finds no sums.
            with when(self._tiles[0] > 0):
                self._flush(factor)
            store(self._tiles, i32(0))

    def _flush(self, factor=None) -> None:
        """Add the sums to shared memory, scale what is there, and start anew."""
        shape, floats = self._shape, local(4, "float32")
        for quad in range(shape.quads):
            address = self._address(quad)
            access("ld.shared", [floats[e] for e in range(4)], address, "f32")
            for e in range(4):
                field = 2 * (quad % (shape.value.fields // 2)) + e // 2
                value = self._sum(0, quad, e)
                if not shape.packed:
                    value = value * f32(256) + self._sum(1, quad, e)
                value = value * f32(float(shape.value.step) ** -field) + floats[e]
                store(floats, value if factor is None else value * factor[e % 2], e)
            access("st.shared", [floats[e] for e in range(4)], address, "f32")
        self._clear()

    def _sum(self, part: int, quad: int, e: int):
        """A field's sum as a float."""
        value, sums = self._shape.value, self.sums
        of_byte = value.fields // 2
        own = sums[part, quad, e]
        if value.nested and e // 2 and quad % of_byte == of_byte - 1:
            first = quad - quad % of_byte
            others = [(q, e % 2 + 2 * half) for q in range(first, quad + 1) for half in range(2)]
            for place in others[:-1]:
                own = own - sums[(part, *place)]
        return T.cast(T.cast(own, "int32"), "float32")

    def _weigh(self):
        """Weights of own tokens, moved to where the columns' lanes want them: ``[plane, n]``.

        A word has 16 bits of two neighbouring tokens of a column's head.
        """
        shape, query, dither = self._shape, self._query, self._dither
        planes = shape.value.planes
        count = len(planes)
        moved = local((count, shape.own_tokens), "uint32")
        raised, p, word = local((count, 2), "float32"), local(2, "float32"), local(1, "uint32")
        for n in range(shape.own_tokens):
            low = let(self._norms[n] * self._unit[0])
            units = [low, *(let(low * f32(plane.weight)) for plane in planes[1:])]
            for j in range(2):
                store(p, T.exp2(self.scores[n, j] * query.scale[j] - self._bound[j]), j)
                store(self._total, self._total[j] + p[j], j)
                store(self._weights, self._weights[j] + p[j] * low, j)
                for plane, unit in enumerate(units):
                    store(raised, p[j] * unit + dither[(n + plane) % 2], plane, j)
            for plane in range(count):
                both = byte_perm(as_bits(raised[plane, 0]), as_bits(raised[plane, 1]), 0x6521)
                store(word, both)
                ptx(_TRANSPOSE, moved[plane, n], word[0])
        return moved

    def _operands(self, moved, step: int):
        """Weights of 32 tokens as operands ``[plane, part, half]``.

        The halves are the even and the odd octets; a word has two tokens of two octets.
        """
        shape = self._shape
        count = len(shape.value.planes)
        operands = local((count, shape.parts, 2), "uint32")
        for plane in range(count):
            if shape.packed:
                words = local(3, "uint32")
                pair = [moved[plane, 2 * step], moved[plane, 2 * step + 1]]
                ptx("prmt.b32", words[0], *pair, self._select[0])
                ptx("prmt.b32", words[1], *pair, self._select[1])
                store(words, shuffle_xor(words[1], 16), 2)
                even = T.Select(self._low_columns, words[2], words[0])
                odd = T.Select(self._low_columns, words[0], words[2])
                store(operands, even, plane, 0, 0)
                store(operands, odd, plane, 0, 1)
            else:
                for half in range(2):
                    pair = [moved[plane, 4 * step + half], moved[plane, 4 * step + 2 + half]]
                    for part, selector in enumerate((0x7531, 0x6420)):
                        store(operands, byte_perm(*pair, selector), plane, part, half)
        return operands

    def _multiply(self, rows, operands) -> None:
        """32 tokens: bytes of four tokens in a word, then a product for each plane and field."""
        shape = self._shape
        sources = {"pairs": value_bytes(shape, rows)}
        if shape.third_chunks:
            sources["third"], sources["parity"] = self._third_bits(sources["pairs"], rows)
        if shape.value.tables:
            self._multiply_levels(sources["pairs"], operands)
            return
        bits = local(4, "uint32")
        for quad in range(shape.quads):
            byte, first_field = quad // 2, 2 * (quad % 2)
            for number, plane in enumerate(shape.value.planes):
                for e in range(4):
                    source = sources[plane.source][e // 2, byte]
                    store(bits, self._masked(plane, source, first_field + e % 2), e)
                for part in range(shape.parts):
                    result = [self.sums[part, quad, e] for e in range(4)]
                    mma(
                        _PRODUCT,
                        result,
                        [bits[e] for e in range(4)],
                        [operands[number, part, 0], operands[number, part, 1]],
                        result,
                    )

    def _masked(self, plane: Plane, source, field: int):
        """A plane's bits of a field, in bytes of four tokens."""
        value, mask = self._shape.value, plane.bits << 2 * field
        if value.nested and field == value.fields - 1:
            mask = sum(plane.bits << 2 * f for f in range(value.fields))
        if plane.inverted:
            source = T.bitwise_not(source)
        return source if mask == 0xFF else T.bitwise_and(source, u32(mask * 0x01010101))

    def _multiply_levels(self, codes, operands) -> None:
        """Two codes a byte: looked up twice, see `decode_tables.double_bytes`."""
        shape = self._shape
        selector, found = local((2, 2), "uint32"), local(4, "uint32")
        for byte in range(shape.value_bytes):
            for half in range(2):
                # The low nibbles of four tokens side by side, then the high ones.
                word = codes[half, byte]
                by4, by8 = let(T.shift_right(word, u32(4))), let(T.shift_right(word, u32(8)))
                low, high = (
                    T.bitwise_or(
                        T.bitwise_and(a, u32(_LOW_NIBBLES)), T.bitwise_and(b, u32(0xF0F0F0F0))
                    )
                    for a, b in ((word, by4), (by4, by8))
                )
                both = let(byte_perm(let(low), let(high), 0x6420))
                store(selector, both, half, 0)
                store(selector, T.bitwise_xor(both, u32(_OTHER_TABLE)), half, 1)
            for plane, table in itertools.product(range(len(shape.value.planes)), range(2)):
                at = 4 * plane + 2 * table
                for e in range(4):
                    nibbles = selector[e // 2, table]
                    nibbles = T.shift_right(nibbles, u32(16)) if e % 2 else nibbles
                    ptx("prmt.b32", found[e], self._table[at], self._table[at + 1], nibbles)
                for part in range(shape.parts):
                    result = [self.sums[part, byte, e] for e in range(4)]
                    mma(
                        _SIGNED_PRODUCT,
                        result,
                        [found[e] for e in range(4)],
                        [operands[plane, part, 0], operands[plane, part, 1]],
                        result,
                    )

    def _third_bits(self, pairs, rows):
        """Third bits and parities in the places of pairs' low bits; of other places anything."""
        shape = self._shape
        packed = value_bytes(shape, rows, shape.value_chunks, shape.third_chunks)
        third, parity = (local((2, shape.value_bytes), "uint32") for _ in range(2))
        for half in range(2):
            for byte in range(shape.value_bytes):
                # A byte has the bits of two bytes of pairs: a half of the chunks, then the other,
                # which is another slice's where there are two.
                later = byte // 2 // shape.third_chunks
                word = packed[half, byte % (2 * shape.third_chunks)]
                if shape.slices > 1:
                    word = T.shift_right(word, T.cast(self._slice, "uint32"))
                store(third, T.shift_right(word, u32(1)) if later else word, half, byte)
                both = T.bitwise_xor(pairs[half, byte], T.shift_right(pairs[half, byte], u32(1)))
                store(parity, T.bitwise_xor(both, third[half, byte]), half, byte)
        return third, parity

    def finish(self) -> None:
        """Leave everything in shared memory; the caller puts a barrier behind it."""
        shape, memory = self._shape, self._memory
        self._flush()
        lanes = (2, 4, 8, 16) if shape.packed else (4, 8, 16)
        every = [(sums, j) for j in range(2) for sums in (self._total, self._weights)]
        reduce_together(every, lambda a, b: a + b, lanes)
        for j in range(2):
            head = let(2 * self._t + j)
            with when(T.And(self._g == 0, head < shape.heads)):
                store(memory.bound, self._bound[j], self._warp, head)
                store(memory.total, self._total[j], self._warp, head)
                store(memory.weights, self._weights[j], self._warp, head)
        with when(self._lane == 0):
            store(memory.norm, self._norm[0], self._warp)
