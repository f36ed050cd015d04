"""``attend`` for GPUs, run by the emulator, against float32 attention over the same cache."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from emulator import compile_functions
from emulator.attend_batches import FEATURES, LIMIT, Problem, close
from emulator.guarded import Guarded
from tq_tvm.kernels.attend_cuda import attend_cuda
from tq_tvm.kernels.attend_shape import AttendConfig, AttendShape
from tq_tvm.spec import CacheSpec

WIDE = AttendConfig(warps=4, row_tiles=1, tile=32, lanes=2, registers=168, reach=1, overlap=0)
TALL = AttendConfig(warps=2, row_tiles=2, tile=16, lanes=4, registers=255, reach=2, overlap=1)
FLAT = AttendConfig(warps=2, row_tiles=1, tile=16, lanes=8, registers=255, reach=1, overlap=1)
PAIR = AttendConfig(warps=2, row_tiles=1, tile=16, lanes=4, registers=255, reach=2, overlap=1)
TRIO = AttendConfig(warps=3, row_tiles=1, tile=16, lanes=8, registers=255, reach=1, overlap=1)
MSE3 = "mse3-mse2-signed-norm"
CASES = {
    "group4": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd"), WIDE),
    # Codes of K are bytes beside 16 rows, and halves beside more.
    "bytes_64": (CacheSpec(64, 6, 1, 16, "bfloat16", "bhsd", "k4v2", window=20), FLAT),
    "bytes_256": (CacheSpec(256, 4, 1, 16, "bfloat16", "bshd", "qjl4-mse3-signed-norm"), PAIR),
    "halves": (CacheSpec(128, 8, 1, 32, "bfloat16", "bhsd", "k4v2"), TALL),
    "group6_half": (CacheSpec(128, 6, 1, 8, "float16", "bhsd", "tq33"), TALL),
    "group71": (CacheSpec(64, 71, 1, 16, "bfloat16", "bhsd", "tq22"), WIDE),
    "mse2_64": (CacheSpec(64, 6, 1, 16, "float16", "bshd", MSE3), TALL),
    "head256": (CacheSpec(256, 4, 2, 16, "bfloat16", "bshd", "tq44"), WIDE),
    "int8": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "int8"), WIDE),
    "int4_half": (CacheSpec(64, 6, 1, 16, "float16", "bhsd", "int4"), TALL),
    "fp8": (CacheSpec(64, 4, 1, 32, "bfloat16", "bhsd", "fp8"), TALL),
    "none": (CacheSpec(64, 8, 2, 8, "bfloat16", "bshd", "none"), WIDE),
    "int8_mse4": (CacheSpec(64, 4, 1, 64, "float16", "bshd", "tq84"), WIDE),
    "int8_256": (CacheSpec(256, 4, 1, 16, "bfloat16", "bhsd", "int8"), PAIR),
    "qjl4_int8": (CacheSpec(128, 8, 2, 32, "bfloat16", "bshd", "qjl4-int8-signed-norm"), WIDE),
    "fp8_int4": (CacheSpec(128, 6, 1, 16, "float16", "bhsd", "fp8-int4"), TALL),
    "d128v64": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq42", 64), TALL),
    "d64v256": (CacheSpec(64, 4, 1, 16, "float16", "bhsd", "int8-fp8", 256), FLAT),
    "d80": (CacheSpec(80, 4, 1, 8, "bfloat16", "bhsd", "tq33"), WIDE),
    "d96": (CacheSpec(96, 4, 2, 64, "float16", "bshd", "k4v2"), TALL),
    "d192v128": (CacheSpec(192, 4, 1, 16, "bfloat16", "bshd", "mse3-fp8-plain-norm", 128), WIDE),
    "d112": (CacheSpec(112, 4, 2, 32, "float16", "bshd", "int4-none"), WIDE),
    "d80v112": (CacheSpec(80, 3, 1, 16, "bfloat16", "bshd", "none-int8-signed", 112), TALL),
    "none_fp8": (CacheSpec(64, 4, 2, 16, "float16", "bhsd", "none-fp8-plain"), TALL),
    # Two warps have half of the output each, or one has all of it.
    "d512": (CacheSpec(512, 4, 1, 64, "bfloat16", "bshd", "tq42"), PAIR),
    "d128v512": (CacheSpec(128, 4, 2, 8, "float16", "bhsd", "int8-mse3-signed-norm", 512), PAIR),
    "d512v128": (CacheSpec(512, 3, 1, 16, "bfloat16", "bhsd", "none-fp8-plain", 128), FLAT),
    # Two factors of twelve; three warps have a third of the output each.
    "d576": (CacheSpec(576, 4, 1, 16, "bfloat16", "bshd", "mse4-mse3-signed-norm"), TRIO),
    "d64v576": (CacheSpec(64, 3, 1, 8, "float16", "bhsd", "int8-none-plain", 576), TRIO),
    "d576v512": (CacheSpec(576, 5, 1, 32, "float16", "bshd", "k4v2", 512), PAIR),
    "d576v64": (CacheSpec(576, 4, 1, 64, "bfloat16", "bhsd", "none-fp8-signed", 64), FLAT),
    # Windows longer than some sequences, of one token, and of all of most sequences.
    "window": (CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq42", window=50), WIDE),
    "window_one": (CacheSpec(64, 6, 1, 8, "float16", "bhsd", MSE3, window=1), TALL),
    "window_d512": (CacheSpec(512, 4, 1, 16, "bfloat16", "bshd", "tq42", window=50), PAIR),
    "window_d80v576": (CacheSpec(80, 3, 1, 8, "float16", "bhsd", "int8", 576, window=40), TRIO),
    "window_int8": (CacheSpec(64, 4, 1, 16, "float16", "bshd", "int8-fp8", window=20), WIDE),
    "window_none": (CacheSpec(64, 4, 1, 16, "bfloat16", "bhsd", "fp8-none", window=128), TALL),
}
FEW = {"lengths": [300, 3, 200, 0, 65, 40, 0], "queries": [4, 1, 8, 0, 2, 0, 1]}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels of a case, compiled once."""
    directory = tmp_path_factory.mktemp("attend")

    @functools.cache
    def module(case):
        return compile_functions({"attend": attend_cuda(*CASES[case])}, directory)

    return module


def run(module, case, features, *, parts=3, descending=False, spoil=None, **options):
    spec, config = CASES[case]
    problem = Problem(spec, FEATURES[features], **{**FEW, **options})
    if spoil is not None:
        *where, number = spoil
        problem.q[tuple(where)] = number
    shape = AttendShape(spec, config)
    slots = 2 * parts * spec.num_kv_heads * shape.rows.rows
    workspace = Guarded((slots * (spec.value_dim + 2),), torch.float32)
    module["attend"](*problem.arguments(workspace.tensor, parts), descending=descending)
    workspace.check()
    return problem


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("features", ["plain", "all"])
def test_equals_reference(compiled, case, features):
    run(compiled(case), case, features).check()


@pytest.mark.parametrize("case", ["group4", "window"])
@pytest.mark.parametrize("parts", [1, 2, 7, 40])
def test_merges_pieces(compiled, case, parts):
    run(compiled(case), case, "all", parts=parts).check()


@pytest.mark.parametrize("case", ["group4", "window"])
@pytest.mark.parametrize("features", [f for f in FEATURES if f not in ("plain", "all")])
def test_each_feature(compiled, case, features):
    run(compiled(case), case, features).check()


@pytest.mark.parametrize("case", ["group6_half", "window", "window_none"])
def test_many_query_tokens(compiled, case):
    """More than the spec's window, too."""
    run(compiled(case), case, "all", queries=[70, 3, 5, 0, 65, 0, 0]).check()


@pytest.mark.parametrize("case", ["group4", "group6_half", "int8"])
def test_large_logits(compiled, case):
    """Of standard deviation 30: a row's bound has to follow."""
    problem = run(compiled(case), case, "plain", scale=30.0)
    assert close(problem.out, problem.want, 2 * LIMIT[problem.out.dtype])


@pytest.mark.parametrize("case", ["group4", "int8"])
def test_values_that_grow(compiled, case):
    """The bound of V's scales has to follow, and what is relative to it."""
    run(compiled(case), case, "plain", growth=300.0).check()


@pytest.mark.parametrize("case", ["group4", "halves"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_query(compiled, case, number):
    """A token and head of one block."""
    spoilt = (2, 1)
    problem = run(compiled(case), case, "plain", spoil=(*spoilt, 5, number))
    others = torch.ones(problem.out.shape[:2], dtype=torch.bool)
    others[spoilt] = False
    assert problem.out[spoilt].isnan().all() and problem.lse[spoilt].isnan()
    assert close(problem.out[others], problem.want[others], LIMIT[problem.out.dtype])
    assert not problem.lse[others].isnan().any()


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
