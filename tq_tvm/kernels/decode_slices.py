"""Scores of rows that two warps share in ``decode`` on GPUs.

A row of more than 256 values is two warps': each has the scores of its slice of K, and the sums of
its slice of V. Both add the same two numbers, so both come to the same weights.

64 x 8192 of 32/8 heads of 512 values take 711 us on an H100 (k4v2, ``bench.json``; 81 % of the
copy), with tiles of 32 tokens and queries in registers (243). By a script, on scales of K and
V that differ less and with a headroom of 1, it was 679; with tiles of 64, which leave shared memory
for 3 CTAs an SM with queries there, 849, and 947 without; and 953 in a form in which both warps
worked out whole scores, so that K's codes were looked up, and multiplied, twice.
"""

from __future__ import annotations

from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.decode_threads import Standing
from tq_tvm.kernels.device import access, barrier_of, i32, let, local, shared, store

__all__ = ["ScoreExchange", "exchange_bytes"]


def exchange_bytes(shape: Shape) -> int:
    """Shared memory of a CTA for it: scores of two tiles of every warp."""
    return 0 if shape.slices == 1 else 2 * shape.threads * 8 * shape.own_tokens


class ScoreExchange:
    """Scores of a tile in shared memory: the next tile's go elsewhere, so a barrier a tile does."""

    def __init__(self, shape: Shape, own: Standing) -> None:
        self._shape, self._own = shape, own
        if shape.slices == 1:
            return
        pairs = shape.abreast * shape.config.warps
        self._vectors = 2 * shape.own_tokens // 4
        self._scores = shared((2, pairs, shape.slices, self._vectors, 32, 4), "float32")
        self._pair = let(own.part * shape.config.warps + own.warp)
        self._turn = local(1, "int32")
        store(self._turn, i32(0))

    def _at(self, slice_, vector: int):
        return self._scores.ptr_to([self._turn[0], self._pair, slice_, vector, self._own.lane, 0])

    def add(self, scores) -> None:
        """Make ``scores [own token, column]`` those of whole rows."""
        shape = self._shape
        if shape.slices == 1:
            return
        places = [(n, j) for n in range(shape.own_tokens) for j in range(2)]
        vectors = [places[4 * i : 4 * i + 4] for i in range(self._vectors)]
        for i, vector in enumerate(vectors):
            values = [scores[at] for at in vector]
            access("st.shared", values, self._at(self._own.slice, i), "f32")
        barrier_of(self._pair + 1, 32 * shape.slices)
        other = local((self._vectors, 4), "float32")
        for i in range(self._vectors):
            registers = [other[i, e] for e in range(4)]
            access("ld.shared", registers, self._at(1 - self._own.slice, i), "f32")
        for i, vector in enumerate(vectors):
            for e, at in enumerate(vector):
                store(scores, scores[at] + other[i, e], *at)
        store(self._turn, 1 - self._turn[0])
