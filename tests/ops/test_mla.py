"""`mla_decode` against the reference: formats, blocks of heads, ragged lengths, lse, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rows import rows
from specs import LATENTS as SPECS
from specs import kernel_caches, make_batch, scales_of

from tq_tvm import (
    ArgumentTypeError,
    ArgumentValueError,
    PagedKVCache,
    UnsupportedSpecError,
    fill_kv_cache,
    merge_attention_states,
    mla_decode,
    reference,
)
from tq_tvm.served import functions_on

LENGTHS = [70, 0, 1, 16, 33]
SCALE = 192**-0.5
OUTPUT_ERROR = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 6e-3}
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.label)


@pytest.fixture
def served(library, device):
    """Build the library of a spec where the device has kernels of it."""

    def ensure(spec):
        if device.type == "cuda" and "mla" not in functions_on(spec, "cuda"):
            pytest.skip("GPUs have no kernel of mla")
        library(spec, device)

    return ensure


def make_problem(spec, device, lengths=LENGTHS):
    """A filled cache of a ragged batch, and queries."""
    batch = make_batch(spec, device, lengths)
    dtype = getattr(torch, spec.dtype)
    latent, rope = (
        rows("gaussian", batch.tokens, 1, dim, seed=s).to(device, dtype)
        for dim, s in ((512, 1), (64, 2))
    )
    fill_kv_cache(
        latent, rope, *batch.caches, slot_mapping=batch.slots, layout=spec.layout,
        policy=spec.format, **scales_of(spec),
    )  # fmt: skip
    queries = [
        (3 * rows("gaussian", len(lengths), spec.num_q_heads, dim, seed=s)).to(device, dtype)
        for dim, s in ((512, 3), (64, 4))
    ]
    return batch, queries


def call(spec, batch, queries, **options):
    scales = {name: value for name, value in scales_of(spec).items() if name == "k_scale"}
    return mla_decode(
        *queries, *batch.caches, batch.block_table, batch.seq_lens, sm_scale=SCALE,
        policy=spec.format, layout=spec.layout, **scales, **options,
    )  # fmt: skip


def wanted(spec, batch, queries):
    scales = {name: value for name, value in scales_of(spec).items() if name == "k_scale"}
    return reference.paged_mla(
        spec, *queries, *batch.caches, batch.block_table, batch.seq_lens, sm_scale=SCALE, **scales
    )


@each_spec
def test_equals_reference(served, device, spec):
    served(spec)
    batch, queries = make_problem(spec, device)
    want, want_lse = wanted(spec, batch, queries)
    out, lse = call(spec, batch, queries, return_lse=True)
    assert ((out.float() - want).norm() / want.norm()).item() <= OUTPUT_ERROR[spec.dtype]
    empty = batch.seq_lens == 0
    assert torch.all(out[empty] == 0) and torch.all(lse[empty] == -torch.inf)
    limit = 1e-4 if spec.dtype == "float32" else 2e-2
    assert (lse[~empty] - want_lse[~empty]).abs().max().item() < limit
    assert torch.equal(call(spec, batch, queries), out), "with and without lse"


def test_bytes_of_a_token():
    assert SPECS[0].bytes_per_token == 256 + 2 + 128
    assert SPECS[0].is_latent
    assert not dataclasses.replace(SPECS[0], format="mse4-mse4-signed-matched").is_latent
    assert not dataclasses.replace(SPECS[0], head_dim_v=None).is_latent


def test_parts_of_a_context_merge(served, device):
    spec = SPECS[0]
    served(spec)
    batch, queries = make_problem(spec, device, [96, 64])
    whole, lse = call(spec, batch, queries, return_lse=True)
    size = spec.page_size
    pages, parts = batch.block_table, []
    for table, lens in ((pages[:, :1], [size, size]), (pages[:, 1:], [96 - size, 0])):
        part = dataclasses.replace(
            batch, block_table=table.contiguous(), seq_lens=batch.seq_lens.new_tensor(lens)
        )
        parts.append(call(spec, part, queries, return_lse=True))
    merged, merged_lse = merge_attention_states(*parts[0], *parts[1])
    assert ((merged.float() - whole.float()).norm() / whole.float().norm()).item() < 6e-3
    assert torch.allclose(merged_lse, lse, atol=1e-4)


def test_cache_holds_it(served, device):
    spec = SPECS[0]
    served(spec)
    cache = PagedKVCache(spec, 4, device=device)
    latent, rope = (
        rows("gaussian", 70, 1, d, seed=d).to(device, torch.bfloat16) for d in (512, 64)
    )
    cache.fill(latent, rope, slot_mapping=torch.arange(70, device=device))
    q, p = (rows("gaussian", 1, 20, d, seed=d + 1).to(device, torch.bfloat16) for d in (512, 64))
    table = torch.arange(4, device=device).int()[None]
    lens = torch.tensor([70], dtype=torch.int32, device=device)
    options = {"sm_scale": SCALE, "policy": spec.format}
    out = mla_decode(q, p, *cache.tensors(), table, lens, **options)
    latent, rope = (
        x[:, 0].float() for x in cache.flatten(table, lens, out_tokens=70, rotate_back=True)
    )
    logits = (q.float()[0] @ latent.T + p.float()[0] @ rope.T) * SCALE
    exact = logits.softmax(-1) @ latent
    assert ((out[0].float() - exact).norm() / exact.norm()).item() < 0.02, "rows were rounded twice"


def test_compiles_without_graph_break(served, device):
    spec = SPECS[0]
    served(spec)
    batch, queries = make_problem(spec, device)
    want = call(spec, batch, queries)
    compiled = torch.compile(lambda *q: call(spec, batch, q), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*queries), want)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q_rope", lambda t: t[..., :32].contiguous(), ArgumentValueError, "q_rope must be"),
        ("q_rope", lambda t: t.double(), ArgumentTypeError, "q_rope must be"),
        ("q_latent", lambda t: t[0], ArgumentValueError, "q_latent must be"),
        ("q_latent", lambda t: t[..., :128].contiguous(), ArgumentValueError, "q_latent must be"),
        ("seq_lens", lambda t: t + 1000, ArgumentValueError, "seq_lens must be"),
        ("block_table", lambda t: t + 1000, ArgumentValueError, r"block_table\[0, 0\] must be"),
    ],
)
def test_wrong_arguments(served, device, name, change, error, message):
    spec = SPECS[0]
    served(spec)
    batch, queries = make_problem(spec, device)
    names = ("q_latent", "q_rope", "k_cache", "v_cache", "k_meta", "v_meta")
    given = dict(zip(names, [*queries, *batch.caches], strict=True))
    given |= {"block_table": batch.block_table, "seq_lens": batch.seq_lens}
    if device.type == "cuda" and name in ("seq_lens", "block_table"):
        pytest.skip("what is in a GPU's tensors is not checked")
    given[name] = change(given[name])
    with pytest.raises(error, match=message):
        mla_decode(**given, sm_scale=SCALE, policy=spec.format)


def test_a_workspace_that_is_too_small(served, device):
    """Its size is not what `paged_decode_workspace_size` says."""
    spec = SPECS[0]
    served(spec)
    batch, queries = make_problem(spec, device)
    small = torch.empty(16, device=device)
    with pytest.raises(ArgumentValueError, match=r"workspace must be at least .*workspace=None$"):
        call(spec, batch, queries, workspace=small)


def test_other_caches_are_refused(device):
    spec = dataclasses.replace(SPECS[0], format="mse4-mse4-signed-matched")
    batch = make_batch(spec, device, LENGTHS)
    q, p = (torch.zeros(5, 20, d, dtype=torch.bfloat16, device=device) for d in (512, 64))
    with pytest.raises((ArgumentValueError, UnsupportedSpecError), match="mla_decode"):
        mla_decode(
            q, p, *kernel_caches(spec, batch.caches), batch.block_table, batch.seq_lens,
            sm_scale=SCALE, policy=spec.format,
        )  # fmt: skip
