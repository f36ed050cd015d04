"""``rotate``, ``fill`` and ``flatten`` for GPUs, run by the emulator, against the reference."""

from __future__ import annotations

import pytest
import torch
from rows import rows
from specs import make_batch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from emulator import compile_functions
from emulator.guarded import Guarded
from emulator.row_checks import (
    TOLERANCE,
    check_filled,
    check_flattened,
    guard_caches,
    new_rows,
    starts_of,
)
from tq_tvm import reference, schedules
from tq_tvm.spec import FUNCTIONS, CacheSpec

SPEC = CacheSpec(128, 4, 2, 16, "bfloat16", "bshd")
OTHER = CacheSpec(64, 4, 2, 32, "float16", "bhsd")
ATTENTION = ("decode", "decode_featured", "attend", "prefill", "mla")
LENGTHS = [0, 1, 15, 33, 64]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels of the default schedules; fill, which TVM takes seconds to lower, of one spec."""
    directory = tmp_path_factory.mktemp("rows")
    names = {SPEC: [name for name in FUNCTIONS if name not in ATTENTION]}
    names[OTHER] = [name for name in names[SPEC] if FUNCTIONS[name] != "fill"]
    return {
        spec: compile_functions(
            {n: schedules.instantiate(n, spec, "cuda", None, symbol=n).func for n in chosen},
            directory,
        )
        for spec, chosen in names.items()
    }


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
    batch = make_batch(spec, "cpu", LENGTHS)
    k, v = new_rows(spec, batch.tokens)
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    where = (batch.block_table, batch.seq_lens, starts_of(batch))
    check_flattened(
        spec, function, batch, k, lambda out: compiled[spec][function](*batch.caches, *where, *out)
    )
