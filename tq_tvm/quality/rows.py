"""Rows to measure formats on: what keys and values of models look like, and what breaks codes."""

from __future__ import annotations

import torch

__all__ = ["KINDS", "make_rows"]

KINDS = ("gaussian", "offset", "outliers", "heavy_tailed")

_OUTLIERS = 4


def make_rows(
    kind: str, count: int, dim: int, seed: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Float32 rows ``[count, dim]`` that bfloat16 holds exactly, the same for a seed.

    Parameters
    ----------
    kind
        ``"gaussian"``: N(0, 1). ``"offset"``: with 0.5 added to every channel. ``"outliers"``: with
        a constant of 8 or -8 in four channels, as keys before RoPE have. ``"heavy_tailed"``:
        Student's t of 3 degrees of freedom.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=generator)
    if kind == "offset":
        rows += 0.5
    elif kind == "outliers":
        channels = torch.randperm(dim, generator=generator)[:_OUTLIERS]
        rows[:, channels] += torch.tensor([8.0, -8.0]).repeat(_OUTLIERS // 2)
    elif kind == "heavy_tailed":
        chi = torch.randn(3, count, dim, generator=generator).square().mean(0).sqrt()
        rows = rows / chi
    return rows.bfloat16().float().to(device)
