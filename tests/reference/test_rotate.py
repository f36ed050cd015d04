"""``reference.rotate``: the Hadamard matrix against other definitions of it."""

from __future__ import annotations

import independent
import pytest
import torch
from rows import KINDS, rows

from tq_tvm import reference
from tq_tvm.spec import HEAD_DIMS


def explicit(n: int) -> torch.Tensor:
    """H[i][j] = (-1)^popcount(i & j), float64, unscaled."""
    index = torch.arange(n)
    both = index[:, None] & index
    parity = sum(both >> bit & 1 for bit in range(n.bit_length())) % 2
    return 1.0 - 2.0 * parity.double()


POWERS = [n for n in HEAD_DIMS if n & (n - 1) == 0]
OTHERS = [n for n in HEAD_DIMS if n & (n - 1)]


@pytest.mark.parametrize("n", [1, 2, 4, *POWERS])
def test_matrix_is_sylvesters(n):
    matrix = reference.hadamard_matrix(n)
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix.double(), explicit(n) / n**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", OTHERS)
def test_matrix_is_the_independent_ones(n):
    matrix = reference.hadamard_matrix(n) * n**0.5
    torch.testing.assert_close(matrix.double(), torch.from_numpy(independent.hadamard(n)))


@pytest.mark.parametrize("n", POWERS)
def test_matrix_is_scipys(n):
    scipy_linalg = pytest.importorskip("scipy.linalg")
    want = torch.from_numpy(scipy_linalg.hadamard(n)) / n**0.5
    torch.testing.assert_close(reference.hadamard_matrix(n), want.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", HEAD_DIMS)
def test_matrix_is_orthonormal_and_symmetric(n):
    matrix = reference.hadamard_matrix(n)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n), rtol=0, atol=3e-6)


@pytest.mark.parametrize("n", HEAD_DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_rotation(kind, n):
    """Equal to the independent one, keeps norms and inner products, and is its own inverse."""
    x = rows(kind, 2, 3, n)
    y = reference.hadamard_rotate(x)
    for row, got in zip(x.reshape(-1, n), y.reshape(-1, n), strict=True):
        want = torch.from_numpy(independent.rotate(row.tolist())).float()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close((y[0] * y[1]).sum(-1), (x[0] * x[1]).sum(-1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(reference.hadamard_rotate(y), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_float32(dtype):
    x = rows("gaussian", 5, 128).to(dtype)
    y = reference.hadamard_rotate(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, reference.hadamard_rotate(x.float()))


def test_a_constant_row_becomes_one_coordinate():
    y = reference.hadamard_rotate(torch.full((128,), 0.5))
    want = torch.zeros(128)
    want[0] = 0.5 * 128**0.5
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("n", HEAD_DIMS)
def test_signed_rotation(n):
    """Equal to the independent one, and undone."""
    x = rows("offset", 3, n)
    y = reference.rotate_rows(x, "signed_hadamard")
    for row, got in zip(x, y, strict=True):
        want = torch.from_numpy(independent.rotate(row.tolist(), signed=True)).float()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.rotate_back(y, "signed_hadamard"), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", HEAD_DIMS)
def test_signs_spread_an_offset(n):
    """Equal channels: one rotated value without signs, none much above the others with them."""
    ones = torch.ones(1, n)
    signed = reference.rotate_rows(ones, "signed_hadamard").abs().max()
    assert signed <= 3.6
    assert reference.rotate_rows(ones, "none").equal(ones)
