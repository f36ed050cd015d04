"""``prefill`` for GPUs, run by the emulator, against float32 attention over the same cache."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from emulator import compile_functions
from emulator.attend_batches import FEATURES, LIMIT, Problem, close
from tq_tvm.kernels.prefill import prefill
from tq_tvm.spec import CacheSpec

TALL = {"warps": 4, "row_tiles": 2, "tile": 64, "lanes": 4, "registers": 255, "cluster": 0}
FLAT = {"warps": 2, "row_tiles": 1, "tile": 32, "lanes": 8, "registers": 255, "cluster": 0}
PARTS = {**FLAT, "cluster": 8}
ONE = {
    "multipliers": 1, "decoders": 4, "tile": 64, "places": 2, "lanes": 2, "registers": 168,
    "cluster": 8,
}  # fmt: skip
TWO = {**ONE, "multipliers": 2, "places": 3, "registers": 184}
CASES = {
    "together": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd"), ONE),
    "together_half": (CacheSpec(128, 6, 1, 16, "float16", "bhsd", "tq33"), TWO),
    "together_d64": (CacheSpec(64, 71, 1, 8, "bfloat16", "bshd", "tq44"), {**TWO, "lanes": 4}),
    "together_int8": (CacheSpec(64, 8, 2, 64, "float16", "bshd", "int8"), {**ONE, "lanes": 8}),
    "together_d64v128": (
        CacheSpec(64, 4, 2, 64, "bfloat16", "bhsd", "fp8-int4-plain", 128),
        {**TWO, "multipliers": 3, "lanes": 8, "registers": 144},
    ),
    "group4": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd"), TALL),
    "group6_half": (CacheSpec(128, 6, 1, 8, "float16", "bhsd", "tq33"), FLAT),
    "group71": (CacheSpec(64, 71, 1, 16, "bfloat16", "bhsd", "tq22"), FLAT),
    "head256": (CacheSpec(256, 4, 2, 16, "bfloat16", "bshd", "tq44"), FLAT),
    "int8": (CacheSpec(64, 8, 2, 64, "float16", "bshd", "int8"), FLAT),
    "int4": (CacheSpec(64, 4, 1, 8, "bfloat16", "bhsd", "int4"), FLAT),
    "fp8_half": (CacheSpec(64, 8, 2, 16, "float16", "bshd", "fp8-fp8-signed"), TALL),
    "none": (CacheSpec(128, 8, 2, 64, "bfloat16", "bhsd", "none"), FLAT),
    "int8_mse2": (CacheSpec(64, 4, 1, 16, "bfloat16", "bshd", "int8-mse2-plain-norm"), FLAT),
    "d80": (CacheSpec(80, 4, 1, 8, "bfloat16", "bhsd", "tq33"), FLAT),
    "d192v64": (CacheSpec(192, 4, 2, 64, "float16", "bshd", "none-int4-plain", 64), FLAT),
    "cluster": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd"), {**TALL, "cluster": 8}),
    "cluster_d80": (CacheSpec(80, 4, 1, 8, "float16", "bhsd", "tq33"), PARTS),
    "cluster_d64v128": (CacheSpec(64, 3, 1, 16, "bfloat16", "bshd", "int8", 128), PARTS),
    "mse3_none": (CacheSpec(64, 4, 2, 32, "float16", "bhsd", "mse3-none-signed-norm"), FLAT),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels of a case, compiled once."""
    directory = tmp_path_factory.mktemp("prefill")

    @functools.cache
    def module(case):
        spec, config = CASES[case]
        return compile_functions({"prefill": prefill(spec, "cuda", config)}, directory)

    return module


def run(module, case, features, *, parts=None, descending=False, **options):
    spec, config = CASES[case]
    problem = Problem(spec, FEATURES[features], **options)
    parts = (2 if config["cluster"] else 1) if parts is None else parts
    module["prefill"](*problem.arguments(parts=parts), descending=descending)
    return problem


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(compiled, case):
    """Both in one test: workers that run tests side by side compile for themselves."""
    for features in ("plain", "all"):
        run(compiled(case), case, features).check()


@pytest.mark.parametrize("case", ["group4", "together"])
@pytest.mark.parametrize("features", [f for f in FEATURES if f not in ("plain", "all")])
def test_each_feature(compiled, case, features):
    run(compiled(case), case, features).check()


@pytest.mark.parametrize("case", ["cluster", "together"])
@pytest.mark.parametrize("parts", [1, 4, 8])
@pytest.mark.parametrize("features", ["plain", "kept"])
def test_ctas_of_a_cluster_share_a_block(compiled, case, parts, features):
    """Of 200 tokens a part has one tile of 64, or none."""
    run(compiled(case), case, features, parts=parts).check()


def test_large_logits(compiled):
    """Of standard deviation 30: a row's bound has to follow."""
    problem = run(compiled("group6_half"), "group6_half", "plain", scale=30.0)
    assert close(problem.out, problem.want, 2 * LIMIT[torch.float16])


def test_rows_past_the_last_sequence_are_left_alone(compiled):
    problem = run(compiled("group4"), "group4", "plain", padding=50)
    problem.check()
    assert problem.out[problem.tokens :].isnan().all()
    assert problem.lse[problem.tokens :].isnan().all()


def test_threads_in_the_other_order_and_without_lse(compiled):
    one = run(compiled("group4"), "group4", "all")
    other = run(compiled("group4"), "group4", "all", want_lse=False, descending=True)
    assert torch.equal(one.out, other.out)
    assert other.lse.numel() == 0
