"""Search spaces: any point of one is a right kernel, and a trace says the same of every shape."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

import tvm
import tvm_ffi
from spaces import (
    ANCHORED,
    MODULES,
    ON_CPU,
    ON_GPU,
    ROW_KERNELS,
    SCHEDULED,
    SPEC,
    options,
    sample,
    shape,
)
from tq_tvm.schedules import decode, rows
from tvm import tirx
from tvm.backend.cuda import export_cuda_host
from tvm.s_tir import Schedule, Trace

from tq_tvm import schedules, splits
from tq_tvm.build.compile import compile_library, tvm_target
from tq_tvm.build.occupancy import KernelResources, with_occupancy
from tq_tvm.build.pipeline import build_module
from tq_tvm.kernels import decode_cpu
from tq_tvm.spec import FUNCTIONS, CacheSpec
from tq_tvm.targets import detect, get_target
from tq_tvm.tuning.inputs import make_case
from tq_tvm.tuning.workloads import Workload

OTHER = CacheSpec(64, 8, 2, 32, "float16", "bhsd")
LATENT = CacheSpec(512, 6, 1, 16, "bfloat16", "bshd", "mse4-none-signed-matched", 64)
KINDS = ("llvm", "cuda")
# Samples of every function of SPEC, and one more of some functions of OTHER.
SEEDS = (1, 2, 3)
OF_OTHER = ["rotate", "fill_table", "flatten_unrotated", "decode", "attend"]
OF_LATENT = ["mla"]


def replay(function, spec, kind, seed) -> schedules.Instance:
    return schedules.instantiate(function, spec, kind, sample(function, spec, kind, seed).trace)


def loop_extents(func) -> dict[str, set]:
    """Extents of the loops of each kind, by their name or that of the thread they are bound to."""
    found = {}

    def visit(loop):
        name = tirx.ForKind(loop.kind).name.lower()
        if loop.thread_binding is not None:
            name = loop.thread_binding.thread_tag
        extent = loop.extent
        found.setdefault(name, set()).add(
            int(extent) if isinstance(extent, tirx.IntImm) else extent
        )

    tvm_ffi.structural_walk(func.body, (tirx.For, visit))
    return found


# --- samples of the CPU's spaces compute what the reference computes


@pytest.fixture(scope="module")
def cpu_samples(tmp_path_factory):
    """One library of every sample, on functions of dynamic shape; kernels that are equal, once."""
    functions, found = {}, {}
    points = [*itertools.product(ON_CPU, [SPEC], SEEDS), *((f, OTHER, 9) for f in OF_OTHER)]
    points += [(f, LATENT, 9) for f in OF_LATENT]
    for function, spec, seed in points:
        instance = replay(function, spec, "llvm", seed)
        name = f"{function}_{spec.head_dim}_" + "_".join(map(str, instance.config.values()))
        functions[name] = instance.func
        found.setdefault((function, spec), {})[name] = instance
    path = tmp_path_factory.mktemp("samples") / "kernels.so"
    compile_library(functions, detect("cpu"), path)
    module = tvm_ffi.load_module(str(path))
    return {
        key: [(instance, module[name]) for name, instance in instances.items()]
        for key, instances in found.items()
    }


@pytest.mark.parametrize(
    ("spec", "function"),
    [
        *((SPEC, f) for f in ON_CPU),
        *((OTHER, f) for f in OF_OTHER),
        *((LATENT, f) for f in OF_LATENT),
    ],
    ids=lambda p: getattr(p, "label", p),
)
def test_cpu_samples_are_right(cpu_samples, function, spec):
    """Checked as the tuner checks, at sizes other than those that the trace was found at."""
    samples = cpu_samples[function, spec]
    assert len(samples) > (1 if spec is SPEC else 0), "seeds that draw different points"
    sizes = shape(function, spec, sequences=3, width=2)
    case = make_case(Workload(function, spec, sizes, "a test"), torch.device("cpu"))
    for instance, call in samples:
        arguments = case.arguments(instance.launch)
        case.poison()
        call(*arguments)
        case.check()


# --- replay


@pytest.mark.parametrize(("function", "kind"), SCHEDULED)
def test_a_trace_means_the_same_on_any_shape(function, kind):
    """Through JSON, as a tuning log keeps it: equal to what was searched, and named right."""
    sch = sample(function, SPEC, kind, 4)
    again = Schedule(schedules.search_module(function, SPEC, kind, shape(function, SPEC)))
    Trace.apply_json_to_schedule(sch.trace.as_json(), again)
    static = schedules.instantiate(function, SPEC, kind, again.trace, shape(function, SPEC))
    dynamic = schedules.instantiate(function, SPEC, kind, again.trace)
    assert tvm_ffi.structural_equal(static.func, sch.mod["main"])
    assert dynamic.config == static.config
    assert dynamic.launch == {}
    offered = options(function, SPEC, kind)
    named = MODULES[FUNCTIONS[function]].DEFAULTS[kind]
    assert list(dynamic.config) == list(offered) == list(named)
    assert all(value in offered[name] for name, value in dynamic.config.items())


@pytest.mark.parametrize("seed", SEEDS)
def test_names_of_decisions_on_a_gpu(seed):
    """The numbers are found again in the loops of the dynamic function."""
    instance = replay("rotate", SPEC, "cuda", seed)
    config = instance.config
    extents = loop_extents(instance.func)
    assert extents["threadIdx.x"] == {SPEC.head_dim // 4 // config["vector"]}
    assert extents["threadIdx.y"] == {config["rows"]}
    assert extents["vectorized"] == {config["access"]}
    (blocks,) = extents["blockIdx.x"]
    step = config["rows"] * config["serial"]
    per_multiple = rows.ROW_MULTIPLE["cuda"] // step
    assert str(blocks).endswith(f" // T.int64(128) * T.int64({per_multiple})") or (
        per_multiple == 1 and str(blocks).endswith(" // T.int64(128)")
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("function", ROW_KERNELS)
def test_names_of_decisions_on_a_cpu(function, seed):
    instance = replay(function, SPEC, "llvm", seed)
    config = instance.config
    text = instance.func.script()
    assert f'"pragma_auto_unroll_max_step": {config["unroll"]}' in text
    extents = loop_extents(instance.func)
    # Rows of the model's dtype move eight at a time.
    assert config["vector"] in extents["vectorized"]
    assert extents["vectorized"] <= {config["vector"], 8}
    (tasks,) = extents["parallel"]
    rounding = f"T.int64({config['chunk'] - 1})) // T.int64({config['chunk']})"
    assert str(tasks).endswith(rounding) or config["chunk"] == 1


@pytest.mark.parametrize(("function", "kind"), ANCHORED)
@pytest.mark.parametrize("seed", SEEDS)
def test_an_anchor_becomes_the_kernel_of_its_decisions(function, kind, seed):
    """What the builder compiles in a search is what ships."""
    sch = sample(function, SPEC, kind, seed)
    instance = schedules.instantiate(function, SPEC, kind, sch.trace)
    used = {"f_kernel": KernelResources(registers=128, shared_bytes=0)}
    offered = options(function, SPEC, kind)
    module = MODULES[function]
    assert list(instance.config) == list(offered) == list(module.DEFAULTS[kind])
    assert all(value in offered[name] for name, value in instance.config.items())
    assert instance.launch == schedules.candidate_launch(sch.mod)
    launch = with_occupancy(instance.launch, "f", "sm_90a", used)
    wanted = {
        "decode": splits.launch_keys,
        "attend": splits.attend_launch_keys,
        "prefill": splits.prefill_launch_keys,
    }
    assert set(launch) == set(wanted[function](launch))
    if module.rejected(SPEC, kind, instance.config) is None:
        built = schedules.candidate(sch.mod)["main"]
        assert tvm_ffi.structural_equal(built.with_attr("global_symbol", "main"), instance.func)


def test_a_row_kernel_is_its_own_candidate():
    sch = sample("rotate", SPEC, "cuda", 1)
    assert schedules.candidate(sch.mod).same_as(sch.mod)
    assert schedules.candidate_launch(sch.mod) == {}


def test_anchors_of_different_workloads_differ():
    """MetaSchedule files records under the module's structure."""
    modules = [
        schedules.search_module(function, spec, kind, shape(function, spec, sequences))
        for function, kind in ANCHORED[::-1]
        for spec in (SPEC, OTHER)
        for sequences in (1, 2)
    ]
    assert not any(tvm_ffi.structural_equal(a, b) for a, b in itertools.combinations(modules, 2))
    again = schedules.search_module("decode", OTHER, "llvm", shape("decode", OTHER, 2))
    assert tvm_ffi.structural_equal(again, modules[-1])


# --- what a record of decode is filed under

PRINT_DIGESTS = """
import tvm.s_tir.meta_schedule
from tq_tvm.schedules import decode
from tq_tvm.spec import CacheSpec
print([decode.digest(CacheSpec.parse({label!r}), kind) for kind in {kinds!r}])
"""


def test_a_digest_is_that_of_another_process():
    """Whatever that imports first, and however it hashes strings."""
    script = PRINT_DIGESTS.format(label=SPEC.label, kinds=KINDS)
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str([decode.digest(SPEC, kind) for kind in KINDS])


@pytest.fixture
def rewritten(tmp_path, monkeypatch):
    """The digest of SPEC with the CPU's factory made from another source."""

    def digest(rewrite) -> str:
        path = tmp_path / "factory.py"
        path.write_text(rewrite(Path(decode_cpu.__file__).read_text()))
        loader = importlib.util.spec_from_file_location("factory", path)
        module = importlib.util.module_from_spec(loader)
        monkeypatch.setitem(sys.modules, "factory", module)
        loader.loader.exec_module(module)
        monkeypatch.setattr(
            decode,
            "decode",
            lambda spec, kind, point: module.decode_cpu(spec, module.DecodeCpuConfig(**point)),
        )
        return decode.digest(SPEC, "llvm")

    return digest


def test_comments_and_formatting_do_not_change_a_digest(rewritten):
    want = decode.digest(SPEC, "llvm")

    def spaced(source):
        assert "for " in source
        return re.sub(r"^( *)(for .*:)$", r"\1# A comment.\n\n\1\2  # another", source, flags=re.M)

    assert rewritten(spaced) == want


def test_code_changes_a_digest(rewritten):
    want = decode.digest(SPEC, "llvm")

    def changed(source):
        assert "tile + 1" in source
        return source.replace("tile + 1", "tile + 2")

    assert rewritten(changed) != want


def test_code_of_a_decision_that_the_default_leaves_out_changes_a_digest(monkeypatch):
    before = decode.digest(SPEC, "cuda")
    table = decode.OPTIONS["cuda"]
    name = next(iter(table))
    assert decode.DEFAULTS["cuda"][name] != table[name][-1]
    last = table[name][-1]
    factory = decode.decode

    def changed(spec, kind, point):
        func = factory(spec, kind, point)
        return func.with_attr("changed", 1) if point[name] == last else func

    monkeypatch.setattr(decode, "decode", changed)
    assert decode.digest(SPEC, "cuda") != before


@pytest.mark.parametrize("function", ["rotate", "decode", "attend"])
def test_a_trace_keeps_its_values_when_the_options_change(function):
    """An index of today's table would say something else."""
    sch = Schedule(schedules.search_module(function, SPEC, "llvm", shape(function, SPEC)))
    made = {}

    def decide(name, values):
        then = [values[-1], *values]  # the options had one more at the front
        made[name] = int(values[-1])
        return sch.sample_categorical(then, [1.0 / len(then)] * len(then), 0)

    MODULES[function].apply(sch, function, SPEC, "llvm", decide)
    instance = schedules.instantiate(function, SPEC, "llvm", sch.trace)
    assert instance.config == made != schedules.instantiate(function, SPEC, "llvm", None).config


# --- CUDA source


def cuda_source(func) -> str:
    target = tvm_target(get_target("nvidia_h200"))
    return export_cuda_host(build_module(tvm.IRModule({"main": func}), target))


def check_source(function, spec, instance, source):
    """A launcher, and kernels whose CTAs have the threads that the decisions say."""
    assert "__tvm_ffi_main" in source
    bounds = {
        (int(threads), int(ctas or 0))
        for threads, ctas in re.findall(r"__launch_bounds__\((\d+)(?:, (\d+))?\)", source)
    }
    config = instance.config
    if "registers" not in config:  # a schedule of rows
        assert bounds == {(config["rows"] * spec.head_dim // 4 // config["vector"], 0)}
        # Lanes of a row exchange values in registers.
        assert "shfl" in source
        assert "__shared__" not in source
        return
    threads = 32 * config["warps"]
    if function == "decode":
        threads *= min(config["abreast"], spec.num_kv_heads)
        assert threads == instance.launch["threads"]
    bound = (threads, max(1, 65536 // (threads * config["registers"])))
    # The second launch of two has bounds of its own.
    two = function in ("decode", "attend")
    assert bound in bounds if two else bounds == {bound}
    # Tensor cores take rotations and products; in the rotated domain flatten has neither.
    assert ("mma.sync" in source) == (function != "flatten")


@pytest.mark.parametrize("spec", [OTHER, CacheSpec(256, 2, 1)], ids=lambda s: s.label)
@pytest.mark.parametrize("function", ON_GPU)
def test_cuda_source_of_defaults(function, spec):
    instance = schedules.instantiate(function, spec, "cuda", None)
    check_source(function, spec, instance, cuda_source(instance.func))


@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize("function", ON_GPU)
def test_cuda_source_of_samples(function, seed):
    """Of every design."""
    mod = schedules.search_module(function, SPEC, "cuda", shape(function, SPEC))
    designs = schedules.space(function, SPEC, "cuda")(Schedule(mod, seed=seed))
    assert len(designs) == (2 if function == "rotate" else 1)
    for sch in designs:
        instance = schedules.instantiate(function, SPEC, "cuda", sch.trace)
        check_source(function, SPEC, instance, cuda_source(instance.func))
