"""``decode`` for GPUs, run by the emulator, against float32 attention over the same cache."""

from __future__ import annotations

import functools

import pytest
import torch
from rows import rows
from specs import make_batch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from emulator import compile_functions
from emulator.guarded import Guarded
from tq_tvm import reference
from tq_tvm.kernels.decode import decode
from tq_tvm.spec import CacheSpec
from tq_tvm.splits import workspace_floats

# As in ops/test_decode.py.
LIMIT = {torch.float16: 5e-3, torch.bfloat16: 1e-2}
LENGTHS = [0, 1, 63, 64, 65, 203]
REGISTERS = {
    "warps": 4, "tile": 64, "depth": 1, "registers": 256, "query_in_shared": 0,
    "multiply_shifts": 0,
}  # fmt: skip
SHARED = {
    "warps": 2, "tile": 32, "depth": 2, "registers": 128, "query_in_shared": 1,
    "multiply_shifts": 1,
}  # fmt: skip
CASES = {
    "group4": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd"), REGISTERS),
    "group4_shared": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd"), SHARED),
    "group8": (CacheSpec(128, 16, 2, 32, "float16", "bhsd"), SHARED),
    "group1": (CacheSpec(128, 2, 2, 16, "float16", "bshd"), REGISTERS),
    "head64": (CacheSpec(64, 8, 2, 16, "bfloat16", "bhsd"), REGISTERS),
    "head256": (CacheSpec(256, 8, 1, 64, "float16", "bhsd"), SHARED),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels of a case, compiled once."""
    directory = tmp_path_factory.mktemp("decode")

    @functools.cache
    def module(case):
        spec, config = CASES[case]
        return compile_functions({"decode": decode(spec, "cuda", config)}, directory)

    return module


def problem(spec, lengths=LENGTHS, scale=1.0):
    """Queries, caches of Gaussian rows behind a permuted table, and what attention gives."""
    batch = make_batch(spec, "cpu", lengths)
    k, v = (
        rows("gaussian", batch.tokens, spec.num_kv_heads, spec.head_dim, seed=s) for s in (1, 2)
    )
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    q = rows("gaussian", len(lengths), spec.num_q_heads, spec.head_dim, seed=3) * scale
    q = q.to(getattr(torch, spec.dtype))
    want = reference.paged_decode(spec, q, *batch.caches, batch.block_table, batch.seq_lens)
    return q, batch, want


def run(module, spec, q, batch, num_splits, descending=False):
    """The output; nothing around it and the workspace is written."""
    out = Guarded(tuple(q.shape), q.dtype)
    workspace = Guarded((workspace_floats(spec, len(q), num_splits),), torch.float32)
    module["decode"](
        q, *batch.caches, batch.block_table, batch.seq_lens, workspace.tensor, out.tensor,
        num_splits, spec.head_dim**-0.5, descending=descending,
    )  # fmt: skip
    out.check()
    workspace.check()
    return out.tensor


def relative(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(compiled, case, num_splits):
    spec, _ = CASES[case]
    q, batch, want = problem(spec)
    out = run(compiled(case), spec, q, batch, num_splits)
    assert relative(out, want) <= LIMIT[q.dtype]
    for got, row in zip(out[1:], want[1:], strict=True):
        assert relative(got, row) <= 2 * LIMIT[q.dtype], "a short sequence hides behind no long one"
    assert bool((out[0] == 0).all()), "an empty sequence gives zeros"


@pytest.mark.parametrize("case", ["group4_shared", "group8"])
def test_order_of_threads_does_not_matter(compiled, case):
    spec, _ = CASES[case]
    q, batch, _ = problem(spec, [130, 17])
    orders = [run(compiled(case), spec, q, batch, 2, descending=d) for d in (False, True)]
    assert torch.equal(*orders)


def test_large_logits(compiled):
    """Weights concentrate on few tokens, and the running maxima move."""
    spec, _ = CASES["group4"]
    q, batch, want = problem(spec, [203, 64], scale=4.0)
    assert relative(run(compiled("group4"), spec, q, batch, 2), want) <= LIMIT[q.dtype]


def test_wrong_arguments_are_refused_by_the_launcher(compiled):
    spec, _ = CASES["group4"]
    q, batch, _ = problem(spec, [5])
    with pytest.raises(ValueError, match=r"argument #0"):
        run(compiled("group4"), spec, q[..., :64].contiguous(), batch, 1)
