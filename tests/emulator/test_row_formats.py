"""``fill`` and ``flatten`` for GPUs in every codec, rotation, rule and head_dim."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from rows import rows
from specs import by_slot, kernel_caches, make_batch, scales_of

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from emulator import compile_functions
from emulator.row_checks import check_filled, check_flattened, guard_caches, new_rows, starts_of
from tq_tvm import reference
from tq_tvm.kernels.fill_cuda import FillConfig, fill_cuda
from tq_tvm.kernels.flatten_cuda import FlattenConfig, flatten_cuda
from tq_tvm.spec import CacheSpec

LENGTHS = [0, 1, 15, 33, 20]

# Codecs with each head_dim, where bits of a coordinate are in other places; rules with each way to
# find a level: the sum of its comparisons, a search, with and without a residual.
SPECS = [
    CacheSpec(128, 4, 2, 8, "bfloat16", "bshd", "tq42"),
    CacheSpec(64, 3, 3, 16, "float16", "bhsd", "mse3-mse4-plain-leastsquares"),
    CacheSpec(256, 1, 1, 32, "bfloat16", "bshd", "qjl4-mse3-signed-matched"),
    CacheSpec(128, 2, 2, 64, "float16", "bhsd", "qjl4-mse3-signed-unbiased"),
    CacheSpec(64, 2, 2, 16, "bfloat16", "bshd", "qjl4-mse2-signed-leastsquares"),
    CacheSpec(256, 2, 1, 16, "float16", "bshd", "mse4-mse2-plain-unbiased"),
    CacheSpec(128, 2, 2, 16, "float16", "bshd", "mse2-mse3-signed-norm"),
    CacheSpec(128, 2, 2, 8, "bfloat16", "bshd", "int8"),
    CacheSpec(64, 2, 2, 32, "float16", "bhsd", "int4"),
    CacheSpec(128, 2, 2, 16, "float16", "bshd", "fp8"),
    CacheSpec(64, 2, 2, 16, "bfloat16", "bhsd", "none"),
    CacheSpec(128, 2, 2, 16, "bfloat16", "bshd", "tq84"),
    CacheSpec(64, 2, 2, 16, "float16", "bshd", "fp8-int8-plain"),
    CacheSpec(256, 2, 1, 16, "bfloat16", "bhsd", "int4-none-signed"),
]
# Rows that lanes rotate: of K and V of different head_dims, and of those that are no power of two.
SPECS += [
    CacheSpec(128, 2, 2, 16, "bfloat16", "bshd", "tq43", 64),
    CacheSpec(64, 1, 1, 16, "float16", "bhsd", "int8-mse2-plain-unbiased", 256),
    CacheSpec(80, 2, 2, 8, "bfloat16", "bhsd", "mse3-mse3-signed-matched"),
    CacheSpec(96, 2, 2, 16, "float16", "bshd", "qjl4-mse2-plain-leastsquares"),
    CacheSpec(192, 1, 1, 16, "bfloat16", "bshd", "qjl4-mse3-signed-unbiased", 112),
    CacheSpec(112, 2, 2, 32, "float16", "bshd", "int4-int8"),
    CacheSpec(80, 2, 2, 16, "bfloat16", "bshd", "fp8-none"),
    CacheSpec(192, 1, 1, 16, "float16", "bhsd", "none-int4-signed", 96),
    CacheSpec(576, 1, 1, 8, "bfloat16", "bshd", "mse3-mse2-signed-unbiased"),
    CacheSpec(576, 1, 1, 16, "float16", "bhsd", "qjl4-int8-plain-norm", 64),
]
CONFIGS = {64: FillConfig(2, 2, 1, 1, 2, 96), 128: FillConfig(2, 1, 1, 1, 1, 96)}
CONFIGS[256] = FillConfig(1, 2, 2, 2, 2, 128)

each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.label)


@pytest.fixture(scope="module")
def fill(tmp_path_factory):
    """``fill_table`` of a spec, compiled once."""

    @functools.cache
    def function(spec):
        config = CONFIGS.get(spec.head_dim, CONFIGS[128])
        func = fill_cuda(spec, config, by_table=True)
        return compile_functions({"fill": func}, tmp_path_factory.mktemp("fill"))["fill"]

    return function


def filled(function, spec, k, v):
    batch = make_batch(spec, "cpu", LENGTHS)
    guards = guard_caches(batch)
    caches = kernel_caches(spec, batch.caches)
    function(k, v, *caches, batch.block_table, batch.seq_lens, batch.starts)
    return batch, guards


@each_spec
@pytest.mark.parametrize("kind", ["offset", "heavy_tailed"])
def test_fill(fill, spec, kind):
    """With rows of zeros, whose scale is zero unless the rule is norm, and of one huge value.

    Constant rows too, of which an affine codec has no steps.
    """
    tokens, dtype = sum(LENGTHS), getattr(torch, spec.dtype)
    k, v = (
        rows(kind, tokens, spec.num_kv_heads, dim, seed=s).to(dtype)
        for s, dim in ((1, spec.head_dim), (2, spec.value_dim))
    )
    for x, row in ((k, 3), (v, 5)):
        x[row] = 0
        x[row + 1] = 0
        x[row + 1, :, 9] = 1e4
        if x.shape[-1] & (x.shape[-1] - 1) == 0 or spec.cache_format.rotation == "none":
            # Sums of other orders, which are zeros, the reference rounds to a sign or the other.
            x[row + 2] = -3.5
            x[row + 2, :, ::2] = -3.515625
    batch, guards = filled(fill(spec), spec, k, v)
    check_filled(spec, batch, guards, k, v, batch.slots)


@each_spec
def test_what_is_no_number_stays_in_its_row(fill, spec):
    """Scales of such rows are not finite either; others are what they are without them.

    Codecs without scales have a code for it, or the value itself.
    """
    k, v = new_rows(spec, sum(LENGTHS))
    clean, _ = filled(fill(spec), spec, k, v)
    k[4, 0, 17] = float("nan")
    v[6, -1, 3] = float("inf")
    batch, guards = filled(fill(spec), spec, k, v)
    for name, cache in enumerate(batch.caches):
        got, want = (by_slot(spec, c)[batch.slots] for c in (cache, clean.caches[name]))
        broken = torch.zeros(got.shape[:2], dtype=torch.bool)
        broken[(4, 0) if name % 2 == 0 else (6, -1)] = True
        assert torch.equal(got[~broken], want[~broken])
        codec = (spec.cache_format.key, spec.cache_format.value)[name % 2]
        if name > 1 and codec.meta:
            assert not bool(got[broken][:, 0].isfinite().any())
        elif name < 2 and not codec.meta:
            assert not torch.equal(got[broken], want[broken])
    if not spec.cache_format.key.meta and spec.cache_format.rotation == "none":
        check_filled(spec, batch, guards, k, v, batch.slots)


@each_spec
def test_flatten(tmp_path, spec):
    """Both functions."""
    batch = make_batch(spec, "cpu", LENGTHS)
    k, v = new_rows(spec, batch.tokens)
    k[3] = 0
    scales = scales_of(spec)
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots, **scales)
    where = (batch.block_table, batch.seq_lens, starts_of(batch))
    config = FlattenConfig(warps=2, rows=2, tiles=2, registers=64)
    back = dataclasses.replace(config, rows=1, contracted=1)
    functions = {
        "flatten": flatten_cuda(spec, config, unrotated=False),
        "flatten_unrotated": flatten_cuda(spec, back, unrotated=True),
    }
    module = compile_functions(functions, tmp_path)
    caches = kernel_caches(spec, batch.caches)
    for name in functions:
        check_flattened(
            spec, name, batch, k, lambda out, name=name: module[name](*caches, *where, *out)
        )
