r"""``fill`` on NVIDIA GPUs, rotating by tensor cores: the threads of ``kernels.fill``'s equation.

One launch. Of K and V of one head_dim of 64, 128 or 256 (others: `fill_lanes`) a warp takes 8 rows
(token, KV head), of K, of V or of one after the other:

1. reads them in 16-byte pieces (8 at D = 64), by ``cp.async`` into a ring of ``stages`` in shared
   memory, so that the next rows are on their way while these are worked on, and rotates them by
   tensor cores (`hadamard_cuda`): exact, since rows have 8 or 11 bits a value, the matrix has ones
   and minus ones, and sums are float32. The sign of the result is turned, so that a zero, which
   comes as +0, is told from a positive value by its sign. Signs of the rotation are turned in the
   words that were read;
2. finds the squared norms as the diagonal of the product of the rows with themselves;
3. finds codes and scales (`fill_codes`; without norms, and perhaps without a rotation,
   `fill_direct`);
4. writes 8 bytes a lane and plane at a time (4 at D = 64), and the scales; between 1 and 3, with a
   window of the spec, the rotated rows of the newest tokens into their rings.

8 rows of K and V of ``k4v2``, D = 128, take 929 instructions, one bit contracted: 738 us at 64 x
8192 of 8 KV heads on an H200, where memory alone would take 605. Two bits take 885, and 772 us,
the tensor core's; so do four tiles a warp (787) and 64 registers (833).

A lane ``(g, t)``, g = lane / 4, t = lane % 4, works on row g and on the coordinates whose bits 3
and 4 (2 and 3 at D = 64) are ``t``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.device import (
    access,
    f32,
    high_half,
    i32,
    let,
    local,
    loop,
    low_half,
    mma,
    ptx,
    shared_dynamic,
    shuffle,
    store,
    u32,
    when,
)
from tq_tvm.kernels.fill_codes import Encoded, Encoder
from tq_tvm.kernels.fill_direct import DirectEncoder, row_words
from tq_tvm.kernels.fill_lanes import emit_lanes
from tq_tvm.kernels.fill_places import (
    FillArguments,
    GivenSlots,
    TableSlots,
    fill_arguments,
    ring_place,
    wide_product,
)
from tq_tvm.kernels.hadamard_cuda import (
    SHORT_PRODUCTS,
    RowBits,
    RowSigns,
    hadamard_words,
    hidden_zeros,
    numbers,
    rotate_rows,
)
from tq_tvm.kernels.lane_rows import multiplies
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["FillConfig", "fill_cuda"]


@dataclasses.dataclass(frozen=True)
class FillConfig:
    """The decisions of one kernel; ``schedules/factories.py`` says what each one trades."""

    warps: int
    tiles: int
    contracted: int
    sides: int
    stages: int
    registers: int


class _Side:
    """K or V of 8 rows."""

    def __init__(self, row: RowBits, spec: CacheSpec, codec: Codec, name: str, sign, scale) -> None:
        self.row, self.codec, self.name = row, codec, name
        self.dtype, self.rotation = spec.dtype, spec.cache_format.rotation
        self.direct = codec.family != "lloyd_max"
        if self.direct:
            self.encoder = DirectEncoder(row, spec.dtype, codec, scale)
        else:
            self.encoder = Encoder(row, codec, spec.cache_format.scale_rule, sign)
        self.words = local(spec.head_dim // 8, "uint32")
        self.value = local(spec.head_dim // 4, "float32")

    def copy(self, flat, address, ring, to) -> None:
        """Begin to copy the row to the ring; ``address`` is the lane's first element."""
        count = self.row.piece // 2
        cached = "cg" if count == 4 else "ca"
        for piece in range(self.row.pieces):
            at = address + T.int64(piece * 4 * self.row.piece)
            place = ring.ptr_to([to + piece * (32 * count)])
            ptx(f"cp.async.{cached}.shared.global", place, flat.ptr_to([at]), 4 * count)

    def load(self, ring, place) -> None:
        """Read the row from the ring: each lane what it copied itself."""
        count = self.row.piece // 2
        for piece in range(self.row.pieces):
            with I.vectorized(0, count) as e:
                word = ring[place + piece * (32 * count) + e]
                store(self.words, word, piece * count + e)

    def squared_norm(self, g):
        """Sum of squares of the row: the diagonal of the rows times themselves."""
        row = self.row
        sums = local((2, 4), "float32")
        first = True
        for coordinate in numbers(sorted(row.inner + row.rest)):
            a = row.operand(self.words, coordinate)
            # Of half an operand each: both words of a column would have to be side by side.
            for pair in (a[:2], a[2:]):
                for x in range(2):
                    result = [sums[x, e] for e in range(4)]
                    start = [f32(0)] * 4 if first else result
                    mma(SHORT_PRODUCTS[self.dtype], result, pair, [pair[x]], start)
                first = False
        own = [T.Select(g % 2 == 1, sums[x, 2 * x + 1], sums[x, 2 * x]) for x in range(2)]
        return let(shuffle(own[0] + own[1], g * 4 + g // 2))

    def rotate(self, ones) -> None:
        """``value`` becomes minus the rotated row, unscaled."""
        rotate_rows(self.row, self.dtype, self.words, ones, self.value)

    def encode(self, ones, g, t, keep: Callable[[Any], None] | None) -> Encoded:
        """Codes and scales of the row that was read.

        ``keep`` is called with the words of the rotated row in the model's dtype.
        """
        unit = -(self.row.dim**-0.5)
        if not self.direct:
            squared = self.squared_norm(g)
            self.rotate(ones)
            if keep is not None:
                keep(row_words(self.row, self.dtype, self.value, unit))
            return self.encoder.encode(self.value, t, squared)
        if self.rotation != "none":
            self.rotate(ones)
            for i in range(self.row.dim // 4):
                store(self.value, self.value[i] * f32(unit), i)
            if keep is not None:
                keep(row_words(self.row, self.dtype, self.value))
            return self.encoder.encode(self.value)
        if keep is not None:
            keep(self.words)
        if not self.codec.packed:
            return Encoded([self.words], [])
        for i in range(self.row.dim // 4):
            half = high_half if i % 2 else low_half
            store(self.value, half(self.dtype, self.words[i // 2]), i)
        return self.encoder.encode(self.value)


def ring_words(spec: CacheSpec, config: FillConfig) -> int:
    """Words of the ring of a CTA."""
    sides = 2 if config.sides == 1 else 1
    return config.warps * config.stages * sides * 8 * spec.head_dim // 2


def _emit(
    spec: CacheSpec,
    config: FillConfig,
    arguments: FillArguments,
    tokens,
    block,
    side,
    thread,
    slots,
) -> None:
    """8 rows of a warp at a time; ``slots`` says where a token goes, see `TableSlots`."""
    fmt, heads = spec.cache_format, spec.num_kv_heads
    codecs = {"k": fmt.key, "v": fmt.value}
    row = RowBits.of_cache(spec.head_dim, config.contracted)
    warp, lane = let(thread // 32), let(thread % 32)
    g, t = let(lane // 4), let(lane % 4)
    total = let(T.cast(tokens, "int32") * heads)
    zeros = hidden_zeros(total, lane, 9)
    ones = hadamard_words(spec.dtype, g, t, zeros)
    signs = RowSigns(row, t) if fmt.rotation == "signed_hadamard" else None
    # Of two constants in an operation it would make two instructions.
    sign = local(1, "uint32")
    store(sign, T.shift_left(zeros[8] + u32(1), u32(31)))
    ring = shared_dynamic(ring_words(spec, config), "uint32")
    row_words = 8 * spec.head_dim // 2
    begin = let(warp * (ring_words(spec, config) // config.warps) + lane * (row.piece // 2))
    first, last, ahead, stage, filled = (local(1, "int32") for _ in range(5))
    store(first, (T.cast(block, "int32") * config.warps + warp) * (8 * config.tiles))
    store(last, T.min(first[0] + 8 * config.tiles, total))
    store(ahead, first[0])
    store(stage, i32(0))
    store(filled, i32(0))

    def row_of(start):
        """Token and head of the lane's row; past the end those of the last, to write nothing."""
        index = let(T.cast(T.min(start + g, total - 1), "uint32"))
        token, head = index // u32(heads), index % u32(heads)
        return let(T.cast(token, "int32")), let(T.cast(head, "int32"))

    def work(names: tuple[str, ...]) -> None:
        sides = [
            _Side(row, spec, codecs[name], name, sign[0], arguments.scales.get(name))
            for name in names
        ]
        words = len(names) * row_words

        def advance(place) -> None:
            if config.stages > 1:
                end = place[0] == (config.stages - 1) * words
                store(place, T.Select(end, i32(0), place[0] + words))

        def fetch() -> None:
            with when(ahead[0] < last[0]):
                token, head = row_of(ahead[0])
                for n, one_side in enumerate(sides):
                    inside = T.cast(head * spec.head_dim + t * row.piece, "int64")
                    at = wide_product(token, arguments.row_stride[one_side.name]) + inside
                    to = begin + filled[0] + n * row_words
                    one_side.copy(arguments.rows[one_side.name], let(at), ring, let(to))
            ptx("cp.async.commit_group")
            store(ahead, ahead[0] + 8)
            advance(filled)

        # A warp whose rows all lie past the end has nothing to exchange either.
        with when(first[0] < last[0]):
            for _ in range(config.stages - 1):
                fetch()
            slots.start(row_of(first[0])[0])
            with loop(first[0] < last[0]):
                fetch()
                token, head = row_of(first[0])
                page, offset, wanted = slots.find(token)
                exists = T.And(wanted, first[0] + g < total)
                ptx("cp.async.wait_group", config.stages - 1)
                for n, one_side in enumerate(sides):
                    one_side.load(ring, begin + stage[0] + n * row_words)
                    if signs is not None:
                        signs.turn(one_side.words)
                    keep = None
                    if arguments.rings:
                        newest = T.And(exists, slots.is_newest(token))
                        at = functools.partial(ring_place, spec, slots, token, head, spec.head_dim)
                        keep = _keeper(row, arguments.rings[one_side.name], at, t, newest)
                    encoded = one_side.encode(ones, g, t, keep)
                    where = (page, offset, head, exists)
                    _write(spec, arguments, one_side, t, where, encoded)
                store(first, first[0] + 8)
                advance(stage)

    if config.sides == 1:
        work(("k", "v"))
    else:
        with I.If(side == 0):
            with I.Then():
                work(("k",))
            with I.Else():
                work(("v",))


def _keeper(row: RowBits, flat, place: Callable[[], Any], t, newest) -> Callable[[Any], None]:
    """What writes words of a row to its place in a ring, if the token is among the newest."""

    def keep(words) -> None:
        with when(newest):
            _write_plane(row, flat, let(place()), t, 0, 16, words)

    return keep


def _write(
    spec: CacheSpec, arguments: FillArguments, side: _Side, t, where, encoded: Encoded
) -> None:
    """Codes of a lane, and by one lane of a row the scales."""
    page, offset, head, exists = where
    name, row = side.name, side.row
    codec = side.codec

    def inside(page, offset, width: int, stride):
        place = pages.page_row(spec, offset, head)
        return wide_product(page, stride) + T.cast(place * width, "int64")

    with when(exists):
        width = codec.packed_bytes(spec.head_dim)
        codes = let(inside(page, offset, width, arguments.code_stride[name]))
        first = 0
        for bits, words in zip(codec.plane_bits, encoded.planes, strict=True):
            _write_plane(row, arguments.codes[name], codes, t, first, bits, words)
            first += spec.head_dim * bits // 8
        if not codec.meta:
            return
        with when(t == 0):
            count = len(codec.meta)
            metas = let(inside(page, offset, count, arguments.meta_stride[name]))
            for i, scale in enumerate(encoded.scales):
                store(arguments.metas[name], T.cast(scale, spec.dtype), metas + T.int64(i))


def _write_plane(row: RowBits, flat, codes, t, first: int, bits: int, words) -> None:
    """Elements from ``first`` on of the row at ``codes``, in pieces of the lanes in turn.

    They are bytes of codes, or values of 16 bits.
    """
    size = max(1, bits // 8)
    count = row.piece * size // 4
    pieces, lanes = divmod(row.dim * bits // (8 * size), 4 * row.piece)

    def write(n: int) -> None:
        at = codes + T.cast(t * row.piece, "int64") + T.int64(first + n * 4 * row.piece)
        access("st.global", [words[n * count + i] for i in range(count)], flat.ptr_to([at]))

    for n in range(pieces):
        write(n)
    if lanes:
        with when(t < lanes // row.piece):
            write(0)


def fill_cuda(spec: CacheSpec, config: FillConfig, by_table: bool) -> PrimFunc:
    """The TensorIR of ``fill_table`` or ``fill_slots`` for one configuration."""
    dim, heads, dtype = spec.head_dim, spec.num_kv_heads, spec.dtype
    threads = 32 * config.warps
    resident = max(1, 65536 // (threads * config.registers))
    rows = (8 if multiplies(spec) else 32) * config.warps * config.tiles

    def blocks(tokens):
        return (tokens * heads + (rows - 1)) // rows

    def emit(k, v, caches, tokens, block, side, thread, slots, rings=None):
        given = fill_arguments(spec, k, v, caches, rings)
        emit_rows = _emit if multiplies(spec) else emit_lanes
        emit_rows(spec, config, given, tokens, block, side, thread, slots)

    def table_slots(table, lens, starts, batch, rings):
        return TableSlots(spec, table, lens, starts, batch, rings)

    @T.prim_func(s_tir=True)
    def by_slots(
        k: T.handle,
        v: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        slot_mapping: T.handle,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        p = T.int64()
        k_rows = T.meta_var(pages.match_rows(k, n, heads, dim, dtype))
        v_rows = T.meta_var(pages.match_rows(v, n, heads, spec.value_dim, dtype))
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        SM = T.match_buffer(slot_mapping, (n,), "int64", align=8)
        for by in T.thread_binding(config.sides, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks(n), thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident})
                    emit(k_rows, v_rows, caches, n, bx, by, tx, GivenSlots(spec, SM))

    if not by_table:
        return by_slots

    @pages.jit(spec, s_tir=True)
    def by_block_table(
        k: T.handle,
        v: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        q_start_loc: T.handle,
        k_window: T.Optional(T.handle),
        v_window: T.Optional(T.handle),
        window_slots: T.Optional(T.handle),
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        p = T.int64()
        b = T.int64()
        w = T.int64()
        k_rows = T.meta_var(pages.match_rows(k, n, heads, dim, dtype))
        v_rows = T.meta_var(pages.match_rows(v, n, heads, spec.value_dim, dtype))
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        QS = T.match_buffer(q_start_loc, (b + 1,), "int32", align=4)
        rings = T.meta_var(pages.match_rings(spec, (k_window, v_window, window_slots), b))
        for by in T.thread_binding(config.sides, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks(n), thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident})
                    slots = T.meta_var(table_slots(BT, SL, QS, b, rings))
                    emit(k_rows, v_rows, caches, n, bx, by, tx, slots, rings)

    return by_block_table
