"""Which block of rows a CTA of ``prefill`` has on GPUs, and which tiles of tokens its rows see."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.attend_rows import Options, RowBlock
from tq_tvm.kernels.attend_tiles import Seen, Tiles
from tq_tvm.kernels.device import FULL_WARP, i32, let, local, loop, shuffle, store, u32, when

__all__ = ["Asker", "Walk", "find_block"]


def find_block(group: int, rows: int, starts, batch, lane, index):
    """The sequence that a CTA works for, and which of its blocks of rows; -1 past the last.

    ``group`` is the rows of a query token, ``rows`` those of a block; ``lane`` has 32 values.
    """
    base, before, found, block, count, sums = (local(1, "int32") for _ in range(6))
    for register in (base, before):
        store(register, i32(0))
    store(found, i32(-1))
    store(block, i32(0))
    with loop(T.And(found[0] < 0, base[0] < T.cast(batch, "int32"))):
        at = let(base[0] + lane)
        store(count, i32(0))
        with when(at < T.cast(batch, "int32")):
            tokens = starts[at + 1] - starts[at]
            store(count, T.truncdiv(tokens * group + (rows - 1), rows))
        store(sums, count[0])
        for step in (1, 2, 4, 8, 16):
            lower = let(T.cuda.__shfl_up_sync(u32(FULL_WARP), sums[0], step, 32))
            store(sums, T.Select(lane >= step, sums[0] + lower, sums[0]))
        past = T.cast(before[0] + sums[0] > index, "int32")
        ballot = let(T.cast(T.cuda.ballot_sync(u32(FULL_WARP), past), "int32"))
        with I.If(ballot != 0):
            with I.Then():
                first = let(T.call_pure_extern("int32", "__ffs", ballot) - 1)
                own = let(shuffle(count[0], first))
                start = let(before[0] + shuffle(sums[0], first) - own)
                store(found, base[0] + first)
                # The newest tokens first.
                store(block, own - 1 - (index - start))
            with I.Else():
                store(before, before[0] + shuffle(sums[0], i32(31)))
                store(base, base[0] + 32)
    return found, block


class Walk:
    """The tiles of ``tile`` tokens that a block of rows sees, every ``step``-th from ``number`` on.

    Tiles between those of the kept tokens and the first in the window are passed over.
    """

    def __init__(self, tile: int, rows: RowBlock, options: Options, number, step) -> None:
        window, kept = options.window_left, options.kept_tokens
        self._tile, self._step, self._rows, self._window = tile, step, rows, window
        self._end = let(rows.last_position + 1)
        oldest = T.truncdiv(T.max(rows.first_position - window, i32(0)), tile)
        self._before = let(T.truncdiv(kept + (tile - 1), tile))
        self._passed = let(T.Select(window < 0, i32(0), T.max(oldest - self._before, i32(0))))
        self._number, self._first = local(1, "int32"), local(1, "int32")
        store(self._number, number)
        self._find()

    def _find(self) -> None:
        number = self._number[0]
        passed = T.Select(number >= self._before, self._passed, i32(0))
        store(self._first, (number + passed) * self._tile)

    @property
    def first(self):
        """The first token of this tile."""
        return self._first[0]

    @property
    def goes_on(self):
        """Whether there is this tile."""
        return self._first[0] < self._end

    @property
    def masked(self):
        """Whether any row does not see all of this tile."""
        late = self.first + (self._tile - 1) > self._rows.first_position
        early = self.first < self._rows.last_position - self._window
        return T.Or(late, T.And(self._window >= 0, early))

    def advance(self) -> None:
        """Go on to the next tile."""
        store(self._number, self._number[0] + self._step)
        self._find()


class Asker:
    """What asks for tiles ahead of their walk, and looks up the page of the one behind."""

    def __init__(self, tiles: Tiles, walk: Walk, table, sequence, seen: Seen) -> None:
        self._tiles, self._walk, self._seen = tiles, walk, seen
        self._table, self._sequence = table, sequence
        self._tiles.begin(table, sequence)
        self._find()

    def _find(self) -> None:
        self._tiles.find_pages(self._walk.first, self._seen)

    def ask(self) -> None:
        """Begin to copy the next tile, if there is one."""
        with when(self._walk.goes_on):
            self._tiles.ask(self._table, self._sequence, self._walk.first, self._seen)
            self._walk.advance()
            self._find()
