"""Instructions as TVM writes them: asynchronous copies, ldmatrix, mbarriers and wgmma."""

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


_MULTIPLY = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"


def multiply():
    """``D = A B^T`` of 64 by 8 rows of 16 values; shared memory has matrices of 8 by 8."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle, d: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        A = T.match_buffer(a, (n, 64, 2, 4), "uint32", align=16)
        B = T.match_buffer(b, (n, 8, 2, 4), "uint32", align=16)
        D = T.match_buffer(d, (n, 128, 4), "float32", align=16)
        for bx in T.thread_binding(n, thread="blockIdx.x"):
            for tx in T.thread_binding(160, thread="threadIdx.x"):
                tile = T.alloc_buffer((576,), "uint32", scope="shared.dyn")
                barrier = T.alloc_buffer((1,), "uint64", scope="shared")
                sums = T.alloc_buffer((4,), "float32", scope="local")
                state = T.alloc_buffer((1,), "uint64", scope="local")
                for i in T.unroll(4):
                    tile[tx + i * 144] = T.uint32(0)
                if tx == 0:
                    T.ptx["mbarrier.init.shared::cta.b64"](T.address_of(barrier[0]), T.uint32(32))
                    T.ptx["fence.mbarrier_init.release.cluster"]()
                T.tvm_storage_sync("shared")
                if tx >= 128:
                    T.ptx["setmaxnreg.dec.sync.aligned.u32"](24)
                    for i, c, e in T.grid(2, 2, 4):
                        T.ptx["st.shared.u32"](
                            T.address_of(tile[c * 256 + (i * 32 + tx - 128) * 4 + e]),
                            A[bx, i * 32 + tx - 128, c, e],
                        )
                    if tx < 136:
                        for c, e in T.grid(2, 4):
                            T.ptx["st.shared.u32"](
                                T.address_of(tile[512 + c * 32 + (tx - 128) * 4 + e]),
                                B[bx, tx - 128, c, e],
                            )
                    T.ptx["fence.proxy.async.shared::cta"]()
                    T.ptx["mbarrier.arrive.release.cta.shared::cta.b64"](
                        state[0], T.address_of(barrier[0])
                    )
                else:
                    T.ptx["setmaxnreg.inc.sync.aligned.u32"](240)
                    T.cuda.mbarrier_wait(T.address_of(barrier[0]), 0)
                    T.ptx["wgmma.fence.sync.aligned"]()
                    T.ptx[_MULTIPLY](
                        sums[0],
                        sums[1],
                        sums[2],
                        sums[3],
                        T.cast(
                            T.shift_right(
                                T.cuda.cvta_generic_to_shared(T.address_of(tile[0])), T.uint32(4)
                            ),
                            "uint64",
                        )
                        + T.uint64(8 << 32 | 64 << 16),
                        T.cast(
                            T.shift_right(
                                T.cuda.cvta_generic_to_shared(T.address_of(tile[512])), T.uint32(4)
                            ),
                            "uint64",
                        )
                        + T.uint64(8 << 32 | 8 << 16),
                        T.ptx.pred(0),
                        1,
                        1,
                        0,
                        0,
                    )
                    T.ptx["wgmma.commit_group.sync.aligned"]()
                    T.ptx["wgmma.wait_group.sync.aligned"](0)
                    for i in T.unroll(4):
                        D[bx, tx, i] = sums[i]

    return main


def test_a_warpgroup_multiplies(tmp_path):
    module = compile_functions({"multiply": multiply()}, tmp_path)
    a, b = torch.randn(3, 64, 16).half(), torch.randn(3, 8, 16).half()
    out = torch.full((3, 128, 4), float("nan"))
    words = [x.view(torch.int32).view(3, -1, 2, 4).view(torch.uint32) for x in (a, b)]
    module["multiply"](*words, out)
    # Warp, group of four lanes, lane; then eight rows later, and the neighbour.
    got = out.view(3, 4, 8, 4, 2, 2).permute(0, 1, 4, 2, 3, 5).reshape(3, 64, 8)
    torch.testing.assert_close(got, a.float() @ b.float().transpose(1, 2), rtol=1e-5, atol=1e-5)
