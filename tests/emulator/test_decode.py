"""``decode`` for GPUs, run by the emulator, against float32 attention over the same cache."""

from __future__ import annotations

import functools

import pytest
import torch
from rows import rows
from specs import make_batch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules import decode as space

from emulator import compile_functions
from emulator.guarded import Guarded
from tq_tvm import reference
from tq_tvm.kernels.decode import decode
from tq_tvm.spec import CacheSpec
from tq_tvm.splits import workspace_floats

# As in ops/test_decode.py.
LIMIT = {torch.float16: 5e-3, torch.bfloat16: 1e-2}
LENGTHS = [0, 1, 63, 64, 65, 203]
STREAMS = {
    "warps": 4, "abreast": 1, "tile": 64, "registers": 168, "query_in_shared": 1,
    "headroom": 1, "reach": 1, "overlap": 0, "promoted": 128,
}  # fmt: skip
SMALL = {
    "warps": 2, "abreast": 1, "tile": 32, "registers": 256, "query_in_shared": 0,
    "headroom": 0, "reach": 2, "overlap": 1, "promoted": 0,
}  # fmt: skip
WIDE = {
    "warps": 1, "abreast": 4, "tile": 64, "registers": 168, "query_in_shared": 1,
    "headroom": 2, "reach": 4, "overlap": 0, "promoted": 128,
}  # fmt: skip
BOTH = {
    "warps": 2, "abreast": 4, "tile": 32, "registers": 128, "query_in_shared": 0,
    "headroom": 1, "reach": 1, "overlap": 0, "promoted": 128,
}  # fmt: skip
WIDE_VALUES = {
    "warps": 4, "abreast": 2, "tile": 32, "registers": 256, "query_in_shared": 1,
    "headroom": 1, "reach": 2, "overlap": 1, "promoted": 256,
}  # fmt: skip
SMALL_CTAS = {
    "warps": 2, "abreast": 2, "tile": 32, "registers": 256, "query_in_shared": 0,
    "headroom": 2, "reach": 2, "overlap": 1, "promoted": 256,
}  # fmt: skip
CLUSTER = {
    "warps": 4, "abreast": 1, "tile": 32, "registers": 128, "query_in_shared": 1,
    "headroom": 1, "reach": 1, "overlap": 0, "promoted": 128, "cluster": 16,
}  # fmt: skip
PORTABLE = {
    "warps": 2, "abreast": 2, "tile": 64, "registers": 256, "query_in_shared": 0,
    "headroom": 2, "reach": 1, "overlap": 0, "promoted": 0, "cluster": 8,
}  # fmt: skip
SLICES = {
    "warps": 1, "abreast": 1, "tile": 64, "registers": 256, "query_in_shared": 0,
    "headroom": 1, "reach": 1, "overlap": 1, "promoted": 128,
}  # fmt: skip
SLICES_SHORT = {**SLICES, "tile": 32, "reach": 2, "overlap": 0}
SLICES_CLUSTER = {**SLICES, "overlap": 0, "cluster": 8}
CASES = {
    "group4": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd"), STREAMS),
    "group4_half": (CacheSpec(128, 4, 1, 16, "float16", "bhsd"), SMALL),
    "group1": (CacheSpec(128, 3, 3, 16, "float16", "bshd"), BOTH),
    "group6": (CacheSpec(128, 6, 1, 128, "bfloat16", "bshd"), STREAMS),
    "group16": (CacheSpec(128, 16, 1, 32, "float16", "bshd"), SMALL),
    "group16_abreast": (CacheSpec(128, 32, 2, 64, "bfloat16", "bshd"), {**BOTH, "abreast": 2}),
    "abreast4": (CacheSpec(128, 16, 4, 64, "bfloat16", "bshd"), WIDE),
    "abreast4_streams": (CacheSpec(128, 16, 4, 16, "bfloat16", "bhsd"), BOTH),
    "abreast3": (CacheSpec(64, 18, 3, 16, "float16", "bhsd"), WIDE),
    "head64": (CacheSpec(64, 4, 2, 256, "bfloat16", "bshd"), STREAMS),
    "head256": (CacheSpec(256, 8, 1, 64, "float16", "bhsd"), SMALL),
    "head512": (CacheSpec(512, 8, 2, 64, "bfloat16", "bshd"), SLICES),
    "head512_group6": (CacheSpec(512, 6, 1, 16, "float16", "bhsd", "tq43"), SLICES_SHORT),
    "head512_values4": (CacheSpec(512, 4, 2, 8, "bfloat16", "bshd", "tq44"), SLICES),
    "mse4": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq42"), STREAMS),
    "mse4_group6": (CacheSpec(64, 6, 1, 16, "float16", "bhsd", "tq42"), SMALL),
    "mse3": (CacheSpec(128, 4, 1, 32, "float16", "bshd", "mse3-mse2-plain-norm"), SMALL),
    "mse3_group6": (CacheSpec(256, 6, 1, 128, "bfloat16", "bshd", "tq32"), STREAMS),
    "mse2": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq22"), STREAMS),
    "values3": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq43"), STREAMS),
    "values3_group6": (CacheSpec(256, 6, 1, 8, "float16", "bhsd", "tq33"), SMALL),
    "values4": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq44"), STREAMS),
    "values4_pairs": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq44"), WIDE_VALUES),
    "values4_group6": (CacheSpec(64, 6, 1, 16, "float16", "bhsd", "mse3-mse4-plain-norm"), SMALL),
    "head64_small": (CacheSpec(64, 8, 4, 64, "bfloat16", "bshd"), SMALL_CTAS),
    "values3_small": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq33"), SMALL_CTAS),
    "cluster": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd"), CLUSTER),
    "cluster_group6": (CacheSpec(128, 12, 2, 8, "float16", "bhsd"), PORTABLE),
    "cluster_group16": (CacheSpec(64, 16, 1, 32, "bfloat16", "bshd"), PORTABLE),
    "cluster_head256": (CacheSpec(256, 3, 3, 64, "float16", "bshd"), CLUSTER),
    "cluster_head512": (CacheSpec(512, 2, 1, 64, "bfloat16", "bshd", "tq33"), SLICES_CLUSTER),
    "cluster_signed": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq43"), PORTABLE),
    "qjl4_signed": (CacheSpec(128, 8, 2, 64, "bfloat16", "bhsd", "qjl4-mse2-signed-matched"), WIDE),
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


def run(module, case, q, batch, parts, descending=False, sm_scale=None):
    """The output; nothing around it and the workspace is written."""
    spec, config = CASES[case]
    out = Guarded(tuple(q.shape), q.dtype)
    floats = workspace_floats(spec, len(q), parts, space.launch(spec, "cuda", config))
    workspace = Guarded((floats,), torch.float32)
    module["decode"](
        q, *batch.caches, batch.block_table, batch.seq_lens, workspace.tensor, out.tensor,
        parts, spec.head_dim**-0.5 if sm_scale is None else sm_scale, descending=descending,
    )  # fmt: skip
    out.check()
    workspace.check()
    return out.tensor


def relative(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(compiled, case, parts):
    spec, _ = CASES[case]
    q, batch, want = problem(spec)
    out = run(compiled(case), case, q, batch, parts)
    assert relative(out, want) <= LIMIT[q.dtype]
    for got, row in zip(out[1:], want[1:], strict=True):
        assert relative(got, row) <= 2 * LIMIT[q.dtype], "a short sequence hides behind no long one"
    assert bool((out[0] == 0).all()), "an empty sequence gives zeros"


@pytest.mark.parametrize("case", ["group4", "group16", "cluster_group6"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_query(compiled, case, number):
    """Of a head of the longest sequence."""
    spec, _ = CASES[case]
    q, batch, want = problem(spec)
    spoilt = (int(batch.seq_lens.argmax()), 1)
    q[(*spoilt, 5)] = number
    out = run(compiled(case), case, q, batch, 3)
    others = torch.ones(out.shape[:2], dtype=torch.bool)
    others[spoilt] = False
    assert out[spoilt].isnan().all()
    assert relative(out[others], want[others]) <= LIMIT[q.dtype]


@pytest.mark.parametrize(
    "case", ["group4", "group16", "abreast4_streams", "cluster", "cluster_group6"]
)
def test_order_of_threads_does_not_matter(compiled, case):
    spec, _ = CASES[case]
    q, batch, _ = problem(spec, [130, 17])
    orders = [run(compiled(case), case, q, batch, 2, descending=d) for d in (False, True)]
    assert torch.equal(*orders)


@pytest.mark.parametrize("case", CASES)
def test_large_logits(compiled, case):
    """Weights concentrate on few tokens, and the running maxima move."""
    spec, _ = CASES[case]
    q, batch, want = problem(spec, [203, 64], scale=4.0)
    assert relative(run(compiled(case), case, q, batch, 2), want) <= LIMIT[q.dtype]


# --- shares of all tokens


@pytest.mark.parametrize("parts", [2, 7, 60])
@pytest.mark.parametrize("case", ["head64", "group4_half"])
def test_shares_cross_sequences(compiled, case, parts):
    """Many sequences, most of them empty: shares begin and end anywhere.

    A piece is asked for before the one in front of it is merged.
    """
    spec, _ = CASES[case]
    lengths = [900, 1, 0, 0, 0, 300] + [0] * 40 + [5, 0, 64, 129]
    q, batch, want = problem(spec, lengths)
    out = run(compiled(case), case, q, batch, parts)
    for length, got, row in zip(lengths, out, want, strict=True):
        if length:
            assert relative(got, row) <= 2 * LIMIT[q.dtype]
        else:
            assert bool((got == 0).all())


@pytest.mark.parametrize("case", ["head64", "group4_half"])
def test_a_sequence_of_many_pieces(compiled, case):
    """A CTA of the second launch has one query head then, and all of its warps."""
    spec, _ = CASES[case]
    q, batch, want = problem(spec, [900, 0])
    out = run(compiled(case), case, q, batch, 9)
    assert relative(out[0], want[0]) <= LIMIT[q.dtype]
    assert bool((out[1] == 0).all())


@pytest.mark.parametrize("parts", [2, 8, 16])
def test_clusters_of_every_size(compiled, parts):
    """More CTAs than tiles, and sequences that go around the cluster several times."""
    spec, _ = CASES["cluster"]
    q, batch, want = problem(spec, [0, 1, 4097, 130, 900])
    out = run(compiled("cluster"), "cluster", q, batch, parts)
    for got, row in zip(out[1:], want[1:], strict=True):
        assert relative(got, row) <= 2 * LIMIT[q.dtype]
    assert bool((out[0] == 0).all())


@pytest.mark.parametrize("case", ["group4", "cluster"])
def test_nothing_to_attend_to(compiled, case):
    q, batch, _ = problem(CASES[case][0], [0, 0])
    assert bool((run(compiled(case), case, q, batch, 4) == 0).all())


@pytest.mark.parametrize("case", ["group4", "values3_group6", "values4_group6", "cluster_signed"])
def test_values_that_are_all_alike(compiled, case):
    """Their codes are, too: errors of a level do not cancel. Odd rows are constant, rotated."""
    spec, _ = CASES[case]
    q, batch, _ = problem(spec, [70])
    k, v = (rows("gaussian", 70, spec.num_kv_heads, spec.head_dim, seed=s) for s in (5, 6))
    v[1::2] = reference.rotate_back(v[1::2].sign(), spec.cache_format.rotation) * 3
    v[::2] = 2.0
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    want = reference.paged_decode(spec, q, *batch.caches, batch.block_table, batch.seq_lens)
    assert relative(run(compiled(case), case, q, batch, 1), want) <= LIMIT[q.dtype]


@pytest.mark.parametrize("case", ["group4", "group6", "head512", "cluster_head512"])
def test_queries_whose_rotated_values_have_a_sum(compiled, case):
    """Codes lie off centroids by a constant, which keys of several lengths tell from a shift."""
    spec, _ = CASES[case]
    q, batch, _ = problem(spec, [150])
    q[..., 0] = 60.0
    k, v = (rows("gaussian", 150, spec.num_kv_heads, spec.head_dim, seed=s) for s in (5, 6))
    k *= torch.linspace(0.1, 4.0, 150)[:, None, None]
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    want = reference.paged_decode(spec, q, *batch.caches, batch.block_table, batch.seq_lens)
    assert relative(run(compiled(case), case, q, batch, 2), want) <= LIMIT[q.dtype]


# --- integer weights


def one_hot_problem(spec, tokens, logit):
    """One key along every query, so that its logit is ``logit``; the others have logits near 0."""
    q, batch, _ = problem(spec, [tokens])
    k, v = (rows("gaussian", tokens, spec.num_kv_heads, spec.head_dim, seed=s) for s in (5, 6))
    v = v + 0.5
    q = q.float()
    q = q / q.norm(dim=-1, keepdim=True) * spec.head_dim**0.5
    group = spec.group_size
    k[tokens // 2] = q[0, ::group] * (logit / spec.head_dim**0.5)
    q = q[:, ::group].repeat_interleave(group, 1).to(getattr(torch, spec.dtype))
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    want = reference.paged_decode(spec, q, *batch.caches, batch.block_table, batch.seq_lens)
    return q, batch, want


@pytest.mark.parametrize("case", ["group4", "group4_half", "group6", "mse4", "mse3", "values3"])
@pytest.mark.parametrize("logit", [7.5, 30.0, 200.0])
def test_one_token_among_thousands(compiled, case, logit):
    """At 7.5, the thousands weigh as much as the one."""
    q, batch, want = one_hot_problem(CASES[case][0], 2500, logit)
    assert relative(run(compiled(case), case, q, batch, 1), want) <= LIMIT[q.dtype]


@pytest.mark.parametrize("case", ["group4", "group6", "cluster"])
def test_scale_of_either_sign(compiled, case):
    spec, _ = CASES[case]
    q, batch, _ = problem(spec, [150])
    for sm_scale in (-0.2, 0.0, 0.5):
        want = reference.paged_decode(
            spec, q, *batch.caches, batch.block_table, batch.seq_lens, sm_scale=sm_scale
        )
        out = run(compiled(case), case, q, batch, 2, sm_scale=sm_scale)
        assert relative(out, want) <= LIMIT[q.dtype]


def test_queries_of_zero_weigh_all_tokens_alike(compiled):
    case = "group4"
    spec, _ = CASES[case]
    q, batch, _ = problem(spec, [150])
    q = torch.zeros_like(q)
    want = reference.paged_decode(spec, q, *batch.caches, batch.block_table, batch.seq_lens)
    assert relative(run(compiled(case), case, q, batch, 1), want) <= LIMIT[q.dtype]


def test_wrong_arguments_are_refused_by_the_launcher(compiled):
    spec, _ = CASES["group4"]
    q, batch, _ = problem(spec, [5])
    with pytest.raises(ValueError, match=r"argument #0"):
        run(compiled("group4"), "group4", q[..., :64].contiguous(), batch, 1)
