"""``rotate`` by tensor cores, run by the emulator, and its ways through shared memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from rows import rows

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules import factories

from emulator import compile_functions
from emulator.guarded import Guarded
from emulator.row_checks import TOLERANCE
from tq_tvm import reference
from tq_tvm.kernels.rotate_cuda import RotateConfig, Tile, rotate_cuda
from tq_tvm.spec import ROTATE_DIMS, RotateSpec

# values, warps, tiles, contracted, registers. Without an exchange, with one inside of a warp, and
# with one across warps; one tile and several.
CASES = {
    "64": (RotateSpec(64, "float16"), RotateConfig(64, 2, 2, 1, 96)),
    "128": (RotateSpec(128, "bfloat16"), RotateConfig(32, 1, 1, 2, 64)),
    "256": (RotateSpec(256, "bfloat16"), RotateConfig(16, 4, 1, 0, 64)),
    "512": (RotateSpec(512, "float16"), RotateConfig(32, 2, 2, 1, 64)),
    "512_wide": (RotateSpec(512, "bfloat16"), RotateConfig(64, 1, 1, 2, 128)),
    "1024": (RotateSpec(1024, "bfloat16"), RotateConfig(32, 4, 2, 0, 64)),
    "1024_wide": (RotateSpec(1024, "float16"), RotateConfig(64, 2, 1, 2, 128)),
    "2048": (RotateSpec(2048, "bfloat16"), RotateConfig(32, 4, 2, 2, 64)),
    "4096": (RotateSpec(4096, "bfloat16"), RotateConfig(64, 4, 1, 2, 128)),
    "80": (RotateSpec(80, "bfloat16"), RotateConfig(64, 2, 2, 0, 168)),
    "112": (RotateSpec(112, "float16"), RotateConfig(64, 1, 1, 0, 168)),
    "192": (RotateSpec(192, "float16"), RotateConfig(64, 2, 1, 0, 168)),
    "576": (RotateSpec(576, "bfloat16"), RotateConfig(64, 1, 1, 0, 255)),
    "4096_half": (RotateSpec(4096, "float16"), RotateConfig(64, 2, 4, 1, 128)),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    functions = {f"rotate_{name}": rotate_cuda(*case) for name, case in CASES.items()}
    return compile_functions(functions, tmp_path_factory.mktemp("rotate"))


@pytest.mark.parametrize("descending", [False, True], ids=["", "descending"])
@pytest.mark.parametrize("case", CASES)
def test_rotate(compiled, case, descending):
    """Row counts around those of a CTA, also in place."""
    spec, config = CASES[case]
    by_bits = spec.dim & (spec.dim - 1) == 0
    share = 32 * config.values * config.warps // spec.dim if by_bits else 32 * config.warps
    share *= config.tiles
    for count in sorted({1, share, 2 * share + 1}):
        x = rows("heavy_tailed", count, spec.dim, seed=count).to(getattr(torch, spec.dtype))
        out = Guarded(tuple(x.shape), x.dtype)
        compiled[f"rotate_{case}"](x, out.tensor, descending=descending)
        want = reference.hadamard_rotate(x)
        assert (out.tensor.float() - want).norm() <= TOLERANCE[x.dtype] * want.norm()
        out.check()
        compiled[f"rotate_{case}"](x, x, descending=descending)
        assert torch.equal(x, out.tensor)


@pytest.mark.parametrize("case", ["64", "512", "4096"])
def test_what_is_no_number_stays_in_its_row(compiled, case):
    spec, _ = CASES[case]
    x = rows("gaussian", 9, spec.dim).to(getattr(torch, spec.dtype))
    x[2, 17], x[5, 1] = float("nan"), float("inf")
    out = torch.empty_like(x)
    compiled[f"rotate_{case}"](x, out)
    finite = out.isfinite().all(1)
    assert finite.tolist() == [row not in (2, 5) for row in range(9)]


def places(which, lane, warp, count):
    """Of ``count`` neighbouring registers of a lane, from each multiple of it on."""
    start = which.of_thread(lane, warp)
    registers = range(0, 1 << len(which.registers), count)
    return [start + which.of_register(index) for index in registers]


@pytest.mark.parametrize("dim", [dim for dim in ROTATE_DIMS if dim & (dim - 1) == 0])
def test_every_place_is_written_once_and_no_banks_conflict(dim):
    """Lanes that go to shared memory at once, eight with 16 bytes, meet in no bank."""
    spec = RotateSpec(dim)
    offered = factories.options("rotate", spec)
    for values, warps in itertools.product(offered["values"], offered["warps"]):
        tile = Tile(spec, RotateConfig(values, warps, 1, 0, 64))
        widths = {id(tile.read): 4, id(tile.written): 1 << min(2, tile.vector)}
        for which in (tile.read, tile.written):
            every = [
                place
                for warp, lane in itertools.product(range(warps), range(32))
                for place in places(which, lane, warp, 1)
            ]
            assert sorted(every) == list(range(tile.elements))
            if not tile.exchanged:
                continue
            addresses = [tile.address(place) for place in range(tile.elements)]
            assert sorted(addresses) == list(range(tile.elements))
            width = widths[id(which)]
            for warp in range(warps):
                for start in range(0, 32, 32 // width):
                    lanes = [places(which, start + i, warp, width) for i in range(32 // width)]
                    for at in zip(*lanes, strict=True):
                        banks = {addresses[place + i] % 32 for place in at for i in range(width)}
                        assert len(banks) == 32
