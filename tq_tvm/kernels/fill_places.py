"""Where ``fill`` on GPUs puts a token: a slot that the caller names, or one by a block table."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels import device, pages
from tq_tvm.kernels.device import i32, let, local, loop, store, when
from tq_tvm.spec import CacheSpec

__all__ = [
    "FillArguments",
    "GivenSlots",
    "TableSlots",
    "fill_arguments",
    "ring_place",
    "wide_product",
]


@dataclasses.dataclass(frozen=True)
class FillArguments:
    """Flat views of the arguments, and strides in elements, which have to fit 31 bits.

    Metas are those of codecs that have some; scales are of whole tensors. Rings are those of a
    window.
    """

    rows: dict[str, Any]
    row_stride: dict[str, Any]
    codes: dict[str, Any]
    metas: dict[str, Any]
    code_stride: dict[str, Any]
    meta_stride: dict[str, Any]
    scales: dict[str, Any]
    rings: dict[str, Any]


def fill_arguments(
    spec: CacheSpec, k_rows, v_rows, caches, rings: pages.Rings | None
) -> FillArguments:
    """Views of the arguments of one function."""
    k_cache, v_cache, k_meta, v_meta = caches
    codecs = {"k": spec.cache_format.key, "v": spec.cache_format.value}
    given = {"k": k_meta, "v": v_meta}
    metas = {name: given[name] for name, codec in codecs.items() if codec.meta}
    scaled = [name for name, codec in codecs.items() if codec.tensor_scale]

    ringed = {} if rings is None else {"k": rings.k, "v": rings.v}

    def stride(argument):
        register = local(1, "int32")
        store(register, T.cast(argument.strides[0], "int32"))
        return register[0]

    return FillArguments(
        rows={"k": pages.flat(k_rows), "v": pages.flat(v_rows)},
        row_stride={"k": stride(k_rows), "v": stride(v_rows)},
        codes={"k": pages.flat(k_cache), "v": pages.flat(v_cache)},
        metas={name: pages.flat(meta) for name, meta in metas.items()},
        code_stride={"k": stride(k_cache), "v": stride(v_cache)},
        meta_stride={name: stride(meta) for name, meta in metas.items()},
        scales={name: let(given[name].buffer[0]) for name in scaled},
        rings={name: pages.flat_buffer(ring) for name, ring in ringed.items()},
    )


def wide_product(a, b):
    """`device.wide_product` as an index."""
    return T.cast(device.wide_product(a, b), "int64")


def ring_place(spec: CacheSpec, slots: TableSlots, token, head, dim: int):
    """First element of a row of ``dim`` values in the rings of one side."""
    row = wide_product(slots.ring_row(token), i32(spec.num_kv_heads * dim))
    return row + T.cast(head * dim, "int64")


class GivenSlots:
    """Slots that the caller names, negative for nowhere."""

    def __init__(self, spec: CacheSpec, slot_mapping) -> None:
        self._size, self._slots = spec.page_size, slot_mapping

    def start(self, token) -> None:
        """Nothing to look for."""

    def find(self, token):
        """Page and offset of a token, and whether it is stored."""
        slot = let(self._slots[token])
        page = let(T.cast(T.shift_right(slot, T.int64(self._size.bit_length() - 1)), "int32"))
        return page, let(T.cast(slot, "int32") & (self._size - 1)), let(slot >= T.int64(0))


class TableSlots:
    """Slots of tokens in turn: what changes with the sequence or the page is kept until it does.

    ``rings`` are of a spec with a window.
    """

    def __init__(
        self, spec: CacheSpec, table, lens, starts, batch, rings: pages.Rings | None
    ) -> None:
        self._size, self._table, self._lens, self._starts = spec.page_size, table, lens, starts
        self._window, self._rings = spec.window, rings
        self._batch = T.cast(batch, "int32")
        self._sequence, self._next, self._shift, self._row, self._page, self._end = (
            local(1, "int32") for _ in range(6)
        )

    def start(self, token) -> None:
        """Find the sequence of the first token."""
        store(self._end, self._starts[self._batch])
        store(self._sequence, i32(0))
        pages.find_last_start(self._sequence, self._starts, self._batch, token)
        self._enter()

    def _enter(self) -> None:
        sequence, following = self._sequence[0], self._next
        store(following, self._starts[sequence + 1])
        store(self._shift, self._lens[sequence] - following[0])
        store(self._row, i32(-1))
        # Tokens past the last sequence are left with it.
        with when(sequence + 1 == self._batch):
            store(following, i32(2**31 - 1))

    def find(self, token):
        """Page and offset of a token, and whether it is stored; tokens come in order."""
        with loop(token >= self._next[0]):
            store(self._sequence, self._sequence[0] + 1)
            self._enter()
        position = let(self._shift[0] + token)
        stored = let(T.And(position >= 0, token < self._end[0]))
        row = let(T.shift_right(position, self._size.bit_length() - 1))
        with when(T.And(stored, row != self._row[0])):
            store(self._row, row)
            store(self._page, self._table[self._sequence[0], row])
        return self._page[0], let(T.bitwise_and(position, self._size - 1)), stored

    def is_newest(self, token):
        """Whether a token that was found is in the window of its sequence."""
        return self._shift[0] + token >= self._lens[self._sequence[0]] - self._window

    def ring_row(self, token):
        """Row of its ring that it goes to, among those of all rings."""
        inside = T.truncmod(self._shift[0] + token, self._window)
        return self._rings.slots[self._sequence[0]] * self._window + inside
