"""Inputs of row kernels, and what they have to do with them."""

from __future__ import annotations

import torch
from rows import rows
from specs import SENTINEL, by_slot

from emulator.guarded import Guarded
from tq_tvm import reference

# As in ops: rounding the output once; rounding a scale once; distance that makes a code a tie.
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3}
META = {torch.float16: 1e-3, torch.bfloat16: 1e-3 + 2**-8}
TIE = 1e-4


def new_rows(spec, tokens):
    dtype = getattr(torch, spec.dtype)
    return [
        rows("heavy_tailed", tokens, spec.num_kv_heads, spec.head_dim, seed=s).to(dtype)
        for s in (1, 2)
    ]


def starts_of(batch):
    return (batch.seq_lens.cumsum(0) - batch.seq_lens).int()


def guard_caches(batch):
    """Move a batch's caches between guards, with their sentinels."""
    guards = [Guarded(tuple(cache.shape), cache.dtype) for cache in batch.caches]
    for guard, cache in zip(guards, batch.caches, strict=True):
        guard.tensor.copy_(cache)
    batch.caches = [guard.tensor for guard in guards]
    return guards


def check_filled(spec, batch, guards, k, v, slots):
    """Codes equal but for ties, which are counted; scales close; other slots untouched."""
    written = torch.zeros(by_slot(spec, batch.caches[0]).shape[0], dtype=torch.bool)
    written[slots] = True
    fmt = spec.cache_format
    sides = ((k, fmt.key, *batch.caches[0::2]), (v, fmt.value, *batch.caches[1::2]))
    for new, codec, cache, meta in sides:
        rotated = reference.rotate_rows(new, fmt.rotation)
        packed, scales = reference.encode_rows(rotated, codec, fmt.scale_rule)
        got = reference.unpack_codes(by_slot(spec, cache)[slots], *codec.plane_bits)
        differ = got != reference.unpack_codes(packed, *codec.plane_bits)
        ties = reference.boundary_distance(rotated, codec) < TIE
        assert not bool((differ & ~ties).any()), "a code differs that is no tie"
        assert int(differ.sum()) <= max(2, 1e-4 * differ.numel())
        got_scales = by_slot(spec, meta)[slots].float()
        close = (got_scales - scales).abs() <= META[meta.dtype] * scales
        if fmt.scale_rule != "norm":
            # Of other codes another scale.
            close |= differ.any(-1, keepdim=True)
        assert bool(close.all())
        assert bool((by_slot(spec, cache)[~written] == SENTINEL).all())
        assert bool(by_slot(spec, meta)[~written].isnan().all())
    for guard in guards:
        guard.check()


def check_flattened(spec, function, batch, k, call):
    """``call(out tensors)`` writes what the reference gives, and zeros past the last sequence."""
    total = batch.tokens + 7
    out = [Guarded((total, *k.shape[1:]), k.dtype) for _ in range(2)]
    call([guard.tensor for guard in out])
    want = reference.flatten_kv_cache(
        spec, *batch.caches, batch.block_table, batch.seq_lens,
        rotate_back=function == "flatten_unrotated", out_tokens=total,
    )  # fmt: skip
    for guard, expected in zip(out, want, strict=True):
        got = guard.tensor
        assert (got.float() - expected).norm() <= TOLERANCE[got.dtype] * expected.norm()
        assert bool((got[batch.tokens :] == 0).all())
        guard.check()
