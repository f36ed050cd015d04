"""Loads, stores, atomics, asynchronous copies, and addresses that are wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulator import compile_source
from emulator.kernels import kernel, source

LOADS = {
    "u32": ("ld.global.nc.L1::no_allocate.L2::128B.u32 {0}, [{1}];", 1),
    "v2": ("ld.global.nc.v2.b32 {{{0}, {1}}}, [{2}];", 2),
    "v4": ("ld.global.nc.L1::no_allocate.v4.f32 {{{0}, {1}, {2}, {3}}}, [{4}];", 4),
    "u16": ("ld.global.nc.u16 {0}, [{1}];", 1),
    "s8": ("ld.global.s8 {0}, [{1}];", 1),
    "offset": ("ld.weak.global.u32 {0}, [{1}+8];", 1),
}


def _load(name, instruction, count):
    operands = ", ".join(f'"=r"(d{i})' for i in range(count))
    text = instruction.format(*(f"%{i}" for i in range(count + 1)))
    body = f"  uint32_t {', '.join(f'd{i}' for i in range(count))};\n"
    body += (
        f'  asm volatile("{text}" : {operands} : "l"((const void*)(in + row * 4)) : "memory");\n'
    )
    return kernel(
        f"load_{name}",
        body + "".join(f"  out[row * outputs + {i}] = d{i};\n" for i in range(count)),
    )


SHARED = """
  __shared__ alignas(64) uint32_t buffer_ptr[256];
  uint32_t address = uint32_t(__cvta_generic_to_shared(&buffer_ptr[0])) + lane * 16;
"""
KERNELS = {
    "store": """
  asm volatile("st.global.v2.u32 [%0], {%1, %2};"
               :: "l"(out + row * outputs), "r"(in[row * inputs]), "r"(in[row * inputs + 1])
               : "memory");
  asm volatile("st.global.b16 [%0+8], %1;"
               :: "l"(out + row * outputs), "h"((uint16_t)in[row * inputs]) : "memory");
""",
    "through_shared": SHARED
    + """
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "r"(in[row * 4]),
                  "r"(in[row * 4 + 1]), "r"(in[row * 4 + 2]), "r"(in[row * 4 + 3])
               : "memory");
  __syncthreads();
  uint32_t other = uint32_t(__cvta_generic_to_shared(&buffer_ptr[(31 - lane) * 4]));
  uint32_t d0, d1;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2+8];" : "=r"(d0), "=r"(d1) : "r"(other) : "memory");
  out[row * 2] = d0;
  out[row * 2 + 1] = d1;
""",
    "atomics": """
  float value = float(in[row]);
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;"
               :: "l"((float*)out), "f"(value) : "memory");
  uint32_t before;
  asm volatile("atom.global.add.u32 %0, [%1], %2;"
               : "=r"(before) : "l"(out + 1), "r"(in[row]) : "memory");
  out[2 + lane] = before;
""",
    # Two groups; the older one has arrived, the other has not; then a copy that is partly zeros.
    "copies": SHARED
    + """
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
               :: "r"(address), "l"(in + row * 4) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
               :: "r"(address + 512), "l"(in + row * 4), "r"(4) : "memory");
  asm volatile("cp.async.commit_group;" :);
  asm volatile("cp.async.wait_group 1;" :::"memory");
  for (int i = 0; i < 4; ++i) out[row * 12 + i] = buffer_ptr[lane * 4 + i];
  for (int i = 0; i < 4; ++i) out[row * 12 + 4 + i] = buffer_ptr[128 + lane * 4 + i];
  asm volatile("cp.async.wait_all;" ::: "memory");
  for (int i = 0; i < 4; ++i) out[row * 12 + 8 + i] = buffer_ptr[128 + lane * 4 + i];
""",
    "poisoned": SHARED
    + """
  out[row] = buffer_ptr[lane];
  __syncthreads();
  buffer_ptr[lane] = 1;
""",
    "outside": SHARED
    + """
  asm volatile("st.shared.u32 [%0], %1;" :: "r"(address + 1024 - 16), "r"(lane) : "memory");
""",
    "misaligned": """
  uint32_t d0, d1;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(d0), "=r"(d1) : "l"(in + 1) : "memory");
""",
}  # fmt: skip


DYNAMIC = """
  extern __shared__ __align__({align}) unsigned char memory[];
  __shared__ alignas(64) float statics[20];
  __shared__ alignas(16) unsigned char more[3];
  statics[row % 20] = more[row % 3] = memory[row] = 1;
  out[row] = uint32_t(__cvta_generic_to_shared(memory));
"""
ALIGNED = {16: 96, 64: 128, 1024: 1024}
"""Where dynamic memory begins behind 83 bytes, by its alignment."""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    kernels = [_load(name, *load) for name, load in LOADS.items()]
    kernels += [kernel(name, body) for name, body in KERNELS.items()]
    kernels += [
        kernel(f"dynamic_{align}", DYNAMIC.format(align=align), shared=32) for align in ALIGNED
    ]
    return compile_source(source(*kernels), tmp_path_factory.mktemp("memory"))


def words(rows, columns):
    return np.random.default_rng(7).integers(0, 2**32, (rows, columns), dtype=np.uint32)


def run(module, name, inputs, shape, fill=-1):
    out = torch.full(shape, fill, dtype=torch.int32)
    module[name](torch.from_numpy(inputs.view(np.int32)), out)
    return out.numpy().view(np.uint32)


@pytest.mark.parametrize("name", LOADS)
def test_loads(module, name):
    inputs = words(64, 4)
    count = LOADS[name][1]
    want = {
        "u16": inputs[:, :1] & 0xFFFF,
        "s8": inputs[:, :1].astype(np.uint8).view(np.int8).astype(np.int32).view(np.uint32),
        "offset": inputs[:, 2:3],
    }.get(name, inputs[:, :count])
    np.testing.assert_array_equal(run(module, f"load_{name}", inputs, (64, count)), want)


def test_stores(module):
    inputs = words(32, 2)
    got = run(module, "store", inputs, (32, 4))
    np.testing.assert_array_equal(got[:, :2], inputs)
    np.testing.assert_array_equal(got[:, 2], inputs[:, 0] & 0xFFFF | 0xFFFF0000)
    assert bool((got[:, 3] == 0xFFFFFFFF).all())


def test_shared_memory_by_address(module):
    inputs = words(32, 4)
    got = run(module, "through_shared", inputs, (32, 2))
    np.testing.assert_array_equal(got, inputs[::-1, 2:])


def test_atomics(module):
    inputs = np.arange(1, 33, dtype=np.uint32)[:, None]
    got = run(module, "atomics", inputs, (34, 1), fill=0)[:, 0]
    assert got[:1].view(np.float32)[0] == got[1] == 528
    np.testing.assert_array_equal(got[2:], np.cumsum(inputs) - inputs[:, 0])


def test_asynchronous_copies(module):
    inputs = words(32, 4)
    got = run(module, "copies", inputs, (32, 12))
    np.testing.assert_array_equal(got[:, :4], inputs)
    assert bool((got[:, 4:8] == 0xFFFFFFFF).all()), "a copy that nobody waited for has arrived"
    np.testing.assert_array_equal(got[:, 8], inputs[:, 0])
    assert not got[:, 9:].any()


def test_shared_memory_starts_as_garbage_in_every_cta(module):
    assert bool((run(module, "poisoned", words(96, 1), (96, 1), fill=0) == 0xFFFFFFFF).all())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outside", "st.shared.u32: address must lie inside of a shared array"),
        ("misaligned", "ld.global.v2.u32: address must be a multiple of 8 bytes"),
    ],
)
def test_wrong_addresses(module, name, message):
    with pytest.raises(RuntimeError, match=message):
        run(module, name, words(32, 4), (32, 4))


@pytest.mark.parametrize("align", ALIGNED)
def test_dynamic_shared_memory_is_behind_static_arrays(module, align):
    """As aligned as it says, and by chance no more: what needs more, has to say so."""
    got = run(module, f"dynamic_{align}", words(32, 1), (32, 1))
    assert (got == ALIGNED[align]).all()


def test_too_much_shared_memory(tmp_path):
    text = source(kernel("large", "  __shared__ alignas(64) uint32_t large_ptr[12289];\n"))
    module = compile_source(text, tmp_path)
    with pytest.raises(RuntimeError, match=r"shared memory must be at most 49152 .* got 49156"):
        run(module, "large", words(32, 1), (32, 1))
