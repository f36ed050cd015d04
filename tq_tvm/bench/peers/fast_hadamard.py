"""fast_hadamard_transform: the rotation alone."""

from __future__ import annotations

import torch

from tq_tvm import reference
from tq_tvm.bench.baseline import Peer

__all__ = ["rotate"]

_CHECKED_ROWS = 64
_TOLERANCE = 0.05


def rotate(x: torch.Tensor) -> Peer:
    """Rotate the rows of ``x`` ``[rows, D]`` into a new tensor."""
    import fast_hadamard_transform as package

    scale = x.shape[-1] ** -0.5
    rows = range(min(_CHECKED_ROWS, len(x)))
    return Peer(
        call=lambda: package.hadamard_transform(x, scale),
        bytes=2 * x.numel() * x.element_size(),
        versions={"fast_hadamard_transform": package.__version__},
        rows=rows,
        wanted=[reference.hadamard_rotate(x[: len(rows)])],
        tolerance=_TOLERANCE,
    )
