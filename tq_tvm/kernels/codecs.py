r"""Device code of every codec, in kernels that LLVM compiles: all that depends on the bytes.

A codec is in two functions: `encode` (blocks of ``fill``) and `code_value` (one code as a float),
which `decode` (blocks of ``flatten``) and `read_row` (loops of ``decode``) call. What stores and
reads planes of codes is common. Rows lie in buffers as `tq_tvm.kernels.blocks` says.

Blocks to encode: ``code``, ``pack`` and ``store`` (of two planes ``pack``, ``row``, ``pack1``,
``row1`` and ``store``); Lloyd-Max ``square``, ``norm``, ``inverse``, of qjl4 ``residual_*``, of
scale rules other than norm ``unit``, ``power``, ``dot``, ``size``; affine ``low``, ``high``,
``broken``, ``affine``; none ``narrow`` and ``store`` alone. To decode: ``load`` of every plane
(``load1``), ``scales`` and ``value``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.formats import Codec
from tq_tvm.kernels.blocks import PARTS, Index, load_raw, norm, select, store_row, total
from tq_tvm.kernels.code_planes import planes_of, store_planes

__all__ = ["code_value", "decode", "encode", "read_row"]

_FP8_MAX = 448.0
_CONSTANT = 2.0**-8
_EXPONENT = 0x7F800000
_NAN = 0x7FC00000


def encode(
    prefix: str,
    row,
    codec: Codec,
    scale_rule: str | None,
    head_dim: int,
    scale: float,
    cache,
    tensor_scale,
    index: Index,
    dtype: str,
    where: Callable,
) -> list:
    """Encode a row and write its codes, if ``where`` holds; return its scales.

    Parameters
    ----------
    row
        Float32 ``[M, PARTS]``, to be multiplied by ``scale`` first.
    cache, index
        Where its codes go.
    tensor_scale
        Buffer with the scale of ``fp8``.
    """
    if codec.family == "none":
        store_row(prefix, row, cache, index, head_dim, dtype, scale, where)
        return []
    if codec.family == "lloyd_max":
        codes, scales = _encode_lloyd_max(prefix, row, codec, scale_rule, head_dim, scale)
    elif codec.family == "affine":
        codes, scales = _encode_affine(prefix, row, codec, head_dim, scale)
    else:
        codes, scales = _encode_fp8(prefix, row, tensor_scale, head_dim, scale), []
    planes = planes_of(codec, head_dim)
    if len(planes) == 1:
        planes[0].store(prefix, planes[0].pack(prefix, codes), cache, index, where)
    else:
        store_planes(prefix, planes, codes, codec.packed_bytes(head_dim), cache, index, where)
    return scales


def decode(
    prefix: str, cache, meta, index: Index, codec: Codec, head_dim: int, dtype: str, present
):
    """Read a row and dequantise it: float32 ``[M, PARTS]``, zeros unless ``present`` holds.

    ``meta`` has the scales of rows, or the tensor's.
    """
    m_extent = head_dim // PARTS
    if codec.family == "none":
        raw = load_raw(prefix, cache, index, head_dim, dtype)
    else:
        planes = [(p, p.load(prefix, cache, index)) for p in planes_of(codec, head_dim)]
        scales = _load_scales(prefix, codec, meta, index, present)
    out = I.sblock_alloc_buffer((m_extent, PARTS), "float32")
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_value"):
        vm, vp = I.axis.remap("SS", [m, p])
        if codec.family == "none":
            value = T.Select(present(), T.cast(raw[vp, vm], "float32"), T.float32(0))
        else:
            code = None
            for plane, packed in planes:
                field = plane.field(packed, vm, vp)
                code = field if code is None else T.bitwise_or(code, field)
            code = I.bind(code)
            value = scales[0] * code_value(codec, code, head_dim, _second(codec, scales))
            if codec.family == "fp8":
                value = T.Select(present(), value, T.float32(0))
        I.buffer_store(out, value, [vm, vp])
    return out


def _load_scales(prefix: str, codec: Codec, meta, index: Index, present):
    """Scales of a row, or of the tensor; zeros where the row is not present: block ``scales``."""
    count = max(len(codec.meta), 1)
    scales = I.sblock_alloc_buffer((count,), "float32")
    with I.serial(0, count) as e, I.sblock(f"{prefix}_scales"):
        ve = I.axis.spatial(count, e)
        scale = meta[0] if codec.tensor_scale else T.cast(meta[tuple(index(ve))], "float32")
        I.buffer_store(scales, T.if_then_else(present(), scale, T.float32(0)), [ve])
    return scales


def _second(codec: Codec, scales):
    return scales[1] if len(codec.meta) == 2 else None


def code_value(codec: Codec, code, head_dim: int, second, *, choose: bool = False):
    """The float of an int32 code, to be multiplied by the row's (or tensor's) first scale.

    Parameters
    ----------
    second
        The row's second scale: the residual's magnitude, or the zero.
    choose
        Choose between a residual's two signs, which vectorises; elsewhere multiply by the sign,
        because TVM turns choices between shuffled values into branches.
    """
    if codec.family == "affine":
        return T.cast(code, "float32") - second
    if codec.family == "fp8":
        return _e4m3_value(code)
    sigma = head_dim**-0.5
    levels = len(codec.centroids)
    index = T.bitwise_and(code, levels - 1)
    value = select(index, tuple(c * sigma for c in codec.centroids))
    if codec.residual_sign and choose:
        return value + T.Select(code >= levels, second, -second)
    if codec.residual_sign:
        sign = T.Select(code >= levels, T.float32(1), T.float32(-1))
        value = value + second * sign
    return value


def read_row(
    codec: Codec,
    head_dim: int,
    cache,
    at: Callable,
    row,
    vector: int,
    second,
    scaled: Callable,
    fields: int | None = None,
) -> None:
    """Loops that dequantise a row into ``row``, float32 ``[D]``, ``vector`` values at a time.

    Parameters
    ----------
    at
        Maps an element of the cache's row to its indices.
    second
        See `code_value`.
    scaled
        Multiplies a value by the row's first scale, or leaves that to later.
    fields
        How many of a byte's 2-bit fields to read, all where None.
    """

    def byte(j):
        return T.cast(cache[tuple(at(j))], "int32")

    def store(j, code) -> None:
        value = code_value(codec, code, head_dim, second, choose=True)
        I.buffer_store(row, scaled(value), [j])

    # Only Lloyd-Max codes that are all index are masked where they are looked up.
    masks = codec.family != "lloyd_max" or codec.residual_sign
    if codec.family == "none":
        vec = math.gcd(vector, head_dim)
        with I.serial(0, head_dim // vec) as jo, I.vectorized(0, vec) as v:
            value = T.cast(cache[tuple(at(jo * vec + v))], "float32")
            I.buffer_store(row, scaled(value), [jo * vec + v])
    elif codec.plane_bits == (8,):
        vec = math.gcd(vector, head_dim)
        with I.serial(0, head_dim // vec) as jo, I.vectorized(0, vec) as v:
            store(jo * vec + v, byte(jo * vec + v))
    elif codec.plane_bits == (4,):
        half = head_dim // 2
        vec = math.gcd(vector, half)
        with I.serial(0, half // vec) as jo:
            with I.vectorized(0, vec) as v:
                low = byte(jo * vec + v)
                store(jo * vec + v, T.bitwise_and(low, 15) if masks else low)
            with I.vectorized(0, vec) as v:
                store(half + jo * vec + v, T.shift_right(byte(jo * vec + v), 4))
    elif codec.plane_bits == (2,):
        quarter = head_dim // 4
        vec = math.gcd(vector, quarter)
        with I.unroll(0, 4 if fields is None else fields) as part:
            with I.serial(0, quarter // vec) as jo, I.vectorized(0, vec) as v:
                store(part * quarter + jo * vec + v, T.shift_right(byte(jo * vec + v), 2 * part))
    else:
        assert codec.plane_bits == (2, 1)
        eighth = head_dim // 8
        vec = math.gcd(vector, eighth)
        with I.unroll(0, 8) as part, I.serial(0, eighth // vec) as jo, I.vectorized(0, vec) as v:
            j = jo * vec + v
            low = T.shift_right(byte(part % 2 * eighth + j), part // 2 * 2)
            high = T.shift_right(byte(2 * eighth + j), part)
            high = T.shift_left(T.bitwise_and(high, 1), 2)
            store(part * eighth + j, T.bitwise_or(T.bitwise_and(low, 3), high))


# --- Lloyd-Max


def _encode_lloyd_max(
    prefix: str, row, codec: Codec, scale_rule: str | None, head_dim: int, scale: float
) -> tuple:
    """Codes (uint8 ``[M, PARTS]``) and scales.

    The codebooks are symmetric: one comparison a positive boundary, on the magnitude.
    """
    m_extent = head_dim // PARTS
    sigma = head_dim**-0.5
    half = len(codec.centroids) // 2
    boundaries = [b * sigma for b in codec.boundaries if b > 0]
    magnitudes = tuple(c * sigma for c in codec.centroids[half:])

    length = norm(prefix, row, head_dim, scale)
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
    if scale_rule == "norm":
        if rest is None:
            return code, [length[0]]
        residual = norm(f"{prefix}_residual", rest, head_dim, 1.0)
        return code, [length[0], residual[0] * T.float32(scale)]
    gaps = []
    if rest is not None:
        mean = total(f"{prefix}_residual_mean", head_dim, lambda m, p: T.fabs(rest[m, p]))
        gaps = [mean[0] * T.float32(1 / head_dim)]
    first = _scale_of(prefix, row, code, codec, scale_rule, head_dim, scale, gaps)
    return code, [first, *gaps]


def _scale_of(
    prefix: str, row, code, codec: Codec, scale_rule: str, head_dim: int, scale: float, gaps: list
):
    """The scale of a row by a rule other than ``norm``, see `tq_tvm.formats`."""
    m_extent = head_dim // PARTS
    unit = I.sblock_alloc_buffer((m_extent, PARTS), "float32")
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_unit"):
        vm, vp = I.axis.remap("SS", [m, p])
        index = I.bind(T.cast(code[vm, vp], "int32"))
        gap = gaps[0] if gaps else None
        I.buffer_store(unit, code_value(codec, index, head_dim, gap), [vm, vp])

    def sum_of(name, a, b, factor):
        out = total(f"{prefix}_{name}", head_dim, lambda m, p: a[m, p] * b[m, p])
        return out[0] * T.float32(factor)

    if scale_rule == "least_squares":
        over = sum_of("dot", row, unit, scale)
    else:
        over = sum_of("power", row, row, scale * scale)
    if scale_rule == "unbiased":
        under = sum_of("dot", row, unit, scale)
    else:
        under = sum_of("size", unit, unit, 1.0)
    # A row of zeros has a scale of zero; nan stays.
    ratio = T.Select(T.EQ(under, T.float32(0)), T.float32(0), over / under)
    return T.sqrt(ratio) if scale_rule == "matched" else ratio


# --- affine


def _encode_affine(prefix: str, row, codec: Codec, head_dim: int, scale: float) -> tuple:
    """Codes and (scale, zero), see `tq_tvm.reference.codec`."""
    m_extent = head_dim // PARTS
    levels = float((1 << codec.bits) - 1)

    def extreme(name, combine, identity):
        out = I.sblock_alloc_buffer((1,), "float32")
        with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_{name}"):
            vm, vp = I.axis.remap("RR", [m, p])
            with I.init():
                I.buffer_store(out, identity, [0])
            I.buffer_store(out, combine(out[0], row[vm, vp]), [0])
        return out

    low = extreme("low", T.min, T.max_value("float32"))
    high = extreme("high", T.max, T.min_value("float32"))
    # By bits: compilers know that x - x is 0.
    broken = total(
        f"{prefix}_broken",
        head_dim,
        lambda m, p: T.cast(
            T.EQ(
                T.bitwise_and(T.reinterpret("int32", row[m, p]), T.int32(_EXPONENT)),
                T.int32(_EXPONENT),
            ),
            "float32",
        ),
    )
    meta = I.sblock_alloc_buffer((3,), "float32")
    with I.sblock(f"{prefix}_affine"):
        lo, hi = I.bind(low[0] * T.float32(scale)), I.bind(high[0] * T.float32(scale))
        middle = I.bind((lo + hi) * T.float32(0.5))
        widest = T.max(T.fabs(lo), T.fabs(hi))
        constant = hi - lo <= widest * T.float32(_CONSTANT)
        negated = T.Select(
            middle > T.float32(0),
            T.float32(-1),
            T.Select(middle < T.float32(0), T.float32(1), T.float32(0)),
        )
        step = I.bind(T.Select(constant, T.fabs(middle), (hi - lo) / T.float32(levels)))
        zero = T.Select(constant, negated, -lo / step)
        nan = T.reinterpret("float32", T.uint32(_NAN))
        whole = broken[0] < T.float32(0.5)
        I.buffer_store(meta, T.Select(whole, step, nan), [0])
        I.buffer_store(meta, T.Select(whole, zero, nan), [1])
        coded = T.Select(constant, T.float32(0), T.float32(1))
        I.buffer_store(meta, T.Select(whole, coded, T.float32(0)), [2])
    code = I.sblock_alloc_buffer((m_extent, PARTS), "uint8")
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_code"):
        vm, vp = I.axis.remap("SS", [m, p])
        y = row[vm, vp] * T.float32(scale)
        exact = I.bind(y / meta[0] + meta[1] + T.float32(0.5))
        # In this order nan becomes 0.
        kept = T.min(T.max(exact, T.float32(0)), T.float32(levels))
        kept = T.Select(meta[2] > T.float32(0), kept, T.float32(0))
        I.buffer_store(code, T.cast(T.cast(kept, "int32"), "uint8"), [vm, vp])
    return code, [meta[0], meta[1]]


# --- fp8


def _encode_fp8(prefix: str, row, tensor_scale, head_dim: int, scale: float):
    """Bytes of float8_e4m3fn, to nearest even, saturated: what ``cvt.rn.satfinite`` gives."""
    m_extent = head_dim // PARTS
    code = I.sblock_alloc_buffer((m_extent, PARTS), "uint8")
    with I.grid(m_extent, PARTS) as (m, p), I.sblock(f"{prefix}_code"):
        vm, vp = I.axis.remap("SS", [m, p])
        value = I.bind(row[vm, vp] * T.float32(scale) / tensor_scale[0])
        bits = I.bind(T.reinterpret("int32", value))
        # Compared as bits, a nan is above infinity.
        is_nan = T.bitwise_and(bits, T.int32(0x7FFFFFFF)) > T.int32(_EXPONENT)
        size = I.bind(T.min(T.fabs(value), T.float32(_FP8_MAX)))
        word = I.bind(T.reinterpret("int32", size))
        odd = T.bitwise_and(T.shift_right(word, T.int32(20)), T.int32(1))
        rounded = T.shift_right(word + odd + T.int32(0x7FFFF), T.int32(20)) - T.int32(120 << 3)
        # Steps of 2^-9 are the last bits of a float at 2^14.
        steps = T.reinterpret("int32", size + T.float32(2.0**14))
        small = T.bitwise_and(steps, T.int32(15))
        magnitude = T.Select(size < T.float32(2.0**-6), small, rounded)
        sign = T.bitwise_and(T.shift_right(bits, T.int32(24)), T.int32(0x80))
        byte = T.Select(is_nan, T.int32(0x7F), T.bitwise_or(sign, magnitude))
        I.buffer_store(code, T.cast(byte, "uint8"), [vm, vp])
    return code


def _e4m3_value(code):
    """The float of a byte of float8_e4m3fn."""
    magnitude = T.bitwise_and(code, T.int32(0x7F))
    bits = T.shift_left(magnitude, T.int32(20)) + T.int32(120 << 23)
    bits = T.Select(T.EQ(magnitude, T.int32(0x7F)), T.int32(_NAN), bits)
    small = T.cast(magnitude, "float32") * T.float32(2.0**-9)
    size = T.Select(magnitude < T.int32(8), small, T.reinterpret("float32", bits))
    return T.Select(code >= T.int32(0x80), -size, size)
