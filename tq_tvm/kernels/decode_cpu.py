r"""``decode`` on CPUs: the loops of ``kernels.decode``'s equation, for every format.

One parallel loop over (sequence, KV head, split): rotate the group's queries, walk ``tile`` tokens
at a time, decode a row of K or V once for all heads of the group, online softmax. A second parallel
loop over query heads merges the splits and rotates back.

K rows are decoded without their first scale, which multiplies the score. With ``lookup``, for k4v2
alone, eight codes become values at once: a row has eight keys of either residual's sign, a register
each, and V's four levels fill another twice.

A spec's window: the newest tokens' rows come from the sequence's ring, position p from row
p % window, rotated and in the model's dtype (``fill`` leaves them there).

    ============  ================================  =======  =========================
    name          shape                             dtype    use
    ============  ================================  =======  =========================
    k_window      [S, N, HK, D]                     dtype    in, N = window
    v_window      [S, N, HK, DV]                    dtype    in
    window_slots  [B], ring of each sequence        int32    in
    ============  ================================  =======  =========================
"""

from __future__ import annotations

import dataclasses
import math

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.formats import hadamard_factors
from tq_tvm.kernels import pages
from tq_tvm.kernels.blocks import paley_rows, rotation_scale, select, sign_of
from tq_tvm.kernels.codecs import read_row
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
    DV = spec.value_dim
    LONGER = max(D, DV)
    WINDOW = spec.window
    WINDOWED = WINDOW > 0
    VEC = min(config.vector, D // 4)
    VEC_V = min(config.vector, DV // 4)
    key, value = spec.cache_format.key, spec.cache_format.value
    ROTATION = spec.cache_format.rotation
    RSQRT = rotation_scale(ROTATION, D)
    RSQRT_V = rotation_scale(ROTATION, DV)
    key_levels = tuple(c * D**-0.5 for c in key.centroids)
    value_levels = tuple(c * DV**-0.5 for c in value.centroids)
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

    def row_at(page, offset, head):
        return lambda j: at(page, offset, head, j)

    def same(value):
        return value

    def times(factor):
        return lambda value: factor * value

    def signed(value, j, dim):
        return value * sign_of(j, dim) if ROTATION == "signed_hadamard" else value

    def steps(dim):
        """Butterflies of a rotation; what is left of it is `paley`'s."""
        return 0 if ROTATION == "none" else hadamard_factors(dim)[-1].bit_length() - 1

    @T.inline
    def butterflies(x, y, row, dim):
        """Unscaled Hadamard transform of ``x[row]``; ``y`` is scratch."""
        for s in T.unroll(steps(dim)):
            for i in T.serial(dim):
                y[i] = x[row, i]
            for i in T.serial(dim):
                x[row, i] = T.Select(
                    T.bitwise_and(T.shift_right(i, s), 1) == 0,
                    y[i] + y[T.bitwise_xor(i, T.shift_left(1, s))],
                    y[T.bitwise_xor(i, T.shift_left(1, s))] - y[i],
                )

    def paley(x, y, row, dim):
        """The factors of the transform that are no power of two."""
        *orders, inner = hadamard_factors(dim)
        for order in reversed(orders if ROTATION != "none" else []):
            with I.serial(0, dim) as i:
                I.buffer_store(y, x[row, i], [i])
            with I.serial(0, dim // (order * inner)) as outer, I.serial(0, inner) as low:
                places = [outer * (order * inner) + j * inner + low for j in range(order)]
                sums = paley_rows(order, [I.bind(y[c]) for c in places])
                for c, value in zip(places, sums, strict=True):
                    I.buffer_store(x, value, [row, c])
            inner *= order

    def ring_row(ring, sequence, position, head, row, dim):
        """A row of the window into ``row``."""
        with I.serial(0, dim) as j:
            value = ring[sequence, position % WINDOW, head, j]
            I.buffer_store(row, T.cast(value, "float32"), [j])

    @T.inline
    def attend(Q, KC, VC, KM, VM, BT, SL, WS, OUT, KW, VW, RING, b, num_splits, sm_scale):
        for task in T.parallel(b * HK * num_splits):
            bz: T.let = T.truncdiv(task, HK * num_splits)
            h: T.let = T.truncmod(T.truncdiv(task, num_splits), HK)
            split: T.let = T.cast(T.truncmod(task, num_splits), "int32")
            query = T.alloc_buffer((G, D), "float32", scope="local")
            scratch = T.alloc_buffer((LONGER,), "float32", scope="local")
            row = T.alloc_buffer((LONGER,), "float32", scope="local")
            partial = T.alloc_buffer((VEC,), "float32", scope="local")
            score = T.alloc_buffer((G, TILE), "float32", scope="local")
            acc = T.alloc_buffer((G, DV), "float32", scope="local")
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
                    query[i, j] = signed(T.cast(Q[bz, h * G + i, j], "float32"), j, D)
                butterflies(query, scratch, i, D)
                paley(query, scratch, i, D)
                for j in T.serial(D):
                    query[i, j] = query[i, j] * (sm_scale * T.float32(_LOG2_E * RSQRT))
                    if D == DV:
                        acc[i, j] = T.float32(0)
                if D != DV:
                    for j in T.serial(DV):
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
                    if bool(key.meta):
                        norm = T.cast(KM[tuple(at(page, off, h, 0))], "float32")
                    else:
                        norm = KM[0] if key.tensor_scale else T.float32(1)
                    if len(key.meta) == 2:
                        residual = T.cast(KM[tuple(at(page, off, h, 1))], "float32")
                    else:
                        residual = T.meta_var(None)
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
                    elif WINDOWED:
                        if position >= length - WINDOW:
                            ring_row(KW, RING[bz], position, h, row, D)
                            norm = T.float32(1)
                        else:
                            read_row(key, D, KC, row_at(page, off, h), row, VEC, residual, same)
                    else:
                        read_row(key, D, KC, row_at(page, off, h), row, VEC, residual, same)
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
                    for jo in T.serial(DV // VEC_V):
                        for v in T.vectorized(VEC_V):
                            acc[i, jo * VEC_V + v] = acc[i, jo * VEC_V + v] * rescale
                    for r in T.serial(count):
                        score[i, r] = T.exp2(score[i, r] - peak)
                        total[i] = total[i] + score[i, r]
                for r in T.serial(count):
                    position2: T.let = tile * TILE + r
                    page2 = T.cast(BT[bz, position2 // PS], "int64")
                    off2: T.let = position2 % PS
                    if bool(value.meta):
                        norm2 = T.cast(VM[tuple(at(page2, off2, h, 0))], "float32")
                    else:
                        norm2 = VM[0] if value.tensor_scale else T.float32(1)
                    if len(value.meta) == 2:
                        zero = T.cast(VM[tuple(at(page2, off2, h, 1))], "float32")
                    else:
                        zero = T.meta_var(None)
                    if LOOKUP:
                        for part in T.unroll(4):
                            for jo in T.unroll(DV // 4 // _LANES):
                                row[T.Ramp(DV // 4 * part + jo * _LANES, 1, _LANES)] = T.Broadcast(
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
                    if WINDOWED:
                        if position2 >= length - WINDOW:
                            ring_row(VW, RING[bz], position2, h, row, DV)
                        else:
                            read_row(
                                value,
                                DV,
                                VC,
                                row_at(page2, off2, h),
                                row,
                                VEC_V,
                                zero,
                                times(norm2),
                            )
                    else:
                        read_row(
                            value, DV, VC, row_at(page2, off2, h), row, VEC_V, zero, times(norm2),
                            0 if LOOKUP else None,
                        )  # fmt: skip
                    for i in head_loop(G):
                        for jo in T.unroll(DV // VEC_V):
                            for v in T.vectorized(VEC_V):
                                acc[i, jo * VEC_V + v] = (
                                    acc[i, jo * VEC_V + v] + score[i, r] * row[jo * VEC_V + v]
                                )
                tile = tile + 1
            for i in T.serial(G):
                target: T.let = (bz * HQ + h * G + i) * num_splits + split
                stats: T.let = b * HQ * num_splits * DV
                for j in T.serial(DV):
                    WS[target * DV + j] = acc[i, j]
                WS[stats + target * 2] = top[i]
                WS[stats + target * 2 + 1] = total[i]
        for line in T.parallel(b * HQ):
            stats2: T.let = b * HQ * num_splits * DV
            merged = T.alloc_buffer((1, DV), "float32", scope="local")
            scratch2 = T.alloc_buffer((DV,), "float32", scope="local")
            best = T.float32(_NEGATIVE)
            weight = T.float32(0)
            for j in T.serial(DV):
                merged[0, j] = T.float32(0)
            for s in T.serial(num_splits):
                best = T.max(best, WS[stats2 + (line * num_splits + s) * 2])
            for s in T.serial(num_splits):
                factor = T.exp2(WS[stats2 + (line * num_splits + s) * 2] - best)
                weight = weight + factor * WS[stats2 + (line * num_splits + s) * 2 + 1]
                for j in T.serial(DV):
                    merged[0, j] = merged[0, j] + factor * WS[(line * num_splits + s) * DV + j]
            butterflies(merged, scratch2, 0, DV)
            paley(merged, scratch2, 0, DV)
            inverse = T.Select(weight > T.float32(0), T.float32(RSQRT_V) / weight, T.float32(0))
            for j in T.serial(DV):
                OUT[T.truncdiv(line, HQ), T.truncmod(line, HQ), j] = T.cast(
                    signed(merged[0, j] * inverse, j, DV), dtype
                )

    if WINDOWED:

        @T.prim_func(s_tir=True)
        def windowed(
            q: T.handle,
            k_cache: T.handle,
            v_cache: T.handle,
            k_meta: T.handle,
            v_meta: T.handle,
            block_table: T.handle,
            seq_lens: T.handle,
            k_window: T.handle,
            v_window: T.handle,
            window_slots: T.handle,
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
            KM = T.meta_var(pages.matched_buffer(cache_args[2]))
            VM = T.meta_var(pages.matched_buffer(cache_args[3]))
            BT = T.match_buffer(block_table, (b, w), "int32", align=4)
            SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
            rings = T.int64()
            KW = T.match_buffer(k_window, (rings, WINDOW, HK, D), dtype, align=16)
            VW = T.match_buffer(v_window, (rings, WINDOW, HK, DV), dtype, align=16)
            RING = T.match_buffer(window_slots, (b,), "int32", align=4)
            WS = T.match_buffer(workspace, (ws,), "float32", align=16)
            OUT = T.match_buffer(out, (b, HQ, DV), dtype, align=16)
            attend(Q, KC, VC, KM, VM, BT, SL, WS, OUT, KW, VW, RING, b, num_splits, sm_scale)

        return windowed

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
        KM = T.meta_var(pages.matched_buffer(cache_args[2]))
        VM = T.meta_var(pages.matched_buffer(cache_args[3]))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        WS = T.match_buffer(workspace, (ws,), "float32", align=16)
        OUT = T.match_buffer(out, (b, HQ, DV), dtype, align=16)
        attend(Q, KC, VC, KM, VM, BT, SL, WS, OUT, Q, Q, SL, b, num_splits, sm_scale)

    return main
