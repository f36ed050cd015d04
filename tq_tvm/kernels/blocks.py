"""Blocks of TensorIR that several kernels share: what happens to one row of D values.

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

from tq_tvm.spec import NORM_EPS, Codec

__all__ = [
    "PARTS",
    "code_and_residual",
    "decode_row",
    "find_sequence",
    "hadamard",
    "load_bytes",
    "load_row",
    "norm",
    "pack",
    "padded",
    "select",
    "stage_names",
    "store_bytes",
    "store_meta",
    "store_row",
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


def select(index, values: tuple[float, ...]):
    """``values[index]`` as a tree of selects: no table in memory, and it vectorises."""
    if len(values) == 1:
        return T.float32(values[0])
    half = len(values) // 2
    return T.Select(index < half, select(index, values[:half]), select(index - half, values[half:]))


def stage_names(prefix: str, head_dim: int) -> list[str]:
    """Names of the butterfly blocks of `hadamard`."""
    return [f"{prefix}_stage{s}" for s in range(head_dim.bit_length() - 1)]


def load_row(prefix: str, src, index: Index, head_dim: int, dtype: str):
    """Read a row of a global buffer and widen it to float32: blocks ``load`` and ``widen``.

    The row passes through a buffer of its own dtype, laid out as in memory, so that the global
    access can be a vector.
    """
    m_extent = head_dim // PARTS
    raw = I.sblock_alloc_buffer((PARTS, m_extent), dtype)
    with I.grid(PARTS, m_extent) as (p, m), I.sblock(f"{prefix}_load"):
        vp, vm = I.axis.remap("SS", [p, m])
        I.buffer_store(raw, src[tuple(index(vp * m_extent + vm))], [vp, vm])
    row = I.sblock_alloc_buffer((m_extent, PARTS), "float32")
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_widen"):
        vm, vp = I.axis.remap("SS", [m, p])
        I.buffer_store(row, T.cast(raw[vp, vm], "float32"), [vm, vp])
    return row


def hadamard(prefix: str, row, head_dim: int):
    """Multiply a row by the Sylvester Hadamard matrix (unscaled): log2(D) butterfly blocks."""
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
    return row


def norm(prefix: str, row, head_dim: int, scale: float):
    """``scale * sqrt(sum (row)^2)`` with the format's epsilon: blocks ``square`` and ``norm``.

    ``scale`` is 1/sqrt(D) for a row that `hadamard` left unscaled.
    """
    m_extent = head_dim // PARTS
    total = I.sblock_alloc_buffer((1,), "float32")
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_square"):
        vm, vp = I.axis.remap("RR", [m, p])
        with I.init():
            I.buffer_store(total, T.float32(0), [0])
        I.buffer_store(total, total[0] + row[vm, vp] * row[vm, vp], [0])
    out = I.sblock_alloc_buffer((1,), "float32")
    with I.sblock(f"{prefix}_norm"):
        root = T.sqrt(total[0] * T.float32(scale * scale) + T.float32(NORM_EPS))
        I.buffer_store(out, root, [0])
    return out


def code_and_residual(prefix: str, row, length, codec: Codec, head_dim: int, scale: float):
    """Quantise a row: blocks ``code`` and, where the codec stores signs, ``residual``.

    Returns the codes (uint8 ``[M, PARTS]``) and the residual's RMS (float32 ``[1]``), or None.
    The codebooks are symmetric: one comparison a positive boundary, on the magnitude.
    """
    m_extent = head_dim // PARTS
    sigma = head_dim**-0.5
    half = len(codec.centroids) // 2
    boundaries = [b * sigma for b in codec.boundaries if b > 0]
    magnitudes = tuple(c * sigma for c in codec.centroids[half:])

    # Every lane of the row needs the reciprocal once, not once a value.
    inverse = I.sblock_alloc_buffer((1,), "float32")
    with I.sblock(f"{prefix}_inverse"):
        I.buffer_store(inverse, T.float32(scale) / length[0], [0])

    code = I.sblock_alloc_buffer((m_extent, PARTS), "uint8")
    rest = I.sblock_alloc_buffer((m_extent, PARTS), "float32") if codec.residual_sign else None
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_code"):
        vm, vp = I.axis.remap("SS", [m, p])
        I.reads(row[vm, vp], inverse[0])
        I.writes(code[vm, vp], *([rest[vm, vp]] if rest is not None else []))
        u = I.bind(row[vm, vp] * inverse[0])
        level = I.bind(sum(T.cast(T.fabs(u) > T.float32(b), "int32") for b in boundaries))
        index = T.Select(u > T.float32(0), half + level, half - 1 - level)
        if rest is None:
            I.buffer_store(code, T.cast(index, "uint8"), [vm, vp])
        else:
            magnitude = select(level, magnitudes)
            r = I.bind(u - T.Select(u > T.float32(0), magnitude, -magnitude))
            sign = T.Select(r >= T.float32(0), T.int32(len(codec.centroids)), T.int32(0))
            I.buffer_store(code, T.cast(index + sign, "uint8"), [vm, vp])
            I.buffer_store(rest, r, [vm, vp])
    if rest is None:
        return code, None
    return code, norm(f"{prefix}_residual", rest, head_dim, 1.0)


def pack(prefix: str, code, codec: Codec, head_dim: int):
    """Pack codes into bytes ``[PARTS / codes_per_byte, M]``: block ``pack``."""
    m_extent = head_dim // PARTS
    per_byte = codec.codes_per_byte
    groups = PARTS // per_byte
    out = I.sblock_alloc_buffer((groups, m_extent), "uint8")
    with I.grid(groups, m_extent) as (g, m), I.sblock(f"{prefix}_pack"):
        vg, vm = I.axis.remap("SS", [g, m])
        byte = code[vm, vg]
        for i in range(1, per_byte):
            byte = T.bitwise_or(
                byte, T.shift_left(code[vm, vg + i * groups], T.uint8(i * codec.bits))
            )
        I.buffer_store(out, byte, [vg, vm])
    return out


def store_bytes(prefix: str, packed, dst, index: Index, codec: Codec, head_dim: int, where):
    """Write packed bytes to a cache, if ``where`` holds: block ``store``."""
    m_extent = head_dim // PARTS
    groups = PARTS // codec.codes_per_byte
    with I.grid(groups, m_extent) as (g, m), I.sblock(f"{prefix}_store"):
        vg, vm = I.axis.remap("SS", [g, m])
        with I.If(where()), I.Then():
            I.buffer_store(dst, packed[vg, vm], index(vg * m_extent + vm))


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


def load_bytes(prefix: str, src, index: Index, codec: Codec, head_dim: int):
    """Read the packed bytes of a row: block ``load``."""
    m_extent = head_dim // PARTS
    groups = PARTS // codec.codes_per_byte
    packed = I.sblock_alloc_buffer((groups, m_extent), "uint8")
    with I.grid(groups, m_extent) as (g, m), I.sblock(f"{prefix}_load"):
        vg, vm = I.axis.remap("SS", [g, m])
        I.buffer_store(packed, src[tuple(index(vg * m_extent + vm))], [vg, vm])
    return packed


def decode_row(prefix: str, packed, scales, codec: Codec, head_dim: int):
    """Turn packed bytes and scales into a rotated row, float32 ``[M, PARTS]``: block ``value``."""
    m_extent = head_dim // PARTS
    groups = PARTS // codec.codes_per_byte
    sigma = head_dim**-0.5
    levels = len(codec.centroids)
    out = I.sblock_alloc_buffer((m_extent, PARTS), "float32")
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_value"):
        vm, vp = I.axis.remap("SS", [m, p])
        byte = T.cast(packed[vp % groups, vm], "int32")
        code = I.bind(T.bitwise_and(byte >> (vp // groups * codec.bits), (1 << codec.bits) - 1))
        value = select(T.bitwise_and(code, levels - 1), tuple(c * sigma for c in codec.centroids))
        if codec.residual_sign:
            sign = T.Select(code >= levels, T.float32(1), T.float32(-1))
            value = value + scales[1] * sign
        I.buffer_store(out, scales[0] * value, [vm, vp])
    return out


def store_row(prefix: str, row, dst, index: Index, head_dim: int, dtype: str, scale: float, where):
    """Scale, narrow and write a row, if ``where`` holds: blocks ``narrow`` and ``store``."""
    m_extent = head_dim // PARTS
    raw = I.sblock_alloc_buffer((PARTS, m_extent), dtype)
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_narrow"):
        vm, vp = I.axis.remap("SS", [m, p])
        I.buffer_store(raw, T.cast(row[vm, vp] * T.float32(scale), dtype), [vp, vm])
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
