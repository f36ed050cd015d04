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


def run(module, case, features, parts, change_table=lambda table: None, **options):
    spec = CASES[case]
    problem = Problem(spec, features, lengths=LENGTHS, queries=[1] * len(LENGTHS), **options)
    change_table(problem.batch.block_table)
    launch = schedule.launch(spec, "cuda", schedule.defaults(spec, "cuda"))
    size = workspace_floats(spec, len(LENGTHS), parts, launch)
    workspace = Guarded((size,), torch.float32)
    # All but where queries begin, and what is left of a window.
    given = problem.arguments()
    module["kernel"](
        *given[:7], *given[8:10], *problem.rings, workspace.tensor, problem.out, problem.lse, parts,
        *given[-4:-1],
    )  # fmt: skip
    workspace.check()
    return problem


ALL = {"soft_cap": 2.0, "alibi_slopes": 0.1, "sinks": 1.0}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("features", ["plain", "cap", "alibi", "sinks"])
def test_equals_reference(compiled, case, features):
    run(compiled(case), case, FEATURES[features], 3).check()


@pytest.mark.parametrize("case", ["group4", "group6_half", "head512"])
@pytest.mark.parametrize("window_left", [0, 30, 63, 64, 150, 1000])
def test_window_to_the_left(compiled, case, window_left):
    """Inside one tile, at the edge of one, over several, and longer than every sequence."""
    for parts in (1, 7):
        run(compiled(case), case, {"window_left": window_left}, parts).check()
    run(compiled(case), case, {**ALL, "window_left": window_left}, 3).check()


@pytest.mark.parametrize(
    ("case", "left", "features", "more"),
    [
        ("group4", 30, {}, 3),
        ("group4", 150, ALL, 1),
        ("group6_half", 30, {}, 3),
        # Five tiles: a warp has another one before that.
        ("group6_half", 260, ALL, 1),
    ],
)
def test_pages_before_a_window_are_not_read(compiled, case, left, features, more):
    """Their entries of the table may be anything; a tile has one page, or four.

    With ALiBi the tile that begins before the window is the last one.
    """
    spec, module = CASES[case], compiled(case)
    before = (torch.tensor(LENGTHS) - (left + 1)).clamp_min(0) // spec.page_size

    def freed(table):
        for row, pages in zip(table, before.tolist(), strict=True):
            row[:pages] = 1 << 30

    assert before.max() > more
    for parts in (1, 3):
        run(module, case, {**features, "window_left": left}, parts, change_table=freed).check()


@pytest.mark.parametrize("case", ["group4", "window"])
@pytest.mark.parametrize("parts", [1, 7, 20])
def test_features_together_in_pieces(compiled, case, parts):
    run(compiled(case), case, ALL, parts).check()


def test_without_lse(compiled):
    one = run(compiled("group4"), "group4", ALL, 3)
    other = run(compiled("group4"), "group4", ALL, 3, want_lse=False)
    assert torch.equal(one.out, other.out)
    assert other.lse.numel() == 0
