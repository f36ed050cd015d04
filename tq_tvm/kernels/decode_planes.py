"""V's levels as sums over bits or as look-ups, for ``decode`` on GPUs: what tensor cores multiply.

Levels of a Lloyd-Max codec of N(0, 1) are opposite where all bits of a code are. Written in signs
+-1 of bits they have products of an odd number of bits alone: with two bits the bits themselves,
with three the bits and their product, whose sign is the parity of the code. So a level is exactly
affine in two or four bits::

    2 bits:  level = (outer - inner) low + (outer + inner) high - outer
    3 bits:  level = 2 (a low + b middle + c high + d parity) - (a + b + c + d)
             4 a = -L0 + L1 - L2 + L3    4 b = -L0 - L1 + L2 + L3
             4 c =  L0 + L1 + L2 + L3    4 d =  L0 - L1 - L2 + L3    of the magnitudes L0 < .. < L3

Four bits would take eight such sums; look-ups of two signed bytes are fewer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tq_tvm.kernels.decode_tables import double_bytes

__all__ = ["Plane", "ValuePlanes", "four_bit_levels", "three_bit_planes", "two_bit_planes"]


@dataclasses.dataclass(frozen=True)
class Plane:
    """One bit of every code: ``source`` has it at ``bit`` of each of the fields of two bits.

    ``weight`` is what a byte with the bit of field 0 is worth, relative to the first plane's.
    """

    source: str
    bit: int
    weight: float


@dataclasses.dataclass(frozen=True)
class ValuePlanes:
    """``level = unit sum(weight * 2^bit) - offset``; ``tokens`` of sums fit an int32.

    A byte has ``fields`` codes, of which each has sums ``step`` times too large, times that of the
    one before. With ``tables`` the planes are bytes that are looked up, see
    `decode_tables.double_bytes`.
    """

    planes: tuple[Plane, ...]
    unit: float
    offset: float
    tokens: int
    fields: int = 4
    step: int = 4
    tables: tuple[tuple[int, int], ...] = ()


def two_bit_planes(centroids: Sequence[float]) -> ValuePlanes:
    """Low and high bits. A token adds at most 255 times 192 to a sum of 2^31."""
    inner, outer = sorted(c for c in centroids if c > 0)
    ratio = (outer + inner) / (2 * (outer - inner))
    planes = (Plane("pairs", 0, 1.0), Plane("pairs", 1, ratio))
    return ValuePlanes(planes, outer - inner, outer, 40000)


def three_bit_planes(centroids: Sequence[float]) -> ValuePlanes:
    """High bits first, whose weight is the largest. A token adds at most 255 times 320."""
    first, second, third, fourth = sorted(c for c in centroids if c > 0)
    low = (-first + second - third + fourth) / 4
    middle = (-first - second + third + fourth) / 4
    high = (first + second + third + fourth) / 4
    parity = (first - second - third + fourth) / 4
    planes = (
        Plane("third", 0, 1.0),
        # A byte has the middle bit of a field twice as high.
        Plane("pairs", 1, middle / (2 * high)),
        Plane("pairs", 0, low / high),
        Plane("parity", 0, parity / high),
    )
    return ValuePlanes(planes, 2 * high, low + middle + high + parity, 24000)


def four_bit_levels(centroids: Sequence[float]) -> ValuePlanes:
    """Levels as two bytes. A token adds at most 255 times 252."""
    tables, unit, part = double_bytes(centroids)
    planes = (Plane("first", 0, 1.0), Plane("second", 0, part / unit))
    return ValuePlanes(planes, unit, 0.0, 30000, fields=2, step=1, tables=tables)
