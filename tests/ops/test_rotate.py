"""``rotate``: hadamard_rotate against the reference."""

from __future__ import annotations

import pytest
import torch
from rows import rows
from specs import CPU_SPECS, ROTATIONS

from tq_tvm import hadamard_rotate, reference
from tq_tvm.served import functions_on
from tq_tvm.spec import RotateSpec

# Rounding the output once, and float32 sums over log2(D) steps.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


FLOATS = RotateSpec(2048, "float32")


@pytest.mark.parametrize("count", [1, 7, 128, 1000])
@pytest.mark.parametrize("spec", [*CPU_SPECS, *ROTATIONS, FLOATS], ids=lambda s: s.label)
def test_equals_reference(library, device, spec, count):
    if device.type == "cuda" and not functions_on(spec, "cuda"):
        pytest.skip("GPUs have no kernel of this dimension")
    library(spec, device)
    dtype = getattr(torch, spec.dtype)
    x = rows("gaussian", count, spec.rotation.dim, seed=count).to(device, dtype)
    out = torch.full_like(x, float("nan"))
    assert hadamard_rotate(x, out=out) is out
    want = reference.hadamard_rotate(x)
    assert (out.float() - want).norm() <= TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("spec", [CPU_SPECS[0], RotateSpec(4096)], ids=lambda s: s.label)
def test_is_its_own_inverse_in_place(library, device, spec):
    library(spec, device)
    x = rows("heavy_tailed", 3, 5, spec.rotation.dim).to(device, torch.bfloat16)
    kept = x.clone()
    hadamard_rotate(x, out=x)
    assert not torch.equal(x, kept)
    hadamard_rotate(x, out=x)
    assert (x.float() - kept.float()).norm() <= 6e-3 * kept.float().norm()


def test_leading_axes_and_empty(library, device):
    spec = CPU_SPECS[0]
    library(spec, device)
    x = rows("gaussian", 2, 3, 4, spec.head_dim).to(device, torch.bfloat16)
    assert hadamard_rotate(x).shape == x.shape
    assert hadamard_rotate(x[:0]).shape == (0, 3, 4, spec.head_dim)
