"""``fill`` and ``flatten`` by tensor cores and look-ups, run by the emulator."""

from __future__ import annotations

import functools

import pytest
import torch
from rows import KINDS, rows
from specs import make_batch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from emulator import compile_functions
from emulator.row_checks import check_filled, check_flattened, guard_caches, new_rows, starts_of
from tq_tvm import reference
from tq_tvm.kernels.fill_cuda import FillConfig, fill_cuda
from tq_tvm.kernels.flatten_cuda import FlattenConfig, flatten_cuda
from tq_tvm.spec import CacheSpec

LENGTHS = [0, 1, 15, 33, 64, 0, 0, 3]
FILLS = {
    "head128": (CacheSpec(128, 4, 2, 16, "bfloat16", "bshd"), FillConfig(2, 1, 1, 1, 1, 128)),
    "head128_half": (CacheSpec(128, 3, 3, 64, "float16", "bhsd"), FillConfig(4, 2, 2, 2, 2, 96)),
    "head64": (CacheSpec(64, 6, 3, 32, "float16", "bshd"), FillConfig(2, 4, 0, 1, 3, 96)),
    "head256": (CacheSpec(256, 2, 1, 64, "bfloat16", "bhsd"), FillConfig(1, 4, 2, 1, 2, 128)),
}
FLATTENS = {
    "head128": (CacheSpec(128, 4, 2, 16, "bfloat16", "bshd"), FlattenConfig(2, 1, 2, 64)),
    "head128_half": (CacheSpec(128, 3, 3, 64, "float16", "bhsd"), FlattenConfig(2, 2, 3, 64)),
    "head64": (CacheSpec(64, 6, 3, 32, "float16", "bshd"), FlattenConfig(1, 2, 1, 64)),
    "head256": (CacheSpec(256, 2, 1, 64, "bfloat16", "bhsd"), FlattenConfig(4, 4, 1, 64)),
}
UNROTATED = {
    "head128": FlattenConfig(2, 1, 2, 64, 1),
    "head128_half": FlattenConfig(2, 1, 3, 64, 2),
    "head64": FlattenConfig(1, 1, 1, 64, 0),
    "head256": FlattenConfig(4, 1, 1, 64, 2),
}


@pytest.fixture(scope="module")
def fill(tmp_path_factory):
    """Both functions of a case, compiled once."""

    @functools.cache
    def module(case):
        spec, config = FILLS[case]
        functions = {
            name: fill_cuda(spec, config, name == "fill_table")
            for name in ("fill_slots", "fill_table")
        }
        return compile_functions(functions, tmp_path_factory.mktemp("fill"))

    return module


def filled(module, spec, kind="gaussian", edit=None):
    """Fill by table; returns the batch, its guards and the rows."""
    batch = make_batch(spec, "cpu", LENGTHS)
    guards = guard_caches(batch)
    k, v = (
        rows(kind, batch.tokens, spec.num_kv_heads, spec.head_dim, seed=s).to(
            getattr(torch, spec.dtype)
        )
        for s in (1, 2)
    )
    if edit is not None:
        edit(k, v)
    module["fill_table"](k, v, *batch.caches, batch.block_table, batch.seq_lens, batch.starts)
    return batch, guards, k, v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FILLS)
def test_fill_by_table(fill, case, kind):
    spec, _ = FILLS[case]
    batch, guards, k, v = filled(fill(case), spec, kind)
    check_filled(spec, batch, guards, k, v, batch.slots)


@pytest.mark.parametrize("case", FILLS)
def test_fill_by_slots(fill, case):
    """Every fifth token is skipped."""
    spec, _ = FILLS[case]
    batch = make_batch(spec, "cpu", LENGTHS)
    guards = guard_caches(batch)
    k, v = new_rows(spec, batch.tokens)
    slots = batch.slots.clone()
    slots[::5] = -1
    fill(case)["fill_slots"](k, v, *batch.caches, slots)
    kept = slots >= 0
    check_filled(spec, batch, guards, k[kept], v[kept], slots[kept])


@pytest.mark.parametrize("case", FILLS)
def test_rows_of_zeros_and_of_one_value(fill, case):
    """Exact zeros have the codes of the reference, on the negative side."""

    def edit(k, v):
        k[3], v[5, 0] = 0, 0
        k[7] = 0
        k[7, :, 9] = 1e4

    spec, _ = FILLS[case]
    batch, guards, k, v = filled(fill(case), spec, edit=edit)
    check_filled(spec, batch, guards, k, v, batch.slots)


def test_what_is_no_number_stays_in_its_row(fill):
    def edit(k, v):
        k[4, 0, 17] = float("nan")
        v[6, 1, 3] = float("inf")

    spec, _ = FILLS["head128"]
    batch, *_ = filled(fill("head128"), spec, edit=edit)
    clean, *_ = filled(fill("head128"), spec)
    slots = batch.slots
    for name in range(4):
        got, want = (
            b.caches[name].reshape(-1, spec.num_kv_heads, b.caches[name].shape[-1])[slots]
            for b in (batch, clean)
        )
        same = (got == want).all(-1)
        broken = torch.zeros_like(same)
        broken[4 if name % 2 == 0 else 6, 0 if name % 2 == 0 else 1] = True
        assert bool(same[~broken].all())


@pytest.mark.parametrize("function", ["flatten", "flatten_unrotated"])
@pytest.mark.parametrize("case", FLATTENS)
def test_flatten(tmp_path, case, function):
    spec, config = FLATTENS[case]
    unrotated = function == "flatten_unrotated"
    func = flatten_cuda(spec, UNROTATED[case] if unrotated else config, unrotated)
    module = compile_functions({"flatten": func}, tmp_path)
    batch = make_batch(spec, "cpu", LENGTHS)
    k, v = new_rows(spec, batch.tokens)
    k[3] = 0
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    where = (batch.block_table, batch.seq_lens, starts_of(batch))
    check_flattened(
        spec, function, batch, k, lambda out: module["flatten"](*batch.caches, *where, *out)
    )
