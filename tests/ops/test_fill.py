"""``fill``: fill_kv_cache against the reference and an independent implementation."""

from __future__ import annotations

import independent
import pytest
import torch
from rows import KINDS, rows
from specs import CPU_SPECS, SENTINEL, SPECS, by_slot, make_batch

from tq_tvm import fill_kv_cache, reference

# Distance from a decision, in standard deviations, below which float32 programs may disagree.
TIE = 1e-4
# Half a unit in the last place of the stored scale, beside the 1e-3 that arithmetic may cost.
META = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3 + 2**-8}


def _new_rows(spec, tokens, device, kind="gaussian"):
    dtype = getattr(torch, spec.dtype)
    return [
        rows(kind, tokens, spec.num_kv_heads, spec.head_dim, seed=s).to(device, dtype)
        for s in (1, 2)
    ]


def _check(spec, batch, k, v, slots):
    """Codes equal but for ties, which are counted; scales close; other slots untouched."""
    fmt = spec.cache_format
    written = torch.zeros(by_slot(spec, batch.caches[0]).shape[0], dtype=torch.bool)
    written[slots.cpu()] = True
    for new, codec, cache, meta in (
        (k, fmt.key, batch.caches[0], batch.caches[2]),
        (v, fmt.value, batch.caches[1], batch.caches[3]),
    ):
        rotated = reference.hadamard_rotate(new)
        packed, scales = reference.encode_rows(rotated, codec)
        got = reference.unpack_codes(by_slot(spec, cache)[slots], *codec.plane_bits)
        differ = got != reference.unpack_codes(packed, *codec.plane_bits)
        ties = reference.boundary_distance(rotated, codec) < TIE
        assert not bool((differ & ~ties).any()), "a code differs that is no tie"
        assert int(differ.sum()) <= max(2, 1e-4 * differ.numel())
        got_scales = by_slot(spec, meta)[slots].float()
        assert bool(((got_scales - scales).abs() <= META[meta.dtype] * scales).all())
        untouched = by_slot(spec, cache)[(~written).to(cache.device)]
        assert bool((untouched == SENTINEL).all())
        assert bool(by_slot(spec, meta)[(~written).to(meta.device)].isnan().all())


@pytest.mark.parametrize("spec", CPU_SPECS, ids=lambda s: s.label)
def test_prefill_by_table(library, device, spec):
    library(spec, device)
    batch = make_batch(spec, device)
    k, v = _new_rows(spec, batch.tokens, device)
    fill_kv_cache(
        k, v, *batch.caches, block_table=batch.block_table, seq_lens=batch.seq_lens,
        q_start_loc=batch.starts, layout=spec.layout,
    )  # fmt: skip
    _check(spec, batch, k, v, batch.slots)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda s: s.label)
def test_prefill_by_slots(library, device, spec, kind):
    library(spec, device)
    batch = make_batch(spec, device)
    k, v = _new_rows(spec, batch.tokens, device, kind)
    slots = batch.slots.clone()
    slots[::5] = -1
    fill_kv_cache(k, v, *batch.caches, slot_mapping=slots, layout=spec.layout)
    kept = slots >= 0
    _check(spec, batch, k[kept], v[kept], slots[kept])


@pytest.mark.parametrize("spec", SPECS[:1], ids=lambda s: s.label)
def test_append_one_token_and_chunks(library, device, spec):
    """New tokens go behind what a sequence already has, in a ragged mix of counts."""
    library(spec, device)
    batch = make_batch(spec, device)
    counts = torch.tensor(
        [min(n, c) for n, c in zip(batch.seq_lens.tolist(), [1, 1, 3] * 4, strict=False)]
    )
    starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).int().to(device)
    k, v = _new_rows(spec, int(counts.sum()), device)
    fill_kv_cache(
        k, v, *batch.caches, block_table=batch.block_table, seq_lens=batch.seq_lens,
        q_start_loc=starts, layout=spec.layout,
    )  # fmt: skip
    slots = reference.token_slots(batch.block_table, batch.seq_lens, starts, spec.page_size)
    _check(spec, batch, k, v, slots)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_an_independent_implementation(library, device, kind):
    spec = SPECS[0]
    library(spec, device)
    batch = make_batch(spec, device, [5])
    k, v = _new_rows(spec, 5, device, kind)
    fill_kv_cache(k, v, *batch.caches, slot_mapping=batch.slots, layout=spec.layout)
    ties = 0
    for side, encode in ((0, independent.encode_key), (1, independent.encode_value)):
        cache, meta = (by_slot(spec, batch.caches[i])[batch.slots].cpu() for i in (side, side + 2))
        for token in range(5):
            for head in range(spec.num_kv_heads):
                packed, scales, margins = encode((k, v)[side][token, head].float().tolist())
                got = cache[token, head].tolist()
                if got != packed:
                    assert min(margins) < TIE
                    ties += 1
                for have, want in zip(meta[token, head].float().tolist(), scales, strict=True):
                    assert abs(have - want) <= META[meta.dtype] * want
    assert ties <= 1
