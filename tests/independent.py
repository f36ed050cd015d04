"""The formats a second time, in float64 numpy and plain loops, from ``FORMATS.md`` alone.

It shares nothing with ``tq_tvm``: its constants and its byte order are written out again.
"""

from __future__ import annotations

import functools
import math

import numpy as np

C3 = [-2.1519456, -1.3439093, -0.7560052, -0.2450942, 0.2450942, 0.7560052, 1.3439093, 2.1519456]
B3 = [-1.7479274, -1.0499573, -0.5005497, 0.0, 0.5005497, 1.0499573, 1.7479274]
C2 = [-1.5104176, -0.4527808, 0.4527808, 1.5104176]
B2 = [-0.9815992, 0.0, 0.9815992]


def legendre(a, p):
    return {0: 0, 1: 1, p - 1: -1}[pow(a % p, (p - 1) // 2, p)]


def entry(order, i, j):
    """H[i][j] of the matrices of order 12, 20 and 28."""
    if order in (12, 20):
        if i == 0 or j == 0:
            return 1
        return legendre(i + j - 2, order - 1) or -1
    a, b, x, y = i // 2, j // 2, i % 2, j % 2
    c = 0 if a == b else 1 if 0 in (a, b) else legendre(a - b, 13)
    return c * [[1, 1], [1, -1]][x][y] + (a == b) * [[1, -1], [-1, -1]][x][y]


ORDERS = {80: [20], 96: [12], 112: [28], 192: [12], 576: [12, 12]}


@functools.cache
def hadamard(d):
    """The matrix of d values, unscaled: coordinate = (digits of the orders, then of the rest)."""
    orders = ORDERS.get(d, [])
    rest = d // math.prod(orders)
    matrix = np.empty((d, d))
    for i in range(d):
        for j in range(d):
            sign = (-1) ** bin(i % rest & j % rest).count("1")
            x, y = i // rest, j // rest
            for order in reversed(orders):
                sign *= entry(order, x % order, y % order)
                x, y = x // order, y // order
            matrix[i, j] = sign
    return matrix


def sign(j):
    """Sign of coordinate j in a signed rotation."""
    x = j ^ 0x0CAD1998
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return -1.0 if (x ^ (x >> 16)) & 1 else 1.0


def rotate(row, signed=False):
    """One row, times the signs where it is signed, times the Hadamard matrix over sqrt(d)."""
    x = np.asarray(row, dtype=np.float64)
    if signed:
        x = x * [sign(j) for j in range(len(x))]
    return x @ hadamard(len(x)) / math.sqrt(len(x))


def encode_key(row):
    """(bytes, (norm, residual), distance of each value from its nearest decision)."""
    y = rotate(row)
    d = len(y)
    root = math.sqrt(d)
    n = math.sqrt(sum(v * v for v in y) + 1e-8)
    nibbles, residuals, margins = [], [], []
    for v in y:
        u = v / n
        index = sum(1 for b in B3 if u > b / root)
        r = u - C3[index] / root
        nibbles.append(index | (8 if r >= 0 else 0))
        residuals.append(r)
        margins.append(min(min(abs(u * root - b) for b in B3), abs(r) * root))
    g = math.sqrt(sum(r * r for r in residuals) + 1e-8) / root
    packed = [nibbles[j] | nibbles[j + d // 2] << 4 for j in range(d // 2)]
    return packed, (n, g), margins


def encode_value(row):
    """(bytes, (norm,), distance of each value from its nearest decision)."""
    y = rotate(row)
    d = len(y)
    root = math.sqrt(d)
    n = math.sqrt(sum(v * v for v in y) + 1e-8)
    index = [sum(1 for b in B2 if v / n > b / root) for v in y]
    margins = [min(abs(v / n * root - b) for b in B2) for v in y]
    q = d // 4
    packed = [
        index[j] | index[j + q] << 2 | index[j + 2 * q] << 4 | index[j + 3 * q] << 6
        for j in range(q)
    ]
    return packed, (n,), margins


# --- every codec


C4 = [0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896]
B4 = [0.2582217, 0.5224037, 0.7995498, 1.0992858, 1.4371388, 1.8435318, 2.4008034]
C4 = [-c for c in reversed(C4)] + C4
B4 = [-b for b in reversed(B4)] + [0.0] + B4
TABLES = {"qjl4": (C3, B3), "mse2": (C2, B2), "mse3": (C3, B3), "mse4": (C4, B4)}
PLANES = {"mse2": [2], "mse3": [2, 1], "mse4": [4], "qjl4": [4], "int4": [4], "int8": [8]}


def pack(codes, planes):
    """Bytes of a row of codes."""
    d, packed = len(codes), []
    for bits in planes:
        columns = d * bits // 8
        plane = [0] * columns
        for k, code in enumerate(codes):
            plane[k % columns] |= (code & (2**bits - 1)) << bits * (k // columns)
        codes = [code >> bits for code in codes]
        packed += plane
    return packed


def unpack(packed, planes):
    """Codes of a row of bytes."""
    d = len(packed) * 8 // sum(planes)
    codes, start, shift = [0] * d, 0, 0
    for bits in planes:
        columns = d * bits // 8
        for k in range(d):
            code = packed[start + k % columns] >> bits * (k // columns) & (2**bits - 1)
            codes[k] |= code << shift
        start, shift = start + columns, shift + bits
    return codes


def e4m3(byte):
    """The value of a byte of float8_e4m3fn."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    size = math.nan if byte & 0x7F == 0x7F else size
    return -size if byte & 0x80 else size


E4M3 = sorted((e4m3(b), b) for b in range(256) if b & 0x7F != 0x7F and b != 0x80)


def encode(codec, y, rule="norm", tensor_scale=1.0):
    """Bytes and scales of a rotated row."""
    y = [float(v) for v in y]
    d = len(y)
    if codec == "fp8":
        packed = []
        for v in y:
            exact = v / tensor_scale
            best = min(abs(exact - value) for value, _ in E4M3)
            nearest = [b for value, b in E4M3 if abs(exact - value) == best]
            byte = next((b for b in nearest if b % 2 == 0), nearest[0])
            packed.append(byte or (0x80 if math.copysign(1, exact) < 0 else 0))
        return packed, []
    if codec in ("int4", "int8"):
        top = 2 ** int(codec[3:]) - 1
        low, high = min(y), max(y)
        if high - low <= max(abs(low), abs(high)) / 256:
            middle = (low + high) / 2
            return pack([0] * d, PLANES[codec]), [abs(middle), -np.sign(middle)]
        scale = (high - low) / top
        zero = -low / scale
        codes = [min(int(v / scale + zero + 0.5), top) for v in y]
        return pack(codes, PLANES[codec]), [scale, zero]
    centroids, boundaries = TABLES[codec]
    root = math.sqrt(d)
    n = math.sqrt(sum(v * v for v in y) + 1e-8)
    codes = [sum(1 for b in boundaries if v / n > b / root) for v in y]
    unit = [centroids[code] / root for code in codes]
    scales = []
    if codec == "qjl4":
        rest = [v / n - u for v, u in zip(y, unit, strict=True)]
        codes = [c | (8 if r >= 0 else 0) for c, r in zip(codes, rest, strict=True)]
        gap = math.sqrt(sum(r * r for r in rest) + 1e-8) / root
        if rule != "norm":
            gap = sum(map(abs, rest)) / d
        unit = [u + (gap if r >= 0 else -gap) for u, r in zip(unit, rest, strict=True)]
        scales = [gap]
    dot = sum(a * b for a, b in zip(y, unit, strict=True))
    power, size = sum(v * v for v in y), sum(u * u for u in unit)
    scale = {
        "norm": n,
        "matched": math.sqrt(power / size),
        "least_squares": dot / size,
        "unbiased": power / dot if dot else 0.0,
    }[rule]
    return pack(codes, PLANES[codec]), [scale, *scales]


def decode(codec, packed, scales, tensor_scale=1.0):
    """The rotated row of bytes and scales."""
    if codec == "fp8":
        return [e4m3(b) * tensor_scale for b in packed]
    codes = unpack(packed, PLANES[codec])
    if codec in ("int4", "int8"):
        return [(code - scales[1]) * scales[0] for code in codes]
    centroids, _ = TABLES[codec]
    root = math.sqrt(len(codes))
    if codec != "qjl4":
        return [scales[0] * centroids[code] / root for code in codes]
    return [
        scales[0] * (centroids[code & 7] / root + (scales[1] if code & 8 else -scales[1]))
        for code in codes
    ]


def rotate_back(row, signed=False):
    """Undo `rotate`."""
    x = np.asarray(row, dtype=np.float64) @ hadamard(len(row)) / math.sqrt(len(row))
    return x * [sign(j) for j in range(len(x))] if signed else x
