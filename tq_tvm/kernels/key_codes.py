"""Codes of K as signed bytes on GPUs, and sums that start from given registers.

``decode`` and ``attend`` multiply them with bytes of queries by ``mma.m16n8k32``.
"""

from __future__ import annotations

from tvm.script import tirx as T

from tq_tvm.kernels.decode_tables import KeyTables
from tq_tvm.kernels.device import held, local, mma, store, u32
from tq_tvm.spec import Codec

__all__ = ["UPPER", "Sums", "code_nibbles", "key_table"]

_CODES = 0x77777777
_PAIRS = 0x33333333

UPPER = 0x88888888
"""Turned in a selector, it looks up in the upper table what was to be found in the lower one."""


def key_table(key: KeyTables, unknown_zero, lane):
    """The table's words in registers.

    Of words that it knows the compiler keeps uniform registers, and copies them for every look-up.
    """
    words = [word for table in (*key.tables, *key.upper) for word in table]
    table = local(len(words), "uint32")
    for i, word in enumerate(words):
        store(table, held("uint32", T.bitwise_or(u32(word), unknown_zero), lane), i)
    return table


def code_nibbles(codec: Codec, word, odd: int, third):
    """Eight codes, one a nibble: of a word of pairs of bits those at the even or ``odd`` pairs.

    ``third`` has the codes' third bits where the low bits of their pairs are. Of 16 levels the top
    bits stay.
    """
    if codec.plane_bits[0] == 4:
        return word if len(codec.centroids) == 16 else T.bitwise_and(word, u32(_CODES))
    codes = T.bitwise_and(T.shift_right(word, u32(2)) if odd else word, u32(_PAIRS))
    if third is None:
        return codes
    # In the places of the lower two pairs, or of the upper two.
    third = T.bitwise_and(third, u32(UPPER >> 1 if odd else UPPER >> 3))
    return T.bitwise_or(codes, third if odd else T.shift_left(third, u32(2)))


class Sums:
    """Accumulators of a product's 16 rows and 8 columns that start from given registers."""

    def __init__(self, count: int, starts) -> None:
        self.values = local((count, 4), "uint32")
        self._starts = list(starts)

    def add(self, n: int, instruction: str, a, b) -> None:
        """Add a product to sums ``n``."""
        result = [self.values[n, e] for e in range(4)]
        start, self._starts[n] = self._starts[n], result
        mma(instruction, result, a, b, start)
