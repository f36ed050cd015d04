"""Reading tiles of a packed cache into registers, for ``decode_planes``.

A lane is ``(g, t)``, g = lane / 4, t = lane % 4. Of token 8 i + g it holds a quarter of the codes
of K, ``t``'s; of tokens 8 i + 2 t and 8 i + 2 t + 1 it holds an eighth of the codes of V, ``g``'s:
the fragments of ``mma`` as they are, K's tokens on the M side, V's on the K side.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels import pages
from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.device import local, ptx, store

__all__ = ["PageReader", "Tile"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Registers of a tile: codes, and metas of K by octet and of V by own token."""

    k: Any
    k_meta: Any
    v: Any
    v_meta: Any

    @classmethod
    def allocate(cls, shape: Shape) -> Tile:
        """Registers for one tile."""
        words = max(1, shape.value_bytes // 4)
        return cls(
            k=local((shape.octets, shape.key_words), "uint32"),
            k_meta=local(shape.octets, "uint32"),
            v=local((shape.octets, 2, words), "uint32" if shape.value_bytes >= 4 else "uint16"),
            v_meta=local(shape.own_tokens, "uint16"),
        )


class PageReader:
    """Addresses of one lane in the four cache tensors.

    One multiplication a page and tensor: everything inside a page is a constant offset, or belongs
    to the lane. Page strides have to fit 31 bits, in elements.
    """

    _NAMES = ("k", "v", "k_meta", "v_meta")

    def __init__(self, shape: Shape, matched, block_table, head, g, t) -> None:
        spec = shape.spec
        self._shape = shape
        self._table = block_table
        self.page = local(shape.pages, "int32")
        fmt = spec.cache_format
        width = dict(
            zip(
                self._NAMES,
                (
                    fmt.key.packed_bytes(spec.head_dim),
                    fmt.value.packed_bytes(spec.head_dim),
                    len(fmt.key.meta),
                    len(fmt.value.meta),
                ),
                strict=True,
            )
        )
        own_token = g + 8 * (t // 2) if shape.packed else g
        row = {"k": g, "v": 2 * t, "k_meta": g, "v_meta": own_token}
        column = {"k": t * (4 * shape.key_words), "v": g * shape.value_bytes}
        self._flat, self._lane, self._page_stride, self._row_stride = {}, {}, {}, {}
        for name, argument in zip(self._NAMES, matched, strict=True):
            self._flat[name] = pages.flat(argument)
            bshd = spec.layout == "bshd"
            stride = width[name] * spec.num_kv_heads if bshd else width[name]
            first = head * (width[name] if bshd else width[name] * spec.page_size)
            self._row_stride[name] = stride
            self._lane[name] = local(1, "int64")
            store(
                self._lane[name],
                T.cast(first + row[name] * stride + column.get(name, 0), "int64"),
            )
            self._page_stride[name] = local(1, "int32")
            store(self._page_stride[name], T.cast(argument.strides[0], "int32"))

    def find_pages(self, sequence, tile, seq_len) -> None:
        """Look up the pages of a tile: ahead of `load_k`, whose addresses wait for them."""
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

    def _at(self, name: str, base, token: int, column: int = 0):
        size = self._shape.spec.page_size
        page, offset = (token // size, token % size) if self._shape.pages > 1 else (0, token)
        at = base[page] + T.int64(offset * self._row_stride[name] + column)
        return self._flat[name].ptr_to([at])

    def load_k(self, into: Tile, tile) -> None:
        """Read K's codes and metas; `find_pages` has been there."""
        words = min(self._shape.key_words, 4)
        codes, metas = self._bases("k", tile), self._bases("k_meta", tile)
        for i in range(self._shape.octets):
            for j in range(0, self._shape.key_words, 4):
                ptx(
                    f"ld.global.nc.L1::no_allocate.v{words}.u32",
                    *[into.k[i, j + e] for e in range(words)],
                    self._at("k", codes, 8 * i, 4 * j),
                )
            ptx("ld.global.nc.u32", into.k_meta[i], self._at("k_meta", metas, 8 * i))

    def load_v(self, into: Tile, tile) -> None:
        """Read V's codes and metas; `find_pages` has been there."""
        shape = self._shape
        kind = {2: "u16", 4: "u32", 8: "v2.u32"}[shape.value_bytes]
        codes, metas = self._bases("v", tile), self._bases("v_meta", tile)
        for i in range(shape.octets):
            for e in range(2):
                words = [into.v[i, e, k] for k in range(max(1, shape.value_bytes // 4))]
                ptx(f"ld.global.nc.{kind}", *words, self._at("v", codes, 8 * i + e))
        for n in range(shape.own_tokens):
            token = 16 * n if shape.packed else 8 * n
            ptx("ld.global.nc.u16", into.v_meta[n], self._at("v_meta", metas, token))
