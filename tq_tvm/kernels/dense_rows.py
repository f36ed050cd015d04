"""Rows of the model's dtype in shared memory of ``attend`` and ``prefill``, for ``ldmatrix``.

The eight rows of a matrix have to be in different banks. Of rows of whole 128 bytes, chunk c of row
r, 16 bytes, is where chunk c ^ (r % 8) would be; other rows are an odd number of chunks apart.
"""

from __future__ import annotations

from tvm.script import tirx as T

__all__ = ["dense_row_words", "dense_step", "dense_word", "turned"]


def _swizzled(dim: int) -> bool:
    return dim % 64 == 0


def dense_row_words(dim: int) -> int:
    """Words from a row to the next."""
    return dim // 2 if _swizzled(dim) else (dim // 8 | 1) * 4


def dense_word(dim: int, row, word):
    """Where a word of a row is."""
    if not _swizzled(dim):
        return row * dense_row_words(dim) + word
    chunk = T.bitwise_xor(T.truncdiv(word, 4), T.truncmod(row, 8))
    return row * (dim // 2) + chunk * 4 + T.truncmod(word, 4)


def turned(dim: int, row, chunk):
    """A chunk of the first eight, 0 or 1, as that of a row, in words."""
    return T.bitwise_xor(row, chunk) * 4 if _swizzled(dim) else chunk * 4


def dense_step(dim: int, first, step: int, whole: bool):
    """Where 16 values are that are ``step`` times 16 behind those at ``first``.

    ``whole`` says that rows begin at multiples of their words, a power of two.
    """
    words = 8 * step
    if not _swizzled(dim):
        return first + words
    if whole:
        return T.bitwise_xor(first, words)
    return T.bitwise_xor(first, words % 32) + words // 32 * 32
