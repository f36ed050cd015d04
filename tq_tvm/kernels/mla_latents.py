"""Latents of ``mla`` on GPUs: warps that make operands of packed rows.

A warp has eight rows of a tile at a time, which are of one page. Rows as they are in the cache come
by ``cp.async`` a tile ahead, into a place in shared memory that is the warp's own; its chunks of 16
bytes are exchanged, so that eight lanes, each with a row, read different banks. Lane l decodes
columns of row ``l % 8``, the part ``l / 8`` of four, and writes them where `wgmma` reads them.

Rows past the sequence's end become zeros: their weights are zero, but a product of zero and what
is not a number is not.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.device import (
    access,
    held,
    i32,
    let,
    local,
    pointer,
    ptx,
    shared_address,
    store,
    u32,
    warp_barrier,
    when,
)
from tq_tvm.kernels.direct_cuda import DirectRow
from tq_tvm.kernels.lookup_cuda import CodedRow
from tq_tvm.kernels.mla_shape import BLOCK, HALF, HALF_ROPE, RANKS, TILE, MlaShape
from tq_tvm.kernels.page_address import PageAddress, TableRow, as_pointer
from tq_tvm.kernels.wgmma import swizzled
from tq_tvm.spec import LATENT_DIMS

__all__ = ["Latents"]

_GROUP = 8
"""Rows of a warp at a time."""

_PARTS = 32 // _GROUP
"""Lanes that have a row of a CTA's columns between them."""

_CHUNK = 16


class Latents:
    """A warp's rows of the tiles of one sequence.

    ``rank`` is the CTA's in its cluster; the warp is number ``warp`` of those that decode.
    """

    def __init__(self, shape: MlaShape, words, caches, table, sequence, length, rank, warp, lane):
        self._shape, self._words, self._rank, self._lane = shape, words, rank, lane
        self._length = length
        latents, ropes, metas, _ = caches
        codec = shape.codec
        self._tensor_scale = let(metas.buffer[0]) if codec.tensor_scale else None
        self._turns = TILE // _GROUP // shape.config.decoders
        # Of each turn: the page of the rows that are asked for next, and their scales.
        self._page = local(self._turns, "int32")
        self._meta = local(self._turns, "uint32")
        decoders = shape.config.decoders
        self._groups = [let(turn * decoders + warp) for turn in range(self._turns)]
        self._row, self._part = let(lane % _GROUP), let(lane // _GROUP)
        self._written = [let(self._word_of(n)) for n in range(self._neighbours)]
        self._table_row = TableRow(pointer(words, lane))
        self._table_row.begin(table, sequence)
        self._place_copies(latents, ropes, metas)

    def _place_copies(self, latents, ropes, metas) -> None:
        """Addresses of the lane's pieces in page 0, and where in a group's place they go."""
        shape, codec, lane = self._shape, self._shape.codec, self._lane
        codes = shape.code_bytes
        chunks = codes // _CHUNK
        row, at = let(T.truncdiv(lane, chunks)), let(T.truncmod(lane, chunks))
        own = self._rank * (self._half_plane if codec.packed else codes)
        self._copied_row = row
        size = 1 if codec.packed else 2
        self._codes = PageAddress(latents, self._source(row, at, own), size, lane)
        self._code_row = codec.packed_bytes(LATENT_DIMS[0]) * size
        self._code_to = held(
            "uint32", T.cast(row * codes + self._exchanged(row, at) * _CHUNK, "uint32"), lane
        )
        # A row's part of 64 bytes is four chunks, those of eight rows one a lane.
        row, at = let(T.truncdiv(lane, 4)), let(T.truncmod(lane, 4))
        self._rope_of = row
        inside = row * LATENT_DIMS[1] + self._rank * HALF_ROPE + at * 8
        self._ropes = PageAddress(ropes, inside, 2, lane)
        to = _GROUP * codes + row * (2 * HALF_ROPE) + swizzled(HALF_ROPE, row, at) * _CHUNK
        self._rope_to = held("uint32", T.cast(to, "uint32"), lane)
        if codec.meta:
            self._metas = PageAddress(metas, self._row * len(codec.meta), 2, lane)
        first = pointer(self._words, self._place(0))
        self._staged = held("uint32", shared_address(first), lane)

    @property
    def _neighbours(self) -> int:
        """Chunks of a lane that are neighbours."""
        codec = self._shape.codec
        if codec.family == "lloyd_max":
            return self._half_plane // _PARTS // 8
        return 2 if codec.packed else 1

    def _word_of(self, number: int):
        """Where a chunk of the lane is among the operand's, behind the first of a group's rows."""
        chunk = let(self._part * self._neighbours + number)
        block, inside = T.truncdiv(chunk, BLOCK // 8), T.truncmod(chunk, BLOCK // 8)
        row = (block * TILE + self._row) * (BLOCK // 2)
        return row + swizzled(BLOCK, self._row, inside) * 4

    def _first(self, tile, turn: int):
        """The first token of the warp's rows of a turn."""
        return tile * TILE + self._groups[turn] * _GROUP

    def begin(self, tile) -> None:
        """Ask for a first tile."""
        for turn in range(self._turns):
            self._find_page(tile, turn)
            self._ask(tile, turn)

    def _find_page(self, tile, turn: int) -> None:
        token = T.min(self._first(tile, turn), self._length - 1)
        page = T.shift_right(token, self._shape.spec.page_size.bit_length() - 1)
        self._table_row.look_up(self._page, turn, page)

    def _ask(self, tile, turn: int) -> None:
        """Begin to copy the rows of a turn, whose page is known; then find the next tile's."""
        codes, size = self._shape.code_bytes, self._shape.spec.page_size
        first, page = let(self._first(tile, turn)), self._page[turn]
        inside = let(T.bitwise_and(first, size - 1))
        staged = let(self._staged + u32(4 * turn * self._shape.config.decoders * self._place_words))
        source = let(self._codes.of(page, inside * self._code_row))
        step = 32 * _CHUNK // codes
        for n in range(_GROUP // step):
            # Rows ``step`` later: chunks change places with those of other bits of the row.
            turned = n * step % 8 * _CHUNK
            to = staged + T.bitwise_xor(self._code_to, u32(turned)) + u32(n * step * codes)
            at = source + T.uint64(n * step * self._code_row)
            self._copy(to, at, first + (self._copied_row + n * step))
        source = self._ropes.of(page, inside * (2 * LATENT_DIMS[1]))
        self._copy(staged + self._rope_to, source, first + self._rope_of)
        self._ask_meta(first, inside, turn)
        self._find_page(tile + 1, turn)
        ptx("cp.async.commit_group")

    @property
    def _half_plane(self) -> int:
        """Bytes of the first plane that a CTA has."""
        return LATENT_DIMS[0] * self._shape.codec.plane_bits[0] // 8 // RANKS

    def _source(self, row, chunk, own):
        """Of a chunk of a row of the CTA's codes: where it is, in elements of the cache."""
        codec, bytes_ = self._shape.codec, self._shape.code_bytes
        if not codec.packed:
            return row * LATENT_DIMS[0] + T.shift_right(own, 1) + chunk * (_CHUNK // 2)
        start = row * codec.packed_bytes(LATENT_DIMS[0])
        if self._half_plane == bytes_:
            return start + own + chunk * _CHUNK
        # The second plane follows the whole first one, and a CTA has all of it.
        second = chunk >= self._half_plane // _CHUNK
        return start + chunk * _CHUNK + T.Select(second, i32(self._half_plane), own)

    def _place(self, turn: int):
        """The word of shared memory where the warp's rows of a turn are."""
        return let(self._shape.staged_begin // 4 + self._groups[turn] * self._place_words)

    @property
    def _place_words(self) -> int:
        """Words of a group's place."""
        return _GROUP * (self._shape.code_bytes + 2 * HALF_ROPE) // 4

    def _exchanged(self, row, chunk):
        """Where a chunk of codes is in its row."""
        return swizzled(32 if self._shape.code_bytes == 4 * _CHUNK else 64, row, chunk)

    def _copy(self, to, source, token) -> None:
        """Copy 16 bytes, or zeros past the end."""
        size = local(1, "uint32")
        store(size, T.Select(token < self._length, u32(_CHUNK), u32(0)))
        ptx("cp.async.cg.shared.global", to, as_pointer(source), _CHUNK, size[0])

    def _ask_meta(self, first, inside, turn: int) -> None:
        """Read the scales of the lane's row; zeros past the end."""
        count = len(self._shape.codec.meta)
        if not count:
            return
        store(self._meta, u32(0), turn)
        with when(first + self._row < self._length):
            place = as_pointer(self._metas.of(self._page[turn], inside * (2 * count)))
            if count == 2:
                ptx("ld.global.nc.u32", self._meta[turn], place)
            else:
                short = local(1, "uint16")
                ptx("ld.global.nc.u16", short[0], place)
                store(self._meta, T.cast(short[0], "uint32"), turn)

    def decode(self, tile, last, begin, wait) -> None:
        """Make operands of a tile from word ``begin`` on, and ask for the next one.

        ``wait`` is called when rows have been read: it waits until the operands may be written.
        """
        following = let(tile + 1)
        for turn in range(self._turns):
            ptx("cp.async.wait_group", self._turns - 1)
            warp_barrier()
            read = self._read(turn)
            # Others of the warp copy to where this lane has read.
            warp_barrier()
            with I.If(following < last):
                with I.Then():
                    self._ask(following, turn)
                with I.Else():
                    ptx("cp.async.commit_group")
            if turn == 0:
                wait()
            self._write(turn, begin, *read)

    def _read(self, turn: int) -> tuple[Any, Any]:
        """The lane's codes and scales in registers, and a chunk of a rope part."""
        shape, codec = self._shape, self._shape.codec
        place, words = self._place(turn), self._words
        begin = let(place + self._row * (shape.code_bytes // 4))

        def chunk(number):
            return pointer(words, begin + self._exchanged(self._row, number) * 4)

        dtype = shape.spec.dtype
        row: Any
        if codec.family == "lloyd_max":
            lanes = RANKS * _PARTS
            row = CodedRow(
                LATENT_DIMS[0], dtype, codec, lanes, "ld.shared", value_dtype=shape.latent_dtype
            )
            row.read_planes(
                lambda n: chunk(self._part * (row.bytes // _CHUNK) + n),
                lambda n: chunk(
                    self._half_plane // _CHUNK + self._part * (row.bytes // _CHUNK) + n
                ),
                self._rank,
            )
        else:
            piece = _CHUNK if codec.packed else _CHUNK // 2
            row = DirectRow(HALF, dtype, codec, _PARTS, "ld.shared", self._tensor_scale, piece)
            row.read_pieces(lambda n: chunk(n * _PARTS + self._part))
        if codec.meta:
            store(row.meta, self._meta[turn])
        rope = local(4, "uint32")
        at = place + _GROUP * shape.code_bytes // 4 + self._lane * 4
        access("ld.shared", [rope[i] for i in range(4)], pointer(words, at))
        return row, rope

    def _write(self, turn: int, begin, row, rope) -> None:
        """Write the lane's columns, and its chunk of a rope part, where products read them."""
        words, group = self._words, self._groups[turn]
        start = let(begin + group * (_GROUP * BLOCK // 2))
        for first, number, line in self._chunks(row):
            # Lanes' chunks are neighbours, and begin where a block or its second half does.
            block, inside = divmod(first, BLOCK // 8)
            turned = self._written[number]
            at = start + (T.bitwise_xor(turned, inside * 4) if inside else turned)
            at = at + block * (TILE * BLOCK // 2)
            access("st.shared", line, pointer(words, at))
        # Chunks of a rope part are where they have to be already.
        at = begin + HALF * TILE // 2 + group * (_GROUP * HALF_ROPE // 2) + self._lane * 4
        access("st.shared", [rope[i] for i in range(4)], pointer(words, at))

    def _chunks(self, row):
        """Eight values at a time: the first chunk of all lanes' columns, and the lane's n-th."""
        if self._shape.codec.family != "lloyd_max":
            for column, line in row.pieces_of_lines():
                for n in range(len(line) // 4):
                    yield column // 8, n, line[4 * n : 4 * n + 4]
            return
        for field, n, line in row.chunks():
            yield field * (HALF // self._shape.fields) // 8, n, line
