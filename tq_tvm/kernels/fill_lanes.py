"""``fill`` on GPUs of head_dims that tensor cores do not rotate, and of K and V of different ones.

A warp takes 32 rows (token, KV head) at a time, fewer where lanes share one (`lane_rows`), of K
and then of V, or of one of them. ``cp.async`` brings them to shared memory, the next ones while
lanes rotate and encode theirs in registers (`fill_codes`, `fill_direct`); codes are written as wide
as rows of the cache are aligned, and with a window of the spec the rotated rows of the newest
tokens into their rings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels import pages
from tq_tvm.kernels.device import (
    PAIR,
    access,
    f32,
    let,
    local,
    loop,
    ptx,
    shared_dynamic,
    store,
    u32,
    warp_barrier,
    when,
)
from tq_tvm.kernels.fill_codes import Encoded, Encoder
from tq_tvm.kernels.fill_direct import DirectEncoder
from tq_tvm.kernels.fill_places import FillArguments, ring_place, wide_product
from tq_tvm.kernels.hadamard_cuda import hidden_zeros
from tq_tvm.kernels.lane_rows import GROUP, LaneRow, copy_turns, padded_words
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["emit_lanes", "lane_words"]


def lane_words(spec: CacheSpec) -> int:
    """Words of shared memory of a warp: the rows that it takes at a time."""
    return max(
        32 // LaneRow(dim).lanes * padded_words(dim) for dim in (spec.head_dim, spec.value_dim)
    )


class _Side:
    """K or V: rows of a warp."""

    def __init__(self, spec: CacheSpec, name: str, arguments: FillArguments, sign) -> None:
        fmt = spec.cache_format
        self.spec, self.name = spec, name
        self.codec: Codec = fmt.key if name == "k" else fmt.value
        self.row = LaneRow(spec.head_dim if name == "k" else spec.value_dim)
        self.abreast = 32 // self.row.lanes
        self._arguments = arguments
        self._encoder: Any
        if self.codec.family == "lloyd_max":
            self._encoder = Encoder(self.row, self.codec, fmt.scale_rule, sign)
        else:
            scale = arguments.scales.get(name)
            self._encoder = DirectEncoder(self.row, spec.dtype, self.codec, scale)
        self.words = local(self.row.values // 2, "uint32")
        self._value = local(self.row.values, "float32")

    def ask(self, ring, begin, first, total, lane) -> None:
        """Begin to copy the rows from ``first`` on; past the end the last one is repeated."""
        dim, heads = self.row.dim, self.spec.num_kv_heads
        chunks = dim // 8
        rows = self._arguments.rows[self.name]
        for turn in copy_turns(dim, self.abreast):
            piece = let(turn * 32 + lane)
            row, chunk = let(T.truncdiv(piece, chunks)), let(T.truncmod(piece, chunks))
            index = let(T.min(first + row, total - 1))
            token, head = T.truncdiv(index, heads), T.truncmod(index, heads)
            at = wide_product(token, self._arguments.row_stride[self.name])
            at = at + T.cast(head * dim + chunk * 8, "int64")
            to = let(begin + row * padded_words(dim) + chunk * 4)
            ptx("cp.async.cg.shared.global", ring.ptr_to([to]), rows.ptr_to([at]), 16)
        ptx("cp.async.commit_group")

    def read(self, ring, begin, own, part) -> None:
        """Read the lane's part of its row."""
        start = let(begin + own * padded_words(self.row.dim))
        self.row.read(self.words, lambda at: ring.ptr_to([start + at]), part)

    def encode(self, part, keep: Callable[[Callable[[int], Any]], None] | None) -> Encoded:
        """Codes and scales of the row that was read.

        ``keep`` is called with what makes a word of the rotated row in the model's dtype.
        """
        row, value, rotation = self.row, self._value, self.spec.cache_format.rotation
        unit, dtype = row.dim**-0.5, self.spec.dtype
        if rotation == "none" and keep is not None:
            keep(lambda i: self.words[i])
        if self.codec.family == "none" and rotation == "none":
            return Encoded([self.words], [])
        if rotation == "signed_hadamard":
            row.turn_signs(self.words, part)
        row.widen(dtype, self.words, value)
        if self.codec.family == "lloyd_max":
            squared = local(1, "float32")
            store(squared, f32(0))
            for i in range(row.values):
                store(squared, squared[0] + value[i] * value[i])
            row.add_up(squared)
            row.rotate(value, part)
            row.negate(value)
            if keep is not None:
                keep(functools.partial(self._round, -unit))
            return self._encoder.encode(value, part, squared[0])
        if rotation != "none":
            row.rotate(value, part)
            for i in range(row.values):
                store(value, value[i] * f32(unit), i)
            if keep is not None:
                keep(functools.partial(self._round, 1.0))
        return self._encoder.encode(value)

    def _round(self, unit: float, i: int):
        """A word of values times ``unit`` in the model's dtype."""
        word = local(1, "uint32")
        pair = [self._value[2 * i + e] * f32(unit) for e in (1, 0)]
        ptx(PAIR[self.spec.dtype], word[0], *pair)
        return word[0]

    def write(self, where, part, encoded: Encoded) -> None:
        """Codes of a lane, and by one lane of a row the scales."""
        page, offset, head = where
        spec, codec, given, name = self.spec, self.codec, self._arguments, self.name
        place = let(pages.page_row(spec, offset, head))
        width = codec.packed_bytes(self.row.dim)
        codes = wide_product(page, given.code_stride[name]) + T.cast(place * width, "int64")
        self._write_codes(let(codes), width, part, encoded)
        if not codec.meta:
            return
        with when(part == 0):
            count = len(codec.meta)
            metas = wide_product(page, given.meta_stride[name]) + T.cast(place * count, "int64")
            metas = let(metas)
            for i, scale in enumerate(encoded.scales):
                store(given.metas[name], T.cast(scale, spec.dtype), metas + T.int64(i))

    def _write_codes(self, codes, width: int, part, encoded: Encoded) -> None:
        flat, lanes, dim = self._arguments.codes[self.name], self.row.lanes, self.row.dim
        if not self.codec.packed:
            self._write_values(flat, codes, part, lambda i: encoded.planes[0][i])
            return
        first = 0
        for bits, words in zip(self.codec.plane_bits, encoded.planes, strict=True):
            size = dim * bits // 8
            aligned = math.gcd(width, first, 16)
            if lanes > 1:
                self._write_turns(flat, codes, words, size // 4, part, first)
            elif aligned < 4:
                for n in range(size // 2):
                    short = T.cast(T.shift_right(words[n // 2], u32(n % 2 * 16)), "uint16")
                    ptx("st.global.u16", flat.ptr_to([codes + T.int64(first + 2 * n)]), short)
            else:
                self._write_words(flat, codes + T.int64(first), words, size // 4, aligned // 4)
            first += size

    def keep(self, newest, place: Callable[[], Any], part, word: Callable[[int], Any]) -> None:
        """Write the row to its place in a ring, if the token is among the newest."""
        with when(newest):
            self._write_values(self._arguments.rings[self.name], let(place()), part, word)

    def _write_values(self, flat, first, part, word: Callable[[int], Any]) -> None:
        """Words of a lane, of two values each, of the row at ``first``."""
        step = 4 if self.row.lanes == 1 else 2
        for n in range(0, self.row.values // 2, step):
            at = first + T.cast((n // 2 * self.row.lanes + part) * GROUP, "int64")
            access("st.global", [word(n + i) for i in range(step)], flat.ptr_to([at]))

    def _write_turns(self, flat, codes, words, count: int, part, first: int) -> None:
        """Words of lanes in turn, at the end of some of them alone."""
        lanes = self.row.lanes

        def write(n: int) -> None:
            at = codes + T.cast((n * lanes + part) * 4 + first, "int64")
            ptx("st.global.u32", flat.ptr_to([at]), words[n])

        for n in range(count // lanes):
            write(n)
        if count % lanes:
            with when(part < count % lanes):
                write(count // lanes)

    @staticmethod
    def _write_words(flat, codes, words, count: int, most: int) -> None:
        """Neighbouring words, up to ``most`` at once."""
        for n in range(0, count, most):
            wide = min(most, count - n)
            at = flat.ptr_to([codes + T.int64(4 * n)])
            access("st.global", [words[n + i] for i in range(wide)], at)


def emit_lanes(
    spec: CacheSpec, config: Any, arguments: FillArguments, tokens, block, side, thread, slots
) -> None:
    """``32 tiles`` rows of a warp; ``slots`` says where a token goes, see `fill_places`."""
    heads = spec.num_kv_heads
    warp, lane = let(thread // 32), let(thread % 32)
    total = let(T.cast(tokens, "int32") * heads)
    (zero,) = hidden_zeros(total, lane, 1)
    # Of two constants in an operation it would make two instructions.
    sign = local(1, "uint32")
    store(sign, T.shift_left(zero + u32(1), u32(31)))
    words = lane_words(spec)
    ring = shared_dynamic(config.warps * words, "uint32")
    begin = let(warp * words)
    start = let((T.cast(block, "int32") * config.warps + warp) * (32 * config.tiles))
    last = let(T.min(start + 32 * config.tiles, total))
    first = local(1, "int32")

    def work(name: str) -> None:
        one = _Side(spec, name, arguments, sign[0])
        own, part = let(lane // one.row.lanes), let(lane % one.row.lanes)

        def row_of(begins):
            index = let(T.min(begins + own, total - 1))
            return let(T.truncdiv(index, heads)), let(T.truncmod(index, heads))

        store(first, start)
        # A warp whose rows all lie past the end has nothing to exchange either.
        with when(first[0] < last):
            one.ask(ring, begin, first[0], total, lane)
            slots.start(row_of(first[0])[0])
            with loop(first[0] < last):
                token, head = row_of(first[0])
                page, offset, wanted = slots.find(token)
                ptx("cp.async.wait_group", 0)
                warp_barrier()
                one.read(ring, begin, own, part)
                warp_barrier()
                following = let(first[0] + one.abreast)
                with when(following < last):
                    one.ask(ring, begin, following, total, lane)
                exists = T.And(wanted, first[0] + own < last)
                keep = None
                if arguments.rings:
                    newest = let(T.And(exists, slots.is_newest(token)))
                    place = functools.partial(ring_place, spec, slots, token, head, one.row.dim)
                    keep = functools.partial(one.keep, newest, place, part)
                encoded = one.encode(part, keep)
                with when(exists):
                    one.write((page, offset, head), part, encoded)
                store(first, following)

    if config.sides == 1:
        work("k")
        work("v")
    else:
        with I.If(side == 0):
            with I.Then():
                work("k")
            with I.Else():
                work("v")
