"""The sequences of a row of ``decode`` or ``mla``, dense, and attention over a few of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from tq_tvm import reference
from tq_tvm.ops import PagedKVCache
from tq_tvm.spec import CacheSpec

__all__ = ["DecodeInputs", "LatentInputs"]


@dataclasses.dataclass(frozen=True)
class DecodeInputs:
    """One call of ``decode``, for peers with caches of their own.

    Parameters
    ----------
    spec
        Heads, page size and dtype.
    cache
        The packed cache of P pages.
    q
        ``[B, HQ, D]``, the model's dtype.
    block_table
        int32 ``[B, W]``.
    seq_lens
        int32 ``[B]``, each at least 1.
    """

    spec: CacheSpec
    cache: PagedKVCache
    q: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor

    @functools.cached_property
    def lengths(self) -> list[int]:
        """``seq_lens`` on the host."""
        return self.seq_lens.tolist()

    @functools.cached_property
    def sample(self) -> list[int]:
        """The sequences whose results are checked: first, last, shortest and longest."""
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        return sorted({0, len(order) - 1, order[0], order[-1]})

    @functools.cached_property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense K and V of the same pages, Gaussian, ``[P, PS, HK, D]`` in the model's dtype."""
        spec = self.spec
        shape = (self.cache.num_pages, spec.page_size, spec.num_kv_heads, spec.head_dim)
        k, v = (torch.randn(shape, device=self.q.device, dtype=self.q.dtype) for _ in range(2))
        return k, v

    def dense_attention(self, stored: torch.dtype) -> torch.Tensor:
        """Attention over the dense pages as they are after a conversion to ``stored``."""

        def rows(sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
            length = self.lengths[sequence]
            used = self.block_table[sequence, : -(-length // self.spec.page_size)].long()
            k, v = (side[used].flatten(0, 1)[:length].to(stored).float() for side in self.pages)
            return k, v

        return self.attention(rows)

    def attention(
        self, rows: Callable[[int], tuple[torch.Tensor, torch.Tensor]], rotated: bool = False
    ) -> torch.Tensor:
        """Float32 attention of the sample, ``[len(sample), HQ, D]``.

        Parameters
        ----------
        rows
            K and V of a sequence, float32 ``[L, HK, D]``.
        rotated
            Whether ``rows`` are in the rotated domain.
        """
        results = []
        for sequence in self.sample:
            q = self.q[sequence].float()
            out = reference.attention(
                reference.hadamard_rotate(q) if rotated else q, *rows(sequence)
            )
            results.append(reference.hadamard_rotate(out) if rotated else out)
        return torch.stack(results)

    def traffic(self, bytes_per_token_head: int) -> int:
        """Bytes of a call: every token's K and V, the queries and the results."""
        tokens = sum(self.lengths) * self.spec.num_kv_heads
        return tokens * bytes_per_token_head + 2 * self.q.numel() * self.q.element_size()


@dataclasses.dataclass(frozen=True)
class LatentInputs:
    """One call of ``mla``, for peers with caches of their own.

    Parameters
    ----------
    q
        ``[B, HQ, DL + DR]``, latents before rope parts, the model's dtype.
    latent_dim
        Values of a latent, DL.
    pages
        Dense latents and rope parts, ``[P, PS, 1, DL + DR]``.
    block_table
        int32 ``[B, W]``.
    seq_lens
        int32 ``[B]``, all the same.
    sm_scale
        Factor of the logits.
    """

    q: torch.Tensor
    latent_dim: int
    pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    sm_scale: float

    @property
    def sample(self) -> list[int]:
        """The sequences whose results are checked: first and last."""
        return sorted({0, len(self.q) - 1})

    def attention(self) -> torch.Tensor:
        """Float32 attention of the sample, ``[len(sample), HQ, DL]``."""
        results = []
        for sequence in self.sample:
            length = int(self.seq_lens[sequence])
            used = self.block_table[sequence, : -(-length // self.pages.shape[1])].long()
            keys = self.pages[used].flatten(0, 2)[:length].float()
            logits = self.q[sequence].float() @ keys.T * self.sm_scale
            results.append(logits.softmax(-1) @ keys[:, : self.latent_dim])
        return torch.stack(results)

    @property
    def traffic(self) -> int:
        """Bytes of a call: every token's row once, the queries and the results."""
        batch, heads, dim = self.q.shape
        moved = int(self.seq_lens.sum()) * dim + batch * heads * (dim + self.latent_dim)
        return moved * self.q.element_size()
