"""``decode``: paged_decode against float32 attention over the dequantised cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rows import KINDS, rows
from specs import CPU_SPECS, SPECS, make_batch

from tq_tvm import paged_decode, paged_decode_workspace_size, reference
from tq_tvm.spec import CacheSpec

# Limits of relative error (Frobenius); the tighter bound is twice that of torch's own attention.
LIMIT = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}

# A spec of each GQA group, by the group.
BY_GROUP = {group: next(s for s in SPECS if s.group_size == group) for group in (1, 4, 8)}


def filled(spec: CacheSpec, device, kind="gaussian", **kwargs):
    batch = make_batch(spec, device, **kwargs)
    k, v = (
        rows(kind, batch.tokens, spec.num_kv_heads, spec.head_dim, seed=s).to(device)
        for s in (1, 2)
    )
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    return batch


def queries(spec, batch, device, scale=1.0):
    shape = (len(batch.seq_lens), spec.num_q_heads, spec.head_dim)
    return (rows("gaussian", *shape, seed=3) * scale).to(device, getattr(torch, spec.dtype))


def relative(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


def torch_error(spec, q, batch, want):
    """Error of torch's attention of the same dtype on the same dequantised cache."""
    out = torch.zeros_like(want)
    for b, length in enumerate(batch.seq_lens.tolist()):
        if length:
            k, v = (
                reference.hadamard_rotate(t).to(q.dtype).transpose(0, 1)[None]
                for t in reference.sequence_rows(spec, *batch.caches, batch.block_table[b], length)
            )
            heads = q[b].view(1, spec.num_q_heads, 1, spec.head_dim)
            out[b] = F.scaled_dot_product_attention(heads, k, v, enable_gqa=True)[0, :, 0]
    return relative(out, want)


def check_errors(spec, q, batch, out):
    """Close to float32 attention, and within twice the error of torch's own."""
    want = reference.paged_decode(spec, q, *batch.caches, batch.block_table, batch.seq_lens)
    error = relative(out, want)
    assert error <= LIMIT[q.dtype]
    assert error <= 2 * torch_error(spec, q, batch, want) + 1e-6


def run(spec, q, batch, **kwargs):
    out = torch.full_like(q, float("nan"))
    result = paged_decode(
        q, *batch.caches, batch.block_table, batch.seq_lens, layout=spec.layout, out=out, **kwargs
    )
    assert result is out
    return out


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("spec", CPU_SPECS, ids=lambda s: s.label)
def test_within_twice_torchs_error(library, device, spec, scale):
    library(spec, device)
    batch = filled(spec, device)
    q = queries(spec, batch, device, scale)
    out = run(spec, q, batch)
    check_errors(spec, q, batch, out)
    assert bool((out[batch.seq_lens == 0] == 0).all()), "an empty sequence gives zeros"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gaussian"])
@pytest.mark.parametrize("spec", BY_GROUP.values(), ids=lambda s: s.label)
def test_rows_of_other_kinds(library, device, spec, kind):
    """Channels with an offset and heavy tails, at every group size: the same bounds."""
    library(spec, device)
    batch = filled(spec, device, kind)
    q = queries(spec, batch, device)
    check_errors(spec, q, batch, run(spec, q, batch))


def test_a_scale_wrong_by_root_two_would_show(library, device):
    """Shrinking every key by 1/sqrt(2), as a peer's decode does, is far outside the limit."""
    spec = SPECS[1]
    library(spec, device)
    batch = filled(spec, device, lengths=[300, 129])
    q = queries(spec, batch, device, 2.0)
    args = (spec, q, *batch.caches, batch.block_table, batch.seq_lens)
    out = run(spec, q, batch)
    right = reference.paged_decode(*args)
    wrong = reference.paged_decode(*args, sm_scale=spec.head_dim**-0.5 * 0.5**0.5)
    assert relative(out, right) <= LIMIT[q.dtype]
    assert relative(out, wrong) > 20 * LIMIT[q.dtype]


def test_slope_of_the_logits(library, device):
    """One dominating value row exposes the softmax weights: their log ratio has slope one."""
    spec = SPECS[1]
    library(spec, device)
    batch = filled(spec, device, lengths=[64])
    q = queries(spec, batch, device)
    outs, wants = [], []
    for factor in (0.5, 1.0, 2.0):
        scale = factor * spec.head_dim**-0.5
        outs.append(run(spec, q, batch, sm_scale=scale).float())
        wants.append(
            reference.paged_decode(
                spec, q, *batch.caches, batch.block_table, batch.seq_lens, sm_scale=scale
            )
        )
    got, want = torch.stack(outs), torch.stack(wants)
    slope = ((got * want).sum() / want.square().sum()).item()
    assert abs(slope - 1) < 1e-3


def test_one_dominating_token_and_scaled_values(library, device):
    """Logits of 200, and values a thousand times smaller or larger than usual."""
    spec = SPECS[1]
    library(spec, device)
    for factor in (1e-3, 1e3):
        batch = make_batch(spec, device, [300])
        k, v = (
            rows("gaussian", 300, spec.num_kv_heads, spec.head_dim, seed=s).to(device)
            for s in (1, 2)
        )
        q = queries(spec, batch, device)
        k[137] = 16 * q[0].float()
        reference.fill_kv_cache(spec, k, v * factor, *batch.caches, slot_mapping=batch.slots)
        want = reference.paged_decode(spec, q, *batch.caches, batch.block_table, batch.seq_lens)
        assert relative(run(spec, q, batch), want) <= LIMIT[q.dtype]


def test_workspace_and_maximum_length(library, device):
    spec = SPECS[0]
    library(spec, device)
    batch = filled(spec, device)
    q = queries(spec, batch, device)
    width = batch.block_table.shape[1] * spec.page_size
    size = paged_decode_workspace_size(spec, len(q), width, device)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
    plain = run(spec, q, batch)
    assert torch.equal(run(spec, q, batch, workspace=workspace), plain)
    error = relative(run(spec, q, batch, max_seq_len=max(batch.seq_lens.tolist())), plain.float())
    assert error <= LIMIT[q.dtype]


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4]], ids=lambda s: s.label)
def test_many_tokens(library, device, spec):
    """Weights of less than a unit of the integers that GPUs add up do not drift."""
    if device.type == "cpu":
        pytest.skip("takes minutes on a CPU, whose kernel adds floats")
    library(spec, device)
    batch = filled(spec, device, lengths=[60000, 100])
    q = queries(spec, batch, device)
    out = run(spec, q, batch)
    want = reference.paged_decode(spec, q, *batch.caches, batch.block_table, batch.seq_lens)
    assert relative(out, want) <= LIMIT[q.dtype]
