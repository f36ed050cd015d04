"""Row kernels that a factory makes: sampled on the row's block, built by the factory."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

import tvm
import tvm_ffi
from tq_tvm.schedules import factories
from tq_tvm.schedules.decisions import sampled
from tvm.backend.cuda import export_cuda_host
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from tq_tvm import schedules
from tq_tvm.build.compile import tvm_target
from tq_tvm.build.pipeline import build_module
from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.kernels.fill_cuda import FillConfig, ring_words
from tq_tvm.served import functions_on
from tq_tvm.spec import CacheSpec, RotateSpec
from tq_tvm.targets import get_target
from tq_tvm.tuning.database import search_workload
from tq_tvm.tuning.workloads import decision_sizes, workloads

SPEC = CacheSpec(128, 4, 2, 16, "bfloat16", "bshd")
FUNCTIONS = ["rotate", "fill_slots", "fill_table", "flatten", "flatten_unrotated"]
PAGES = {"batch": 2, "pages": 6, "table_width": 3}
SHAPES = {
    "rotate": {"n": 91},
    "fill_slots": {"tokens": 91, "pages": 6},
    "fill_table": {"tokens": 96, **PAGES},
    "flatten": {"tokens": 96, **PAGES},
    "flatten_unrotated": {"tokens": 96, **PAGES},
}


def made(function, seed=1, spec=SPEC) -> Schedule:
    """A sample of the design, the second of ``rotate`` and the only one of other kernels."""
    mod = schedules.search_module(function, spec, "cuda", SHAPES[function])
    return schedules.space(function, spec, "cuda")(Schedule(mod, seed=seed))[-1]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_candidate_is_what_ships(function, seed):
    """And the same at any shape."""
    sch = made(function, seed)
    instance = schedules.instantiate(function, SPEC, "cuda", sch.trace)
    offered = factories.options(function, SPEC)
    assert list(instance.config) == list(offered)
    assert all(value in offered[name] for name, value in instance.config.items())
    assert instance.launch == schedules.candidate_launch(sch.mod) == {}
    built = schedules.candidate(sch.mod)["main"]
    assert tvm_ffi.structural_equal(built, instance.func)
    static = schedules.instantiate(function, SPEC, "cuda", sch.trace, SHAPES[function])
    assert static.config == instance.config
    assert tvm_ffi.structural_equal(static.func, instance.func)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_designs_of_a_space(function):
    """``rotate`` has a schedule first, other kernels of GPUs have none; a CPU has no factory."""
    first = Schedule(schedules.search_module(function, SPEC, "cuda", SHAPES[function]), seed=1)
    designs = schedules.space(function, SPEC, "cuda")(first)
    assert designs[0] is first
    found = [factories.made(sch) for sch in designs]
    if function == "rotate":
        assert found.pop(0) is None
    (only,) = found
    assert (only.function, only.spec) == (function, SPEC)
    cpu = Schedule(schedules.search_module(function, SPEC, "llvm", SHAPES[function]), seed=1)
    assert schedules.space(function, SPEC, "llvm")(cpu) == [cpu]
    assert factories.made(cpu) is None
    assert schedules.has_factory(function, SPEC, "cuda")
    assert not schedules.has_factory(function, SPEC, "llvm")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_record_carries_over_to_another_spec(tmp_path, function):
    """By way of the files; heads, pages and layout are the other spec's."""
    sch = made(function)
    target = tvm_target(get_target("nvidia_h200"))
    mod = search_workload(function, SPEC, "cuda", SHAPES[function])
    files = [str(tmp_path / name) for name in ("workload.json", "record.json")]
    database = ms.database.JSONDatabase(*files)
    workload = database.commit_workload(mod)
    database.commit_tuning_record(ms.database.TuningRecord(sch.trace, workload, [1e-3], target, []))
    (record,) = ms.database.JSONDatabase(*files).get_all_tuning_records()
    other = CacheSpec(128, 12, 3, 64, "bfloat16", "bhsd")
    instance = schedules.instantiate(function, other, "cuda", record.trace)
    assert instance.config == schedules.instantiate(function, SPEC, "cuda", sch.trace).config
    want = factories.make(function, other, instance.config)
    assert tvm_ffi.structural_equal(instance.func.with_attr("global_symbol", "main"), want)


def test_decisions_of_another_kernel_are_refused(monkeypatch):
    sch = made("fill_slots")
    monkeypatch.setattr(factories, "_digest", lambda function, spec: "another")
    with pytest.raises(UnsupportedSpecError, match="kernel as it is now"):
        schedules.instantiate("fill_slots", SPEC, "cuda", sch.trace)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("function", ["rotate", "fill_slots", "flatten", "flatten_unrotated"])
def test_cuda_source_at_the_ends_of_the_options(function, head_dim):
    spec = CacheSpec(head_dim, 2, 1, 64, "float16", "bhsd")
    table = factories.options(function, spec)
    for end in (0, -1) if head_dim == 128 else (-1,):
        config = {name: values[end] for name, values in table.items()}
        sch = Schedule(schedules.search_module(function, spec, "cuda", SHAPES[function]))
        factories.apply(sch, function, spec, sampled(sch, config))
        func = schedules.instantiate(function, spec, "cuda", sch.trace).func
        target = tvm_target(get_target("nvidia_h200"))
        source = export_cuda_host(build_module(tvm.IRModule({"main": func}), target))
        threads = 32 * config["warps"]
        assert f"__launch_bounds__({threads}, {65536 // (threads * config['registers'])})" in source
        assert ("mma.sync" in source) == (function != "flatten")
        assert "prmt.b32" in source or not function.startswith("flatten")
        assert "__syncthreads" not in source


def test_options_are_points():
    """As many as a search may count on."""
    counts = {
        function: len(list(itertools.product(*factories.options(function, SPEC).values())))
        for function in FUNCTIONS
    }
    assert counts == {
        "rotate": 243, "fill_slots": 1440, "fill_table": 1440,
        "flatten": 81, "flatten_unrotated": 81,
    }  # fmt: skip


def test_without_a_rotation_there_is_nothing_to_contract():
    """Of a direct codec; both ``flatten`` are one kernel then."""
    spec = CacheSpec(128, 4, 2, 16, "bfloat16", "bshd", "int8")
    assert factories.options("fill_slots", spec)["contracted"] == [1]
    offered = [factories.options(f, spec) for f in ("flatten", "flatten_unrotated")]
    assert offered[0] == offered[1]
    config = {name: values[-1] for name, values in offered[0].items()}
    kernels = [factories.make(f, spec, config) for f in ("flatten", "flatten_unrotated")]
    assert tvm_ffi.structural_equal(*kernels)
    rotated = dataclasses.replace(spec, format="tq84")
    assert len(factories.options("flatten_unrotated", rotated)["contracted"]) == 3


@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_defaults_of_a_direct_codec_are_points(function):
    spec = CacheSpec(64, 4, 2, 16, "bfloat16", "bshd", "fp8")
    instance = schedules.instantiate(function, spec, "cuda", None)
    offered = factories.options(function, spec)
    assert list(instance.config) == list(offered)
    assert all(value in offered[name] for name, value in instance.config.items())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("function", ["fill_slots", "fill_table"])
def test_appends_have_defaults_of_their_own(function, head_dim):
    spec = CacheSpec(head_dim, 4, 2, 16, "bfloat16", "bshd", "tq42")
    target, configs = get_target("nvidia_h200"), {}
    for workload in workloads(spec, target):
        if workload.function == function:
            sizes = decision_sizes(function, workload.shape, target)
            instance = schedules.instantiate(function, spec, "cuda", None, sizes)
            assert not instance.tuned
            assert all(
                v in factories.options(function, spec)[k] for k, v in instance.config.items()
            )
            configs[workload.shape["tokens"]] = instance.config
    few, *many = (configs[tokens] for tokens in sorted(configs))
    assert few["tiles"] == 1
    assert many
    assert all(config == factories.DEFAULTS[function] for config in many)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_point_fits_a_gpu(head_dim):
    """Registers of a CTA, and the shared memory of fill's rows on their way."""
    spec = CacheSpec(head_dim, 32, 8)
    for function in FUNCTIONS:
        offered = factories.options(function, spec)
        for point in itertools.product(*offered.values()):
            config = dict(zip(offered, point, strict=True))
            assert 32 * config["warps"] * config["registers"] <= 65536
            if function.startswith("fill"):
                del config["factory"]
                assert 4 * ring_words(spec, FillConfig(**config)) <= 227 << 10


@pytest.mark.parametrize(
    "dims", [(80, None), (96, 112), (192, 64), (128, 64), (576, None)], ids=str
)
@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_rows_in_lanes(function, dims):
    """Of dims that tensor cores do not rotate, and of two: defaults are points, registers fit."""
    spec = CacheSpec(dims[0], 4, 2, 16, "bfloat16", "bshd", "tq42", dims[1])
    instance = schedules.instantiate(function, spec, "cuda", None)
    offered = factories.options(function, spec)
    assert instance.config == factories.defaults(function, spec)
    assert list(instance.config) == list(offered)
    assert all(value in offered[name] for name, value in instance.config.items())
    assert 32 * max(offered["warps"]) * max(offered["registers"]) <= 65536
    for name in {"attend", "prefill"} & set(functions_on(spec, "cuda")):
        space = getattr(schedules, name)
        values = space.defaults(spec, "cuda")
        assert space.rejected(spec, "cuda", values) is None


@pytest.mark.parametrize("dim", [512, 1024, 2048, 4096])
def test_long_rows_have_a_factory_alone(dim):
    """The default is a point of it, and every point has the warps of a row."""
    spec = RotateSpec(dim)
    sch = Schedule(schedules.search_module("rotate", spec, "cuda", {"n": 5}), seed=1)
    assert schedules.space("rotate", spec, "cuda")(sch) == [sch]
    assert factories.made(sch).spec == spec
    offered = factories.options("rotate", spec)
    instance = schedules.instantiate("rotate", spec, "cuda", None)
    assert not instance.tuned
    assert instance.config == factories.DEFAULTS["rotate"]
    assert all(value in offered[name] for name, value in instance.config.items())
    for values, warps in itertools.product(offered["values"], offered["warps"]):
        assert 32 * values * warps >= dim
        assert 4 * 32 * values * warps <= 48 << 10, "static shared memory"
