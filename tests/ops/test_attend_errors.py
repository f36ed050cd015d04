"""Wrong features of paged_decode: each is refused by name, none is accepted and ignored."""

from __future__ import annotations

import pytest
import torch

from tq_tvm import (
    ArgumentTypeError,
    ArgumentValueError,
    CacheSpec,
    PagedKVCache,
    UnsupportedSpecError,
    paged_decode,
    paged_decode_workspace_size,
)
from tq_tvm.served import check_target

SPEC = CacheSpec(64, 4, 2, 16, "float16")
HQ, T = SPEC.num_q_heads, 5
TYPE, VALUE = ArgumentTypeError, ArgumentValueError


def index(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def arguments():
    """A valid call of sequences with 2 and 3 query tokens, for which a library lacks."""
    cache = PagedKVCache(SPEC, 6, "cpu")
    return {
        "q": torch.randn(T, HQ, SPEC.head_dim).half(),
        **dict(zip(("k_cache", "v_cache", "k_meta", "v_meta"), cache.tensors(), strict=True)),
        "block_table": index([0, 1, 2], [3, 4, 5]),
        "seq_lens": index(20, 48),
        "cu_seqlens_q": index(0, 2, 5),
    }


def refuse(arguments, error, message, **changes):
    with pytest.raises(error) as caught:
        paged_decode(**(arguments | changes))
    text = str(caught.value)
    assert text.startswith(f"paged_decode: {message}"), text
    assert "got " in text and ";" in text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 2, 5]}, TYPE, "cu_seqlens_q must be a torch tensor"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, TYPE, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_q": index(0, 5)}, VALUE, "cu_seqlens_q must be of shape [B + 1]"),
        ({"cu_seqlens_q": index(0, 6, 5)}, VALUE, "cu_seqlens_q must be cumulative"),
        ({"cu_seqlens_q": index(1, 2, 5)}, VALUE, "cu_seqlens_q must be cumulative"),
        ({"cu_seqlens_q": index(0, 2, 6)}, VALUE, "cu_seqlens_q must be cumulative"),
        ({"cu_seqlens_q": None}, VALUE, "block_table must be of shape [B, MB]"),
        ({"cu_seqlens_q": None, "return_lse": True}, VALUE, "block_table must be of"),
        ({"seq_lens": index(1, 48)}, VALUE, "seq_lens[0] must be at least the 2 tokens"),
        ({"seq_lens": index(20, 49)}, VALUE, "seq_lens must be from 0 to MB * PS"),
        ({"max_seqlen_q": 1.5}, TYPE, "max_seqlen_q must be an integer"),
        ({"max_seqlen_q": -1}, VALUE, "max_seqlen_q must be at least 0"),
        ({"window_left": -2}, VALUE, "window_left must be at least -1"),
        ({"window_left": 1.0}, TYPE, "window_left must be an integer"),
        ({"kept_tokens": 4}, VALUE, "kept_tokens must be 0 without window_left"),
        ({"kept_tokens": None}, TYPE, "kept_tokens must be an integer"),
        ({"kept_tokens": -1, "window_left": 4}, VALUE, "kept_tokens must be at least 0"),
        ({"soft_cap": -1.0}, VALUE, "soft_cap must be a finite number from 0"),
        ({"soft_cap": float("nan")}, VALUE, "soft_cap must be a finite number"),
        ({"soft_cap": float("inf")}, VALUE, "soft_cap must be a finite number"),
        ({"soft_cap": "1"}, TYPE, "soft_cap must be a number"),
        ({"sinks": torch.ones(HQ).half()}, TYPE, "sinks must be float32"),
        ({"sinks": torch.ones(HQ - 1)}, VALUE, "sinks must be of shape [HQ]"),
        ({"sinks": torch.ones(2 * HQ)[::2]}, VALUE, "sinks must be contiguous"),
        ({"sinks": 1.0}, TYPE, "sinks must be a torch tensor"),
        ({"sinks": torch.ones(0)}, VALUE, "sinks must be of shape [HQ]"),
        ({"alibi_slopes": torch.ones(HQ, 1)}, VALUE, "alibi_slopes must be of shape"),
        ({"alibi_slopes": torch.ones(HQ).double()}, TYPE, "alibi_slopes must be float"),
        ({"alibi_slopes": torch.ones(HQ, device="meta")}, VALUE, "alibi_slopes must be"),
        ({"return_lse": 1}, VALUE, "return_lse must be True or False"),
        ({"lse": torch.ones(T, HQ).half()}, TYPE, "lse must be float32"),
        ({"lse": torch.ones(HQ, T).T}, VALUE, "lse must be contiguous"),
        ({"lse": torch.ones(T - 1, HQ)}, VALUE, "lse must be of shape [T, HQ]"),
        ({"out": torch.ones(2, HQ, 64).half()}, VALUE, "out must be of shape [T, HQ"),
        ({"block_table": index([0, 1, 2], [3, 4, 6])}, VALUE, "block_table[1, 2] must"),
    ],
)  # fmt: skip
def test_refused(arguments, changes, error, message):
    refuse(arguments, error, message, **changes)


def test_a_bound_of_queries_needs_queries(arguments):
    one = {**arguments, "q": arguments["q"][:2], "cu_seqlens_q": None}
    refuse(one, ArgumentValueError, "max_seqlen_q must be None without", max_seqlen_q=1)


def test_outputs_must_not_overlap(arguments):
    memory = torch.zeros(T * HQ * SPEC.head_dim, dtype=torch.float16)
    out = memory.view(T, HQ, SPEC.head_dim)
    lse = memory.view(torch.float32)[: T * HQ].view(T, HQ)
    refuse(arguments, ArgumentValueError, "lse must be apart from out", out=out, lse=lse)


def test_a_page_that_queries_see_must_be_there(arguments):
    """Of a window all of its pages, and those of kept tokens; not the ones between."""
    table = index([0, 1, 2], [-1, -1, 5])
    for wanted, options in (
        ("block_table[1, 0]", {}),
        ("block_table[1, 1]", {"window_left": 20}),
        ("block_table[1, 0]", {"window_left": 9, "kept_tokens": 1}),
    ):
        refuse(
            arguments, ArgumentValueError, f"{wanted} must be a page", block_table=table, **options
        )


def test_sizes_of_workspaces():
    with pytest.raises(ArgumentTypeError, match="workspace_size: max_tokens must be an integer"):
        paged_decode_workspace_size(SPEC, 1, 64, "cpu", max_tokens=1.5)
    with pytest.raises(ArgumentValueError, match="workspace_size: max_tokens must be at least 0"):
        paged_decode_workspace_size(SPEC, 1, 64, "cpu", max_tokens=-1)


def test_gpus_name_what_they_lack():
    """No feature falls back to something slow, or is left out."""
    for function in ("decode", "attend", "prefill"):
        check_target("paged_decode", CacheSpec(128, 8, 2), "cuda", function)
    lacking = CacheSpec(128, 8, 2, dtype="float32", window=16)
    check_target("paged_decode", lacking, "llvm", "attend")
    with pytest.raises(UnsupportedSpecError, match=r"float16 .* got k4v2_.*_w16 for attend; use"):
        check_target("paged_decode", lacking, "cuda", "attend")
    check_target("paged_decode", CacheSpec(128, 8, 2, window=16), "cuda", "attend")
