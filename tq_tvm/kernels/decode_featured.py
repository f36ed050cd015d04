r"""``decode_featured`` on NVIDIA GPUs: ``decode`` with what ``attend`` adds to one token.

Equation
    As ``kernels.attend``, for one query token a sequence: soft cap, ALiBi, sinks, the log-sum-exp,
    and without a window of the spec ``window_left``, but no kept tokens. The kernel is
    ``decode_cuda``'s, at the default decisions of ``decode``.

Buffers
    Those of ``kernels.decode``, and before those of a window sinks ``[HQ]`` or ``[0]`` and
    alibi_slopes ``[HQ]`` or ``[0]``, float32, in; lse ``[B, HQ]`` or ``[B, 0]``, float32, out;
    soft_cap, a scalar, 0: none; window_left, int32, -1: none.

Static, dynamic, tail
    As ``decode``. What is not asked for is skipped by a branch that all warps take alike. Tiles
    before a window to the left are nobody's, their pages are not looked up; tokens before it are
    masked in the first tile.

Numerics
    As ``decode``; logits are bent in float32, in the unit that scores have.

Cost of one token and KV head: the bytes of ``decode``; of a logit ALiBi takes 1.5 operations, a
soft cap 5, two of them exponentials or reciprocals, against some 100 for its part of K and V. With
ALiBi tiles come from the newest to the oldest: it raises logits with the position, so that in order
every tile moved the bounds. 64 x 8192 of 32/8 heads, H200: 135.6 us plain, sinks 137.3, ALiBi 137.3
(in order 147.7), soft cap 142.6.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tq_tvm.kernels import pages
from tq_tvm.kernels.attend_rows import Options, finish_row, soft_capped
from tq_tvm.kernels.decode_cuda import attend_share
from tq_tvm.kernels.decode_merge import MERGE_THREADS, merge_blocks, merge_pieces
from tq_tvm.kernels.decode_query import Query
from tq_tvm.kernels.decode_shape import DecodeConfig, Shape
from tq_tvm.kernels.decode_window import Window, find_window, packed_lengths
from tq_tvm.kernels.device import LOG2E, f32, i32, let, local, store, when
from tq_tvm.kernels.warp_rows import WarpRow
from tq_tvm.spec import CacheSpec

__all__ = ["Featured", "Sliding", "decode_featured"]


class Sliding:
    """A window to the left: which tokens of a sequence its query attends to.

    Indexed by a sequence it is the tokens from the first tile on that has any.
    """

    def __init__(self, shape: Shape, seq_lens, window_left) -> None:
        self._tile, self._seq_lens, self._window_left = shape.config.tile, seq_lens, window_left

    def first_position(self, length):
        """The first position of a sequence of a length that is attended to, or less than 0."""
        before = length - 1 - self._window_left
        return T.Select(self._window_left < 0, i32(0), before)

    def first_tile(self, length):
        """The first tile of a sequence of a length that is attended to."""
        return T.truncdiv(T.max(self.first_position(length), i32(0)), self._tile)

    def __getitem__(self, sequence):
        length = let(self._seq_lens[sequence])
        return length - self.first_tile(length) * self._tile


class Featured:
    """Features of a call, and how a logit and a row take them."""

    def __init__(
        self,
        shape: Shape,
        sinks,
        alibi_slopes,
        lse,
        soft_cap,
        seq_lens,
        window_left,
        window: Window | None,
    ) -> None:
        self._shape, self._lse, self._window = shape, lse, window
        # A window of the spec is beside all tokens before it.
        self.sliding = None if window is not None else Sliding(shape, seq_lens, window_left)
        self._options = Options(sinks, alibi_slopes, None, soft_cap, None, None)

    def backwards(self):
        """Whether the newest tiles come first.

        ALiBi makes later tokens weigh more: one tile after the other would move the bounds.
        """
        return let(T.cast(self._options.alibi_slopes.shape[0], "int32") > 0)

    def prepare(self, first_head, heads, t) -> None:
        """Slopes of a lane's columns, whose heads stay the same."""
        slopes, cap = self._options.alibi_slopes, self._options.soft_cap
        self._slope = local(2, "float32")
        self._sloped = sloped = let(T.cast(slopes.shape[0], "int32") > 0)
        for j in range(2):
            head = let((2 * t + j) % 4 if self._shape.packed else 2 * t + j)
            store(self._slope, f32(0), j)
            with when(T.And(sloped, head < heads)):
                store(self._slope, slopes[first_head + head] * f32(LOG2E), j)
        self._cap, self._inverse = self._caps()
        self._bent = let(T.Or(sloped, cap > f32(0)))

    def bend(self, query: Query, scores, own_token, first, seq_len) -> None:
        """Soft cap and ALiBi of the scores of a tile, which stay in their unit."""
        shape = self._shape
        with when(self._bent):
            units = [let(f32(1) / query.scale[j]) for j in range(2)]
            with when(self._cap > f32(0)):
                for j in range(2):
                    # In units of the scores.
                    steep, cap = let(query.scale[j] * self._inverse), let(self._cap * units[j])
                    for n in range(shape.own_tokens):
                        store(scores, soft_capped(cap, scores[n, j] * steep), n, j)
            with when(self._sloped):
                # Behind packed tokens there is the whole window.
                begin = T.cast(first + own_token + (1 - shape.spec.window) - seq_len, "float32")
                slopes = [let(self._slope[j] * units[j]) for j in range(2)]
                for n in range(shape.own_tokens):
                    apart = let(begin + f32(float(shape.own_apart * n)))
                    for j in range(2):
                        store(scores, scores[n, j] + slopes[j] * apart, n, j)

    def prefetch(self, sequence, kv_head, thread, threads: int) -> None:
        """Of a spec's window."""
        assert self._window is not None
        self._window.prefetch(sequence, kv_head, thread, threads)

    def _caps(self):
        """The soft cap in units of log2, and what a logit is multiplied by, 0 without a cap."""
        given = self._options.soft_cap
        cap = let(given * f32(LOG2E))
        return cap, let(T.Select(given > f32(0), f32(2 * LOG2E) / cap, f32(0)))

    def _bend_one(self, logit, head, age):
        """Soft cap and ALiBi of a logit in units of log2."""
        slopes, value = self._options.alibi_slopes, local(1, "float32")
        # Not those of `prepare`: the second launch has been nowhere else.
        cap, inverse = self._caps()
        store(value, logit)
        with when(cap > f32(0)):
            store(value, soft_capped(cap, value[0] * inverse))
        with when(T.cast(slopes.shape[0], "int32") > 0):
            store(value, value[0] - slopes[head] * f32(LOG2E) * T.cast(age, "float32"))
        return value[0]

    def finish(self, x, top, total, out, place, lane) -> None:
        """Divide a row that a warp shares, rotate it back, and write it and its lse.

        Before that what a spec's window has is added to it.
        """
        if self._window is not None:
            top, total = self._window.add(x, top, total, place, lane, self._bend_one)
        row = WarpRow(self._shape.spec, self._shape.spec.head_dim, None, 0)
        finish_row(row, x, top, total, place, self._options, out, self._lse, lane)


def decode_featured(spec: CacheSpec, config: DecodeConfig) -> PrimFunc:
    """The TensorIR for one configuration without clusters, all sizes dynamic."""
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
        sinks: T.handle,
        alibi_slopes: T.handle,
        k_window: T.Optional(T.handle),
        v_window: T.Optional(T.handle),
        window_slots: T.Optional(T.handle),
        workspace: T.handle,
        out: T.handle,
        lse: T.handle,
        num_groups: T.int32,
        sm_scale: T.float32,
        soft_cap: T.float32,
        window_left: T.int32,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        b = T.int64()
        w = T.int64()
        p = T.int64()
        hs = T.int64()
        ha = T.int64()
        hl = T.int64()
        ws = T.int64()
        Q = T.match_buffer(q, (b, heads, dim), dtype, align=16)
        caches = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        SK = T.match_buffer(sinks, (hs,), "float32", align=4)
        AL = T.match_buffer(alibi_slopes, (ha,), "float32", align=4)
        rings = T.meta_var(pages.match_rings(spec, (k_window, v_window, window_slots), b))
        WS = T.match_buffer(workspace, (ws,), "float32", align=16)
        OUT = T.match_buffer(out, (b, heads, dim), dtype, align=16)
        LSE = T.match_buffer(lse, (b, hl), "float32", strides=[T.int64(), T.int64(1)], align=4)
        lengths = T.meta_var(packed_lengths(spec, SL))
        window = T.meta_var(find_window(shape, Q, rings, SL, sm_scale))
        features = T.meta_var(Featured(shape, SK, AL, LSE, soft_cap, SL, window_left, window))
        for by in T.thread_binding(num_groups, thread="blockIdx.y"):
            for bx in T.thread_binding(shape.units, thread="blockIdx.x"):
                for tx in T.thread_binding(shape.threads, thread="threadIdx.x"):
                    T.attr({"tirx.launch_bounds_min_blocks_per_sm": shape.ctas_per_sm})
                    attend_share(
                        shape, Q, caches, BT, lengths, WS, OUT, b, bx, by, tx, num_groups,
                        sm_scale, features,
                    )  # fmt: skip
        for by2 in T.thread_binding(b, thread="blockIdx.y"):
            for bx2 in T.thread_binding(merge_blocks(heads, b, num_groups), thread="blockIdx.x"):
                for tx2 in T.thread_binding(MERGE_THREADS, thread="threadIdx.x"):
                    merge_pieces(shape, lengths, WS, OUT, b, bx2, by2, tx2, num_groups, features)

    return main
