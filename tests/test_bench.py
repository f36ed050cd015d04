"""What a benchmark compares with, and what it prints."""

from __future__ import annotations

import pytest
import torch
import tvm_ffi
from rows import rows
from specs import CPU_SPECS

from tq_tvm import PagedKVCache, ops, reference
from tq_tvm.bench.host import host_costs
from tq_tvm.bench.results import Row
from tq_tvm.bench.steps import fill_steps, rotate_steps
from tq_tvm.bench.table import table
from tq_tvm.bench.workloads import workloads
from tq_tvm.spec import RotateSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("dim", [64, 1024])
def test_torch_rotates_the_same(dim):
    x = rows("gaussian", 5, dim).bfloat16()
    out = torch.empty_like(x)
    want = reference.hadamard_rotate(x)
    for step in rotate_steps(x, out).values():
        out.fill_(float("nan"))
        step()
        assert (out.float() - want).norm() <= 3e-3 * want.norm()


def test_torch_fills_the_same(library):
    spec = CPU_SPECS[0]
    library(spec, CPU)
    k, v = (
        rows("gaussian", 9, spec.num_kv_heads, spec.head_dim, seed=s).bfloat16() for s in (1, 2)
    )
    slots = torch.randperm(2 * spec.page_size)[:9]
    ours, theirs = (PagedKVCache(spec, 2, CPU) for _ in range(2))
    ours.fill(k, v, slot_mapping=slots)
    (step,) = fill_steps(theirs, k, v, slots).values()
    step()
    # Codes of float32 programs may differ at a tie.
    assert (ours.k_cache != theirs.k_cache).float().mean() < 1e-3
    assert (ours.v_cache != theirs.v_cache).float().mean() < 1e-3


def test_rotations_of_a_gib():
    large = [w for w in workloads("cuda") if w.kernel == "rotate" and not w.graph]
    assert {w.spec.rotation.dim for w in large} >= {64, 256, 512, 1024, 4096}
    assert all(w.batch * w.spec.rotation.dim * 2 == 1 << 30 for w in large)
    assert any(w.graph and w.spec == RotateSpec(128) for w in workloads("cuda"))


def test_a_table_shows_the_fastest_baseline():
    row = Row(
        "rotate", {"rows": 1, "n": 64, "graph": False}, 2.0, 1, 1.0, 1.0, 1.0, False, None, None,
        {"torch, slow": 9.0, "torch, fast": 3.0}, {},
    )  # fmt: skip
    assert "3.0 (torch, fast)" in table([row])
    assert "1.50x" in table([row])


def test_host_costs(library):
    """Every call is timed, and nothing of it stays patched."""
    spec = CPU_SPECS[0]
    library(spec, CPU)
    costs = list(host_costs(spec, CPU, batches=1))
    names = ["hadamard_rotate", "fill_kv_cache", "flatten_kv_cache", "paged_decode"]
    assert [cost.name for cost in costs] == names
    assert all(min(cost.call, cost.kernel, cost.through_torch) > 0 for cost in costs)
    for module in (ops.rotate, ops.fill, ops.flatten, ops.decode):
        for found in module._loaded.values():
            for variant in getattr(found, "loaded", found).variants:
                assert isinstance(variant.call, tvm_ffi.Function)
    assert not torch.compiler.is_compiling()
