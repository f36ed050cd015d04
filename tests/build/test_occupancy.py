"""Occupancy from the compiler's report, against cases that the occupancy calculator gives."""

from __future__ import annotations

import pytest

from tq_tvm.build.occupancy import KernelResources, parse_resources, with_occupancy
from tq_tvm.errors import BuildError

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_kernel_1' for 'sm_90a'
ptxas info    : Function properties for a_kernel_1
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 0 barriers
ptxas info    : Compile time = 11.2 ms
ptxas info    : Compiling entry function 'a_kernel' for 'sm_90a'
ptxas info    : Function properties for a_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 11392 bytes smem
"""


def test_reads_registers_and_shared_memory():
    assert parse_resources(REPORT) == {
        "a_kernel_1": KernelResources(31, 0),
        "a_kernel": KernelResources(255, 11392),
    }


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "resident"),
    [
        (64, 255, 11392, 4),  # registers
        (256, 200, 36160, 1),
        (128, 128, 0, 4),
        (64, 32, 50 * 1024, 4),  # shared memory
        (1024, 32, 0, 2),  # threads
    ],
)
def test_ctas_of_an_h200(threads, registers, shared, resident):
    used = {"a_kernel": KernelResources(registers, shared)}
    launch = with_occupancy({"threads": threads, "split_tokens": 16}, "a", "sm_90a", used)
    assert launch == {"ctas_per_sm": resident, "split_tokens": 16}


def test_dynamic_shared_memory_counts_beside_the_static():
    used = {"a_kernel": KernelResources(32, 10 * 1024)}
    launch = {"threads": 64, "shared_bytes": 40 * 1024, "units": 2}
    assert with_occupancy(launch, "a", "sm_90a", used) == {"ctas_per_sm": 4, "units": 2}


def test_numbers_of_a_cpu_kernel_stay():
    assert with_occupancy({"ctas_per_sm": 1}, "a", "x86-64", {}) == {"ctas_per_sm": 1}


def test_an_unknown_report_is_refused():
    with pytest.raises(BuildError, match="ptxas must say"):
        parse_resources("Compiling entry function 'f' for 'sm_90a'\nnothing")
