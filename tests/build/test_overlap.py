"""``build.overlap``: which launches may begin early, and the attribute in the launcher's text."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

import tvm
from tvm.backend.cuda import export_cuda_host

from tq_tvm.build.compile import tvm_target
from tq_tvm.build.overlap import overlap_launches
from tq_tvm.build.pipeline import build_module
from tq_tvm.kernels.decode import decode
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import get_target

SPEC = CacheSpec(64, 4, 1, 64, "bfloat16", "bshd")
CONFIG = {
    "warps": 2, "abreast": 1, "tile": 32, "registers": 256, "query_in_shared": 0,
    "headroom": 1, "reach": 2, "promoted": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def sources():
    """Text of two kernels in one unit, the second of which waits for its own first launch."""
    functions = {
        f"decode_{overlap}": decode(SPEC, "cuda", {**CONFIG, "overlap": overlap}).with_attr(
            "global_symbol", f"decode_{overlap}"
        )
        for overlap in (0, 1)
    }
    return export_cuda_host(
        build_module(tvm.IRModule(functions), tvm_target(get_target("nvidia_h200")))
    )


def launches(source):
    """Whether each launched kernel may begin early, in order of the text."""
    found, early = {}, set()
    for line in source.splitlines():
        if ".numAttrs = 1;" in line:
            early.add(line.strip().split(".")[0])
        if "tvm_cuda_host_launch(::" in line:
            name = line.split("::", 2)[2].split(",")[0]
            config = line.split("&")[1].split(",")[0]
            found[name] = config in early
            early.discard(config)
    return found


def test_only_a_kernel_that_waits_is_launched_early(sources):
    assert launches(overlap_launches(sources, "sm_90a")) == {
        "decode_0_kernel": False,
        "decode_0_kernel_1": False,
        "decode_1_kernel": False,
        "decode_1_kernel_1": True,
    }


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89"])
def test_older_gpus_cannot(sources, arch):
    assert overlap_launches(sources, arch) == sources


@pytest.mark.parametrize("arch", ["sm_100a", "sm_120"])
def test_newer_gpus_can(sources, arch):
    assert any(launches(overlap_launches(sources, arch)).values())
