"""``reference.fill``: rows at their slots, byte for byte those of an independent implementation."""

from __future__ import annotations

import dataclasses

import independent
import pytest
import torch
from rows import rows
from specs import CPU_SPECS, LENGTHS, SENTINEL, by_slot, make_batch

from tq_tvm import reference
from tq_tvm.spec import CacheSpec

TINY = CacheSpec(64, 4, 2, 16, "float32", "bshd")
RELATIVE = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}
TIE = 1e-5


def new_rows(spec, tokens):
    return [rows("gaussian", tokens, spec.num_kv_heads, spec.head_dim, seed=s) for s in (1, 2)]


@pytest.mark.parametrize("spec", CPU_SPECS, ids=lambda s: s.label)
def test_bytes_of_the_independent_implementation(spec):
    batch = make_batch(spec, "cpu", [3, 1])
    k, v = new_rows(spec, 4)
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    ties = 0
    for side, encode in ((0, independent.encode_key), (1, independent.encode_value)):
        cache, meta = (by_slot(spec, batch.caches[i])[batch.slots] for i in (side, side + 2))
        for token in range(4):
            for head in range(spec.num_kv_heads):
                packed, scales, margins = encode((k, v)[side][token, head].tolist())
                if cache[token, head].tolist() != packed:
                    assert min(margins) < TIE
                    ties += 1
                for got, want in zip(meta[token, head].tolist(), scales, strict=True):
                    assert abs(got - want) <= 1.01 * RELATIVE[meta.dtype] * want
    assert ties <= 1


def test_layouts_hold_the_same_rows():
    k, v = new_rows(TINY, sum(LENGTHS))
    held = []
    for layout in ("bshd", "bhsd"):
        spec = dataclasses.replace(TINY, layout=layout)
        batch = make_batch(spec, "cpu")
        reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
        held.append([by_slot(spec, cache)[batch.slots] for cache in batch.caches])
    for bshd, bhsd in zip(*held, strict=True):
        assert torch.equal(bshd, bhsd)


def test_negative_slots_and_other_slots_are_left_alone():
    batch = make_batch(TINY, "cpu")
    k, v = new_rows(TINY, batch.tokens)
    slots = batch.slots.clone()
    slots[::3] = -1
    reference.fill_kv_cache(TINY, k, v, *batch.caches, slot_mapping=slots)
    written = torch.zeros(len(by_slot(TINY, batch.caches[0])), dtype=torch.bool)
    written[slots[slots >= 0]] = True
    for cache in batch.caches:
        by_row = by_slot(TINY, cache)
        if cache.dtype == torch.uint8:
            assert bool((by_row[~written] == SENTINEL).all())
            assert bool((by_row[written] != SENTINEL).flatten(1).any(1).all())
        else:
            assert bool(by_row[~written].isnan().all())
            assert bool(by_row[written].isfinite().all())


def test_by_table_is_by_slots():
    batch, again = make_batch(TINY, "cpu"), make_batch(TINY, "cpu")
    k, v = new_rows(TINY, batch.tokens)
    reference.fill_kv_cache(TINY, k, v, *batch.caches, slot_mapping=batch.slots)
    reference.fill_kv_cache(
        TINY, k, v, *again.caches, block_table=again.block_table, seq_lens=again.seq_lens,
        q_start_loc=again.starts,
    )  # fmt: skip
    for one, other in zip(batch.caches, again.caches, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_token_slots():
    """New tokens are the last of their sequence; those before position 0 have no slot."""
    table = torch.tensor([[7, 3, 5], [2, 9, 4], [1, 8, 6], [0, 0, 0]], dtype=torch.int32)
    lengths, counts = [35, 17, 2, 0], [4, 17, 3, 0]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    got = reference.token_slots(table, torch.tensor(lengths), starts, 16)
    want = []
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for position in range(length - count, length):
            page = int(table[b, max(position, 0) // 16])
            want.append(page * 16 + position % 16 if position >= 0 else -1)
    assert got.tolist() == want
    assert want[:4] == [3 * 16 + 15, 5 * 16, 5 * 16 + 1, 5 * 16 + 2]
    assert want[-3:] == [-1, 16, 17]
