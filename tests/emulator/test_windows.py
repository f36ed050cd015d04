"""``fill`` and ``decode`` for GPUs of specs with a window of unquantised rows.

Of ``attend`` see ``test_attend``.
"""

from __future__ import annotations

import functools

import pytest
import torch
from specs import kernel_caches, make_batch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules import decode as space

from emulator import compile_functions
from emulator.attend_batches import Problem
from emulator.guarded import Guarded
from emulator.row_checks import TOLERANCE, check_filled, guard_caches, new_rows
from tq_tvm import reference
from tq_tvm.kernels.decode import decode
from tq_tvm.kernels.fill_cuda import FillConfig, fill_cuda
from tq_tvm.spec import CacheSpec
from tq_tvm.splits import workspace_floats

FILL = FillConfig(warps=2, tiles=2, contracted=1, sides=1, stages=2, registers=96)
FILLED = [
    CacheSpec(128, 4, 2, 16, "bfloat16", "bshd", "tq42", window=40),
    CacheSpec(64, 3, 3, 8, "float16", "bhsd", "fp8-none", window=3),
    CacheSpec(256, 2, 1, 16, "bfloat16", "bshd", "int4-none-signed", window=16),
    CacheSpec(512, 1, 1, 16, "bfloat16", "bshd", "tq42", window=30),
    CacheSpec(80, 2, 2, 8, "float16", "bhsd", "none-mse3-signed-unbiased", 64, window=5),
]
LENGTHS = [70, 3, 16, 0, 40, 41]


def guarded_rings(spec):
    """Rings of another order, with two more, full of what is no number."""
    shape = (len(LENGTHS) + 2, spec.window, spec.num_kv_heads)
    dims = (spec.head_dim, spec.value_dim)
    guards = [Guarded((*shape, dim), getattr(torch, spec.dtype)) for dim in dims]
    slots = torch.tensor([6, 2, 0, 3, 1, 7], dtype=torch.int32)
    return guards, (*(guard.tensor for guard in guards), slots)


@pytest.mark.parametrize("spec", FILLED, ids=lambda s: s.label)
def test_fill(tmp_path, spec):
    """Prefill, then append: pages as without a window, and the newest tokens of each sequence."""
    function = compile_functions({"fill": fill_cuda(spec, FILL, by_table=True)}, tmp_path)["fill"]
    batch = make_batch(spec, "cpu", LENGTHS)
    guards = guard_caches(batch)
    rings, ours = guarded_rings(spec)
    theirs = (ours[0].clone(), ours[1].clone(), ours[2])
    k, v = new_rows(spec, batch.tokens)
    appended = batch.seq_lens.clamp(max=3)
    for lens, counts in (
        (batch.seq_lens - appended, batch.seq_lens - appended),
        (batch.seq_lens, appended),
    ):
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        ends = (batch.starts[:-1] + lens).tolist()
        chosen = torch.cat(
            [torch.arange(e - c, e) for e, c in zip(ends, counts.tolist(), strict=True)]
        )
        new = (k[chosen], v[chosen])
        where = (batch.block_table, lens, starts)
        function(*new, *kernel_caches(spec, batch.caches), *where, *ours)
        unused = make_batch(spec, "cpu", LENGTHS).caches
        table = dict(zip(("block_table", "seq_lens", "q_start_loc"), where, strict=True))
        reference.fill_kv_cache(spec, *new, *unused, **table, window=theirs)
    check_filled(spec, batch, guards, k, v, batch.slots)
    for guard, want in zip(rings, theirs, strict=False):
        got = guard.tensor
        assert torch.equal(got.isnan(), want.isnan())
        apart = (got.float() - want.float()).nan_to_num().norm()
        assert apart <= TOLERANCE[got.dtype] * want.float().nan_to_num().norm()
        guard.check()


# Windows that are no multiple of what a warp reads, of one token, and of all of some sequences.
DECODED = {
    "group4": CacheSpec(128, 8, 2, 64, "bfloat16", "bshd", "tq42", window=50),
    "group6": CacheSpec(64, 6, 1, 16, "float16", "bhsd", window=1),
    "cluster": CacheSpec(64, 6, 1, 16, "float16", "bhsd", window=70),
    "head256": CacheSpec(256, 2, 1, 32, "float16", "bshd", "tq44", window=136),
    "head512": CacheSpec(512, 2, 1, 32, "bfloat16", "bshd", "tq42", window=45),
}


@pytest.fixture(scope="module")
def decode_of(tmp_path_factory):
    """``decode`` of a case, compiled once, and its decisions."""
    directory = tmp_path_factory.mktemp("decode")

    @functools.cache
    def function(case):
        cluster = 8 if case == "cluster" else 0
        # Two warps share a row of 512 values, and a CTA has no more.
        warps = 1 if DECODED[case].head_dim == 512 else 2
        own = {"warps": warps, "tile": 32, "cluster": cluster}
        config = space.defaults(DECODED[case], "cuda") | own
        func = decode(DECODED[case], "cuda", config)
        return compile_functions({"decode": func}, directory)["decode"], config

    return function


@pytest.mark.parametrize("case", DECODED)
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_decode(decode_of, case, parts):
    """Sequences in one piece, in several, with all their tokens in the window, and without any."""
    spec, (function, config) = DECODED[case], decode_of(case)
    lengths = [300, 3, 200, 0, 65, 50, 1]
    problem = Problem(spec, {}, lengths=lengths, queries=[1] * len(lengths), want_lse=False)
    launch = space.launch(spec, "cuda", config)
    workspace = Guarded((workspace_floats(spec, len(lengths), parts, launch),), torch.float32)
    given = problem.arguments()
    function(
        *given[:7], *problem.rings, workspace.tensor, problem.out, parts, spec.head_dim**-0.5,
        descending=parts == 3,
    )  # fmt: skip
    workspace.check()
    problem.check()
