"""A row that a warp shares on GPUs, in ``attend``, ``prefill`` and ``mla``: queries and outputs.

Lanes have neighbours of a row of 2^n values, and rotate it by shuffles. Of others they have every
32nd value, and each factor of the matrix is taken in shared memory, a lane all values of one vector
of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T

from tq_tvm.formats import hadamard_factors, rotation_signs
from tq_tvm.kernels.decode_query import rotate_row, turn_signs
from tq_tvm.kernels.device import (
    PAIR,
    access,
    as_bits,
    as_float,
    let,
    local,
    pointer,
    ptx,
    store,
    u32,
    warp_barrier,
    when,
)
from tq_tvm.kernels.lane_rows import factor_rows
from tq_tvm.spec import CacheSpec

__all__ = ["WarpRow", "exchange_words", "warp_rows"]

_WIDE = 16
"""Neighbours of a lane from which on it writes 16 bytes at a time."""

_LARGEST = 16
"""Values of a vector of a power of two."""


@dataclasses.dataclass(frozen=True)
class WarpRow:
    """Static sizes, and words of dynamic shared memory: from ``begin`` on the row may be there."""

    spec: CacheSpec
    dim: int
    words: Any
    begin: Any

    @property
    def by_shuffles(self) -> bool:
        """Whether lanes have neighbours."""
        return self.dim & (self.dim - 1) == 0

    @property
    def row_values(self) -> int:
        """Values of a lane, at most."""
        return -(-self.dim // 32)

    @property
    def rotated(self) -> bool:
        """Whether the format has a rotation."""
        return self.spec.cache_format.rotation != "none"

    def places(self, lane) -> Iterator[tuple[int, Any, int]]:
        """Index of each value of a lane; its coordinate is the sum of the other two."""
        count = self.row_values
        for i in range(count):
            if self.by_shuffles:
                yield i, lane * count, i
            elif 32 * (i + 1) <= self.dim:
                yield i, lane, 32 * i
            else:
                with when(lane < self.dim - 32 * i):
                    yield i, lane, 32 * i

    def runs(self, lane) -> Iterator[tuple[int, Any, int]]:
        """Index of the first value of each run of neighbours, its coordinate, and how many."""
        count = self.row_values
        if self.by_shuffles:
            wide = min(count, 4)
            for i in range(0, count, wide):
                yield i, lane * count + i, wide
            return
        for i, base, extra in self.places(lane):
            yield i, base + extra, 1

    def write(self, out, x, token, head, lane) -> None:
        """Round the row, and write it."""
        count = self.row_values
        if not self.by_shuffles or count < _WIDE:
            for i, base, extra in self.places(lane):
                store(out, T.cast(x[i], self.spec.dtype), token, head, base + extra)
            return
        words = local(count // 2, "uint32")
        for i in range(0, count, 2):
            ptx(PAIR[self.spec.dtype], words[i // 2], x[i + 1], x[i])
        for i in range(0, count // 2, 4):
            four = [words[i + n] for n in range(4)]
            access("st.global", four, out.ptr_to([token, head, lane * count + 2 * i]))

    def rotate_back(self, x, lane) -> None:
        """Undo the rotation, unscaled."""
        if self.by_shuffles:
            rotate_row(self, x, lane)
            turn_signs(self, x, lane)
            return
        self.leave(x, lane)
        self.rotate(lane)
        for i, base, extra in self.places(lane):
            self.read(x, i, base + extra)
        self.turn_signs(x, lane)
        warp_barrier()

    def leave(self, x, lane) -> None:
        """Put the row into shared memory."""
        for i, base, extra in self.places(lane):
            self._write(x[i], base + extra)
        warp_barrier()

    def read(self, x, i: int, coordinate) -> None:
        """Read one value from shared memory."""
        ptx("ld.shared.f32", x[i], pointer(self.words, self.begin + coordinate))

    def _write(self, value, coordinate) -> None:
        ptx("st.shared.f32", pointer(self.words, self.begin + coordinate), value)

    def turn_signs(self, x, lane) -> None:
        """Multiply by the signs of the format's rotation."""
        if self.spec.cache_format.rotation != "signed_hadamard":
            return
        signs = rotation_signs(self.dim)
        for i in range(self.row_values):
            own = signs[32 * i : 32 * i + 32]
            negative = sum((sign < 0) << at for at, sign in enumerate(own))
            bit = T.shift_right(u32(negative), T.cast(lane, "uint32"))
            store(x, as_float(T.bitwise_xor(as_bits(x[i]), T.shift_left(bit, u32(31)))), i)

    def rotate(self, lane) -> None:
        """Multiply the row in shared memory by the Hadamard matrix, unscaled."""
        *orders, power = hadamard_factors(self.dim)
        inner = 1
        while power > 1:
            order = min(power, _LARGEST)
            self._factor(order, inner, lane)
            inner, power = inner * order, power // order
        for order in reversed(orders):
            self._factor(order, inner, lane)
            inner *= order

    def _factor(self, order: int, apart: int, lane) -> None:
        vectors = self.dim // order
        for first in range(0, vectors, 32):
            vector = let(lane + first)
            with when(vector < vectors):
                outer, low = T.truncdiv(vector, apart), T.truncmod(vector, apart)
                start = let(outer * (order * apart) + low)
                row = local(order, "float32")
                for i in range(order):
                    self.read(row, i, start + i * apart)
                for i, value in enumerate(factor_rows(order, [row[i] for i in range(order)])):
                    self._write(value, start + i * apart)
        warp_barrier()


def exchange_words(spec: CacheSpec) -> int:
    """Words of shared memory that a warp needs for its query and output rows."""
    rows = warp_rows(spec, None, 0)
    return max(0 if row.by_shuffles else row.dim for row in rows)


def warp_rows(spec: CacheSpec, words, begin) -> tuple[WarpRow, WarpRow]:
    """A query and an output, and where the warp's `exchange_words` of shared memory begin."""
    return WarpRow(spec, spec.head_dim, words, begin), WarpRow(spec, spec.value_dim, words, begin)
