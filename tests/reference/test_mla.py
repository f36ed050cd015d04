"""``reference.paged_mla`` against loops over heads and tokens in float64."""

from __future__ import annotations

import torch
from rows import rows
from specs import make_batch

from tq_tvm import CacheSpec, reference

SPEC = CacheSpec(512, 3, 1, 16, "float32", format="none-none", head_dim_v=64)


def test_equals_loops():
    batch = make_batch(SPEC, "cpu", [5, 0, 33])
    latent, rope = (
        rows("gaussian", batch.tokens, 1, dim, seed=s) for dim, s in ((512, 1), (64, 2))
    )
    reference.fill_kv_cache(SPEC, latent, rope, *batch.caches, slot_mapping=batch.slots)
    q, p = (rows("gaussian", 3, 3, dim, seed=s) for dim, s in ((512, 3), (64, 4)))
    out, lse = reference.paged_mla(
        SPEC, q, p, *batch.caches, batch.block_table, batch.seq_lens, sm_scale=0.05
    )
    assert torch.all(out[1] == 0) and torch.all(lse[1] == -torch.inf)
    for b, tokens in ((0, range(5)), (2, range(5, 38))):
        for h in range(3):
            logits = torch.stack(
                [
                    0.05 * (q[b, h].double() @ latent[t, 0].double()
                            + p[b, h].double() @ rope[t, 0].double())
                    for t in tokens
                ]
            )  # fmt: skip
            weights = logits.softmax(0)
            want = sum(w * latent[t, 0].double() for w, t in zip(weights, tokens, strict=True))
            assert torch.allclose(out[b, h].double(), want, atol=1e-5)
            assert abs(lse[b, h].item() - logits.logsumexp(0).item()) < 1e-5
