"""Packed codes: planes of 1, 2, 4 or 8 bits a code, one after another.

In a plane, value ``j + i * D / n`` is at bit ``i * bits`` of byte ``j``, n = 8 / bits: the first
byte of a 4-bit row holds values 0 and D/2, that of a 2-bit row values 0, D/4, D/2 and 3D/4. The
first plane has the low bits of the codes.
"""

from __future__ import annotations

import torch

__all__ = ["pack_codes", "unpack_codes"]


def pack_codes(codes: torch.Tensor, *planes: int) -> torch.Tensor:
    """Pack codes ``[..., D]`` into uint8 ``[..., D * sum(planes) / 8]``."""
    packed = []
    for bits in planes:
        parts = (codes & ((1 << bits) - 1)).to(torch.uint8).chunk(8 // bits, dim=-1)
        plane = torch.zeros_like(parts[0])
        for i, part in enumerate(parts):
            plane |= part << (i * bits)
        packed.append(plane)
        codes = codes >> bits
    return torch.cat(packed, dim=-1)


def unpack_codes(packed: torch.Tensor, *planes: int) -> torch.Tensor:
    """Undo `pack_codes`: uint8 ``[..., D * sum(planes) / 8]`` to int64 ``[..., D]``."""
    dim = packed.shape[-1] * 8 // sum(planes)
    codes: torch.Tensor | int = 0
    first = shift = 0
    for bits in planes:
        plane = packed[..., first : first + dim * bits // 8]
        mask = (1 << bits) - 1
        fields = torch.cat([plane >> (i * bits) & mask for i in range(8 // bits)], dim=-1)
        codes = codes + (fields.long() << shift)
        first, shift = first + plane.shape[-1], shift + bits
    assert isinstance(codes, torch.Tensor)
    return codes
