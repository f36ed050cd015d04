"""The numbers that a ``prefill`` kernel of GPUs is made of."""

from __future__ import annotations

import dataclasses

from tq_tvm.kernels.attend_rows import RowShape
from tq_tvm.kernels.attend_tiles import TileShape
from tq_tvm.kernels.decode_shape import REGISTERS
from tq_tvm.kernels.warp_rows import exchange_words
from tq_tvm.spec import CacheSpec

__all__ = ["PrefillConfig", "PrefillShape"]


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """The decisions of one kernel; ``schedules/prefill.py`` says what each one trades."""

    warps: int
    row_tiles: int
    tile: int
    lanes: int
    registers: int
    cluster: int


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """Static sizes."""

    spec: CacheSpec
    config: PrefillConfig

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.config.warps

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that hold an SM to the decided number of registers."""
        return max(1, REGISTERS // (self.threads * self.config.registers))

    @property
    def warp(self) -> RowShape:
        """A warp's rows."""
        return RowShape(self.spec, self.config.row_tiles, self.config.tile)

    @property
    def tiles(self) -> TileShape:
        """Tiles, a CTA's."""
        return TileShape(self.spec, self.config.tile, self.threads, self.config.lanes)

    @property
    def rows(self) -> int:
        """Rows of a CTA."""
        return self.config.warps * self.warp.rows

    @property
    def packed(self) -> int:
        """Words in front of packed tiles: queries, and K and V of the model's dtype."""
        return self.rows * self.warp.row_words + self.tiles.dense_words

    @property
    def memory_words(self) -> int:
        """Words of dynamic shared memory."""
        return self.exchange + self.config.warps * exchange_words(self.spec)

    @property
    def exchange(self) -> int:
        """Words in front of rows that lanes exchange; at the end all are for the output."""
        output = self.rows * (self.warp.output_row + 2)
        return max(self.packed + 2 * self.tiles.packed_words, output)

    @property
    def stats(self) -> int:
        """Words of outputs in shared memory, behind which are a bound and a total of each row."""
        return self.rows * self.warp.output_row
