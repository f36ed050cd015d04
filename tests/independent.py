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
