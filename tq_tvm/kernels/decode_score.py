"""Scores of a tile in ``decode_cuda``: packed codes of K against the queries.

``prmt`` maps four codes to four signed bytes of a table held in registers: the packed nibbles, sign
bits cleared, are its selector. The sign bits are operands as they lie in the word, 8 for the low
nibbles and 128 for the high ones. With tokens as the M side of ``mma.m16n8k32``::

    c = codes q    s = (signs of high nibbles) q + 16 (signs of low nibbles) q
    score = n (c + g s / (64 centroid)) centroid

for both bytes of a query; what is constant in a query is in the sums from the start
(`decode_query.Query`). In packed kernels a lane has one byte's part of two rows and trades one of
them for the other byte's part of the other: of every 16 tokens it goes on with one, g or g + 8.

Codecs without a residual have no signs apart: the score is n c centroid. Sixteen levels take two
look-ups each (`decode_tables.double_tables`); codes of 2 and 3 bits become nibbles first.
"""

from __future__ import annotations

import functools

from tvm.script import tirx as T

from tq_tvm.kernels.decode_pages import KeyTile
from tq_tvm.kernels.decode_query import MAGIC, Query
from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.device import (
    as_float,
    f32,
    high_half,
    let,
    local,
    low_half,
    ptx,
    shuffle_xor,
    store,
    u32,
)
from tq_tvm.kernels.key_codes import UPPER, Sums, code_nibbles

__all__ = ["score"]

_SIGNED = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
_UNSIGNED = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
_SIGN_MASKS = (0x08080808, 0x80808080)


def score(shape: Shape, query: Query, table, tile: KeyTile, scores) -> None:
    """Scores ``[own token, column]`` of a tile, not yet times `Query.scale`."""
    fragments = query.fetch()
    for m in range(shape.score_tiles):
        code_sums = Sums(
            shape.code_sums,
            [[query.code_start[n, e] for e in range(4)] for n in range(shape.code_sums)],
        )
        # Of each part: low nibbles, which start from nothing, and high nibbles.
        sign_sums = Sums(
            2 * shape.parts,
            [
                start
                for part in range(shape.parts)
                for start in ([u32(0)] * 4, [query.sign_start[part, e] for e in range(4)])
            ],
        )
        for word in range(shape.key_words):
            _add_codes(shape, table, tile, m, word, fragments, code_sums, query.third_bit)
            if word % 2 and shape.residual:
                _add_signs(shape, tile, m, word, fragments, sign_sums)
        _combine(shape, query, tile, m, code_sums.values, sign_sums.values, scores)


def _add_codes(
    shape: Shape, table, tile: KeyTile, m: int, word: int, fragments, sums: Sums, third_bit
) -> None:
    selector, found = local(4, "uint32"), local(4, "uint32")
    bytes_ = len(shape.key.tables)
    for half in range(2 if shape.key.upper else 1):
        for r in range(2):
            codes = _nibbles(shape, tile, 2 * m + r, word, third_bit)
            if half:
                codes = T.bitwise_xor(codes, u32(UPPER))
            store(selector, codes, r)
            store(selector, T.shift_right(selector[r], u32(16)), 2 + r)
        for byte in range(bytes_):
            at = 2 * (half * bytes_ + byte)
            for i in range(4):
                ptx("prmt.b32", found[i], table[at], table[at + 1], selector[i])
            for part in range(shape.parts):
                if byte + part < 2:
                    sums.add(
                        byte + part,
                        _SIGNED,
                        [found[i] for i in range(4)],
                        [fragments[word - word % 2, part, word % 2 * 2 + e] for e in range(2)],
                    )


def _nibbles(shape: Shape, tile: KeyTile, octet: int, word: int, third_bit):
    """Eight codes of K, one a nibble."""
    codec = shape.spec.cache_format.key
    if shape.key_planes[0] == 4:
        return code_nibbles(codec, tile.codes[octet, word], 0, None)
    codes, third = tile.codes[octet, word // 2], None
    if third_bit is not None:
        third = T.shift_right(tile.codes[octet, shape.key_plane_words + word // 2], third_bit)
    return code_nibbles(codec, codes, word % 2, third)


def _add_signs(shape: Shape, tile: KeyTile, m: int, word: int, fragments, sums: Sums) -> None:
    """Two words, ``word - 1`` and ``word``."""
    bits = local(4, "uint32")
    for nibble, mask in enumerate(_SIGN_MASKS):
        for i in range(4):
            packed = tile.codes[2 * m + i % 2, word - 1 + i // 2]
            store(bits, T.bitwise_and(packed, u32(mask)), i)
        for part in range(shape.parts):
            sums.add(
                2 * part + nibble,
                _UNSIGNED,
                [bits[i] for i in range(4)],
                [fragments[word, part, 2 * nibble + e] for e in range(2)],
            )


def _number(sums: list):
    """The float of sums in steps of 256, which start from `MAGIC`."""
    values = [as_float(value) - f32(MAGIC) for value in sums]
    return functools.reduce(lambda high, low: high * f32(256) + low, values)


def _combine(shape: Shape, query: Query, tile: KeyTile, m: int, codes, signs, scores) -> None:
    """Apply the scales of a token; see the head of this file."""
    dtype = shape.spec.dtype
    row = local((2, 2), "float32")
    for r in range(2):
        weight = None
        if shape.residual:
            residual = high_half(dtype, tile.metas[2 * m + r])
            weight = let(residual * f32(1 / (64 * shape.centroid)))
        for j in range(2):
            e = 2 * r + j
            code = _number([codes[n, e] for n in range(shape.code_sums)])
            if weight is None:
                store(row, code, r, j)
                continue
            both = [
                signs[2 * part + 1, e] + signs[2 * part, e] * u32(16) for part in range(shape.parts)
            ]
            store(row, weight * _number(both) + code, r, j)
    if not shape.packed:
        for r in range(2):
            norm = let(low_half(dtype, tile.metas[2 * m + r]) * query.row_weight[0])
            for j in range(2):
                store(scores, row[r, j] * norm, 2 * m + r, j)
        return
    mine = let(T.Select(query.low_bytes, tile.metas[2 * m + 1], tile.metas[2 * m]))
    norm = let(low_half(dtype, mine) * query.row_weight[0])
    for j in range(2):
        kept = let(T.Select(query.low_bytes, row[1, j], row[0, j]))
        given = let(T.Select(query.low_bytes, row[0, j], row[1, j]))
        taken = shuffle_xor(given, 2)
        store(scores, (kept + query.other_weight[0] * taken) * norm, m, j)
