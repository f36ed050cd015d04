"""Query heads of ``mla`` on GPUs: a warpgroup's scores, weights and outputs.

A warpgroup has 64 query heads, rows of its products, against a tile of tokens. Its CTA has half of
the columns of queries and latents, so scores are sums of two halves: each CTA stores its own in the
peer's shared memory (``st.async``), where thread i of the peer reads what thread i here has stored.
Both add the same two numbers, so both come to the same weights, and multiply them, in registers,
with their half of the latents. No other state is shared.

With ``ahead`` the scores of the next tile are multiplied before this tile's outputs, and on their
way to the peer meanwhile.

A row's bound moves only where a logit exceeds it by more than `SLACK` powers of two.
"""

from __future__ import annotations

from tvm.script import tirx as T

from tq_tvm.kernels.attend_rows import SLACK, highest
from tq_tvm.kernels.device import (
    FULL_WARP,
    LOWEST,
    MASKED,
    PAIR,
    access,
    f32,
    let,
    local,
    pointer,
    ptx,
    reduce_lanes,
    remote_address,
    shuffle,
    shuffle_xor,
    store,
    u32,
    warp_barrier,
    when,
)
from tq_tvm.kernels.mbarrier import Barriers, Turn, arrive_at_peer, store_to_peer
from tq_tvm.kernels.mla_shape import BLOCK, HALF, HALF_ROPE, ROWS, TILE, WARPGROUP, WARPS, MlaShape
from tq_tvm.kernels.wgmma import (
    Operand,
    commit,
    multiply,
    multiply_registers,
    start_products,
)

__all__ = ["Heads", "warps_of"]

_WARP_ROWS = 16
"""Rows of a warp."""

_STEP = 16
"""Values, or tokens, that a product adds up."""

_COLUMNS = 128
"""Columns of outputs that are multiplied at a time: one product of 256 would have more registers
than the compiler grants before `setmaxnreg`."""

_SCORES = TILE // 2
"""Scores of a lane: of rows g and g + 8 of its warp, two neighbouring tokens of every eight."""

_LATENT_BYTES = 2 * HALF * TILE


def warps_of(heads):
    """Warps of a warpgroup that have any of so many heads."""
    return T.max(T.min(T.truncdiv(heads + (_WARP_ROWS - 1), _WARP_ROWS), WARPS), 0)


class Heads:
    """One warpgroup's heads, and the state of a lane's rows."""

    def __init__(
        self,
        shape: MlaShape,
        words,
        number,
        thread,
        rank,
        heads,
        sums: Barriers,
        taken: Barriers,
    ) -> None:
        self._shape, self._words, self._number = shape, words, number
        self._sums, self._taken, self._heads = sums, taken, heads
        self._thread = let(thread % WARPGROUP)
        lane = let(thread % 32)
        self.lane, self.g, self.t = lane, let(lane // 4), let(lane % 4)
        block = 0 if shape.shares_tiles else number
        self._queries = self._operands(block * (shape.matrix_bytes // 4))
        begin = shape.tiles_begin // 4
        self._tiles = self._operands(begin)
        self._values = Operand(pointer(words, begin), BLOCK, leading=2 * BLOCK * TILE)
        # Warps of rows without a head only multiply.
        self._exists = let(self._thread // 32 * _WARP_ROWS < heads)
        self._sum_bytes = let(warps_of(heads) * (shape.sums_bytes // WARPS))
        # Where this thread's scores of the peer arrive here, and its own there.
        own = shape.sums_begin // 4 + number * (shape.sums_bytes // 4) + self._thread * 4
        self._arriving = let(own)
        peer = let(1 - rank)
        self._sent = let(sums.remote(number, peer))
        self._target = let(remote_address(pointer(words, own), peer))
        self._acknowledged = let(taken.remote(number, peer))
        self._received, self._free = Turn(1, 0), Turn(1, 1)
        self.bound, self.total = local(2, "float32"), local(2, "float32")
        self.output = [local(_COLUMNS // 2, "float32") for _ in range(HALF // _COLUMNS)]
        for half in range(2):
            store(self.bound, f32(LOWEST), half)
            store(self.total, f32(0), half)
        for output in self.output:
            for i in range(_COLUMNS // 2):
                store(output, f32(0), i)

    def _operands(self, begin) -> tuple[Operand, Operand]:
        """Of latents and of rope parts, or of queries of both."""
        latents = Operand(pointer(self._words, begin), BLOCK)
        ropes = pointer(self._words, begin + _LATENT_BYTES // 4)
        return latents, Operand(ropes, HALF_ROPE)

    def _offset(self, place):
        """Bytes to the tile of a place, in all lanes the same: descriptors are of a warp."""
        return let(shuffle(place * self._shape.matrix_bytes, 0))

    def multiply_scores(self, scores, place) -> None:
        """Begin to multiply queries with the tile of a place, the CTA's half of the columns."""
        dtypes = self._shape.latent_dtype, self._shape.spec.dtype
        offset = self._offset(place)
        steps = []
        for part, (columns, width) in enumerate(((HALF, BLOCK), (HALF_ROPE, HALF_ROPE))):
            for first in range(0, columns, _STEP):
                # Blocks of 64 rows follow one another.
                at = first // width * (2 * width * ROWS) + first % width * 2
                steps.append((part, at))
        keys = [operand.moved(offset) for operand in self._tiles]
        start_products()
        for number, (part, at) in enumerate(steps):
            query = self._queries[part].at(at)
            multiply(dtypes[part], scores, query, keys[part].at(at), first=number == 0)
        commit()

    def multiply_values(self, weights, place) -> None:
        """Begin to add the weighted latents of the tile of a place."""
        values = self._values.moved(self._offset(place))
        start_products()
        for step in range(TILE // _STEP):
            operand = [weights[4 * step + i] for i in range(4)]
            for part, output in enumerate(self.output):
                at = part * (2 * _COLUMNS * TILE) + step * _STEP * 2 * BLOCK
                multiply_registers(self._shape.latent_dtype, output, operand, values.at(at))
        commit()

    def send(self, scores) -> None:
        """Store the CTA's halves of scores in the peer, once it has read those before."""
        with when(self._exists):
            self._taken.wait(self._number, self._free.parity)
            self._free.advance()
            with when(self._thread == 0):
                self._sums.expect(self._number, self._sum_bytes)
            for i in range(_SCORES // 4):
                four = [scores[4 * i + e] for e in range(4)]
                store_to_peer(self._target + u32(16 * WARPGROUP * i), four, self._sent)

    def receive(self, scores) -> None:
        """Add the peer's halves to scores that were sent."""
        with when(self._exists):
            self._sums.wait(self._number, self._received.parity)
            self._received.advance()
            four = local(4, "float32")
            for i in range(_SCORES // 4):
                at = pointer(self._words, self._arriving + 4 * WARPGROUP * i)
                access("ld.shared", [four[e] for e in range(4)], at, "f32")
                for e in range(4):
                    store(scores, scores[4 * i + e] + four[e], 4 * i + e)
            warp_barrier()
            with when(self.lane == 0):
                arrive_at_peer(self._acknowledged)

    def weigh(self, scores, weights, first, length) -> None:
        """Scores, in units of log2, become weights, an operand of products."""
        with when(first + TILE > length):
            for i in range(_SCORES):
                token = first + (8 * (i // 4) + i % 2) + 2 * self.t
                store(scores, T.Select(token < length, scores[i], f32(MASKED)), i)
        top = local(2, "float32")
        above = T.bool(False)
        for half in range(2):
            own = [scores[i] for i in range(_SCORES) if i % 4 // 2 == half]
            store(top, highest(own), half)
            above = T.Or(above, top[half] > self.bound[half] + f32(SLACK))
        with when(T.cuda.any_sync(u32(FULL_WARP), T.cast(above, "int32")) != 0):
            self._raise(top)
        for i in range(_SCORES):
            half = i % 4 // 2
            store(scores, T.exp2(scores[i] - self.bound[half]), i)
            store(self.total, self.total[half] + scores[i], half)
        for i in range(0, _SCORES, 2):
            ptx(PAIR[self._shape.latent_dtype], weights[i // 2], scores[i + 1], scores[i])

    def _raise(self, top) -> None:
        """Move the bounds up to what was found, and the output with them."""
        for half in range(2):
            for mask in (1, 2):
                store(top, T.max(top[half], shuffle_xor(top[half], mask)), half)
            store(top, T.max(top[half], self.bound[half]), half)
            shrink = let(T.exp2(self.bound[half] - top[half]))
            store(self.bound, top[half], half)
            store(self.total, self.total[half] * shrink, half)
            for output in self.output:
                for i in range(_COLUMNS // 2):
                    if i % 4 // 2 == half:
                        store(output, output[i] * shrink, i)

    def leave(self, workspace, stats, place_of) -> None:
        """Write outputs, bounds and sums of weights of the rows that exist to the workspace.

        ``place_of`` gives the row of the workspace of one of the warpgroup's heads, and the CTA's
        first column there. ``stats`` is where bounds and sums are, and if this CTA writes them.
        """
        for half in range(2):
            reduce_lanes(self.total, half, lambda a, b: a + b, (1, 2))
        for half in range(2):
            head = let(self._thread // 32 * _WARP_ROWS + 8 * half + self.g)
            with when(head < self._heads):
                row, columns = place_of(head)
                for octet in range(HALF // 8):
                    output = self.output[8 * octet // _COLUMNS]
                    first = 4 * (octet % (_COLUMNS // 8)) + 2 * half
                    pair = [output[first + e] for e in range(2)]
                    at = columns + T.int64(8 * octet) + T.cast(2 * self.t, "int64")
                    access("st.global", pair, workspace.ptr_to([at]), "f32")
                with when(T.And(stats[1], self.t == 0)):
                    at = let(stats[0] + row * 2)
                    store(workspace, self.bound[half], at)
                    store(workspace, self.total[half], at + 1)
