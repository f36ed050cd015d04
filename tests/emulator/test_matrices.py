"""Matrix instructions against products of matrices that numpy assembles from the PTX ISA."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from emulator import compile_source
from emulator.fragments import a_matrix, b_matrix, c_matrix, square
from emulator.kernels import kernel, register_kernel, source

FLOATS = ("f16", "bf16")
INTEGERS = list(itertools.product(("s8", "u8"), repeat=2))
_FRAGMENTS = "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
_SHORT_FRAGMENTS = "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
_ROWS = """
  __shared__ alignas(64) uint32_t rows_ptr[128];
  for (int i = 0; i < 4; ++i) rows_ptr[lane * 4 + i] = in[row * inputs + i];
  __syncthreads();
  uint32_t address = uint32_t(__cvta_generic_to_shared(&rows_ptr[lane * 5 % 32 * 4]));
"""


def _ldmatrix(count, trans):
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"=r"(d{i})' for i in range(count))
    body = _ROWS + f"  uint32_t {', '.join(f'd{i}' for i in range(count))};\n"
    name = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16"
    body += f'  asm volatile("{name} {{{registers}}}, [%{count}];" : {outputs} : "r"(address));\n'
    body += "".join(f"  out[row * outputs + {i}] = d{i};\n" for i in range(count))
    return kernel(f"ldmatrix_{count}{'_trans' if trans else ''}", body)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    kernels = [
        register_kernel(
            f"mma_{t}", f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 {_FRAGMENTS}",
            "ffff", "rrrrrrffff",
        )
        for t in FLOATS
    ]  # fmt: skip
    kernels += [
        register_kernel(
            f"mma_short_{t}",
            f"mma.sync.aligned.m16n8k8.row.col.f32.{t}.{t}.f32 {_SHORT_FRAGMENTS}",
            "ffff", "rrrffff",
        )
        for t in FLOATS
    ]  # fmt: skip
    kernels += [
        register_kernel(
            f"mma_{a}_{b}", f"mma.sync.aligned.m16n8k32.row.col.s32.{a}.{b}.s32 {_FRAGMENTS}",
            "rrrr", "rrrrrrrrrr",
        )
        for a, b in INTEGERS
    ]  # fmt: skip
    move = "movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
    kernels.append(register_kernel("movmatrix", move, "r", "r"))
    kernels += [_ldmatrix(count, trans) for count in (1, 2, 4) for trans in (False, True)]
    return compile_source(source(*kernels), tmp_path_factory.mktemp("matrices"))


def words(*shape, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2**32, shape, dtype=np.uint32)


def run(module, name, inputs, outputs):
    out = torch.full((len(inputs), outputs), -1, dtype=torch.int32)
    module[name](torch.from_numpy(inputs.view(np.int32)), out)
    return out.numpy().view(np.uint32)


@pytest.mark.parametrize(("a", "b"), INTEGERS)
def test_integer_products(module, a, b):
    """Over the whole range of the types; sums wrap."""
    inputs = words(32, 10)
    inputs[:, 6:] = [[2**31 - 1, 0, 5, 2**31 + 7]]
    got = c_matrix(run(module, f"mma_{a}_{b}", inputs, 4))
    kinds = {"s8": np.int8, "u8": np.uint8}
    left = a_matrix(np.ascontiguousarray(inputs[:, :4]).view(kinds[a])).astype(np.int64)
    right = b_matrix(np.ascontiguousarray(inputs[:, 4:6]).view(kinds[b])).astype(np.int64)
    want = left @ right + c_matrix(inputs[:, 6:]).astype(np.int64)
    np.testing.assert_array_equal(got, want.astype(np.uint32))


@pytest.mark.parametrize(("name", "words_of_a"), [("mma", 4), ("mma_short", 2)])
@pytest.mark.parametrize("kind", FLOATS)
def test_float_products(module, kind, name, words_of_a):
    """Integers up to 8, whose products and sums are exact, and values of many magnitudes."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    generator = torch.Generator().manual_seed(1)
    for exact in (True, False):
        values = torch.randn(32, 3 * words_of_a, generator=generator) * 4
        sums = torch.randn(32, 4, generator=generator)
        values, sums = (values.round(), sums.round()) if exact else (values.exp(), sums)
        halves = values.to(dtype)
        inputs = np.concatenate(
            [halves.view(torch.int16).numpy().view(np.uint32), sums.numpy().view(np.uint32)], 1
        )
        got = c_matrix(run(module, f"{name}_{kind}", inputs, 4).view(np.float32))
        exactly = halves.double().numpy()
        left, right = np.split(exactly, [2 * words_of_a], axis=1)
        want = a_matrix(left) @ b_matrix(right) + c_matrix(sums.numpy())
        np.testing.assert_allclose(got, want, rtol=0 if exact else 2e-7)


def test_movmatrix(module):
    inputs = words(32, 1)
    got = run(module, "movmatrix", inputs, 1)
    np.testing.assert_array_equal(square(got[:, 0]), square(inputs[:, 0]).T)


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(module, count, trans):
    """Rows lie in an order of their own: lane l gives the address of row 5 l mod 32."""
    inputs = words(32, 4)
    name = f"ldmatrix_{count}{'_trans' if trans else ''}"
    got = run(module, name, inputs, count)
    rows = inputs[[5 * lane % 32 for lane in range(32)]].view(np.uint16)
    for m in range(count):
        want = rows[8 * m : 8 * m + 8]
        np.testing.assert_array_equal(square(got[:, m]), want.T if trans else want)
