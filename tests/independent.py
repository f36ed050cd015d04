"""The K4V2 format a second time, in float64 numpy and plain loops, from the equations alone.

It shares nothing with ``tq_tvm``: its constants and its byte order are written out again.
"""

from __future__ import annotations

import math

import numpy as np

C3 = [-2.1519456, -1.3439093, -0.7560052, -0.2450942, 0.2450942, 0.7560052, 1.3439093, 2.1519456]
B3 = [-1.7479274, -1.0499573, -0.5005497, 0.0, 0.5005497, 1.0499573, 1.7479274]
C2 = [-1.5104176, -0.4527808, 0.4527808, 1.5104176]
B2 = [-0.9815992, 0.0, 0.9815992]


def rotate(row):
    """One row times the Walsh-Hadamard matrix, H[i][j] = (-1)^popcount(i & j), over sqrt(d)."""
    d = len(row)
    sign = [[-1.0 if bin(i & j).count("1") % 2 else 1.0 for j in range(d)] for i in range(d)]
    return np.asarray(row, dtype=np.float64) @ np.asarray(sign) / math.sqrt(d)


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
