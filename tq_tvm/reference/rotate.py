"""``rotate``: y = x H / sqrt(D), H a symmetric Hadamard matrix, so that it is its own inverse.

H is the Sylvester Walsh-Hadamard matrix of a power of two; of other D the Kronecker product of
`tq_tvm.formats.hadamard_factors`. A format's rotation may multiply by signs first, see
`rotate_rows`.
"""

from __future__ import annotations

import functools

import torch

from tq_tvm.formats import hadamard_factors, hadamard_row_masks, rotation_signs

__all__ = ["hadamard_matrix", "hadamard_rotate", "rotate_back", "rotate_rows"]


def hadamard_matrix(n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The orthonormal Hadamard matrix H / sqrt(n), float32 ``[n, n]``."""
    return _entries(n).to(device) / n**0.5


@functools.lru_cache(maxsize=32)
def _entries(n: int) -> torch.Tensor:
    *orders, power = hadamard_factors(n)
    matrix = torch.ones(1, 1)
    for order in orders:
        bits = torch.tensor(hadamard_row_masks(order))[:, None] >> torch.arange(order) & 1
        matrix = torch.kron(matrix, 1.0 - 2.0 * bits)
    for _ in range(power.bit_length() - 1):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix


def hadamard_rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate the rows of ``x`` ``[..., D]``; float32."""
    return x.float() @ hadamard_matrix(x.shape[-1], x.device)


def _signs(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rotation_signs(x.shape[-1]), dtype=torch.float32, device=x.device)


def rotate_rows(x: torch.Tensor, rotation: str) -> torch.Tensor:
    """Rotate rows ``[..., D]`` as a format does: y = (x signs) H / sqrt(D); float32."""
    if rotation == "none":
        return x.float()
    return hadamard_rotate(x * _signs(x) if rotation == "signed_hadamard" else x)


def rotate_back(y: torch.Tensor, rotation: str) -> torch.Tensor:
    """Undo `rotate_rows`: x = (y H / sqrt(D)) signs; float32."""
    if rotation == "none":
        return y.float()
    x = hadamard_rotate(y)
    return x * _signs(x) if rotation == "signed_hadamard" else x
