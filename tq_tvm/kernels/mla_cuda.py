r"""``mla`` on Hopper GPUs: the threads of ``kernels.mla``'s equation.

Two launches. Sequences are cut into ``num_parts`` parts of whole tiles of 64 tokens, and heads into
pairs of blocks of 64. A part and a pair are a cluster's, whose two CTAs have half of the columns of
every latent and rope part (`mla_shape`), so that a tile is decoded once for 128 heads, and each
CTA's queries, tiles and outputs fit it. In a CTA

1. all warps rotate queries into shared memory (`mla_queries`);
2. warps that decode make operands of packed rows, tile after tile (`mla_latents`), in a ring of
   ``tiles`` places;
3. two warpgroups multiply (`mla_heads`): each has a block of heads, or where there is only one,
   every other tile. Halves of scores cross the cluster, nothing else does.

Barriers: ``full`` and ``empty`` of every place of the ring, between warps of a CTA; ``sums`` and
``taken`` of every warpgroup, between it and the one of the peer. `setmaxnreg` gives registers of
the warps that decode to those that multiply.

Every piece, (sum of w c, bound, sum of w), goes to the workspace, whose rows are in the order of
columns: of rank 0, then of rank 1. The second launch (`mla_merge`), a CTA a query head, merges
pieces and rotates back; with ``overlap`` it begins before the first is done.

The workspace is ``B HQ parts pieces (512 + 2)`` floats.

Counts, for a tile and a CTA, of 128 heads (mse4, bfloat16):

=====================  =========  ==============================================================
what                   predicted  counted
=====================  =========  ==============================================================
bytes read             12.4 KB    of 386 a token each CTA has half
tensor cores           2176       cycles at 2048 products a cycle: 26 ``HGMMA`` a warpgroup
shared memory          2664       cycles: 1152 queries and keys, 512 values, 512 halves of scores,
                                  288 decoded rows, 200 rows as they are in the cache; 2930
                                  wavefronts (H100, ncu)
instructions           616, 253   of the SASS: a warp that multiplies, and one of eight that decode
                                  (84 of them ``PRMT``, 10 a word of eight codes, 4 a row); the
                                  latter was 315 when what follows was measured on an H100;
                                  64 x 8192 takes 316 us on an H200 now, 156 with 16 heads
=====================  =========  ==============================================================

What bounds 128 heads is not the tensor cores alone. 64 x 8192 on an H100 takes 317 us. Parts left
out: no exchange 253, no products of queries 262, no decoding 303, no softmax 314, a quarter of the
products of values 316; neither exchange nor decoding 200, which is what the products take (148 at
the card's peak: queries and keys come from shared memory at all that it gives). So the chain from a
tile's scores through the cluster to the next tile's is what is waited for, beside warps that
decode. The network between two SMs takes a thousand cycles for the first bytes and 18 bytes a
cycle, by stores, ``st.async`` or bulk copies: 900 cycles for a warpgroup's halves. With 16 heads,
161 us, warps that decode are waited for.

Tried: halves of scores as 16 bits and a scale a row, 307 us of 317, but with 16 heads 174 of 161;
on that form the next tile's scores multiplied before this tile's weights, 374 of 308, and
warpgroups that take turns at the tensor cores, 309 of 307. On forms before this one: no scores
ahead of values, 375 of 312; arrivals that release to the cluster, 495 of 403; two crews of decoding
warps that take tiles in turn, 176 of 162 (16 heads).
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.device import (
    arrive_at_cluster,
    let,
    let_next_launch_begin,
    local,
    loop,
    ptx,
    shared_dynamic,
    shuffle,
    store,
    wait_for_cluster,
    warp_barrier,
    when,
)
from tq_tvm.kernels.mbarrier import Barriers, Turn, publish_barriers
from tq_tvm.kernels.mla_heads import Heads, warps_of
from tq_tvm.kernels.mla_latents import Latents
from tq_tvm.kernels.mla_merge import MERGE_THREADS, merge_pieces
from tq_tvm.kernels.mla_queries import load_queries
from tq_tvm.kernels.mla_shape import (
    HALF,
    MULTIPLIERS,
    RANKS,
    ROWS,
    TILE,
    WARPGROUP,
    MlaConfig,
    MlaShape,
)
from tq_tvm.kernels.wgmma import fence_writes, settle, wait
from tq_tvm.spec import CacheSpec

__all__ = ["mla_cuda"]


def mla_cuda(spec: CacheSpec, config: MlaConfig) -> PrimFunc:
    """The TensorIR of ``mla`` for one configuration, all sizes dynamic."""
    shape = MlaShape(spec, config)
    heads, dtype = spec.num_q_heads, spec.dtype
    D, R = spec.head_dim, spec.value_dim

    @T.prim_func(s_tir=True)
    def main(
        q_latent: T.handle,
        q_rope: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        workspace: T.handle,
        out: T.handle,
        lse: T.handle,
        num_parts: T.int32,
        sm_scale: T.float32,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        b = T.int64()
        w = T.int64()
        p = T.int64()
        ws = T.int64()
        hl = T.int64()
        QL = T.match_buffer(q_latent, (b, heads, D), dtype, align=16)
        QR = T.match_buffer(q_rope, (b, heads, R), dtype, align=16)
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        WS = T.match_buffer(workspace, (ws,), "float32", align=16)
        OUT = T.match_buffer(out, (b, heads, D), dtype, align=16)
        LSE = T.match_buffer(lse, (b, hl), "float32", strides=[T.int64(), T.int64(1)], align=4)
        for by in T.thread_binding(shape.pairs, thread="blockIdx.y"):
            for _ in T.thread_binding(RANKS, thread="clusterCtaIdx.x"):
                for bx in T.thread_binding(b * num_parts * RANKS, thread="blockIdx.x"):
                    for tx in T.thread_binding(shape.threads, thread="threadIdx.x"):
                        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
                        _attend(
                            shape, (QL, QR), caches, BT, SL, WS, b, by, bx, tx, num_parts, sm_scale
                        )
        for by2 in T.thread_binding(b, thread="blockIdx.y"):
            for bx2 in T.thread_binding(heads, thread="blockIdx.x"):
                for tx2 in T.thread_binding(MERGE_THREADS, thread="threadIdx.x"):
                    merge_pieces(shape, WS, OUT, LSE, b, bx2, by2, tx2, num_parts)

    return main


def _attend(shape, queries, caches, table, seq_lens, workspace, batch, by, bx, tx, parts, sm_scale):
    """One CTA."""
    config = shape.config
    thread, pair = let(T.cast(tx, "int32")), let(T.cast(by, "int32"))
    index = let(T.cast(bx, "int32"))
    rank, task = let(index % RANKS), let(T.truncdiv(index, RANKS))
    sequence, part = let(T.truncdiv(task, parts)), let(T.truncmod(task, parts))
    warp = let(thread // 32)
    words = shared_dynamic(shape.shared_bytes // 4, "uint32")
    full = Barriers(words, shape.barriers_begin // 4, config.tiles)
    empty = Barriers(words, full.end, config.tiles)
    sums = Barriers(words, empty.end, MULTIPLIERS)
    taken = Barriers(words, sums.end, MULTIPLIERS)
    first_head = let(pair * (MULTIPLIERS * ROWS))
    with when(thread == 0):
        full.make(config.decoders)
        empty.make(shape.readers)
        sums.make(1)
        taken.make(lambda number: T.max(warps_of(_heads(shape, first_head, number)), 1))
        publish_barriers()
    length = let(seq_lens[sequence])
    tiles = let(T.truncdiv(length + (TILE - 1), TILE))
    share = let(T.truncdiv(tiles + parts - 1, parts))
    first = let(part * share)
    last = let(T.min(tiles, first + share))
    decodes = let(warp >= MULTIPLIERS * WARPGROUP // 32)
    decoder = let(warp - MULTIPLIERS * WARPGROUP // 32)
    latents = Latents(shape, words, caches, table, sequence, length, rank, decoder, thread % 32)
    # The first rows are on their way while queries are rotated.
    with when(T.And(decodes, first < last)):
        latents.begin(first)
    load_queries(shape, words, queries, sequence, first_head, rank, warp, thread % 32, sm_scale)
    fence_writes()
    # Barriers and queries are there, in both CTAs.
    arrive_at_cluster(release=True)
    wait_for_cluster()
    with I.If(decodes):
        with I.Then():
            ptx("setmaxnreg.dec.sync.aligned.u32", shape.decoder_registers)
            _decode(shape, latents, first, last, full, empty, thread % 32)
        with I.Else():
            ptx("setmaxnreg.inc.sync.aligned.u32", shape.multiplier_registers)
            number = let(shuffle(T.truncdiv(thread, WARPGROUP), 0))
            heads = let(_heads(shape, first_head, number))
            group = Heads(shape, words, number, thread, rank, heads, sums, taken)
            multiply = _multiply_ahead if config.ahead else _multiply
            multiply(shape, group, number, first, last, length, full, empty)
            own = first_head if shape.shares_tiles else let(first_head + number * ROWS)
            piece = part * shape.pieces + (number if shape.shares_tiles else 0)
            pieces = let(parts * shape.pieces)
            count = shape.spec.num_q_heads

            def place_of(head):
                line = T.cast(sequence * count + own + head, "int64")
                row = let(line * T.cast(pieces, "int64") + T.cast(piece, "int64"))
                return row, let(row * T.int64(RANKS * HALF) + T.cast(rank * HALF, "int64"))

            rows = T.cast(batch, "int64") * T.cast(pieces * count, "int64")
            stats = let(rows * T.int64(RANKS * HALF)), rank == 0
            # Not before: the merge's CTAs would all gather on the few processors that are idle.
            if config.overlap:
                let_next_launch_begin()
            group.leave(workspace, stats, place_of)
    # The peer stores and arrives here until its last tile.
    arrive_at_cluster(release=False)
    wait_for_cluster()


def _heads(shape: MlaShape, first_head, number):
    """Query heads of a warpgroup, none or less where it has only rows without one."""
    before = 0 if shape.shares_tiles else number * ROWS
    return shape.spec.num_q_heads - first_head - before


def _decode(shape, latents, first, last, full, empty, lane) -> None:
    """A warp that decodes: its rows of every tile."""
    place = Turn(shape.config.tiles, 1)
    at = local(1, "int32")
    store(at, first)
    with loop(at[0] < last):
        begin = let(place.index * (shape.matrix_bytes // 4) + shape.tiles_begin // 4)
        latents.decode(at[0], last, begin, lambda: empty.wait(place.index, place.parity))
        fence_writes()
        warp_barrier()
        with when(lane == 0):
            full.arrive(place.index)
        place.advance()
        store(at, at[0] + 1)


class _Walk:
    """A warpgroup's tiles, and their places in the ring."""

    def __init__(self, shape: MlaShape, number, first) -> None:
        self._step = MULTIPLIERS if shape.shares_tiles else 1
        self.place = Turn(shape.config.tiles, 0)
        self.tile = local(1, "int32")
        store(self.tile, first)
        if shape.shares_tiles:
            with when(number == 1):
                self.place.advance()
                store(self.tile, first + 1)

    def advance(self) -> None:
        """Go on to it."""
        for _ in range(self._step):
            self.place.advance()
        store(self.tile, self.tile[0] + self._step)


def _multiply(shape, group, number, first, last, length, full, empty) -> None:
    """A warpgroup's tiles, one after the other."""
    scores, weights = local(TILE // 2, "float32"), local(TILE // 4, "uint32")
    walk = _Walk(shape, number, first)
    place = walk.place
    with loop(walk.tile[0] < last):
        full.wait(place.index, place.parity)
        group.multiply_scores(scores, place.index)
        wait(0)
        settle(scores)
        group.send(scores)
        group.receive(scores)
        group.weigh(scores, weights, walk.tile[0] * TILE, length)
        group.multiply_values(weights, place.index)
        wait(0)
        settle(*group.output)
        with when(group.lane == 0):
            empty.arrive(place.index)
        walk.advance()


def _multiply_ahead(shape, group, number, first, last, length, full, empty) -> None:
    """The same, but the next tile's scores are multiplied before this tile's values.

    Halves of scores cross the cluster while values are multiplied, and the tensor cores have work
    for twice as long at a time.
    """
    scores, weights = local(TILE // 2, "float32"), local(TILE // 4, "uint32")
    walk, following = (_Walk(shape, number, first) for _ in range(2))
    place, after = walk.place, following.place
    with when(walk.tile[0] < last):
        full.wait(place.index, place.parity)
        group.multiply_scores(scores, place.index)
        wait(0)
        settle(scores)
        group.send(scores)
        group.receive(scores)
        group.weigh(scores, weights, walk.tile[0] * TILE, length)
        following.advance()
    with loop(walk.tile[0] < last):
        more = let(following.tile[0] < last)
        with when(more):
            full.wait(after.index, after.parity)
        # Behind the last tile this multiplies an old one, for nobody: a branch here would make the
        # compiler wait for every product.
        group.multiply_scores(scores, after.index)
        group.multiply_values(weights, place.index)
        wait(1)
        settle(scores)
        with when(more):
            group.send(scores)
        wait(0)
        settle(weights, *group.output)
        with when(group.lane == 0):
            empty.arrive(place.index)
        with when(more):
            group.receive(scores)
            group.weigh(scores, weights, following.tile[0] * TILE, length)
        walk.advance()
        following.advance()
