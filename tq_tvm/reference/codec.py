"""One row to codes and scales, and back, for any `tq_tvm.formats.Codec`.

``y`` is a rotated row; `tq_tvm.formats` has the equations of Lloyd-Max codecs and scale rules.
The others::

    affine   lo = min y, hi = max y, L = 2^bits - 1
             scale = (hi - lo)/L    zero = -lo/scale    q = trunc(y/scale + zero + 0.5)
             a row whose hi - lo is at most max(|lo|, |hi|)/256 is a constant m = (lo + hi)/2:
             scale = |m|, zero = -sign(m), q = 0
             a row with inf or nan: scale = zero = nan, q = 0
             y^ = (q - zero) scale
    fp8      q = e4m3fn(y / scale), to nearest even, +-448 beyond it, nan to 0x7F;  y^ = q scale
    none     y in the model's dtype

Rows that are not finite have the codes of zeros under Lloyd-Max, and a scale that is not finite.
"""

from __future__ import annotations

import torch

from tq_tvm.formats import NORM_EPS, Codec
from tq_tvm.reference.packing import pack_codes, unpack_codes

__all__ = ["boundary_distance", "decode_rows", "encode_rows"]

_FP8_MAX = 448.0
_CONSTANT = 2.0**-8


def encode_rows(
    rows: torch.Tensor,
    codec: Codec,
    scale_rule: str | None = "norm",
    *,
    tensor_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode rotated float32 rows ``[..., D]``.

    Parameters
    ----------
    scale_rule
        Of Lloyd-Max codecs.
    tensor_scale
        Of ``fp8``.
    dtype
        The model's: of the result of ``none``.

    Returns
    -------
    A row of the cache, uint8 bytes or ``dtype``, and the scales ``[..., len(codec.meta)]`` in
    float32, before they are rounded to the model's dtype.
    """
    rows = rows.float()
    if codec.family == "lloyd_max":
        codes, scales = _encode_lloyd_max(rows, codec, scale_rule)
    elif codec.family == "affine":
        codes, scales = _encode_affine(rows, codec)
    else:
        empty = rows.new_zeros((*rows.shape[:-1], 0))
        if codec.family == "none":
            return rows.to(dtype), empty
        return _to_e4m3(rows / tensor_scale), empty
    return pack_codes(codes, *codec.plane_bits), scales


def decode_rows(
    packed: torch.Tensor, scales: torch.Tensor, codec: Codec, *, tensor_scale: float = 1.0
) -> torch.Tensor:
    """Dequantise to rotated float32 rows ``[..., D]``."""
    if codec.family == "none":
        return packed.float()
    if codec.family == "fp8":
        return packed.view(torch.float8_e4m3fn).float() * tensor_scale
    codes = unpack_codes(packed, *codec.plane_bits)
    scales = scales.float()
    if codec.family == "affine":
        return (codes - scales[..., 1:2]) * scales[..., :1]
    return scales[..., :1] * _unit_rows(codes, codec, scales[..., 1:2])


def _to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """The bytes of float8_e4m3fn, saturated."""
    codes = values.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(values.isnan(), 0x7F, codes)


def _encode_affine(rows: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    levels = (1 << codec.bits) - 1
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    middle = (low + high) * 0.5
    constant = high - low <= torch.maximum(low.abs(), high.abs()) * _CONSTANT
    scale = torch.where(constant, middle.abs(), (high - low) / levels)
    zero = torch.where(constant, -middle.sign(), -low / scale)
    codes = (rows / scale + zero + 0.5).nan_to_num(0.0, 0.0, 0.0).clamp(0, levels).long()
    finite = rows.isfinite().all(-1, keepdim=True)
    codes = torch.where(constant | ~finite, 0, codes)
    scales = torch.where(finite, torch.cat([scale, zero], -1), torch.nan)
    return codes, scales


# --- Lloyd-Max


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
    index = torch.bucketize(unit.nan_to_num(0.0), _table(codec.boundaries, rows) * sigma)
    residual = unit - _table(codec.centroids, rows)[index] * sigma
    return norm, unit, index, residual


def _encode_lloyd_max(
    rows: torch.Tensor, codec: Codec, scale_rule: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    norm, _, codes, residual = _quantise(rows, codec)
    dim = rows.shape[-1]
    gap = None
    if codec.residual_sign:
        codes = codes + len(codec.centroids) * (residual >= 0)
        if scale_rule == "norm":
            power = residual.square().sum(-1, keepdim=True) + NORM_EPS
            gap = power.sqrt() * dim**-0.5
        else:
            gap = residual.abs().sum(-1, keepdim=True) / dim
    scale = norm
    if scale_rule != "norm":
        unit = _unit_rows(codes, codec, gap)
        power, dot, size = (
            (a * b).sum(-1, keepdim=True) for a, b in ((rows, rows), (rows, unit), (unit, unit))
        )
        over, under = {
            "matched": (power, size),
            "least_squares": (dot, size),
            "unbiased": (power, dot),
        }[scale_rule or ""]
        scale = torch.where(under == 0, 0.0, over / under)
        scale = scale.sqrt() if scale_rule == "matched" else scale
    return codes, scale if gap is None else torch.cat([scale, gap], dim=-1)


def _unit_rows(codes: torch.Tensor, codec: Codec, gap: torch.Tensor | None) -> torch.Tensor:
    """What the codes say of a row of unit length."""
    levels = len(codec.centroids)
    rows = _table(codec.centroids, codes)[codes % levels] * codes.shape[-1] ** -0.5
    if codec.residual_sign:
        assert gap is not None
        rows = rows + gap * torch.where(codes >= levels, 1.0, -1.0)
    return rows


def boundary_distance(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    """How far each coordinate is from the nearest decision.

    A kernel whose arithmetic differs in the last bits may decide otherwise where this is tiny. In
    standard deviations (1/sqrt(D)) for Lloyd-Max codecs, in steps for affine ones; infinite where
    nothing is rounded by a decision of the codec.
    """
    if codec.family == "affine":
        _, scales = _encode_affine(rows, codec)
        steps = rows / scales[..., :1] + scales[..., 1:2] + 0.5
        return (steps - steps.round()).abs()
    if codec.family != "lloyd_max":
        return torch.full_like(rows, torch.inf)
    root = rows.shape[-1] ** 0.5
    _, unit, _, residual = _quantise(rows, codec)
    gaps = (unit[..., None] * root - _table(codec.boundaries, rows)).abs().amin(-1)
    return torch.minimum(gaps, residual.abs() * root) if codec.residual_sign else gaps
