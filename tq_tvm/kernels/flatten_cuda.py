r"""``flatten`` on NVIDIA GPUs: the threads of ``kernels.flatten``'s equation.

One launch. Of K and V of one head_dim of 64, 128 or 256 (others: `flatten_lanes`) several lanes
take a row (output token, KV head), K and V, and look its values up by ``prmt`` (`lookup_cuda`), in
the model's dtype; those of direct codecs are computed (`flatten_direct`).

In the rotated domain eight lanes take a row. A lane's bytes of it are contiguous, and so are the
lanes' writes: 16 bytes of K and 8 of V each, at D = 128.

To rotate back, four lanes take a row and look up halves of unit scale, which tensor cores rotate
(`hadamard_cuda`); the scale is applied in float32 at the end, and the signs of the rotation turned
in the words that are written. Halves round to 2^-12 of a value, an eighth of what bfloat16 rounds
the result by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

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
    store,
    u32,
    when,
)
from tq_tvm.kernels.flatten_direct import DirectSide, RotatedDirectSide
from tq_tvm.kernels.flatten_lanes import emit_lanes
from tq_tvm.kernels.hadamard_cuda import (
    RowBits,
    RowSigns,
    hadamard_words,
    hidden_zeros,
    rotate_rows,
)
from tq_tvm.kernels.lane_rows import multiplies
from tq_tvm.kernels.lookup_cuda import CodedRow, LevelTable, unit_levels
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["FlattenConfig", "flatten_cuda"]


@dataclasses.dataclass(frozen=True)
class FlattenConfig:
    """The decisions of one kernel; ``schedules/factories.py`` says what each one trades."""

    warps: int
    rows: int
    tiles: int
    registers: int
    contracted: int = 0


@dataclasses.dataclass(frozen=True)
class _Cache:
    """Flat views of codes and metas of one side, and their page strides.

    In the place of metas a tensor's scale, or None.
    """

    codes: Any
    metas: Any
    code_stride: Any
    meta_stride: Any

    @classmethod
    def of(cls, codes: pages.Strided, metas: pages.Strided | None) -> _Cache:
        """Views of two arguments."""
        views = pages.flat(codes), None if metas is None else pages.flat(metas)
        return cls(*views, codes.strides[0], None if metas is None else metas.strides[0])


class _Side(CodedRow):
    """K or V of a lane's part of a row: codes, scales, and what becomes of them."""

    def __init__(self, spec: CacheSpec, codec: Codec, cache: _Cache, lanes: int) -> None:
        super().__init__(spec.head_dim, spec.dtype, codec, lanes)
        self.spec, self._cache = spec, cache

    def load(self, page, place, part) -> None:
        """Read codes and scales of the row at ``place`` of a page."""
        cache, count = self._cache, len(self.codec.meta)
        width = self.codec.packed_bytes(self.spec.head_dim)
        codes = let(page * cache.code_stride + T.cast(place * width, "int64"))
        self.read_codes(lambda at: cache.codes.ptr_to([codes + at]), part)
        metas = cache.metas.ptr_to([page * cache.meta_stride + T.cast(place * count, "int64")])
        if count == 2:
            ptx("ld.global.nc.u32", self.meta[0], metas)
        else:
            short = local(1, "uint16")
            ptx("ld.global.nc.u16", short[0], metas)
            store(self.meta, T.cast(short[0], "uint32"))

    def blank(self) -> None:
        """Codes and scales of a row of zeros, all of them positive."""
        for i in range(max(1, self.bytes // 4)):
            store(self.codes, u32(0x88888888 if self.field == 4 else 0xAAAAAAAA), i)
            if self.planes > 1:
                store(self.third, u32(0x55555555), i)
        store(self.meta, u32(0))

    def write(self, out, row, part) -> None:
        """Write the values; ``row`` is the index of the row's first element."""
        for first, found in self.lines(part):
            at = row + T.cast(first, "int64")
            words = len(found)
            line = local(words, "uint32")
            for i in range(words):
                store(line, found[i], i)
            for i in range(0, words, 4):
                pieces = [line[n] for n in range(i, min(i + 4, words))]
                access("st.global", pieces, out.ptr_to([at + T.int64(2 * i)]))


class _RotatedSide(_Side):
    """The same, rotated back: the warp writes 8 rows together."""

    def __init__(
        self,
        spec: CacheSpec,
        codec: Codec,
        cache: _Cache,
        row: RowBits,
        ones: dict[str, Any],
        signs: RowSigns | None,
    ) -> None:
        super().__init__(spec, codec, cache, 4)
        self._row, self._ones, self._signs = row, ones["float16"], signs

    def read_codes(self, pointer: Callable[[Any], Any], part) -> None:
        piece = self._row.piece
        for n in range(self.bytes // piece):
            at = pointer(T.cast(part * piece + n * 4 * piece, "int64"))
            words = piece // 4
            access(self.wide, [self.codes[n * words + i] for i in range(words)], at)
        if self.planes > 1:
            self._load_third(pointer, part)

    def _load_third(self, pointer: Callable[[Any], Any], part) -> None:
        """The second plane: of D = 256 a lane has both halves, else two lanes have a half each."""
        piece, count = self._row.piece, self.bytes // 4
        lanes = self.plane // 2 // piece
        at = pointer(T.cast(part % lanes * piece + self.plane, "int64"))
        words = min(piece // 4, count)
        access(self.wide, [self.third[i] for i in range(words)], at)
        for i in range(words, count):
            store(self.third, self.third[i - words], i)
        if lanes < 4:
            self._align(range(count), part // lanes)
        else:
            self._align(range(words, count), i32(1))

    def rotated(self):
        """Values of a lane in order of their coordinates, in pairs of the model's dtype."""
        spec, row = self.spec, self._row
        norm, residual = self._scales()
        levels = unit_levels(self.codec, spec.head_dim, residual)
        table = LevelTable.rounded("float16", levels)
        words = local(spec.head_dim // 8, "uint32")
        for i in range(self.bytes // 4):
            found = self._find(table, i)
            for field in range(8 // self.field):
                for half in range(2):
                    coordinate = row.coordinate(4 * i) + 2 * half + field * self.plane
                    store(words, found[field, half], row.slot(coordinate) // 2)
        value = local(spec.head_dim // 4, "float32")
        rotate_rows(row, "float16", words, self._ones, value)
        scale = let(norm * f32(-1 / spec.head_dim))
        pairs = local(spec.head_dim // 8, "uint32")
        for i in range(spec.head_dim // 8):
            ptx(PAIR[spec.dtype], pairs[i], value[2 * i + 1] * scale, value[2 * i] * scale)
        if self._signs is not None:
            self._signs.turn(pairs)
        return pairs


def _side_of(codec: Codec, rotated: bool):
    """The class of a side."""
    if codec.family == "lloyd_max":
        return _RotatedSide if rotated else _Side
    return RotatedDirectSide if rotated else DirectSide


def _write_rotated(bits: RowBits, pairs, out, row, part) -> None:
    """Write what ``rotated`` of a side gave; ``row`` is the index of the row's first element."""
    piece = bits.piece
    for n in range(bits.pieces):
        at = out.ptr_to([row + T.cast(part * piece + n * 4 * piece, "int64")])
        access("st.global", [pairs[n * (piece // 2) + i] for i in range(piece // 2)], at)


def _emit(
    spec: CacheSpec,
    config: FlattenConfig,
    unrotated: bool,
    caches: list,
    tables: tuple,
    outputs: list,
    sizes: tuple,
    block,
    thread,
) -> None:
    """``tiles`` times ``rows`` rows of a lane."""
    k_cache, v_cache, k_meta, v_meta = caches
    flat = [_Cache.of(codes, metas) for codes, metas in ((k_cache, k_meta), (v_cache, v_meta))]
    if not multiplies(spec):
        emit_lanes(spec, config, unrotated, flat, tables, outputs, sizes, block, thread)
        return
    block_table, seq_lens, start_loc = tables
    tokens, batch = sizes
    fmt, heads = spec.cache_format, spec.num_kv_heads
    lanes = _lanes(unrotated)
    abreast = 32 // lanes
    codecs = (fmt.key, fmt.value)
    out = [pages.flat(o) for o in outputs]
    lane = let(thread % 32)
    own, part = let(lane // lanes), let(lane % lanes)
    total = let(T.cast(tokens, "int32") * heads)
    if unrotated:
        zeros = hidden_zeros(total, lane, 8)
        bits = RowBits.of_cache(spec.head_dim, config.contracted)
        g, t = let(lane // 4), let(lane % 4)
        ones = {
            dtype: hadamard_words(dtype, g, t, zeros)
            for dtype in sorted({"float16" if c.packed else spec.dtype for c in codecs})
        }
        signs = RowSigns(bits, let(lane % 4)) if fmt.rotation == "signed_hadamard" else None
        sides = [
            _side_of(c, True)(spec, c, f, bits, ones, signs)
            for c, f in zip(codecs, flat, strict=True)
        ]
    share = abreast * config.rows * config.tiles
    first, last = local(1, "int32"), local(1, "int32")
    store(first, (T.cast(block, "int32") * config.warps + thread // 32) * share)
    store(last, T.min(first[0] + share, total))
    low = local(1, "int32")
    store(low, i32(0))
    start = let(T.truncdiv(first[0] + own, heads))
    with when(first[0] < last[0]):
        pages.find_last_start(low, start_loc, batch, start)

    def read(row, both: list) -> None:
        """Rows past the end repeat the last one."""
        token = let(T.truncdiv(row, heads))
        pages.advance_start(low, start_loc, batch, token)
        position = let(token - start_loc[low[0]])
        for side in both:
            side.blank()
        with when(T.And(position >= 0, position < seq_lens[low[0]])):
            head = T.truncmod(row, heads)
            page, place = pages.token_row(spec, block_table, low[0], position, head)
            for side in both:
                side.load(page, place, part)

    def target(row, n: int):
        token, head = T.truncdiv(row, heads), T.truncmod(row, heads)
        inside = T.cast(head * spec.head_dim, "int64")
        return let(T.cast(token, "int64") * outputs[n].strides[0] + inside)

    with loop(first[0] < last[0]):
        if unrotated:
            row = let(first[0] + own)
            read(let(T.min(row, total - 1)), sides)
            # Products need all lanes; writes do not.
            for n, side in enumerate(sides):
                pairs = side.rotated()
                with when(row < last[0]):
                    _write_rotated(bits, pairs, out[n], target(row, n), part)
        else:
            group = [
                [_side_of(c, False)(spec, c, f, lanes) for c, f in zip(codecs, flat, strict=True)]
                for _ in range(config.rows)
            ]
            for i, both in enumerate(group):
                read(let(T.min(first[0] + own + i * abreast, total - 1)), both)
            for i, both in enumerate(group):
                row = let(first[0] + own + i * abreast)
                with when(row < last[0]):
                    for n, side in enumerate(both):
                        side.write(out[n], target(row, n), part)
        store(first, first[0] + abreast * config.rows)


def _lanes(unrotated: bool) -> int:
    """Lanes of a row."""
    return 4 if unrotated else 8


def flatten_cuda(spec: CacheSpec, config: FlattenConfig, unrotated: bool) -> PrimFunc:
    """The TensorIR of ``flatten`` or ``flatten_unrotated`` for one configuration.

    Rotating back takes one row of a lane at a time: ``rows`` is 1.
    """
    unrotated = unrotated and spec.cache_format.rotation != "none"
    dim, heads, dtype = spec.head_dim, spec.num_kv_heads, spec.dtype
    threads = 32 * config.warps
    resident = max(1, 65536 // (threads * config.registers))
    rows = threads // _lanes(unrotated) * config.rows * config.tiles
    if not multiplies(spec):
        rows = threads * config.tiles

    @T.prim_func(s_tir=True)
    def main(
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        start_loc: T.handle,
        k_out: T.handle,
        v_out: T.handle,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        p = T.int64()
        b = T.int64()
        w = T.int64()
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        ST = T.match_buffer(start_loc, (b,), "int32", align=4)
        k_rows = T.meta_var(pages.match_rows(k_out, n, heads, dim, dtype))
        v_rows = T.meta_var(pages.match_rows(v_out, n, heads, spec.value_dim, dtype))
        for bx in T.thread_binding((n * heads + (rows - 1)) // rows, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident})
                _emit(
                    spec, config, unrotated, caches, (BT, SL, ST), [k_rows, v_rows], (n, b), bx, tx
                )

    return main
