"""Planes of a row's codes, in kernels that LLVM compiles: bytes of several codes, in blocks."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.formats import Codec
from tq_tvm.kernels.blocks import PARTS, Index

__all__ = ["Plane", "planes_of", "store_planes"]


class Plane:
    """One plane of a row's codes: ``bits`` of each from bit ``shift`` on, from byte ``first``.

    ``partial``: codes have other planes.
    """

    def __init__(
        self, number: int, bits: int, shift: int, first: int, head_dim: int, partial: bool
    ) -> None:
        self.suffix = str(number or "")
        self.bits, self.shift, self.first, self.partial = bits, shift, first, partial
        self.m_extent = head_dim // PARTS
        per_byte = 8 // bits
        # A byte of 1-bit codes has two values of each quarter: halves of a quarter are its columns.
        self.groups = max(PARTS // per_byte, 1)
        self.columns = self.m_extent // max(per_byte // PARTS, 1)
        self.fields = per_byte

    def _code(self, codes, m, g, i: int):
        """Field ``i`` of byte ``(g, m)``, without the bits of other planes."""
        if self.fields > PARTS:
            code = codes[m + i % 2 * self.columns, i // 2]
        else:
            code = codes[m, g + i * self.groups]
        if self.shift:
            code = T.shift_right(code, T.uint8(self.shift))
        elif self.partial:
            code = T.bitwise_and(code, T.uint8((1 << self.bits) - 1))
        return code

    def pack(self, prefix: str, codes):
        """Pack codes into bytes ``[groups, columns]``: block ``pack``."""
        out = I.sblock_alloc_buffer((self.groups, self.columns), "uint8")
        with (
            I.grid(self.groups, self.columns) as (g, m),
            I.sblock(f"{prefix}_pack{self.suffix}"),
        ):
            vg, vm = I.axis.remap("SS", [g, m])
            byte = self._code(codes, vm, vg, 0)
            for i in range(1, self.fields):
                byte = T.bitwise_or(
                    byte, T.shift_left(self._code(codes, vm, vg, i), T.uint8(i * self.bits))
                )
            I.buffer_store(out, byte, [vg, vm])
        return out

    def copy(self, prefix: str, packed, whole) -> None:
        """Copy packed bytes to their place in a whole row: block ``row``."""
        with (
            I.grid(self.groups, self.columns) as (g, m),
            I.sblock(f"{prefix}_row{self.suffix}"),
        ):
            vg, vm = I.axis.remap("SS", [g, m])
            I.buffer_store(whole, packed[vg, vm], [self._byte(vg, vm)])

    def store(self, prefix: str, packed, dst, index: Index, where) -> None:
        """Write packed bytes to a cache, if ``where`` holds: block ``store``."""
        with (
            I.grid(self.groups, self.columns) as (g, m),
            I.sblock(f"{prefix}_store{self.suffix}"),
        ):
            vg, vm = I.axis.remap("SS", [g, m])
            with I.If(where()), I.Then():
                I.buffer_store(dst, packed[vg, vm], index(self._byte(vg, vm)))

    def load(self, prefix: str, src, index: Index):
        """Read the bytes of a row: block ``load``."""
        packed = I.sblock_alloc_buffer((self.groups, self.columns), "uint8")
        with (
            I.grid(self.groups, self.columns) as (g, m),
            I.sblock(f"{prefix}_load{self.suffix}"),
        ):
            vg, vm = I.axis.remap("SS", [g, m])
            I.buffer_store(packed, src[tuple(index(self._byte(vg, vm)))], [vg, vm])
        return packed

    def _byte(self, g, m):
        byte = g * self.m_extent + m
        return byte + self.first if self.first else byte

    def field(self, packed, m, p):
        """Its part of the code of coordinate ``(m, p)``, int32."""
        if self.fields > PARTS:
            byte = T.cast(packed[0, m % self.columns], "int32")
            at = p * 2 + m // self.columns
        else:
            byte = T.cast(packed[p % self.groups, m], "int32")
            at = p // self.groups * self.bits
        field = T.bitwise_and(byte >> at, (1 << self.bits) - 1)
        return T.shift_left(field, T.int32(self.shift)) if self.shift else field


def store_planes(
    prefix: str, planes: list[Plane], codes, size: int, cache, index: Index, where
) -> None:
    """Put the planes of a row together and write them: blocks ``pack*``, ``row*`` and ``store``.

    A schedule takes a row for data parallel only if one block writes the cache.
    """
    whole = I.sblock_alloc_buffer((size,), "uint8")
    for plane in planes:
        plane.copy(prefix, plane.pack(prefix, codes), whole)
    with I.serial(0, size) as j, I.sblock(f"{prefix}_store"):
        vj = I.axis.spatial(size, j)
        with I.If(where()), I.Then():
            I.buffer_store(cache, whole[vj], index(vj))


def planes_of(codec: Codec, head_dim: int) -> list[Plane]:
    """Planes of the rows of a codec."""
    planes, shift, first = [], 0, 0
    partial = len(codec.plane_bits) > 1
    for number, bits in enumerate(codec.plane_bits):
        planes.append(Plane(number, bits, shift, first, head_dim, partial))
        shift, first = shift + bits, first + head_dim * bits // 8
    return planes
