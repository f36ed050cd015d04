"""Search spaces: any point of one is a right kernel, and a trace says the same of every shape."""

from __future__ import annotations

import dataclasses
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
from tq_tvm.schedules import attend, decode, factories, fill, flatten, mla, prefill, rotate, rows
from tq_tvm.schedules.decisions import sampled
from tvm import tirx
from tvm.backend.cuda import export_cuda_host
from tvm.s_tir import Schedule, Trace

from tq_tvm import schedules, splits
from tq_tvm.build.compile import compile_library, tvm_target
from tq_tvm.build.occupancy import KernelResources, with_occupancy
from tq_tvm.build.pipeline import build_module
from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.kernels import decode_cpu
from tq_tvm.served import GPU_DECODE_DIMS, functions_on
from tq_tvm.spec import FUNCTIONS, CacheSpec
from tq_tvm.targets import detect, get_target
from tq_tvm.tuning.inputs import make_case
from tq_tvm.tuning.workloads import Workload

SPEC = CacheSpec(128, 4, 2, 16, "bfloat16", "bshd")
OTHER = CacheSpec(64, 8, 2, 32, "float16", "bhsd")
LATENT = CacheSpec(512, 6, 1, 16, "bfloat16", "bshd", "mse4-none-signed-matched", 64)
KINDS = ("llvm", "cuda")
ATTENTION = ("decode", "attend", "prefill")
# Which nobody searches: it has the decisions of decode.
FEATURED = "decode_featured"
ROW_KERNELS = [name for name in FUNCTIONS if name not in (*ATTENTION, FEATURED, "mla")]
# A GPU's fill and flatten are made by a factory, see test_factories.py.
SCHEDULED = [*((name, "llvm") for name in ROW_KERNELS), ("rotate", "cuda")]
MODULES = {
    "rotate": rotate,
    "fill": fill,
    "flatten": flatten,
    "decode": decode,
    "attend": attend,
    "prefill": prefill,
    "mla": mla,
}
# Samples of every function of SPEC, and one more of some functions of OTHER.
SEEDS = (1, 2, 3)
OF_OTHER = ["rotate", "fill_table", "flatten_unrotated", "decode", "attend"]
OF_LATENT = ["mla"]
ON_GPU = [name for name in functions_on(SPEC, "cuda") if name != FEATURED]
ON_CPU = functions_on(SPEC, "llvm")
ON_KIND = [*((name, "llvm") for name in ON_CPU), *((name, "cuda") for name in ON_GPU)]
ANCHORED = [(name, kind) for name, kind in ON_KIND if name in ATTENTION]


def shape(function, spec, sequences=2, width=3):
    """Sizes of a workload with full pages."""
    pages = {"batch": sequences, "pages": sequences * width, "table_width": width}
    tokens = sequences * width * spec.page_size
    return {
        "rotate": {"n": tokens + 5},
        "fill_slots": {"tokens": tokens - 5, "pages": pages["pages"]},
        "decode": pages,
        "mla": pages,
        "attend": {"tokens": sequences * 11, **pages},
    }.get(function, {"tokens": tokens, **pages})


def sample(function, spec, kind, seed) -> Schedule:
    """A random point of the space of a function of static sizes, as a search draws it."""
    mod = schedules.search_module(function, spec, kind, shape(function, spec))
    sch = Schedule(mod, seed=seed)
    schedules.space(function, spec, kind)(sch)
    return sch


def replay(function, spec, kind, seed) -> schedules.Instance:
    return schedules.instantiate(function, spec, kind, sample(function, spec, kind, seed).trace)


def anchor(spec, kind, config) -> tvm.IRModule:
    """What a search hands to the builder when it has made these decisions."""
    sch = Schedule(schedules.search_module("decode", spec, kind, shape("decode", spec)))
    decode.apply(sch, "decode", spec, kind, sampled(sch, config))
    return sch.mod


def options(function, spec, kind) -> dict[str, list[int]]:
    """What each decision of the first design may be."""
    offered = {}

    def decide(name, values):
        offered[name] = [int(v) for v in values]
        return values[0]

    probe = Schedule(schedules.search_module(function, spec, kind, None))
    schedules._apply_first(probe, function, spec, kind, decide)
    return offered


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


# --- defaults and limits


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("function", "kind"), ON_KIND)
def test_defaults_are_points_of_the_space(function, kind, head_dim):
    spec = dataclasses.replace(SPEC, head_dim=head_dim)
    instance = schedules.instantiate(function, spec, kind, None)
    offered = options(function, spec, kind)
    assert not instance.tuned
    assert list(instance.config) == list(offered)
    assert all(value in offered[name] for name, value in instance.config.items())
    kernel = FUNCTIONS[function]
    if function in ATTENTION:
        named = MODULES[kernel].defaults(spec, kind)
        assert MODULES[kernel].rejected(spec, kind, named) is None
    else:
        made = (function, kind) not in SCHEDULED
        named = factories.DEFAULTS[function] if made else MODULES[kernel].DEFAULTS[kind]
    assert instance.config == named, "no value was replaced"


def test_clusters_are_offered_to_short_contexts_alone():
    """So that what is searched of long ones, and what is filed under it, stays as it is."""
    short, long = ({"batch": 8, "pages": 8, "table_width": width} for width in (16, 4096))
    assert decode.is_short(SPEC, short) and not decode.is_short(SPEC, long)
    assert decode.options(SPEC, "cuda")["cluster"] == [0]
    assert decode.options(SPEC, "cuda", short=True)["cluster"] == [0, 8, 16]
    assert decode.digest(SPEC, "cuda") != decode.digest(SPEC, "cuda", short=True)
    assert "cluster" not in decode.options(SPEC, "llvm", short=True)
    for sizes in (short, long):
        sch = Schedule(schedules.search_module("decode", SPEC, "cuda", sizes), seed=1)
        schedules.space("decode", SPEC, "cuda", sizes)(sch)
        sampled = [i for i in sch.trace.insts if i.kind.name == "SampleCategorical"]
        assert [int(n) for n in sampled[-1].attrs[0]] == ([0, 8, 16] if sizes is short else [0])


@pytest.mark.parametrize("head_dim", GPU_DECODE_DIMS)
@pytest.mark.parametrize("group", [1, 4, 6, 16])
def test_defaults_of_short_contexts_are_feasible(head_dim, group):
    spec = dataclasses.replace(SPEC, head_dim=head_dim, num_q_heads=SPEC.num_kv_heads * group)
    for batch, width in ((1, 16), (64, 16), (1, 2048)):
        values = decode.defaults(spec, "cuda", {"batch": batch, "pages": 1, "table_width": width})
        assert decode.rejected(spec, "cuda", values) is None
        offered = decode.options(spec, "cuda", short=True)
        assert all(value in offered[name] for name, value in values.items())


@pytest.mark.parametrize("function", ["rotate", "decode"])
def test_a_record_of_the_default_is_not_tuned(function):
    """Its decisions are those that every call without a record has."""
    for seed in (None, 1, 2):
        sch = Schedule(schedules.search_module(function, SPEC, "llvm", None), seed=seed)
        point = schedules.default if seed is None else schedules.space
        point(function, SPEC, "llvm")(sch)
        instance = schedules.instantiate(function, SPEC, "llvm", sch.trace)
        default = schedules.instantiate(function, SPEC, "llvm", None)
        assert instance.tuned == (instance.config != default.config) == (seed is not None)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_point_of_rotate_fits_a_gpu(head_dim):
    """A thread for each lane, at most 1024; rows come padded to what a CTA takes."""
    offered = options("rotate", dataclasses.replace(SPEC, head_dim=head_dim), "cuda")
    names = ("vector", "rows", "serial")
    for vector, count, serial in itertools.product(*(offered[name] for name in names)):
        lanes = head_dim // 4 // vector
        assert 2 <= lanes <= 32
        assert lanes * count <= 1024
        assert rows.ROW_MULTIPLE["cuda"] % (count * serial) == 0


@pytest.mark.parametrize(("choices", "taken"), [((4, 8, 16, 32), 16), ((4, 8), 8), ((32, 64), 32)])
def test_a_value_that_is_not_on_offer(choices, taken):
    """The nearest below, or the smallest."""
    sch = Schedule(schedules.search_module("rotate", SPEC, "llvm", None))
    assert int(sch.get(sampled(sch, {"vector": 16})("vector", choices))) == taken


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_decode_is_not_rejected(kind, head_dim):
    spec = dataclasses.replace(SPEC, head_dim=head_dim)
    assert decode.rejected(spec, kind, decode.DEFAULTS[kind]) is None
    schedules.candidate(anchor(spec, kind, decode.DEFAULTS[kind]))


@pytest.mark.parametrize("group", [1, 4, 5, 16])
@pytest.mark.parametrize("head_dim", GPU_DECODE_DIMS)
@pytest.mark.parametrize("name", ["k4v2", "tq22", "tq32", "tq44"])
def test_defaults_of_decode_fit_a_gpu(name, head_dim, group):
    """Of formats that share lines of memory among heads, too."""
    spec = dataclasses.replace(
        SPEC, format=name, head_dim=head_dim, num_q_heads=2 * group, num_kv_heads=2
    )
    values, offered = decode.defaults(spec, "cuda"), decode.options(spec, "cuda")
    assert decode.rejected(spec, "cuda", values) is None
    assert all(value in offered[name] for name, value in values.items())


@pytest.mark.parametrize("head_dim", GPU_DECODE_DIMS)
def test_what_never_fits_is_not_offered(head_dim):
    offered = decode.options(dataclasses.replace(SPEC, head_dim=head_dim), "cuda")
    assert offered["abreast"] == ([1] if head_dim == 512 else [1, 2, 4])
    assert max(offered["warps"]) == {256: 4, 512: 1}.get(head_dim, 8)


@pytest.mark.parametrize("sizes", [None, {"batch": 1, "table_width": 1}])
def test_rows_of_two_warps_have_short_tiles(sizes):
    """At every size, in the form with clusters, too."""
    values = decode.defaults(dataclasses.replace(SPEC, head_dim=512), "cuda", sizes)
    assert (values["tile"], values["query_in_shared"], values["warps"]) == (32, 0, 1)
    assert (values["cluster"] > 0) == (sizes is not None)


@pytest.mark.parametrize(
    ("spec", "decisions", "reason"),
    [
        (CacheSpec(256, 4, 2), {"abreast": 2}, "static shared memory exceed 49152"),
        (CacheSpec(64, 8, 8), {"warps": 8, "abreast": 4}, "1024 threads of a CTA exceed 512"),
    ],
    ids=lambda p: getattr(p, "label", None),
)
def test_infeasible_decisions(spec, decisions, reason):
    config = {**decode.DEFAULTS["cuda"], **decisions}
    assert reason in decode.rejected(spec, "cuda", config)
    with pytest.raises(UnsupportedSpecError, match=reason) as error:
        schedules.candidate(anchor(spec, "cuda", config))
    assert str(config) in str(error.value)


@pytest.mark.parametrize("dims", [(512, None), (128, 512), (512, 128)])
@pytest.mark.parametrize("name", ["k4v2", "tq44", "int8", "fp8", "none", "mse3-int4-plain-norm"])
def test_warps_that_share_tiles_are_a_cta(name, dims):
    """Two have 512 outputs between them; with fewer each has all."""
    spec = CacheSpec(dims[0], 4, 2, format=name, head_dim_v=dims[1])
    config = attend.defaults(spec, "cuda")
    assert attend.rejected(spec, "cuda", config) is None
    offered = attend.options(spec, "cuda")
    assert set(config) == set(offered)
    shared = spec.value_dim == 512
    assert offered["warps"] == ([2] if shared else attend.OPTIONS["cuda"]["warps"])
    assert "lanes" not in config or config["lanes"] in offered["lanes"]
    if shared:
        assert config["warps"] == 2
        # 16 rows of 32 x 8 outputs are half of a lane's registers.
        reason = attend.rejected(spec, "cuda", config | {"row_tiles": 2})
        assert "outputs exceed a lane's registers" in reason


@pytest.mark.parametrize(
    ("name", "head_dim", "heads", "warps", "abreast", "tile"),
    [
        ("tq44", 128, 32, 4, 2, 32),
        ("mse2-mse4-signed-matched", 128, 32, 4, 2, 32),
        ("tq43", 128, 32, 2, 2, 32),
        ("tq43", 128, 64, 4, 1, 64),
        ("mse2-mse3-signed-matched", 128, 32, 4, 2, 64),
        ("tq22", 128, 32, 4, 2, 64),
        ("k4v2", 128, 32, 4, 1, 64),
        ("k4v2", 64, 32, 2, 2, 32),
        # Two heads of 256 values exceed shared memory.
        ("tq44", 256, 32, 4, 1, 64),
    ],
)
def test_defaults_by_codec(name, head_dim, heads, warps, abreast, tile):
    config = decode.defaults(CacheSpec(head_dim, heads, 8, format=name), "cuda")
    assert (config["warps"], config["abreast"], config["tile"]) == (warps, abreast, tile)


@pytest.mark.parametrize(
    ("name", "batch", "context", "warps"),
    [
        ("tq43", 64, 1024, 4),
        ("tq43", 256, 512, 2),
        ("tq44", 256, 512, 2),
        ("tq44", 64, 8192, 4),
        ("k4v2", 256, 512, 4),
    ],
)
def test_defaults_by_size(name, batch, context, warps):
    sizes = {"batch": batch, "pages": batch * context // 64, "table_width": context // 64}
    assert decode.defaults(CacheSpec(128, 32, 8, format=name), "cuda", sizes)["warps"] == warps


def test_a_cpu_rejects_nothing():
    points = itertools.product(*decode.OPTIONS["llvm"].values())
    configs = [dict(zip(decode.OPTIONS["llvm"], point, strict=True)) for point in points]
    assert [decode.rejected(SPEC, "llvm", config) for config in configs] == [None] * 36


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
