"""Inputs of row kernels, and what they have to do with them."""

from __future__ import annotations

import torch
from rows import rows
from specs import SENTINEL, by_slot, scales_of

from emulator.guarded import Guarded
from tq_tvm import reference

# As in ops: rounding the output once; rounding a scale once; distance that makes a code a tie.
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3}
META = {torch.float16: 1e-3, torch.bfloat16: 1e-3 + 2**-8}
TIE = 1e-4


def new_rows(spec, tokens):
    dtype = getattr(torch, spec.dtype)
    return [
        rows("heavy_tailed", tokens, spec.num_kv_heads, dim, seed=s).to(dtype)
        for s, dim in ((1, spec.head_dim), (2, spec.value_dim))
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
    """Codes equal but for ties, which are counted; scales close; other slots untouched.

    Of a direct codec without a rotation every byte is the reference's.
    """
    written = torch.zeros(by_slot(spec, batch.caches[0]).shape[0], dtype=torch.bool)
    written[slots] = True
    fmt, scales = spec.cache_format, scales_of(spec)
    sides = (
        (k, fmt.key, *batch.caches[0::2], scales.get("k_scale", 1.0)),
        (v, fmt.value, *batch.caches[1::2], scales.get("v_scale", 1.0)),
    )
    for new, codec, cache, meta, tensor_scale in sides:
        rotated = reference.rotate_rows(new, fmt.rotation)
        packed, want = reference.encode_rows(
            rotated, codec, fmt.scale_rule, tensor_scale=tensor_scale, dtype=new.dtype
        )
        got, got_scales = by_slot(spec, cache)[slots], by_slot(spec, meta)[slots]
        if codec.family == "lloyd_max" or codec.family == "affine":
            got_codes, codes = (reference.unpack_codes(x, *codec.plane_bits) for x in (got, packed))
            differ = got_codes != codes
        else:
            differ = got != packed
            differ &= ~(got.isnan() & packed.isnan()) if codec.family == "none" else True
        if codec.family != "lloyd_max" and fmt.rotation == "none":
            assert not bool(differ.any())
            same = got_scales == want.to(meta.dtype)
            assert bool((same | (got_scales.isnan() & want.isnan())).all())
        else:
            if codec.family in ("lloyd_max", "affine"):
                ties = reference.boundary_distance(rotated, codec) < TIE
                assert not bool((differ & ~ties).any()), "a code differs that is no tie"
            if codec.family == "none":
                # Sums in another order: the neighbour, or the rest of a sum that is next to zero.
                off = (got.float() - packed.float()).abs()
                assert not bool((off > META[new.dtype] * packed.float().abs() + TIE).any())
            else:
                assert int(differ.sum()) <= max(2, 1e-4 * differ.numel())
            close = (got_scales.float() - want).abs() <= META[meta.dtype] * want.abs()
            if fmt.scale_rule != "norm":
                # Of other codes another scale.
                close |= differ.any(-1, keepdim=True)
            assert bool(close.all())
        others = by_slot(spec, cache)[~written]
        assert bool((others.isnan() if codec.family == "none" else others == SENTINEL).all())
        assert bool(by_slot(spec, meta)[~written].isnan().all())
    for guard in guards:
        guard.check()


def check_flattened(spec, function, batch, k, call):
    """``call(out tensors)`` writes what the reference gives, and zeros past the last sequence."""
    total = batch.tokens + 7
    dims = (spec.head_dim, spec.value_dim)
    out = [Guarded((total, spec.num_kv_heads, dim), k.dtype) for dim in dims]
    call([guard.tensor for guard in out])
    want = reference.flatten_kv_cache(
        spec, *batch.caches, batch.block_table, batch.seq_lens,
        rotate_back=function == "flatten_unrotated", out_tokens=total,
        **scales_of(spec),
    )  # fmt: skip
    for guard, expected in zip(out, want, strict=True):
        got = guard.tensor
        assert (got.float() - expected).norm() <= TOLERANCE[got.dtype] * expected.norm()
        assert bool((got[batch.tokens :] == 0).all())
        guard.check()
