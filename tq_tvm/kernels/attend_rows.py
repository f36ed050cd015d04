"""Query rows of ``attend`` and ``prefill`` on GPUs: scores, softmax with its features, and output.

A row is a query token and a head of the group. A warp has ``16 row_tiles`` of them: scores by
``mma.m16n8k16``, queries on the M side and K's rows on the N side; softmax in float32; output with
the weights, as the scores left them, on the M side and V's rows on the N side.

A row's bound moves only where a logit exceeds it by more than `SLACK` powers of two, so that the
output is seldom rescaled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.attend_tiles import Seen, Tiles
from tq_tvm.kernels.decode_query import rotate_row, turn_signs
from tq_tvm.kernels.dense_rows import dense_row_words, dense_step, dense_word, turned
from tq_tvm.kernels.device import (
    FULL_WARP,
    LOG2E,
    LOWEST,
    MASKED,
    PAIR,
    as_float,
    f32,
    i32,
    let,
    local,
    mma,
    pointer,
    ptx,
    shuffle_xor,
    store,
    u32,
    warp_barrier,
    when,
)
from tq_tvm.kernels.hadamard_cuda import PRODUCTS
from tq_tvm.kernels.lane_rows import multiplies
from tq_tvm.kernels.warp_rows import WarpRow
from tq_tvm.spec import CacheSpec

__all__ = [
    "SLACK",
    "Options",
    "QueryOperands",
    "QueryRows",
    "RowBlock",
    "RowShape",
    "Softmax",
    "attend_tile",
    "finish_row",
    "highest",
    "load_queries",
    "soft_capped",
]

SLACK = 6.0
"""Powers of two by which a logit may exceed its row's bound."""

_READ = 18
"""Most values of queries that a lane reads at once."""

_MINUS_INFINITY = 0xFF800000
_NO_WINDOW = -(2**31)


@dataclasses.dataclass(frozen=True)
class Options:
    """Features of a call: arguments of the kernel."""

    sinks: Any
    alibi_slopes: Any
    sm_scale: Any
    soft_cap: Any
    window_left: Any
    kept_tokens: Any


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Static sizes of a warp's rows and of the tile that they attend to.

    Of ``parts`` of the output's columns a warp has one.
    """

    spec: CacheSpec
    row_tiles: int
    tile: int
    parts: int = 1

    @property
    def rows(self) -> int:
        """Rows of a warp."""
        return 16 * self.row_tiles

    @property
    def row_words(self) -> int:
        """Words of a query of the model's dtype."""
        return dense_row_words(self.spec.head_dim)

    @property
    def columns(self) -> int:
        """Columns of a warp's output."""
        return self.spec.value_dim // self.parts

    @property
    def output_row(self) -> int:
        """Words from a row of outputs in shared memory to the next: 8 rows are in other banks."""
        return self.columns + 8


class RowBlock:
    """``size`` rows of a sequence and KV head, token by token: which tokens and heads they are."""

    def __init__(
        self, spec: CacheSpec, size: int, sequence, block, seq_lens, starts, kv_head
    ) -> None:
        group = spec.group_size
        self._group = group
        self.start = let(starts[sequence])
        count = let(starts[sequence + 1] - self.start)
        self.seq_len = let(seq_lens[sequence])
        self._past = let(self.seq_len - count)
        self._first = let(block * size)
        self._total = let(count * group)
        self._head = let(kv_head * group)
        self.first_position = let(self._past + T.truncdiv(self._first, group))
        last = T.min(self._first + size, self._total) - 1
        self.last_position = let(self._past + T.truncdiv(last, group))

    def seen(self, options: Options) -> Seen:
        """What its rows see between them."""
        window = options.window_left
        low = T.Select(window < 0, i32(0), self.first_position - window)
        return Seen(let(low), self.last_position, options.kept_tokens)

    def exists(self, row):
        """Whether there is such a row."""
        return self._first + row < self._total

    def existing(self, row):
        """The row, or the last one if there is no such row."""
        return T.min(row, self._total - self._first - 1)

    def token(self, row):
        """Index of its token among all."""
        return self.start + T.truncdiv(self._first + row, self._group)

    def head(self, row):
        """Its query head."""
        return self._head + T.truncmod(self._first + row, self._group)

    def position(self, row):
        """The last position that it attends to."""
        return self._past + T.truncdiv(self._first + row, self._group)


def soft_capped(cap, exponent):
    """``cap tanh(x / cap)``, where ``2 ** exponent`` is ``e ** (2 x / cap)``."""
    # tanh x = 1 - 2 / (1 + e^2x)
    return cap - (cap * f32(2)) * (f32(1) / (T.exp2(exponent) + f32(1)))


class Softmax:
    """State of a lane's rows, g and g + 8 of each row tile, and their output."""

    def __init__(self, shape: RowShape, g, t, options: Options) -> None:
        self._shape, self._g, self._t, self._options = shape, g, t, options
        tiles = shape.row_tiles
        self.places = [(tile, half) for tile in range(tiles) for half in range(2)]
        self.bound, self.total, self._slope = (local((tiles, 2), "float32") for _ in range(3))
        self._rows: RowBlock | None = None
        self._first: Any = None
        # Where the tokens end that are attended to, if rows see more than those.
        self.end: Any = None
        self.output = local((tiles, shape.columns // 8, 4), "float32")
        # What all values of a row's output are less by, until they are finished.
        self.offset: Any = None
        self._sloped = let(T.cast(options.alibi_slopes.shape[0], "int32") > 0)
        self._featured = let(T.Or(self._sloped, options.soft_cap > f32(0)))

    def start(self, rows: RowBlock, first) -> None:
        """No tokens yet, for the rows of a block from ``first`` on."""
        self._rows, self._first = rows, first
        for at in self.places:
            row = let(self._row(at))
            store(self.bound, f32(LOWEST), *at)
            store(self.total, f32(0), *at)
            store(self._slope, f32(0), *at)
            if self.offset is not None:
                store(self.offset, f32(0), *at)
            with when(T.And(self._sloped, rows.exists(row))):
                slope = self._options.alibi_slopes[rows.head(row)]
                store(self._slope, slope * f32(LOG2E), *at)
        for tile in range(self._shape.row_tiles):
            for octet in range(self._shape.columns // 8):
                for e in range(4):
                    store(self.output, f32(0), tile, octet, e)

    def _row(self, at: tuple[int, int]):
        tile, half = at
        return self._first + (16 * tile + 8 * half) + self._g

    def _limit(self, at: tuple[int, int]):
        """The last position that a row sees. Seldom asked for, so it has no register."""
        assert self._rows is not None
        row = let(self._row(at))
        return let(T.Select(self._rows.exists(row), self._rows.position(row), i32(-1)))

    def weigh(self, scores, first, masked, unit=None) -> None:
        """Scores, in units of log2, become weights; ``masked`` says if any are not attended to.

        Or in units of a row's ``unit``, which are above 0.
        """
        shape, bound = self._shape, self.bound
        octets = int(scores.shape[1])
        # Times a unit, however small, what is masked has to be below all bounds.
        lowest = f32(MASKED) if unit is None else as_float(u32(_MINUS_INFINITY))

        def logit(score, *at: int):
            return score if unit is None else score * unit[at]

        with when(self._featured):
            self._bend(scores, first, octets, unit)
        with when(masked):
            window = self._options.window_left
            for tile, half in self.places:
                limit = self._limit((tile, half))
                low = let(T.Select(window < 0, i32(_NO_WINDOW), limit - window))
                for octet in range(octets):
                    for e in range(2):
                        token = let(first + (8 * octet + e) + 2 * self._t)
                        near = T.Or(token >= low, token < self._options.kept_tokens)
                        seen = T.And(token <= limit, near)
                        if self.end is not None:
                            seen = T.And(token < self.end, seen)
                        index = (tile, octet, 2 * half + e)
                        value = T.Select(seen, scores[index], lowest)
                        store(scores, value, *index)
        top = local((shape.row_tiles, 2), "float32")
        above = T.bool(False)
        for at in self.places:
            tile, half = at
            values = [
                scores[tile, octet, 2 * half + e] for octet in range(octets) for e in range(2)
            ]
            store(top, logit(highest(values), *at), *at)
            above = T.Or(above, top[at] > bound[at] + f32(SLACK))
        with when(T.cuda.any_sync(u32(FULL_WARP), T.cast(above, "int32")) != 0):
            self._raise(top)
        for tile, half in self.places:
            for octet in range(octets):
                for e in range(2):
                    index = (tile, octet, 2 * half + e)
                    value = logit(scores[index], tile, half)
                    store(scores, T.exp2(value - bound[tile, half]), *index)
                    store(self.total, self.total[tile, half] + scores[index], tile, half)

    def _bend(self, scores, first, octets: int, unit) -> None:
        """Soft cap and ALiBi, of logits."""
        cap = let(self._options.soft_cap * f32(LOG2E))
        inverse = let(T.Select(cap > f32(0), f32(1) / cap, f32(0)))
        value = local(1, "float32")
        for tile, half in self.places:
            limit = self._limit((tile, half))
            own = None if unit is None else let(f32(1) / unit[tile, half])
            for octet in range(octets):
                for e in range(2):
                    index = (tile, octet, 2 * half + e)
                    store(value, scores[index] if own is None else scores[index] * unit[tile, half])
                    with when(cap > f32(0)):
                        store(value, soft_capped(cap, value[0] * inverse * f32(2 * LOG2E)))
                    token = first + (8 * octet + e) + 2 * self._t
                    apart = T.cast(token - limit, "float32")
                    bent = value[0] + self._slope[tile, half] * apart
                    store(scores, bent if own is None else bent * own, *index)

    def _raise(self, top) -> None:
        """Move the bounds up to what was found, and the output with them."""
        for at in self.places:
            tile, half = at
            for mask in (1, 2):
                store(top, T.max(top[at], shuffle_xor(top[at], mask)), *at)
            store(top, T.max(top[at], self.bound[at]), *at)
            shrink = let(T.exp2(self.bound[at] - top[at]))
            store(self.bound, top[at], *at)
            store(self.total, self.total[at] * shrink, *at)
            if self.offset is not None:
                store(self.offset, self.offset[at] * shrink, *at)
            for octet in range(self._shape.columns // 8):
                for e in range(2):
                    index = (tile, octet, 2 * half + e)
                    store(self.output, self.output[index] * shrink, *index)


def highest(values: list[Any]):
    """The largest of some values."""
    largest = values[0]
    for value in values[1:]:
        largest = T.max(largest, value)
    return largest


class QueryRows:
    """``count`` rows of a block from ``first`` on, a warp's; the first are asked for at once.

    Rows that do not exist are zeros.
    """

    def __init__(self, query: WarpRow, q, rows: RowBlock, first, count: int, lane) -> None:
        self.query, self._q, self._rows, self._lane = query, q, rows, lane
        self._first, values = first, query.row_values
        # Rows that are on their way at once: one after another each would wait for memory.
        self._abreast = next(n for n in (4, 2, 1) if count % n == 0 and n * values <= _READ)
        self._turns = count // self._abreast
        self._x = local((self._abreast, values), "float32")
        fmt = query.spec.cache_format
        self.unit = 1.0 if fmt.rotation == "none" else query.spec.head_dim**-0.5
        """What rows are to be multiplied by, once they are rotated."""
        self._ask(0)

    def _ask(self, turn) -> None:
        for n in range(self._abreast):
            # Without a branch, in which a row would be waited for.
            row = let(self._rows.existing(self._first + (turn * self._abreast + n)))
            token, head = let(self._rows.token(row)), let(self._rows.head(row))
            for i, base, extra in self.query.places(self._lane):
                store(self._x, T.cast(self._q[token, head, base + extra], "float32"), n, i)

    def whole(self) -> Iterator[tuple[Any, Any]]:
        """Row, and a lane's values of it, of rows whose lanes have neighbours."""
        query, lane = self.query, self._lane
        for row, own in self._turns_of():
            if query.rotated:
                turn_signs(query, own, lane)
                rotate_row(query, own, lane)
            yield row, own

    def rotated(self, factor) -> Iterator[tuple[Any, Any, tuple[Any, Any]]]:
        """Row, first coordinate, and a pair of a lane's values, the second one first."""
        query, lane, values = self.query, self._lane, self.query.row_values
        if not query.by_shuffles:
            for row, own in self._turns_of():
                yield from _exchanged(query, own, row, lane, factor)
            return
        for row, own in self.whole():
            for i in range(0, values, 2):
                yield row, let(lane * values + i), (own[i + 1] * factor, own[i] * factor)

    def _turns_of(self) -> Iterator[tuple[Any, Any]]:
        """Rows as they are, while those of the next turn are asked for."""
        own = local(self.query.row_values, "float32")
        with I.serial(0, self._turns) as turn:
            for n in range(self._abreast):
                row = let(self._first + (turn * self._abreast + n))
                exists = let(self._rows.exists(row))
                for i in range(self.query.row_values):
                    store(own, T.Select(exists, self._x[n, i], f32(0)), i)
                yield row, own
            if self._turns > 1:
                with when(turn + 1 < self._turns):
                    self._ask(turn + 1)


def load_queries(shape: RowShape, asked: QueryRows, words, place, sm_scale) -> None:
    """Rotate rows of a block, scaled for logits in units of log2.

    They go to shared memory from word ``place`` on.
    """
    query = asked.query
    factor = let(sm_scale * f32(LOG2E * asked.unit))
    for row, coordinate, pair in asked.rotated(factor):
        word = local(1, "uint32")
        ptx(PAIR[shape.spec.dtype], word[0], *pair)
        at = let(T.truncdiv(coordinate, 2))
        if query.dim % 64:
            to = place + dense_word(query.dim, row, at)
        else:
            chunk = T.bitwise_xor(T.truncdiv(at, 4), T.truncmod(row, 8))
            to = place + row * shape.row_words + chunk * 4 + T.truncmod(at, 4)
        ptx("st.shared.u32", pointer(words, to), word[0])


def _exchanged(query: WarpRow, x, row, lane, factor) -> Iterator[tuple[Any, Any, tuple[Any, Any]]]:
    """The same of a row whose neighbours have to meet in shared memory."""
    query.turn_signs(x, lane)
    query.leave(x, lane)
    if query.rotated:
        query.rotate(lane)
    for first in range(0, query.dim // 2, 32):
        with when(lane < query.dim // 2 - first):
            coordinate = let(2 * (lane + first))
            pair = local(2, "float32")
            for e in range(2):
                query.read(pair, e, coordinate + e)
            yield row, coordinate, (pair[1] * factor, pair[0] * factor)
    warp_barrier()


class QueryOperands:
    """Queries that `load_queries` left from word ``place`` on, from row ``first_row`` on."""

    def __init__(self, shape: RowShape, words, place, first_row, lane) -> None:
        self._shape, self._words = shape, words
        row = let(first_row + lane % 16)
        moved = turned(shape.spec.head_dim, lane % 8, lane // 16)
        self._begin = let(place + row * shape.row_words + moved)

    def read(self, m: int, step: int) -> list[Any]:
        """The operand of a row tile and 16 coordinates."""
        shape = self._shape
        operand = local(4, "uint32")
        at = dense_step(shape.spec.head_dim, self._begin, step, multiplies(shape.spec))
        registers = [operand[i] for i in range(4)]
        place = pointer(self._words, at + 16 * m * shape.row_words)
        ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *registers, place)
        return registers


def attend_tile(
    shape: RowShape, words, place, tiles: Tiles, softmax: Softmax, first_row, lane, first, masked
) -> None:
    """Scores, weights and output of a tile that begins with token ``first``."""
    product = PRODUCTS[shape.spec.dtype]
    blocks = shape.tile // 16
    scores = local((shape.row_tiles, shape.tile // 8, 4), "float32")
    queries = QueryOperands(shape, words, place, first_row, lane)
    for k in range(shape.spec.head_dim // 16):
        a = [queries.read(m, k) for m in range(shape.row_tiles)]
        for block in range(blocks):
            for octet, b in enumerate(tiles.keys(block, k)):
                for m in range(shape.row_tiles):
                    result = [scores[m, 2 * block + octet, e] for e in range(4)]
                    mma(product, result, a[m], b, result if k else [f32(0)] * 4)
    softmax.weigh(scores, first, masked)
    weights = local((shape.row_tiles, 4), "uint32")
    for block in range(blocks):
        for m in range(shape.row_tiles):
            for i in range(4):
                pair = [scores[m, 2 * block + i // 2, 2 * (i % 2) + e] for e in (1, 0)]
                ptx(PAIR[shape.spec.dtype], weights[m, i], *pair)
        for k in range(shape.columns // 16):
            for octet, b in enumerate(tiles.values(block, k)):
                for m in range(shape.row_tiles):
                    result = [softmax.output[m, 2 * k + octet, e] for e in range(4)]
                    mma(product, result, [weights[m, i] for i in range(4)], b, result)


def finish_row(row: WarpRow, x, top, total, place, options: Options | None, out, lse, lane) -> None:
    """Divide a row that a warp shares, rotate it back, and write it and its lse.

    ``top`` and ``total`` are its bound and its sum of weights; ``place`` is its token and head.
    Without ``options`` there are no sinks.
    """
    token, head = place
    bound, sum_, shrink = (local(1, "float32") for _ in range(3))
    store(bound, top)
    store(sum_, total)
    store(shrink, f32(1))
    if options is not None:
        with when(T.cast(options.sinks.shape[0], "int32") > 0):
            sink = let(options.sinks[head] * f32(LOG2E))
            store(bound, T.max(top, sink))
            store(shrink, T.exp2(top - bound[0]))
            store(sum_, total * shrink[0] + T.exp2(sink - bound[0]))
    unit = row.dim**-0.5 if row.rotated else 1.0
    # What is not a number stays so.
    nothing = let(sum_[0] == f32(0))
    factor = let(T.Select(nothing, f32(0), shrink[0] * f32(unit) / sum_[0]))
    for i in range(row.row_values):
        store(x, x[i] * factor, i)
    if row.rotated:
        row.rotate_back(x, lane)
    row.write(out, x, token, head, lane)
    with when(T.And(T.cast(lse.shape[1], "int32") > 0, lane == 0)):
        units = (T.log2(sum_[0]) + bound[0]) * f32(math.log(2))
        store(lse, T.Select(nothing, as_float(u32(_MINUS_INFINITY)), units), token, head)
