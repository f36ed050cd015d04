"""The distortion that a codec has on Gaussian rows, from its centroids and boundaries alone."""

from __future__ import annotations

import torch

from tq_tvm.spec import Codec

__all__ = ["expected_distortion", "shannon_bound"]

_REACH = 10.0
_POINTS = 2_000_001


def expected_distortion(codec: Codec, head_dim: int | None = None) -> float:
    r"""E ||y - y^||^2 / ||y||^2 of a rotated Gaussian row under the scale rule ``norm``.

    A coordinate of the unit row is z / sqrt(D). As D goes to infinity z ~ N(0, 1); of a finite D
    its density is that of a coordinate of the sphere, (1 - z^2/D)^((D-3)/2), which has lighter
    tails. With r = z - c(z) its residual from the nearest centroid::

        without a residual sign      E r^2
        with one, s^2 = E r^2        E (r - s sign(r))^2 = 2 s^2 - 2 s E|r|

    where s is what the format calls g, times sqrt(D). The integrals are sums over a fine grid.

    Parameters
    ----------
    codec
        How keys, or values, are stored; a Lloyd-Max codec.
    head_dim
        D; None is infinity.
    """
    z = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    if head_dim is None:
        weight = torch.exp(-z.square() / 2)
    else:
        weight = (1 - z.square() / head_dim).clamp(min=0) ** ((head_dim - 3) / 2)
    weight /= weight.sum()
    boundaries = torch.tensor(codec.boundaries, dtype=torch.float64)
    centroids = torch.tensor(codec.centroids, dtype=torch.float64)
    residual = z - centroids[torch.bucketize(z, boundaries)]
    power = float(weight @ residual.square())
    if not codec.residual_sign:
        return power
    return 2 * power - 2 * power**0.5 * float(weight @ residual.abs())


def shannon_bound(bits: float) -> float:
    """The least distortion of a Gaussian source at a number of bits a value: 4^-bits."""
    return 4.0**-bits
