r"""``decode`` on NVIDIA GPUs: the threads of ``kernels.decode``'s equation.

Two launches. In the first, the tiles of all sequences are shared out equally (`decode_work`) among
groups of CTAs; the CTAs of a group go through the same tokens at the same time. A CTA has columns
of warps, one a KV head and tile of 4 or 8 query heads: with several, what lies between heads in a
page (scales, in layout bshd) comes from L2 once for all of them. It takes its piece of one sequence
after the other:

1. rotates and quantises its queries to 16 bits, two signed bytes a value (`decode_query`);
2. lets every warp walk its own tiles of ``tile`` tokens: scores from integer products of codes
   (`decode_score`), then softmax and integer sums of V (`decode_values`); between the two, when K's
   registers are used up, the next tile is asked for (`decode_pages`). Nothing in that loop
   synchronises warps that have rows to themselves;
3. asks for the first tile and the queries of its next piece, which are on their way while this one
   is finished;
4. merges the warps of a column (`decode_merge`). A sequence that the CTA has to itself is rotated
   back and done; of a piece, (sum of w v, bound, sum of w) goes to the workspace.

The second launch, a warp or a CTA a query head and sequence, merges pieces and rotates back. With
``overlap`` it begins before the first is done, and waits for it where it needs its results.

Rows of 512 values are two warps', which exchange their halves of a tile's scores (`decode_slices`);
up to 256 they are one's.

With a window of the spec both launches are over the tokens before it, and it is added to a row that
is finished (`decode_window`).

The workspace is ``2 groups HQ (D + 2)`` floats: only the first and the last piece of a group can be
parts of a sequence.

A token and KV head (k4v2, D = 128) takes 102 bytes. Main loop of 64 tokens and 4 query heads,
D = 128, bfloat16, as compiled for sm_90a with 216 registers: 937 instructions, 204 of which run
only where a bound moves. Of the other 733, 427 are on the integer pipe (0.026 a value): masks and
other logic 219, look-ups and byte moves 100, selections 40, shifts 33; tensor core 64. Of 8 query
heads 976 of 1270, 455 of them on the integer pipe, tensor core 128; up to 255 registers, 72 bytes
of them spilled outside this loop. (Counted while V's chunks were in planes.)

On an H200, 64 x 8192 of 32/8 heads, bshd, by default (a script, as ``bench.json`` times): 143.5 us
of the form whose lanes worked out their addresses for every tile (828 instructions where no bound
moves), 135.0 with what `device.held` keeps in registers, 133.6 with V's codes unmasked where they
may be (`decode_planes`). 128 x 4096 of 64/8 heads took 197.9, 188.2 and 187.7. With one scan for
shares (`decode_work`) and fewer CTAs in the second launch it takes 184.4, 256 x 512 65.1 of 73.6,
64 x 1024 28.7 of 29.6, 64 x 8192 135.6; by records 172.9, 50.9, 25.9 and 133.3. With rows of V
whole (`chunk_rows`) it takes 178 us, 47.9, 24.1 and 128.1, and by two warps 167 in the first and
126.5 in the last: what L2 is asked for bounds it as much as arithmetic. With all tables naming the
same 64 pages, which L2 keeps, an older form took 137 us of 148. ncu of the first launch then: 236
thousand cycles at 1.76 GHz, 110 thousand instructions a scheduler (49 % of the slots), integer pipe
54 %, tensor core 21 %. Two warps a scheduler wait 3.9 cycles an instruction: 0.8 for results of
fixed latency, 0.4 for shared memory and shuffles, 0.4 for a pipe, 0.4 for one another, 0.2 for K
(0.5 from memory). 128 x 4096 of 64/8 heads, before addresses were kept: 77 % of the samples are of
what every tile runs, 6 % of bounds that move, in 38 % of the tiles (headroom 1), 14 % of what a
piece begins and ends with; 3.8 cycles an instruction, of which 1.0 for results of fixed latency,
0.4 for a pipe, 0.4 for operands.

On an H100 memory counts as much: 173 us of the call, 134 from L2, and torch's maximum of as many
bytes 149. Of the first launch, 167 us, ncu says 432 MB of DRAM (78 % of its peak; L2 77 % of its
own), and 1.9 cycles an instruction for K. These, and what was tried there, are of the form that did
not yet ask for the next piece ahead, which takes as long at this size.

Tried on an H200, and no faster: K and V in registers (162 to 172 us: V's loads are on the
scoreboard that K waits for), both in shared memory by each warp (171 to 178), both by all warps of
a CTA in whole lines (163 to 208: they copy and compute in step), whole pages by a warp of its own
through a ring with mbarriers (reading alone 112; 159 to 166 with 8 warps that attend, 151 with 12),
pieces merged by the CTA that has the last one in place of a second launch (a fence and an atomic
take 2250 cycles). On an H100, from memory and from L2: scores of the next tile between the
instructions of this one's sums (184 and 135 us of 183 and 137, L2 full of written lines); K's next
tile into L2 ahead of its loads, its lines shared among the CTAs of a group (204 and 142, 496
MB of DRAM) or each CTA's own (178 and 139 of 172 and 134, L2 clean as in the rest; bhsd 168 and
134 of 171 and 128); three warps a scheduler (168 registers, bshd 212 and 135; with four heads a CTA
198 and 139, and 483 MB: CTAs of a group drift apart, and fetch again what they share; bhsd 172 and
124); CTAs of four heads whose warps wait for one another before each tile (173 to 185, and 157).
On an H200 again: shifts of K's selectors by multiplication (135.7 of 133.6), bytes of 8 heads'
queries added up as integers, which one conversion makes a float (188.9 of 188.2).

A third of the time of short rows is before the first score: share 800 cycles, place 750 (now one
scan), query 400, pages 300, asking for K 700 and for V 900 (1 x 8192). Of many short sequences a
CTA has one piece after another: 256 x 512 took 84 us when a piece was asked for after the one
before was merged, and 77 since (H100; 66 with two warps a CTA, of which more are resident).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.decode_merge import (
    MERGE_THREADS,
    MergedMemory,
    merge_blocks,
    merge_pieces,
    merge_warps,
    piece_slot,
    write_output,
    write_piece,
)
from tq_tvm.kernels.decode_pages import KeyTile, PageReader, ValueRing
from tq_tvm.kernels.decode_query import Query, QueryMemory
from tq_tvm.kernels.decode_score import score
from tq_tvm.kernels.decode_shape import DecodeConfig, Shape
from tq_tvm.kernels.decode_slices import ScoreExchange, exchange_bytes
from tq_tvm.kernels.decode_threads import Standing
from tq_tvm.kernels.decode_values import SumMemory, Values
from tq_tvm.kernels.decode_window import Window, find_window, packed_lengths
from tq_tvm.kernels.decode_work import (
    find_share,
    shared_lengths,
    tiles_by_length,
    tiles_of,
    unknown_zero,
)
from tq_tvm.kernels.device import (
    barrier,
    i32,
    let,
    let_next_launch_begin,
    local,
    loop,
    ptx,
    store,
    warp_barrier,
    when,
)
from tq_tvm.kernels.key_codes import key_table
from tq_tvm.spec import CacheSpec

if TYPE_CHECKING:
    from tq_tvm.kernels.decode_featured import Featured

__all__ = ["attend_share", "decode_cuda", "decode_shared_bytes"]


def decode_shared_bytes(spec: CacheSpec, config: DecodeConfig) -> tuple[int, int]:
    """Static and dynamic shared memory of the first launch."""
    shape = Shape(spec, config)
    queries = shape.heads * (2 * spec.head_dim + 4 + 8)
    fragments = 512 * shape.key_words * shape.parts * shape.slices * config.query_in_shared
    sums = shape.part_warps * (512 * shape.quads + 12 * shape.heads + 4)
    merged = 4 * shape.heads * (spec.head_dim + 2)
    ring = shape.part_warps * 8 * shape.value_words
    static = shape.abreast * (queries + fragments + sums + merged) + exchange_bytes(shape)
    return static, shape.abreast * ring


def decode_cuda(spec: CacheSpec, config: DecodeConfig) -> PrimFunc:
    """The TensorIR for one configuration, all sizes dynamic."""
    shape = Shape(spec, config)
    dim, heads, dtype = spec.head_dim, spec.num_q_heads, spec.dtype

    @pages.jit(spec, s_tir=True)
    def main(
        q: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        k_window: T.Optional(T.handle),
        v_window: T.Optional(T.handle),
        window_slots: T.Optional(T.handle),
        workspace: T.handle,
        out: T.handle,
        num_groups: T.int32,
        sm_scale: T.float32,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        b = T.int64()
        w = T.int64()
        p = T.int64()
        ws = T.int64()
        Q = T.match_buffer(q, (b, heads, dim), dtype, align=16)
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        rings = T.meta_var(pages.match_rings(spec, (k_window, v_window, window_slots), b))
        WS = T.match_buffer(workspace, (ws,), "float32", align=16)
        OUT = T.match_buffer(out, (b, heads, dim), dtype, align=16)
        lengths = T.meta_var(packed_lengths(spec, SL))
        window = T.meta_var(find_window(shape, Q, rings, SL, sm_scale))
        for by in T.thread_binding(num_groups, thread="blockIdx.y"):
            for bx in T.thread_binding(shape.units, thread="blockIdx.x"):
                for tx in T.thread_binding(shape.threads, thread="threadIdx.x"):
                    T.attr({"tirx.launch_bounds_min_blocks_per_sm": shape.ctas_per_sm})
                    attend_share(
                        shape, Q, caches, BT, lengths, WS, OUT, b, bx, by, tx, num_groups,
                        sm_scale, window,
                    )  # fmt: skip
        for by2 in T.thread_binding(b, thread="blockIdx.y"):
            for bx2 in T.thread_binding(merge_blocks(heads, b, num_groups), thread="blockIdx.x"):
                for tx2 in T.thread_binding(MERGE_THREADS, thread="threadIdx.x"):
                    merge_pieces(shape, lengths, WS, OUT, b, bx2, by2, tx2, num_groups, window)

    return main


def _prefetch(argument, line) -> None:
    """Ask for one line of an argument, if it has that many."""
    per_line = 128 * 8 // tvm.DataType(argument.dtype).bits
    size = functools.reduce(lambda a, b: a * b, argument.shape)
    at = let(T.cast(line, "int64") * per_line)
    with when(at < size):
        flat = T.decl_buffer((size,), argument.dtype, data=argument.data)
        ptx("prefetch.global.L2", flat.ptr_to([at]))


def attend_share(
    shape: Shape, q, caches, block_table, seq_lens, workspace, out, batch, unit, group, thread,
    groups, sm_scale, features: Featured | Window | None = None,
) -> None:  # fmt: skip
    """One CTA of the first launch; ``features`` are `decode_featured`'s, or a spec's window."""
    spec, warps = shape.spec, shape.config.warps
    own = Standing.of(shape, unit, thread)
    lane = own.lane
    # These are needed one after another, and may all have to come from memory.
    at = let((group * shape.units + unit) * shape.threads + thread)
    for argument in (block_table, q):
        _prefetch(argument, at)
    query_memory, sum_memory = QueryMemory.allocate(shape), SumMemory.allocate(shape)
    merged = MergedMemory.allocate(shape)
    sliding = None if features is None else features.sliding
    backwards = None if features is None else features.backwards()
    tiles = tiles_by_length(shape, shared_lengths(seq_lens, features))
    shares, place = find_share(shape, tiles, batch, lane, groups, group)
    zero = let(unknown_zero(shares.total[0]))
    table = key_table(shape.key, zero, lane)
    if shape.config.overlap:
        let_next_launch_begin()
    ring = ValueRing(shape, let(thread // 32), own)
    reader = PageReader(shape, caches, block_table, own, ring)
    query = Query(shape, query_memory, own)
    values = Values(shape, query, sum_memory, own, let(thread // 32))
    values.find_metas(reader, own.kv_head)
    values.hold_table(zero)
    if features is not None:
        features.prepare(own.first_head, own.heads, own.t)
    tile, exchange = KeyTile.allocate(shape), ScoreExchange(shape, own)
    seq_len, next_len, count = (local(1, "int32") for _ in range(3))
    now, ahead, last = (local(1, "int32") for _ in range(3))
    next_pages = local(shape.pages, "int32")

    def first_tile(length):
        """The first tile that is attended to."""
        return 0 if sliding is None else sliding.first_tile(length)

    def low(length):
        """The first position that is attended to, if it is not 0."""
        return None if sliding is None else sliding.first_position(length)

    def tile_at(index, length):
        """The tile that comes at a place in line."""
        if backwards is None:
            return index
        mirrored = tiles_of(shape, length) - 1 + first_tile(length) - index
        return let(T.Select(backwards, T.max(mirrored, i32(0)), index))

    def find_pages(index) -> None:
        length = seq_len[0]
        # From the end, it is not the first tile that may begin before the lowest position.
        before = None if backwards is None else low(length)
        reader.find_pages(tile_at(index, length), length, before)

    def begin_piece(length, pages_found: bool) -> None:
        """Ask for the queries and the first tile of the piece at ``place``."""
        sequence = place.sequence[0]
        store(seq_len, length)
        first = first_tile(seq_len[0])
        left = tiles_of(shape, seq_len[0]) - first - place.offset[0]
        store(count, T.max(T.min(left, place.end[0] - place.tile[0]), 0))
        store(now, place.offset[0] + own.warp + first)
        store(last, place.offset[0] + count[0] + first)
        with when(count[0] > 0):
            query.load(q, sequence)
        with when(now[0] < last[0]):
            reader.begin(sequence)
            own_tile = tile_at(now[0], seq_len[0])
            if pages_found:
                for i in range(shape.pages):
                    store(reader.page, next_pages[i], i)
                reader.keep_existing(own_tile, seq_len[0])
            else:
                reader.find_pages(own_tile, seq_len[0], low(seq_len[0]))
            reader.load_k(tile, own_tile)
            reader.copy_v(own_tile)
            find_pages(now[0] + warps)
        ring.turn()

    with when(place.tile[0] < place.end[0]):
        begin_piece(seq_lens[place.sequence[0]], pages_found=False)
    with loop(place.tile[0] < place.end[0]):
        sequence, length = let(place.sequence[0]), let(seq_len[0])
        begin, taken = let(place.tile[0]), let(count[0])
        # Long before they are needed; a piece behind another one begins with a sequence.
        following = let(T.min(sequence + 1, T.cast(batch, "int32") - 1))
        store(next_len, seq_lens[following])
        width = T.cast(block_table.shape[1], "int32")
        tile_ahead = tile_at(own.warp + first_tile(next_len[0]), next_len[0])
        reader.find_first_pages(following, tile_ahead, width, next_pages, low(next_len[0]))
        with when(taken > 0):
            if spec.window:
                assert features is not None
                features.prefetch(sequence, own.kv_head, own.inside, 32 * shape.part_warps)
            query.quantise()
            barrier()
            query.prepare(sm_scale)
            values.start()
            if shape.config.query_in_shared:
                barrier()
            with loop(now[0] < last[0]):
                store(ahead, now[0] + warps)
                score(shape, query, table, tile, values.scores)
                exchange.add(values.scores)
                first = tile_at(now[0], seq_len[0]) * shape.config.tile
                if features is not None:
                    features.bend(query, values.scores, values.own, first, seq_len[0])
                with when(ahead[0] < last[0]):
                    tile_after = tile_at(ahead[0], seq_len[0])
                    reader.load_k(tile, tile_after)
                    reader.copy_v(tile_after)
                    find_pages(ahead[0] + warps)
                ring.turn()
                ring.wait()
                values.add(ring, first, seq_len[0], low(seq_len[0]))
                store(now, ahead[0])
        store(place.tile, begin + taken)
        store(place.sequence, sequence + 1)
        store(place.offset, i32(0))
        # The next piece is on its way while this one is merged.
        warp_barrier()
        with when(place.tile[0] < place.end[0]):
            begin_piece(next_len[0], pages_found=True)
        with when(taken > 0):
            values.finish()
            barrier()
            merge_warps(shape, sum_memory, merged, own)
            barrier()
            with I.If(taken == tiles_of(shape, length) - first_tile(length)):
                with I.Then():
                    write_output(shape, merged, own, out, sequence, features)
                with I.Else():
                    later = begin > group * shares.size[0]
                    slot = let(piece_slot(group, later))
                    write_piece(shape, merged, own, workspace, groups, slot)
            # What was merged is read until the barrier behind the next piece's queries.
