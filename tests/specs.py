"""Specs that the operations are tested at, and one ragged batch of sequences."""

from __future__ import annotations

import dataclasses

import torch

from tq_tvm.served import functions_on
from tq_tvm.spec import ROTATE_DIMS, CacheSpec, RotateSpec

# Every head_dim, dtype, layout and page size, and groups of 1, 4, 8 and 16.
SPECS = [
    CacheSpec(128, 32, 8, 64, "bfloat16", "bshd"),
    CacheSpec(128, 8, 8, 16, "float16", "bhsd"),
    CacheSpec(64, 8, 2, 32, "float16", "bshd"),
    CacheSpec(256, 16, 2, 64, "bfloat16", "bhsd"),
    CacheSpec(128, 32, 2, 128, "float16", "bshd"),
]
CPU_SPECS = [*SPECS, CacheSpec(128, 8, 2, 64, "float32", "bshd")]

# Every codec on every side that it has, every rotation and rule, and every head_dim that is no
# power of two; windows shorter than a page, longer than some sequences, and none.
FORMAT_SPECS = [
    CacheSpec(128, 4, 2, 16, "bfloat16", "bshd", "tq42", window=40),
    CacheSpec(80, 4, 2, 16, "float16", "bhsd", "mse3-mse4-plain-leastsquares"),
    CacheSpec(64, 2, 2, 16, "float32", "bshd", "qjl4-mse3-signed-unbiased", window=7),
    CacheSpec(112, 4, 1, 16, "float16", "bshd", "int4-int8", 96),
    CacheSpec(192, 4, 2, 32, "bfloat16", "bhsd", "int8-int4-plain", 64),
    CacheSpec(64, 4, 2, 16, "bfloat16", "bshd", "fp8-none", window=3),
    CacheSpec(96, 2, 1, 16, "float32", "bshd", "none-fp8-signed"),
    CacheSpec(576, 2, 1, 16, "float16", "bshd", "mse2-mse2-signed-norm", 192),
]
# What GPUs serve.
SERVED = [
    CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq42"),
    CacheSpec(128, 6, 1, 8, "float16", "bhsd", "tq33"),
    CacheSpec(256, 4, 2, 32, "bfloat16", "bshd", "mse3-mse4-plain-unbiased"),
    CacheSpec(64, 8, 1, 64, "float16", "bshd", "qjl4-mse2-signed-leastsquares"),
    CacheSpec(128, 4, 2, 64, "bfloat16", "bhsd", "tq22"),
]
# What GPUs serve beyond Lloyd-Max pairs; `FORMAT_SPECS` has these codecs for a CPU.
DIRECT = [
    CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "int8"),
    CacheSpec(64, 6, 1, 16, "float16", "bhsd", "int4"),
    CacheSpec(128, 4, 2, 32, "bfloat16", "bhsd", "fp8"),
    CacheSpec(256, 4, 2, 8, "bfloat16", "bshd", "none"),
    CacheSpec(128, 4, 1, 64, "float16", "bshd", "tq84"),
    CacheSpec(64, 4, 2, 32, "float16", "bshd", "none-fp8-signed"),
    CacheSpec(256, 4, 1, 16, "bfloat16", "bhsd", "fp8-mse3-plain-unbiased"),
]
# GPUs' other head_dims, and K and V of different ones; of a CPU `FORMAT_SPECS` has such.
DIMS = [
    CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq42", 64),
    CacheSpec(96, 4, 2, 16, "bfloat16", "bshd", "k4v2"),
    CacheSpec(192, 4, 1, 32, "bfloat16", "bhsd", "tq43", 128),
    CacheSpec(80, 6, 2, 8, "float16", "bshd", "fp8-none", 112),
    CacheSpec(64, 4, 1, 16, "float16", "bhsd", "int8-mse3-signed-matched", 256),
    CacheSpec(512, 8, 2, 64, "bfloat16", "bshd", "tq42"),
    CacheSpec(576, 4, 1, 32, "bfloat16", "bshd", "tq43"),
]

# One KV head and few pages, whose workspace is tested.
NARROW = CacheSpec(128, 8, 1, 64, "float16", "bshd")
LATENTS = [
    # The last task has fewer heads than the first.
    CacheSpec(512, 20, 1, 64, "bfloat16", "bshd", "mse4-none-signed-matched", 64),
    CacheSpec(512, 16, 1, 16, "float16", "bhsd", "mse3-none-plain-unbiased", 64),
    CacheSpec(512, 2, 1, 32, "float32", "bshd", "int8-none", 64),
    CacheSpec(512, 4, 1, 8, "bfloat16", "bhsd", "fp8-none-signed", 64),
]
# Of a dtype that numpy has.
LATENT = CacheSpec(512, 8, 1, 16, "float16", "bhsd", "mse4-none-signed-matched", 64)
# Rotations of rows that no cache of `CPU_SPECS` has.
ROTATIONS = [
    RotateSpec(dim, dtype)
    for dim in ROTATE_DIMS
    if dim not in {spec.head_dim for spec in CPU_SPECS}
    for dtype in (("float16", "bfloat16") if dim == 4096 else ("bfloat16",))
]


def gpu_specs() -> list[CacheSpec | RotateSpec]:
    """Every spec that tests of a GPU call kernels of."""
    caches = [*SPECS, *FORMAT_SPECS, *SERVED, *DIRECT, *DIMS, NARROW, *LATENTS, LATENT]
    every = dict.fromkeys([*caches, *ROTATIONS])
    return [s for s in every if s.dtype != "float32" and functions_on(s, "cuda")]


LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300]
"""Empty, one token, and both sides of page boundaries."""


SCALES = {"k_scale": 0.5, "v_scale": 0.25}


def scales_of(spec: CacheSpec) -> dict[str, float]:
    """Scales of the tensors of a format that has them."""
    fmt = spec.cache_format
    pairs = zip(SCALES.items(), (fmt.key, fmt.value), strict=True)
    return {name: value for (name, value), codec in pairs if codec.tensor_scale}


def kernel_caches(spec: CacheSpec, caches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Arguments of a kernel, with `scales_of` as tensors where a codec has no metas."""
    given = {
        name[0]: torch.full((1,), value, device=caches[0].device)
        for name, value in scales_of(spec).items()
    }
    return [*caches[:2], given.get("k", caches[2]), given.get("v", caches[3])]


@dataclasses.dataclass
class Batch:
    """Caches full of a sentinel, a permuted page table, and lengths.

    Entries of the table past the end of a sequence are no pages at all: nobody may follow them.
    """

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
NO_PAGE = -(1 << 30)


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
    for row, n in zip(table, lengths, strict=True):
        row[-(-n // spec.page_size) :] = NO_PAGE
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


if __name__ == "__main__":
    # Arguments of `tq-tvm build`.
    print(*(f"--spec {spec.label}" for spec in gpu_specs()))
