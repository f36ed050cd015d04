"""The numbers that an ``attend`` kernel of GPUs is made of, and what of a batch it has to read."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels.attend_rows import Options, RowBlock, RowShape
from tq_tvm.kernels.attend_tiles import TileShape
from tq_tvm.kernels.decode_shape import REGISTERS
from tq_tvm.kernels.device import i32, let
from tq_tvm.kernels.fragment_shape import FragmentShape
from tq_tvm.kernels.warp_rows import exchange_words
from tq_tvm.spec import CacheSpec

__all__ = ["WINDOW_TILE", "AttendConfig", "AttendShape", "Extent", "Span"]

WINDOW_TILE = 16
"""Tokens of a tile of a spec's window."""

_COLUMNS = 256
"""Most columns of an output of 16 rows: half of a lane's registers."""


@dataclasses.dataclass(frozen=True)
class AttendConfig:
    """The decisions of one kernel; ``schedules/attend.py`` says what each one trades."""

    warps: int
    row_tiles: int
    tile: int
    lanes: int
    registers: int
    reach: int
    overlap: int


@dataclasses.dataclass(frozen=True)
class AttendShape:
    """Static sizes."""

    spec: CacheSpec
    config: AttendConfig

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.config.warps

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that hold an SM to the decided number of registers."""
        return max(1, REGISTERS // (self.threads * self.config.registers))

    @property
    def parts(self) -> int:
        """Warps of a team: they share tiles, and have a part of the output's columns each."""
        return self.parts_of(self.spec)

    @staticmethod
    def parts_of(spec: CacheSpec) -> int:
        """Parts of a spec; where there are several, a CTA has as many warps."""
        return -(-spec.value_dim // _COLUMNS)

    @property
    def teams(self) -> int:
        """Teams of a CTA."""
        return self.config.warps // self.parts

    def team_of(self, warp):
        """The team of a warp."""
        return warp if self.parts == 1 else 0

    @property
    def rows(self) -> RowShape:
        """Rows of a block, which are every team's."""
        return RowShape(self.spec, self.config.row_tiles, self.config.tile, self.parts)

    @property
    def in_registers(self) -> bool:
        """Codes become operands in registers; otherwise rows are made in shared memory."""
        return FragmentShape.serves(self.spec)

    @property
    def fragments(self) -> FragmentShape:
        """Tiles whose codes become operands in registers, a warp's."""
        return FragmentShape(self.spec, self.config.tile, self.config.row_tiles)

    @property
    def tiles(self) -> TileShape:
        """Tiles that are made in shared memory, a team's."""
        return TileShape(self.spec, self.config.tile, 32 * self.parts, self.config.lanes)

    def first_column(self, warp):
        """Where a warp's part of the output begins."""
        return 0 if self.parts == 1 else let(warp * self.rows.columns)

    def output_coordinate(self, octet: int, column):
        """Coordinate of a column of an octet of a warp's output, from its `first_column` on."""
        if self.in_registers:
            return self.fragments.output_coordinate(octet, column)
        return 8 * octet + column

    @property
    def octets_together(self) -> int:
        """Octets of a warp's output whose values of a lane are neighbours."""
        return 2 if self.in_registers else 1

    @property
    def output_row(self) -> int:
        """Words from one row of a team's output to the next: 8 rows are in banks of their own."""
        return self.spec.value_dim + 8 * self.octets_together

    @property
    def output_words(self) -> int:
        """Words of a team's output."""
        return self.rows.rows * self.output_row

    @property
    def lengths_at_once(self) -> int:
        """Sequences whose lengths a lane asks for together; each takes 25 instructions."""
        return 2

    @property
    def least_tiles(self) -> int:
        """Tiles of a group, at least."""
        return self.teams * self.config.reach

    @property
    def queries(self) -> int:
        """Words of the queries, which lie in front."""
        if self.in_registers:
            return self.fragments.query_words
        return self.rows.rows * self.rows.row_words

    @property
    def memory_words(self) -> int:
        """Words of dynamic shared memory."""
        return self.exchange + self.config.warps * exchange_words(self.spec)

    @property
    def exchange(self) -> int:
        """Words of queries and tiles, in front of rows that lanes exchange.

        At the end of a piece tiles make room for the output.
        """
        if self.in_registers:
            team = self.fragments.words
        else:
            team = self.tiles.dense_words + 2 * self.tiles.packed_words
        return self.queries + self.teams * max(team, self.output_words)


@dataclasses.dataclass(frozen=True)
class Span:
    """Blocks of a sequence's rows, and what they read: ``width`` tiles each.

    The first ``packed`` of them are tiles of packed rows, the others of the spec's window.
    ``skipped`` tiles, behind the ``kept`` ones, are left out.
    """

    blocks: Any
    width: Any
    packed: Any
    kept: Any
    skipped: Any
    tile: int

    def first_token(self, index):
        """First token of a tile of packed rows, by its number among those that are read."""
        return (index + T.Select(index >= self.kept, self.skipped, i32(0))) * self.tile


class Extent:
    """How many tiles sequences have."""

    def __init__(self, shape: AttendShape, seq_lens, starts, options: Options) -> None:
        self._shape = shape
        self.seq_lens, self.starts, self.options = seq_lens, starts, options

    def of(self, sequence) -> Span:
        """The span of a sequence."""
        shape, tile = self._shape, self._shape.config.tile
        rows = shape.rows.rows
        count = let(self.starts[sequence + 1] - self.starts[sequence])
        length = let(self.seq_lens[sequence])
        blocks = T.truncdiv(count * shape.spec.group_size + (rows - 1), rows)
        window = self.options.window_left
        oldest = T.truncdiv(T.max(length - count - window, i32(0)), tile)
        kept = let(T.truncdiv(self.options.kept_tokens + (tile - 1), tile))
        end = self.packed_end(length)
        tiles = T.truncdiv(end + (tile - 1), tile)
        if shape.spec.window:
            oldest = T.min(oldest, tiles)
        skipped = let(T.Select(window < 0, i32(0), T.max(oldest - kept, i32(0))))
        blocks = let(blocks)
        packed = let(T.max(tiles - skipped, i32(0)))
        width = packed
        if shape.spec.window:
            width = let(packed + T.truncdiv(length - end + (WINDOW_TILE - 1), WINDOW_TILE))
        return Span(blocks, width, packed, kept, skipped, tile)

    def packed_end(self, length):
        """Where, in a sequence, the spec's window begins."""
        window = self._shape.spec.window
        return let(T.max(length - window, i32(0))) if window else length

    def rows(self, sequence, block, kv_head) -> RowBlock:
        """The rows of a block."""
        shape = self._shape
        return RowBlock(
            shape.spec, shape.rows.rows, sequence, block, self.seq_lens, self.starts, kv_head
        )

    def tiles(self, sequence):
        """Tiles of a sequence."""
        span = self.of(sequence)
        return span.blocks * span.width
