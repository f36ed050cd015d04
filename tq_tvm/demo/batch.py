"""A ragged batch of sequences: dense rows, and the same rows in a paged cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tq_tvm.ops import PagedKVCache
from tq_tvm.spec import CacheSpec

__all__ = ["OFFSET", "OFFSET_CHANNELS", "Batch"]

OFFSET = 4.0
OFFSET_CHANNELS = 4
"""Keys of some heads have a constant in a few channels, as those of real models do."""

_SPARE_PAGES = 3


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of all sequences, one after another, and where each goes in the cache.

    ``k`` and ``v`` are ``[T, HK, D]``, ``q`` is ``[B, HQ, D]``. ``slots`` ``[T]`` holds the slot of
    every token, ``last`` ``[B]`` the row of each sequence's newest token, which is appended after
    the others were prefilled. Keys of heads ``[gaussian_heads, HK)`` have offset channels.
    """

    spec: CacheSpec
    lengths: tuple[int, ...]
    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    cache: PagedKVCache
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    last: torch.Tensor
    gaussian_heads: int

    @classmethod
    def make(
        cls, spec: CacheSpec, lengths: Sequence[int], device: torch.device, seed: int
    ) -> Batch:
        """Draw rows and a permuted page table; the cache is empty."""
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, spec.dtype)
        batch, tokens = len(lengths), sum(lengths)
        shape = (tokens, spec.num_kv_heads, spec.head_dim)
        k, v = (torch.randn(shape, generator=generator) for _ in range(2))
        q = torch.randn((batch, spec.num_q_heads, spec.head_dim), generator=generator)
        gaussian_heads = spec.num_kv_heads - spec.num_kv_heads // 4
        channels = torch.randperm(spec.head_dim, generator=generator)[:OFFSET_CHANNELS]
        k[:, gaussian_heads:, channels] += OFFSET

        used = [-(-length // spec.page_size) for length in lengths]
        num_pages = sum(used) + _SPARE_PAGES
        pages = torch.randperm(num_pages, generator=generator).int()
        table = torch.zeros(batch, max(used), dtype=torch.int32)
        slots, start = [], 0
        for row, count, length in zip(table, used, lengths, strict=True):
            row[:count] = pages[start : start + count]
            start += count
            position = torch.arange(length)
            page = row[position // spec.page_size].long()
            slots.append(page * spec.page_size + position % spec.page_size)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        return cls(
            spec=spec,
            lengths=tuple(lengths),
            k=k.to(device, dtype),
            v=v.to(device, dtype),
            q=q.to(device, dtype),
            cache=PagedKVCache(spec, num_pages, device),
            block_table=table.to(device),
            seq_lens=seq_lens.to(device),
            slots=torch.cat(slots).to(device),
            last=(seq_lens.long().cumsum(0) - 1).to(device),
            gaussian_heads=gaussian_heads,
        )

    def prefill_rows(self) -> torch.Tensor:
        """Rows of all tokens but the last of each sequence."""
        kept = torch.ones(len(self.k), dtype=torch.bool, device=self.k.device)
        kept[self.last] = False
        return kept.nonzero()[:, 0]

    def prefill_arguments(self) -> dict[str, Any]:
        """Arguments of ``PagedKVCache.fill`` for the prefill, by block table."""
        rows = self.prefill_rows()
        before = self.seq_lens - 1
        ends = before.cumsum(0, dtype=torch.int32)
        return {
            "k": self.k[rows],
            "v": self.v[rows],
            "block_table": self.block_table,
            "seq_lens": before,
            "q_start_loc": torch.cat([ends.new_zeros(1), ends]),
        }

    def append_arguments(self) -> dict[str, Any]:
        """Arguments of ``PagedKVCache.fill`` for one token a sequence, by slot."""
        return {
            "k": self.k[self.last],
            "v": self.v[self.last],
            "slot_mapping": self.slots[self.last],
        }

    def fill(self) -> None:
        """Prefill, then append one token a sequence."""
        self.cache.fill(**self.prefill_arguments())
        self.cache.fill(**self.append_arguments())
