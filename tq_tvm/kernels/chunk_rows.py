"""Rows of V's codes in shared memory, for kernels whose lanes copy chunks of 16 bytes.

A copy to shared memory asks L2 for a sector of 32 bytes once for each line of shared memory that it
goes to. Rows are whole, so it asks once; with chunks in planes of all tokens, as ``ldmatrix`` would
like them, it asked twice, and L2 could do no more: at 64 x 8192 of 32/8 heads on an H200, 135 us of
128 in k4v2, 117 of 110 in tq22, 346 of 265 in int8 by ``attend``. A row's chunks are exchanged, so
that those of one number, of eight tokens, are in all banks.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels.device import u32

__all__ = ["CHUNK_WORDS", "chunk_word", "padded", "turned", "turned_place"]

CHUNK_WORDS = 4
"""Words of a chunk of 16 bytes."""

_TOKENS = 8
"""Rows of one matrix of ``ldmatrix``."""


def turned(token, chunks: int) -> Any:
    """What numbers of chunks of a token's row are exchanged by (exclusive or).

    ``chunks`` of a row, with what pads it, are a power of two.
    """
    apart, most = max(1, _TOKENS // chunks), min(_TOKENS, chunks)
    if isinstance(token, int):
        return token // apart % most
    return T.truncmod(T.truncdiv(token, apart), most)


def padded(chunks: int) -> int:
    """Places for chunks of a row, and lanes that copy it: the next power of two."""
    return 1 << (chunks - 1).bit_length()


def chunk_word(token, chunk, chunks: int) -> Any:
    """Where a chunk of a token's row lies, in words from the first row on."""
    moved = T.bitwise_xor(chunk, turned(token, chunks))
    return token * (CHUNK_WORDS * chunks) + moved * CHUNK_WORDS


def turned_place(place, token: int, chunks: int) -> Any:
    """A lane's place among the first rows, in bytes, as it is ``token`` rows on, less those rows.

    A warp copies as many rows at once as divide ``token``: of fewer than eight, what their chunks
    and those of row ``token`` are exchanged by have no bit in common.
    """
    moved = 4 * CHUNK_WORDS * turned(token, chunks)
    return T.bitwise_xor(place, u32(moved)) if moved else place
