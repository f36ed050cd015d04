"""Addresses that a lane of a GPU kernel keeps in registers while it goes from page to page.

What is worked out once: the row of a sequence in the table, and where the lane's element would be
in page 0 of a tensor. A page then takes one product of 32 bits, by instruction: as a product of 64
bits it would be four.
"""

from __future__ import annotations

from tvm.script import tirx as T

from tq_tvm.kernels import pages
from tq_tvm.kernels.device import held, let, local, ptx, shared_address, store, u32, wide_product

__all__ = ["PageAddress", "TableRow", "as_pointer"]


def as_pointer(address):
    """What an instruction takes for an address in 64 bits."""
    return T.reinterpret("handle", address)


class TableRow:
    """The row of a sequence in a page table.

    ``own_word`` points to a word of shared memory that differs from lane to lane, where the
    sequence is known to be the same in all of them: pages would go to uniform registers as soon as
    they come, which waits for them there and then. Its address has a zero that is not known to be
    one.
    """

    def __init__(self, own_word=None) -> None:
        self._row = local(1, "uint64")
        self._zero = None
        if own_word is not None:
            self._zero = let(T.shift_right(shared_address(own_word), u32(31)))

    def begin(self, table, sequence) -> None:
        """Go to the row of a sequence."""
        row = T.reinterpret("uint64", table.ptr_to([sequence, 0]))
        store(self._row, row if self._zero is None else row + T.cast(self._zero, "uint64"))

    def look_up(self, into, index: int, number) -> None:
        """Read the ``number``-th page of the sequence to ``into[index]``."""
        address = self._row[0] + T.cast(number, "uint64") * T.uint64(4)
        ptx("ld.global.nc.s32", into[index], as_pointer(address))


class PageAddress:
    """Where a lane's element of a cache tensor is in every page.

    ``element`` is its number in page 0, of ``size`` bytes each. Page strides have to fit 31 bits,
    in elements.
    """

    def __init__(self, matched, element, size: int, lane) -> None:
        first, self._stride = local(1, "int32"), local(1, "uint32")
        store(first, element)
        store(self._stride, T.cast(matched.buffer.strides[0] * size, "uint32"))
        address = pages.flat(matched).ptr_to([T.cast(first[0], "int64")])
        self._first = held("uint64", T.reinterpret("uint64", address), lane)

    def of(self, page, later=None):
        """The address in a page, so many bytes later."""
        address = self._first + wide_product(page, self._stride[0])
        return address if later is None else address + T.cast(later, "uint64")
