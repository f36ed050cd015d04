r"""``decode`` on CPUs: the loops of ``kernels.decode``'s equation.

One parallel loop over (sequence, KV head, split): rotate the group's queries, walk ``tile`` tokens
at a time, decode a row of K or V once for all heads of the group, online softmax. A second parallel
loop over query heads merges the splits and rotates back.

K rows are decoded without their norm, which multiplies the score. With ``lookup`` eight codes
become values at once: a row has eight keys of either residual's sign, a register each, and V's four
levels fill another twice.
"""

from __future__ import annotations

import dataclasses
import math

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.blocks import select
from tq_tvm.spec import CacheSpec

__all__ = ["DecodeCpuConfig", "decode_cpu"]

_NEGATIVE = -1e30
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class DecodeCpuConfig:
    """The decisions of one decode kernel; ``schedules/decode.py`` says what each one trades."""

    tile: int
    vector: int
    unroll: int
    lookup: int


_LANES = 8
"""Floats of an AVX2 register: the centroids of K."""


def _look_up(table, codes):
    """``table[code]`` by the three low bits of every code: one AVX2 instruction."""
    at = T.Ramp(0, 1, _LANES)
    return T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", table[at], codes)


def decode_cpu(spec: CacheSpec, config: DecodeCpuConfig) -> PrimFunc:
    """The TensorIR of ``decode`` for one configuration, all sizes dynamic."""
    D, HQ, HK, PS, dtype = (
        spec.head_dim,
        spec.num_q_heads,
        spec.num_kv_heads,
        spec.page_size,
        spec.dtype,
    )
    G = spec.group_size
    bshd = spec.layout == "bshd"
    TILE = config.tile
    VEC = min(config.vector, D // 4)
    STEPS = D.bit_length() - 1
    RSQRT = D**-0.5
    key, value = spec.cache_format.key, spec.cache_format.value
    key_levels = tuple(c * RSQRT for c in key.centroids)
    value_levels = tuple(c * RSQRT for c in value.centroids)
    head_loop = T.unroll if config.unroll else T.serial
    LOOKUP = bool(config.lookup)

    def shifted(codes, bits):
        wide = T.cast(codes, "int32x8")
        return T.shift_right(wide, T.Broadcast(T.int32(bits), _LANES))

    def key_row(above, below, codes, bits):
        """Eight values of K, without their norm."""
        wide = shifted(codes, bits)
        sign = T.bitwise_and(wide, T.Broadcast(T.int32(8), _LANES))
        positive = T.NE(sign, T.Broadcast(T.int32(0), _LANES))
        return T.Select(positive, _look_up(above, wide), _look_up(below, wide))

    def at(page, offset, head, j):
        return [page, offset, head, j] if bshd else [page, head, offset, j]

    def key_value(code, residual):
        return select(T.bitwise_and(code, 7), key_levels) + T.Select(code >= 8, residual, -residual)

    @T.inline
    def butterflies(x, y, row):
        """Unscaled Hadamard transform of ``x[row]``; ``y`` is scratch."""
        for s in T.unroll(STEPS):
            for i in T.serial(D):
                y[i] = x[row, i]
            for i in T.serial(D):
                x[row, i] = T.Select(
                    T.bitwise_and(T.shift_right(i, s), 1) == 0,
                    y[i] + y[T.bitwise_xor(i, T.shift_left(1, s))],
                    y[T.bitwise_xor(i, T.shift_left(1, s))] - y[i],
                )

    @T.prim_func(s_tir=True)
    def main(
        q: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        workspace: T.handle,
        out: T.handle,
        num_splits: T.int32,
        sm_scale: T.float32,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        b = T.int64()
        w = T.int64()
        p = T.int64()
        ws = T.int64()
        Q = T.match_buffer(q, (b, HQ, D), dtype, align=16)
        cache_args = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        KC = T.meta_var(cache_args[0].buffer)
        VC = T.meta_var(cache_args[1].buffer)
        KM = T.meta_var(cache_args[2].buffer)
        VM = T.meta_var(cache_args[3].buffer)
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        WS = T.match_buffer(workspace, (ws,), "float32", align=16)
        OUT = T.match_buffer(out, (b, HQ, D), dtype, align=16)
        for task in T.parallel(b * HK * num_splits):
            bz: T.let = T.truncdiv(task, HK * num_splits)
            h: T.let = T.truncmod(T.truncdiv(task, num_splits), HK)
            split: T.let = T.cast(T.truncmod(task, num_splits), "int32")
            query = T.alloc_buffer((G, D), "float32", scope="local")
            scratch = T.alloc_buffer((D,), "float32", scope="local")
            row = T.alloc_buffer((D,), "float32", scope="local")
            partial = T.alloc_buffer((VEC,), "float32", scope="local")
            score = T.alloc_buffer((G, TILE), "float32", scope="local")
            acc = T.alloc_buffer((G, D), "float32", scope="local")
            top = T.alloc_buffer((G,), "float32", scope="local")
            total = T.alloc_buffer((G,), "float32", scope="local")
            levels = T.alloc_buffer((2, _LANES), "float32", scope="local")
            above = T.alloc_buffer((_LANES,), "float32", scope="local")
            below = T.alloc_buffer((_LANES,), "float32", scope="local")
            value_table = T.alloc_buffer((_LANES,), "float32", scope="local")
            if LOOKUP:
                for j in T.unroll(_LANES):
                    levels[0, j] = select(j, key_levels)
                    # Twice the four levels: the third bit of a selector is the next code's.
                    value_table[j] = select(j % 4, value_levels)
            for i in T.serial(G):
                for j in T.serial(D):
                    query[i, j] = T.cast(Q[bz, h * G + i, j], "float32")
                butterflies(query, scratch, i)
                for j in T.serial(D):
                    query[i, j] = query[i, j] * (sm_scale * T.float32(_LOG2_E * RSQRT))
                    acc[i, j] = T.float32(0)
                top[i] = T.float32(_NEGATIVE)
                total[i] = T.float32(0)
            length: T.int32 = SL[bz]
            tiles: T.int32 = T.truncdiv(length + (TILE - 1), TILE)
            share: T.int32 = T.truncdiv(tiles + num_splits - 1, num_splits)
            tile: T.int32 = split * share
            last: T.int32 = T.min(tiles, (split + 1) * share)
            while tile < last:
                count: T.int32 = T.min(TILE, length - tile * TILE)
                for r in T.serial(count):
                    position: T.let = tile * TILE + r
                    page = T.cast(BT[bz, position // PS], "int64")
                    off: T.let = position % PS
                    norm = T.cast(KM[tuple(at(page, off, h, 0))], "float32")
                    residual = T.cast(KM[tuple(at(page, off, h, 1))], "float32")
                    if LOOKUP:
                        for v in T.vectorized(_LANES):
                            above[v] = levels[0, v] + residual
                        for v in T.vectorized(_LANES):
                            below[v] = levels[0, v] - residual
                        for jo in T.unroll(D // 2 // _LANES):
                            for upper in T.unroll(2):
                                row[T.Ramp(D // 2 * upper + jo * _LANES, 1, _LANES)] = key_row(
                                    above,
                                    below,
                                    KC[tuple(at(page, off, h, T.Ramp(jo * _LANES, 1, _LANES)))],
                                    4 * upper,
                                )
                    else:
                        for jo in T.serial(D // 2 // VEC):
                            for v in T.vectorized(VEC):
                                row[jo * VEC + v] = key_value(
                                    T.bitwise_and(
                                        T.cast(KC[tuple(at(page, off, h, jo * VEC + v))], "int32"),
                                        15,
                                    ),
                                    residual,
                                )
                            for v in T.vectorized(VEC):
                                row[D // 2 + jo * VEC + v] = key_value(
                                    T.shift_right(
                                        T.cast(KC[tuple(at(page, off, h, jo * VEC + v))], "int32"),
                                        4,
                                    ),
                                    residual,
                                )
                    for i in head_loop(G):
                        for v in T.vectorized(VEC):
                            partial[v] = T.float32(0)
                        for jo in T.unroll(D // VEC):
                            for v in T.vectorized(VEC):
                                partial[v] = partial[v] + query[i, jo * VEC + v] * row[jo * VEC + v]
                        dot = T.float32(0)
                        for v in T.unroll(VEC):
                            dot = dot + partial[v]
                        score[i, r] = dot * norm
                for i in T.serial(G):
                    peak = top[i]
                    for r in T.serial(count):
                        peak = T.max(peak, score[i, r])
                    rescale = T.exp2(top[i] - peak)
                    top[i] = peak
                    total[i] = total[i] * rescale
                    for jo in T.serial(D // VEC):
                        for v in T.vectorized(VEC):
                            acc[i, jo * VEC + v] = acc[i, jo * VEC + v] * rescale
                    for r in T.serial(count):
                        score[i, r] = T.exp2(score[i, r] - peak)
                        total[i] = total[i] + score[i, r]
                for r in T.serial(count):
                    position2: T.let = tile * TILE + r
                    page2 = T.cast(BT[bz, position2 // PS], "int64")
                    off2: T.let = position2 % PS
                    norm2 = T.cast(VM[tuple(at(page2, off2, h, 0))], "float32")
                    if LOOKUP:
                        for part in T.unroll(4):
                            for jo in T.unroll(D // 4 // _LANES):
                                row[T.Ramp(D // 4 * part + jo * _LANES, 1, _LANES)] = T.Broadcast(
                                    norm2, _LANES
                                ) * _look_up(
                                    value_table,
                                    shifted(
                                        VC[
                                            tuple(
                                                at(page2, off2, h, T.Ramp(jo * _LANES, 1, _LANES))
                                            )
                                        ],
                                        2 * part,
                                    ),
                                )
                    for part in T.unroll(0 if LOOKUP else 4):
                        for jo in T.serial(D // 4 // VEC):
                            for v in T.vectorized(VEC):
                                row[part * (D // 4) + jo * VEC + v] = norm2 * select(
                                    T.bitwise_and(
                                        T.shift_right(
                                            T.cast(
                                                VC[tuple(at(page2, off2, h, jo * VEC + v))],
                                                "int32",
                                            ),
                                            2 * part,
                                        ),
                                        3,
                                    ),
                                    value_levels,
                                )
                    for i in head_loop(G):
                        for jo in T.unroll(D // VEC):
                            for v in T.vectorized(VEC):
                                acc[i, jo * VEC + v] = (
                                    acc[i, jo * VEC + v] + score[i, r] * row[jo * VEC + v]
                                )
                tile = tile + 1
            for i in T.serial(G):
                target: T.let = (bz * HQ + h * G + i) * num_splits + split
                stats: T.let = b * HQ * num_splits * D
                for j in T.serial(D):
                    WS[target * D + j] = acc[i, j]
                WS[stats + target * 2] = top[i]
                WS[stats + target * 2 + 1] = total[i]
        for line in T.parallel(b * HQ):
            stats2: T.let = b * HQ * num_splits * D
            merged = T.alloc_buffer((1, D), "float32", scope="local")
            scratch2 = T.alloc_buffer((D,), "float32", scope="local")
            best = T.float32(_NEGATIVE)
            weight = T.float32(0)
            for j in T.serial(D):
                merged[0, j] = T.float32(0)
            for s in T.serial(num_splits):
                best = T.max(best, WS[stats2 + (line * num_splits + s) * 2])
            for s in T.serial(num_splits):
                factor = T.exp2(WS[stats2 + (line * num_splits + s) * 2] - best)
                weight = weight + factor * WS[stats2 + (line * num_splits + s) * 2 + 1]
                for j in T.serial(D):
                    merged[0, j] = merged[0, j] + factor * WS[(line * num_splits + s) * D + j]
            butterflies(merged, scratch2, 0)
            inverse = T.Select(weight > T.float32(0), T.float32(RSQRT) / weight, T.float32(0))
            for j in T.serial(D):
                OUT[T.truncdiv(line, HQ), T.truncmod(line, HQ), j] = T.cast(
                    merged[0, j] * inverse, dtype
                )

    return main
