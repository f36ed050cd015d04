"""``merge_attention_states`` against the reference, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import rows

from tq_tvm import ArgumentTypeError, ArgumentValueError, merge_attention_states, reference

INF = float("inf")


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    missing=st.sampled_from([(), (0,), (1,), (0, 1)]),
    spread=st.sampled_from([1.0, 100.0]),
)
def test_is_the_reference(shape, dtype, missing, spread):
    outs = [rows("gaussian", *shape, 8, seed=s).to(dtype) for s in (1, 2)]
    lses = [rows("gaussian", *shape, 1, seed=s)[..., 0] * spread for s in (3, 4)]
    for side in missing:
        outs[side].zero_()
        lses[side].fill_(-INF)
    states = (outs[0], lses[0], outs[1], lses[1])
    out, lse = merge_attention_states(*states)
    want, want_lse = reference.merge_attention_states(*states)
    assert (out.dtype, lse.dtype, out.shape) == (dtype, torch.float32, outs[0].shape)
    rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out.float(), want, rtol=rounding, atol=rounding)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_traces(device):
    states = [torch.ones(2, 4, 8, device=device), torch.zeros(2, 4, device=device)] * 2
    compiled = torch.compile(merge_attention_states, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*states), merge_attention_states(*states), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changed", "error", "part"),
    [
        ({"out_a": torch.ones(2, 8).long()}, ArgumentTypeError, "out_a must be float16 or"),
        ({"out_b": torch.ones(2, 8).half()}, ArgumentTypeError, "out_b must be float32"),
        ({"out_b": torch.ones(2, 9)}, ArgumentValueError, "out_b must be of shape"),
        ({"lse_a": torch.ones(2, 1)}, ArgumentValueError, "lse_a must be of shape"),
        ({"lse_b": torch.ones(2).half()}, ArgumentTypeError, "lse_b must be float32"),
        ({"out_a": torch.ones(())}, ArgumentValueError, "out_a must be of shape"),
        ({"lse_a": [1.0, 2.0]}, ArgumentTypeError, "lse_a must be a torch tensor"),
        ({"lse_a": torch.ones(2, device="meta")}, ArgumentValueError, "lse_a must be on cpu"),
    ],
)
def test_refuses(changed, error, part):
    states = {
        "out_a": torch.ones(2, 8), "lse_a": torch.ones(2),
        "out_b": torch.ones(2, 8), "lse_b": torch.ones(2),
    }  # fmt: skip
    with pytest.raises(error, match=f"merge_attention_states: {part}"):
        merge_attention_states(**{**states, **changed})
