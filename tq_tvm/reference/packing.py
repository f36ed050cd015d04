"""Packed codes: value ``j + i * D / n`` is at bit ``i * bits`` of byte ``j``, n = 8 / bits.

The first byte of a 4-bit row holds values 0 and D/2, the first byte of a 2-bit row values 0, D/4,
D/2 and 3D/4.
"""

from __future__ import annotations

import torch

__all__ = ["pack_codes", "unpack_codes"]


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes ``[..., D]`` of ``bits`` bits into uint8 ``[..., D * bits / 8]``."""
    parts = codes.to(torch.uint8).chunk(8 // bits, dim=-1)
    packed = torch.zeros_like(parts[0])
    for i, part in enumerate(parts):
        packed |= part << (i * bits)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `pack_codes`: uint8 ``[..., D * bits / 8]`` to int64 ``[..., D]``."""
    mask = (1 << bits) - 1
    return torch.cat([packed >> (i * bits) & mask for i in range(8 // bits)], dim=-1).long()
