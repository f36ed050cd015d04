"""Queries of ``mla`` on GPUs: rotated rows of both parts, where products read them."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.decode_query import rotate_row, turn_signs
from tq_tvm.kernels.device import (
    LOG2E,
    PAIR,
    access,
    f32,
    high_half,
    let,
    local,
    low_half,
    pointer,
    ptx,
    store,
    u32,
    when,
)
from tq_tvm.kernels.mla_shape import BLOCK, HALF, HALF_ROPE, ROWS, MlaShape
from tq_tvm.kernels.warp_rows import WarpRow
from tq_tvm.kernels.wgmma import swizzled

__all__ = ["load_queries"]


def load_queries(shape, words, queries, sequence, first_head, rank, warp, lane, sm_scale) -> None:
    """Rotate the CTA's queries to shared memory, its columns; those of no head are zeros.

    They are scaled for logits in units of log2.
    """
    lane = let(lane)
    warps = shape.threads // 32
    rows = shape.query_blocks * ROWS
    sides = [
        _QuerySide(shape, words, queries[number], number, rank, lane, sm_scale)
        for number in range(2)
    ]
    head = let(first_head + warp)
    for side in sides:
        side.ask(sequence, head)
    with I.serial(0, -(-rows // warps)) as turn:
        row = let(turn * warps + warp)
        for side in sides:
            side.take()
        # The next row is on its way while this one is rotated.
        with when(row + warps < rows):
            for side in sides:
                side.ask(sequence, first_head + row + warps)
        with when(row < rows):
            for side in sides:
                side.leave(row)


class _QuerySide:
    """Latents or rope parts of a warp's queries."""

    def __init__(self, shape: MlaShape, words, queries, number: int, rank, lane, sm_scale) -> None:
        part = shape.spec.latent_parts[number]
        self._shape, self._words, self._queries, self._number = shape, words, queries, number
        self._lane, self._rank = lane, rank
        self._row = WarpRow(part, part.head_dim, None, 0)
        self._coming, self._pairs = (local(self._row.row_values // 2, "uint32") for _ in range(2))
        unit = LOG2E * (part.head_dim**-0.5 if self._row.rotated else 1.0)
        self._factor = let(sm_scale * f32(unit))

    def ask(self, sequence, head) -> None:
        """Begin to read the row of a head; zeros where there is none."""
        count = self._row.row_values
        for i in range(count // 2):
            store(self._coming, u32(0), i)
        with when(head < self._shape.spec.num_q_heads):
            for i in range(0, count // 2, 4):
                own = [self._coming[i + n] for n in range(min(4, count // 2))]
                at = self._queries.ptr_to([sequence, head, self._lane * count + 2 * i])
                access("ld.global.nc", own, at)

    def take(self) -> None:
        """The row that was asked for is this one."""
        for i in range(self._row.row_values // 2):
            store(self._pairs, self._coming[i], i)

    def leave(self, row) -> None:
        """Rotate this row, and write the CTA's columns where products read them."""
        shape, query, dtype = self._shape, self._row, self._shape.spec.dtype
        rounded = dtype if self._number else shape.latent_dtype
        count, dim = query.row_values, query.dim
        x = local(count, "float32")
        for i in range(count // 2):
            for e, half in enumerate((low_half, high_half)):
                store(x, half(dtype, self._pairs[i]), 2 * i + e)
        if query.rotated:
            turn_signs(query, x, self._lane)
            rotate_row(query, x, self._lane)
        pairs = local(count // 2, "uint32")
        for i in range(0, count, 2):
            ptx(PAIR[rounded], pairs[i // 2], x[i + 1] * self._factor, x[i] * self._factor)
        fields = shape.fields if self._number == 0 else 1
        owner, column = shape.column_of(dim, fields, let(self._lane * count))
        width = BLOCK if self._number == 0 else HALF_ROPE
        begin = T.truncdiv(row, ROWS) * (shape.matrix_bytes // 4)
        begin = let(begin + self._number * (HALF * ROWS // 2))
        inside = let(T.truncmod(row, ROWS))
        with when(owner == self._rank):
            for i in range(0, count // 2, 4):
                chunk = let(T.truncdiv(column, 8) + i // 4)
                block, at = T.truncdiv(chunk, width // 8), T.truncmod(chunk, width // 8)
                to = (
                    begin + (block * ROWS + inside) * (width // 2) + swizzled(width, inside, at) * 4
                )
                own = [pairs[i + n] for n in range(min(4, count // 2))]
                if len(own) < 4:
                    to = to + T.truncmod(T.truncdiv(column, 2), 4)
                access("st.shared", own, pointer(self._words, to))
