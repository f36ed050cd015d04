"""Pieces of attention on CPUs: what ``decode`` and ``attend`` do with rows of queries, K and V.

A task has some query rows of one KV head. It rotates them, walks ``tile`` tokens at a time, decodes
a row of K or V once for all of them, and keeps an online softmax: m = the largest logit (in units
of log2), l = sum 2^(logit - m) and o = sum 2^(logit - m) v of each query row.

K rows are decoded without their first scale, which multiplies the score. With ``lookup``, for k4v2
alone, eight codes become values at once: a row has eight keys of either residual's sign, a register
each, and V's four levels fill another twice.

A spec's window: the newest tokens' rows come from the sequence's ring, position p from row
p % window, rotated and in the model's dtype (``fill`` leaves them there).

Every method is called while a TVMScript function is being parsed and appends to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.formats import Codec, hadamard_factors
from tq_tvm.kernels.blocks import paley_rows, rotation_scale, select, sign_of
from tq_tvm.kernels.codecs import read_row
from tq_tvm.kernels.device import LOG2E, LOWEST, local
from tq_tvm.kernels.pages import Rings, matched_buffer, row_index, token_place
from tq_tvm.spec import CacheSpec

__all__ = ["CpuRows", "Source", "State", "sources"]

_LANES = 8
"""Floats of an AVX2 register: the centroids of K."""


def _look_up(table, codes):
    """``table[code]`` by the three low bits of every code: one AVX2 instruction."""
    at = T.Ramp(0, 1, _LANES)
    return T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", table[at], codes)


def _shifted(codes, bits):
    wide = T.cast(codes, "int32x8")
    return T.shift_right(wide, T.Broadcast(T.int32(bits), _LANES))


def _key_row(above, below, codes, bits):
    """Eight values of K, without their norm."""
    wide = _shifted(codes, bits)
    sign = T.bitwise_and(wide, T.Broadcast(T.int32(8), _LANES))
    positive = T.NE(sign, T.Broadcast(T.int32(0), _LANES))
    return T.Select(positive, _look_up(above, wide), _look_up(below, wide))


def _number(value, dtype: str = "float32"):
    """A scalar that later statements may `_assign`."""
    buffer = T.local_scalar(dtype=dtype).source
    I.buffer_store(buffer, value, [0])
    return buffer[0]


def _assign(number, value) -> None:
    I.buffer_store(number.source, value, [0])


@dataclasses.dataclass(frozen=True)
class State:
    """Buffers of one task: rows of queries, a row of the cache, and the softmax of each query."""

    query: Any
    scratch: Any
    row: Any
    partial: Any
    score: Any
    acc: Any
    top: Any
    total: Any
    levels: Any
    above: Any
    below: Any
    value_table: Any


@dataclasses.dataclass(frozen=True)
class Source:
    """One side of the cache: codes, scales, and with a window its rings and whose is which."""

    cache: Any
    meta: Any
    table: Any
    ring: Any = None
    slots: Any = None


def sources(caches: list, table, rings: Rings | None = None) -> tuple[Source, Source]:
    """K and V of what `pages.match_caches` and `pages.match_rings` matched."""
    k_cache, v_cache, k_meta, v_meta = map(matched_buffer, caches)
    if rings is None:
        return Source(k_cache, k_meta, table), Source(v_cache, v_meta, table)
    return (
        Source(k_cache, k_meta, table, rings.k, rings.slots),
        Source(v_cache, v_meta, table, rings.v, rings.slots),
    )


class CpuRows:
    """The pieces for one spec; ``vector`` and ``lookup`` are decisions, see ``decode_cpu``."""

    def __init__(self, spec: CacheSpec, tile: int, vector: int, lookup: bool) -> None:
        self.spec = spec
        self.tile = tile
        self.lookup = lookup
        self.vec_k = min(vector, spec.head_dim // 4)
        self.vec_v = min(vector, spec.value_dim // 4)
        self.key, self.value = spec.cache_format.key, spec.cache_format.value
        self.rotation = spec.cache_format.rotation
        self.key_scale = rotation_scale(self.rotation, spec.head_dim)
        self.value_scale = rotation_scale(self.rotation, spec.value_dim)

    def allocate(self, rows: int) -> State:
        """Buffers of a task with at most ``rows`` queries, and the tables of ``lookup``."""
        dim, value_dim = self.spec.head_dim, self.spec.value_dim
        longer = max(dim, value_dim)
        shapes: list[tuple[int, ...]] = [
            (rows, dim), (longer,), (longer,), (self.vec_k,), (rows, self.tile), (rows, value_dim),
            (rows,), (rows,), (2, _LANES), (_LANES,), (_LANES,), (_LANES,),
        ]  # fmt: skip
        state = State(*(local(shape, "float32") for shape in shapes))
        if self.lookup:
            key_levels = tuple(c * dim**-0.5 for c in self.key.centroids)
            value_levels = tuple(c * value_dim**-0.5 for c in self.value.centroids)
            with I.unroll(0, _LANES) as j:
                I.buffer_store(state.levels, select(j, key_levels), [0, j])
                # Twice the four levels: the third bit of a selector is the next code's.
                I.buffer_store(state.value_table, select(j % 4, value_levels), [j])
        return state

    def signed(self, value, j, dim: int):
        """A coordinate times its sign of the signed rotation."""
        return value * sign_of(j, dim) if self.rotation == "signed_hadamard" else value

    def rotate(self, x, y, row, dim: int) -> None:
        """Unscaled Hadamard transform of ``x[row]``, where the format has one; ``y`` is scratch."""
        factors = hadamard_factors(dim)
        steps = 0 if self.rotation == "none" else factors[-1].bit_length() - 1
        with I.unroll(0, steps) as s:
            with I.serial(0, dim) as i:
                I.buffer_store(y, x[row, i], [i])
            with I.serial(0, dim) as i:
                other = y[T.bitwise_xor(i, T.shift_left(1, s))]
                first = T.EQ(T.bitwise_and(T.shift_right(i, s), 1), 0)
                I.buffer_store(x, T.Select(first, y[i] + other, other - y[i]), [row, i])
        *orders, inner = factors
        for order in reversed(orders if self.rotation != "none" else []):
            with I.serial(0, dim) as i:
                I.buffer_store(y, x[row, i], [i])
            with I.serial(0, dim // (order * inner)) as outer, I.serial(0, inner) as low:
                places = [outer * (order * inner) + j * inner + low for j in range(order)]
                sums = paley_rows(order, [I.bind(y[c]) for c in places])
                for c, value in zip(places, sums, strict=True):
                    I.buffer_store(x, value, [row, c])
            inner *= order

    def start(self, state: State, i, q: Callable, sm_scale) -> None:
        """Rotate and scale query row ``i``, whose elements ``q`` reads; nothing is attended yet."""
        dim, value_dim = self.spec.head_dim, self.spec.value_dim
        with I.serial(0, dim) as j:
            I.buffer_store(state.query, self.signed(T.cast(q(j), "float32"), j, dim), [i, j])
        self.rotate(state.query, state.scratch, i, dim)
        with I.serial(0, dim) as j:
            scale = sm_scale * T.float32(LOG2E * self.key_scale)
            I.buffer_store(state.query, state.query[i, j] * scale, [i, j])
            if dim == value_dim:
                I.buffer_store(state.acc, T.float32(0), [i, j])
        if dim != value_dim:
            with I.serial(0, value_dim) as j:
                I.buffer_store(state.acc, T.float32(0), [i, j])
        I.buffer_store(state.top, T.float32(LOWEST), [i])
        I.buffer_store(state.total, T.float32(0), [i])

    def read_key(self, state: State, k: Source, sequence, position, length, head):
        """A row of K into ``state.row``; returns what its products have to be multiplied by."""
        at, norm, residual = self._find(self.key, k, sequence, position, head)
        if self.lookup:
            self._look_up_keys(state, k.cache, at, residual)
        else:
            vec = self.vec_k

            def packed() -> None:
                dim = self.spec.head_dim
                read_row(self.key, dim, k.cache, at, state.row, vec, residual, lambda x: x)

            def unpacked() -> None:
                self._ring_row(k, sequence, position, head, state.row, self.spec.head_dim)
                _assign(norm, T.float32(1))

            self._either(position, length, unpacked, packed)
        return norm

    def read_value(self, state: State, v: Source, sequence, position, length, head) -> None:
        """A row of V into ``state.row``."""
        at, norm, zero = self._find(self.value, v, sequence, position, head)
        if self.lookup:
            self._look_up_values(state, v.cache, at, norm)

        def packed() -> None:
            # What is left of a row after the look-ups.
            fields = 0 if self.lookup else None
            read_row(
                self.value, self.spec.value_dim, v.cache, at, state.row, self.vec_v, zero,
                lambda x: norm * x, fields,
            )  # fmt: skip

        def unpacked() -> None:
            self._ring_row(v, sequence, position, head, state.row, self.spec.value_dim)

        self._either(position, length, unpacked, packed)

    def dot(self, state: State, i):
        """The product of query row ``i`` and the row."""
        vec, partial = self.vec_k, state.partial
        with I.vectorized(0, vec) as v:
            I.buffer_store(partial, T.float32(0), [v])
        with I.unroll(0, self.spec.head_dim // vec) as jo, I.vectorized(0, vec) as v:
            product = state.query[i, jo * vec + v] * state.row[jo * vec + v]
            I.buffer_store(partial, partial[v] + product, [v])
        dot = _number(T.float32(0))
        with I.unroll(0, vec) as v:
            _assign(dot, dot + partial[v])
        return dot

    def weigh(self, state: State, i, count, *, masked: bool) -> None:
        """Scores of query row ``i`` for ``count`` tokens become weights; what was is rescaled.

        ``masked``: scores may be `LOWEST`, of tokens that the query does not see.
        """
        score, top, total, acc = state.score, state.top, state.total, state.acc
        peak = _number(top[i])
        with I.serial(0, count) as r:
            _assign(peak, T.max(peak, score[i, r]))
        rescale = _number(T.exp2(top[i] - peak))
        I.buffer_store(top, peak, [i])
        I.buffer_store(total, total[i] * rescale, [i])
        vec = self.vec_v
        with I.serial(0, self.spec.value_dim // vec) as jo, I.vectorized(0, vec) as v:
            I.buffer_store(acc, acc[i, jo * vec + v] * rescale, [i, jo * vec + v])
        with I.serial(0, count) as r:
            weight = T.exp2(score[i, r] - peak)
            if masked:
                unseen = T.EQ(score[i, r], T.float32(LOWEST))
                weight = T.if_then_else(unseen, T.float32(0), weight)
            I.buffer_store(score, weight, [i, r])
            I.buffer_store(total, total[i] + score[i, r], [i])

    def add(self, state: State, i, r) -> None:
        """Add the row by the weight of token ``r`` for query row ``i``."""
        vec, acc = self.vec_v, state.acc
        with I.unroll(0, self.spec.value_dim // vec) as jo, I.vectorized(0, vec) as v:
            j = jo * vec + v
            I.buffer_store(acc, acc[i, j] + state.score[i, r] * state.row[j], [i, j])

    def leave(self, state: State, workspace, i, target, pieces) -> None:
        """Leave the softmax of query row ``i`` as piece ``target`` of ``pieces``."""
        dim = self.spec.value_dim
        target = I.bind(target)
        stats = I.bind(pieces * dim)
        with I.serial(0, dim) as j:
            I.buffer_store(workspace, state.acc[i, j], [target * dim + j])
        I.buffer_store(workspace, state.top[i], [stats + target * 2])
        I.buffer_store(workspace, state.total[i], [stats + target * 2 + 1])

    def collect(self, workspace, line, splits, pieces):
        """Merge the pieces of a query row: o as a row, scratch of a row, m and l."""
        dim = self.spec.value_dim
        stats = I.bind(pieces * dim)
        merged, scratch = local((1, dim), "float32"), local(dim, "float32")
        best, weight = _number(T.float32(LOWEST)), _number(T.float32(0))
        with I.serial(0, dim) as j:
            I.buffer_store(merged, T.float32(0), [0, j])
        with I.serial(0, splits) as s:
            top = workspace[stats + (line * splits + s) * 2]
            _assign(best, T.max(best, top))
        with I.serial(0, splits) as s:
            factor = _number(T.exp2(workspace[stats + (line * splits + s) * 2] - best))
            total = workspace[stats + (line * splits + s) * 2 + 1]
            _assign(weight, weight + factor * total)
            with I.serial(0, dim) as j:
                value = merged[0, j] + factor * workspace[(line * splits + s) * dim + j]
                I.buffer_store(merged, value, [0, j])
        return merged, scratch, best, weight

    def write(self, x, row, inverse, out, token, head) -> None:
        """Write ``x[row]``, which is rotated back, times ``inverse``."""
        dim = self.spec.value_dim
        with I.serial(0, dim) as j:
            value = self.signed(x[row, j] * inverse, j, dim)
            I.buffer_store(out, T.cast(value, self.spec.dtype), [token, head, j])

    def _find(self, codec: Codec, side: Source, sequence, position, head):
        """Where a token's row is, its first scale or the tensor's, and its second one or None."""
        page, offset = token_place(self.spec, side.table, sequence, position)
        at = row_index(self.spec, _number(page, "int64"), I.bind(offset), head)
        if codec.meta:
            norm = _number(T.cast(side.meta[tuple(at(0))], "float32"))
        else:
            norm = _number(side.meta[0] if codec.tensor_scale else T.float32(1))
        second = None
        if len(codec.meta) == 2:
            second = _number(T.cast(side.meta[tuple(at(1))], "float32"))
        return at, norm, second

    def _either(self, position, length, unpacked: Callable, packed: Callable) -> None:
        """One of both, as the position is in the window or not."""
        if not self.spec.window:
            packed()
            return
        with I.If(position >= length - self.spec.window):
            with I.Then():
                unpacked()
            with I.Else():
                packed()

    def _ring_row(self, side: Source, sequence, position, head, row, dim: int) -> None:
        """A row of the window into ``row``."""
        with I.serial(0, dim) as j:
            value = side.ring[side.slots[sequence], position % self.spec.window, head, j]
            I.buffer_store(row, T.cast(value, "float32"), [j])

    def _look_up_keys(self, state: State, cache, at: Callable, residual) -> None:
        half = self.spec.head_dim // 2
        with I.vectorized(0, _LANES) as v:
            I.buffer_store(state.above, state.levels[0, v] + residual, [v])
        with I.vectorized(0, _LANES) as v:
            I.buffer_store(state.below, state.levels[0, v] - residual, [v])
        with I.unroll(0, half // _LANES) as jo, I.unroll(0, 2) as upper:
            codes = cache[tuple(at(T.Ramp(jo * _LANES, 1, _LANES)))]
            values = _key_row(state.above, state.below, codes, 4 * upper)
            I.buffer_store(state.row, values, [T.Ramp(half * upper + jo * _LANES, 1, _LANES)])

    def _look_up_values(self, state: State, cache, at: Callable, norm) -> None:
        quarter = self.spec.value_dim // 4
        with I.unroll(0, 4) as part, I.unroll(0, quarter // _LANES) as jo:
            codes = cache[tuple(at(T.Ramp(jo * _LANES, 1, _LANES)))]
            values = _look_up(state.value_table, _shifted(codes, 2 * part))
            values = T.Broadcast(norm, _LANES) * values
            I.buffer_store(state.row, values, [T.Ramp(quarter * part + jo * _LANES, 1, _LANES)])
