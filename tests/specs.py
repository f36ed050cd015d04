"""Specs that the operations are tested at, and one ragged batch of sequences."""

from __future__ import annotations

import dataclasses

import torch

from tq_tvm.spec import CacheSpec

# Every head_dim, dtype, layout and page size, and groups of 1, 4, 8 and 16.
SPECS = [
    CacheSpec(128, 32, 8, 64, "bfloat16", "bshd"),
    CacheSpec(128, 8, 8, 16, "float16", "bhsd"),
    CacheSpec(64, 8, 2, 32, "float16", "bshd"),
    CacheSpec(256, 16, 2, 64, "bfloat16", "bhsd"),
    CacheSpec(128, 32, 2, 128, "float16", "bshd"),
]
CPU_SPECS = [*SPECS, CacheSpec(128, 8, 2, 64, "float32", "bshd")]

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300]
"""Empty, one token, and both sides of page boundaries."""


@dataclasses.dataclass
class Batch:
    """Caches full of a sentinel, a permuted page table with spare pages, and lengths."""

    caches: list[torch.Tensor]
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor

    @property
    def tokens(self) -> int:
        return int(self.seq_lens.sum())

    @property
    def starts(self) -> torch.Tensor:
        return torch.cat([self.seq_lens.new_zeros(1), self.seq_lens.cumsum(0)]).int()


SENTINEL = 0xCD


def make_batch(spec: CacheSpec, device, lengths=LENGTHS, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    width = -(-max(lengths) // spec.page_size) + 1
    pages = len(lengths) * width + 3
    order = torch.randperm(pages, generator=generator)
    table = order[: len(lengths) * width].view(len(lengths), width).int()
    caches = [
        torch.full(shape, SENTINEL, dtype=torch.uint8, device=device)
        if dtype == "uint8"
        else torch.full(shape, float("nan"), dtype=getattr(torch, dtype), device=device)
        for shape, dtype in spec.tensor_shapes(pages).values()
    ]
    slots = [
        table[b, torch.arange(n) // spec.page_size].long() * spec.page_size
        + torch.arange(n) % spec.page_size
        for b, n in enumerate(lengths)
    ]
    return Batch(
        caches,
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        torch.cat(slots).to(device),
    )


def by_slot(spec: CacheSpec, tensor: torch.Tensor) -> torch.Tensor:
    """A cache tensor as [P * PS, HK, ...]."""
    if spec.layout == "bhsd":
        tensor = tensor.transpose(1, 2)
    return tensor.flatten(0, 1)
