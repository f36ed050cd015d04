"""Lloyd-Max K and V for ``attend`` on GPUs: codes in registers become operands of ``mma`` as such.

A warp has tiles of its own. A lane is ``(g, t)``, g = lane / 4, t = lane % 4. Of token 8 i + g it
reads a quarter of the codes of K, ``t``'s, and looks them up four at a time: what comes out are
operands of products of 16 tokens and 16 coordinates, whose order only the queries have to share
(`FragmentShape.query_word`). V goes through shared memory, where ``ldmatrix`` transposes bytes: of
tokens 8 i + 2 t and 8 i + 2 t + 1 a lane gets bytes 2 g and 2 g + 1 of each 16, and looks up both
tokens' codes together, so that a word has one coordinate of two tokens.

Tables hold levels alone, so they are made once; of qjl4 the residual is added, once a row. Scales
are factors of logits and of weights, floats in shared memory: lane i reads those of token i.

Operands are float16, whatever the model's dtype, sums float32. Weights are times V's scale, which
may be anything, so they are relative to a running bound of it, `_ROOM` of which is 1: what is 2^-29
of the largest or less has fewer bits. V's levels are in a unit that rounds them least; of two bits,
in one that gives both magnitudes the same low byte, which then needs no look-up.

32 tokens and 16 rows of k4v2, D = 128, as compiled for sm_90a: some 900 instructions a warp where
no bound moves, of which look-ups and byte moves (``prmt``) 280, tensor core 64; rows made in shared
memory took 1450. On an H100, 64 x 8192 of 32/8 heads, 4 tokens a sequence: 252 us with two CTAs of
four warps on an SM, from pages that L2 keeps 246, so arithmetic bounds it; 249 with one of eight.
ncu of the former: integer pipe 61 % of its peak, issue 51 % of the slots, tensor core 23 %, memory
47 %; of two warps a scheduler each waits 1.0 of 3.5 cycles an instruction for results of fixed
latency, and 11 % of the time there is only one, since a CTA that is favoured ends before its
neighbour. 32 rows a block take 1.24 times the instructions of 16.

Tried on an H100: four warps that share a tile of 64 tokens and have it as the left operand of
``wgmma``, looked up in registers, 16, 32 or 64 rows as its columns, signs of residuals apart as
e4m3. 310, 398 and 767 us at 4, 8 and 16 tokens (k4v2; 249, 428 and 829 as here), 380 and 587 at 8
and 16 in tq42 (370 and 719). What a tile takes beside look-ups each of the four warps issues, 515
instructions in all with 16 rows, and all meet at two barriers a tile: 2.0 instructions a cycle.
"""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
from tvm.script import tirx as T

from tq_tvm.kernels import pages
from tq_tvm.kernels.attend_rows import RowShape, Softmax
from tq_tvm.kernels.attend_tiles import Seen
from tq_tvm.kernels.device import (
    FULL_WARP,
    LOG2E,
    PAIR,
    access,
    as_bits,
    as_float,
    byte_perm,
    f32,
    from_half,
    held,
    high_half,
    i32,
    let,
    local,
    mma,
    pointer,
    ptx,
    shared_address,
    store,
    u32,
    warp_barrier,
    when,
)
from tq_tvm.kernels.fragment_shape import FragmentShape
from tq_tvm.kernels.hadamard_cuda import PRODUCTS
from tq_tvm.kernels.lookup_cuda import (
    Chain,
    HighTable,
    LevelTable,
    find_mirrored,
    find_pairs,
    looked_up,
    row_scale,
    together,
)
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
        self._shape, self._words, self._lane = shape, words, lane
        self._g, self._t = let(T.truncdiv(lane, 4)), let(T.truncmod(lane, 4))
        self._page, self._offset = local(shape.pages, "int32"), local(1, "int32")
        self._codes = local((shape.octets, shape.key_planes * shape.key_words), "uint32")
        self._turns = -(-shape.tile // 32)
        self._metas = local((self._turns, 2), "uint32")
        self._wanted, self._row = local(self._turns, "uint32"), TableRow()
        self._scales = begin + 2 * shape.value_words
        own = 4 * shape.key_words
        key_bytes = shape.key.packed_bytes(spec.head_dim)
        value_bytes = shape.value.packed_bytes(spec.head_dim)
        # Lanes that copy a row of V: as many as it has chunks, or the next power of two.
        self._sharing = 1 << (shape.chunks - 1).bit_length()
        self._copied = min(32 // self._sharing, shape.tile)
        chunk, token = let(lane % self._sharing), let(T.truncdiv(lane, self._sharing))
        self._chunk = chunk
        to = pointer(words, chunk * shape.value_plane + token * 4)
        self._to = held("uint32", shared_address(to), lane)
        self._k = _Place(shape, k, key_bytes, 1, head, self._g, 8, self._t * own, lane)
        self._v = _Place(shape, v, value_bytes, 1, head, token, self._copied, chunk * 16, lane)
        scaled = min(32, shape.tile)
        self._k_meta, self._v_meta = (
            _Place(shape, meta, len(codec.meta), 2, head, lane % scaled, scaled, 0, lane)
            for meta, codec in ((k_meta, shape.key), (v_meta, shape.value))
        )
        if shape.key_planes > 1:
            # Lanes that are two apart read the same third bits.
            self._third = let(spec.head_dim // 4 + (self._t % 2 - self._t) * own)
            self._later = let(T.cast(T.truncdiv(self._t, 2), "uint32"))
        unit = spec.head_dim**-0.5
        self._key_factor = let(sm_scale * f32(LOG2E * unit))
        self._value_factor = unit / shape.value_unit
        self._bound, self._inverse = local(1, "float32"), local(1, "float32")
        self._key_pairs = _constants(looked_up(shape.key), unknown_zero)
        count = len(looked_up(shape.key))
        self._key_table = None if shape.key.residual_sign else LevelTable(self._key_pairs, count)
        self._value_table = self._table_of_values(unknown_zero)
        # The tile of V that is copied to; the other one is read.
        self._tile = local(1, "int32")
        store(self._tile, begin)
        self._both = let(2 * begin + shape.value_words)

    def _table_of_values(self, unknown_zero) -> LevelTable | HighTable:
        levels = [c * self._shape.value_unit for c in looked_up(self._shape.value)]
        if len(levels) > 4:
            return LevelTable(_constants(levels, unknown_zero), len(levels))
        halves = _halves(levels)
        (low,) = {half & 0xFF for half in halves}
        high = sum((half >> 8) << (8 * i) for i, half in enumerate(halves))
        hidden = [let(T.bitwise_or(u32(w), unknown_zero)) for w in (low * 0x01010101, high)]
        return HighTable(*hidden)

    def start(self) -> None:
        """No tokens yet."""
        store(self._bound, f32(1e-30))
        store(self._inverse, f32(0))

    def finish(self, softmax: Softmax) -> None:
        """Give the output its unit."""
        unit = let(self._bound[0] * f32(1 / _ROOM))
        self._scale_output(softmax, unit)

    @staticmethod
    def _scale_output(softmax: Softmax, factor) -> None:
        for index in itertools.product(*(range(int(n)) for n in softmax.output.shape)):
            store(softmax.output, softmax.output[index] * factor, *index)

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
        for place in (self._k, self._v, self._k_meta, self._v_meta):
            place.move(self._page, self._offset[0])
        wide = min(4, shape.key_words)
        # Third bits share sectors with pairs.
        kept = "" if shape.key_planes > 1 else ".L1::no_allocate"
        for octet in range(shape.octets):
            for i in range(0, shape.key_words, wide):
                self._load_codes(octet, i, wide, kept, self._k.pointer(8 * octet, 4 * i))
            if shape.key_planes > 1:
                for i in range(0, shape.key_words, wide):
                    at = self._k.pointer(8 * octet, 4 * i, self._third)
                    self._load_codes(octet, shape.key_words + i, wide, kept, at)
        self._copy_values()
        # Without branches, which all that follows would wait for: all scales are read.
        for turn in range(self._turns):
            exists = seen.includes(let(first + (self._lane + 32 * turn)))
            if shape.tile < 32:
                exists = T.And(self._lane < shape.tile, exists)
            store(self._wanted, T.Select(exists, u32(0xFFFFFFFF), u32(0)), turn)
            for side, (place, codec) in enumerate(
                ((self._k_meta, shape.key), (self._v_meta, shape.value))
            ):
                at = place.pointer(32 * turn)
                if len(codec.meta) == 2:
                    ptx("ld.global.nc.u32", self._metas[turn, side], at)
                else:
                    short = local(1, "uint16")
                    ptx("ld.global.nc.u16", short[0], at)
                    store(self._metas, T.cast(short[0], "uint32"), turn, side)

    def _load_codes(self, octet: int, first: int, count: int, kept: str, pointer) -> None:
        registers = [self._codes[octet, first + e] for e in range(count)]
        access(f"ld.global.nc{kept}.L2::128B", registers, pointer)

    def _copy_values(self) -> None:
        shape = self._shape

        def copy() -> None:
            for first in range(0, shape.tile, self._copied):
                place = self._to + T.cast(self._tile[0] * 4, "uint32") + u32(16 * first)
                ptx("cp.async.cg.shared.global.L2::128B", place, self._v.pointer(first), 16)

        # Lanes for which a row has no chunk, or the tile no row.
        with contextlib.ExitStack() as conditions:
            if shape.chunks < self._sharing:
                conditions.enter_context(when(self._chunk < shape.chunks))
            if self._copied * self._sharing < 32:
                conditions.enter_context(when(self._lane < self._copied * self._sharing))
            copy()

    def turn(self) -> None:
        """All copies of a tile, or none, are under way: go to the other place."""
        ptx("cp.async.commit_group")
        store(self._tile, self._both - self._tile[0])

    def attend(self, rows: RowShape, queries, softmax: Softmax, first, masked, ask_next) -> None:
        """Scores, weights and output of the tile that begins with token ``first``.

        ``ask_next`` calls `ask` and `find_pages` for the next one, where K's registers are free.
        """
        shape = self._shape
        self._leave_scales(softmax)
        warp_barrier()
        scores = local((rows.row_tiles, shape.octets, 4), "float32")
        self._score(rows, queries, scores)
        for octet in range(shape.octets):
            factors = self._factors(0, octet)
            for m, e in itertools.product(range(rows.row_tiles), range(4)):
                store(scores, scores[m, octet, e] * factors[e % 2], m, octet, e)
        ask_next()
        self.turn()
        softmax.weigh(scores, first, masked)
        ptx("cp.async.wait_group", 1)
        warp_barrier()
        self._add_values(rows, softmax, scores)

    def _factors(self, side: int, octet: int):
        """Factors of logits, or of weights, of tokens 2 t and 2 t + 1 of an octet."""
        factors = local(2, "float32")
        begin = self._scales + (side * self._shape.tile + 8 * octet) + 2 * self._t
        access("ld.shared", [factors[0], factors[1]], pointer(self._words, begin), "f32")
        return factors

    def _leave_scales(self, softmax: Softmax) -> None:
        """Factors of the lane's tokens, where all lanes read them."""
        shape, dtype, words = self._shape, self._shape.spec.dtype, self._words
        values = local(self._turns, "float32")
        top = local(1, "uint32")
        store(top, u32(0))
        for turn in range(self._turns):
            for side in range(2):
                kept = T.bitwise_and(self._metas[turn, side], self._wanted[turn])
                store(self._metas, kept, turn, side)
            # Of lanes that have no token it is zero.
            value = from_half(dtype, self._metas[turn, 1]) * f32(self._value_factor)
            store(values, value, turn)
            store(top, T.max(top[0], as_bits(T.fabs(values[turn]))))
        # Of floats that are not negative, bits have their order.
        ptx("redux_sync.max.u32", top[0], top[0], u32(FULL_WARP))
        with when(top[0] > as_bits(self._bound[0])):
            bound = let(as_float(top[0]) * f32(_MARGIN))
            self._scale_output(softmax, let(self._bound[0] / bound))
            store(self._bound, bound)
            store(self._inverse, f32(_ROOM) / bound)
        residual = local(1, "uint32")

        def leave(turn: int) -> None:
            token, key = let(self._lane + 32 * turn), self._metas[turn, 0]
            scale = row_scale(dtype, shape.key, key)
            factors = (scale * self._key_factor, values[turn] * self._inverse[0])
            for side, factor in enumerate(factors):
                at = pointer(words, self._scales + side * shape.tile + token)
                ptx("st.shared.f32", at, factor)
            if shape.key.residual_sign:
                # Twice in a word, in units of levels.
                unit = let(high_half(dtype, key) * f32(shape.spec.head_dim**0.5))
                ptx(PAIR["float16"], residual[0], unit, unit)
                at = pointer(words, self._scales + 2 * shape.tile + token)
                ptx("st.shared.u32", at, residual[0])

        for turn in range(self._turns):
            if shape.tile >= 32:
                leave(turn)
            else:
                with when(self._lane < shape.tile):
                    leave(turn)

    def _score(self, rows: RowShape, queries, scores) -> None:
        shape = self._shape
        own = let(queries + 4 * self._lane)
        # Tables of rows take registers, of which 32 rows of queries leave few.
        abreast = 2 if shape.key.residual_sign and rows.row_tiles > 1 else shape.octets
        for first in range(0, shape.octets, abreast):
            octets = range(first, first + abreast)
            tables = [self._table_of(octet) for octet in octets]
            for word in range(shape.key_words):
                places = list(itertools.product(range(shape.key_fields), range(rows.row_tiles)))
                steps = [m * shape.steps + field * shape.key_words + word for field, m in places]
                operand = self._queries(own, steps[0])
                found = together(
                    [
                        self._keys(table, octet, word)
                        for octet, table in zip(octets, tables, strict=True)
                    ]
                )
                for (field, m), after in zip(places, [*steps[1:], None], strict=True):
                    # Ahead of the products before its own.
                    following = None if after is None else self._queries(own, after)
                    for i, octet in enumerate(octets):
                        result = [scores[m, octet, e] for e in range(4)]
                        start = result if word or field else [f32(0)] * 4
                        b = [found[i][field, half] for half in range(2)]
                        mma(PRODUCTS["float16"], result, operand, b, start)
                    operand = following

    def _queries(self, own, step: int) -> list:
        """The operand of a step of a row tile."""
        a = local(4, "uint32")
        registers = [a[e] for e in range(4)]
        access("ld.shared", registers, pointer(self._words, own + 128 * step))
        return registers

    def _table_of(self, octet: int) -> LevelTable:
        """The table of the lane's row of K; the residual of codes whose top bit is set is added.

        Products of their own for the signs of residuals need no such table, but half as many more
        of the tensor core: 454 us instead of 428 for 8 tokens, 266 instead of 261 for 4, H100.
        """
        if self._key_table is not None:
            return self._key_table
        shape, words = self._shape, self._words
        residual, pairs = local(1, "uint32"), local(4, "uint32")
        at = pointer(words, self._scales + (2 * shape.tile + 8 * octet) + self._g)
        ptx("ld.shared.u32", residual[0], at)
        for i in range(4):
            ptx("add.rn.f16x2", pairs[i], self._key_pairs[i], residual[0])
        return LevelTable(pairs, 8)

    def _keys(self, table: LevelTable, octet: int, word: int) -> Chain:
        """Values of a word of K's codes, ``[field, half]``."""
        shape, codes = self._shape, self._codes
        if shape.key_fields == 2:
            return find_mirrored(table, codes[octet, word])
        third = None
        if shape.key_planes > 1:
            third = let(T.shift_right(codes[octet, shape.key_words + word], self._later))
        return find_pairs(table, codes[octet, word], third)

    def _add_values(self, rows: RowShape, softmax: Softmax, scores) -> None:
        shape = self._shape
        product = PRODUCTS["float16"]
        octets = 4 if shape.tile >= 32 and rows.row_tiles == 1 else 2
        for first in range(0, shape.octets, octets):
            read = self._read_values(first, octets)
            factors = [self._factors(1, first + octet) for octet in range(octets)]
            weights = [
                self._weights(scores, factors[2 * step : 2 * step + 2], m, first + 2 * step)
                for step in range(octets // 2)
                for m in range(rows.row_tiles)
            ]
            for chunk in range(shape.value_chunks):
                found = together([self._values(read[i], chunk) for i in range(octets)])
                for step, field, byte, m in itertools.product(
                    range(octets // 2), range(shape.value_fields), range(2), range(rows.row_tiles)
                ):
                    octet = (chunk * shape.value_fields + field) * 2 + byte
                    result = [softmax.output[m, octet, e] for e in range(4)]
                    b = [found[2 * step + half][field, byte] for half in range(2)]
                    mma(product, result, weights[step * rows.row_tiles + m], b, result)

    @staticmethod
    def _weights(scores, factors, m: int, first: int):
        """Weights of two octets, times V's factors, as an operand."""
        a = local(4, "uint32")
        for i in range(4):
            own, half = factors[i // 2], 2 * (i % 2)
            pair = [scores[m, first + i // 2, half + e] * own[e] for e in (1, 0)]
            ptx(PAIR["float16"], a[i], *pair)
        return [a[i] for i in range(4)]

    def _read_values(self, first: int, octets: int):
        """Codes of V ``[octet][chunk]``: bytes 2 g, 2 g + 1 of two tokens, token by token."""
        shape, tile = self._shape, self._tile[0]
        read = [[None] * shape.chunks for _ in range(octets)]
        # Four matrices at a time: of 32 tokens and a chunk, or of 16 tokens and two.
        abreast = 4 // octets
        lane = let(T.truncmod(self._lane, 8 * octets) * 4)
        other = let(T.truncdiv(self._lane, 8 * octets) * shape.value_plane)
        for chunk in range(0, shape.chunks, abreast):
            words = local(4, "uint32")
            at = tile + lane + (chunk * shape.value_plane + 32 * first)
            # Past the last chunk it is read twice.
            at = at + other if chunk + 1 < shape.chunks and abreast > 1 else at
            name = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
            ptx(name, *[words[i] for i in range(4)], pointer(self._words, at))
            for i in range(octets * min(abreast, shape.chunks - chunk)):
                read[i % octets][chunk + i // octets] = let(byte_perm(words[i], u32(0), 0x3120))
        return read

    def _values(self, codes, chunk: int) -> Chain:
        """Values of an octet of tokens and a chunk of V, ``[field, byte]``: of two tokens each."""
        shape = self._shape
        if shape.value_fields == 2:
            return find_mirrored(self._value_table, codes[chunk])
        third = None
        if shape.third_chunks:
            # A byte has the bits of two bytes of pairs: a half of the chunks, then the other.
            later = chunk // shape.third_chunks
            third = codes[shape.value_chunks + chunk % shape.third_chunks]
            third = let(T.shift_right(third, u32(1))) if later else third
        return find_pairs(self._value_table, codes[chunk], third)


def _halves(levels) -> list[int]:
    """Bits of float16."""
    return [int(bits) for bits in np.array(levels).astype(np.float16).view(np.uint16)]


def _constants(levels, unknown_zero):
    """Words of two levels in registers that the compiler cannot know: see `decode_score`."""
    halves = _halves(levels)
    pairs = local(len(levels) // 2, "uint32")
    for i in range(len(levels) // 2):
        word = halves[2 * i] | halves[2 * i + 1] << 16
        store(pairs, T.bitwise_or(u32(word), unknown_zero), i)
    return pairs
