"""Clusters: CTAs that wait for one another and read one another's shared memory; ``redux.sync``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulator import compile_source
from emulator.kernels import kernel, register_kernel, source

CTAS = 4
HELPERS = """
__forceinline__ __device__ void arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
}
__forceinline__ __device__ void wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
}
__forceinline__ __device__ unsigned int rank_in_cluster() {
  unsigned int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank) :);
  return rank;
}
__forceinline__ __device__ uint32_t mapped(const void* pointer, uint32_t rank) {
  uint32_t address, own = __cvta_generic_to_shared(pointer);
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  return address;
}
__forceinline__ __device__ uint32_t remote(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
"""
SHARED = "  __shared__ alignas(64) uint32_t shared_ptr[32];\n"
NEXT = "mapped(&shared_ptr[lane], (blockIdx.x + 1) % 4)"
KERNELS = {
    "ring": SHARED
    + f"""
  for (int round = 0; round < 3; ++round) {{
    shared_ptr[lane] = in[row] + round * rank_in_cluster();
    arrive();
    wait();
    out[row * 3 + round] = remote({NEXT});
    arrive();
    wait();
  }}
""",
    "ranks": "  out[row] = rank_in_cluster();",
    "no_barrier": SHARED + f"  shared_ptr[lane] = in[row];\n  out[row] = remote({NEXT});",
    "left": SHARED
    + f"""
  shared_ptr[lane] = in[row];
  arrive();
  wait();
  if (rank_in_cluster() % 2) out[row] = remote({NEXT});
""",
    "no_wait": "  arrive();\n  arrive();",
    "no_arrival": "  wait();",
    "some_threads": "  if (lane < 16) { arrive(); wait(); }\n  __syncwarp();",
    "wrong_rank": SHARED + "  out[row] = remote(mapped(&shared_ptr[lane], 4));",
}


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    parts = [kernel(name, body, cluster=CTAS) for name, body in KERNELS.items()]
    instructions = [
        register_kernel(f"redux_{o}_{t}", f"redux.sync.{o}.{t} %0, %1, 0xffffffff;", "r", "r")
        for o in ("add", "min", "max")
        for t in ("u32", "s32")
    ]
    return compile_source(
        source(HELPERS, *parts, *instructions), tmp_path_factory.mktemp("clusters")
    )


def run(module, name, width=1, *, descending=False):
    rows = 2 * CTAS * 32
    given = torch.arange(rows, dtype=torch.int32).view(rows, 1) + 1000
    out = torch.full((rows, width), -1, dtype=torch.int32)
    module[name](given, out, descending=descending)
    return given.view(2, CTAS, 32), out.view(2, CTAS, 32, width)


@pytest.mark.parametrize("descending", [False, True])
def test_ctas_read_one_another(module, descending):
    given, out = run(module, "ring", 3, descending=descending)
    rank = torch.arange(CTAS).view(1, CTAS, 1)
    for round_ in range(3):
        held = given + round_ * rank
        assert torch.equal(out[..., round_], held.roll(-1, 1).int())


def test_a_rank_is_that_of_the_cluster(module):
    _, out = run(module, "ranks")
    assert torch.equal(out[..., 0], torch.arange(CTAS).view(1, CTAS, 1).expand(2, -1, 32).int())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_barrier", "must have begun; put a barrier.cluster before"),
        ("left", "got one that has exited; let it wait"),
        ("no_wait", "a thread must wait before it arrives again"),
        ("no_arrival", "a thread must arrive before it waits"),
        ("some_threads", "its lanes must arrive at the same operation"),
        ("wrong_rank", "a rank below 4, got rank 4"),
    ],
)
def test_wrong_kernels_are_told(module, name, message):
    with pytest.raises(RuntimeError, match=message):
        run(module, name)


@pytest.mark.parametrize("kind", ["u32", "s32"])
@pytest.mark.parametrize("operation", ["add", "min", "max"])
def test_redux(module, operation, kind):
    words = torch.from_numpy(np.random.default_rng(1).integers(-(2**31), 2**31, (64, 1)))
    words = words.to(torch.int32)
    out = torch.zeros(64, 1, dtype=torch.int32)
    module[f"redux_{operation}_{kind}"](words, out)
    values = words.view(2, 32).numpy().astype(np.int64)
    if kind == "u32":
        values %= 2**32
    total = {"add": np.sum, "min": np.min, "max": np.max}[operation](values, axis=1)
    want = torch.from_numpy(total.astype(np.uint64).astype(np.uint32).view(np.int32))
    assert torch.equal(out.view(2, 32), want.view(2, 1).expand(2, 32))
