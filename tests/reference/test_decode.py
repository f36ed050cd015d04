"""``reference.decode`` against torch's attention in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rows import KINDS, rows
from specs import CPU_SPECS, make_batch

from tq_tvm import reference
from tq_tvm.spec import CacheSpec


def torch_attention(q, k, v, scale=None):
    """[HQ, D] over [L, HK, D]."""
    grouped = (t.transpose(0, 1)[None] for t in (k, v))
    out = F.scaled_dot_product_attention(q[None, :, None], *grouped, scale=scale, enable_gqa=True)
    return out[0, :, 0]


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_torchs(group, length, scale):
    q = rows("gaussian", 2 * group, 64, seed=1)
    k, v = rows("gaussian", length, 2, 64, seed=2), rows("gaussian", length, 2, 64, seed=3)
    got = reference.attention(q, k, v, scale)
    torch.testing.assert_close(got, torch_attention(q, k, v, scale), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", CPU_SPECS, ids=lambda s: s.label)
def test_is_torchs_attention_over_the_dequantised_cache(spec, kind):
    """In the model's domain, where nothing is rotated: the two rotations cancel."""
    batch = make_batch(spec, "cpu", [0, 1, 65, 130])
    k, v = (rows(kind, batch.tokens, spec.num_kv_heads, spec.head_dim, seed=s) for s in (1, 2))
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    args = (*batch.caches, batch.block_table, batch.seq_lens)
    q = rows("gaussian", len(batch.seq_lens), spec.num_q_heads, spec.head_dim, seed=3)
    got = reference.paged_decode(spec, q, *args)
    assert got.dtype == torch.float32
    assert bool((got[0] == 0).all()), "an empty sequence gives zeros"
    dense = reference.flatten_kv_cache(spec, *args, rotate_back=True)
    for b in range(1, len(batch.seq_lens)):
        begin, end = int(batch.starts[b]), int(batch.starts[b + 1])
        want = torch_attention(q[b], dense[0][begin:end], dense[1][begin:end])
        torch.testing.assert_close(got[b], want, rtol=1e-4, atol=1e-4)


def test_scale():
    """The default is 1/sqrt(D), and a scale multiplies the logits as a longer query does."""
    spec = CacheSpec(64, 4, 2, 16, "float32")
    batch = make_batch(spec, "cpu", [50])
    k, v = (rows("gaussian", 50, 2, 64, seed=s) for s in (1, 2))
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    args = (*batch.caches, batch.block_table, batch.seq_lens)
    q = rows("gaussian", 1, 4, 64, seed=3)
    default = reference.paged_decode(spec, q, *args)
    torch.testing.assert_close(reference.paged_decode(spec, q, *args, sm_scale=0.125), default)
    doubled = reference.paged_decode(spec, q, *args, sm_scale=0.25)
    torch.testing.assert_close(doubled, reference.paged_decode(spec, 2 * q, *args))
    assert (doubled - default).norm() > 0.05 * default.norm()
