"""``rotate``, ``fill`` and ``flatten`` for GPUs, run by the emulator, against the reference."""

from __future__ import annotations

import pytest
import torch
from rows import rows
from specs import SENTINEL, by_slot, make_batch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from emulator import compile_functions
from emulator.guarded import Guarded
from tq_tvm import reference, schedules
from tq_tvm.spec import FUNCTIONS, CacheSpec

SPEC = CacheSpec(128, 4, 2, 16, "bfloat16", "bshd")
OTHER = CacheSpec(64, 4, 2, 32, "float16", "bhsd")
LENGTHS = [0, 1, 15, 33, 64]
# As in ops: rounding the output once; rounding a scale once; distance that makes a code a tie.
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3}
META = {torch.float16: 1e-3, torch.bfloat16: 1e-3 + 2**-8}
TIE = 1e-4


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels of the default schedules; fill, which TVM takes seconds to lower, of one spec."""
    directory = tmp_path_factory.mktemp("rows")
    names = {SPEC: [name for name in FUNCTIONS if name != "decode"]}
    names[OTHER] = [name for name in names[SPEC] if FUNCTIONS[name] != "fill"]
    return {
        spec: compile_functions(
            {n: schedules.instantiate(n, spec, "cuda", None, symbol=n).func for n in chosen},
            directory,
        )
        for spec, chosen in names.items()
    }


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
        rotated = reference.hadamard_rotate(new)
        packed, scales = reference.encode_rows(rotated, codec)
        got = reference.unpack_codes(by_slot(spec, cache)[slots], codec.bits)
        differ = got != reference.unpack_codes(packed, codec.bits)
        ties = reference.boundary_distance(rotated, codec) < TIE
        assert not bool((differ & ~ties).any()), "a code differs that is no tie"
        assert int(differ.sum()) <= max(2, 1e-4 * differ.numel())
        got_scales = by_slot(spec, meta)[slots].float()
        assert bool(((got_scales - scales).abs() <= META[meta.dtype] * scales).all())
        assert bool((by_slot(spec, cache)[~written] == SENTINEL).all())
        assert bool(by_slot(spec, meta)[~written].isnan().all())
    for guard in guards:
        guard.check()


@pytest.mark.parametrize("spec", [SPEC, OTHER], ids=lambda s: s.label)
@pytest.mark.parametrize("count", [1, 7, 130])
def test_rotate(compiled, spec, count):
    x = rows("gaussian", count, spec.head_dim, seed=count).to(getattr(torch, spec.dtype))
    out = Guarded(tuple(x.shape), x.dtype)
    compiled[spec]["rotate"](x, out.tensor)
    want = reference.hadamard_rotate(x)
    assert (out.tensor.float() - want).norm() <= TOLERANCE[x.dtype] * want.norm()
    out.check()


def test_fill_by_slots(compiled):
    """Every fifth token is skipped."""
    spec = SPEC
    batch = make_batch(spec, "cpu", LENGTHS)
    guards = guard_caches(batch)
    k, v = new_rows(spec, batch.tokens)
    slots = batch.slots.clone()
    slots[::5] = -1
    compiled[spec]["fill_slots"](k, v, *batch.caches, slots)
    kept = slots >= 0
    check_filled(spec, batch, guards, k[kept], v[kept], slots[kept])


def test_fill_by_table(compiled):
    spec = SPEC
    batch = make_batch(spec, "cpu", LENGTHS)
    guards = guard_caches(batch)
    k, v = new_rows(spec, batch.tokens)
    compiled[spec]["fill_table"](
        k, v, *batch.caches, batch.block_table, batch.seq_lens, batch.starts
    )
    check_filled(spec, batch, guards, k, v, batch.slots)


@pytest.mark.parametrize("spec", [SPEC, OTHER], ids=lambda s: s.label)
@pytest.mark.parametrize("function", ["flatten", "flatten_unrotated"])
def test_flatten(compiled, spec, function):
    """Rows past the last sequence are zero."""
    batch = make_batch(spec, "cpu", LENGTHS)
    k, v = new_rows(spec, batch.tokens)
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    total = batch.tokens + 7
    out = [Guarded((total, *k.shape[1:]), k.dtype) for _ in range(2)]
    compiled[spec][function](
        *batch.caches, batch.block_table, batch.seq_lens, starts_of(batch),
        *(guard.tensor for guard in out),
    )  # fmt: skip
    want = reference.flatten_kv_cache(
        spec, *batch.caches, batch.block_table, batch.seq_lens,
        rotate_back=function == "flatten_unrotated", out_tokens=total,
    )  # fmt: skip
    for guard, expected in zip(out, want, strict=True):
        got = guard.tensor
        assert (got.float() - expected).norm() <= TOLERANCE[got.dtype] * expected.norm()
        assert bool((got[batch.tokens :] == 0).all())
        guard.check()
