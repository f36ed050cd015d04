"""Shuffles, votes and barriers; and the errors of kernels whose threads go separate ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulator import compile_source
from emulator.kernels import kernel, source

WIDTHS = (32, 8)
SHUFFLES = {
    "__shfl_sync": "(lane * 7 + 3)",
    "__shfl_up_sync": "3",
    "__shfl_down_sync": "5",
    "__shfl_xor_sync": "6",
}
KERNELS = {
    "votes": """
  out[row * 4] = __ballot_sync(0xFFFFFFFFu, in[row] & 1);
  out[row * 4 + 1] = __any_sync(0xFFFFFFFFu, in[row] == 5);
  out[row * 4 + 2] = __all_sync(0xFFFFFFFFu, in[row] > 4);
  __syncwarp();
  if (lane < 16) out[row * 4 + 3] = __activemask();
  else out[row * 4 + 3] = __activemask();
""",
    "halves": """
  unsigned mask = lane < 8 ? 0xFFu : 0xFFFFFF00u;
  if (lane < 8) out[row] = __shfl_xor_sync(mask, in[row], 1);
  else out[row] = __shfl_xor_sync(mask, in[row], 2);
""",
    "separate_shuffles": """
  if (lane < 16) out[row] = __shfl_xor_sync(0xFFFFFFFFu, in[row], 1);
  else out[row] = __shfl_xor_sync(0xFFFFFFFFu, in[row], 1);
""",
    "early_exit": """
  if (lane == 3) return;
  out[row] = __any_sync(0xFFFFFFFFu, 1);
""",
    "not_in_mask": "  out[row] = __shfl_xor_sync(0xFFu, in[row], 1);",
    "shuffle_past_a_barrier": """
  if (lane < 16) __syncthreads();
  out[row] = __shfl_xor_sync(0xFFFFFFFFu, in[row], 1);
""",
}
WARPS = {
    "missing_barrier": """
  __shared__ alignas(64) uint32_t shared_ptr[64];
  shared_ptr[threadIdx.x] = in[row];
  out[row] = shared_ptr[threadIdx.x ^ 32];
""",
    "exchange": """
  __shared__ alignas(64) uint32_t shared_ptr[64];
  shared_ptr[threadIdx.x] = in[row];
  __syncthreads();
  out[row] = shared_ptr[threadIdx.x ^ 32];
""",
    "separate_barriers": """
  if (threadIdx.x < 32) __syncthreads();
  else {
    out[row] = 0;
    __syncthreads();
  }
""",
    "barrier_and_exit": """
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[row] = 4;
""",
    "named": """
  __shared__ alignas(64) uint32_t shared_ptr[32];
  if (threadIdx.x < 32) shared_ptr[threadIdx.x] = in[row];
  asm volatile("bar.sync 3, 64;" :::"memory");
  if (threadIdx.x >= 32) out[row] = shared_ptr[lane];
""",
    "deadlock": """
  if (threadIdx.x < 32) asm volatile("bar.sync 3, 64;" :::"memory");
""",
}


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    kernels = [
        kernel(f"{name}_{width}", f"  out[row] = {name}(0xFFFFFFFFu, in[row], {by}, {width});")
        for name, by in SHUFFLES.items()
        for width in WIDTHS
    ]
    kernels += [kernel(name, body) for name, body in KERNELS.items()]
    kernels += [kernel(name, body, threads=64) for name, body in WARPS.items()]
    return compile_source(source(*kernels), tmp_path_factory.mktemp("warps"))


def run(module, name, inputs, columns=1, **options):
    out = torch.full((len(inputs), columns), -1, dtype=torch.int32)
    module[name](torch.from_numpy(np.asarray(inputs, np.int32)[:, None]), out, **options)
    return out.numpy().view(np.uint32)


def shuffled(name, lane, width):
    """Source lane, as the CUDA programming guide tells it."""
    first = lane // width * width
    if name == "__shfl_sync":
        return first + (lane * 7 + 3) % width
    if name == "__shfl_up_sync":
        return lane - 3 if lane - 3 >= first else lane
    if name == "__shfl_down_sync":
        return lane + 5 if lane + 5 < first + width else lane
    return lane ^ 6


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffles(module, name, width, descending):
    inputs = np.arange(64) * 3 + 1
    got = run(module, f"{name}_{width}", inputs, descending=descending)[:, 0]
    want = [inputs[i // 32 * 32 + shuffled(name, i % 32, width)] for i in range(64)]
    assert got.tolist() == want


def test_votes(module):
    inputs = np.arange(64)
    got = run(module, "votes", inputs, 4)
    assert got[:, 0].tolist() == [0xAAAAAAAA] * 64
    assert got[:, 1].tolist() == [1] * 32 + [0] * 32
    assert got[:, 2].tolist() == [0] * 32 + [1] * 32
    assert got[:, 3].tolist() == ([0xFFFF] * 16 + [0xFFFF0000] * 16) * 2


def test_parts_of_a_warp_go_their_own_ways(module):
    got = run(module, "halves", np.arange(32))[:, 0]
    assert got.tolist() == [i ^ 1 for i in range(8)] + [i ^ 2 for i in range(8, 32)]


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("separate_shuffles", ["warp 0", "lane 0 waits at __shfl_xor_sync", "lane 16 waits at"]),
        ("early_exit", ["__any_sync", "lane 3 has exited"]),
        ("not_in_mask", ["__shfl_xor_sync: mask must name the lane itself, got 0xff in lane 8"]),
        ("shuffle_past_a_barrier", ["lane 0 waits at __syncthreads", "lane 16 waits at __shfl"]),
        ("separate_barriers", ["warp 0 lane 0 waits at __syncthreads", "warp 1 lane 0 waits"]),
        ("deadlock", ["lane 0 waits at bar.sync", "warp 1 lane 0 has exited"]),
    ],
)
def test_divergence_is_an_error(module, name, messages):
    for message in messages:
        with pytest.raises(RuntimeError, match=message):
            run(module, name, np.arange(64))
    assert run(module, "exchange", np.arange(64))[0, 0] == 32, "the next launch is unharmed"


def test_exited_threads_do_not_hold_up_a_barrier(module):
    assert run(module, "barrier_and_exit", np.arange(64))[:32, 0].tolist() == [4] * 32


def test_named_barrier(module):
    for descending in (False, True):
        got = run(module, "named", np.arange(64), descending=descending)[32:, 0]
        assert got.tolist() == list(range(32))


def test_the_other_order_shows_a_missing_barrier(module):
    inputs = np.arange(64)
    orders = [run(module, "missing_barrier", inputs, descending=d) for d in (False, True)]
    assert not np.array_equal(*orders)
    orders = [run(module, "exchange", inputs, descending=d) for d in (False, True)]
    np.testing.assert_array_equal(*orders)
    assert orders[0][:, 0].tolist() == (inputs ^ 32).tolist()
