"""Cache tensors and a window's rings as kernel arguments, and where a token's rows are in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels.device import let, local, loop, store
from tq_tvm.spec import CacheSpec

__all__ = [
    "Caches",
    "Rings",
    "Strided",
    "advance_start",
    "find_last_start",
    "flat",
    "flat_buffer",
    "jit",
    "match_caches",
    "match_rings",
    "match_rows",
    "matched_buffer",
    "page_row",
    "page_slot",
    "row_index",
    "row_strides",
    "slot_row",
    "store_slot",
    "token_place",
    "token_row",
    "view_caches",
    "whole",
]


@dataclasses.dataclass(frozen=True)
class Caches:
    """The matched buffers of ``k_cache``, ``v_cache``, ``k_meta`` and ``v_meta``.

    In the place of metas that a codec has not: the tensor's scale, or None.
    """

    k_cache: Any
    v_cache: Any
    k_meta: Any
    v_meta: Any

    def regions(self) -> list:
        """All four as whole regions, for a block whose page indices are data."""
        buffers = (self.k_cache, self.v_cache, self.k_meta, self.v_meta)
        return [whole(b) for b in buffers if b is not None]

    def written(self, spec: CacheSpec) -> list:
        """Those that ``fill`` writes, as whole regions."""
        fmt = spec.cache_format
        metas = ((fmt.key, self.k_meta), (fmt.value, self.v_meta))
        caches = [self.k_cache, self.v_cache]
        return [whole(b) for b in caches + [m for codec, m in metas if codec.meta]]

    def tensor_scales(self, spec: CacheSpec) -> list:
        """Scales of whole tensors, as regions."""
        fmt = spec.cache_format
        metas = ((fmt.key, self.k_meta), (fmt.value, self.v_meta))
        return [whole(b) for codec, b in metas if codec.tensor_scale]


def whole(buffer):
    """The region that covers all of ``buffer``."""
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


@dataclasses.dataclass(frozen=True)
class Strided:
    """A matched argument with free strides, waiting to be viewed with strides of known alignment.

    TVM splits a vector access whose address it cannot prove aligned, and knows nothing of a free
    stride; the view's strides say what the caller guarantees. All arguments have to be matched
    before the first view is declared.
    """

    buffer: Any
    strides: list

    def view(self):
        """Declare the view."""
        matched = self.buffer
        return T.decl_buffer(
            matched.shape,
            matched.dtype,
            data=matched.data,
            strides=self.strides,
            align=matched.data_alignment,
        )


def _strided(handle, shape: tuple, dtype: str, strides: list, align: int, unit: int) -> Strided:
    """Match a handle whose strides are variables or constants; variables are multiples of unit."""
    known = [s if isinstance(s, int) else s // unit * unit for s in strides]
    buffer = T.match_buffer(handle, shape, dtype, strides=strides, align=align)
    return Strided(buffer, known)


def match_caches(spec: CacheSpec, handles: tuple, pages) -> list[Strided | None]:
    """Match the cache handles: any page stride, compact inside a page.

    Compact pages turn every address inside a page into one base and constants; a free page stride
    admits views of one page buffer. In the place of scales of rows a codec with one scale for its
    tensor has that, float32 ``[1]``; the handle of a codec without any stays unmatched.
    """
    fmt = spec.cache_format
    codecs = (fmt.key, fmt.value)
    matched: list[Strided | None] = []
    for number, (handle, (shape, dtype)) in enumerate(
        zip(handles, spec.tensor_shapes(1).values(), strict=True)
    ):
        _, outer, inner, last = shape
        if last == 0:
            scaled = codecs[number % 2].tensor_scale
            matched.append(_strided(handle, (1,), "float32", [1], 4, 1) if scaled else None)
            continue
        # Rows of codes are read 16 bytes at a time; scales of a row as one word.
        size = {"uint8": 1, "float32": 4}.get(dtype, 2)
        unit = 16 // size if number < 2 else last
        strides = [T.int64(), inner * last, last, 1]
        matched.append(
            _strided(handle, (pages, outer, inner, last), dtype, strides, unit * size, unit)
        )
    return matched


@dataclasses.dataclass(frozen=True)
class Rings:
    """The matched buffers of ``k_window``, ``v_window`` and ``window_slots``."""

    k: Any
    v: Any
    slots: Any


def match_rings(spec: CacheSpec, handles: tuple, sequences) -> Rings | None:
    """Match the handles of a window's rings, or None for a spec without one."""
    if not spec.window:
        return None
    k_window, v_window, window_slots = handles
    rings = T.int64()

    def match(handle, dim: int):
        shape = (rings, spec.window, spec.num_kv_heads, dim)
        return T.match_buffer(handle, shape, spec.dtype, align=16)

    return Rings(
        match(k_window, spec.head_dim),
        match(v_window, spec.value_dim),
        T.match_buffer(window_slots, (sequences,), "int32", align=4),
    )


def jit(spec: CacheSpec, s_tir: bool) -> Callable[[Callable], PrimFunc]:
    """Parse a function as ``T.prim_func`` does, without optional handles if there is no window.

    ``T.Optional`` marks these. The parser takes it only below a decorator of this name, and reads
    ``s_tir``, which ``T.jit`` does not accept, out of the source.
    """

    def parse(function: Callable) -> PrimFunc:
        kernel = T.jit(function)
        absent = () if spec.window else kernel.optional_names
        return kernel.specialize(**dict.fromkeys(absent))

    parse.dispatch_token = T.jit.dispatch_token
    return parse


def matched_buffer(matched: Strided | None):
    """The buffer of one of `match_caches`, or None."""
    return None if matched is None else matched.buffer


def view_caches(matched: list[Strided | None]) -> Caches:
    """Declare the views of `match_caches`."""
    return Caches(*[None if m is None else m.view() for m in matched])


def match_rows(handle, tokens, heads: int, head_dim: int, dtype: str) -> Strided:
    """Match rows ``[tokens, heads, D]`` with a free token stride."""
    strides = [T.int64(), head_dim, 1]
    unit = 16 // (4 if dtype == "float32" else 2)
    return _strided(handle, (tokens, heads, head_dim), dtype, strides, 16, unit)


def flat(matched: Strided):
    """All of an argument as one axis, for addresses that are worked out by hand."""
    return flat_buffer(matched.buffer)


def flat_buffer(buffer):
    """The same of a compact argument."""
    return T.decl_buffer(
        (T.int64(1 << 62),), buffer.dtype, data=buffer.data, align=buffer.data_alignment
    )


def find_last_start(found, starts, count, token) -> None:
    """Bisect for the last of ``count`` sequences that starts at or before ``token``.

    ``found`` is a register that holds 0. An empty sequence shares its start with the next one,
    which is found.
    """
    past, probe = local(1, "int32"), local(1, "int32")
    store(past, T.cast(count, "int32"))
    with loop(past[0] - found[0] > 1):
        store(probe, T.truncdiv(found[0] + past[0], 2))
        with I.If(starts[probe[0]] <= token):
            with I.Then():
                store(found, probe[0])
            with I.Else():
                store(past, probe[0])


def advance_start(found, starts, count, token) -> None:
    """Go on from a sequence that `find_last_start` found to that of a later ``token``."""
    last = T.cast(count, "int32") - 1
    ended = T.if_then_else(found[0] < last, starts[found[0] + 1] <= token, T.bool(False))
    with loop(ended):
        store(found, found[0] + 1)


def row_strides(spec: CacheSpec) -> tuple[int, int]:
    """Rows of a page from a token to the next, and from a KV head to the next."""
    return (spec.num_kv_heads, 1) if spec.layout == "bshd" else (1, spec.page_size)


def page_row(spec: CacheSpec, offset, head):
    """Number of a token's row among those of its page."""
    if spec.layout == "bshd":
        return offset * spec.num_kv_heads + head
    return head * spec.page_size + offset


def token_place(spec: CacheSpec, table, sequence, position) -> tuple[Any, Any]:
    """Page of a position of a sequence, int64, and the offset in it."""
    page = T.cast(table[sequence, position // spec.page_size], "int64")
    return page, position % spec.page_size


def token_row(spec: CacheSpec, table, sequence, position, head) -> tuple[Any, Any]:
    """Page of a position that is not negative, int64, and the `page_row` there: two registers."""
    page = let(T.cast(table[sequence, T.truncdiv(position, spec.page_size)], "int64"))
    return page, let(page_row(spec, T.truncmod(position, spec.page_size), head))


def row_index(spec: CacheSpec, page, offset, head):
    """Indices of coordinate ``j`` of the row at ``offset`` of ``page``, as a function of ``j``."""
    if spec.layout == "bshd":
        return lambda j: [page, offset, head, j]
    return lambda j: [page, head, offset, j]


def slot_row(spec: CacheSpec, slot, head):
    """`row_index` of a slot (page * PS + offset)."""
    return row_index(spec, slot // spec.page_size, slot % spec.page_size, head)


def page_slot(spec: CacheSpec, table, sequence, position):
    """Slot of a position of a sequence, through the block table."""
    page, offset = token_place(spec, table, sequence, position)
    return page * spec.page_size + T.cast(offset, "int64")


def store_slot(slot, value, reads: list) -> None:
    """Block ``slot``: keep the slot of a row, which every later block of it addresses by."""
    with I.sblock("slot"):
        I.reads(*reads)
        I.writes(slot[0])
        I.buffer_store(slot, value, [0])
