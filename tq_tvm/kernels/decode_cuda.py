r"""``decode`` on NVIDIA GPUs: the threads and instructions of ``kernels.decode``'s equation.

Two launches. The first, one CTA a (sequence, KV head and tile of 8 query heads, split):

1. Rotates and quantises its queries to 16 bits, two signed bytes a value.
2. Every warp walks its own tiles of ``tile`` tokens with an online softmax of its own; nothing in
   that loop synchronises warps. A tile's bytes are fetched ``depth`` tiles ahead into registers.

   K never becomes floating point. ``prmt`` maps four 3-bit codes to four signed bytes of a table
   held in registers: the packed nibbles, sign bits cleared, are its selector. The table has 8 bits
   a centroid for bfloat16 and 16 for float16 (``decode_tables``). The sign bits are a second,
   unsigned operand. With tokens as the M side of ``mma.m16n8k32``, and the two bytes of a query as
   two columns of the N side (groups of up to 4 heads) or as two operands (up to 8 heads)::

       c = 256 (codes q_hi) + codes q_lo       s = 256 (signs q_hi) + signs q_lo
       score = n (unit c + g (s / 64 - sum q) + offset sum q)

   The order of D inside the contraction is free: the queries are permuted once to the order in
   which the bytes of K arrive.

   V: the four levels, suitably scaled, are halves that share their low byte (0x3C7E, 0x437E and
   their negatives; the ratio is right to 6e-5), so one ``prmt`` finds the high bytes of four codes
   and one more completes two halves. V's norm is folded into the softmax weight, and normalised by
   the largest norm seen, so that weights neither overflow nor lose bits in half precision whatever
   the scale of V. Weights go from the score fragment to the mma operand by ``movmatrix``.
3. Merges its warps and writes (sum of w v, max, sum of w) to the workspace.

The second, one warp a query head, merges the splits and rotates back.

Main loop of 64 tokens and 4 query heads, D = 128, bfloat16, as compiled for sm_90a: 1155
instructions, 639 of them on the integer pipe (0.039 a value): look-ups and byte moves 280, masks
147, shifts 84; tensor core 64. Measured on an H200 at 64 x 8192: integer pipe 60 % busy, tensor
cores 19 %, 53 % of the issue slots, with 7 warps an SM.
"""

from __future__ import annotations

import dataclasses
import math

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.decode_tables import narrow_tables, wide_tables
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
    registers: int
    query_in_shared: int
    multiply_shifts: int


def shared_bytes(config: DecodeConfig, head_dim: int) -> int:
    """Static shared memory of the first launch."""
    queries = 2 * HEAD_TILE * head_dim + 8 * HEAD_TILE
    fragments = 32 * head_dim * config.query_in_shared
    merge = config.warps * HEAD_TILE * (4 * (head_dim + 4) + 8)
    return queries + fragments + merge


def _u32(value: int):
    return T.uint32(value)


def _prmt(a, b, selector):
    """Select bytes; ``__byte_perm`` masks its selector, so one that varies goes to ``prmt``."""
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
    MINB = 65536 // (NW * 32 * config.registers)  # CTAs that hold an SM to this many
    QSHARED = bool(config.query_in_shared)
    MULTIPLY = bool(config.multiply_shifts)
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
    NP = max(1, TILE // PS)  # pages a tile touches
    PACKED = min(G, HEAD_TILE) <= HEAD_TILE // 2  # columns: high bytes | low bytes of 4 heads
    PARTS = 1 if PACKED else 2  # operands that the two bytes of a query take
    FW = 4 * PARTS  # words of query fragments a word of K
    make_tables = narrow_tables if dtype == "bfloat16" else wide_tables
    key = make_tables(spec.cache_format.key.centroids)
    TABLES = len(key.tables)
    # The byte products are summed as q16 c8, q16 c16 / 256 or, PACKED, without the division.
    CENTROID = key.unit * (256.0 if TABLES == 2 and not PACKED else 1.0) / math.sqrt(D)
    OFFSET = key.offset / math.sqrt(D)
    RSQRT = D**-0.5
    CODES, SIGNS = 0, 2  # first accumulators of the centroids and of the signs

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
                        fragment = T.alloc_buffer((KW, FW), "uint32", scope="local")
                        for i in T.unroll(KW):
                            for part in T.unroll(PARTS):
                                j: T.let = (t * (D // 8) + 4 * i) // 4
                                byte_part: T.let = g // 4 if PACKED else part
                                column: T.let = g % 4 if PACKED else g
                                lower = query[byte_part, column, j]
                                upper2 = query[byte_part, column, j + D // 8]
                                fragment[i, part * 4 + 0] = _prmt(lower, upper2, _u32(0x5140))
                                fragment[i, part * 4 + 1] = _prmt(lower, upper2, _u32(0x7362))
                                fragment[i, part * 4 + 2] = lower
                                fragment[i, part * 4 + 3] = upper2
                        if QSHARED:
                            stash = T.alloc_buffer((KW, PARTS, 32, 4), "uint32", scope="shared")
                            if warp == 0:
                                for i in T.unroll(KW):
                                    for e in T.unroll(FW):
                                        stash[i, e // 4, lane, e % 4] = fragment[i, e]
                            T.tvm_storage_sync("shared")

                        scale = T.alloc_buffer((2, 2), "float32", scope="local")
                        for j in T.unroll(2):
                            owner: T.let = (2 * t + j) % 4 if PACKED else 2 * t + j
                            scale[j, 0] = query_unit[owner] * sm_scale * T.float32(_LOG2_E)
                            scale[j, 1] = query_sum[owner]
                        # The lanes of the high bytes weigh 256 times those of the low bytes.
                        byte_weight: T.let = (
                            T.Select(t < 2, T.float32(256), T.float32(1))
                            if PACKED
                            else T.float32(1)
                        )
                        code_weight: T.float32 = byte_weight * T.float32(CENTROID)
                        sign_weight: T.float32 = byte_weight * T.float32(1 / 64)
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
                        acc = T.alloc_buffer((6, 4), "uint32", scope="local")
                        codes = T.alloc_buffer((4,), "uint32", scope="local")
                        bytes_of = T.alloc_buffer((4,), "uint32", scope="local")
                        fields = T.alloc_buffer((4,), "uint32", scope="local")
                        weight = T.alloc_buffer((NI,), "uint32", scope="local")
                        A = T.alloc_buffer((2, 8 * VX), "uint32", scope="local")
                        peak = T.alloc_buffer((3,), "float32", scope="local")
                        rescale = T.alloc_buffer((2,), "float32", scope="local")
                        frag = T.alloc_buffer((2, FW), "uint32", scope="local")
                        row_of = T.alloc_buffer((3,), "float32", scope="local")
                        page_of = T.alloc_buffer((NP,), "int32", scope="local")

                        # Table words that the compiler cannot know: it would keep known ones in
                        # uniform registers, and copy them for every look-up.
                        unknown: T.let = T.cast(
                            _shuffle_xor(T.shift_right(seq_len, 31), 1), "uint32"
                        )
                        power = T.alloc_buffer((2,), "uint32", scope="local")
                        power[0] = T.bitwise_or(_u32(1 << 16), unknown)
                        power[1] = T.bitwise_or(_u32(1 << 30), unknown)
                        lookup = T.alloc_buffer((2 * TABLES + 2,), "uint32", scope="local")
                        lookup[0] = T.bitwise_or(_u32(key.tables[0][0]), unknown)
                        lookup[1] = T.bitwise_or(_u32(key.tables[0][1]), unknown)
                        lookup[2] = T.bitwise_or(_u32(_V_LEVELS), unknown)
                        lookup[3] = T.bitwise_or(_u32(_V_LOW), unknown)
                        if TABLES == 2:
                            lookup[4] = T.bitwise_or(_u32(key.tables[-1][0]), unknown)
                            lookup[5] = T.bitwise_or(_u32(key.tables[-1][1]), unknown)

                        # Mutable scalars, not T.let: a let is pasted into every use.
                        tiles: T.int32 = (seq_len + (TILE - 1)) // TILE
                        share: T.int32 = T.truncdiv(tiles + num_splits - 1, num_splits)
                        first: T.int32 = bx * share
                        last: T.int32 = T.min(tiles, first + share)

                        @T.inline
                        def find_pages(tile):
                            """Ahead of `load`, whose addresses wait for them."""
                            for i in T.unroll(NP):
                                # Pages past the end read the last one; the mask drops them.
                                page_of[i] = BT[
                                    bz, T.min(tile * TILE // PS + i, (seq_len - 1) // PS)
                                ]

                        @T.inline
                        def load(stage, tile):
                            for i in T.unroll(NI):
                                page: T.let = T.cast(page_of[8 * i // PS % NP], "int64")
                                off: T.let = (tile * TILE + 8 * i) % PS
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
                        def fetch_fragment(which, i):
                            if QSHARED:
                                for part in T.unroll(PARTS):
                                    for e in T.vectorized(4):
                                        frag[which, 4 * part + e] = stash[i, part, lane, e]
                            else:
                                for e in T.unroll(FW):
                                    frag[which, e] = fragment[i, e]

                        @T.inline
                        def multiply(op, n, a0, a1, a2, a3, b0, b1):
                            T.ptx[op](
                                acc[n, 0],
                                acc[n, 1],
                                acc[n, 2],
                                acc[n, 3],
                                a0,
                                a1,
                                a2,
                                a3,
                                b0,
                                b1,
                                acc[n, 0],
                                acc[n, 1],
                                acc[n, 2],
                                acc[n, 3],
                            )

                        @T.inline
                        def multiply_codes(n, table, words, part, which):
                            for i in T.unroll(4):
                                T.ptx["prmt.b32"](
                                    bytes_of[i],
                                    lookup[4 * table],
                                    lookup[4 * table + 1],
                                    words[i],
                                )
                            multiply(
                                _S8,
                                n,
                                bytes_of[0],
                                bytes_of[1],
                                bytes_of[2],
                                bytes_of[3],
                                frag[which, 4 * part],
                                frag[which, 4 * part + 1],
                            )

                        @T.inline
                        def contract(mt, pair):
                            """Two words of K of 16 tokens against the queries."""
                            for which in T.unroll(2):
                                fetch_fragment(which, 2 * pair + which)
                            for which in T.unroll(2):
                                for r in T.unroll(2):
                                    T.ptx["and.b32"](
                                        codes[r],
                                        kt[0, 2 * mt + r, 2 * pair + which],
                                        _u32(0x77777777),
                                    )
                                    if MULTIPLY:
                                        T.ptx["mul.hi.u32"](codes[2 + r], codes[r], power[0])
                                    else:
                                        codes[2 + r] = T.shift_right(codes[r], _u32(16))
                                for part in T.unroll(PARTS):
                                    multiply_codes(CODES + part, 0, codes, part, which)
                                if TABLES == 2:
                                    # Low bytes of both, the smallest product, are left out
                                    # where they would cost an instruction.
                                    multiply_codes(CODES + 1, 1, codes, 0, which)
                            for nibble in T.unroll(2):
                                for part in T.unroll(PARTS):
                                    mask: T.let = T.Select(
                                        nibble == 0, _u32(0x08080808), _u32(0x80808080)
                                    )
                                    multiply(
                                        _U8,
                                        SIGNS + 2 * nibble + part,
                                        T.bitwise_and(kt[0, 2 * mt, 2 * pair], mask),
                                        T.bitwise_and(kt[0, 2 * mt + 1, 2 * pair], mask),
                                        T.bitwise_and(kt[0, 2 * mt, 2 * pair + 1], mask),
                                        T.bitwise_and(kt[0, 2 * mt + 1, 2 * pair + 1], mask),
                                        frag[0, 4 * part + 2 + nibble],
                                        frag[1, 4 * part + 2 + nibble],
                                    )

                        it: T.int32 = first + warp
                        if it < last:
                            find_pages(it)
                        for stage in T.unroll(DEPTH):
                            if it + stage * NW < last:
                                load(stage, it + stage * NW)
                                find_pages(it + (stage + 1) * NW)
                        while it < last:
                            if it + DEPTH * NW < last:
                                load(DEPTH, it + DEPTH * NW)
                                find_pages(it + (DEPTH + 1) * NW)
                            for mt in T.unroll(NM):
                                for e in T.unroll(6):
                                    for i in T.unroll(4):
                                        acc[e, i] = _u32(0)
                                for pair in T.unroll(KW // 2):
                                    contract(mt, pair)
                                for r in T.unroll(2):
                                    norm: T.let = low_half(kmt[0, 2 * mt + r])
                                    residual: T.let = high_half(kmt[0, 2 * mt + r])
                                    row_of[0] = norm * code_weight
                                    row_of[1] = norm * residual * sign_weight
                                    row_of[2] = norm * (residual - T.float32(OFFSET))
                                    for j in T.unroll(2):
                                        e: T.let = 2 * r + j
                                        c = acc[CODES, e]
                                        if TABLES == 2 or not PACKED:
                                            c = c * _u32(256) + acc[CODES + 1, e]
                                        s = acc[SIGNS, e] * _u32(16) + acc[SIGNS + 2, e]
                                        if not PACKED:
                                            s = s * _u32(256) + (
                                                acc[SIGNS + 1, e] * _u32(16) + acc[SIGNS + 3, e]
                                            )
                                        total3 = row_of[0] * as_float(c) + row_of[1] * as_float(s)
                                        if PACKED:
                                            total3 = total3 + _shuffle_xor(total3, 2)
                                        score[2 * mt + r, j] = scale[j, 0] * (
                                            total3 - row_of[2] * scale[j, 1]
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
                                        T.ptx["and.b32"](fields[0], X, _u32(0x33333333))
                                        if MULTIPLY:
                                            T.ptx["mul.hi.u32"](fields[1], X, power[1])
                                        else:
                                            fields[1] = T.shift_right(X, _u32(2))
                                        T.ptx["and.b32"](fields[1], fields[1], _u32(0x33333333))
                                        for odd in T.unroll(2):
                                            if MULTIPLY:
                                                T.ptx["mul.hi.u32"](
                                                    fields[2 + odd], fields[odd], power[0]
                                                )
                                            else:
                                                fields[2 + odd] = T.shift_right(
                                                    fields[odd], _u32(16)
                                                )
                                        for odd in T.unroll(2):
                                            for byte in T.unroll(2):
                                                levels = _u32(0)
                                                T.ptx["prmt.b32"](
                                                    levels,
                                                    lookup[2],
                                                    lookup[2],
                                                    fields[2 * byte + odd],
                                                )
                                                for upper in T.unroll(2):
                                                    A[pr, xx * 8 + 4 * upper + 2 * odd + byte] = (
                                                        _prmt(
                                                            levels,
                                                            lookup[3],
                                                            T.Select(
                                                                upper == 0,
                                                                _u32(0x2404),
                                                                _u32(0x3414),
                                                            ),
                                                        )
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
