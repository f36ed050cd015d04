"""Two processes share the heads, or the tokens, of a cache: the result is that of one process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rows import rows
from specs import CPU_SPECS

from tq_tvm import PagedKVCache, merge_attention_states

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

SPEC = CPU_SPECS[-1]
SLICE = dataclasses.replace(
    SPEC, num_q_heads=SPEC.num_q_heads // 2, num_kv_heads=SPEC.num_kv_heads // 2
)
LENGTHS = (200, 70)
PAGES = 4  # of a sequence


def filled(spec, k, v, lengths=LENGTHS):
    """A cache of sequences of these rows, its table and its lengths."""
    cache = PagedKVCache(spec, len(lengths) * PAGES, "cpu")
    table = torch.arange(len(lengths) * PAGES).view(len(lengths), PAGES).int()
    lens = torch.tensor(lengths).int()
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    cache.fill(k, v, block_table=table, seq_lens=lens, q_start_loc=starts)
    return cache, table, lens


def everything():
    """Keys, values and queries of the whole model: one query a sequence, and five of another."""
    k, v = (
        rows("gaussian", sum(LENGTHS), SPEC.num_kv_heads, SPEC.head_dim, seed=s) for s in (1, 2)
    )
    q = rows("gaussian", 6, SPEC.num_q_heads, SPEC.head_dim, seed=3) * 2
    return k, v, q, torch.tensor([0, 5, 6]).int()


def tensor_parallel(rank):
    """Each rank has half of the heads."""
    k, v, q, new = everything()
    kv = slice(rank * SLICE.num_kv_heads, (rank + 1) * SLICE.num_kv_heads)
    own = slice(rank * SLICE.num_q_heads, (rank + 1) * SLICE.num_q_heads)
    cache, table, lens = filled(SLICE, k[:, kv].contiguous(), v[:, kv].contiguous())
    out = cache.decode(q[:, own].contiguous(), table, lens, cu_seqlens_q=new)
    parts = [torch.empty_like(out) for _ in range(2)]
    dist.all_gather(parts, out)
    return torch.cat(parts, dim=1)


def context_parallel(rank):
    """The first has 128 and 0 tokens of the sequences, the second the newest ones."""
    k, v, q, new = everything()
    own = (128, 0) if rank == 0 else (72, 70)
    rows_of = [slice(0, 128)] if rank == 0 else [slice(128, 200), slice(200, 270)]
    k, v = (torch.cat([x[part] for part in rows_of]) for x in (k, v))
    cache, table, lens = filled(SPEC, k, v, own)
    if rank == 1:
        state = cache.decode(q, table, lens, cu_seqlens_q=new, return_lse=True)
    else:
        # All queries are newer than these tokens: each is a sequence that ends with the last one.
        sequence = torch.tensor([0, 0, 0, 0, 0, 1])
        state = cache.decode(q, table[sequence], lens[sequence], return_lse=True)
    states = []
    for tensor in state:
        parts = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(parts, tensor)
        states.append(parts)
    (out_a, out_b), (lse_a, lse_b) = states
    return merge_attention_states(out_a, lse_a, out_b, lse_b)[0]


def work(rank, store, want):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for share in (tensor_parallel, context_parallel):
            torch.testing.assert_close(share(rank), want, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


def test_two_processes_give_what_one_gives(library, tmp_path):
    for spec in (SPEC, SLICE):
        library(spec, torch.device("cpu"))
    k, v, q, new = everything()
    cache, table, lens = filled(SPEC, k, v)
    want = cache.decode(q, table, lens, cu_seqlens_q=new)
    mp.spawn(work, args=(tmp_path / "store", want), nprocs=2)
