"""Centroids as signed bytes, for ``decode`` on GPUs: what ``prmt`` looks up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

__all__ = ["KeyTables", "double_bytes", "double_tables", "key_tables"]


@dataclasses.dataclass(frozen=True)
class KeyTables:
    """Centroids as ``unit * code + offset``; ``tables`` are the bytes of the codes.

    ``tables`` has one pair of words (centroids 0..3 and 4..7), or two: high bytes, then low bytes.
    Where there are 16 centroids, ``upper`` has the tables of the other eight, see `double_tables`.
    """

    tables: tuple[tuple[int, int], ...]
    unit: float
    offset: float
    upper: tuple[tuple[int, int], ...] = ()


def key_tables(centroids: Sequence[float], dtype: str) -> KeyTables:
    """Centroids as a model's dtype needs them.

    8 bits of each of eight are exact beside bfloat16, 16 beside float16; 16 of them have 16 bits.
    """
    if len(centroids) == 16:
        return double_tables(centroids)
    return (narrow_tables if dtype == "bfloat16" else wide_tables)(centroids)


def _words(values: Sequence[int]) -> tuple[int, int]:
    first, second = (
        sum((v & 0xFF) << (8 * i) for i, v in enumerate(values[at : at + 4])) for at in (0, 4)
    )
    return first, second


def wide_tables(centroids: Sequence[float]) -> KeyTables:
    """16 bits a centroid: exact beside the rounding of half precision."""
    unit = max(centroids) / (127 * 256)
    codes = [round(c / unit) for c in centroids]
    high = [(c + 128) >> 8 for c in codes]
    low = [c - (h << 8) for c, h in zip(codes, high, strict=True)]
    return KeyTables((_words(high), _words(low)), unit, 0.0)


def narrow_tables(centroids: Sequence[float]) -> KeyTables:
    """8 bits a centroid, the unit chosen so that all of them round well.

    Codes lie half a unit off the centroids, which the sum of the query corrects; this leaves 4 free
    magnitudes for one unit. For the K4V2 table the error is 0.078 % of a standard deviation, so
    0.3 % of an output at logits of standard deviation 4: below bfloat16's rounding.
    """
    positive = [c for c in centroids if c > 0]
    weights = [_density(c) for c in positive]

    def fit(top: float) -> tuple[float, float, list[int]]:
        halves = [math.floor(c * top / max(positive)) + 0.5 for c in positive]
        products = [
            (w * c * h, w * h * h) for w, c, h in zip(weights, positive, halves, strict=True)
        ]
        unit = sum(p[0] for p in products) / sum(p[1] for p in products)
        error = sum(
            w * (c - unit * h) ** 2 for w, c, h in zip(weights, positive, halves, strict=True)
        )
        return error, unit, [math.floor(h) + 1 for h in halves]

    _, unit, codes = min(fit(50 + step / 100) for step in range(7700))
    return KeyTables((_words([1 - c for c in reversed(codes)] + codes),), unit, -unit / 2)


def _density(value: float) -> float:
    return math.exp(-value * value / 2)


def double_tables(centroids: Sequence[float]) -> KeyTables:
    """16 centroids, symmetric, in 16 bits: the sum of two look-ups of eight.

    A selector of ``prmt`` whose bit 3 is set gives the sign of a byte in place of the byte. The
    lower table has negative bytes alone, which then give -1, the upper one none, which give 0: the
    code of a centroid is the sum of what the lower table gives for its index and the upper one for
    its index with bit 3 turned, and the upper table is one more than its codes for the -1. So
    negative codes have low bytes of -128 to -1, positive ones of 0 to 126; the unit is chosen so
    that all magnitudes have such neighbours. Of the 16 levels of ``mse4`` the error is 2e-5 of a
    standard deviation.
    """
    positive = [c for c in centroids if c > 0]

    def nearest(value: float, low: range) -> int:
        """The number next to ``value`` whose low byte is in ``low``."""
        base = math.floor(value / 256) * 256
        return min((base + 256 * i + b for i in (-1, 0, 1) for b in low), key=_distance(value))

    def fit(top: int) -> tuple[float, int, list[int], list[int]]:
        values = [c * top / max(positive) for c in positive]
        upper = [nearest(v, range(127)) for v in values]
        lower = [nearest(-v, range(-128, 0)) for v in reversed(values)]
        wanted = [-v for v in reversed(values)] + values
        weights = [_density(c) for c in (*reversed(positive), *positive)]
        error = sum(
            w * (v - c) ** 2 for w, v, c in zip(weights, wanted, lower + upper, strict=True)
        )
        return error / top**2, top, lower, upper

    _, top, lower, upper = min(fit(top) for top in range(20000, 32000, 7))

    def bytes_of(codes: list[int], one: int) -> tuple[tuple[int, int], ...]:
        low = [code % 256 if one else code % 256 - 256 for code in codes]
        high = [(code - b) // 256 for code, b in zip(codes, low, strict=True)]
        return tuple(_words([b + one for b in part]) for part in (high, low))

    return KeyTables(bytes_of(lower, 0), max(positive) / top, 0.0, bytes_of(upper, 1))


def double_bytes(centroids: Sequence[float]) -> tuple[tuple[tuple[int, int], ...], float, float]:
    """16 centroids, symmetric, as two signed bytes, the first one times a unit.

    They are looked up as in `double_tables`: a lower and an upper table of the first bytes, then of
    the second ones, which count parts of a unit above the first. Also returns the unit and a part.
    Of ``mse4`` the error is 5e-5 of a standard deviation; first bytes alone would be wrong by up to
    2.5 % in rows whose values are all alike.
    """
    positive = [c for c in centroids if c > 0]
    unit = max(positive) / 126
    part = unit / 125
    first = [min(math.ceil(c / unit) - 1, 125) for c in positive]
    second = [max(1, round((c - n * unit) / part)) for c, n in zip(positive, first, strict=True)]
    tables = [
        table
        for codes in (first, second)
        for table in (_words([-n for n in reversed(codes)]), _words([n + 1 for n in codes]))
    ]
    return tuple(tables), unit, part


def _distance(value: float) -> Callable[[int], float]:
    return lambda code: abs(code - value)
