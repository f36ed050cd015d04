"""Rotating rows by tensor cores: what `fill_cuda`, `flatten_cuda` and `rotate_cuda` share.

A Hadamard matrix is a product of 2 x 2 factors, one a bit of the coordinate. The tensor core takes
the bits that lie across lanes and two to four more, by ``mma.m16n8k16`` with a matrix of ones and
minus ones; the bits that are left take an addition a value each, inside a lane.

A warp has 8 rows. A lane ``(g, t)``, g = lane / 4, t = lane % 4, has those coordinates of row g
whose bits 3 and 4 (2 and 3 at D = 64) are ``t``. A row that is read in 16-byte pieces (8 at
D = 64), or looked up in words of two values, is an operand as it is.
"""

from __future__ import annotations

import itertools
import struct

from tvm.script import tirx as T

from tq_tvm.formats import rotation_signs
from tq_tvm.kernels.device import f32, let, local, mma, shuffle_xor, store, u32

__all__ = [
    "PRODUCTS",
    "SHORT_PRODUCTS",
    "RowBits",
    "RowSigns",
    "butterfly",
    "hadamard_words",
    "hidden_zeros",
    "numbers",
    "rotate_rows",
]

PRODUCTS = {
    "float16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "bfloat16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
}


SHORT_PRODUCTS = {
    "float16": "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32",
    "bfloat16": "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32",
}


class RowBits:
    """Where the bits of a coordinate of ``dim`` are.

    The four lanes of a row have pieces of 2^``lane_bit`` values in turn. Bit 0 is inside a word of
    two values, bit 1 tells the two rows of an operand, ``deep`` the two words of a row of it: a
    piece that was read, or two, is an operand as it is.
    """

    def __init__(self, dim: int, contracted: int, lane_bit: int = 3) -> None:
        self.dim, self.lane_bit = dim, lane_bit
        bits = dim.bit_length() - 1
        self.deep = 2 if lane_bit == 3 else 4
        self.piece = 1 << self.lane_bit
        self.pieces = self.dim // (4 * self.piece)
        self.values = self.dim // 4
        self.masks = (1, 2)
        lanes = (self.lane_bit, self.lane_bit + 1)
        others = [b for b in range(2, bits) if b not in (*lanes, self.deep)]
        self.inner = others[:contracted]
        self.rest = others[contracted:]

    @classmethod
    def of_cache(cls, dim: int, contracted: int) -> RowBits:
        """Pieces of 8 values, or of 4, so that the bytes of V's fields stay in a lane."""
        return cls(dim, contracted, 3 if dim >= 128 else 2)

    def slot(self, coordinate: int) -> int:
        """Index of a coordinate among those of a lane."""
        low = coordinate & (self.piece - 1)
        return coordinate >> (self.lane_bit + 2) << self.lane_bit | low

    def coordinate(self, slot: int) -> int:
        """The coordinate at an index, lane bits 0."""
        return slot >> self.lane_bit << (self.lane_bit + 2) | slot & (self.piece - 1)

    def operand(self, words, coordinate: int, first: int = 0) -> list:
        """Four words from ``coordinate`` on: bit 1 in turn, then ``deep``."""
        places = (coordinate | deep << self.deep | x << 1 for deep in (0, 1) for x in (0, 1))
        return [words[(first + self.slot(place)) // 2] for place in places]


class RowSigns:
    """The signs of `rotation_signs`, for the words of a lane of a row.

    A lane has a bit a value in a register or two, so that a shift brings the two bits of a word to
    its signs.
    """

    def __init__(self, row: RowBits, t) -> None:
        signs = rotation_signs(row.dim)
        self._count = row.dim // 8
        registers = -(-self._count // 16)
        self._bits = local(registers, "uint32")
        for n in range(registers):
            lanes = []
            for lane in range(4):
                bits = 0
                for slot in range(32 * n, min(32 * n + 32, row.dim // 4)):
                    place = (31 if slot & 1 else 15) - slot // 2 % 16
                    negative = signs[row.coordinate(slot) + (lane << row.lane_bit)] < 0
                    bits |= negative << place
                lanes.append(u32(bits))
            pairs = [T.Select(t % 2 == 1, lanes[i + 1], lanes[i]) for i in (0, 2)]
            store(self._bits, T.Select(t >= 2, pairs[1], pairs[0]), n)

    def turn(self, words) -> None:
        """Multiply the values by their signs."""
        for i in range(self._count):
            bits = T.shift_left(self._bits[i // 16], u32(i % 16))
            store(words, T.bitwise_xor(words[i], T.bitwise_and(bits, u32(0x80008000))), i)


def numbers(bits: list[int]) -> list[int]:
    """All numbers that have ones at the places ``bits`` alone."""
    return [sum(1 << b for i, b in enumerate(bits) if n >> i & 1) for n in range(1 << len(bits))]


def _bits(dtype: str, value: float) -> int:
    if dtype == "float16":
        return int.from_bytes(struct.pack("<e", value), "little")
    return int.from_bytes(struct.pack("<f", value), "little") >> 16


def _odd(value: int) -> bool:
    return bin(value).count("1") % 2 == 1


def hidden_zeros(positive, lane, count: int) -> list:
    """Zeros that the compiler does not know, so that it keeps what they are added to.

    ``positive`` is any number of at least 0, below 2^30.
    """
    zero = let(T.shift_right(positive + lane, 31))
    return [let(T.cast(shuffle_xor(zero, i + 1), "uint32")) for i in range(count)]


def hadamard_words(dtype: str, g, t, zeros, scale: float = -1.0):
    """The lane's column of ``scale`` times the matrix of the lane bits and bit 0.

    The index is ``[low, high, word]``; ``scale`` is a number of the dtype.

    ``low`` and ``high`` say whether the signs of the words, without and with the bit ``deep`` of
    the source, are turned.
    """
    one = _bits(dtype, abs(scale))
    both = T.bitwise_and(t, g // 2)
    odd = T.bitwise_xor(both, T.shift_right(both, 1))
    # Column 2 t' + e: the first value of a word meets e = 0 of the row, the second e = 1.
    first = T.bitwise_and(odd, 1)
    second = T.bitwise_and(T.bitwise_xor(odd, g), 1)
    signs = let(T.cast(T.bitwise_or(T.shift_left(first, 15), T.shift_left(second, 31)), "uint32"))
    words = local((2, 2, 2), "uint32")
    for i, (low, high) in enumerate(itertools.product(range(2), repeat=2)):
        for e, odd_sign in enumerate((low, high)):
            minus = 0 if bool(odd_sign) == (scale < 0) else 0x80008000
            word = T.bitwise_xor(signs, u32((one << 16 | one) ^ minus))
            # Registers of their own: a pair of operands has to be side by side.
            store(words, word + zeros[2 * i + e], low, high, e)
    return words


def rotate_rows(row: RowBits, dtype: str, words, ones, value, first: int = 0) -> None:
    """``value`` becomes the rows in ``words`` times the Hadamard matrix times a scale.

    ``ones`` are the operands of `hadamard_words`, which says the scale; ``first`` is the index of
    the first value of a lane, which may have several rows.
    """
    for rest in numbers(row.rest):
        for target in numbers([*row.inner, row.deep]):
            result = [
                value[first + row.slot(rest | target | x << 1 | low)]
                for x in range(2)
                for low in range(2)
            ]
            for n, source in enumerate(numbers(row.inner)):
                # Words of the column: without and with the bit ``deep`` of the source.
                odd = [int(_odd(target & full)) for full in (source, source | 1 << row.deep)]
                start = result if n else [f32(0)] * 4
                b = [ones[odd[0], odd[1], e] for e in range(2)]
                mma(PRODUCTS[dtype], result, row.operand(words, rest | source, first), b, start)
    pair = local(2, "float32")
    for bit in (1, *row.rest):
        for slot in range(row.dim // 4):
            coordinate = row.coordinate(slot)
            if not coordinate >> bit & 1:
                butterfly(value, first + slot, first + row.slot(coordinate | 1 << bit), pair)


def butterfly(value, low: int, high: int, pair) -> None:
    """Replace two values by their sum and their difference; ``pair`` are two registers."""
    store(pair, value[low], 0)
    store(pair, value[high], 1)
    store(value, pair[0] + pair[1], low)
    store(value, pair[0] - pair[1], high)
