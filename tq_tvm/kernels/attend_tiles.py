"""Tiles of K and V for ``attend`` and ``prefill`` on GPUs: packed rows, then the model's dtype.

Threads that work together, a CTA's or a warp's, have a tile of tokens in shared memory. While it is
decoded and attended to, ``cp.async`` brings the codes of the next one, and their scales come into
registers. `Tiles.decode` makes rows of the model's dtype of them, as ``flatten`` writes them, some
lanes a row. Rows of the codec ``none`` are copied to where they are read.

A row is in chunks of 16 bytes; chunk c of row r is where chunk c ^ (r % 8) would be, so that the
eight rows of a matrix of ``ldmatrix`` are in different banks. Of codes of direct codecs whose rows
have 128 bytes or more, halves of each 128 are exchanged in every second row: eight lanes read one
half of a row, and the next eight the other half of the next row.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels import pages
from tq_tvm.kernels.device import i32, let, local, ptx, store, u32, when
from tq_tvm.kernels.direct_cuda import DIRECT_LANES, DirectRow
from tq_tvm.kernels.lookup_cuda import CodedRow
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["Seen", "TileMemory", "TileShape", "Tiles"]

_HALF = 64
"""Bytes that `DIRECT_LANES` read at a time, half of what the banks have."""


@dataclasses.dataclass(frozen=True)
class TileShape:
    """Static sizes: ``tile`` tokens, the threads that work on them, and lanes that decode a row.

    The lanes are those of Lloyd-Max codecs; others have `DIRECT_LANES`.
    """

    spec: CacheSpec
    tile: int
    threads: int
    lanes: int

    @property
    def row_words(self) -> int:
        """Words of a row of the model's dtype."""
        return self.spec.head_dim // 2

    @property
    def sides(self) -> tuple[Codec, Codec]:
        """Codecs of K and V."""
        fmt = self.spec.cache_format
        return fmt.key, fmt.value

    @property
    def code_words(self) -> tuple[int, int]:
        """Words of the codes of K and of V, or of rows that stay as they are."""
        key, value = (
            self.tile * c.packed_bytes(self.spec.head_dim) // (4 if c.packed else 2)
            for c in self.sides
        )
        return key, value

    @property
    def packed_words(self) -> int:
        """Words of codes and scales of a tile."""
        return sum(self.code_words) + 2 * self.tile

    @property
    def dense_words(self) -> int:
        """Words of K and V of the model's dtype, where they are decoded."""
        return sum(codec.packed for codec in self.sides) * self.tile * self.row_words


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

    From ``dense`` on K, then V, of the model's dtype: it has to be a multiple of a row's words.
    From ``packed`` on codes and scales of two tiles.
    """

    def __init__(self, shape: TileShape, words, dense, packed) -> None:
        key, both = shape.code_words[0], sum(shape.code_words)
        self.words = words
        decoded = shape.tile * shape.row_words if shape.sides[0].packed else 0
        self.dense = [dense, dense + decoded]
        self.codes = [packed, packed + key]
        self.metas = [packed + both, packed + (both + shape.tile)]


class _Side:
    """K or V of the tiles: addresses of one thread."""

    def __init__(
        self, shape: TileShape, memory: TileMemory, number: int, cache, meta, head, thread
    ) -> None:
        spec, tile = shape.spec, shape.tile
        self._shape, self._memory, self._thread = shape, memory, thread
        self._number, self.codec = number, shape.sides[number]
        self._head = head
        self._codes, self._code_stride = pages.flat(cache), self._stride(cache)
        self._direct = self.codec.family != "lloyd_max"
        self._elements = self.codec.packed_bytes(spec.head_dim)
        self._width = 1 if self.codec.packed else 2
        self._chunk = math.gcd(self._elements * self._width, 16)
        self._exchanged = self._direct and self.codec.packed and self._elements >= 2 * _HALF
        self._scale = None
        if self.codec.meta:
            self._metas, self._meta_stride = pages.flat(meta), self._stride(meta)
            # Threads behind those that read a scale of K read one of V.
            self._own = let((thread + number * tile) % shape.threads)
            self._meta = local(1, "uint32")
        elif self.codec.tensor_scale:
            self._scale = local(1, "float32")
            store(self._scale, meta.buffer[0])

    @staticmethod
    def _stride(argument):
        stride = local(1, "int32")
        store(stride, T.cast(argument.buffer.strides[0], "int32"))
        return stride

    def _base(self, page, offset, elements: int, stride):
        """First element of the row of this head at an offset of a page."""
        spec = self._shape.spec
        bshd = spec.layout == "bshd"
        first = self._head if bshd else self._head * spec.page_size
        inside = first * elements + offset * (self._apart * elements)
        return T.cast(page, "int64") * T.cast(stride[0], "int64") + T.cast(inside, "int64")

    @property
    def _apart(self) -> int:
        """Rows from a token of a page to the next."""
        spec = self._shape.spec
        return spec.num_kv_heads if spec.layout == "bshd" else 1

    def ask(self, table, sequence, first, seen: Seen, packed) -> None:
        """Begin to copy the rows from token ``first`` on.

        Of tokens that no row of the block sees, codes are whatever is there, and scales are zeros,
        or without scales the codes; their pages are not looked up.
        """
        shape, tile, size = self._shape, self._shape.tile, self._shape.spec.page_size
        shift = size.bit_length() - 1
        chunks = self._elements * self._width // self._chunk
        cached = "cg" if self._chunk == 16 else "ca"
        count = len(self.codec.meta)
        strides = [(self._elements, self._code_stride)]
        if count:
            strides.append((count, self._meta_stride))
        if tile <= size:
            page = _register(table[sequence, T.shift_right(first, shift)])
            offset = _register(T.bitwise_and(first, size - 1))
            bases = [let(self._base(page, offset, n, stride)) for n, stride in strides]

            def source(row, number: int):
                inside = row * (self._apart * strides[number][0])
                return bases[number] + T.cast(inside, "int64")
        else:

            def source(row, number: int):
                # Registers: TVM takes minutes to simplify what it can see through here.
                token, page = local(1, "int32"), local(1, "int32")
                store(token, first + row)
                store(token, T.Select(seen.includes(token[0]), token[0], seen.last))
                store(page, table[sequence, T.shift_right(token[0], shift)])
                return self._base(page[0], T.bitwise_and(token[0], size - 1), *strides[number])

        for turn in range(-(-tile * chunks // shape.threads)):
            piece = _register(turn * shape.threads + self._thread)

            def copy(piece=piece):
                row = _register(T.truncdiv(piece, chunks))
                chunk = _register(T.truncmod(piece, chunks))
                begin = T.cast(chunk * (self._chunk // self._width), "int64")
                if self._exchanged:
                    moved = T.bitwise_xor(chunk, T.truncmod(row, 2) * (_HALF // 16))
                    inside = row * (self._elements // 4) + moved * 4
                elif self.codec.packed:
                    inside = piece * (self._chunk // 4)
                else:
                    moved = T.bitwise_xor(chunk, T.truncmod(row, 8))
                    inside = row * shape.row_words + moved * 4
                to = _register(self._memory.codes[self._number] + packed + inside)
                place = self._memory.words.ptr_to([to])
                operands = [place, self._codes.ptr_to([source(row, 0) + begin]), self._chunk]
                if not count:
                    size = local(1, "uint32")
                    seen_here = seen.includes(first + row)
                    store(size, T.Select(seen_here, u32(self._chunk), u32(0)))
                    operands.append(size[0])
                ptx(f"cp.async.{cached}.shared.global", *operands)

            if (turn + 1) * shape.threads <= tile * chunks:
                copy()
            else:
                with when(piece < tile * chunks):
                    copy()
        if not count:
            return
        store(self._meta, u32(0))
        with when(T.And(self._own < tile, seen.includes(first + self._own))):
            at = self._metas.ptr_to([source(self._own, 1)])
            if count == 2:
                ptx("ld.global.nc.u32", self._meta[0], at)
            else:
                short = local(1, "uint16")
                ptx("ld.global.nc.u16", short[0], at)
                store(self._meta, T.cast(short[0], "uint32"))

    def leave_metas(self, packed) -> None:
        """Put the scales where `decode` reads them."""
        if not self.codec.meta:
            return
        with when(self._own < self._shape.tile):
            to = self._memory.metas[self._number] + packed + self._own
            ptx("st.shared.u32", self._memory.words.ptr_to([to]), self._meta[0])

    def decode(self, packed) -> None:
        """Rows of the model's dtype from codes and scales."""
        shape, memory = self._shape, self._memory
        words, begin = memory.words, memory.dense[self._number]
        lanes = DIRECT_LANES if self._direct else shape.lanes
        abreast = shape.threads // lanes
        part = _register(self._thread % lanes)
        for turn in range(shape.tile // abreast):
            row = _register(turn * abreast + self._thread // lanes)
            dim, dtype = shape.spec.head_dim, shape.spec.dtype
            if self._direct:
                scale = None if self._scale is None else self._scale[0]
                coded = DirectRow(dim, dtype, self.codec, lanes, "ld.shared", scale)
            else:
                coded = CodedRow(dim, dtype, self.codec, lanes, "ld.shared")
            codes = _register(memory.codes[self._number] + packed + row * (self._elements // 4))
            # Words are the unit of the buffer; codes may begin inside one.
            view = T.decl_buffer((1 << 20,), "uint8", data=words.data, scope="shared.dyn")
            other = _register(T.truncmod(row, 2) * _HALF) if self._exchanged else None

            def pointer(at, codes=codes, view=view, other=other):
                at = T.cast(at, "int32")
                return view.ptr_to([4 * codes + (at if other is None else at ^ other)])

            coded.read_codes(pointer, part)
            if self.codec.meta:
                at = memory.metas[self._number] + packed + row
                ptx("ld.shared.u32", coded.meta[0], words.ptr_to([at]))
            for first, line in coded.lines(part):
                self._write(begin, row, first, line)

    def _write(self, begin, row, first, line) -> None:
        """Write words of a row from coordinate ``first`` on, chunk by chunk."""
        shape, words = self._shape, self._memory.words
        for i in range(0, len(line), 4):
            count = min(4, len(line) - i)
            word = _register(T.truncdiv(first, 2) + i)
            chunk = T.bitwise_xor(T.truncdiv(word, 4), T.truncmod(row, 8))
            at = begin + row * shape.row_words + chunk * 4 + T.truncmod(word, 4)
            kind = "u32" if count == 1 else f"v{count}.u32"
            pieces = [line[i + n] for n in range(count)]
            ptx(f"st.shared.{kind}", words.ptr_to([_register(at)]), *pieces)


def _register(value):
    """Name an integer that addresses are made of: TVM simplifies what it can see through there."""
    register = local(1, "int32")
    store(register, value)
    return register[0]


class Tiles:
    """K and V of one sequence and KV head, ``tile`` tokens at a time.

    Of each tile in turn: `arrive`, a barrier, `ask` for the next, `decode`, a barrier, and reads.
    """

    def __init__(self, shape: TileShape, memory: TileMemory, caches, head, thread, lane) -> None:
        k, v, k_meta, v_meta = caches
        self._shape, self._memory = shape, memory
        self._sides = [
            _Side(shape, memory, 0, k, k_meta, head, thread),
            _Side(shape, memory, 1, v, v_meta, head, thread),
        ]
        # Matrices of ``ldmatrix``: of K, the second has later chunks and the third later tokens;
        # transposed, of V, it is the other way round.
        self._from = []
        for side in range(2):
            octet, other = (lane // 16, lane // 8 % 2) if side == 0 else (lane // 8 % 2, lane // 16)
            row = lane % 8 + 8 * octet
            moved = T.bitwise_xor(lane % 8, other) * 4
            begin = memory.dense[side] if shape.sides[side].packed else 0
            self._from.append(_register(begin + row * shape.row_words + moved))
        # Of two places for codes and scales: the one asked for last, and the one that is decoded.
        self._asked, self._arrived = local(1, "int32"), local(1, "int32")
        self.start()

    def start(self) -> None:
        """No tile is on its way."""
        store(self._asked, i32(0))
        store(self._arrived, i32(self._shape.packed_words))

    def _turn(self, place) -> None:
        store(place, self._shape.packed_words - place[0])

    def ask(self, table, sequence, first, seen: Seen) -> None:
        """Begin to copy a tile."""
        first = _register(first)
        for side in self._sides:
            side.ask(table, sequence, first, seen, self._asked[0])
        ptx("cp.async.commit_group")
        self._turn(self._asked)

    def arrive(self) -> None:
        """Wait for the thread's own part; the caller puts a barrier behind it."""
        ptx("cp.async.wait_group", 0)
        self._turn(self._arrived)
        for side in self._sides:
            side.leave_metas(self._arrived[0])

    def decode(self) -> None:
        """Make rows of what arrived; barriers go around this."""
        for side in self._sides:
            if side.codec.packed:
                side.decode(self._arrived[0])

    def keys(self, block: int, step: int):
        """Operands of 16 tokens and 16 coordinates: ``[octet of tokens][half of coordinates]``."""
        return self._read(0, "", block, step)

    def values(self, block: int, step: int):
        """Operands of 16 tokens and 16 coordinates: ``[octet of coordinates][half of tokens]``."""
        return self._read(1, ".trans", block, step)

    def _read(self, side: int, kind: str, block: int, step: int):
        words = local(4, "uint32")
        at = T.bitwise_xor(self._from[side], 8 * step) + 16 * block * self._shape.row_words
        if not self._shape.sides[side].packed:
            at = at + (self._memory.codes[side] + self._arrived[0])
        name = f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16"
        ptx(name, *[words[i] for i in range(4)], self._memory.words.ptr_to([at]))
        return [[words[0], words[1]], [words[2], words[3]]]
