"""Instructions as TVM writes them: asynchronous copies into dynamic shared memory, and ldmatrix."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tvm.script import tirx as T

from emulator import compile_functions


def transpose_tiles():
    """Four 8x8 matrices of 16 bits a CTA, each transposed on its way through shared memory."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        A = T.match_buffer(a, (n, 32, 4), "uint32", align=16)
        B = T.match_buffer(b, (n, 32, 4), "uint32", align=16)
        for bx in T.thread_binding(n, thread="blockIdx.x"):
            for tx in T.thread_binding(32, thread="threadIdx.x"):
                tile = T.alloc_buffer((128,), "uint32", scope="shared.dyn")
                row = T.alloc_buffer((4,), "uint32", scope="local")
                # TVM shrinks a buffer to the elements that it sees, which an address is one of.
                for i in T.unroll(4):
                    tile[tx * 4 + i] = T.uint32(0)
                T.ptx["cp.async.cg.shared.global"](
                    T.address_of(tile[tx * 4]), T.address_of(A[bx, tx, 0]), 16
                )
                T.ptx["cp.async.commit_group"]()
                T.ptx["cp.async.wait_group"](0)
                T.tvm_storage_sync("shared")
                T.ptx["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"](
                    row[0], row[1], row[2], row[3], T.address_of(tile[tx * 4])
                )
                for i in T.unroll(4):
                    B[bx, tx, i] = row[i]

    return main


def test_tiles_are_transposed(tmp_path):
    module = compile_functions({"transpose_tiles": transpose_tiles()}, tmp_path)
    tiles = torch.randint(0, 2**15, (3, 4, 8, 8), dtype=torch.int16)
    words = torch.full((3, 32, 4), -1, dtype=torch.int32)
    module["transpose_tiles"](
        tiles.view(3, 32, 8).view(torch.int32).view(torch.uint32), words.view(torch.uint32)
    )
    # Lane l has two neighbours of row l // 4 of each matrix.
    got = words.transpose(1, 2).contiguous().view(torch.int16).view(3, 4, 8, 8)
    assert torch.equal(got, tiles.transpose(2, 3))
