"""What the space of ``mla`` offers on GPUs, and what it leaves out."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules import mla

from tq_tvm.spec import CacheSpec

FORMATS = ("mse4-none-signed-matched", "mse3-none-plain-norm", "mse2-none-signed-unbiased")
DIRECT = ("int8-none", "int4-none", "fp8-none", "none-none")


def latents(fmt, heads):
    return CacheSpec(512, heads, 1, format=fmt, head_dim_v=64)


@pytest.mark.parametrize("heads", [1, 16, 64, 65, 128, 192])
@pytest.mark.parametrize("fmt", [*FORMATS, *DIRECT])
def test_every_spec_has_a_default(fmt, heads):
    spec = latents(fmt, heads)
    config = mla.defaults(spec, "cuda")
    assert mla.rejected(spec, "cuda", config) is None
    assert set(config) == set(mla.OPTIONS["cuda"])
    launch = mla.launch(spec, "cuda", config)
    assert launch["shared_bytes"] <= 232448
    # Two CTAs for every 128 heads; where both warpgroups have the same, each leaves a piece.
    assert launch["units"] == 2 * -(-heads // 128)
    assert launch["pieces"] == (2 if heads <= 64 else 1)


@pytest.mark.parametrize(
    ("heads", "change", "reason"),
    [
        (128, {"tiles": 4}, "bytes of shared memory exceed 232448"),
        (128, {"decoders": 8, "ahead": 1}, "too few registers"),
        # Each waits for a tile beside the one that it holds.
        (16, {"decoders": 4, "ahead": 1, "tiles": 2}, "hold a tile each"),
    ],
)
def test_points_that_cannot_run_are_left_out(heads, change, reason):
    spec = latents(FORMATS[0], heads)
    config = mla.defaults(spec, "cuda") | change
    assert reason in mla.rejected(spec, "cuda", config)
