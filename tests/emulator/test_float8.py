"""Conversions of float8_e4m3fn of GPUs with and without instructions for them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from emulator import compile_source
from emulator.kernels import kernel, source
from tq_tvm.kernels.direct_cuda import E4M3_HALVES
from tq_tvm.kernels.fill_direct import TO_E4M3


@pytest.mark.parametrize("arch", [800, 900])
def test_as_before_and_since_there_are_instructions(arch, tmp_path):
    """Every code to float16; floats of both signs, halfway cases and what saturates to codes."""
    bodies = {
        "unpack": "out[row] = tq_e4m3_halves(in[row]);",
        "pack": (
            "float a, b; memcpy(&a, &in[2 * row], 4); memcpy(&b, &in[2 * row + 1], 4);\n"
            "out[row] = tq_to_e4m3(a, b);"
        ),
    }
    text = source(
        f"#define __CUDA_ARCH__ {arch}", E4M3_HALVES, TO_E4M3,
        *(kernel(name, body) for name, body in bodies.items()),
    )  # fmt: skip
    module = compile_source(text, tmp_path)
    codes = torch.arange(256, dtype=torch.uint8)
    pairs = torch.stack([codes, codes.flip(0)], -1)
    out = torch.zeros(256, 1, dtype=torch.int32)
    module["unpack"](pairs.view(torch.int16).int(), out)
    want = pairs.view(torch.float8_e4m3fn).half()
    got = out.view(torch.float16)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0), want.nan_to_num(0))

    exact = want[~want.isnan()].float().sort().values.unique()
    middles = (exact[1:] + exact[:-1]) / 2
    extreme = torch.tensor([1e9, -1e9, float("inf"), -float("inf"), float("nan"), -0.0, 2.0**-10])
    near = torch.cat([middles * (1 + 2**-20), middles * (1 - 2**-20)])
    values = torch.cat([exact, middles, near, extreme])
    values = torch.cat([values, values.new_zeros(-len(values) % 64)])
    out = torch.zeros(len(values) // 2, 1, dtype=torch.int32)
    module["pack"](values.view(-1, 2).view(torch.int32), out)
    want = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    want[values.isnan()] = 0x7F
    assert torch.equal(out.view(torch.uint8)[:, :2].flatten(), want)
