"""``prefill`` for GPUs, run by the emulator, against float32 attention over the same cache."""

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
from tq_tvm.kernels.prefill import prefill
from tq_tvm.spec import CacheSpec

LIMIT = {torch.float16: 5e-3, torch.bfloat16: 1e-2}
LSE_LIMIT = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = [70, 3, 200, 0, 65, 40]
QUERIES = [70, 1, 37, 0, 2, 0]
TALL = {"warps": 4, "row_tiles": 2, "tile": 64, "registers": 255}
FLAT = {"warps": 2, "row_tiles": 1, "tile": 32, "registers": 255}
CASES = {
    "group4": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd"), TALL),
    "group6_half": (CacheSpec(128, 6, 1, 16, "float16", "bhsd", "tq33"), FLAT),
    "group71": (CacheSpec(64, 71, 1, 16, "bfloat16", "bhsd", "tq22"), FLAT),
    "head256": (CacheSpec(256, 4, 2, 16, "bfloat16", "bshd", "tq44"), FLAT),
}
FEATURES = {
    "plain": {},
    "window": {"window_left": 30},
    "kept": {"window_left": 7, "kept_tokens": 5},
    "cap": {"soft_cap": 1.5},
    "alibi": {"alibi_slopes": 0.3},
    "sinks": {"sinks": 2.0},
    "all": {
        "window_left": 33, "kept_tokens": 3, "soft_cap": 2.0, "alibi_slopes": 0.1, "sinks": 1.0
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels of a case, compiled once."""
    directory = tmp_path_factory.mktemp("prefill")

    @functools.cache
    def module(case):
        spec, config = CASES[case]
        return compile_functions({"prefill": prefill(spec, config)}, directory)

    return module


def run(module, spec, features, *, scale=1.0, want_lse=True, descending=False, padding=0):
    """Output and lse, and what they should be; nothing around them is written."""
    batch = make_batch(spec, "cpu", LENGTHS)
    k, v = (
        rows("gaussian", batch.tokens, spec.num_kv_heads, spec.head_dim, seed=s) for s in (1, 2)
    )
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    tokens, heads = sum(QUERIES), spec.num_q_heads
    q = rows("gaussian", tokens + padding, heads, spec.head_dim, seed=3) * scale
    q = q.to(getattr(torch, spec.dtype))
    starts = torch.tensor([0, *QUERIES]).cumsum(0).int()
    given = dict(features)
    for name in ("sinks", "alibi_slopes"):
        if name in given:
            given[name] = torch.linspace(given[name] / 4, given[name], heads)
    out = Guarded(tuple(q.shape), q.dtype)
    lse = Guarded((len(q), heads if want_lse else 0), torch.float32)
    none = torch.empty(0)
    module["prefill"](
        q, *batch.caches, batch.block_table, batch.seq_lens, starts,
        given.get("sinks", none), given.get("alibi_slopes", none), out.tensor, lse.tensor,
        spec.head_dim**-0.5, given.get("soft_cap", 0.0), given.get("window_left", -1),
        given.get("kept_tokens", 0), descending=descending,
    )  # fmt: skip
    out.check()
    lse.check()
    want = reference.paged_attend(
        spec, q, *batch.caches, batch.block_table, batch.seq_lens, cu_seqlens_q=starts, **given
    )
    return out.tensor, lse.tensor, want


def close(got, want, limit):
    return ((got.float() - want).norm() / want.norm()).item() <= limit


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("features", ["plain", "all"])
def test_equals_reference(compiled, case, features):
    spec, _ = CASES[case]
    out, lse, (want, want_lse) = run(compiled(case), spec, FEATURES[features])
    assert close(out, want, LIMIT[out.dtype])
    for got, row in zip(out, want, strict=True):
        assert close(got, row, 2 * LIMIT[out.dtype])
    assert (lse - want_lse).abs().max() <= LSE_LIMIT[out.dtype]


@pytest.mark.parametrize("features", [f for f in FEATURES if f not in ("plain", "all")])
def test_each_feature(compiled, features):
    spec, _ = CASES["group4"]
    out, lse, (want, want_lse) = run(compiled("group4"), spec, FEATURES[features])
    assert close(out, want, LIMIT[out.dtype])
    assert (lse - want_lse).abs().max() <= LSE_LIMIT[out.dtype]


def test_large_logits(compiled):
    """Of standard deviation 30: a row's bound has to follow."""
    spec, _ = CASES["group6_half"]
    out, lse, (want, want_lse) = run(compiled("group6_half"), spec, {}, scale=30.0)
    assert close(out, want, 2 * LIMIT[out.dtype])
    assert ((lse - want_lse).abs() / want_lse.abs().clamp(min=1)).max() <= 5e-3


def test_rows_past_the_last_sequence_are_left_alone(compiled):
    spec, _ = CASES["group4"]
    out, lse, (want, _) = run(compiled("group4"), spec, {}, padding=50)
    tokens = sum(QUERIES)
    assert close(out[:tokens], want[:tokens], LIMIT[out.dtype])
    assert out[tokens:].isnan().all()
    assert lse[tokens:].isnan().all()


def test_threads_in_the_other_order_and_without_lse(compiled):
    spec, _ = CASES["group4"]
    out, _, _ = run(compiled("group4"), spec, FEATURES["all"])
    again, lse, _ = run(compiled("group4"), spec, FEATURES["all"], want_lse=False, descending=True)
    assert torch.equal(out, again)
    assert lse.numel() == 0
