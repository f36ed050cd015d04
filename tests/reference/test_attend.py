"""``reference.attend`` against closed forms and against loops over heads and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import rows
from specs import make_batch

from tq_tvm import reference
from tq_tvm.spec import CacheSpec

INF = float("inf")


def by_loops(q, k, v, scale, window_left, kept_tokens, soft_cap, sinks, slopes):
    """The equation, one head and token at a time, in float64."""
    tokens, heads, _ = q.shape
    length, kv_heads = k.shape[:2]
    out, lse = torch.zeros(tokens, heads, v.shape[-1]), torch.full((tokens, heads), -INF)
    for i in range(tokens):
        position = length - tokens + i
        for h in range(heads):
            own = h // (heads // kv_heads)
            logits = [sinks[h].double()] if sinks is not None else []
            values = [torch.zeros(v.shape[-1]).double()] if sinks is not None else []
            for j in range(position + 1):
                if window_left >= 0 and j < position - window_left and j >= kept_tokens:
                    continue
                logit = scale * (q[i, h].double() @ k[j, own].double())
                if soft_cap:
                    logit = soft_cap * torch.tanh(logit / soft_cap)
                if slopes is not None:
                    logit = logit - slopes[h].double() * (position - j)
                logits.append(logit)
                values.append(v[j, own].double())
            if logits:
                lse[i, h] = torch.stack(logits).logsumexp(0)
                out[i, h] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out, lse


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 12),
    tokens=st.integers(1, 12),
    group=st.integers(1, 3),
    window_left=st.integers(-1, 6),
    kept_tokens=st.integers(0, 4),
    soft_cap=st.sampled_from([0.0, 2.0]),
    with_sinks=st.booleans(),
    with_slopes=st.booleans(),
)
def test_attend_is_its_equation(
    length, tokens, group, window_left, kept_tokens, soft_cap, with_sinks, with_slopes
):
    tokens = min(tokens, length)
    q = rows("gaussian", tokens, 2 * group, 16, seed=1)
    k, v = rows("gaussian", length, 2, 16, seed=2), rows("gaussian", length, 2, 8, seed=3)
    sinks = rows("gaussian", 2 * group, seed=4) if with_sinks else None
    slopes = rows("gaussian", 2 * group, seed=5).abs() if with_slopes else None
    got = reference.attend(
        q, k, v, 0.7, window_left=window_left, kept_tokens=kept_tokens, soft_cap=soft_cap,
        sinks=sinks, alibi_slopes=slopes,
    )  # fmt: skip
    want = by_loops(q, k, v, 0.7, window_left, kept_tokens, soft_cap, sinks, slopes)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


def test_equal_keys_are_closed_forms():
    """All logits are 0: token i averages what it sees, lse is the logarithm of its number."""
    q, k = torch.zeros(4, 2, 16), torch.zeros(6, 1, 16)
    v = torch.arange(6.0).view(6, 1, 1)
    out, lse = reference.attend(q, k, v)
    assert out[:, 0, 0].tolist() == pytest.approx([1.0, 1.5, 2.0, 2.5])
    assert lse[:, 1].tolist() == pytest.approx([math.log(n) for n in (3, 4, 5, 6)])
    out, lse = reference.attend(q, k, v, window_left=1, kept_tokens=1)
    assert out[:, 0, 0].tolist() == pytest.approx([1.0, 5 / 3, 7 / 3, 3.0])
    assert lse[:, 0].tolist() == pytest.approx([math.log(3)] * 4)
    # A sink of log(n) weighs as much as n tokens whose values are zero.
    sunk, with_sink = reference.attend(q, k, v, sinks=torch.tensor([math.log(6.0), -INF]))
    assert sunk[:, 0, 0].tolist() == pytest.approx([3 / 9, 6 / 10, 10 / 11, 15 / 12])
    assert torch.equal(sunk[:, 1], reference.attend(q, k, v)[0][:, 1])
    assert with_sink[:, 0].tolist() == pytest.approx([math.log(n) for n in (9, 10, 11, 12)])
    # With ALiBi of log 2 the weights of older tokens are powers of two.
    out, _ = reference.attend(q, k, v, alibi_slopes=torch.full((2,), math.log(2)))
    assert out[0, 0, 0].item() == pytest.approx((2 * 4 + 1 * 2 + 0) / 7)


def test_a_soft_cap_bounds_logits():
    """Two keys with logits of 1000 and -1000 become the cap and its negative."""
    q, k = torch.ones(1, 1, 1), torch.tensor([[[1000.0]], [[-1000.0]]])
    v = torch.tensor([[[1.0]], [[0.0]]])
    out, lse = reference.attend(q, k, v, 1.0, soft_cap=2.0)
    assert out.item() == pytest.approx(1 / (1 + math.exp(-4.0)))
    assert lse.item() == pytest.approx(2.0 + math.log1p(math.exp(-4.0)))


def test_the_paged_form_is_every_sequence_by_itself():
    """Ragged tokens, an empty sequence, a page that nobody sees, and rows of no sequence."""
    spec = CacheSpec(64, 4, 2, 16, "float32", format="tq42", window=5)
    batch = make_batch(spec, "cpu", [40, 0, 9])
    window = (torch.zeros(4, 5, 2, 64), torch.zeros(4, 5, 2, 64), torch.tensor([2, 0, 3]).int())
    k, v = (rows("gaussian", batch.tokens, 2, 64, seed=s) for s in (1, 2))
    table = (batch.block_table, batch.seq_lens)
    reference.fill_kv_cache(
        spec, k, v, *batch.caches, block_table=table[0], seq_lens=table[1],
        q_start_loc=batch.starts, window=window,
    )  # fmt: skip
    batch.block_table[0, 0] = -1
    starts = torch.tensor([0, 3, 5, 6])
    q = rows("gaussian", 7, 4, 64, seed=3)
    sinks = torch.tensor([0.5, 1.0, -INF, 2.0])
    options = {"window_left": 10, "sinks": sinks, "soft_cap": 3.0}
    out, lse = reference.paged_attend(
        spec, q, *batch.caches, *table, cu_seqlens_q=starts, window=window, **options
    )
    assert bool((out[3:5] == 0).all()) and torch.equal(lse[3], sinks) and torch.equal(lse[4], sinks)
    assert bool((out[6] == 0).all()) and bool((lse[6] == -INF).all())
    for b, new, first in ((0, slice(0, 3), 0), (2, slice(5, 6), 40)):
        length = int(batch.seq_lens[b])
        dense = [
            reference.rotate_back(t, "signed_hadamard")
            for t in reference.sequence_rows(spec, *batch.caches, batch.block_table[b], length)
        ]
        for rows_of, exact in zip(dense, (k, v), strict=True):
            rows_of[-5:] = exact[first + length - 5 : first + length]
        want = reference.attend(q[new], *dense, **options)
        torch.testing.assert_close(out[new], want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[new], want[1], rtol=1e-4, atol=1e-5)


def test_merged_parts_are_the_whole():
    """Any cut of the tokens, in either order; nothing on both sides gives zeros."""
    q = rows("gaussian", 1, 4, 16, seed=1)
    k, v = rows("gaussian", 9, 2, 16, seed=2), rows("gaussian", 9, 2, 16, seed=3)
    whole = reference.attend(q, k, v)
    for cut in (0, 1, 4, 9):
        parts = [reference.attend(q, k[p], v[p]) for p in (slice(cut), slice(cut, 9))]
        for a, b in (parts, parts[::-1]):
            for got, want in zip(reference.merge_attention_states(*a, *b), whole, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    none = (torch.zeros(2, 3, 8), torch.full((2, 3), -INF))
    out, lse = reference.merge_attention_states(*none, *none)
    assert bool((out == 0).all()) and bool((lse == -INF).all())
