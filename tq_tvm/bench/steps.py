"""The steps of `fill` and `rotate` as torch does them on a CPU, to be timed beside them.

On a GPU the dense copy that a kernel stands in for is the harder measure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tq_tvm import reference
from tq_tvm.ops import PagedKVCache

__all__ = ["fill_steps", "rotate_steps"]


def rotate_steps(x: torch.Tensor, out: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Both ways to rotate rows ``[n, D]`` into ``out``, in float32."""
    dim = x.shape[-1]
    matrix = reference.hadamard_matrix(dim, x.device)

    def butterflies() -> None:
        y, step = x.float(), 1
        while step < dim:
            low, high = y.view(-1, dim // (2 * step), 2, step).unbind(2)
            y = torch.stack((low + high, low - high), 2)
            step *= 2
        out.copy_(y.view(x.shape) * dim**-0.5)

    return {
        "torch, x @ H": lambda: out.copy_(x.float() @ matrix),
        "torch, butterflies": butterflies,
    }


def fill_steps(
    cache: PagedKVCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Rotate by a matrix, quantise, pack and scatter rows into the cache."""
    tensors = (cache.k_cache, cache.v_cache, cache.k_meta, cache.v_meta)
    return {
        "torch, same steps": lambda: reference.fill_kv_cache(
            cache.spec, k, v, *tensors, slot_mapping=slots
        )
    }
