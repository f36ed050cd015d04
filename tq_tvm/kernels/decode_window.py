"""A spec's window in ``decode`` on GPUs: the newest tokens, whose rows are not quantised.

They are in the sequence's ring, rotated and of the model's dtype, as ``fill`` leaves them. The
kernel attends to the packed tokens before them; who finishes a query head's row, a warp, adds the
ring's to it in float32: without positions their order does not matter, so that they are rows 0, 1,
and so on. A warp has 16 rows on their way together, of 512 values 8, each lane with a piece of them
all.

Of a token a lane converts and multiplies D / 32 values of K and as many of V, beside some ten
instructions for addresses, loads, and its part of the sums over lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels import pages
from tq_tvm.kernels.decode_merge import finish_row
from tq_tvm.kernels.decode_query import Query, rotate_row, turn_signs
from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.device import (
    LOG2E,
    MASKED,
    access,
    f32,
    high_half,
    i32,
    let,
    local,
    loop,
    low_half,
    ptx,
    reduce_lanes,
    shuffle,
    shuffle_xor,
    store,
    when,
)
from tq_tvm.spec import CacheSpec

__all__ = ["Window", "find_window", "packed_lengths", "prefetch_ring"]

_READ = 64
"""Words of rows on their way together that a lane has, at most."""

_LINE = 128
"""Bytes of a line of memory."""


def prefetch_ring(spec: CacheSpec, rings, ring, kv_head, thread, threads: int) -> None:
    """Bring a ring's rows of a KV head to L2, by some threads, before they are read.

    ``rings`` are all of K's as one axis, and V's.
    """
    sides = [(spec.head_dim, rings)]
    if spec.value_dim != spec.head_dim:
        sides = [(spec.head_dim, rings[:1]), (spec.value_dim, rings[1:])]
    for dim, alike in sides:
        stride, lines = spec.num_kv_heads * dim, -(-2 * dim // _LINE)
        first = let(T.cast(ring, "int64") * T.int64(spec.window * stride))
        for turn in range(-(-spec.window * lines // threads)):
            piece = let(turn * threads + thread)
            inside = T.truncdiv(piece, lines) * stride + T.truncmod(piece, lines) * (_LINE // 2)
            at = let(first + T.cast(kv_head * dim + inside, "int64"))
            with when(piece < spec.window * lines):
                for rows in alike:
                    ptx("prefetch.global.L2", rows.ptr_to([at]))


class _PackedLengths:
    """Tokens of each sequence before its window; ``seq_lens`` has all."""

    def __init__(self, seq_lens, window: int) -> None:
        self._seq_lens, self._window = seq_lens, window

    def __getitem__(self, sequence):
        return T.max(self._seq_lens[sequence] - self._window, i32(0))


def packed_lengths(spec: CacheSpec, seq_lens):
    """Tokens of each sequence that are attended to packed, by the sequence."""
    return _PackedLengths(seq_lens, spec.window) if spec.window else seq_lens


class Window:
    """What finishes a row of ``decode``: its tokens of the window, then the rest."""

    sliding = None
    """No `decode_featured.Sliding`: all tokens before the window are attended to."""

    @staticmethod
    def backwards() -> None:
        """Tiles come in order."""

    def __init__(self, shape: Shape, q, rings: pages.Rings, seq_lens, sm_scale) -> None:
        self._slots = rings.slots
        self._shape, self._q, self._seq_lens, self._sm_scale = shape, q, seq_lens, sm_scale
        self._k, self._v = pages.flat_buffer(rings.k), pages.flat_buffer(rings.v)
        self._abreast = min(16, 2 * _READ // shape.row_values)

    def prefetch(self, sequence, kv_head, thread, threads: int) -> None:
        """`prefetch_ring` of a sequence."""
        ring = self._slots[sequence]
        prefetch_ring(self._shape.spec, (self._k, self._v), ring, kv_head, thread, threads)

    def prepare(self, first_head, heads, t) -> None:
        """Nothing that logits of packed tokens need."""

    def bend(self, query: Query, scores, own_token, first, seq_len) -> None:
        """Logits of packed tokens stay as they are."""

    def finish(self, x, top, total, out, place, lane) -> None:
        """Add the window to a row that a warp shares, divide, rotate back and write it."""
        _, total = self.add(x, top, total, place, lane)
        finish_row(self._shape, x, total, out, place, lane)

    def add(
        self, x, top, total, place, lane, bend: Callable[[Any, Any, Any], Any] | None = None
    ) -> tuple[Any, Any]:
        """Add the window to a row; return its bound and its total then.

        ``bend`` makes a logit of itself, its query head, and how old the token is.
        """
        top = let(top)
        shape, window, count = self._shape, self._shape.spec.window, self._shape.row_values
        spec = shape.spec
        sequence, head = place
        query = self._query(sequence, head, lane)
        length = let(self._seq_lens[sequence])
        tokens = let(T.min(length, i32(window)))
        inside = let(T.truncdiv(head, spec.group_size) * spec.head_dim + lane * count)
        row = T.cast(self._slots[sequence], "int64") * T.int64(window * self._stride)
        base = let(row + T.cast(inside, "int64"))
        # A lane has the logit of a token of each 32.
        logits = local(-(-window // 32), "float32")
        at = local(1, "int32")
        for i in range(int(logits.shape[0])):
            store(logits, f32(MASKED), i)
            store(at, i32(32 * i))
            with loop(at[0] < T.min(tokens, i32(32 * (i + 1)))):
                found = self._dots(query, base, at[0], lane)
                token = let(T.bitwise_and(lane, -self._abreast) + 32 * i)
                own = T.And(token == at[0], at[0] + lane % self._abreast < tokens)
                store(logits, T.Select(own, found, logits[i]), i)
                store(at, at[0] + self._abreast)
            if bend is not None:
                row = let(lane + 32 * i)
                age = T.truncmod(length - 1 - row, window)
                bent = bend(logits[i], head, age)
                store(logits, T.Select(row < tokens, bent, f32(MASKED)), i)
        bound, sum_ = local(1, "float32"), local(1, "float32")
        store(bound, logits[0])
        for i in range(1, int(logits.shape[0])):
            store(bound, T.max(bound[0], logits[i]))
        reduce_lanes(bound, 0, T.max)
        store(bound, T.max(bound[0], top))
        shrink = let(T.exp2(top - bound[0]))
        for i in range(count):
            store(x, x[i] * shrink, i)
        store(sum_, f32(0))
        for i in range(int(logits.shape[0])):
            store(logits, T.exp2(logits[i] - bound[0]), i)
            store(sum_, sum_[0] + logits[i])
            store(at, i32(32 * i))
            with loop(at[0] < T.min(tokens, i32(32 * (i + 1)))):
                self._add(x, logits[i], base, at[0], tokens)
                store(at, at[0] + self._abreast)
        reduce_lanes(sum_, 0, lambda a, b: a + b)
        return bound[0], let(sum_[0] + total * shrink)

    @property
    def _stride(self) -> int:
        """Elements from a row of a ring to the next."""
        return self._shape.spec.num_kv_heads * self._shape.spec.head_dim

    def _query(self, sequence, head, lane):
        """The rotated query, for logits in units of log2."""
        shape, count = self._shape, self._shape.row_values
        query = local(count, "float32")
        for i in range(count):
            store(query, T.cast(self._q[sequence, head, lane * count + i], "float32"), i)
        turn_signs(shape, query, lane)
        rotate_row(shape, query, lane)
        unit = let(self._sm_scale * f32(LOG2E * shape.spec.head_dim**-0.5))
        for i in range(count):
            store(query, query[i] * unit, i)
        return query

    def _read(self, ring, base, first, last=None):
        """Words of a lane's pieces of the rows from ``first`` on, none after ``last``."""
        words = self._shape.row_values // 2
        read = local((self._abreast, words), "uint32")
        for n in range(self._abreast):
            row = first + n if last is None else T.min(first + n, last)
            at = base + T.cast(row * self._stride, "int64")
            for begin in range(0, words, 4):
                four = [read[n, w] for w in range(begin, min(begin + 4, words))]
                place = at + T.int64(2 * begin) if begin else at
                access("ld.global.nc", four, ring.ptr_to([place]))
        return read

    def _values(self, read, n: int):
        """The values of a row's words."""
        dtype = self._shape.spec.dtype
        words = [read[n, w] for w in range(int(read.shape[1]))]
        return [half(dtype, word) for word in words for half in (low_half, high_half)]

    def _dots(self, query, base, first, lane):
        """Logit of a row, by the lane; while there are several sums, lanes halve them."""
        # Rows past the last token are others of the ring, whose logits nobody takes.
        read = self._read(self._k, base, first, i32(self._shape.spec.window - 1))
        sums = local(self._abreast, "float32")
        for n in range(self._abreast):
            values = self._values(read, n)
            store(sums, query[0] * values[0], n)
            for i in range(1, len(values)):
                store(sums, sums[n] + query[i] * values[i], n)
        for mask in (m for m in (8, 4, 2, 1) if m < self._abreast):
            upper = let(T.bitwise_and(lane, mask) != 0)
            for n in range(mask):
                kept = T.Select(upper, sums[n + mask], sums[n])
                given = T.Select(upper, sums[n], sums[n + mask])
                store(sums, kept + shuffle_xor(given, mask), n)
        if self._abreast < 16:
            store(sums, sums[0] + shuffle_xor(sums[0], 8), 0)
        return let(sums[0] + shuffle_xor(sums[0], 16))

    def _add(self, x, weights, base, first, tokens) -> None:
        """Add the rows of V from ``first`` on by the weights that lanes have."""
        read = self._read(self._v, base, first, tokens - 1)
        for n in range(self._abreast):
            # Of rows past the last token, which is read for them, it is zero.
            weight = let(shuffle(weights, first % 32 + n))
            for i, value in enumerate(self._values(read, n)):
                store(x, x[i] + weight * value, i)


def find_window(shape: Shape, q, rings: pages.Rings | None, seq_lens, sm_scale) -> Window | None:
    """The window of a spec that has one."""
    return None if rings is None else Window(shape, q, rings, seq_lens, sm_scale)
