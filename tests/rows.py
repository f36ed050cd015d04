"""Rows that a quantiser meets: what attention keys and values look like, and what breaks it."""

from __future__ import annotations

import torch

KINDS = ("gaussian", "offset", "heavy_tailed")


def rows(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Float32 rows: N(0, 1); N(0, 1) with every channel offset by 0.5; Student t, 3 degrees."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator)
    if kind == "gaussian":
        return normal
    if kind == "offset":
        return normal + 0.5
    chi = torch.randn(3, *shape, generator=generator).square().mean(0).sqrt()
    return normal / chi
