"""``rotate``: y = x H / sqrt(D), H the Sylvester Walsh-Hadamard matrix, its own inverse."""

from __future__ import annotations

import torch

__all__ = ["hadamard_matrix", "hadamard_rotate"]


def hadamard_matrix(n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The orthonormal Hadamard matrix H / sqrt(n), float32 ``[n, n]``; n is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
    while matrix.shape[0] < n:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)], dim=0
        )
    return matrix / n**0.5


def hadamard_rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate the rows of ``x`` ``[..., D]``; float32."""
    return x.float() @ hadamard_matrix(x.shape[-1], x.device)
