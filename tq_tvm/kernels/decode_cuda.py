r"""``decode`` on NVIDIA GPUs: the threads and instructions of ``kernels.decode``'s equation.

Two launches. The first, one CTA a (sequence, KV head and tile of 8 query heads, split):

1. Rotates and quantises its queries to 16 bits, two signed bytes a value.
2. Every warp walks its own tiles of ``tile`` tokens with an online softmax of its own; nothing in
   that loop synchronises warps. A tile's bytes are fetched ``depth`` tiles ahead into registers.

   K never becomes floating point. ``prmt`` maps four 3-bit codes to four signed bytes of a table
   held in a register: the packed nibbles, sign bits cleared, are its selector. Centroids have 16
   bits, in two tables. The sign bits are a second, unsigned operand. With tokens as the M side and
   heads as the N side of ``mma.m16n8k32``::

       hh = sum c_hi q_hi      mid = sum c_hi q_lo + c_lo q_hi       (c_lo q_lo is below 2^-15)
       dh = sum s q_hi         dl  = sum s q_lo                      (s = 128 where the sign is +)
       score = n (CS (256 hh + mid) + g ((256 dh + dl) / 64 - sum q))

   The order of D inside the contraction is free: the queries are permuted once to the order in
   which the bytes of K arrive.

   V: the four levels, suitably scaled, are halves that share their low byte (0x3C7E, 0x437E and
   their negatives; the ratio is right to 6e-5), so one ``prmt`` finds the high bytes of four codes
   and one more operation completes two halves. V's norm is folded into the softmax weight, and
   normalised by the largest norm seen, so that weights neither overflow nor lose bits in half
   precision whatever the scale of V. Weights go from the score fragment to the mma operand by
   ``movmatrix``.
3. Merges its warps and writes (sum of w v, max, sum of w) to the workspace.

The second, one warp a query head, merges the splits and rotates back.

Integer operations a value, main loop: K 1.1 (mask and shift 0.25, two table look-ups 0.5, signs
0.38), V 1.1 (``prmt`` 0.63, masks and shifts 0.5).
"""

from __future__ import annotations

import dataclasses
import math

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.spec import CacheSpec

__all__ = ["DecodeConfig", "decode_cuda", "shared_bytes"]

HEAD_TILE = 8
"""Query heads of a CTA: the N side of the tensor core instructions."""

_S8 = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
_U8 = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
_F16 = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
_TRANSPOSE = "movmatrix.sync.aligned.m8n8.trans.b16"
_FULL_SCALE = 127 * 256

_V_LEVELS = 0x433CBCC3
_V_LOW = 0x7E
_V_SCALE = (0.4527808 / (1150 / 1024) + 1.5104176 / (1918 / 512)) / 2

_NEGATIVE = -1e30
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The decisions of one decode kernel; ``schedules/decode.py`` says what each one trades."""

    warps: int
    tile: int
    depth: int
    min_ctas: int
    query_in_shared: int


def shared_bytes(config: DecodeConfig, head_dim: int) -> int:
    """Static shared memory of the first launch."""
    queries = 2 * HEAD_TILE * head_dim + 8 * HEAD_TILE
    fragments = 32 * head_dim * config.query_in_shared
    merge = config.warps * HEAD_TILE * (4 * (head_dim + 4) + 8)
    return queries + fragments + merge


def _key_tables(centroids: tuple[float, ...]) -> tuple[list[int], list[int], float]:
    """Words of the high and of the low bytes of the centroids, and the value of one unit."""
    unit = max(centroids) / _FULL_SCALE
    codes = [round(c / unit) for c in centroids]
    high = [(c + 128) >> 8 for c in codes]
    low = [c - (h << 8) for c, h in zip(codes, high, strict=True)]

    def words(values: list[int]) -> list[int]:
        return [
            sum((v & 0xFF) << (8 * i) for i, v in enumerate(values[at : at + 4])) for at in (0, 4)
        ]

    return words(high), words(low), unit


def _u32(value: int):
    return T.uint32(value)


def _prmt(a, b, selector):
    return T.call_pure_extern("uint32", "__byte_perm", a, b, selector)


def _shuffle_xor(value, mask: int):
    return T.cuda.__shfl_xor_sync(_u32(0xFFFFFFFF), value, mask, 32)


def decode_cuda(spec: CacheSpec, config: DecodeConfig) -> PrimFunc:
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
    NW, TILE, DEPTH = config.warps, config.tile, config.depth
    MINB, QSHARED = config.min_ctas, bool(config.query_in_shared)
    HT = -(-G // HEAD_TILE)  # head tiles of a KV head
    THREADS = NW * 32
    NI = TILE // 8  # octets of tokens a tile: rows of K a lane holds
    NM = TILE // 16  # score tiles of 16 tokens
    NV = TILE // 4  # tokens of V a lane holds
    KW = D // 32  # words of K codes a lane holds of a token
    VB = D // 32  # bytes of V codes a lane holds of a token
    VW = max(1, VB // 4)
    VX = D // 64  # pairs of V bytes
    OT = D // 16  # output tiles of 16 coordinates
    EL = D // 32  # query values of a lane
    SINGLE_PAGE = PS >= TILE
    high, low, unit = _key_tables(spec.cache_format.key.centroids)
    CENTROID = 256.0 * unit / math.sqrt(D)
    RSQRT = D**-0.5

    def at(page, offset, head, j):
        return [page, offset, head, j] if bshd else [page, head, offset, j]

    def half_to_float(bits):
        """Float of a 16-bit pattern in the low half of a word."""
        if dtype == "bfloat16":
            return T.reinterpret("float32", T.shift_left(bits, _u32(16)))
        return T.cast(T.reinterpret("float16", T.cast(bits, "uint16")), "float32")

    def low_half(word):
        return half_to_float(T.bitwise_and(word, _u32(0xFFFF)))

    def high_half(word):
        if dtype == "bfloat16":
            return T.reinterpret("float32", T.bitwise_and(word, _u32(0xFFFF0000)))
        return half_to_float(T.shift_right(word, _u32(16)))

    def as_float(x):
        return T.cast(T.cast(x, "int32"), "float32")

    @T.inline
    def butterflies(x, y, lane):
        """Unscaled Hadamard transform of a row, EL values a lane."""
        for s in T.unroll(EL.bit_length() - 1):
            for i in T.unroll(EL):
                y[i] = x[i]
            for i in T.unroll(EL):
                x[i] = T.Select(
                    T.bitwise_and(i, T.shift_left(1, s)) == 0,
                    y[i] + y[T.bitwise_xor(i, T.shift_left(1, s))],
                    y[T.bitwise_xor(i, T.shift_left(1, s))] - y[i],
                )
        for m in T.unroll(5):
            for i in T.unroll(EL):
                other = _shuffle_xor(x[i], T.shift_left(1, m))
                x[i] = T.Select(
                    T.bitwise_and(lane, T.shift_left(1, m)) != 0, other - x[i], x[i] + other
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
        for bz in T.thread_binding(b, thread="blockIdx.z"):
            for by in T.thread_binding(HK * HT, thread="blockIdx.y"):
                for bx in T.thread_binding(num_splits, thread="blockIdx.x"):
                    for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                        T.attr({"tirx.launch_bounds_min_blocks_per_sm": MINB})
                        warp: T.let = tx // 32
                        lane: T.let = tx % 32
                        g: T.let = lane // 4
                        t: T.let = lane % 4
                        h: T.let = by // HT
                        head0: T.let = by // HT * G + by % HT * HEAD_TILE
                        heads: T.let = T.min(HEAD_TILE, G - by % HT * HEAD_TILE)
                        query = T.alloc_buffer((2, HEAD_TILE, D // 4), "uint32", scope="shared")
                        query_unit = T.alloc_buffer((HEAD_TILE,), "float32", scope="shared")
                        query_sum = T.alloc_buffer((HEAD_TILE,), "float32", scope="shared")
                        merged = T.alloc_buffer((NW, HEAD_TILE, D + 4), "float32", scope="shared")
                        merged_max = T.alloc_buffer((NW, HEAD_TILE), "float32", scope="shared")
                        merged_sum = T.alloc_buffer((NW, HEAD_TILE), "float32", scope="shared")
                        seq_len: T.let = SL[bz]

                        # Queries: rotate, quantise to 16 bits, keep the two bytes apart.
                        x = T.alloc_buffer((EL,), "float32", scope="local")
                        y = T.alloc_buffer((EL,), "float32", scope="local")
                        code = T.alloc_buffer((EL,), "int32", scope="local")
                        word = T.alloc_buffer((2, max(1, EL // 4)), "uint32", scope="local")
                        for turn in T.serial(-(-HEAD_TILE // NW)):
                            hd: T.let = turn * NW + warp
                            if hd < HEAD_TILE:
                                for i in T.unroll(EL):
                                    x[i] = T.float32(0)
                                if hd < heads:
                                    for i in T.unroll(EL):
                                        x[i] = T.cast(Q[bz, head0 + hd, lane * EL + i], "float32")
                                butterflies(x, y, lane)
                                top = T.float32(0)
                                for i in T.unroll(EL):
                                    x[i] = x[i] * T.float32(RSQRT)
                                    top = T.max(top, T.fabs(x[i]))
                                for m in T.unroll(5):
                                    top = T.max(top, _shuffle_xor(top, T.shift_left(1, m)))
                                inverse = T.Select(
                                    top > T.float32(0), T.float32(_FULL_SCALE) / top, T.float32(0)
                                )
                                total = T.int32(0)
                                for i in T.unroll(EL):
                                    code[i] = T.call_pure_extern(
                                        "int32", "__float2int_rn", x[i] * inverse
                                    )
                                    total = total + code[i]
                                for m in T.unroll(5):
                                    total = total + _shuffle_xor(total, T.shift_left(1, m))
                                for j in T.unroll(max(1, EL // 4)):
                                    word[0, j] = _u32(0)
                                    word[1, j] = _u32(0)
                                for i in T.unroll(EL):
                                    upper: T.let = T.shift_right(code[i] + 128, 8)
                                    word[0, i // 4] = T.bitwise_or(
                                        word[0, i // 4],
                                        T.shift_left(
                                            T.cast(T.bitwise_and(upper, 255), "uint32"),
                                            T.cast(i % 4 * 8, "uint32"),
                                        ),
                                    )
                                    word[1, i // 4] = T.bitwise_or(
                                        word[1, i // 4],
                                        T.shift_left(
                                            T.cast(T.bitwise_and(code[i], 255), "uint32"),
                                            T.cast(i % 4 * 8, "uint32"),
                                        ),
                                    )
                                for part in T.unroll(2):
                                    if EL == 2:
                                        pair = _shuffle_xor(word[part, 0], 1)
                                        if lane % 2 == 0:
                                            query[part, hd, lane // 2] = T.bitwise_or(
                                                word[part, 0], T.shift_left(pair, _u32(16))
                                            )
                                    else:
                                        for j in T.unroll(EL // 4):
                                            query[part, hd, lane * (EL // 4) + j] = word[part, j]
                                if lane == 0:
                                    query_unit[hd] = top * T.float32(1.0 / _FULL_SCALE)
                                    query_sum[hd] = T.cast(total, "float32")
                        T.tvm_storage_sync("shared")

                        # Query fragments, in the order in which K's bytes arrive.
                        fragment = T.alloc_buffer((KW, 8), "uint32", scope="local")
                        for i in T.unroll(KW):
                            for part in T.unroll(2):
                                j: T.let = (t * (D // 8) + 4 * i) // 4
                                lower = query[part, g, j]
                                upper2 = query[part, g, j + D // 8]
                                fragment[i, part * 4 + 0] = _prmt(lower, upper2, _u32(0x5140))
                                fragment[i, part * 4 + 1] = _prmt(lower, upper2, _u32(0x7362))
                                fragment[i, part * 4 + 2] = lower
                                fragment[i, part * 4 + 3] = upper2
                        if QSHARED:
                            stash = T.alloc_buffer((KW, 2, 32, 4), "uint32", scope="shared")
                            if warp == 0:
                                for i in T.unroll(KW):
                                    for e in T.unroll(8):
                                        stash[i, e // 4, lane, e % 4] = fragment[i, e]
                            T.tvm_storage_sync("shared")

                        scale = T.alloc_buffer((2, 2), "float32", scope="local")
                        for j in T.unroll(2):
                            scale[j, 0] = query_unit[2 * t + j] * sm_scale * T.float32(_LOG2_E)
                            scale[j, 1] = query_sum[2 * t + j]
                        o = T.alloc_buffer((OT, 4), "float32", scope="local")
                        row_max = T.alloc_buffer((2,), "float32", scope="local")
                        row_sum = T.alloc_buffer((2,), "float32", scope="local")
                        for i in T.unroll(OT):
                            for j in T.unroll(4):
                                o[i, j] = T.float32(0)
                        for j in T.unroll(2):
                            row_max[j] = T.float32(_NEGATIVE)
                            row_sum[j] = T.float32(0)
                        v_unit: T.float32 = T.float32(1e30)

                        kt = T.alloc_buffer((DEPTH + 1, NI, KW), "uint32", scope="local")
                        vt = T.alloc_buffer((DEPTH + 1, NV, VW), "uint32", scope="local")
                        kmt = T.alloc_buffer((DEPTH + 1, NI), "uint32", scope="local")
                        vmt = T.alloc_buffer((DEPTH + 1, NI), dtype, scope="local")
                        vn = T.alloc_buffer((NI,), "float32", scope="local")
                        score = T.alloc_buffer((NI, 2), "float32", scope="local")
                        acc = T.alloc_buffer((4, 4), "uint32", scope="local")
                        weight = T.alloc_buffer((NI,), "uint32", scope="local")
                        A = T.alloc_buffer((2, 8 * VX), "uint32", scope="local")
                        peak = T.alloc_buffer((3,), "float32", scope="local")
                        rescale = T.alloc_buffer((2,), "float32", scope="local")
                        frag = T.alloc_buffer((8,), "uint32", scope="local")

                        # Mutable scalars, not T.let: a let is pasted into every use.
                        tiles: T.int32 = (seq_len + (TILE - 1)) // TILE
                        share: T.int32 = T.truncdiv(tiles + num_splits - 1, num_splits)
                        first: T.int32 = bx * share
                        last: T.int32 = T.min(tiles, first + share)

                        @T.inline
                        def load(stage, tile):
                            for i in T.unroll(NI):
                                octet: T.let = tile * TILE + 8 * i
                                # Octets past the end read the last page; the mask drops them.
                                slot: T.let = T.min(
                                    (tile * TILE if SINGLE_PAGE else octet) // PS,
                                    (seq_len - 1) // PS,
                                )
                                page = T.cast(BT[bz, slot], "int64")
                                off: T.let = octet % PS
                                for j in T.unroll(max(1, KW // 4)):
                                    kp: T.let = KC.ptr_to(
                                        at(page, off + g, h, t * (D // 8) + 16 * j)
                                    )
                                    if KW == 2:
                                        T.ptx["ld.global.nc.L1::no_allocate.v2.u32"](
                                            kt[stage, i, 0], kt[stage, i, 1], kp
                                        )
                                    else:
                                        T.ptx["ld.global.nc.L1::no_allocate.v4.u32"](
                                            kt[stage, i, 4 * j],
                                            kt[stage, i, 4 * j + 1],
                                            kt[stage, i, 4 * j + 2],
                                            kt[stage, i, 4 * j + 3],
                                            kp,
                                        )
                                T.ptx["ld.global.nc.u32"](
                                    kmt[stage, i], KM.ptr_to(at(page, off + g, h, 0))
                                )
                                vmt[stage, i] = VM[tuple(at(page, off + g, h, 0))]
                                for e in T.unroll(2):
                                    if VB == 2:
                                        vt[stage, 2 * i + e, 0] = T.bitwise_or(
                                            T.cast(
                                                VC[tuple(at(page, off + 2 * t + e, h, g * 2))],
                                                "uint32",
                                            ),
                                            T.shift_left(
                                                T.cast(
                                                    VC[
                                                        tuple(
                                                            at(page, off + 2 * t + e, h, g * 2 + 1)
                                                        )
                                                    ],
                                                    "uint32",
                                                ),
                                                _u32(8),
                                            ),
                                        )
                                    if VB == 4:
                                        T.ptx["ld.global.nc.u32"](
                                            vt[stage, 2 * i + e, 0],
                                            VC.ptr_to(at(page, off + 2 * t + e, h, g * 4)),
                                        )
                                    if VB == 8:
                                        T.ptx["ld.global.nc.v2.u32"](
                                            vt[stage, 2 * i + e, 0],
                                            vt[stage, 2 * i + e, 1],
                                            VC.ptr_to(at(page, off + 2 * t + e, h, g * 8)),
                                        )

                        @T.inline
                        def fetch_fragment(i):
                            if QSHARED:
                                for e in T.vectorized(4):
                                    frag[e] = stash[i, 0, lane, e]
                                for e in T.vectorized(4):
                                    frag[4 + e] = stash[i, 1, lane, e]
                            else:
                                for e in T.unroll(8):
                                    frag[e] = fragment[i, e]

                        @T.inline
                        def contract(mt, i):
                            """One word of K of 16 tokens against the queries."""
                            xk: T.let = kt[0, 2 * mt, i]
                            yk: T.let = kt[0, 2 * mt + 1, i]
                            xs: T.let = T.bitwise_and(xk, _u32(0x77777777))
                            ys: T.let = T.bitwise_and(yk, _u32(0x77777777))
                            xt: T.let = T.shift_right(xs, _u32(16))
                            yt: T.let = T.shift_right(ys, _u32(16))
                            T.ptx[_S8](
                                acc[0, 0],
                                acc[0, 1],
                                acc[0, 2],
                                acc[0, 3],
                                _prmt(_u32(high[0]), _u32(high[1]), xs),
                                _prmt(_u32(high[0]), _u32(high[1]), ys),
                                _prmt(_u32(high[0]), _u32(high[1]), xt),
                                _prmt(_u32(high[0]), _u32(high[1]), yt),
                                frag[0],
                                frag[1],
                                acc[0, 0],
                                acc[0, 1],
                                acc[0, 2],
                                acc[0, 3],
                            )
                            T.ptx[_S8](
                                acc[1, 0],
                                acc[1, 1],
                                acc[1, 2],
                                acc[1, 3],
                                _prmt(_u32(high[0]), _u32(high[1]), xs),
                                _prmt(_u32(high[0]), _u32(high[1]), ys),
                                _prmt(_u32(high[0]), _u32(high[1]), xt),
                                _prmt(_u32(high[0]), _u32(high[1]), yt),
                                frag[4],
                                frag[5],
                                acc[1, 0],
                                acc[1, 1],
                                acc[1, 2],
                                acc[1, 3],
                            )
                            T.ptx[_S8](
                                acc[1, 0],
                                acc[1, 1],
                                acc[1, 2],
                                acc[1, 3],
                                _prmt(_u32(low[0]), _u32(low[1]), xs),
                                _prmt(_u32(low[0]), _u32(low[1]), ys),
                                _prmt(_u32(low[0]), _u32(low[1]), xt),
                                _prmt(_u32(low[0]), _u32(low[1]), yt),
                                frag[0],
                                frag[1],
                                acc[1, 0],
                                acc[1, 1],
                                acc[1, 2],
                                acc[1, 3],
                            )
                            for part in T.unroll(2):
                                T.ptx[_U8](
                                    acc[2 + part, 0],
                                    acc[2 + part, 1],
                                    acc[2 + part, 2],
                                    acc[2 + part, 3],
                                    T.bitwise_and(T.shift_left(xk, _u32(4)), _u32(0x80808080)),
                                    T.bitwise_and(T.shift_left(yk, _u32(4)), _u32(0x80808080)),
                                    T.bitwise_and(xk, _u32(0x80808080)),
                                    T.bitwise_and(yk, _u32(0x80808080)),
                                    frag[4 * part + 2],
                                    frag[4 * part + 3],
                                    acc[2 + part, 0],
                                    acc[2 + part, 1],
                                    acc[2 + part, 2],
                                    acc[2 + part, 3],
                                )

                        it: T.int32 = first + warp
                        for stage in T.unroll(DEPTH):
                            if it + stage * NW < last:
                                load(stage, it + stage * NW)
                        while it < last:
                            if it + DEPTH * NW < last:
                                load(DEPTH, it + DEPTH * NW)
                            for mt in T.unroll(NM):
                                for e in T.unroll(4):
                                    for i in T.unroll(4):
                                        acc[e, i] = _u32(0)
                                for i in T.unroll(KW):
                                    fetch_fragment(i)
                                    contract(mt, i)
                                for r in T.unroll(2):
                                    norm: T.let = low_half(kmt[0, 2 * mt + r])
                                    residual: T.let = high_half(kmt[0, 2 * mt + r])
                                    for j in T.unroll(2):
                                        c: T.let = as_float(
                                            acc[0, 2 * r + j] * _u32(256) + acc[1, 2 * r + j]
                                        )
                                        s: T.let = as_float(
                                            acc[2, 2 * r + j] * _u32(256) + acc[3, 2 * r + j]
                                        )
                                        score[2 * mt + r, j] = (
                                            scale[j, 0]
                                            * norm
                                            * (
                                                T.float32(CENTROID) * c
                                                + residual * (s * T.float32(1 / 64) - scale[j, 1])
                                            )
                                        )
                            for i in T.unroll(NI):
                                vn[i] = T.cast(vmt[0, i], "float32")
                            if it * TILE + TILE > seq_len:
                                for i in T.unroll(NI):
                                    if it * TILE + g + 8 * i >= seq_len:
                                        score[i, 0] = T.float32(_NEGATIVE)
                                        score[i, 1] = T.float32(_NEGATIVE)
                                        vn[i] = T.float32(0)
                            peak[0] = score[0, 0]
                            peak[1] = score[0, 1]
                            peak[2] = vn[0]
                            for i in T.unroll(NI - 1):
                                peak[0] = T.max(peak[0], score[i + 1, 0])
                                peak[1] = T.max(peak[1], score[i + 1, 1])
                                peak[2] = T.max(peak[2], vn[i + 1])
                            # Seldom taken once the maxima have settled: no shuffle otherwise.
                            if (
                                T.cuda.any_sync(
                                    _u32(0xFFFFFFFF),
                                    T.cast(
                                        T.Or(
                                            T.Or(peak[0] > row_max[0], peak[1] > row_max[1]),
                                            peak[2] * v_unit > T.float32(1),
                                        ),
                                        "int32",
                                    ),
                                )
                                != 0
                            ):
                                for j in T.unroll(3):
                                    for m in T.unroll(3):
                                        peak[j] = T.max(
                                            peak[j], _shuffle_xor(peak[j], T.shift_left(4, m))
                                        )
                                unit_old = v_unit
                                if peak[2] * v_unit > T.float32(1):
                                    v_unit = T.float32(1) / peak[2]
                                for j in T.unroll(2):
                                    new_max = T.max(row_max[j], peak[j])
                                    rescale[j] = T.exp2(row_max[j] - new_max)
                                    row_max[j] = new_max
                                    row_sum[j] = row_sum[j] * rescale[j]
                                    rescale[j] = rescale[j] * (v_unit / unit_old)
                                for i in T.unroll(OT):
                                    for j in T.unroll(4):
                                        o[i, j] = o[i, j] * rescale[j % 2]
                            for i in T.unroll(NI):
                                p0 = T.exp2(score[i, 0] - row_max[0])
                                p1 = T.exp2(score[i, 1] - row_max[1])
                                row_sum[0] = row_sum[0] + p0
                                row_sum[1] = row_sum[1] + p1
                                vs: T.let = vn[i] * v_unit
                                packed = _u32(0)
                                T.ptx["cvt.rn.f16x2.f32"](packed, p1 * vs, p0 * vs)
                                T.ptx[_TRANSPOSE](weight[i], packed)
                            for ks in T.unroll(NM):
                                for pr in T.unroll(2):
                                    for xx in T.unroll(VX):
                                        X: T.let = _prmt(
                                            vt[0, ks * 4 + pr * 2, xx // 2],
                                            vt[0, ks * 4 + pr * 2 + 1, xx // 2],
                                            T.Select(xx % 2 == 1, _u32(0x7362), _u32(0x5140)),
                                        )
                                        even: T.let = T.bitwise_and(X, _u32(0x33333333))
                                        odd: T.let = T.bitwise_and(
                                            T.shift_right(X, _u32(2)), _u32(0x33333333)
                                        )
                                        for byte in T.unroll(2):
                                            re = _prmt(
                                                _u32(_V_LEVELS),
                                                _u32(_V_LEVELS),
                                                T.shift_right(even, T.cast(16 * byte, "uint32")),
                                            )
                                            ro = _prmt(
                                                _u32(_V_LEVELS),
                                                _u32(_V_LEVELS),
                                                T.shift_right(odd, T.cast(16 * byte, "uint32")),
                                            )
                                            A[pr, xx * 8 + byte] = _prmt(
                                                re, _u32(_V_LOW), _u32(0x2404)
                                            )
                                            A[pr, xx * 8 + 2 + byte] = _prmt(
                                                ro, _u32(_V_LOW), _u32(0x2404)
                                            )
                                            A[pr, xx * 8 + 4 + byte] = T.bitwise_or(
                                                T.bitwise_and(re, _u32(0xFF00FF00)),
                                                _u32(_V_LOW | _V_LOW << 16),
                                            )
                                            A[pr, xx * 8 + 6 + byte] = T.bitwise_or(
                                                T.bitwise_and(ro, _u32(0xFF00FF00)),
                                                _u32(_V_LOW | _V_LOW << 16),
                                            )
                                for ot in T.unroll(OT):
                                    T.ptx[_F16](
                                        o[ot, 0],
                                        o[ot, 1],
                                        o[ot, 2],
                                        o[ot, 3],
                                        A[0, 2 * ot],
                                        A[0, 2 * ot + 1],
                                        A[1, 2 * ot],
                                        A[1, 2 * ot + 1],
                                        weight[2 * ks],
                                        weight[2 * ks + 1],
                                        o[ot, 0],
                                        o[ot, 1],
                                        o[ot, 2],
                                        o[ot, 3],
                                    )
                            for stage in T.unroll(DEPTH):
                                for i in T.unroll(NI):
                                    for j in T.unroll(KW):
                                        kt[stage, i, j] = kt[stage + 1, i, j]
                                    kmt[stage, i] = kmt[stage + 1, i]
                                    vmt[stage, i] = vmt[stage + 1, i]
                                for i in T.unroll(NV):
                                    for j in T.unroll(VW):
                                        vt[stage, i, j] = vt[stage + 1, i, j]
                            it = it + NW

                        # Merge the warps of this CTA.
                        for j in T.unroll(2):
                            for m in T.unroll(3):
                                row_sum[j] = row_sum[j] + _shuffle_xor(
                                    row_sum[j], T.shift_left(4, m)
                                )
                            if g == 0:
                                merged_max[warp, 2 * t + j] = row_max[j]
                                merged_sum[warp, 2 * t + j] = row_sum[j]
                        T.tvm_storage_sync("shared")
                        for j in T.unroll(2):
                            rescale[j] = T.float32(_NEGATIVE)
                            for i in T.unroll(NW):
                                rescale[j] = T.max(rescale[j], merged_max[i, 2 * t + j])
                            rescale[j] = (
                                T.exp2(row_max[j] - rescale[j])
                                * T.float32(_V_SCALE * RSQRT)
                                / v_unit
                            )
                        for ot in T.unroll(OT):
                            for e in T.unroll(2):
                                for j in T.unroll(2):
                                    merged[
                                        warp,
                                        2 * t + j,
                                        VB * g
                                        + 2 * ((2 * ot + e) // 8)
                                        + e
                                        + D // 4 * (((2 * ot + e) % 8) // 2),
                                    ] = o[ot, 2 * e + j] * rescale[j]
                        T.tvm_storage_sync("shared")
                        for hd in T.serial(heads):
                            row: T.let = (T.cast(bz, "int64") * HQ + head0 + hd) * num_splits + bx
                            for cb in T.unroll(-(-D // THREADS)):
                                if cb * THREADS + tx < D:
                                    total2 = T.float32(0)
                                    for i in T.unroll(NW):
                                        total2 = total2 + merged[i, hd, cb * THREADS + tx]
                                    WS[row * D + cb * THREADS + tx] = total2
                        if tx < heads:
                            row2: T.let = (T.cast(bz, "int64") * HQ + head0 + tx) * num_splits + bx
                            stats: T.let = b * HQ * num_splits * D
                            top2 = T.float32(_NEGATIVE)
                            sum2 = T.float32(0)
                            for i in T.unroll(NW):
                                top2 = T.max(top2, merged_max[i, tx])
                            for i in T.unroll(NW):
                                sum2 = sum2 + merged_sum[i, tx] * T.exp2(merged_max[i, tx] - top2)
                            WS[stats + row2 * 2] = top2
                            WS[stats + row2 * 2 + 1] = sum2
        # Second launch: merge the splits, rotate back.
        for rb in T.thread_binding((b * HQ + 3) // 4, thread="blockIdx.x"):
            for tx2 in T.thread_binding(128, thread="threadIdx.x"):
                row3: T.let = rb * 4 + tx2 // 32
                lane2: T.let = tx2 % 32
                if row3 < b * HQ:
                    stats2: T.let = b * HQ * num_splits * D
                    x2 = T.alloc_buffer((EL,), "float32", scope="local")
                    y2 = T.alloc_buffer((EL,), "float32", scope="local")
                    top3 = T.float32(_NEGATIVE)
                    sum3 = T.float32(0)
                    for i in T.unroll(EL):
                        x2[i] = T.float32(0)
                    for s in T.serial(num_splits):
                        top3 = T.max(top3, WS[stats2 + (row3 * num_splits + s) * 2])
                    for s in T.serial(num_splits):
                        f: T.float32 = T.exp2(WS[stats2 + (row3 * num_splits + s) * 2] - top3)
                        sum3 = sum3 + f * WS[stats2 + (row3 * num_splits + s) * 2 + 1]
                        for i in T.unroll(EL):
                            x2[i] = x2[i] + f * WS[(row3 * num_splits + s) * D + lane2 * EL + i]
                    butterflies(x2, y2, lane2)
                    inverse2 = T.Select(sum3 > T.float32(0), T.float32(RSQRT) / sum3, T.float32(0))
                    for i in T.unroll(EL):
                        OUT[T.truncdiv(row3, HQ), T.truncmod(row3, HQ), lane2 * EL + i] = T.cast(
                            x2[i] * inverse2, dtype
                        )

    return main
