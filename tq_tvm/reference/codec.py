"""One row to codes and scales, and back, for any `tq_tvm.spec.Codec`.

With y a rotated row, b the boundaries and c the centroids of the codec::

    n = sqrt(sum y^2 + eps)    u = y / n    idx = #{u > b/sqrt(D)}    r = u - c[idx]/sqrt(D)
    y^ = n (c[idx]/sqrt(D) + g (+1 where r >= 0, -1 elsewhere)),  g = sqrt(sum r^2 + eps)/sqrt(D)

where the second term, and bit log2(#centroids) of the code, exist only in codecs that store the
sign of the residual.
"""

from __future__ import annotations

import torch

from tq_tvm.reference.packing import pack_codes, unpack_codes
from tq_tvm.spec import NORM_EPS, Codec

__all__ = ["boundary_distance", "decode_rows", "encode_rows"]


def _table(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _quantise(
    rows: torch.Tensor, codec: Codec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm, unit row, centroid index and residual of rotated rows."""
    sigma = rows.shape[-1] ** -0.5
    norm = (rows.square().sum(-1, keepdim=True) + NORM_EPS).sqrt()
    unit = rows / norm
    # bucketize counts the boundaries strictly below a value.
    index = torch.bucketize(unit, _table(codec.boundaries, rows) * sigma)
    residual = unit - _table(codec.centroids, rows)[index] * sigma
    return norm, unit, index, residual


def encode_rows(rows: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode rotated float32 rows ``[..., D]``: bytes ``[..., D * bits / 8]``, scales float32."""
    norm, _, index, residual = _quantise(rows, codec)
    scales = [norm]
    if codec.residual_sign:
        index = index + len(codec.centroids) * (residual >= 0)
        power = residual.square().sum(-1, keepdim=True) + NORM_EPS
        scales.append(power.sqrt() * rows.shape[-1] ** -0.5)
    return pack_codes(index, codec.bits), torch.cat(scales, dim=-1)


def decode_rows(packed: torch.Tensor, scales: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Dequantise to rotated float32 rows ``[..., D]``."""
    codes = unpack_codes(packed, codec.bits)
    scales = scales.float()
    levels = len(codec.centroids)
    rows = _table(codec.centroids, scales)[codes % levels] * codes.shape[-1] ** -0.5
    if codec.residual_sign:
        rows = rows + scales[..., 1:2] * torch.where(codes >= levels, 1.0, -1.0)
    return scales[..., :1] * rows


def boundary_distance(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    """How far each coordinate is from the nearest decision, in standard deviations (1/sqrt(D)).

    A kernel whose arithmetic differs in the last bits may decide otherwise where this is tiny.
    """
    root = rows.shape[-1] ** 0.5
    _, unit, _, residual = _quantise(rows, codec)
    gaps = (unit[..., None] * root - _table(codec.boundaries, rows)).abs().amin(-1)
    return torch.minimum(gaps, residual.abs() * root) if codec.residual_sign else gaps
