"""Blocks of TensorIR that several kernels share: what happens to one row of D values.

`tq_tvm.kernels.codecs` has those that depend on the codec.

A row lives in buffers of shape ``[M, PARTS]``, M = D / PARTS: element ``(m, p)`` is coordinate
``p * M + m``. PARTS = 4 because one byte of 2-bit codes takes one value of each quarter of the row
(and one byte of 4-bit codes one of each half), so whoever owns ``m`` packs and unpacks without
asking anybody. ``PARTS`` is the fast axis: a lane that owns a range of ``m`` owns a contiguous
range of the buffer, which is what TVM needs to turn a ``warp`` buffer into shuffles.

Every function here is called while a TVMScript function is being parsed and appends blocks to the
block under construction. Block names are ``<prefix>_<step>``; schedules find them by name.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.formats import NORM_EPS, hadamard_factors, hadamard_row_masks, rotation_signs

__all__ = [
    "PARTS",
    "find_sequence",
    "hadamard",
    "load_raw",
    "load_row",
    "norm",
    "padded",
    "paley_rows",
    "rotate",
    "rotation_scale",
    "select",
    "sign_of",
    "stage_names",
    "store_meta",
    "store_row",
    "total",
]

PARTS = 4

Index = Callable[..., list]
"""Maps a coordinate to the indices of the element in a global buffer."""


def padded(rows, multiple: int):
    """Rows rounded up, so that splitting the row loop needs no predicate.

    A predicate around a row would put the shuffles inside a divergent branch. Rows past the end
    recompute the last row and store nothing.
    """
    return (rows + (multiple - 1)) // multiple * multiple


def select(index, values: tuple, make=T.float32):
    """``values[index]`` as a tree of selects: no table in memory, and it vectorises."""
    if len(values) == 1:
        return make(values[0])
    half = len(values) // 2
    return T.Select(
        index < half, select(index, values[:half], make), select(index - half, values[half:], make)
    )


def sign_of(coordinate, head_dim: int):
    """The sign, 1.0 or -1.0, that ``signed_hadamard`` gives a coordinate."""
    signs = rotation_signs(head_dim)
    words = tuple(
        sum((sign < 0) << bit for bit, sign in enumerate(signs[at : at + 32]))
        for at in range(0, head_dim, 32)
    )
    word = select(coordinate // 32, words, T.uint32)
    negative = T.bitwise_and(T.shift_right(word, T.cast(coordinate % 32, "uint32")), T.uint32(1))
    return T.float32(1) - T.float32(2) * T.cast(negative, "float32")


def rotation_scale(rotation: str, head_dim: int) -> float:
    """What a row that `rotate` left unscaled has to be multiplied by."""
    return 1.0 if rotation == "none" else head_dim**-0.5


def stage_names(prefix: str, head_dim: int) -> list[str]:
    """Names of the butterfly blocks of `hadamard`."""
    return [f"{prefix}_stage{s}" for s in range(hadamard_factors(head_dim)[-1].bit_length() - 1)]


def load_raw(prefix: str, src, index: Index, head_dim: int, dtype: str):
    """Read a row of a global buffer into ``[PARTS, M]`` of its own dtype: block ``load``."""
    m_extent = head_dim // PARTS
    raw = I.sblock_alloc_buffer((PARTS, m_extent), dtype)
    with I.grid(PARTS, m_extent) as (p, m), I.sblock(f"{prefix}_load"):
        vp, vm = I.axis.remap("SS", [p, m])
        I.buffer_store(raw, src[tuple(index(vp * m_extent + vm))], [vp, vm])
    return raw


def load_row(prefix: str, src, index: Index, head_dim: int, dtype: str, signed: bool = False):
    """Read a row of a global buffer and widen it to float32: blocks ``load`` and ``widen``.

    The row passes through a buffer of its own dtype, laid out as in memory, so that the global
    access can be a vector. ``signed`` multiplies by the signs of ``signed_hadamard``.
    """
    m_extent = head_dim // PARTS
    raw = load_raw(prefix, src, index, head_dim, dtype)
    row = I.sblock_alloc_buffer((m_extent, PARTS), "float32")
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_widen"):
        vm, vp = I.axis.remap("SS", [m, p])
        value = T.cast(raw[vp, vm], "float32")
        if signed:
            value = value * sign_of(vp * m_extent + vm, head_dim)
        I.buffer_store(row, value, [vm, vp])
    return row


def rotate(prefix: str, row, rotation: str, head_dim: int):
    """Rotate a row as a format does, unscaled; the signs are the caller's."""
    return row if rotation == "none" else hadamard(prefix, row, head_dim)


def hadamard(prefix: str, row, head_dim: int):
    """Multiply a row by the Hadamard matrix (unscaled): butterfly blocks, then Paley's if any."""
    m_extent = head_dim // PARTS
    for stage, name in enumerate(stage_names(prefix, head_dim)):
        out = I.sblock_alloc_buffer((m_extent, PARTS), "float32")
        bit = 1 << stage
        with I.grid(m_extent, PARTS) as (m, p), I.sblock(name):
            vm, vp = I.axis.remap("SS", [m, p])
            if bit < m_extent:
                odd = vm // bit % 2
                partner = row[vm + bit - 2 * bit * odd, vp]
            else:
                step = bit // m_extent
                odd = vp // step % 2
                partner = row[vm, vp + step - 2 * step * odd]
            # A multiplication, not a select: TVM turns selects of shuffles into branches.
            I.buffer_store(out, partner + row[vm, vp] * T.cast(1 - 2 * odd, "float32"), [vm, vp])
        row = out
    *orders, inner = hadamard_factors(head_dim)
    for number, order in enumerate(reversed(orders)):
        row = _paley(f"{prefix}_paley{number}", row, order, inner, head_dim)
        inner *= order
    return row


def paley_rows(order: int, values: list) -> list:
    """``H values`` of the Hadamard matrix of order 12, 20 or 28: additions and subtractions."""
    sums = []
    for mask in hadamard_row_masks(order):
        total = -values[0] if mask & 1 else values[0]
        for j in range(1, order):
            total = total - values[j] if mask >> j & 1 else total + values[j]
        sums.append(total)
    return sums


def _paley(name: str, row, order: int, inner: int, head_dim: int):
    """One factor of the matrix, on coordinates ``inner`` apart: a block of all its outputs."""
    m_extent = head_dim // PARTS
    out = I.sblock_alloc_buffer((m_extent, PARTS), "float32")
    with I.grid(head_dim // (order * inner), inner) as (outer, low), I.sblock(name):
        vo, vl = I.axis.remap("SS", [outer, low])
        I.reads(row[0:m_extent, 0:PARTS])
        I.writes(out[0:m_extent, 0:PARTS])
        places = [vo * (order * inner) + j * inner + vl for j in range(order)]
        values = [I.bind(row[c % m_extent, c // m_extent]) for c in places]
        for c, value in zip(places, paley_rows(order, values), strict=True):
            I.buffer_store(out, value, [c % m_extent, c // m_extent])
    return out


def total(name: str, head_dim: int, term):
    """Block ``name``: the sum of ``term(m, p)`` over the coordinates of a row, float32 ``[1]``."""
    m_extent = head_dim // PARTS
    out = I.sblock_alloc_buffer((1,), "float32")
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(name):
        vm, vp = I.axis.remap("RR", [m, p])
        with I.init():
            I.buffer_store(out, T.float32(0), [0])
        I.buffer_store(out, out[0] + term(vm, vp), [0])
    return out


def norm(prefix: str, row, head_dim: int, scale: float):
    """``scale * sqrt(sum (row)^2)`` with the format's epsilon: blocks ``square`` and ``norm``.

    ``scale`` is 1/sqrt(D) for a row that `hadamard` left unscaled.
    """
    power = total(f"{prefix}_square", head_dim, lambda m, p: row[m, p] * row[m, p])
    out = I.sblock_alloc_buffer((1,), "float32")
    with I.sblock(f"{prefix}_norm"):
        root = T.sqrt(power[0] * T.float32(scale * scale) + T.float32(NORM_EPS))
        I.buffer_store(out, root, [0])
    return out


def store_meta(prefix: str, values: list, dst, index: Index, dtype: str, where):
    """Write the scales of a row, if ``where`` holds: blocks ``scale`` and ``meta``."""
    count = len(values)
    meta = I.sblock_alloc_buffer((count,), dtype)
    with I.sblock(f"{prefix}_scale"):
        for i, value in enumerate(values):
            I.buffer_store(meta, T.cast(value, dtype), [i])
    with I.serial(0, count) as e, I.sblock(f"{prefix}_meta"):
        ve = I.axis.spatial(count, e)
        with I.If(where()), I.Then():
            I.buffer_store(dst, meta[ve], index(ve))


def store_row(
    prefix: str,
    row,
    dst,
    index: Index,
    head_dim: int,
    dtype: str,
    scale: float,
    where,
    signed: bool = False,
):
    """Scale, narrow and write a row, if ``where`` holds: blocks ``narrow`` and ``store``.

    ``signed`` multiplies by the signs of ``signed_hadamard``.
    """
    m_extent = head_dim // PARTS
    raw = I.sblock_alloc_buffer((PARTS, m_extent), dtype)
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_narrow"):
        vm, vp = I.axis.remap("SS", [m, p])
        value = row[vm, vp] * T.float32(scale)
        if signed:
            value = value * sign_of(vp * m_extent + vm, head_dim)
        I.buffer_store(raw, T.cast(value, dtype), [vp, vm])
    with I.grid(PARTS, m_extent) as (p, m), I.sblock(f"{prefix}_store"):
        vp, vm = I.axis.remap("SS", [p, m])
        with I.If(where()), I.Then():
            I.buffer_store(dst, raw[vp, vm], index(vp * m_extent + vm))


def find_sequence(starts, count, token):
    """Index of the last sequence that starts at or before ``token``: block ``sequence``.

    ``starts`` is non-decreasing with ``starts[0] = 0``; ``count`` of its entries are searched. An
    empty sequence shares its start with the next one, which is the one found.
    """
    found = I.sblock_alloc_buffer((1,), "int32")
    with I.sblock("sequence"):
        I.reads(starts[0:count])
        I.writes(found[0])
        I.buffer_store(found, T.int32(0), [0])
        # Bisection by powers of two: 2^16 sequences at most, out-of-range probes load nothing.
        with I.serial(0, 17) as step:
            probe = found[0] + T.shift_left(T.int32(1), T.int32(16) - T.cast(step, "int32"))
            with I.If(probe < T.cast(count, "int32")), I.Then():
                with I.If(starts[probe] <= T.cast(token, "int32")), I.Then():
                    I.buffer_store(found, probe, [0])
    return found
