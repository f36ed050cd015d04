r"""``prefill`` on Hopper GPUs: warps that decode, and warpgroups that multiply what they decoded.

A CTA has 64 rows of a block for each of its ``multipliers``, warpgroups whose products are
``wgmma``: queries in registers, K and V as rows of the model's dtype in shared memory. The other
warps, ``decoders``, bring packed rows by ``cp.async`` and decode them (`attend_sides`), a tile of
``tile`` tokens for all warpgroups, in a ring of ``places``. Barriers: ``full`` and ``empty`` of
every place. `setmaxnreg` gives registers of the warps that decode to those that multiply.

A warpgroup's scores are in its registers as those of ``mma`` are, so the softmax is that of
`attend_rows`, and so are queries, and what becomes of outputs that of `prefill_merge`.

Counts for a tile of 64 tokens (k4v2, D = 128, sm_90a): a warp that multiplies issues 213
instructions where no bound moves, one of four that decode 394, 150 of them ``prmt``: an H200 takes
2060, 549, 475 and 401 us. When those were 445 it took 2337, 610, 487 and 415; an H100 then, 32/8
heads, beside the form of `prefill_cuda`:

=====================  ==========  ==============  ==================
query tokens           this form   `prefill_cuda`  rows of a CTA here
=====================  ==========  ==============  ==================
1 x 2048 over 32768    2337 us     3386 us         128
1 x 512 over 32768     611 us      882 us          128
4 x 2048 over 2048     495 us      621 us          128
64 x 16 over 8192      419 us      845 (attend)    64
=====================  ==========  ==============  ==================

Of 64 rows, two CTAs on an SM, warps that multiply wait for those that decode: 4 query tokens take
as long as 16. ncu there: 1.85 instructions a cycle, integer pipe 47 %. Before asking for a tile had
no branches, and before its page was looked up a tile ahead, 64 x 16 took 447 us.

Tried, 1 x 2048 (us): scores of the next tile ahead of this tile's values 2498 of 2456; codes asked
for behind the fence, two tiles ahead, 2413 of 2456, but 64 x 8 432 of 418; eight warps that decode
2462 of 2337; three warpgroups 2442 (4 x 2048 over 2048 486 of 495); tiles of 32 tokens 3938 of 3132
(one warpgroup). No softmax for warps without a row: 418 of 447 at 64 x 8, for 8 registers more.
"""

from __future__ import annotations

import dataclasses

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.attend_rows import (
    Options,
    QueryOperands,
    QueryRows,
    RowBlock,
    RowShape,
    Softmax,
    load_queries,
)
from tq_tvm.kernels.attend_tiles import TileMemory, Tiles, TileShape
from tq_tvm.kernels.decode_shape import REGISTERS
from tq_tvm.kernels.device import (
    PAIR,
    SHARED_BYTES,
    barrier,
    barrier_of,
    let,
    local,
    loop,
    pointer,
    ptx,
    shared_dynamic,
    shuffle,
    warp_barrier,
    when,
)
from tq_tvm.kernels.mbarrier import BARRIER_BYTES, Barriers, Turn, publish_barriers
from tq_tvm.kernels.prefill_merge import leave_rows, merge_cluster, stand_by, write_rows
from tq_tvm.kernels.prefill_walk import Asker, Walk, find_block
from tq_tvm.kernels.warp_rows import exchange_words, warp_rows
from tq_tvm.kernels.wgmma import (
    Operand,
    commit,
    fence_writes,
    multiply_registers,
    settle,
    start_products,
    wait,
)
from tq_tvm.spec import CacheSpec

__all__ = ["WARPGROUP_ROWS", "WarpgroupConfig", "WarpgroupShape", "attend_block"]

WARPGROUP_ROWS = 64
"""Rows of a warpgroup."""

_WARPGROUP = 128
"""Its threads."""

_STEP = 16
"""Values, or tokens, that a product adds up."""

_BLOCK = 64
"""Values of a row of a block of an operand."""

_DECODER_REGISTERS = 72
"""Registers that a thread needs which decodes, at least."""

_DECODERS = 1
"""The barrier of warps that decode; that of those that multiply is the next one."""


@dataclasses.dataclass(frozen=True)
class WarpgroupConfig:
    """The decisions of one kernel; ``schedules/prefill.py`` says what each one trades."""

    multipliers: int
    decoders: int
    tile: int
    places: int
    lanes: int
    registers: int
    cluster: int


@dataclasses.dataclass(frozen=True)
class WarpgroupShape:
    """Static sizes."""

    spec: CacheSpec
    config: WarpgroupConfig

    @property
    def multiplying(self) -> int:
        """Threads that multiply, which are the first."""
        return self.config.multipliers * _WARPGROUP

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.multiplying + 32 * self.config.decoders

    @property
    def rows(self) -> int:
        """Rows of a CTA."""
        return self.config.multipliers * WARPGROUP_ROWS

    @property
    def warp(self) -> RowShape:
        """Rows of a warp that multiplies."""
        return RowShape(self.spec, 1, self.config.tile)

    @property
    def tiles(self) -> TileShape:
        """Tiles, which the decoding warps have together."""
        return TileShape(
            self.spec,
            self.config.tile,
            32 * self.config.decoders,
            self.config.lanes,
            blocked=True,
        )

    @property
    def ctas_per_sm(self) -> int:
        """CTAs whose registers an SM has."""
        decoding = 32 * self.config.decoders * _DECODER_REGISTERS
        return max(1, REGISTERS // (self.multiplying * self.config.registers + decoding))

    @property
    def decoder_registers(self) -> int:
        """Registers of a thread that decodes: what the launch has beside those that multiply."""
        launched = REGISTERS // self.ctas_per_sm // self.threads // 8 * 8
        rest = launched * self.threads - self.multiplying * self.config.registers
        # The instruction takes no fewer than 24; `unfit` refuses them.
        return max(24, rest // (32 * self.config.decoders) // 8 * 8)

    @property
    def queries(self) -> int:
        """Words in front of queries, tiles."""
        return self.config.places * self.tiles.dense_words

    @property
    def packed(self) -> int:
        """Words in front of packed tiles."""
        return self.queries + self.rows * self.warp.row_words

    @property
    def barriers(self) -> int:
        """Words in front of barriers; at the end those before are for the output."""
        used = self.packed + 2 * self.tiles.packed_words
        return -(-max(used, self.rows * (self.warp.output_row + 2)) // 2) * 2

    @property
    def exchange(self) -> int:
        """Words in front of rows that lanes exchange."""
        return self.barriers + 2 * self.config.places * BARRIER_BYTES // 4

    @property
    def memory_words(self) -> int:
        """Words of dynamic shared memory."""
        return self.exchange + self.multiplying // 32 * exchange_words(self.spec)

    @classmethod
    def serves(cls, spec: CacheSpec) -> bool:
        """Whether there is such a kernel of a spec: of packed rows, of 64 or 128 values.

        A warpgroup has registers for the queries and the outputs of so many.
        """
        fmt = spec.cache_format
        packed = fmt.key.packed and fmt.value.packed
        return packed and {spec.head_dim, spec.value_dim} <= {64, 128}

    @property
    def unfit(self) -> str | None:
        """Why there can be no such kernel, or None."""
        tiles, config = self.tiles, self.config
        if 4 * self.memory_words > SHARED_BYTES:
            return f"{4 * self.memory_words} bytes of shared memory exceed {SHARED_BYTES}"
        if tiles.tile * tiles.lanes < tiles.threads:
            return (
                f"{tiles.threads} threads exceed {tiles.lanes} lanes of each of {tiles.tile} rows"
            )
        # Outputs, queries, scores and weights.
        needed = self.spec.value_dim // 2 + self.spec.head_dim // 4 + config.tile * 3 // 4
        if config.registers < needed:
            return f"{config.registers} registers are fewer than {needed}"
        if self.decoder_registers < _DECODER_REGISTERS:
            return f"threads that decode have {self.decoder_registers} registers"
        return None

    @property
    def stats(self) -> int:
        """Words of outputs in shared memory, behind which are a bound and a total of each row."""
        return self.rows * self.warp.output_row


def attend_block(
    shape: WarpgroupShape, q, caches, tables, options: Options, out, lse, batch, kv_head, index,
    thread, rank, parts,
) -> None:  # fmt: skip
    """One CTA, number ``rank`` of ``parts`` that share a block of rows; they take tiles in turn."""
    spec, config = shape.spec, shape.config
    block_table, seq_lens, starts = tables
    thread = let(T.cast(thread, "int32"))
    # The same in all lanes: descriptors, and branches, are of a warp.
    warp, lane = let(shuffle(T.truncdiv(thread, 32), 0)), let(thread % 32)
    found, block = find_block(spec.group_size, shape.rows, starts, batch, lane, index)
    with when(found[0] >= 0):
        sequence = let(found[0])
        words = shared_dynamic(shape.memory_words, "uint32")
        ring = _Ring(shape, words)
        with when(thread == 0):
            ring.make()
        barrier()
        rows = RowBlock(spec, shape.rows, sequence, block[0], seq_lens, starts, kv_head)
        walk = Walk(config.tile, rows, options, rank, parts)
        with I.If(warp >= shape.multiplying // 32):
            with I.Then():
                ptx("setmaxnreg.dec.sync.aligned.u32", shape.decoder_registers)
                own = let(thread - shape.multiplying)
                memory = TileMemory(shape.tiles, words, 0, shape.packed)
                tiles = Tiles(shape.tiles, memory, caches, kv_head, own, lane)
                coming = Walk(config.tile, rows, options, rank, parts)
                asker = Asker(tiles, coming, block_table, sequence, rows.seen(options))
                _decode(shape, tiles, walk, asker, ring, lane)
                if config.cluster:
                    stand_by()
            with I.Else():
                ptx("setmaxnreg.inc.sync.aligned.u32", config.registers)
                exchange = shape.exchange + warp * exchange_words(spec)
                query, output = warp_rows(spec, words, exchange)
                first_row = let(warp * shape.warp.rows)
                asked = QueryRows(query, q, rows, first_row, shape.warp.rows, lane)
                load_queries(shape.warp, asked, words, shape.queries, options.sm_scale)
                g, t = let(lane // 4), let(lane % 4)
                softmax = Softmax(shape.warp, g, t, options)
                softmax.start(rows, first_row)
                queries = QueryOperands(shape.warp, words, shape.queries, first_row, lane)
                warp_barrier()
                _multiply(shape, words, queries, softmax, walk, ring, lane)
                # Outputs are to be where tiles and queries are.
                barrier_of(_DECODERS + 1, shape.multiplying)
                leave_rows(shape, words, softmax, warp, g, t)
                left = (shape, output, words, rows, options, out, lse, warp, lane)
                if config.cluster:
                    merge_cluster(*left, rank, parts)
                else:
                    write_rows(*left)


class _Ring:
    """Barriers of the places of decoded tiles."""

    def __init__(self, shape: WarpgroupShape, words) -> None:
        self._shape = shape
        self.full = Barriers(words, shape.barriers, shape.config.places)
        self.empty = Barriers(words, self.full.end, shape.config.places)

    def make(self) -> None:
        """One thread makes them."""
        self.full.make(self._shape.config.decoders)
        self.empty.make(self._shape.multiplying // 32)
        publish_barriers()


def _decode(shape: WarpgroupShape, tiles: Tiles, walk: Walk, asker: Asker, ring: _Ring, lane):
    """A warp that decodes: its part of every tile."""
    place = Turn(shape.config.places, 1)
    asker.ask()
    with loop(walk.goes_on):
        tiles.arrive()
        barrier_of(_DECODERS, 32 * shape.config.decoders)
        asker.ask()
        ring.empty.wait(place.index, place.parity)
        tiles.decode(let(place.index * shape.tiles.dense_words))
        fence_writes()
        warp_barrier()
        with when(lane == 0):
            ring.full.arrive(place.index)
        place.advance()
        walk.advance()


class _Multiplier:
    """What a warp multiplies, with the others of its warpgroup."""

    def __init__(self, shape: WarpgroupShape, words, queries: QueryOperands, softmax: Softmax):
        self._shape, self._softmax = shape, softmax
        self._leading = 4 * shape.tiles.block_step
        value = pointer(words, shape.config.tile * shape.tiles.row_words(0))
        self._key = Operand(pointer(words, 0), _BLOCK)
        self._value = Operand(value, _BLOCK, leading=self._leading)
        self._queries = queries
        # With values of one block they are read again for every tile: ptxas 13.0 took the registers
        # that they were kept in for others, and scores from the second tile on were wrong.
        self._kept = self._read_queries() if shape.spec.value_dim > _BLOCK else None
        tile = shape.config.tile
        self.scores = local((1, tile // 8, 4), "float32")
        self.weights = local(tile // 4, "uint32")

    def _read_queries(self) -> list[list]:
        """The operands of all steps."""
        return [self._queries.read(0, i) for i in range(self._shape.spec.head_dim // _STEP)]

    def _moved(self, operand: Operand, place) -> Operand:
        """That of a place, in all lanes the same: descriptors are of a warp."""
        size = 4 * self._shape.tiles.dense_words
        return operand.moved(let(shuffle(place.index * size, 0)))

    def multiply_scores(self, place: Turn) -> None:
        """Begin to multiply queries with the keys of a place."""
        keys = self._moved(self._key, place)
        operands = self._kept or self._read_queries()
        start_products()
        for step, operand in enumerate(operands):
            columns = step * _STEP
            at = keys.at(columns // _BLOCK * self._leading + columns % _BLOCK * 2)
            multiply_registers(
                self._shape.spec.dtype, self.scores, operand, at, first=step == 0, transposed=False
            )
        commit()

    def multiply_values(self, place: Turn) -> None:
        """Begin to add the weighted values of a place."""
        values = self._moved(self._value, place)
        start_products()
        for step in range(self._shape.config.tile // _STEP):
            operand = [self.weights[4 * step + i] for i in range(4)]
            at = values.at(step * _STEP * 2 * _BLOCK)
            multiply_registers(self._shape.spec.dtype, self._softmax.output, operand, at)
        commit()

    def weigh(self, walk: Walk) -> None:
        """Scores of a tile become weights, operands of products."""
        self._softmax.weigh(self.scores, walk.first, walk.masked)
        for i in range(self._shape.config.tile // 4):
            pair = [self.scores[0, i // 2, 2 * (i % 2) + e] for e in (1, 0)]
            ptx(PAIR[self._shape.spec.dtype], self.weights[i], *pair)


def _multiply(
    shape: WarpgroupShape, words, queries: QueryOperands, softmax: Softmax, walk: Walk, ring: _Ring,
    lane,
) -> None:  # fmt: skip
    """A warp that multiplies: all tiles."""
    own = _Multiplier(shape, words, queries, softmax)
    place = Turn(shape.config.places, 0)
    with loop(walk.goes_on):
        ring.full.wait(place.index, place.parity)
        own.multiply_scores(place)
        wait(0)
        settle(own.scores)
        own.weigh(walk)
        own.multiply_values(place)
        wait(0)
        settle(own.weights, softmax.output)
        with when(lane == 0):
            ring.empty.arrive(place.index)
        place.advance()
        walk.advance()
