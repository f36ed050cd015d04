"""``decode_featured`` for GPUs, run by the emulator, against float32 attention over the cache."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules import decode as schedule

from emulator import compile_functions
from emulator.attend_batches import FEATURES, Problem
from emulator.guarded import Guarded
from tq_tvm.kernels.decode_featured import decode_featured
from tq_tvm.kernels.decode_shape import DecodeConfig
from tq_tvm.spec import CacheSpec
from tq_tvm.splits import workspace_floats

CASES = {
    "group4": CacheSpec(128, 8, 2, 64, "bfloat16", "bshd"),
    "group6_half": CacheSpec(128, 6, 1, 16, "float16", "bhsd", "tq33"),
    "window": CacheSpec(64, 6, 2, 16, "bfloat16", "bshd", "tq42", window=50),
    "head512": CacheSpec(512, 4, 2, 64, "bfloat16", "bshd", "tq42"),
}
LENGTHS = [300, 3, 200, 0, 65, 40, 1]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels of a case, compiled once."""
    directory = tmp_path_factory.mktemp("decode_featured")

    @functools.cache
    def module(case):
        config = DecodeConfig(**schedule.defaults(CASES[case], "cuda"))
        return compile_functions({"kernel": decode_featured(CASES[case], config)}, directory)

    return module


def run(module, case, features, parts, **options):
    spec = CASES[case]
    problem = Problem(spec, features, lengths=LENGTHS, queries=[1] * len(LENGTHS), **options)
    launch = schedule.launch(spec, "cuda", schedule.defaults(spec, "cuda"))
    size = workspace_floats(spec, len(LENGTHS), parts, launch)
    workspace = Guarded((size,), torch.float32)
    # All but where queries begin, and what is left of a window.
    given = problem.arguments()
    module["kernel"](
        *given[:7], *given[8:10], *problem.rings, workspace.tensor, problem.out, problem.lse, parts,
        *given[-4:-2],
    )  # fmt: skip
    workspace.check()
    return problem


ALL = {"soft_cap": 2.0, "alibi_slopes": 0.1, "sinks": 1.0}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("features", ["plain", "cap", "alibi", "sinks"])
def test_equals_reference(compiled, case, features):
    run(compiled(case), case, FEATURES[features], 3).check()


@pytest.mark.parametrize("case", ["group4", "window"])
@pytest.mark.parametrize("parts", [1, 7, 20])
def test_features_together_in_pieces(compiled, case, parts):
    run(compiled(case), case, ALL, parts).check()


def test_without_lse(compiled):
    one = run(compiled("group4"), "group4", ALL, 3)
    other = run(compiled("group4"), "group4", ALL, 3, want_lse=False)
    assert torch.equal(one.out, other.out)
    assert other.lse.numel() == 0
