"""``mla`` for GPUs, run by the emulator, against float32 attention over the same latents."""

from __future__ import annotations

import functools

import pytest
import torch
from rows import rows
from specs import kernel_caches, make_batch, scales_of

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules import mla as schedule

from emulator import compile_functions
from emulator.guarded import Guarded
from tq_tvm import reference
from tq_tvm.kernels.mla import mla
from tq_tvm.spec import CacheSpec
from tq_tvm.splits import mla_floats

LENGTHS = [70, 0, 1, 200, 64]
SCALE = 192**-0.5
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
LSE_LIMIT = {torch.float16: 4e-3, torch.bfloat16: 2e-2}
NONE_AHEAD = {"decoders": 8, "ahead": 0, "tiles": 2}
AHEAD = {"decoders": 4, "ahead": 1, "tiles": 3}
CASES = {
    "one_block": ("mse4-none-signed-matched", 20, 64, "bfloat16", "bshd", NONE_AHEAD),
    "one_block_ahead": ("mse4-none-plain-matched", 16, 16, "bfloat16", "bhsd", AHEAD),
    "two_blocks": ("mse4-none-signed-matched", 128, 64, "bfloat16", "bshd", AHEAD),
    "two_blocks_half": ("mse3-none-plain-unbiased", 70, 16, "float16", "bhsd", NONE_AHEAD),
    "three_blocks": ("mse2-none-signed-norm", 130, 8, "float16", "bshd", AHEAD),
    "int8": ("int8-none", 4, 32, "bfloat16", "bshd", NONE_AHEAD),
    "int4": ("int4-none", 2, 128, "float16", "bshd", AHEAD),
    "fp8": ("fp8-none-signed", 4, 8, "bfloat16", "bhsd", NONE_AHEAD | {"overlap": 0}),
    "none": ("none-none", 66, 256, "bfloat16", "bshd", NONE_AHEAD),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels of a case, compiled once."""
    directory = tmp_path_factory.mktemp("mla")

    @functools.cache
    def module(case):
        spec, config = spec_of(case), config_of(case)
        assert schedule.rejected(spec, "cuda", config) is None
        return compile_functions({"mla": mla(spec, "cuda", config)}, directory)

    return module


def spec_of(case):
    fmt, heads, page_size, dtype, layout, _ = CASES[case]
    return CacheSpec(512, heads, 1, page_size, dtype, layout, fmt, 64)


def config_of(case):
    return schedule.DEFAULTS["cuda"] | CASES[case][-1]


class Problem:
    """Inputs of a ragged batch, what attention gives, and outputs that show writes around them."""

    def __init__(self, case, parts, *, lengths=LENGTHS, scale=2.0, want_lse=True):
        spec = self.spec = spec_of(case)
        batch = make_batch(spec, "cpu", lengths)
        dtype = getattr(torch, spec.dtype)
        latent, rope = (
            rows("gaussian", batch.tokens, 1, dim, seed=s).to(dtype)
            for dim, s in ((512, 1), (64, 2))
        )
        scales = scales_of(spec)
        reference.fill_kv_cache(
            spec, latent, rope, *batch.caches, slot_mapping=batch.slots, **scales
        )
        queries = [
            (scale * rows("gaussian", len(lengths), spec.num_q_heads, dim, seed=s)).to(dtype)
            for dim, s in ((512, 3), (64, 4))
        ]
        of_keys = {name: value for name, value in scales.items() if name == "k_scale"}
        self.want, self.want_lse = reference.paged_mla(
            spec, *queries, *batch.caches, batch.block_table, batch.seq_lens, sm_scale=SCALE,
            **of_keys,
        )  # fmt: skip
        self.lengths = batch.seq_lens
        self.out = Guarded((len(lengths), spec.num_q_heads, 512), dtype)
        self.lse = Guarded((len(lengths), spec.num_q_heads if want_lse else 0), torch.float32)
        floats = mla_floats(
            spec, len(lengths), parts, schedule.launch(spec, "cuda", config_of(case))
        )
        self.workspace = Guarded((floats,), torch.float32)
        self.arguments = (
            *queries, *kernel_caches(spec, batch.caches), batch.block_table, batch.seq_lens,
            self.workspace.tensor, self.out.tensor, self.lse.tensor, parts, SCALE,
        )  # fmt: skip

    def check(self, limit=1.0):
        """``limit`` is a factor of what is allowed."""
        dtype, want = self.out.tensor.dtype, self.want
        out = self.out.tensor.float()
        assert ((out - want).norm() / want.norm()).item() <= limit * LIMIT[dtype]
        assert torch.all(out[self.lengths == 0] == 0)
        if self.lse.tensor.numel():
            full = self.lengths > 0
            error = (self.lse.tensor[full] - self.want_lse[full]).abs().max().item()
            assert error <= limit * LSE_LIMIT[dtype]
            assert torch.all(self.lse.tensor[~full] == -torch.inf)
        for guarded in (self.out, self.lse, self.workspace):
            guarded.check()


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(compiled, case):
    problem = Problem(case, 2)
    compiled(case)["mla"](*problem.arguments)
    problem.check()


@pytest.mark.parametrize(("case", "parts"), [("one_block_ahead", 1), ("two_blocks", 5)])
def test_parts_and_the_other_order(compiled, case, parts):
    problem = Problem(case, parts, want_lse=False)
    compiled(case)["mla"](*problem.arguments, descending=True)
    problem.check()


@pytest.mark.parametrize("case", ["one_block", "two_blocks"])
def test_bounds_are_raised(compiled, case):
    # Logits of a standard deviation of 10: their bounds are left behind again and again.
    problem = Problem(case, 1, lengths=[0, 400], scale=6.0)
    compiled(case)["mla"](*problem.arguments)
    problem.check(limit=2)
