"""Reading tiles of a packed cache, for ``decode_cuda``.

K comes in registers, V in shared memory: two tiles of each warp's own, which ``cp.async`` fills in
turn. Loads to registers share few scoreboards, and who waits for one waits for all that are on it:
with V in registers too, each tile's first use of K waited for the V that was asked for just before
(32 % of the samples on an H200). With K in shared memory as well, reading it took as long.

A lane is ``(g, t)``, g = lane / 4, t = lane % 4. Of token 8 i + g it holds a quarter of the codes
of K, ``t``'s; of tokens 8 i + 2 t and 8 i + 2 t + 1 it reads bytes 2 g and 2 g + 1 of each 16 of V:
the fragments of ``mma`` as they are, K's tokens on the M side, V's on the K side.

Words of a tile in shared memory, for N tokens of D values: rows of V's codes, whose chunks of 16
bytes, rows of ``ldmatrix``, are exchanged so that eight tokens' are in all banks; then the aligned
word around each meta of V, in the order in which lanes read them. Rows are whole because a copy
asks L2 for a sector of 32 bytes once for each line of shared memory that it goes to.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels import pages
from tq_tvm.kernels.chunk_rows import chunk_word, turned_place
from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.decode_threads import Standing
from tq_tvm.kernels.device import (
    access,
    byte_perm,
    held,
    i32,
    let,
    local,
    ptx,
    shared_address,
    shared_dynamic,
    store,
    u32,
    warp_barrier,
    when,
)
from tq_tvm.kernels.page_address import PageAddress, TableRow, as_pointer

__all__ = ["KeyTile", "PageReader", "ValueRing", "value_bytes"]

_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


@dataclasses.dataclass(frozen=True)
class KeyTile:
    """Registers of K of a tile: codes and metas by octet of tokens."""

    codes: Any
    metas: Any

    @classmethod
    def allocate(cls, shape: Shape) -> KeyTile:
        """Registers for one tile."""
        words = shape.key_plane_words * len(shape.key_planes)
        return cls(local((shape.octets, words), "uint32"), local(shape.octets, "uint32"))


class ValueRing:
    """A warp's two tiles of V in shared memory: one is read while the other is filled.

    The tile in turn is a byte address, and so is everything that a lane adds to it.
    """

    def __init__(self, shape: Shape, warp, own: Standing) -> None:
        self._shape = shape
        lane, sharing = own.lane, shape.sharing_lanes
        warps = shape.config.warps * shape.columns
        words = shared_dynamic(warps * 2 * shape.value_words, "uint32")
        begin = let(shared_address(words.ptr_to([warp * (2 * shape.value_words)])))
        self._both = held("uint32", 2 * begin + u32(4 * shape.value_words), lane)
        self._tile = local(1, "uint32")
        store(self._tile, begin)
        apart = shape.own_apart

        def place(word):
            return held("uint32", T.cast(word * 4, "uint32"), lane)

        self._rows = place(chunk_word(lane, 0, sharing))
        self._copied = place(chunk_word(lane // sharing, lane % sharing, sharing))
        self._own_metas = place(own.token * shape.own_tokens)
        self._copied_metas = place(lane % apart * shape.own_tokens + lane // apart)

    def turn(self) -> None:
        """All copies to the tile in turn, or none, are under way: go to the other one."""
        ptx("cp.async.commit_group")
        store(self._tile, self._both - self._tile[0])

    def wait(self) -> None:
        """Wait for the tile in turn, which was filled before the other."""
        ptx("cp.async.wait_group", 1)
        warp_barrier()

    def copy_to(self, token: int):
        """Where the lane's piece of V of the tokens from ``token`` on goes."""
        copied = turned_place(self._copied, token, self._shape.sharing_lanes)
        return self._tile[0] + copied + u32(4 * self._shape.value_row * token)

    def copy_meta_to(self, token: int):
        """The same of V's metas, of 32 tokens."""
        first = self._shape.value_meta_at + token // self._shape.own_apart
        return self._tile[0] + self._copied_metas + u32(4 * first)

    def metas(self, into) -> None:
        """Words that hold V's metas of the lane's own tokens."""
        count = self._shape.own_tokens
        first = let(self._tile[0] + self._own_metas + u32(4 * self._shape.value_meta_at))
        width = min(count, 4)
        for j in range(0, count, width):
            access("ld.shared", [into[j + e] for e in range(width)], first + u32(4 * j))

    def codes(self, step: int):
        """V of 32 tokens: bytes 2 g, 2 g + 1 of two tokens, ``[chunk of 16 bytes, octet]``."""
        shape = self._shape
        chunks = shape.value_chunks + shape.third_chunks
        rows = local((chunks, 4), "uint32")
        for chunk in range(chunks):
            own = T.bitwise_xor(self._rows, u32(16 * chunk)) if chunk else self._rows
            registers = [rows[chunk, i] for i in range(4)]
            place = self._tile[0] + own + u32(128 * shape.value_row * step)
            ptx(_TRANSPOSED, *registers, place)
        return rows


def value_bytes(shape: Shape, rows, first: int = 0, chunks: int | None = None):
    """Bytes of V ``[half, byte]``, four tokens in a word: half 0 has the even octets.

    Of ``chunks`` chunks from ``first`` on: of all pairs of bits, unless said.
    """
    chunks = shape.value_chunks if chunks is None else chunks
    words = local((2, 2 * chunks), "uint32")
    for chunk in range(chunks):
        for half in range(2):
            for byte, selector in enumerate((0x6420, 0x7531)):
                low, high = rows[first + chunk, half], rows[first + chunk, half + 2]
                word = byte_perm(low, high, selector)
                store(words, word, half, 2 * chunk + byte)
    return words


class PageReader:
    """Addresses of one lane in the four cache tensors, and its share of every copy.

    One multiplication a page and tensor: everything inside a page is a constant offset, or in the
    lane's own address.
    """

    def __init__(self, shape: Shape, matched, block_table, own: Standing, ring: ValueRing) -> None:
        spec, head, lane = shape.spec, own.kv_head, own.lane
        self._shape, self._ring, self._table = shape, ring, block_table
        self.page, self._row = local(shape.pages, "int32"), TableRow()
        fmt = spec.cache_format
        width = {
            "k": fmt.key.packed_bytes(spec.head_dim),
            "v": fmt.value.packed_bytes(spec.head_dim),
            "k_meta": len(fmt.key.meta),
            "v_meta": len(fmt.value.meta),
        }
        chunks = shape.sharing_lanes
        # Tokens of a load or copy that lanes differ in, and which of them is a lane's.
        self._span = {"k": 8, "v": 32 // chunks, "k_meta": 8, "v_meta": 32}
        g = let(lane // 4)
        self._token = {"k": g, "v": let(lane // chunks), "k_meta": g, "v_meta": lane}
        column = {
            "k": (lane % 4 * shape.slices + own.slice) * (4 * shape.key_plane_words),
            "v": lane % chunks * 16,
        }
        if shape.slices > 1:
            # Pairs of bits of other slices lie before the slice's own, and all before third bits.
            last = i32(shape.slices - 1)
            before = T.Select(lane % chunks < shape.value_chunks, own.slice, last)
            column["v"] = column["v"] + before * (16 * shape.value_chunks)
        self._address, self._row_stride = {}, {}
        token_rows, head_rows = pages.row_strides(spec)
        for name, argument in zip(width, matched, strict=True):
            size = 2 if name.endswith("meta") else 1
            stride = width[name] * token_rows
            first = head * (width[name] * head_rows)
            inside = self._token[name] % spec.page_size
            at = let(first + inside * stride + column.get(name, 0))
            if name == "v_meta":
                # The word around a meta: heads in pairs, or tokens, come with one another.
                at = T.bitwise_and(at, -2)
            self._address[name] = PageAddress(argument, at, size, lane)
            self._row_stride[name] = size * stride
        self._lane_index = lane
        if len(shape.key_planes) > 1:
            # The plane of the third bits: lanes that are two apart read the same bits.
            t, quarter = let(lane % 4), 4 * shape.key_plane_words * shape.slices
            third = T.cast(spec.head_dim // 4 + (t % 2 - t) * quarter, "uint64")
            self._third = held("uint64", third, lane)

    def odd_meta(self, head, own_token):
        """Whether V's meta of a token is the upper half of its word; all the lane's are alike."""
        token_rows, head_rows = pages.row_strides(self._shape.spec)
        return T.bitwise_and(head * head_rows + own_token * token_rows, 1) == 1

    def begin(self, sequence) -> None:
        """Go to a sequence's row of the table, before `find_pages`."""
        self._row.begin(self._table, sequence)

    def find_pages(self, tile, seq_len, low=None) -> None:
        """Look up the pages of a tile: ahead of its copies, whose addresses wait for them.

        Pages past the end read the last one, and those before position ``low`` the one that has it;
        the mask drops them.
        """
        last = T.shift_right(seq_len - 1, self._shape.spec.page_size.bit_length() - 1)
        for i in range(self._shape.pages):
            self._row.look_up(self.page, i, T.min(self._page(tile, i, low), last))

    def find_first_pages(self, sequence, tile, width, into, low=None) -> None:
        """Look up the pages of a tile that may not be there, before its sequence's length is known.

        Entries of the table past the end may be anything: who goes on asks for the length first,
        and then `keep_existing`.
        """
        for i in range(self._shape.pages):
            page = T.min(self._page(tile, i, low), width - 1)
            ptx("ld.global.nc.s32", into[i], self._table.ptr_to([sequence, page]))

    def keep_existing(self, tile, seq_len) -> None:
        """Of a tile's pages, put the first one, which exists, in place of those past the end."""
        size, first = self._shape.spec.page_size, tile * self._shape.config.tile
        for i in range(1, self._shape.pages):
            store(self.page, T.Select(first + i * size < seq_len, self.page[i], self.page[0]), i)

    def _page(self, tile, i: int, low):
        """Where in a sequence's row of the table page ``i`` of a tile is."""
        size = self._shape.spec.page_size
        page = T.truncdiv(tile * self._shape.config.tile, size) + i
        # A tile of one page has no other that begins before it.
        return page if low is None or self._shape.pages == 1 else T.max(page, T.truncdiv(low, size))

    def _bases(self, name: str, tile):
        """The lane's address in each page of a tile."""
        size, tokens = self._shape.spec.page_size, self._shape.config.tile
        bases = local(self._shape.pages, "uint64")
        for i in range(self._shape.pages):
            later = None
            if size > tokens:
                later = T.truncmod(tile, size // tokens) * (tokens * self._row_stride[name])
            store(bases, self._address[name].of(self.page[i], later), i)
        return bases

    def _from(self, name: str, bases, token: int, column: int = 0):
        """Address of a lane's token of a load or copy whose first one is ``token``."""
        size, span = self._shape.spec.page_size, self._span[name]
        page, offset = (token // size, token % size) if self._shape.pages > 1 else (0, token)
        base = bases[page]
        for other in range(1, span // size):
            # Small pages: lanes of one copy are in several.
            own = self._token[name] // size >= other
            base = T.Select(own, bases[page + other], base)
        at = base + T.uint64(offset * self._row_stride[name] + column)
        return as_pointer(at)

    def load_k(self, into: KeyTile, tile) -> None:
        """Read K's codes and metas; `find_pages` has been there."""
        shape = self._shape
        words = min(shape.key_plane_words, 4)
        codes, metas = self._bases("k", tile), self._bases("k_meta", tile)
        meta = "u32" if shape.residual else "u16"
        planes = [codes]
        # Third bits share sectors with pairs: kept in L1, 64 x 8192 took 161 us of 259 on an H100.
        kept = "" if len(shape.key_planes) > 1 else ".L1::no_allocate"
        if len(shape.key_planes) > 1:
            planes.append([let(codes[p] + self._third) for p in range(shape.pages)])
        for i in range(shape.octets):
            for plane, bases in enumerate(planes):
                for j in range(0, shape.key_plane_words, 4):
                    first = plane * shape.key_plane_words + j
                    access(
                        f"ld.global.nc{kept}{shape.promoted}",
                        [into.codes[i, first + e] for e in range(words)],
                        self._from("k", bases, 8 * i, 4 * j),
                    )
            # A norm and a residual in a word, or a norm alone.
            ptx(f"ld.global.nc.{meta}", into.metas[i], self._from("k_meta", metas, 8 * i))

    def copy_v(self, tile) -> None:
        """Begin to copy V's codes and metas; `find_pages` has been there."""
        shape, ring = self._shape, self._ring
        chunks, span = shape.sharing_lanes, self._span["v"]
        codes, metas = self._bases("v", tile), self._bases("v_meta", tile)

        def copy_codes() -> None:
            for token in range(0, shape.config.tile, span):
                source = self._from("v", codes, token)
                to = ring.copy_to(token)
                ptx(f"cp.async.cg.shared.global{shape.promoted}", to, source, 16)

        if shape.third_chunks:
            with when(self._lane_index % chunks < shape.value_chunks + shape.third_chunks):
                copy_codes()
        else:
            copy_codes()
        for token in range(0, shape.config.tile, 32):
            source = self._from("v_meta", metas, token)
            ptx("cp.async.ca.shared.global", ring.copy_meta_to(token), source, 4)
