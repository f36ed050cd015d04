"""``flatten``: flatten_kv_cache against the reference."""

from __future__ import annotations

import pytest
import torch
from rows import rows
from specs import CPU_SPECS, make_batch

from tq_tvm import flatten_kv_cache, reference

TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def filled(spec, device, **kwargs):
    """A batch whose caches hold Gaussian rows, written by the reference."""
    batch = make_batch(spec, device, **kwargs)
    k, v = (
        rows("gaussian", batch.tokens, spec.num_kv_heads, spec.head_dim, seed=s).to(device)
        for s in (1, 2)
    )
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    return batch


@pytest.mark.parametrize("rotate_back", [False, True])
@pytest.mark.parametrize("spec", CPU_SPECS, ids=lambda s: s.label)
def test_equals_reference(library, device, spec, rotate_back):
    library(spec, device)
    batch = filled(spec, device)
    total = batch.tokens + 7
    dtype = getattr(torch, spec.dtype)
    out = tuple(
        torch.full((total, spec.num_kv_heads, spec.head_dim), float("nan")).to(device, dtype)
        for _ in range(2)
    )
    flatten_kv_cache(
        *batch.caches, batch.block_table, batch.seq_lens, out_tokens=total,
        rotate_back=rotate_back, layout=spec.layout, out=out,
    )  # fmt: skip
    want = reference.flatten_kv_cache(
        spec, *batch.caches, batch.block_table, batch.seq_lens,
        rotate_back=rotate_back, out_tokens=total,
    )  # fmt: skip
    for got, rows_ in zip(out, want, strict=True):
        assert (got.float() - rows_).norm() <= TOLERANCE[dtype] * rows_.norm()
        assert bool((got[batch.tokens :] == 0).all()), "rows past the last sequence are zero"
