"""V's levels as sums over bits or as look-ups, for ``decode`` on GPUs: what tensor cores multiply.

Levels of a Lloyd-Max codec of N(0, 1) are opposite where all bits of a code are. Written in signs
+-1 of bits they have products of an odd number of bits alone: with two bits the bits themselves,
with three the bits and their product, whose sign is the parity of the code. So a level is exactly
affine in two or four bits::

    2 bits:  level = (outer - inner) low + (outer + inner) high - outer
                   = (outer - inner) code + (outer - 3 inner) (1 - high) - 2 outer + 3 inner
    3 bits:  level = 2 (a low + b middle + c high + d parity) - (a + b + c + d)
             4 a = -L0 + L1 - L2 + L3    4 b = -L0 - L1 + L2 + L3
             4 c =  L0 + L1 + L2 + L3    4 d =  L0 - L1 - L2 + L3    of the magnitudes L0 < .. < L3

Of two bits the second form has less to mask: bytes of codes are operands as they are, where sums of
the field above have those below in them. Four bits would take eight such sums; look-ups of two
signed bytes are fewer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tq_tvm.kernels.decode_tables import double_bytes

__all__ = ["Plane", "ValuePlanes", "four_bit_levels", "three_bit_planes", "two_bit_planes"]


@dataclasses.dataclass(frozen=True)
class Plane:
    """Some bits of every code: ``source`` has them at ``bits`` of each of the fields of two bits.

    ``weight`` is what a byte with the lowest bit of field 0 is worth, relative to the first
    plane's. Of an ``inverted`` plane zeros count.
    """

    source: str
    bits: int
    weight: float
    inverted: bool = False


@dataclasses.dataclass(frozen=True)
class ValuePlanes:
    """``level = unit sum(weight * bits) - offset``; ``tokens`` of sums fit an int32.

    A byte has ``fields`` codes, of which each has sums ``step`` times too large, times that of the
    one before. With ``tables`` the planes are bytes that are looked up, see
    `decode_tables.double_bytes`. Where planes are ``nested``, the sums of the last field have those
    of all others in them: a plane of all bits needs no mask there.
    """

    planes: tuple[Plane, ...]
    unit: float
    offset: float
    tokens: int
    fields: int = 4
    step: int = 4
    tables: tuple[tuple[int, int], ...] = ()
    nested: bool = False


def two_bit_planes(centroids: Sequence[float]) -> ValuePlanes:
    """Codes, and zeros of high bits. A token adds at most 255 times 425 to a sum of 2^31."""
    inner, outer = sorted(c for c in centroids if c > 0)
    unit, rest = outer - inner, outer - 3 * inner
    planes = (Plane("pairs", 3, 1.0), Plane("pairs", 2, rest / (2 * unit), inverted=True))
    return ValuePlanes(planes, unit, outer + rest, 18000, nested=True)


def three_bit_planes(centroids: Sequence[float]) -> ValuePlanes:
    """High bits first, whose weight is the largest. A token adds at most 255 times 320."""
    first, second, third, fourth = sorted(c for c in centroids if c > 0)
    low = (-first + second - third + fourth) / 4
    middle = (-first - second + third + fourth) / 4
    high = (first + second + third + fourth) / 4
    parity = (first - second - third + fourth) / 4
    planes = (
        Plane("third", 1, 1.0),
        # A byte has the middle bit of a field twice as high.
        Plane("pairs", 2, middle / (2 * high)),
        Plane("pairs", 1, low / high),
        Plane("parity", 1, parity / high),
    )
    return ValuePlanes(planes, 2 * high, low + middle + high + parity, 24000)


def four_bit_levels(centroids: Sequence[float]) -> ValuePlanes:
    """Levels as two bytes. A token adds at most 255 times 252."""
    tables, unit, part = double_bytes(centroids)
    planes = (Plane("first", 1, 1.0), Plane("second", 1, part / unit))
    return ValuePlanes(planes, unit, 0.0, 30000, fields=2, step=1, tables=tables)
