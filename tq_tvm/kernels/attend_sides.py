"""K or V of a tile of ``attend`` and ``prefill`` on GPUs: how a thread copies and decodes it.

See `attend_tiles`. A row is in chunks of 16 bytes; chunk c of row r is where chunk c ^ (r % 8)
would be, so that the eight rows of a matrix of ``ldmatrix`` are in different banks. Of codes of
direct codecs whose rows have 128 bytes or more, halves of each 128 are exchanged in every second
row: eight lanes read one half of a row, and the next eight the other half of the next row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels import pages
from tq_tvm.kernels.dense_rows import dense_row_words
from tq_tvm.kernels.device import (
    access,
    held,
    i32,
    let,
    local,
    ptx,
    shared_address,
    store,
    u32,
    when,
)
from tq_tvm.kernels.direct_cuda import DIRECT_LANES, DirectRow
from tq_tvm.kernels.lookup_cuda import CodedRow
from tq_tvm.kernels.page_address import PageAddress, as_pointer
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["DirectSide", "Seen", "Side", "Step", "TileMemory", "TileShape", "as_register"]

_HALF = 64
"""Bytes that `DIRECT_LANES` read at a time, half of what the banks have."""

_BLOCK_WORDS = 32
"""Of 64 values, whose eight chunks are exchanged."""


def as_register(value):
    """Name an integer that addresses are made of: TVM simplifies what it can see through there."""
    register = local(1, "int32")
    store(register, value)
    return register[0]


@dataclasses.dataclass(frozen=True)
class TileShape:
    """Static sizes: ``tile`` tokens, the threads that work on them, and lanes that decode a row.

    The lanes are those of Lloyd-Max codecs; others have `DIRECT_LANES`. Rows are whole, or
    ``blocked`` as `wgmma` reads them: 64 values of every row, then the next 64.
    """

    spec: CacheSpec
    tile: int
    threads: int
    lanes: int
    blocked: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        """Values of a row of K and of V."""
        return self.spec.head_dim, self.spec.value_dim

    def row_words(self, side: int) -> int:
        """Words of a row of the model's dtype."""
        return dense_row_words(self.dims[side])

    def row_step(self, side: int) -> int:
        """Words from 64 values of a row to those of the next row."""
        return _BLOCK_WORDS if self.blocked else self.row_words(side)

    @property
    def block_step(self) -> int:
        """Words from 64 values of a row to its next 64."""
        return self.tile * _BLOCK_WORDS if self.blocked else _BLOCK_WORDS

    @property
    def sides(self) -> tuple[Codec, Codec]:
        """Codecs of K and V."""
        fmt = self.spec.cache_format
        return fmt.key, fmt.value

    @property
    def code_words(self) -> tuple[int, int]:
        """Words of the codes of K and of V, or of rows that stay as they are."""
        key, value = (
            self.tile * (-(-c.packed_bytes(dim) // 4) if c.packed else dense_row_words(dim))
            for c, dim in zip(self.sides, self.dims, strict=True)
        )
        return key, value

    @property
    def packed_words(self) -> int:
        """Words of codes and scales of a tile."""
        return sum(self.code_words) + 2 * self.tile

    @property
    def dense_words(self) -> int:
        """Words of K and V of the model's dtype, where they are decoded."""
        decoded = [side for side in range(2) if self.sides[side].packed]
        return sum(self.tile * self.row_words(side) for side in decoded)


Step = tuple[Callable[[], None], Callable[[], None]]
"""What reads the codes of a thread's row, and what writes their values."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """Tokens that rows of a block see: the first ``kept``, and from ``low`` to ``last``."""

    low: Any
    last: Any
    kept: Any

    def includes(self, token):
        """Whether a token is one of them."""
        return T.And(token <= self.last, T.Or(token >= self.low, token < self.kept))


class TileMemory:
    """Where the threads' tiles are in dynamic shared memory.

    From ``dense`` on K, then V, of the model's dtype: it has to be a multiple of a row's words, or
    of 32 where these are no power of two.
    From ``packed`` on codes and scales of two tiles.
    """

    def __init__(self, shape: TileShape, words, dense, packed) -> None:
        key, both = shape.code_words[0], sum(shape.code_words)
        self.words = words
        decoded = shape.tile * shape.row_words(0) if shape.sides[0].packed else 0
        self.dense = [dense, dense + decoded]
        self.codes = [packed, packed + key]
        self.metas = [packed + both, packed + (both + shape.tile)]


class Side:
    """K or V of the tiles: addresses of one thread."""

    def __init__(
        self, shape: TileShape, memory: TileMemory, number: int, cache, meta, head, thread
    ) -> None:
        spec, tile = shape.spec, shape.tile
        self._shape, self._memory, self._thread = shape, memory, thread
        self._number, self.codec = number, shape.sides[number]
        self.dim = shape.dims[number]
        self._head = head
        self._codes, self._code_stride = pages.flat(cache), self._stride(cache)
        self._elements = self.codec.packed_bytes(self.dim)
        self._width = 1 if self.codec.packed else 2
        self._chunk = math.gcd(self._elements * self._width, 16)
        self._lane = let(T.truncmod(thread, 32))
        if self.codec.meta:
            self._metas, self._meta_stride = pages.flat(meta), self._stride(meta)
            # Threads behind those that read a scale of K read one of V.
            self._own = let((thread + number * tile) % shape.threads)
            self._scaled = let(self._own % tile)
            self._meta, self._wanted = local(1, "uint32"), local(1, "uint32")
            self._short = local(1, "uint16")
            count = len(self.codec.meta)
            self._scaled_at = self._address(meta, count, 2, self._scaled)
            self._scale_to = self._shared(memory.metas[number] + self._own)
        self._place_rows()
        self._place_copies(cache)

    def _place_rows(self) -> None:
        """Which row and part of it this thread decodes first, and where its values go."""
        lanes = self._shape.lanes
        self._abreast = self._shape.threads // lanes
        self._decoded = as_register(self._thread // lanes)
        self._part = as_register(self._thread % lanes)
        bytes_ = self.dim * self.codec.plane_bits[0] // 8 // lanes
        self._written = self._word_of(self._decoded, self._part * bytes_)

    def _place_copies(self, cache) -> None:
        """Which piece of a tile's codes this thread copies first, and where to."""
        chunks = self._elements // self._chunk
        # Of other sizes pieces of a thread are no constant number of rows apart.
        self._copied_at = None
        if self._shape.threads % chunks == 0:
            row, column = self._thread // chunks, self._thread % chunks * self._chunk
            self._copied_at = self._address(cache, self._elements, self._width, row, column)
            begin = self._memory.codes[self._number]
            self._copied_to = self._shared(begin + self._thread * (self._chunk // 4))

    def _address(self, cache, elements: int, size: int, row, column=0) -> PageAddress:
        """Where pages have an element of a row of this head."""
        _, head_rows = pages.row_strides(self._shape.spec)
        inside = self._head * head_rows * elements + row * (self._apart * elements) + column
        return PageAddress(cache, inside, size, self._lane)

    def _shared(self, word):
        """Address of a word of shared memory, kept in a register."""
        place = self._memory.words.ptr_to([as_register(word)])
        return held("uint32", shared_address(place), self._lane)

    def _word_of(self, row, coordinate):
        """Where a coordinate of a row is, in words from the tile's first row on."""
        shape = self._shape
        chunk = T.truncdiv(coordinate, 8)
        turned = T.bitwise_xor(T.truncmod(chunk, 8), T.truncmod(row, 8))
        at = row * shape.row_step(self._number) + T.truncdiv(chunk, 8) * shape.block_step
        return as_register(at + turned * 4 + T.truncmod(T.truncdiv(coordinate, 2), 4))

    @staticmethod
    def _stride(argument):
        stride = local(1, "int32")
        store(stride, T.cast(argument.buffer.strides[0], "int32"))
        return stride

    def _base(self, page, offset, elements: int, stride):
        """First element of the row of this head at an offset of a page."""
        _, head_rows = pages.row_strides(self._shape.spec)
        inside = self._head * head_rows * elements + offset * (self._apart * elements)
        start = local(1, "int64")
        ptx("mul.wide.s32", start[0], page, stride[0])
        return start[0] + T.cast(inside, "int64")

    @property
    def _apart(self) -> int:
        """Rows from a token of a page to the next."""
        return pages.row_strides(self._shape.spec)[0]

    def ask(self, table, sequence, first, seen: Seen, packed, page) -> None:
        """Begin to copy the rows from token ``first`` on, of ``page`` where they are of one.

        Of tokens that no row of the block sees, codes are whatever is there, and scales will be
        zeros, or without scales the codes; pages of such tokens alone are not looked up.
        """
        shape, tile, size = self._shape, self._shape.tile, self._shape.spec.page_size
        shift = size.bit_length() - 1
        count, step = len(self.codec.meta), self._apart * self._elements
        offset = as_register(T.bitwise_and(first, size - 1)) if tile < size else i32(0)

        def looked_up(row, elements: int, stride):
            """The first element of a row of the tile, whose page is any."""
            # Registers: TVM takes minutes to simplify what it can see through here.
            token, own_page = local(1, "int32"), local(1, "int32")
            store(token, first + row)
            store(token, T.Select(seen.includes(token[0]), token[0], seen.last))
            store(own_page, table[sequence, T.shift_right(token[0], shift)])
            return self._base(own_page[0], T.bitwise_and(token[0], size - 1), elements, stride)

        if tile > size:
            elements, stride = self._elements, self._code_stride
            self._copy(lambda row: looked_up(row, elements, stride), first, seen, packed)
        elif self._copied_at is None:
            begin = let(self._base(page, offset, self._elements, self._code_stride))
            self._copy(lambda row: begin + T.cast(row * step, "int64"), first, seen, packed)
        else:
            self._copy_page(let(self._copied_at.of(page, offset * step)), packed)
        if not count:
            return
        # Without a branch, which all that follows would wait for: threads that have no scale read
        # one, too.
        token = let(first + self._scaled)
        store(self._wanted, T.Select(seen.includes(token), u32(0xFFFFFFFF), u32(0)))
        if tile <= size:
            at = as_pointer(self._scaled_at.of(page, offset * (2 * self._apart * count)))
        else:
            at = self._metas.ptr_to([looked_up(self._scaled, count, self._meta_stride)])
        if count == 2:
            ptx("ld.global.nc.u32", self._meta[0], at)
        else:
            ptx("ld.global.nc.u16", self._short[0], at)

    def _copy_page(self, base, packed) -> None:
        """Begin to copy codes of one page; ``base`` is where this thread's first piece is."""
        shape, chunk = self._shape, self._chunk
        pieces = shape.tile * (self._elements // chunk)
        apart = shape.threads // (self._elements // chunk) * self._apart * self._elements
        to = let(self._copied_to + T.cast(packed * 4, "uint32"))
        cached = "cg" if chunk == 16 else "ca"
        for turn in range(-(-pieces // shape.threads)):

            def copy(turn=turn):
                source = as_pointer(base + T.uint64(turn * apart))
                place = to + u32(turn * shape.threads * chunk)
                ptx(f"cp.async.{cached}.shared.global", place, source, chunk)

            if (turn + 1) * shape.threads <= pieces:
                copy()
            else:
                with when(self._thread < pieces - turn * shape.threads):
                    copy()

    def _copy(self, source, first, seen: Seen, packed) -> None:
        """Begin to copy codes; ``source`` is the first element of a row."""
        shape, tile = self._shape, self._shape.tile
        chunks = self._elements // self._chunk
        cached = "cg" if self._chunk == 16 else "ca"
        for turn in range(-(-tile * chunks // shape.threads)):
            piece = as_register(turn * shape.threads + self._thread)

            def copy(piece=piece):
                row, chunk = T.truncdiv(piece, chunks), T.truncmod(piece, chunks)
                at = source(as_register(row)) + T.cast(as_register(chunk) * self._chunk, "int64")
                to = self._memory.codes[self._number] + packed + piece * (self._chunk // 4)
                place = self._memory.words.ptr_to([as_register(to)])
                ptx(
                    f"cp.async.{cached}.shared.global", place, self._codes.ptr_to([at]), self._chunk
                )

            if (turn + 1) * shape.threads <= tile * chunks:
                copy()
            else:
                with when(piece < tile * chunks):
                    copy()

    def leave_metas(self, packed) -> None:
        """Put the scales where `decode` reads them."""
        if not self.codec.meta:
            return
        found = self._meta[0]
        if len(self.codec.meta) == 1:
            found = T.cast(self._short[0], "uint32")
        with when(self._own < self._shape.tile):
            place = self._scale_to + T.cast(packed * 4, "uint32")
            ptx("st.shared.u32", place, T.bitwise_and(found, self._wanted[0]))

    def steps(self, packed, moved) -> Iterator[Step]:
        """What makes rows of the model's dtype of codes and scales, step by step.

        The rows are ``moved`` words behind their first place. Step by step a thread's rows differ
        by a number of rows, a power of two, so its addresses differ by a constant, and what is
        exchanged by an exclusive or with one.
        """
        shape, memory = self._shape, self._memory
        words = memory.words
        written = as_register(memory.dense[self._number] + self._written + moved)
        # Words are the unit of the buffer; codes may begin inside one.
        view = T.decl_buffer((1 << 20,), "uint8", data=words.data, scope="shared.dyn")
        for before in range(0, shape.tile, self._abreast):
            coded = CodedRow(self.dim, shape.spec.dtype, self.codec, shape.lanes, "ld.shared")

            def read(before=before, coded=coded):
                row = as_register(before + self._decoded)
                codes = as_register(
                    memory.codes[self._number] + packed + row * (self._elements // 4)
                )
                coded.read_codes(
                    lambda at: view.ptr_to([4 * codes + T.cast(at, "int32")]), self._part
                )
                at = memory.metas[self._number] + packed + row
                ptx("ld.shared.u32", coded.meta[0], words.ptr_to([at]))

            def write(before=before, coded=coded):
                for first, line in coded.lines(0):
                    self._write(written, before, first, line)

            yield read, write

    def _write(self, written, row: int, first: int, line) -> None:
        """Write words of two values, which lane 0 of row 0 has ``first`` coordinates later."""
        shape, words = self._shape, self._memory.words
        for i in range(0, len(line), 4):
            chunk = first // 8 + i // 4
            turned = (chunk ^ row) % 8 * 4
            at = T.bitwise_xor(written, turned) if turned else written
            at = at + (row * shape.row_step(self._number) + chunk // 8 * shape.block_step)
            access("st.shared", line[i : i + 4], words.ptr_to([at]))


class DirectSide(Side):
    """The same of a direct codec."""

    def __init__(
        self, shape: TileShape, memory: TileMemory, number: int, cache, meta, head, thread
    ) -> None:
        super().__init__(shape, memory, number, cache, meta, head, thread)
        self._scale = None
        if self.codec.tensor_scale:
            self._scale = local(1, "float32")
            store(self._scale, meta.buffer[0])
        self._row_words = self._elements * self._width // 4
        # Copying: a chunk of a row.
        chunks = self._row_words // 4
        self._copied = shape.threads // chunks
        row, chunk = thread // chunks, thread % chunks
        self._row = as_register(row)
        self._from = as_register(row * (self._apart * self._elements) + chunk * (16 // self._width))
        if self._swapped:
            chunk = T.bitwise_xor(chunk, row % 2 * (_HALF // 16))
        elif not self.codec.packed:
            chunk = T.bitwise_xor(chunk, row % 8)
        self._to = as_register(row * self._row_words + chunk * 4)

    def _place_copies(self, cache) -> None:
        """Pieces have places of their own, see `_copy`."""
        self._copied_at = None

    def _place_rows(self) -> None:
        if not self.codec.packed:
            return
        # Pieces of a row, in bytes.
        self._abreast = self._shape.threads // DIRECT_LANES
        row, part = self._thread // DIRECT_LANES, self._thread % DIRECT_LANES
        self._decoded = as_register(row)
        piece = min(8, self._elements // DIRECT_LANES)
        self._apart_pieces = DIRECT_LANES * piece
        own = row * self._elements + part * piece
        turned = row % 2 * _HALF if self._swapped else 0
        self._read = [as_register(own + turned), as_register(own + (_HALF - turned))]
        self._written = self._word_of(row, part * piece)

    @property
    def _swapped(self) -> bool:
        """Whether halves of codes are exchanged."""
        return self.codec.packed and self._elements >= 2 * _HALF

    def _copy(self, source, first, seen: Seen, packed) -> None:
        shape, tile = self._shape, self._shape.tile
        begin = self._memory.codes[self._number] + packed
        paged = tile > shape.spec.page_size
        column = self._from - self._row * (self._apart * self._elements)
        start = None if paged else let(source(0) + T.cast(self._from, "int64"))

        def copy(turn: int) -> None:
            before = turn * self._copied
            row = as_register(self._row + before)
            if paged:
                at = source(row) + T.cast(column, "int64")
            else:
                at = start + T.int64(before * self._apart * self._elements)
            to = self._to
            if not self.codec.packed and before % 8:
                to = T.bitwise_xor(to, before % 8 * 4)
            place = self._memory.words.ptr_to([as_register(begin + to) + before * self._row_words])
            operands = [place, self._codes.ptr_to([at]), 16]
            if not self.codec.meta:
                size = local(1, "uint32")
                store(size, T.Select(seen.includes(first + row), u32(16), u32(0)))
                operands.append(size[0])
            ptx("cp.async.cg.shared.global", *operands)

        for turn in range(-(-tile // self._copied)):
            if (turn + 1) * self._copied <= tile:
                copy(turn)
            else:
                with when(self._row + turn * self._copied < tile):
                    copy(turn)

    def steps(self, packed, moved) -> Iterator[Step]:
        """As of `Side`."""
        shape, memory, words = self._shape, self._memory, self._memory.words
        # Words are the unit of the buffer; codes may begin inside one.
        view = T.decl_buffer((1 << 20,), "uint8", data=words.data, scope="shared.dyn")
        codes = 4 * (memory.codes[self._number] + packed)
        reads = [as_register(codes + at) for at in self._read]
        metas = as_register(memory.metas[self._number] + packed + self._decoded)
        written = as_register(memory.dense[self._number] + self._written + moved)
        scale = None if self._scale is None else self._scale[0]
        for row in range(0, shape.tile, self._abreast):
            coded = DirectRow(
                self.dim, shape.spec.dtype, self.codec, DIRECT_LANES, "ld.shared", scale
            )

            def pointer(n: int, row=row):
                if self._swapped:
                    return view.ptr_to([reads[n % 2] + (row * self._elements + n // 2 * 2 * _HALF)])
                return view.ptr_to([reads[0] + (row * self._elements + n * self._apart_pieces)])

            def read(row=row, coded=coded, pointer=pointer):
                coded.read_pieces(pointer)
                if self.codec.meta:
                    ptx("ld.shared.u32", coded.meta[0], words.ptr_to([metas + row]))

            def write(row=row, coded=coded):
                for first, line in coded.pieces_of_lines():
                    self._write(written, row, first, line)

            yield read, write
