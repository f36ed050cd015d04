"""``paged_decode`` on a library that shares work out among groups, run by the emulator."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rows import rows
from specs import make_batch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules import decode as space

from emulator import compile_functions
from tq_tvm import paged_decode, paged_decode_workspace_size, reference
from tq_tvm.artifacts import LoadedFunction, LoadedVariant
from tq_tvm.kernels.decode import decode
from tq_tvm.ops import decode as decode_call
from tq_tvm.ops import workspace
from tq_tvm.spec import CacheSpec
from tq_tvm.splits import launch_keys, num_groups

SPEC = CacheSpec(64, 8, 2, 16, "bfloat16", "bshd")
CONFIG = {
    "warps": 2, "abreast": 2, "tile": 32, "registers": 256, "query_in_shared": 1,
    "headroom": 1, "reach": 1, "overlap": 0, "promoted": 0,
}  # fmt: skip
PROCESSORS = 4


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of one variant in place of the one that calls would load."""
    module = compile_functions({"decode": decode(SPEC, "cuda", CONFIG)}, tmp_path)
    launch = space.launch(SPEC, "cuda", CONFIG)
    launch["ctas_per_sm"] = 65536 // (launch.pop("threads") * CONFIG["registers"])
    del launch["shared_bytes"]
    variant = LoadedVariant(module["decode"], "decode", 1, True, None, None, CONFIG, launch)
    loaded = LoadedFunction("decode", SPEC, (variant,), tmp_path, SimpleNamespace(), PROCESSORS)
    for module_of_calls in (decode_call, workspace):
        monkeypatch.setattr(module_of_calls, "load", lambda *_: loaded)
    monkeypatch.setattr(decode_call, "_loaded", {})
    return loaded


@pytest.mark.parametrize("lengths", [[300, 0, 17, 64], [1], [500]])
def test_paged_decode(library, lengths):
    (variant,) = library.variants
    assert set(variant.launch) == set(launch_keys(variant.launch))
    batch = make_batch(SPEC, "cpu", lengths)
    k, v = (
        rows("gaussian", batch.tokens, SPEC.num_kv_heads, SPEC.head_dim, seed=s) for s in (1, 2)
    )
    reference.fill_kv_cache(SPEC, k, v, *batch.caches, slot_mapping=batch.slots)
    q = rows("gaussian", len(lengths), SPEC.num_q_heads, SPEC.head_dim, seed=3).bfloat16()
    context = batch.block_table.shape[1] * SPEC.page_size
    size = paged_decode_workspace_size(SPEC, len(lengths), context, "cpu")
    groups = num_groups(SPEC, len(lengths), context, variant.launch, PROCESSORS)
    assert size >= 8 * groups * SPEC.num_q_heads * (SPEC.head_dim + 2)
    scratch = torch.full((size,), 0xCD, dtype=torch.uint8)
    arguments = (q, *batch.caches, batch.block_table, batch.seq_lens)
    out = paged_decode(*arguments, workspace=scratch)
    want = reference.paged_decode(SPEC, *arguments)
    assert (out.float() - want).norm() <= 1e-2 * want.norm()
    assert torch.equal(paged_decode(*arguments), out), "whoever allocates the workspace"
