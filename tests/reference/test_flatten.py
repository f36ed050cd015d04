"""``reference.flatten``: the right rows, in the right order, in either domain."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rows import rows
from specs import CPU_SPECS, by_slot, make_batch

from tq_tvm import reference
from tq_tvm.spec import CacheSpec

TINY = CacheSpec(64, 4, 2, 16, "float32", "bshd")


def filled(spec):
    batch = make_batch(spec, "cpu")
    k, v = (
        rows("gaussian", batch.tokens, spec.num_kv_heads, spec.head_dim, seed=s) for s in (1, 2)
    )
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    return batch, k, v


@pytest.mark.parametrize("spec", CPU_SPECS, ids=lambda s: s.label)
def test_rows_are_those_at_the_slots(spec):
    batch, k, v = filled(spec)
    got = reference.flatten_kv_cache(spec, *batch.caches, batch.block_table, batch.seq_lens)
    fmt = spec.cache_format
    for side, codec in enumerate((fmt.key, fmt.value)):
        cache, meta = (by_slot(spec, batch.caches[i])[batch.slots] for i in (side, side + 2))
        assert torch.equal(got[side], reference.decode_rows(cache, meta, codec))
        # And they are the rows that went in: no other row is this similar.
        similar = torch.cosine_similarity(
            got[side], reference.hadamard_rotate((k, v)[side]), dim=-1
        )
        assert similar.min() > 0.7


def test_rotated_back():
    batch, k, v = filled(TINY)
    args = (TINY, *batch.caches, batch.block_table, batch.seq_lens)
    rotated = reference.flatten_kv_cache(*args)
    back = reference.flatten_kv_cache(*args, rotate_back=True)
    for one, other, given in zip(rotated, back, (k, v), strict=True):
        assert torch.equal(other, reference.hadamard_rotate(one))
        assert torch.cosine_similarity(other, given, dim=-1).mean() > 0.93
        assert torch.cosine_similarity(one, given, dim=-1).mean().abs() < 0.1


def test_rows_past_the_last_sequence_are_zero():
    batch, _, _ = filled(TINY)
    args = (TINY, *batch.caches, batch.block_table, batch.seq_lens)
    for rotate_back in (False, True):
        exact = reference.flatten_kv_cache(*args, rotate_back=rotate_back)
        padded = reference.flatten_kv_cache(
            *args, rotate_back=rotate_back, out_tokens=batch.tokens + 5
        )
        for one, other in zip(exact, padded, strict=True):
            torch.testing.assert_close(other[: batch.tokens], one)
            assert bool((other[batch.tokens :] == 0).all())
            assert len(other) == batch.tokens + 5


def test_layouts_give_the_same_rows():
    results = []
    for layout in ("bshd", "bhsd"):
        spec = dataclasses.replace(TINY, layout=layout)
        batch, _, _ = filled(spec)
        results.append(
            reference.flatten_kv_cache(spec, *batch.caches, batch.block_table, batch.seq_lens)
        )
    for bshd, bhsd in zip(*results, strict=True):
        assert torch.equal(bshd, bhsd)


@pytest.mark.parametrize("length", [0, 1, 16, 17])
def test_one_sequence(length):
    """Only the pages that a length needs are read: the others of the table may be anything."""
    batch, _, _ = filled(TINY)
    pages = batch.block_table[-1].clone()
    pages[-(-length // TINY.page_size) :] = 10**6
    k, v = reference.sequence_rows(TINY, *batch.caches, pages, length)
    assert k.shape == v.shape == (length, TINY.num_kv_heads, TINY.head_dim)
    begin = batch.tokens - int(batch.seq_lens[-1])
    dense = reference.flatten_kv_cache(TINY, *batch.caches, batch.block_table, batch.seq_lens)
    assert torch.equal(k, dense[0][begin : begin + length])
    assert torch.equal(v, dense[1][begin : begin + length])
