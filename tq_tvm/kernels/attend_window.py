"""A spec's window in ``attend`` on GPUs: the newest tokens, whose rows are not quantised.

They are in rings: position p in row p % N of the sequence's, rotated and of the model's dtype, as
``fill`` leaves them. A warp attends to `WINDOW_TILE` of them at a time, behind its packed tiles,
with the same queries and into the same softmax and output, so that merging them costs nothing.

Rows go straight from global memory into operands of ``mma``: a lane reads of K what its words of
the queries meet, and of V the columns that its output has. Queries and weights are rounded to the
model's dtype.
"""

from __future__ import annotations

import itertools
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels import pages
from tq_tvm.kernels.attend_rows import QueryOperands, Softmax
from tq_tvm.kernels.attend_shape import WINDOW_TILE, AttendShape
from tq_tvm.kernels.attend_tiles import Seen
from tq_tvm.kernels.decode_window import prefetch_ring
from tq_tvm.kernels.device import (
    LOG2E,
    PAIR,
    access,
    byte_perm,
    f32,
    high_half,
    i32,
    let,
    local,
    low_half,
    mma,
    pointer,
    ptx,
    store,
    u32,
)
from tq_tvm.kernels.fragment_shape import OPERAND_WORDS
from tq_tvm.kernels.hadamard_cuda import PRODUCTS

__all__ = ["WindowRows"]

_OCTETS = WINDOW_TILE // 8
_ABREAST = 4
"""Pairs of octets of V that are on their way together."""

_STEPS = 16
"""Most steps of 16 values whose words of K are. Longer rows leave registers for half as many."""


class WindowRows:
    """K and V of a KV head in the rings, for a lane; V's columns from ``first_column`` on."""

    def __init__(
        self, shape: AttendShape, words, rings: pages.Rings, head, lane, sm_scale, first_column
    ) -> None:
        self._shape, self._words, self._column = shape, words, first_column
        self._slots = rings.slots
        self._k, self._v = pages.flat_buffer(rings.k), pages.flat_buffer(rings.v)
        self._head, self._lane, self._sm_scale = head, lane, sm_scale
        self._g, self._t = let(T.truncdiv(lane, 4)), let(T.truncmod(lane, 4))

    def prefetch(self, sequence, thread, threads: int) -> None:
        """`prefetch_ring` of a sequence."""
        rings, ring = (self._k, self._v), self._slots[sequence]
        prefetch_ring(self._shape.spec, rings, ring, self._head, thread, threads)

    def attend(self, softmax: Softmax, sequence, first, seen: Seen) -> None:
        """Scores, weights and output of the tokens from ``first`` on."""
        shape = self._shape
        rows, dtype = shape.rows, shape.spec.dtype
        product = PRODUCTS[dtype]
        ring = let(self._slots[sequence])
        scores = local((rows.row_tiles, _OCTETS, 4), "float32")
        # Of tokens past the last one, rows of others: their logits are masked.
        dim, keys = shape.spec.head_dim, []
        together = _STEPS if dim <= 16 * _STEPS else _STEPS // 2
        tokens = [first + (8 * i + self._g) for i in range(_OCTETS)]
        queries = self._arranged_queries
        if not shape.in_registers:
            queries = QueryOperands(rows, self._words, 0, i32(0), self._lane).read
        for step in range(dim // 16):
            if step % together == 0:
                chosen = range(step, min(step + together, dim // 16))
                keys = [self._keys(self._base(ring, token, dim), chosen) for token in tokens]
            a = [queries(m, step) for m in range(rows.row_tiles)]
            for octet, m in itertools.product(range(_OCTETS), range(rows.row_tiles)):
                result = [scores[m, octet, e] for e in range(4)]
                start = result if step else [f32(0)] * 4
                mma(product, result, a[m], keys[octet][step % together], start)
        if shape.in_registers:
            factor = let(self._sm_scale * f32(LOG2E))
            for index in itertools.product(*(range(int(n)) for n in scores.shape)):
                store(scores, scores[index] * factor, *index)
        softmax.weigh(scores, first, T.bool(True))
        weights = local((rows.row_tiles, 4), "uint32")
        for m, i in itertools.product(range(rows.row_tiles), range(4)):
            pair = [scores[m, i // 2, 2 * (i % 2) + e] for e in (1, 0)]
            ptx(PAIR[dtype], weights[m, i], *pair)
        self._add_values(softmax, weights, ring, first, seen)

    def _base(self, ring, token, dim: int):
        """First element of a token's row of ``dim`` values."""
        spec = self._shape.spec
        row = let(ring * spec.window + T.truncmod(token, spec.window))
        inside = T.cast(self._head * dim, "int64")
        wide = T.cast(row, "int64") * T.int64(spec.num_kv_heads * dim)
        return let(wide + inside)

    def _keys(self, base, steps: range) -> list[list[Any]]:
        """The lane's words of a row of K: an operand of each of some steps, all in registers."""
        shape = self._shape
        words = local((len(steps), 2), "uint32")
        every = [[words[n, half] for half in range(2)] for n in range(len(steps))]
        if not shape.in_registers:
            for step, operand in zip(steps, every, strict=True):
                for half in range(2):
                    at = base + T.cast(2 * self._t + (16 * step + 8 * half), "int64")
                    ptx("ld.global.nc.u32", operand[half], self._k.ptr_to([at]))
            return every
        # Codes of a lane follow each other in a row of each field, and a word of them is a step.
        fragments = shape.fragments
        own, plane = 4 * fragments.key_words, shape.spec.head_dim // fragments.key_fields
        abreast = min(2, fragments.key_words)
        for field in range(fragments.key_fields):
            for word in range(0, fragments.key_words, abreast):
                first = field * fragments.key_words + word
                at = base + T.cast(self._t * own + (field * plane + 4 * word), "int64")
                registers = [words[first + n, half] for n in range(abreast) for half in range(2)]
                access("ld.global.nc", registers, self._k.ptr_to([at]))
        return every

    def _arranged_queries(self, m: int, step: int) -> list[Any]:
        """What `QueryOperands` read, of queries as `Fragments` have them, in the model's dtype."""
        shape, fragments, a = self._shape, self._shape.fragments, local(4, "uint32")
        registers = [a[e] for e in range(4)]
        begin = fragments.halves_begin + OPERAND_WORDS * (m * fragments.steps + step)
        access("ld.shared", registers, pointer(self._words, 4 * self._lane + begin))
        if shape.spec.dtype != "float16":
            for e in range(4):
                pair = [half("float16", a[e]) for half in (high_half, low_half)]
                ptx(PAIR[shape.spec.dtype], a[e], *pair)
        return registers

    def _add_values(self, softmax: Softmax, weights, ring, first, seen: Seen) -> None:
        shape = self._shape
        product = PRODUCTS[shape.spec.dtype]
        # Tokens of the lane's weights. Where nobody sees one, zeros: 0 times nan is nan.
        tokens = [let(first + (8 * (i // 2) + i % 2) + 2 * self._t) for i in range(2 * _OCTETS)]
        bases = [self._base(ring, token, shape.spec.value_dim) for token in tokens]
        used = [let(T.Select(seen.includes(x), u32(0xFFFFFFFF), u32(0))) for x in tokens]
        pairs = range(shape.rows.columns // 16)
        for begin in pairs[::_ABREAST]:
            chosen = pairs[begin : begin + _ABREAST]
            read = [self._values(pair, bases, used) for pair in chosen]
            for pair, octets in zip(chosen, read, strict=True):
                for byte, m in itertools.product(range(2), range(shape.rows.row_tiles)):
                    result = [softmax.output[m, 2 * pair + byte, e] for e in range(4)]
                    mma(product, result, [weights[m, i] for i in range(4)], octets[byte], result)

    def _values(self, pair: int, bases, used) -> list[list[Any]]:
        """Operands of two octets of coordinates of V, ``[octet][octet of tokens]``."""
        shape = self._shape
        columns = [shape.output_coordinate(2 * pair + byte, self._g) for byte in range(2)]
        if shape.parts > 1:
            columns = [self._column + column for column in columns]
        if shape.in_registers:
            # Columns of the two octets are neighbours.
            words = local(len(bases), "uint32")
            for i, base in enumerate(bases):
                at = base + T.cast(columns[0], "int64")
                ptx("ld.global.nc.u32", words[i], self._v.ptr_to([at]))
            rows = [let(T.bitwise_and(words[i], used[i])) for i in range(len(bases))]
            return [
                [let(byte_perm(rows[i], rows[i + 1], s)) for i in range(0, len(rows), 2)]
                for s in (0x5410, 0x7632)
            ]
        halves = local((2, len(bases)), "uint16")
        for byte, (i, base) in itertools.product(range(2), enumerate(bases)):
            at = base + T.cast(columns[byte], "int64")
            ptx("ld.global.nc.u16", halves[byte, i], self._v.ptr_to([at]))
        return [
            [let(self._joined(halves, used, byte, i)) for i in range(0, len(bases), 2)]
            for byte in range(2)
        ]

    @staticmethod
    def _joined(halves, used, byte: int, i: int):
        """Two values of 16 bits as a word, without those that are not used."""
        low, high = (
            T.bitwise_and(T.cast(halves[byte, i + e], "uint32"), used[i + e]) for e in range(2)
        )
        return byte_perm(low, high, 0x5410)
