"""`decode_work` for GPUs, run by the emulator: every group finds where its share begins."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tvm.script import tirx as T

from emulator import compile_functions
from tq_tvm.kernels.decode_work import find_share, share_out
from tq_tvm.kernels.device import let, store, when

FIELDS = 7
SHAPE = types.SimpleNamespace(least_tiles=3, lengths_at_once=4)


def _write_share(tiles, out, batch, groups, group, lane) -> None:
    def of(sequence):
        return tiles[sequence]

    shares, place = find_share(SHAPE, of, batch, lane, groups, group)
    # What the second launch works out of one sequence, here of as many as there are groups.
    sequence = let(T.min(group, T.cast(batch, "int32") - 1))
    again = share_out(SHAPE, of, batch, lane, groups, sequence)
    found = [place.tile, place.end, place.sequence, place.offset]
    with when(lane == 0):
        for i, register in enumerate([*found, shares.size, again.size, again.before]):
            store(out, register[0], group, i)


@T.prim_func(s_tir=True)
def _shares(tiles: T.handle, out: T.handle, num_groups: T.int32):
    T.func_attr({"global_symbol": "shares", "tirx.noalias": True})
    b = T.int64()
    g = T.int64()
    TILES = T.match_buffer(tiles, (b,), "int32", align=4)
    OUT = T.match_buffer(out, (g, FIELDS), "int32", align=4)
    for bx in T.thread_binding(num_groups, thread="blockIdx.x"):
        for tx in T.thread_binding(32, thread="threadIdx.x"):
            _write_share(TILES, OUT, b, num_groups, bx, tx)


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    return compile_functions({"shares": _shares}, tmp_path_factory.mktemp("shares"))["shares"]


@pytest.mark.parametrize("batch", [1, 2, 31, 32, 33, 64, 100, 1024, 2500])
@pytest.mark.parametrize("empty", [0.0, 0.6, 1.0])
def test_shares_follow_one_another(shares, batch, empty):
    """Whatever the batch, and wherever sequences have no tiles: blocks of a lane, and beyond."""
    generator = torch.Generator().manual_seed(batch)
    tiles = torch.randint(1, 30, (batch,), generator=generator, dtype=torch.int32)
    tiles[torch.rand(batch, generator=generator) < empty] = 0
    total, begins = int(tiles.sum()), tiles.cumsum(0) - tiles
    for groups in (1, 7, 66):
        out = torch.full((groups, FIELDS), -7, dtype=torch.int32)
        shares(tiles, out, groups)
        size = max(-(-total // groups), SHAPE.least_tiles)
        for group, row in enumerate(out.tolist()):
            tile, end, sequence, offset, *sizes, before = row
            assert sizes == [size, size]
            assert before == begins[min(group, batch - 1)]
            assert (tile, end) == (group * size, min(total, (group + 1) * size))
            if tile < end:
                assert 0 <= offset < tiles[sequence]
                assert begins[sequence] + offset == tile
