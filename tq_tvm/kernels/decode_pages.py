"""Copying tokens of a packed cache to shared memory, and reading them, for ``decode_cuda``.

The threads of a CTA copy a step of tokens, a tile for each stream of warps, for all KV heads of the
CTA together: what lies side by side in a page is asked for at once, by neighbouring lanes. (Warps
that each read their own head, 64 and 32 bytes a token, got 2.7 TB/s on an H200, however many loads
they had in flight; whole lines get 3.8.) ``cp.async`` fills a ring of ``stages`` steps.

A step has a cell for every stream and KV head. Its words, for a tile of N tokens of D values::

    K codes   N D / 8     rows; at D = 256 their even and their odd 16 bytes apart
    V codes   N D / 16    planes of 16 bytes a token, padded apart: rows of ``ldmatrix``
    K metas   N           by octet within the eight tokens that a lane reads
    V metas   N           the aligned word around each, likewise

A lane is ``(g, t)``, g = lane / 4, t = lane % 4. Of token 8 i + g it reads a quarter of the codes
of K, ``t``'s; of tokens 8 i + 2 t and 8 i + 2 t + 1 bytes 2 g and 2 g + 1 of each 16 of V: the
fragments of ``mma`` as they are, K's tokens on the M side, V's on the K side.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels import pages
from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.device import barrier, byte_perm, i32, let, local, ptx, store, when

__all__ = ["Cell", "PageReader", "Ring", "value_bytes"]

_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


class Ring:
    """Where the stages of a CTA are: one is read, the others are being filled."""

    def __init__(self, shape: Shape, words) -> None:
        self._shape, self.words = shape, words
        self.read, self.filled = local(1, "int32"), local(1, "int32")
        self.rewind()

    def rewind(self) -> None:
        """Begin at the first stage; all copies are done."""
        store(self.read, i32(0))
        store(self.filled, i32(0))

    def _advance(self, stage) -> None:
        last = (self._shape.config.stages - 1) * self._shape.step_words
        following = T.Select(stage[0] == last, i32(0), stage[0] + self._shape.step_words)
        store(stage, following)

    def close(self) -> None:
        """All copies of a step, or none, are under way."""
        ptx("cp.async.commit_group")
        self._advance(self.filled)

    def wait(self) -> None:
        """Wait for the step that is read next; the one before has been read by all threads."""
        ptx("cp.async.wait_group", self._shape.config.stages - 2)
        barrier()

    def leave(self) -> None:
        """Go on to the next step."""
        self._advance(self.read)


class Cell:
    """What one warp reads of a step: a tile of its stream and KV head."""

    def __init__(self, shape: Shape, ring: Ring, stream, head, lane) -> None:
        self._shape, self._ring = shape, ring
        self._lane, self._g, self._t = lane, let(lane // 4), let(lane % 4)
        self._first = let((stream * shape.kv_heads + head) * shape.cell_words)

    def _words(self, into, index: tuple, at, count: int) -> None:
        """Read neighbouring words."""
        words, first = self._ring.words, self._ring.read[0] + self._first + at
        if count == 1:
            store(into, words[first], *index)
            return
        with I.vectorized(0, count) as e:
            store(into, words[first + e], *index[:-1], index[-1] + e)

    def key_codes(self, into, row: int, octet: int) -> None:
        """A lane's words of K of an octet, into ``into[row]``."""
        count = self._shape.key_words
        width = min(count, 4)
        for half in range(count // width):
            at = half * (16 * self._shape.config.tile) + octet * 32 * width + self._lane * width
            self._words(into, (row, half * width), at, width)

    def key_metas(self, into) -> None:
        """K's metas of token g of every octet."""
        self._metas(into, self._shape.octets, self._shape.key_meta_at, self._g)

    def value_metas(self, into, own_token) -> None:
        """Words that hold V's metas of the lane's own tokens."""
        self._metas(into, self._shape.own_tokens, self._shape.value_meta_at, own_token)

    def _metas(self, into, count: int, at: int, place) -> None:
        width = min(count, 4)
        for j in range(0, count, width):
            self._words(into, (j,), at + place * count + j, width)

    def value_rows(self, step: int):
        """V of 32 tokens: bytes 2 g, 2 g + 1 of two tokens, ``[chunk of 16 bytes, octet]``."""
        shape, ring = self._shape, self._ring
        rows = local((shape.value_chunks, 4), "uint32")
        for chunk in range(shape.value_chunks):
            at = shape.value_at + chunk * shape.value_plane + 128 * step + 4 * self._lane
            pointer = ring.words.ptr_to([ring.read[0] + self._first + at])
            ptx(_TRANSPOSED, *[rows[chunk, i] for i in range(4)], pointer)
        return rows


def value_bytes(shape: Shape, rows):
    """Bytes of V ``[half, byte]``, four tokens in a word: half 0 has the even octets."""
    words = local((2, shape.value_bytes), "uint32")
    for chunk in range(shape.value_chunks):
        for half in range(2):
            for byte, selector in enumerate((0x6420, 0x7531)):
                word = byte_perm(rows[chunk, half], rows[chunk, half + 2], selector)
                store(words, word, half, 2 * chunk + byte)
    return words


@dataclasses.dataclass(frozen=True)
class _Plane:
    """One of the four tensors, as a thread copies it: in every pass a piece of one token.

    ``span`` tokens of the step are in a pass, ``token`` is the thread's. ``at`` is its place inside
    of a page but for tokens, in elements, and ``to`` its word in the step. ``pages`` are the
    thread's own where a pass is longer than what all its threads have in one page.
    """

    name: str
    bytes: int
    span: int
    token: Any
    at: Any
    to: Any
    row: int
    flat: Any
    page_stride: Any
    pages: Any


class PageReader:
    """One thread's share of the copies of every step.

    One multiplication a page and tensor: everything inside a page is a constant offset, or belongs
    to the thread. Page strides have to fit 31 bits, in elements.
    """

    def __init__(self, shape: Shape, matched, block_table, first_head, thread, ring: Ring) -> None:
        self._shape, self._ring, self._table = shape, ring, block_table
        spec, fmt = shape.spec, shape.spec.cache_format
        self._first_head = first_head
        widths = {
            "k": (fmt.key.packed_bytes(spec.head_dim), shape.key_words),
            "v": (fmt.value.packed_bytes(spec.head_dim), shape.value_chunks),
            "k_meta": (len(fmt.key.meta), 1),
            "v_meta": (len(fmt.value.meta), 1),
        }
        # A tile may begin anywhere in a page; of these tokens all are in the same one.
        self._together = min(shape.config.tile, spec.page_size)
        self._pages = local(shape.step_tokens // self._together, "int32")
        self._planes = [
            self._plane(name, width, count, argument, thread)
            for (name, (width, count)), argument in zip(widths.items(), matched, strict=True)
        ]

    def _plane(self, name: str, width: int, chunks: int, argument, thread) -> _Plane:
        shape, spec = self._shape, self._shape.spec
        heads, size = shape.kv_heads, spec.page_size
        bshd = spec.layout == "bshd"
        # Neighbouring threads copy neighbouring bytes.
        if bshd:
            token, head = thread // (heads * chunks), thread // chunks % heads
        else:
            own = shape.threads // heads
            token, head = thread % own // chunks, thread // own
        token, head, chunk = let(token), let(head), let(thread % chunks)
        row = width * (spec.num_kv_heads if bshd else 1)
        page_head = (self._first_head + head) * (width if bshd else width * size)
        span = shape.threads // (heads * chunks)
        at = page_head + chunk * (width // chunks)
        if span <= self._together:
            at = at + token * row
        tile = shape.config.tile
        stream, inside = token // tile, token % tile
        cell = (stream * heads + head) * shape.cell_words
        if name == "k":
            place = inside * (4 * min(chunks, 4)) + chunk * 4
            if chunks == 8:
                place = chunk % 2 * (16 * tile) + inside * 16 + chunk // 2 * 4
        elif name == "v":
            place = shape.value_at + chunk * shape.value_plane + inside * 4
        else:
            apart, count = (8, shape.octets) if name == "k_meta" else shape.own_order
            begin = shape.key_meta_at if name == "k_meta" else shape.value_meta_at
            place = begin + inside % apart * count + inside // apart
        stride = local(1, "int32")
        store(stride, T.cast(argument.strides[0], "int32"))
        looked_up = self._pages
        if span > self._together:
            looked_up = local(max(1, shape.step_tokens // span), "int32")
        return _Plane(
            name, 4 if name.endswith("meta") else 16, span, token, let(at), let(cell + place), row,
            pages.flat(argument), stride, looked_up,
        )  # fmt: skip

    def odd_meta(self, head, own_token):
        """Whether V's meta of a token is the upper half of its word; all the lane's are alike."""
        spec = self._shape.spec
        bshd = spec.layout == "bshd"
        first = head if bshd else head * spec.page_size
        stride = spec.num_kv_heads if bshd else 1
        return T.bitwise_and(first + own_token * stride, 1) == 1

    def find_pages(self, sequence, tile, seq_len) -> None:
        """Look up the pages of a step: ahead of its copies, whose addresses wait for them."""
        size = self._shape.spec.page_size
        first = let(tile * self._shape.config.tile)
        last = let(T.truncdiv(seq_len - 1, size))

        def page(token):
            # Pages past the end read the last one; the mask drops them.
            return self._table[sequence, T.min(T.truncdiv(token, size), last)]

        if any(plane.span <= self._together for plane in self._planes):
            for i in range(self._shape.step_tokens // self._together):
                store(self._pages, page(first + i * self._together), i)
        for plane in self._planes:
            if plane.span > self._together:
                for n in range(max(1, self._shape.step_tokens // plane.span)):
                    store(plane.pages, page(first + plane.token + n * plane.span), n)

    def copy(self, tile) -> None:
        """Begin to copy a step; `find_pages` has been there."""
        for plane in self._planes:
            if plane.span > self._shape.step_tokens:
                with when(plane.token < self._shape.step_tokens):
                    self._copy(plane, tile)
            else:
                self._copy(plane, tile)

    def _copy(self, plane: _Plane, tile) -> None:
        shape, size = self._shape, self._shape.spec.page_size
        passes = max(1, shape.step_tokens // plane.span)
        stride = T.cast(plane.page_stride[0], "int64")
        first = tile * shape.config.tile
        cached = "cg" if plane.bytes == 16 else "ca"
        bases: dict[int, Any] = {}
        for n in range(passes):
            token = n * plane.span
            apart = plane.span > self._together
            page, offset = (n, 0) if apart else divmod(token, self._together)
            if page not in bases:
                at = T.cast(plane.pages[page], "int64") * stride + T.cast(plane.at, "int64")
                if apart:
                    at = (
                        at
                        + T.cast(T.truncmod(first + plane.token + token, size), "int64") * plane.row
                    )
                elif size > self._together:
                    inside = T.truncmod(first + page * self._together, size) * plane.row
                    at = at + T.cast(inside, "int64")
                if plane.name == "v_meta":
                    # The word around a meta: heads in pairs, or tokens, come with one another.
                    at = T.bitwise_and(at, T.int64(-2))
                bases[page] = let(at)
            source = plane.flat.ptr_to([bases[page] + T.int64(offset * plane.row)])
            to = self._ring.filled[0] + plane.to + self._moved(plane, token)
            pointer = self._ring.words.ptr_to([to])
            ptx(f"cp.async.{cached}.shared.global", pointer, source, plane.bytes)

    def _moved(self, plane: _Plane, token: int) -> int:
        """Words from the thread's token of the first pass to that of the pass from ``token`` on."""
        shape, tile = self._shape, self._shape.config.tile
        inside = token % tile
        cell = token // tile * shape.kv_heads * shape.cell_words
        if plane.name == "k":
            return cell + inside * min(4 * shape.key_words, 16)
        if plane.name == "v":
            return cell + inside * 4
        return cell + inside // (8 if plane.name == "k_meta" else shape.own_order[0])
