"""Queries of a CTA of ``decode_cuda``: rotated, in 16 bits, in the order of K's bytes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

from tvm.script import tirx as T

from tq_tvm.formats import rotation_signs
from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.decode_threads import Standing
from tq_tvm.kernels.device import (
    FULL_WARP,
    access,
    as_bits,
    as_float,
    byte_perm,
    f32,
    held,
    high_half,
    i32,
    let,
    local,
    low_half,
    ptx,
    shared,
    shared_address,
    shuffle_xor,
    store,
    u32,
    when,
)
from tq_tvm.spec import CacheSpec

__all__ = ["MAGIC", "MAGIC_BITS", "Query", "QueryMemory", "rotate_row", "turn_signs"]

FULL_SCALE = 127 * 256
"""Largest code of a query; its high byte is signed."""

MAGIC = float(3 << 22)
"""Added to an integer below 2^22, in the bits, it makes the float of their sum."""

MAGIC_BITS = 0x4B400000

SMALLEST_SCALE = 1e-30
"""A scale of logits that is not zero, which would let masked tokens pass."""


class SharedRow(Protocol):
    """Static sizes of a row whose neighbours are in lanes of a warp, 2^n of them in each."""

    @property
    def spec(self) -> CacheSpec:
        """The kernel's spec."""

    @property
    def row_values(self) -> int:
        """Values of a lane."""


def rotate_row(shape: SharedRow, x, lane) -> None:
    """Unscaled Hadamard transform of a row that a warp shares, in place."""
    count = shape.row_values
    y = local(count, "float32")
    for stage in range(count.bit_length() - 1):
        for i in range(count):
            store(y, x[i], i)
        for i in range(count):
            other = i ^ (1 << stage)
            store(x, y[other] - y[i] if i & (1 << stage) else y[i] + y[other], i)
    for stage in range(5):
        sign = let(T.Select(T.bitwise_and(lane, 1 << stage) != 0, f32(-1), f32(1)))
        for i in range(count):
            store(y, shuffle_xor(x[i], 1 << stage), i)
        for i in range(count):
            store(x, y[i] + sign * x[i], i)


def turn_signs(shape: SharedRow, x, lane) -> None:
    """Multiply a row that a warp shares by the signs of its format's rotation, in place."""
    if shape.spec.cache_format.rotation != "signed_hadamard":
        return
    count = shape.row_values
    signs = rotation_signs(32 * count)
    for i in range(count):
        negative = sum((signs[at * count + i] < 0) << at for at in range(32))
        lane_bit = T.shift_right(u32(negative), T.cast(lane, "uint32"))
        store(x, as_float(T.bitwise_xor(as_bits(x[i]), T.shift_left(lane_bit, u32(31)))), i)


@dataclasses.dataclass(frozen=True)
class QueryMemory:
    """Shared memory: codes, units and sums of bytes of each part, fragments of each column."""

    codes: Any
    unit: Any
    sums: Any
    fragments: Any

    @classmethod
    def allocate(cls, shape: Shape) -> QueryMemory:
        """Shared memory for all of a CTA."""
        in_shared = shape.config.query_in_shared
        count = shape.abreast
        return cls(
            codes=shared((count, 2, shape.heads, shape.spec.head_dim // 4), "uint32"),
            unit=shared((count, shape.heads), "float32"),
            sums=shared((count, 2, shape.heads), "int32"),
            fragments=shared((shape.columns, shape.key_words, shape.parts, 32, 4), "uint32")
            if in_shared
            else None,
        )


class Query:
    """What a lane keeps of the queries: fragments, factors, and where sums start.

    A lane's accumulators have columns 2 t and 2 t + 1. In packed kernels these are heads
    (2 t) % 4 and the next one, lanes with t < 2 having the high bytes and the others the low bytes;
    otherwise they are the heads themselves.
    """

    def __init__(self, shape: Shape, memory: QueryMemory, own: Standing) -> None:
        self._shape, self._memory, self._own = shape, memory, own
        self._part, self._lane, self._g, self._t = own.part, own.lane, own.g, own.t
        self._turns = -(-shape.heads // shape.part_warps)
        self._rows = local((self._turns, shape.row_values), "float32")
        self.low_bytes = let(own.t >= 2)
        self.third_bit = let(T.cast(own.t // 2, "uint32")) if len(shape.key_planes) > 1 else None
        self.scale = local(2, "float32")
        self.row_weight = local(1, "float32")
        self.other_weight = local(1, "float32")
        if shape.packed:
            factor = T.Select(self.low_bytes, f32(256), f32(1 / 256))
            store(self.other_weight, held("float32", factor, own.lane))
        self.code_start = local((shape.code_sums, 4), "uint32")
        self.sign_start = local((shape.parts, 4), "uint32")
        self._fragments = None
        if shape.config.query_in_shared:
            first = memory.fragments.ptr_to([own.column, 0, 0, own.lane, 0])
            self._fragments_at = held("uint32", shared_address(first), own.lane)
        else:
            self._fragments = local((shape.key_words, shape.parts, 4), "uint32")

    def load(self, q, sequence) -> None:
        """Read the queries, a warp a head, which `quantise` waits for.

        Without branches, so that other loads can be on their way; the last head is repeated.
        """
        shape, count = self._shape, self._shape.row_values
        words = count // 2
        read = local((self._turns, words), "uint32")
        for turn in range(self._turns):
            head = T.min(turn * shape.part_warps + self._own.part_warp, self._own.heads - 1)
            for first in range(0, words, 4):
                at = q.ptr_to(
                    [sequence, self._own.first_head + head, self._lane * count + 2 * first]
                )
                piece = [read[turn, i] for i in range(first, min(first + 4, words))]
                access("ld.global.nc", piece, at)
        for turn in range(self._turns):
            for i in range(count):
                half = high_half if i % 2 else low_half
                store(self._rows, half(shape.spec.dtype, read[turn, i // 2]), turn, i)

    def quantise(self) -> None:
        """Rotate and quantise what was read; the caller puts a barrier behind it."""
        shape, memory, lane = self._shape, self._memory, self._lane
        count = shape.row_values
        words = max(1, count // 4)
        x, top = local(count, "float32"), local(1, "float32")
        code, sums = local(count, "int32"), local(2, "int32")
        word = local((2, words), "uint32")
        bits = local(1, "uint32")
        for turn in range(self._turns):
            head = let(turn * shape.part_warps + self._own.part_warp)
            with when(head < shape.heads):
                for i in range(count):
                    store(x, self._rows[turn, i], i)
                turn_signs(shape, x, lane)
                rotate_row(shape, x, lane)
                store(top, f32(0))
                for i in range(count):
                    store(x, x[i] * f32(shape.spec.head_dim**-0.5), i)
                    # What is not a number is its row's unit, as codes have none for it.
                    ptx("max.NaN.f32", top[0], top[0], T.fabs(x[i]))
                # Of floats that are not negative, bits have their order.
                ptx("redux_sync.max.u32", bits[0], as_bits(top[0]), u32(FULL_WARP))
                store(top, as_float(bits[0]))
                inverse = let(T.Select(top[0] > f32(0), f32(FULL_SCALE) / top[0], f32(0)))
                for part in range(2):
                    store(sums, i32(0), part)
                    for j in range(words):
                        store(word, u32(0), part, j)
                for i in range(count):
                    store(code, T.call_pure_extern("int32", "__float2int_rn", x[i] * inverse), i)
                    high = let(T.shift_right(code[i] + 128, 8))
                    store(sums, sums[0] + high, 0)
                    store(sums, sums[1] + (code[i] - high * 256), 1)
                    for part, byte in ((0, high), (1, code[i])):
                        placed = T.cast(T.bitwise_and(byte, 255), "uint32")
                        placed = T.shift_left(placed, u32(i % 4 * 8))
                        store(word, T.bitwise_or(word[part, i // 4], placed), part, i // 4)
                for part in range(2):
                    ptx("redux_sync.add.s32", sums[part], sums[part], u32(FULL_WARP))
                    self._store_codes(part, head, word)
                with when(lane == 0):
                    store(memory.unit, top[0] * f32(1.0 / FULL_SCALE), self._part, head)
                    for part in range(2):
                        store(memory.sums, sums[part], self._part, part, head)

    def _store_codes(self, part: int, head, word) -> None:
        count, lane, codes = self._shape.row_values, self._lane, self._memory.codes
        at = self._part
        if count == 2:
            upper = let(T.shift_left(shuffle_xor(word[part, 0], 1), u32(16)))
            with when(lane % 2 == 0):
                store(codes, T.bitwise_or(word[part, 0], upper), at, part, head, lane // 2)
        else:
            for j in range(count // 4):
                store(codes, word[part, j], at, part, head, lane * (count // 4) + j)

    def prepare(self, sm_scale) -> None:
        """Fragments and factors, after the barrier behind `quantise`.

        Where fragments go to shared memory, the caller puts another barrier behind this.
        """
        shape = self._shape
        for i in range(0, shape.key_words, 2):
            for part in range(shape.parts):
                if self._fragments is None:
                    turn = (i // 2 * shape.parts + part) % shape.config.warps
                    with when(self._own.warp == turn):
                        self._arrange(i, part)
                else:
                    self._arrange(i, part)
        for j in range(2):
            self._prepare_column(j, sm_scale)
        sign = let(T.Select(sm_scale < f32(0), f32(-shape.centroid), f32(shape.centroid)))
        if shape.packed:
            # A lane adds its neighbour's bytes to its own, in units of its own.
            store(self.row_weight, sign * T.Select(self.low_bytes, f32(1), f32(256)))
        else:
            store(self.row_weight, sign)

    def _arrange(self, i: int, part: int) -> None:
        """Two words of K meet these: bytes of each one's nibbles, then low, then high ones of both.

        What one product takes is side by side, or it would have to be moved.
        """
        shape, codes = self._shape, self._memory.codes
        byte = self._g // 4 if shape.packed else part
        head = self._g % 4 if shape.packed else self._g
        low, high = local(2, "uint32"), local(2, "uint32")
        for n in range(2):
            at = let(self._word(i, n))
            store(low, codes[self._part, byte, head, at], n)
            store(high, codes[self._part, byte, head, at + shape.spec.head_dim // 8], n)
        both = [byte_perm(low[n], high[n], order) for n in range(2) for order in (0x5140, 0x7362)]
        apart = [low[0], low[1], high[0], high[1]]
        for n, values in enumerate((both, apart) if shape.residual else (both,)):
            for e, value in enumerate(values):
                if self._fragments is None:
                    fragments, column = self._memory.fragments, self._own.column
                    store(fragments, value, column, i + n, part, self._lane, e)
                else:
                    store(self._fragments, value, i + n, part, e)

    def _word(self, i: int, n: int):
        """Where the codes are that word ``i + n`` of a lane's part of K meets; i is even."""
        shape = self._shape
        # Between a lane's words of a slice and the next lane's are those of other slices.
        first = (self._t * shape.slices + self._own.slice) * shape.key_plane_words
        if shape.key_planes[0] == 4:
            return first + i + n
        # Pairs of bits: first those that are low nibbles once they are apart, then the others.
        return first + i // 2 + n * (shape.spec.head_dim // 16)

    def _prepare_column(self, j: int, sm_scale) -> None:
        """Scale of a column's logits, and the constants of its score, as first sums.

        Codes lie ``key.offset`` off the centroids, signs are 0 or 128 for -1 and 1: both make a
        multiple of the sum of the query, which the sums start from. `MAGIC_BITS` on top makes them
        floats without a conversion.
        """
        shape, memory = self._shape, self._memory
        head = let((2 * self._t + j) % 4 if shape.packed else 2 * self._t + j)
        scale = memory.unit[self._part, head] * T.fabs(sm_scale) * f32(math.log2(math.e))
        # Not their maximum, which would drop what is not a number.
        smallest, scale = f32(SMALLEST_SCALE), let(scale)
        store(self.scale, T.Select(scale < smallest, smallest, scale), j)
        high, low = (memory.sums[self._part, part, head] for part in range(2))
        if shape.slices > 1:
            # Constants are in one slice's scores.
            high, low = (let(T.Select(self._own.slice == 0, x, i32(0))) for x in (high, low))
        codes = [i32(0)] * shape.code_sums
        if not shape.wide:
            offset = let(i32(0) - T.shift_right(high * 256 + low, 1))
            above, below = T.shift_right(offset, 8), T.bitwise_and(offset, 255)
            codes = [T.Select(self.low_bytes, below, above)] if shape.packed else [above, below]
        signs = [T.Select(self.low_bytes, low, high)] if shape.packed else [high, low]
        for start, values in (
            (self.code_start, codes),
            (self.sign_start, [i32(0) - 64 * value for value in signs]),
        ):
            for n, value in enumerate(values):
                store(start, T.cast(i32(MAGIC_BITS) + value, "uint32"), n, j)
                # Words that are known to be equal would be kept once, and copied for every product.
                store(start, held("uint32", start[n, j], self._lane), n, 2 + j)

    def fetch(self):
        """The fragments as registers ``[word of K, part, 4]``: of two words, bytes then nibbles."""
        if self._fragments is not None:
            return self._fragments
        shape = self._shape
        fragments = local((shape.key_words, shape.parts, 4), "uint32")
        for i in range(0, shape.key_words, 1 if shape.residual else 2):
            for part in range(shape.parts):
                at = self._fragments_at + u32(512 * (i * shape.parts + part))
                access("ld.shared", [fragments[i, part, e] for e in range(4)], at)
        return fragments
