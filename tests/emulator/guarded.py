"""Tensors with a margin of known bytes, so that a write past their ends shows."""

from __future__ import annotations

import torch

__all__ = ["Guarded"]

_MARGIN = 4096
_BYTE = 0xA5


class Guarded:
    """A tensor full of 0xFF bytes (NaN in every float format), and what lies around it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        self._all = torch.full((size + 2 * _MARGIN,), _BYTE, dtype=torch.uint8)
        inside = self._all[_MARGIN : _MARGIN + size]
        inside.fill_(0xFF)
        self.tensor = inside.view(dtype).view(shape)

    def check(self) -> None:
        """Fail if a byte outside has changed."""
        for margin in (self._all[:_MARGIN], self._all[-_MARGIN:]):
            assert bool((margin == _BYTE).all()), "a kernel wrote past the end of a tensor"
