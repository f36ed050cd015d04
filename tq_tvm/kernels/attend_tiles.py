"""Tiles of K and V for ``attend`` and ``prefill`` on GPUs: packed rows, then the model's dtype.

Threads that work together, a CTA's or a warp's, have a tile of tokens in shared memory. While it is
decoded and attended to, ``cp.async`` brings the codes of the next one, and their scales come into
registers. `Tiles.decode` makes rows of the model's dtype of them, as ``flatten`` writes them, some
lanes a row (`attend_sides`). Rows of the codec ``none`` are copied to where they are read.
"""

from __future__ import annotations

from tvm.script import tirx as T

from tq_tvm.kernels.attend_sides import (
    DirectSide,
    Seen,
    Side,
    TileMemory,
    TileShape,
    as_register,
)
from tq_tvm.kernels.attend_words import WordSide
from tq_tvm.kernels.dense_rows import dense_step, turned
from tq_tvm.kernels.device import i32, local, ptx, store
from tq_tvm.kernels.lane_rows import MULTIPLIED, multiplies
from tq_tvm.kernels.page_address import TableRow

__all__ = ["Seen", "TileMemory", "TileShape", "Tiles"]


def _class_of(shape: TileShape, side: int) -> type[Side]:
    if shape.dims[side] not in MULTIPLIED or shape.threads & (shape.threads - 1):
        return WordSide
    return Side if shape.sides[side].family == "lloyd_max" else DirectSide


class Tiles:
    """K and V of one sequence and KV head, ``tile`` tokens at a time.

    `begin` a sequence; of each tile in turn: `arrive`, a barrier, `ask` for the next, `find_pages`
    of the one behind it, `decode`, a barrier, and reads.
    A warp reads values from ``first_column`` of V's rows on, a multiple of 64.
    """

    def __init__(
        self, shape: TileShape, memory: TileMemory, caches, head, thread, lane, first_column=0
    ) -> None:
        self._shape, self._memory = shape, memory
        self._sides = [
            _class_of(shape, number)(
                shape, memory, number, caches[number], caches[number + 2], head, thread
            )
            for number in range(2)
        ]
        # Matrices of ``ldmatrix``: of K, the second has later chunks and the third later tokens;
        # transposed, of V, it is the other way round.
        self._from = []
        for side in range(2):
            octet, other = (lane // 16, lane // 8 % 2) if side == 0 else (lane // 8 % 2, lane // 16)
            row = lane % 8 + 8 * octet
            moved = turned(shape.dims[side], lane % 8, other)
            begin = memory.dense[side] if shape.sides[side].packed else 0
            if side == 1:
                begin = begin + first_column // 2
            self._from.append(as_register(begin + row * shape.row_words(side) + moved))
        # Of two places for codes and scales: the one asked for last, and the one that is decoded.
        self._asked, self._arrived = local(1, "int32"), local(1, "int32")
        self._page = local(1, "int32")
        self._row = TableRow(memory.words.ptr_to([as_register(thread)]))
        self.start()

    def start(self) -> None:
        """No tile is on its way."""
        store(self._asked, i32(0))
        store(self._arrived, i32(self._shape.packed_words))

    def _turn(self, place) -> None:
        store(place, self._shape.packed_words - place[0])

    def begin(self, table, sequence) -> None:
        """Go to a sequence's row of the table, before `find_pages`."""
        self._row.begin(table, sequence)

    def find_pages(self, first, seen: Seen) -> None:
        """Look up the page of a tile ahead of `ask`, whose addresses wait for it.

        Behind the last token that a row of the block sees another page is read. Tiles of several
        pages have theirs looked up by `ask`.
        """
        size = self._shape.spec.page_size
        if self._shape.tile <= size:
            number = T.shift_right(T.min(first, seen.last), size.bit_length() - 1)
            self._row.look_up(self._page, 0, number)

    def ask(self, table, sequence, first, seen: Seen) -> None:
        """Begin to copy a tile; `find_pages` has been there."""
        first = as_register(first)
        for side in self._sides:
            side.ask(table, sequence, first, seen, self._asked[0], self._page[0])
        ptx("cp.async.commit_group")
        self._turn(self._asked)

    def arrive(self) -> None:
        """Wait for the thread's own part; the caller puts a barrier behind it."""
        ptx("cp.async.wait_group", 0)
        self._turn(self._arrived)
        for side in self._sides:
            side.leave_metas(self._arrived[0])

    def decode(self, moved=0) -> None:
        """Make rows of what arrived, ``moved`` words later; barriers go around this."""
        packed = [side for side in self._sides if side.codec.packed]
        steps = [step for side in packed for step in side.steps(self._arrived[0], moved)]
        # The next row is on its way while one is written, by warps that only decode: others have
        # outputs in the registers that it takes.
        ahead = self._shape.blocked
        for number, (read, write) in enumerate(steps):
            if number == 0 or not ahead:
                read()
            if ahead and number + 1 < len(steps):
                steps[number + 1][0]()
            write()

    def keys(self, block: int, step: int):
        """Operands of 16 tokens and 16 coordinates: ``[octet of tokens][half of coordinates]``."""
        return self._read(0, "", block, step)

    def values(self, block: int, step: int):
        """Operands of 16 tokens and 16 coordinates: ``[octet of coordinates][half of tokens]``."""
        return self._read(1, ".trans", block, step)

    def _read(self, side: int, kind: str, block: int, step: int):
        words = local(4, "uint32")
        shape = self._shape
        dim, alike = shape.dims[side], multiplies(shape.spec)
        at = dense_step(dim, self._from[side], step, alike) + 16 * block * shape.row_words(side)
        if not shape.sides[side].packed:
            at = at + (self._memory.codes[side] + self._arrived[0])
        name = f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16"
        ptx(name, *[words[i] for i in range(4)], self._memory.words.ptr_to([at]))
        return [[words[0], words[1]], [words[2], words[3]]]
