"""Packed K and V for ``attend`` on GPUs: codes in registers become operands of ``mma`` as such.

A warp has tiles of its own. A lane is ``(g, t)``, g = lane / 4, t = lane % 4. Of token 8 i + g it
reads a quarter of the codes of K, ``t``'s, of which scores are made: Lloyd-Max's are looked up, as
bytes (`attend_bytes`) or as halves (`attend_halves`, see `FragmentShape.in_bytes`), others are
numbers (`attend_direct`). V goes through shared memory, in whole rows (`chunk_rows`), where
`attend_values` reads it. Scales are factors of scores and of weights in shared memory: lane i reads
those of token i.

V's scales may be anything, so weights are times them relative to a running bound, `_ROOM` of which
is 1: what is 2^-29 of the largest or less has fewer bits.

64 tokens and 16 rows of k4v2, D = 128, as compiled for sm_90a: 1221 instructions a warp where no
bound moves and nothing is masked, of which look-ups and byte moves (``prmt``) 272, tensor core 160;
rows made in shared memory took twice as many. On an H200, 64 x 8192 of 32/8 heads, 4 tokens a
sequence: 202 us, 229 when K's codes became halves (560 ``prmt``). ncu: issue 50 % of the slots,
integer pipe 46 % of its peak; of two warps a scheduler each waits 4.0 cycles an instruction, 1.0 of
them for results of fixed latency and 0.7 for a pipe. A product of bytes takes 8 cycles of its warp,
one of halves 4.8. 13 % of the samples are of what a piece begins and ends with: 16 x 32768, as many
tokens in a quarter of the pieces, takes 184 us. These counts are of V's chunks in planes; since its
rows are whole it takes 205, and 186. 32 rows a block take 1.24 times the instructions of
16.

Of direct codecs memory is the limit: at 64 x 8192 of 32/8 heads and one token int8 takes 262 us,
99 % of the bandwidth of a copy, fp8 261 (97 %), int4 168 (80 %); rows of the model's dtype made in
shared memory took 346, 353 and 369.

Tried there, and slower, most of it for want of registers, of which all 255 are taken: outputs apart
from tiles, for two barriers less at the end of a piece (223 us); queries widened where they are
used, and one branch for features and masks (214); twice as many groups of CTAs, so that none of the
132 processors is idle (212, as pieces no longer are sequences); two octets of K at a time (215);
tiles of 32 tokens (222); four warps a CTA (210); three warps a scheduler with 168 registers (266),
four with 128 (371).

Tried on an H100: four warps that share a tile of 64 tokens and have it as the left operand of
``wgmma``, looked up in registers, 16, 32 or 64 rows as its columns, signs of residuals apart as
e4m3. 310, 398 and 767 us at 4, 8 and 16 tokens (k4v2; 249, 428 and 829 as here), 380 and 587 at 8
and 16 in tq42 (370 and 719). What a tile takes beside look-ups each of the four warps issues, 515
instructions in all with 16 rows, and all meet at two barriers a tile: 2.0 instructions a cycle.
"""

from __future__ import annotations

import contextlib
import itertools

from tvm.script import tirx as T

from tq_tvm.kernels import pages
from tq_tvm.kernels.attend_bytes import ByteKeys
from tq_tvm.kernels.attend_direct import DirectKeys
from tq_tvm.kernels.attend_halves import HalfKeys
from tq_tvm.kernels.attend_rows import QueryRows, Softmax
from tq_tvm.kernels.attend_tiles import Seen
from tq_tvm.kernels.attend_values import FragmentValues, TokenScales
from tq_tvm.kernels.chunk_rows import chunk_word, turned_place
from tq_tvm.kernels.device import (
    FULL_WARP,
    LOG2E,
    access,
    as_bits,
    as_float,
    f32,
    from_half,
    held,
    high_half,
    i32,
    let,
    local,
    low_half,
    pointer,
    ptx,
    shared_address,
    shuffle_xor,
    store,
    u32,
    warp_barrier,
    when,
)
from tq_tvm.kernels.fragment_shape import CODE_UNIT, FragmentShape
from tq_tvm.kernels.page_address import PageAddress, TableRow, as_pointer

__all__ = ["Fragments"]


_ROOM = 512.0
"""Weights are up to 2^6: times this they are still below the largest float16."""

_MARGIN = 1.25
"""Scales of V differ little: with this margin their bound seldom moves."""


class _Place:
    """Addresses of a lane in one cache tensor: rows of a head, as far as lanes differ.

    Rows have ``elements`` of ``size`` bytes.
    """

    def __init__(self, shape: FragmentShape, argument, elements: int, size: int, head, token,
                 span: int, column, lane) -> None:  # fmt: skip
        spec = shape.spec
        self._shape, self._span = shape, span
        token_rows, head_rows = pages.row_strides(spec)
        self._row = size * elements * token_rows
        self._token = token
        inside = T.truncmod(token, spec.page_size) if span > spec.page_size else token
        first = head * (elements * head_rows) + inside * (elements * token_rows) + column
        self._address = PageAddress(argument, first, size, lane)
        self._bases = local(shape.pages, "uint64")

    def move(self, page, offset) -> None:
        """Go to a tile, which begins at ``offset`` of the first of its pages."""
        for i in range(self._shape.pages):
            inside = i == 0 and self._shape.tile < self._shape.spec.page_size
            later = offset * self._row if inside else None
            store(self._bases, self._address.of(page[i], later), i)

    def pointer(self, token: int, column: int = 0, more=None):
        """Of the lane's token of a load or copy whose first one is ``token``; bytes later."""
        size = self._shape.spec.page_size
        page, offset = (token // size, token % size) if self._shape.pages > 1 else (0, token)
        base = self._bases[page]
        for other in range(1, min(self._span // size, self._shape.pages - page)):
            # Small pages: lanes of one copy are in several.
            own = T.truncdiv(self._token, size) >= other
            base = T.Select(own, self._bases[page + other], base)
        base = base if more is None else base + T.cast(more, "uint64")
        return as_pointer(base + T.uint64(offset * self._row + column))


class Fragments:
    """K and V of one sequence and KV head, a warp's, ``tile`` tokens at a time.

    `find_pages` of the first tile, `ask` for it, `turn`; then `attend` to one after the other.
    """

    def __init__(
        self, shape: FragmentShape, words, begin, caches, head, lane, sm_scale, unknown_zero
    ) -> None:
        k, v, k_meta, v_meta = caches
        spec = shape.spec
        self._shape, self._lane = shape, lane
        g, t = let(T.truncdiv(lane, 4)), let(T.truncmod(lane, 4))
        self._page, self._offset = local(shape.pages, "int32"), local(1, "int32")
        self._codes = local((shape.octets, shape.key_planes * shape.key_words), "uint32")
        self._turns = -(-shape.tile // 32)
        self._metas = local((self._turns, 2), "uint32")
        self._shorts = local((self._turns, 2), "uint16")
        self._wanted, self._row = local(self._turns, "uint32"), TableRow()
        self._scales = TokenScales(shape, words, begin + 2 * shape.value_words, g, t)
        own = 4 * shape.key_load
        key_bytes = shape.key.packed_bytes(spec.head_dim)
        value_bytes = shape.value.packed_bytes(spec.head_dim)
        # Lanes that copy a row of V: as many as it has chunks, or the next power of two.
        self._sharing = shape.row_chunks
        self._copied = min(32 // self._sharing, shape.tile)
        chunk, token = let(lane % self._sharing), let(T.truncdiv(lane, self._sharing))
        self._chunk, self._copied_token = chunk, token
        to = pointer(words, chunk_word(token, chunk, shape.row_chunks))
        self._to = held("uint32", shared_address(to), lane)
        self._k = _Place(shape, k, key_bytes, 1, head, g, 8, t * own, lane)
        self._v = _Place(shape, v, value_bytes, 1, head, token, self._copied, chunk * 16, lane)
        scaled = min(32, shape.tile)
        self._meta_places = [
            _Place(shape, meta, len(codec.meta), 2, head, lane % scaled, scaled, 0, lane)
            if codec.meta
            else None
            for meta, codec in ((k_meta, shape.key), (v_meta, shape.value))
        ]
        self._tensor_scales = [
            let(meta.buffer[0]) if codec.tensor_scale else None
            for meta, codec in ((k_meta, shape.key), (v_meta, shape.value))
        ]
        if shape.key_planes > 1:
            # Lanes that are two apart read the same third bits.
            self._third = let(spec.head_dim // 4 + (t % 2 - t) * own)
        coded = HalfKeys if shape.key.family == "lloyd_max" else DirectKeys
        keys = ByteKeys if shape.in_bytes else coded
        self._keys = keys(shape, words, lane, unknown_zero)
        self._key_factor = let(sm_scale * f32(LOG2E * shape.key_factor * self._keys.score_unit))
        self._value_factor = shape.value_factor
        self._bound, self._inverse = local(1, "float32"), local(1, "float32")
        self._values = FragmentValues(shape, words, lane, unknown_zero)
        # The tile of V that is copied to; the other one is read.
        self._tile = local(1, "int32")
        store(self._tile, begin)
        self._both = let(2 * begin + shape.value_words)

    def load_queries(self, asked: QueryRows) -> None:
        """Put the queries of a block where all warps read them."""
        self._keys.leave_queries(asked)

    def start(self) -> None:
        """No tokens yet, of the block whose queries are there."""
        self._keys.start()
        store(self._bound, f32(1e-30))
        store(self._inverse, f32(0))

    def finish(self, softmax: Softmax) -> None:
        """Give the output its unit."""
        if self._shape.value_zeros:
            self._subtract_zeros(softmax)
        self._scale_output(softmax, let(self._bound[0] * f32(1 / _ROOM)))

    @staticmethod
    def _subtract_zeros(softmax: Softmax) -> None:
        """What zeros of V add to every value; lanes have sums of their tokens."""
        for tile, half in softmax.places:
            for mask in (1, 2):
                other = shuffle_xor(softmax.offset[tile, half], mask)
                store(softmax.offset, softmax.offset[tile, half] + other, tile, half)
            for octet, e in itertools.product(range(int(softmax.output.shape[1])), range(2)):
                index = (tile, octet, 2 * half + e)
                store(softmax.output, softmax.output[index] - softmax.offset[tile, half], *index)

    @staticmethod
    def _scale_output(softmax: Softmax, factor) -> None:
        for index in itertools.product(*(range(int(n)) for n in softmax.output.shape)):
            store(softmax.output, softmax.output[index] * factor, *index)
        if softmax.offset is not None:
            for at in softmax.places:
                store(softmax.offset, softmax.offset[at] * factor, *at)

    def begin(self, table, sequence) -> None:
        """Go to a sequence's row of the table, before `find_pages`."""
        self._row.begin(table, sequence)

    def find_pages(self, first, seen: Seen) -> None:
        """Look up the pages of a tile, ahead of `ask`, whose addresses wait for them.

        Of pages that no row of the block sees, which may be anything, another one is read.
        """
        size, tile = self._shape.spec.page_size, self._shape.tile
        shift = size.bit_length() - 1
        token = local(1, "int32")
        for i in range(self._shape.pages):
            at = let(first + i * size)
            last = at + (min(size, tile) - 1)
            within = T.And(at <= seen.last, T.Or(last >= seen.low, at < seen.kept))
            store(token, T.Select(within, at, seen.last))
            self._row.look_up(self._page, i, T.shift_right(token[0], shift))
        if tile < size:
            store(self._offset, T.bitwise_and(first, size - 1))
        else:
            store(self._offset, i32(0))

    def ask(self, first, seen: Seen) -> None:
        """Begin to read the tile from token ``first`` on; `find_pages` has been there.

        Scales of tokens that no row of the block sees are zeros, and codes whatever is there.
        """
        shape = self._shape
        for place in (self._k, self._v, *self._meta_places):
            if place is not None:
                place.move(self._page, self._offset[0])
        wide = shape.key_load
        # Third bits share sectors with pairs.
        kept = "" if shape.key_planes > 1 else ".L1::no_allocate"
        for octet in range(shape.octets):
            for i in range(0, shape.key_words, wide):
                # Lanes are neighbours in each load.
                self._load_codes(octet, i, wide, kept, self._k.pointer(8 * octet, 16 * i))
            if shape.key_planes > 1:
                for i in range(0, shape.key_words, wide):
                    at = self._k.pointer(8 * octet, 4 * i, self._third)
                    self._load_codes(octet, shape.key_words + i, wide, kept, at)
        self._copy_values(first, seen)
        # Without branches, which all that follows would wait for: all scales are read.
        for turn in range(self._turns):
            exists = seen.includes(let(first + (self._lane + 32 * turn)))
            if shape.tile < 32:
                exists = T.And(self._lane < shape.tile, exists)
            store(self._wanted, T.Select(exists, u32(0xFFFFFFFF), u32(0)), turn)
            for side, codec in enumerate((shape.key, shape.value)):
                place = self._meta_places[side]
                if place is None:
                    continue
                at = place.pointer(32 * turn)
                if len(codec.meta) == 2:
                    ptx("ld.global.nc.u32", self._metas[turn, side], at)
                else:
                    # Widened where it is needed: at once, it would be waited for.
                    ptx("ld.global.nc.u16", self._shorts[turn, side], at)

    def _load_codes(self, octet: int, first: int, count: int, kept: str, pointer) -> None:
        registers = [self._codes[octet, first + e] for e in range(count)]
        access(f"ld.global.nc{kept}.L2::128B", registers, pointer)

    def _copy_values(self, tile_first, seen: Seen) -> None:
        shape = self._shape
        # Codes that may be no numbers are so times a weight of zero, too.
        checked = not shape.value.meta

        def copy() -> None:
            for first in range(0, shape.tile, self._copied):
                place = self._place_of(first)
                operands = [place, self._v.pointer(first), 16]
                if checked:
                    exists = seen.includes(let(tile_first + first + self._copied_token))
                    operands.append(let(T.Select(exists, u32(16), u32(0))))
                ptx("cp.async.cg.shared.global.L2::128B", *operands)

        # Lanes for which a row has no chunk, or the tile no row.
        with contextlib.ExitStack() as conditions:
            if shape.chunks < self._sharing:
                conditions.enter_context(when(self._chunk < shape.chunks))
            if self._copied * self._sharing < 32:
                conditions.enter_context(when(self._lane < self._copied * self._sharing))
            copy()

    def _place_of(self, first: int):
        """Where a lane copies to, of the tokens from ``first`` on."""
        shape = self._shape
        to = turned_place(self._to, first, shape.row_chunks)
        return to + T.cast(self._tile[0] * 4, "uint32") + u32(4 * shape.row_words * first)

    def turn(self) -> None:
        """All copies of a tile, or none, are under way: go to the other place."""
        ptx("cp.async.commit_group")
        store(self._tile, self._both - self._tile[0])

    def attend(self, softmax: Softmax, first, masked, ask_next) -> None:
        """Scores, weights and output of the tile that begins with token ``first``.

        ``ask_next`` calls `ask` and `find_pages` for the next one, where K's registers are free.
        """
        shape = self._shape
        self._leave_scales(softmax)
        warp_barrier()
        scores = local((shape.row_tiles, shape.octets, 4), "float32")
        self._keys.score(self._codes, self._scales, scores)
        ask_next()
        self.turn()
        softmax.weigh(scores, first, masked, self._keys.unit)
        ptx("cp.async.wait_group", 1)
        warp_barrier()
        self._values.add(softmax, scores, self._tile[0], self._scales)

    def _row_scale(self, side: int, turn: int):
        """The scale of the lane's token, of K or V; zero of a token that is not wanted."""
        shape, dtype, meta = self._shape, self._shape.spec.dtype, self._metas[turn, side]
        codec = (shape.key, shape.value)[side]
        if codec.tensor_scale:
            return as_float(meta)
        return low_half(dtype, meta) if len(codec.meta) == 2 else from_half(dtype, meta)

    def _leave_scales(self, softmax: Softmax) -> None:
        """Factors of the lane's tokens, where all lanes read them."""
        shape, dtype = self._shape, self._shape.spec.dtype
        values = local(self._turns, "float32")
        top = local(1, "uint32")
        store(top, u32(0))
        for turn in range(self._turns):
            for side, codec in enumerate((shape.key, shape.value)):
                found = self._metas[turn, side]
                if len(codec.meta) == 1:
                    found = T.cast(self._shorts[turn, side], "uint32")
                if codec.tensor_scale:
                    found = as_bits(self._tensor_scales[side])
                store(self._metas, T.bitwise_and(found, self._wanted[turn]), turn, side)
            # Of lanes that have no token it is zero.
            store(values, self._row_scale(1, turn) * f32(self._value_factor), turn)
            store(top, T.max(top[0], as_bits(T.fabs(values[turn]))))
        # Of floats that are not negative, bits have their order.
        ptx("redux_sync.max.u32", top[0], top[0], u32(FULL_WARP))
        with when(top[0] > as_bits(self._bound[0])):
            bound = let(as_float(top[0]) * f32(_MARGIN))
            self._scale_output(softmax, let(self._bound[0] / bound))
            store(self._bound, bound)
            store(self._inverse, f32(_ROOM) / bound)

        def leave(turn: int) -> None:
            token, key = let(self._lane + 32 * turn), self._metas[turn, 0]
            self._scales.leave_key(token, self._row_scale(0, turn) * self._key_factor)
            if len(shape.key.meta) == 2:
                residual = high_half(dtype, key) * f32(self._keys.residual_unit)
                self._scales.leave_residual(token, self._keys.residual_word(residual))
            self._scales.leave_value(token, values[turn] * self._inverse[0])
            if shape.value_zeros:
                zero = high_half(dtype, self._metas[turn, 1]) * f32(CODE_UNIT)
                self._scales.leave_offset(token, values[turn] * self._inverse[0] * zero)

        for turn in range(self._turns):
            if shape.tile >= 32:
                leave(turn)
            else:
                with when(self._lane < shape.tile):
                    leave(turn)
