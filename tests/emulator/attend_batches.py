"""Ragged batches with every feature for the emulator's tests of ``attend`` and ``prefill``."""

from __future__ import annotations

import torch
from rows import rows
from specs import kernel_caches, make_batch, scales_of

from emulator.guarded import Guarded
from tq_tvm import reference

LIMIT = {torch.float16: 5e-3, torch.bfloat16: 1e-2}
LSE_LIMIT = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = [70, 3, 200, 0, 65, 40, 0]
QUERIES = [70, 1, 37, 0, 2, 0, 1]
FEATURES = {
    "plain": {},
    "window": {"window_left": 30},
    "kept": {"window_left": 7, "kept_tokens": 5},
    "cap": {"soft_cap": 1.5},
    "alibi": {"alibi_slopes": 0.3},
    "sinks": {"sinks": 2.0},
    "all": {
        "window_left": 33, "kept_tokens": 3, "soft_cap": 2.0, "alibi_slopes": 0.1, "sinks": 1.0
    },
}  # fmt: skip


TABLE = ("block_table", "seq_lens", "q_start_loc")


def new_rings(spec, sequences):
    """Rings of another order, with two more, full of what is no number; none without a window."""
    if not spec.window:
        return ()
    shape, dtype = (sequences + 2, spec.window, spec.num_kv_heads), getattr(torch, spec.dtype)
    dims = (spec.head_dim, spec.value_dim)
    rings = (torch.full((*shape, dim), float("nan"), dtype=dtype) for dim in dims)
    slots = torch.arange(sequences, dtype=torch.int32).flip(0)
    slots[0] += 2
    return (*rings, slots)


NAN8 = 0x7F
"""A code of fp8 that is no number, where no token has been filled."""


class Problem:
    """Inputs of a batch, what attention gives, and outputs that show writes around them."""

    def __init__(
        self, spec, features, *, lengths=LENGTHS, queries=QUERIES, scale=1.0, want_lse=True,
        padding=0, growth=1.0,
    ):  # fmt: skip
        self.spec, self.features = spec, dict(features)
        batch = self.batch = make_batch(spec, "cpu", lengths)
        fmt = spec.cache_format
        for cache, codec in zip(batch.caches, (fmt.key, fmt.value), strict=False):
            if codec.tensor_scale:
                cache.fill_(NAN8)
        k, v = (
            rows("gaussian", batch.tokens, spec.num_kv_heads, dim, seed=s)
            for s, dim in ((1, spec.head_dim), (2, spec.value_dim))
        )
        # Values of later tokens are larger.
        v = v * torch.linspace(1, growth, len(v))[:, None, None]
        scales = scales_of(spec)
        self.rings = new_rings(spec, len(lengths))
        where = (batch.block_table, batch.seq_lens, batch.starts)
        reference.fill_kv_cache(
            spec, k, v, *batch.caches, **dict(zip(TABLE, where, strict=True)),
            window=self.rings or None, **scales,
        )  # fmt: skip
        self.tokens, heads = sum(queries), spec.num_q_heads
        q = rows("gaussian", self.tokens + padding, heads, spec.head_dim, seed=3) * scale
        self.q = q.to(getattr(torch, spec.dtype))
        self.starts = torch.tensor([0, *queries]).cumsum(0).int()
        for name in ("sinks", "alibi_slopes"):
            if name in self.features:
                largest = self.features[name]
                self.features[name] = torch.linspace(largest / 4, largest, heads)
        self._out = Guarded((len(q), heads, spec.value_dim), self.q.dtype)
        self._lse = Guarded((len(q), heads if want_lse else 0), torch.float32)
        self.want, self.want_lse = reference.paged_attend(
            spec, self.q, *batch.caches, batch.block_table, batch.seq_lens,
            cu_seqlens_q=self.starts, window=self.rings or None, **self.features, **scales,
        )  # fmt: skip

    def arguments(self, *workspace, parts=None):
        """Of a kernel: tensors, then numbers; a workspace is a tensor and its parts.

        Without a workspace there may be ``parts``.
        """
        none, given, batch = torch.empty(0), self.features, self.batch
        return [
            self.q, *kernel_caches(self.spec, batch.caches), batch.block_table, batch.seq_lens,
            self.starts,
            given.get("sinks", none), given.get("alibi_slopes", none), *self.rings, *workspace[:1],
            self.out, self.lse, *workspace[1:], *([] if parts is None else [parts]),
            self.spec.head_dim**-0.5,
            given.get("soft_cap", 0.0), given.get("window_left", -1), given.get("kept_tokens", 0),
        ]  # fmt: skip

    @property
    def out(self):
        return self._out.tensor

    @property
    def lse(self):
        return self._lse.tensor

    def check(self):
        """Nothing around the outputs was written, and they are right, row by row."""
        self._out.check()
        self._lse.check()
        limit, tokens = LIMIT[self.out.dtype], self.tokens
        assert close(self.out[:tokens], self.want[:tokens], limit)
        for got, row in zip(self.out[:tokens], self.want[:tokens], strict=True):
            assert close(got, row, 2 * limit)
        if self.lse.numel():
            lse, want = self.lse[:tokens], self.want_lse[:tokens]
            assert torch.equal(lse.isinf(), want.isinf())
            seen = want.isfinite()
            assert (lse[seen] - want[seen]).abs().max() <= LSE_LIMIT[self.out.dtype]


def close(got, want, limit):
    """Relative error of the norm; zeros have to be zeros."""
    norm = want.norm()
    return ((got.float() - want).norm() <= limit * norm).item()
