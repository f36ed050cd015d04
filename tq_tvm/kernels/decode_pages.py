"""Copying tiles of a packed cache to shared memory, and reading them, for ``decode_planes``.

Every warp has a ring of ``stages`` tiles of its own, which ``cp.async`` fills: loads to registers
would share few scoreboards, so that waiting for the oldest is waiting for the newest. Words of a
stage, for N tokens of D values::

    K codes   N D / 8     a lane's share of each octet of tokens: what it copies, it reads
    V codes   N D / 16    planes of 16 bytes a token, padded apart: rows of ``ldmatrix``
    K metas   N           by octet within the eight tokens that a lane reads
    V metas   N           the aligned word around each, likewise

A lane is ``(g, t)``, g = lane / 4, t = lane % 4. Of token 8 i + g it reads a quarter of the codes
of K, ``t``'s; of tokens 8 i + 2 t and 8 i + 2 t + 1 bytes 2 g and 2 g + 1 of each 16 of V: the
fragments of ``mma`` as they are, K's tokens on the M side, V's on the K side.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels import pages
from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.device import byte_perm, let, local, ptx, shared_dynamic, store, sync_warp

__all__ = ["PageReader", "Ring"]

_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


class Ring:
    """A warp's tiles in shared memory; copies are counted in groups, K's and V's in turn."""

    def __init__(self, shape: Shape, warp, lane, g, t) -> None:
        self._shape, self._lane, self._g, self._t = shape, lane, g, t
        warps = shape.config.warps * shape.abreast
        self.words = shared_dynamic(warps * shape.config.stages * shape.stage_words, "uint32")
        self._begin = let(warp * (shape.config.stages * shape.stage_words))
        self._stage = local(1, "int32")
        self.rewind()

    def rewind(self) -> None:
        """Go to the first stage."""
        store(self._stage, self._begin)

    def advance(self) -> None:
        """Go to the next stage."""
        stages, words = self._shape.config.stages, self._shape.stage_words
        if stages > 1:
            last = self._stage[0] == self._begin + (stages - 1) * words
            store(self._stage, T.Select(last, self._begin, self._stage[0] + words))

    def at(self, word):
        """Pointer to a word of the stage."""
        return self.words.ptr_to([self._stage[0] + word])

    def close_group(self) -> None:
        """End a group of copies, which may be empty."""
        ptx("cp.async.commit_group")

    def wait(self) -> None:
        """Wait for the oldest group; of each stage two are on their way."""
        ptx("cp.async.wait_group", 2 * self._shape.config.stages - 1)
        sync_warp()

    def _load(self, into, index: tuple, count: int, first) -> None:
        """Read neighbouring words."""
        width = min(count, 4)
        for j in range(0, count, width):
            if width == 1:
                store(into, self.words[self._stage[0] + first + j], *index, j)
            else:
                with I.vectorized(0, width) as e:
                    store(into, self.words[self._stage[0] + first + j + e], *index, j + e)

    def key_codes(self, into, index: tuple, octet: int) -> None:
        """A lane's words of K of an octet."""
        count = self._shape.key_words
        width = min(count, 4)
        for j in range(count // width):
            first = (octet * (count // width) + j) * (32 * width) + self._lane * width
            with I.vectorized(0, width) as e:
                word = self.words[self._stage[0] + first + e]
                store(into, word, *index, j * width + e)

    def key_metas(self, into) -> None:
        """K's metas of token g of every octet."""
        count = self._shape.octets
        self._load(into, (), count, self._shape.key_meta_at + self._g * count)

    def value_metas(self, into, own_token) -> None:
        """Words that hold V's metas of the lane's own tokens."""
        count = self._shape.own_tokens
        self._load(into, (), count, self._shape.value_meta_at + own_token * count)

    def value_codes(self, step: int):
        """Bytes of V of 32 tokens: ``[half, byte]``, four tokens in a word.

        Of the octets of a step, half 0 has the even ones and half 1 the odd ones.
        """
        shape = self._shape
        rows, words = local(4, "uint32"), local((2, shape.value_bytes), "uint32")
        for chunk in range(shape.value_chunks):
            first = shape.value_at + chunk * shape.value_plane + 128 * step
            ptx(_TRANSPOSED, *[rows[i] for i in range(4)], self.at(first + 4 * self._lane))
            for half in range(2):
                for byte, selector in enumerate((0x6420, 0x7531)):
                    word = byte_perm(rows[half], rows[half + 2], selector)
                    store(words, word, half, 2 * chunk + byte)
        return words


class PageReader:
    """Addresses of one lane in the four cache tensors, and its share of every copy.

    One multiplication a page and tensor: everything inside a page is a constant offset, or belongs
    to the lane. Page strides have to fit 31 bits, in elements.
    """

    _NAMES = ("k", "v", "k_meta", "v_meta")

    def __init__(self, shape: Shape, matched, block_table, head, lane, ring: Ring) -> None:
        spec = shape.spec
        self._shape, self._ring, self._table = shape, ring, block_table
        self.page = local(shape.pages, "int32")
        fmt = spec.cache_format
        width = {
            "k": fmt.key.packed_bytes(spec.head_dim),
            "v": fmt.value.packed_bytes(spec.head_dim),
            "k_meta": len(fmt.key.meta),
            "v_meta": len(fmt.value.meta),
        }
        chunks = shape.value_chunks
        # Tokens of a copy that lanes differ in, and which of them is a lane's.
        self._span = {"k": 8, "v": 32 // chunks, "k_meta": 32, "v_meta": 32}
        self._token = {"k": let(lane // 4), "v": let(lane // chunks)}
        self._token["k_meta"] = self._token["v_meta"] = lane
        column = {"k": lane % 4 * (4 * shape.key_words), "v": lane % chunks * 16}
        self._flat, self._lane, self._page_stride, self._row_stride = {}, {}, {}, {}
        for name, argument in zip(self._NAMES, matched, strict=True):
            self._flat[name] = pages.flat(argument)
            bshd = spec.layout == "bshd"
            stride = width[name] * spec.num_kv_heads if bshd else width[name]
            first = head * (width[name] if bshd else width[name] * spec.page_size)
            self._row_stride[name] = stride
            inside = self._token[name] % spec.page_size
            at = let(first + inside * stride + column.get(name, 0))
            if name == "v_meta":
                # The word around a meta: heads in pairs, or tokens, come with one another.
                at = T.bitwise_and(at, -2)
            self._lane[name] = local(1, "int64")
            store(self._lane[name], T.cast(at, "int64"))
            self._page_stride[name] = local(1, "int32")
            store(self._page_stride[name], T.cast(argument.strides[0], "int32"))
        self._lane_index = lane

    def odd_meta(self, head, own_token):
        """Whether V's meta of a token is the upper half of its word; all the lane's are alike."""
        spec = self._shape.spec
        stride = self._row_stride["v_meta"]
        first = head if spec.layout == "bshd" else head * spec.page_size
        return T.bitwise_and(first + own_token * stride, 1) == 1

    def find_pages(self, sequence, tile, seq_len) -> None:
        """Look up the pages of a tile: ahead of its copies, whose addresses wait for them."""
        size = self._shape.spec.page_size
        first = T.truncdiv(tile * self._shape.config.tile, size)
        last = T.truncdiv(seq_len - 1, size)
        for i in range(self._shape.pages):
            # Pages past the end read the last one; the mask drops them.
            store(self.page, self._table[sequence, T.min(first + i, last)], i)

    def _bases(self, name: str, tile):
        size, tokens = self._shape.spec.page_size, self._shape.config.tile
        stride = T.cast(self._page_stride[name][0], "int64")
        base = local(self._shape.pages, "int64")
        for i in range(self._shape.pages):
            at = T.cast(self.page[i], "int64") * stride + self._lane[name][0]
            if size > tokens:
                inside = T.truncmod(tile, size // tokens) * (tokens * self._row_stride[name])
                at = at + T.cast(inside, "int64")
            store(base, at, i)
        return base

    def _from(self, name: str, bases, token: int, column: int = 0):
        """Pointer to a lane's token of a copy whose first one is ``token``."""
        size, span = self._shape.spec.page_size, self._span[name]
        page, offset = (token // size, token % size) if self._shape.pages > 1 else (0, token)
        base = bases[page]
        for other in range(1, span // size):
            # Small pages: lanes of one copy are in several.
            own = self._token[name] // size >= other
            base = T.Select(own, bases[page + other], base)
        at = base + T.int64(offset * self._row_stride[name] + column)
        return self._flat[name].ptr_to([at])

    def copy_k(self, tile) -> None:
        """Begin to copy K's codes and metas; `find_pages` has been there."""
        shape, ring, lane = self._shape, self._ring, self._lane_index
        width = min(shape.key_words, 4)
        chunks = shape.key_words // width
        cached = "cg" if width == 4 else "ca"
        codes, metas = self._bases("k", tile), self._bases("k_meta", tile)
        for i in range(shape.octets):
            for j in range(chunks):
                ptx(
                    f"cp.async.{cached}.shared.global",
                    ring.at((i * chunks + j) * (32 * width) + lane * width),
                    self._from("k", codes, 8 * i, 16 * j),
                    4 * width,
                )
        to = let(shape.key_meta_at + lane % 8 * shape.octets + lane // 8)
        for n in range(shape.config.tile // 32):
            source = self._from("k_meta", metas, 32 * n)
            ptx("cp.async.ca.shared.global", ring.at(to + 4 * n), source, 4)
        ring.close_group()

    def copy_v(self, tile) -> None:
        """Begin to copy V's codes and metas; `find_pages` has been there."""
        shape, ring, lane = self._shape, self._ring, self._lane_index
        chunks, span = shape.value_chunks, self._span["v"]
        codes, metas = self._bases("v", tile), self._bases("v_meta", tile)
        to = let(shape.value_at + lane % chunks * shape.value_plane + self._token["v"] * 4)
        for n in range(shape.config.tile // span):
            source = self._from("v", codes, span * n)
            ptx("cp.async.cg.shared.global", ring.at(to + 4 * span * n), source, 16)
        apart = 16 if shape.packed else 8
        to = let(shape.value_meta_at + lane % apart * shape.own_tokens + lane // apart)
        for n in range(shape.config.tile // 32):
            source = self._from("v_meta", metas, 32 * n)
            ptx("cp.async.ca.shared.global", ring.at(to + 32 // apart * n), source, 4)
        ring.close_group()
