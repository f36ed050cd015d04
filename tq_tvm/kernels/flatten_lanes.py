"""``flatten`` on GPUs where tensor cores do not rotate, and of K and V of different head_dims.

A warp takes 32 rows at a time, fewer where lanes share one (`lane_rows`): a lane reads its codes
as wide as rows are aligned, looks up or computes the values (`word_codes`) and, to rotate back,
rotates them in registers. Rows go out through shared memory, 16 bytes of neighbouring lanes next to
one another.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels import pages
from tq_tvm.kernels.device import (
    PAIR,
    access,
    f32,
    i32,
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
from tq_tvm.kernels.lane_rows import GROUP, LaneRow, copy_turns, padded_words
from tq_tvm.kernels.lookup_cuda import GLOBAL, row_scale
from tq_tvm.kernels.word_codes import WordCodes, code_fields, code_words, third_bits
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["emit_lanes"]


class _Side:
    """K or V: rows of a warp."""

    def __init__(self, spec: CacheSpec, codec: Codec, dim: int, cache: Any, back: bool) -> None:
        self.spec, self.codec, self.row, self._cache, self._back = (
            spec, codec, LaneRow(dim), cache, back,
        )  # fmt: skip
        self.abreast = 32 // self.row.lanes
        self._width = codec.packed_bytes(dim)
        groups = self.row.values // GROUP
        count = code_words(dim, codec) // self.row.lanes if codec.packed else 2 * groups
        self._codes = local(count, "uint32")
        self._third = local(count, "uint32") if len(codec.plane_bits) > 1 else None
        self._meta = local(1, "uint32")
        self._scale = let(cache.metas[0]) if codec.tensor_scale else None

    def blank(self) -> None:
        """Codes and scales of a row of zeros, all of them positive."""
        zero = 0
        if self.codec.family == "lloyd_max":
            zero = 0x88888888 if self.codec.plane_bits[0] == 4 else 0xAAAAAAAA
        for i in range(int(self._codes.shape[0])):
            store(self._codes, u32(zero), i)
            if self._third is not None:
                store(self._third, u32(0x55555555), i)
        store(self._meta, u32(0))

    def load(self, page, place, part) -> None:
        """Read codes and scales of the row at ``place`` of a page."""
        cache, lanes = self._cache, self.row.lanes
        codes = let(page * cache.code_stride + T.cast(place * self._width, "int64"))
        count = int(self._codes.shape[0])
        if not self.codec.packed:
            for n in range(count // 2):
                at = codes + T.cast((n * lanes + part) * GROUP, "int64")
                pair = [self._codes[2 * n + i] for i in range(2)]
                access(GLOBAL, pair, cache.codes.ptr_to([at]))
        elif lanes == 1:
            self._read_run(codes, count)
        else:
            for n in range(count):
                at = T.cast((n * lanes + part) * 4, "int64")
                ptx(f"{GLOBAL}.u32", self._codes[n], cache.codes.ptr_to([codes + at]))
        if self._third is not None:
            for n in range(count):
                word = n if lanes == 1 else n * lanes + part
                bits = third_bits(self.row.dim, lambda at, size: self._read(codes, at, size), word)
                store(self._third, bits, n)
        metas = len(self.codec.meta)
        if metas:
            at = cache.metas.ptr_to([page * cache.meta_stride + T.cast(place * metas, "int64")])
            if metas == 2:
                ptx(f"{GLOBAL}.u32", self._meta[0], at)
            else:
                self._short(self._meta, 0, at)

    @staticmethod
    def _short(register, index: int, at) -> None:
        short = local(1, "uint16")
        ptx(f"{GLOBAL}.u16", short[0], at)
        store(register, T.cast(short[0], "uint32"), index)

    def _read(self, codes, at, size: int):
        """Bytes of the second plane."""
        found, codes_ = local(1, "uint32"), self._cache.codes
        place = codes + (T.int64(at) if isinstance(at, int) else T.cast(at, "int64"))
        if size == 4 and self._width % 4 == 0:
            ptx(f"{GLOBAL}.u32", found[0], codes_.ptr_to([place]))
            return found[0]
        self._short(found, 0, codes_.ptr_to([place]))
        return found[0]

    def _read_run(self, codes, count: int) -> None:
        """Words of the first plane of a row that a lane has alone."""
        flat, words = self._cache.codes, self._codes
        most = math.gcd(self._width, 16) // 4
        if most == 0:
            halves = local(2, "uint32")
            for n in range(count):
                for i in range(2):
                    self._short(halves, i, flat.ptr_to([codes + T.int64(4 * n + 2 * i)]))
                store(words, T.bitwise_or(halves[0], T.shift_left(halves[1], u32(16))), n)
            return
        for n in range(0, count, most):
            wide = min(most, count - n)
            registers = [words[n + i] for i in range(wide)]
            access(GLOBAL, registers, flat.ptr_to([codes + T.int64(4 * n)]))

    def leave(self, pointer, part) -> None:
        """Leave the row in shared memory; ``pointer`` is of its words."""
        row, codec, dtype = self.row, self.codec, self.spec.dtype
        count = int(self._codes.shape[0])
        if codec.family == "none":
            if self._back:
                value = local(row.values, "float32")
                row.widen(dtype, self._codes, value)
                self._leave_rotated(value, f32(1), pointer, part)
            else:
                row.write(self._codes, pointer, part)
            return
        looked = codec.family == "lloyd_max"
        words = WordCodes(row.dim, dtype, codec, self._meta[0], self._scale, self._back and looked)
        groups = row.values // (GROUP * code_fields(codec))
        if not self._back:
            for n in range(count):
                third = None if self._third is None else self._third[n]
                for field, pair in enumerate(words.pairs(self._codes[n], third)):
                    group = (n + field * groups) * row.lanes + part
                    access("st.shared", pair, pointer(2 * group))
            return
        value = local(row.values, "float32")
        for n in range(count):
            third = None if self._third is None else self._third[n]
            for field, four in enumerate(words.floats(self._codes[n], third)):
                for i, one in enumerate(four):
                    store(value, one, (n + field * groups) * GROUP + i)
        scale = f32(1)
        if looked:
            scale = row_scale(dtype, codec, self._meta[0]) * f32(row.dim**-0.5)
        self._leave_rotated(value, scale, pointer, part)

    def _leave_rotated(self, value, scale, pointer, part) -> None:
        row, dtype = self.row, self.spec.dtype
        row.rotate(value, part)
        scale = let(scale * f32(row.dim**-0.5))
        pairs = local(row.values // 2, "uint32")
        for i in range(row.values // 2):
            ptx(PAIR[dtype], pairs[i], value[2 * i + 1] * scale, value[2 * i] * scale)
        if self.spec.cache_format.rotation == "signed_hadamard":
            row.turn_signs(pairs, part)
        row.write(pairs, pointer, part)


def emit_lanes(
    spec: CacheSpec, config: Any, back: bool, caches: list, tables: tuple, outputs: list,
    sizes: tuple, block, thread,
) -> None:  # fmt: skip
    """``32 tiles`` rows of a warp, K and then V; ``back`` says whether to rotate back."""
    block_table, seq_lens, start_loc = tables
    tokens, batch = sizes
    fmt, heads = spec.cache_format, spec.num_kv_heads
    warp, lane = let(thread // 32), let(thread % 32)
    total = let(T.cast(tokens, "int32") * heads)
    dims = (spec.head_dim, spec.value_dim)
    most = max(32 // LaneRow(dim).lanes * padded_words(dim) for dim in dims)
    words = shared_dynamic(config.warps * most, "uint32")
    begin = let(warp * most)
    start = let((T.cast(block, "int32") * config.warps + warp) * (32 * config.tiles))
    last = let(T.min(start + 32 * config.tiles, total))
    first, low = local(1, "int32"), local(1, "int32")

    def load(side: _Side, row, part) -> None:
        token = let(T.truncdiv(row, heads))
        pages.advance_start(low, start_loc, batch, token)
        position = let(token - start_loc[low[0]])
        side.blank()
        with when(T.And(position >= 0, position < seq_lens[low[0]])):
            head = T.truncmod(row, heads)
            page, place = pages.token_row(spec, block_table, low[0], position, head)
            side.load(page, place, part)

    def write(side: _Side, out, stride) -> None:
        """Copy the rows from shared memory to where they belong."""
        dim = side.row.dim
        chunks, piece = dim // 8, local(4, "uint32")
        for turn in copy_turns(dim, side.abreast):
            index = let(turn * 32 + lane)
            inside, chunk = let(T.truncdiv(index, chunks)), let(T.truncmod(index, chunks))
            row = let(first[0] + inside)
            with when(row < last):
                at = let(begin + inside * padded_words(dim) + chunk * 4)
                registers = [piece[i] for i in range(4)]
                access("ld.shared", registers, words.ptr_to([at]))
                token, head = T.truncdiv(row, heads), T.truncmod(row, heads)
                to = T.cast(token, "int64") * stride + T.cast(head * dim + chunk * 8, "int64")
                access("st.global", registers, out.ptr_to([to]))

    for codec, dim, cache, output in zip((fmt.key, fmt.value), dims, caches, outputs, strict=True):
        side = _Side(spec, codec, dim, cache, back)
        own, part = let(lane // side.row.lanes), let(lane % side.row.lanes)
        out = pages.flat(output)
        store(first, start)
        store(low, i32(0))
        with when(first[0] < last):
            token = T.truncdiv(T.min(first[0] + own, total - 1), heads)
            pages.find_last_start(low, start_loc, batch, let(token))
            row_start = let(begin + own * padded_words(dim))

            def pointer(at, row_start=row_start):
                return words.ptr_to([row_start + at])

            with loop(first[0] < last):
                load(side, let(T.min(first[0] + own, total - 1)), part)
                side.leave(pointer, part)
                warp_barrier()
                write(side, out, output.strides[0])
                warp_barrier()
                store(first, first[0] + side.abreast)
