"""Defaults of every space are points of it that there are kernels of, and limits of the others."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from spaces import ATTENTION, MODULES, ON_KIND, SCHEDULED, SPEC, anchor, options
from tq_tvm.schedules import attend, decode, factories, prefill, rows
from tq_tvm.schedules.decisions import sampled
from tvm.s_tir import Schedule

from tq_tvm import schedules
from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.served import GPU_DECODE_DIMS, functions_on
from tq_tvm.spec import FUNCTIONS, CacheSpec
from tq_tvm.targets import get_target
from tq_tvm.tuning.workloads import decision_sizes


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
@pytest.mark.parametrize("kind", ["llvm", "cuda"])
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


@pytest.mark.parametrize(
    "dims", [(512, None), (128, 512), (512, 128), (576, None), (64, 576), (576, 512), (576, 192)]
)
@pytest.mark.parametrize("name", ["k4v2", "tq44", "int8", "fp8", "none", "mse3-int4-plain-norm"])
def test_warps_that_share_tiles_are_a_cta(name, dims):
    """Two have 512 outputs between them, three 576; with fewer each has all."""
    spec = CacheSpec(dims[0], 4, 2, format=name, head_dim_v=dims[1])
    config = attend.defaults(spec, "cuda")
    assert attend.rejected(spec, "cuda", config) is None
    offered = attend.options(spec, "cuda")
    assert set(config) == set(offered)
    shared = {512: 2, 576: 3}.get(spec.value_dim)
    assert offered["warps"] == ([shared] if shared else [1, 2, 4])
    assert "lanes" not in config or config["lanes"] in offered["lanes"]
    if shared:
        assert config["warps"] == shared
    if shared == 2:
        # 16 rows of 32 x 8 outputs are half of a lane's registers.
        reason = attend.rejected(spec, "cuda", config | {"row_tiles": 2})
        assert "outputs exceed a lane's registers" in reason


@pytest.mark.parametrize("dims", [(96, None), (128, 64), (512, None)])
def test_a_thread_has_the_scales_of_one_token(dims):
    """Where a warp, or two, make a tile's rows in shared memory."""
    spec = CacheSpec(dims[0], 32, 8, head_dim_v=dims[1])
    config = attend.defaults(spec, "cuda") | {"tile": 64}
    reason = attend.rejected(spec, "cuda", config)
    assert (reason is None) == (dims[0] == 512)
    assert reason is None or reason == "64 tokens of a tile exceed 32 threads"


@pytest.mark.parametrize(
    ("name", "head_dim", "heads", "warps", "abreast", "tile"),
    [
        ("tq44", 128, 32, 4, 2, 32),
        ("mse2-mse4-signed-matched", 128, 32, 4, 2, 32),
        ("tq43", 128, 32, 2, 2, 32),
        ("tq43", 128, 64, 4, 1, 64),
        ("mse2-mse3-signed-matched", 128, 32, 2, 2, 32),
        ("tq22", 128, 32, 4, 2, 64),
        ("k4v2", 128, 32, 4, 1, 64),
        ("k4v2", 64, 32, 2, 2, 32),
        # Two heads of 256 values exceed shared memory, and tiles of 64 that of small GPUs.
        ("tq44", 256, 32, 4, 1, 32),
    ],
)
def test_defaults_by_codec(name, head_dim, heads, warps, abreast, tile):
    config = decode.defaults(CacheSpec(head_dim, heads, 8, format=name), "cuda")
    assert (config["warps"], config["abreast"], config["tile"]) == (warps, abreast, tile)


@pytest.mark.parametrize(
    ("name", "batch", "context", "warps", "abreast", "tile"),
    [
        ("tq43", 64, 1024, 2, 2, 32),
        ("tq43", 64, 8192, 2, 2, 32),
        ("tq44", 256, 512, 2, 2, 32),
        ("tq44", 64, 8192, 4, 2, 32),
        ("mse2-mse3-signed-matched", 64, 1024, 2, 2, 64),
        ("k4v2", 256, 512, 2, 1, 64),
        ("k4v2", 128, 1024, 2, 1, 64),
        ("k4v2", 32, 2048, 4, 1, 64),
        ("k4v2", 1, 131072, 4, 1, 64),
        ("tq22", 64, 1024, 2, 2, 64),
    ],
)
def test_defaults_by_size(name, batch, context, warps, abreast, tile):
    sizes = {"batch": batch, "pages": batch * context // 64, "table_width": context // 64}
    config = decode.defaults(CacheSpec(128, 32, 8, format=name), "cuda", sizes)
    assert (config["warps"], config["abreast"], config["tile"]) == (warps, abreast, tile)


def test_a_cpu_rejects_nothing():
    points = itertools.product(*decode.OPTIONS["llvm"].values())
    configs = [dict(zip(decode.OPTIONS["llvm"], point, strict=True)) for point in points]
    assert [decode.rejected(SPEC, "llvm", config) for config in configs] == [None] * 36


def sizes_of(batch, context, queries=1):
    """Of a batch in pages of 64."""
    pages = {"pages": batch * context // 64, "table_width": context // 64}
    return {"tokens": batch * queries, "batch": batch, **pages}


@pytest.mark.parametrize(
    ("name", "head_dim", "sizes", "wanted"),
    [
        ("k4v2", 128, (64, 8192, 4), (8, 1, 64)),
        ("k4v2", 128, (64, 1024, 4), (8, 1, 32)),
        ("k4v2", 128, (64, 8192, 8), (4, 2, 16)),
        ("k4v2", 128, (64, 1024, 8), (8, 2, 16)),
        ("tq42", 128, (64, 8192, 8), (8, 2, 32)),
        ("k4v2", 256, (64, 8192, 4), (8, 1, 16)),
        ("int8", 128, (64, 8192, 4), (4, 1, 32)),
        ("int8", 128, (64, 1024, 4), (8, 1, 32)),
        ("int4", 128, (64, 8192, 1), (4, 1, 64)),
        ("int4", 128, (64, 1024, 1), (8, 1, 32)),
        ("int8", 96, (64, 8192, 4), (4, 1, 16)),
        ("k4v2", 96, (64, 8192, 4), (4, 1, 32)),
    ],
)
def test_defaults_of_attend_by_size(name, head_dim, sizes, wanted):
    """Warps, row tiles and tokens of a tile."""
    spec = CacheSpec(head_dim, 32, 8, format=name)
    config = attend.defaults(spec, "cuda", sizes_of(*sizes))
    assert tuple(config[key] for key in ("warps", "row_tiles", "tile")) == wanted
    assert attend.rejected(spec, "cuda", config) is None


def test_clusters_share_rows_where_there_are_any():
    """Sizes say so; what is filed under the kernel is of both forms."""
    assert prefill.defaults(SPEC, "cuda")["cluster"] == 0
    sizes = {**sizes_of(1, 32768, 512), "clusters": 1}
    config = prefill.defaults(SPEC, "cuda", sizes)
    assert config["cluster"] == 8
    assert prefill.options(SPEC, "cuda")["cluster"] == [0]
    assert prefill.options(SPEC, "cuda", sizes)["cluster"] == [8]
    assert "cluster" in prefill.launch(SPEC, "cuda", config)
    assert list(prefill.launch(SPEC, "cuda", prefill.defaults(SPEC, "cuda"))) == ["rows"]
    instance = schedules.instantiate("prefill", SPEC, "cuda", None, sizes)
    assert instance.config == config and not instance.tuned


@pytest.mark.parametrize(
    ("spec", "sizes", "wanted"),
    [
        (SPEC, (1, 32768, 512), 2),
        (CacheSpec(128, 32, 8), (64, 8192, 16), 1),
        (CacheSpec(128, 32, 8), (64, 8192, 17), 2),
        (CacheSpec(64, 8, 8, format="int8"), (1, 8192, 64), 1),
        (CacheSpec(128, 32, 8, format="none"), (1, 8192, 512), None),
        (CacheSpec(256, 32, 8), (1, 8192, 512), None),
        (CacheSpec(96, 32, 8), (1, 8192, 512), None),
    ],
)
def test_warpgroups_multiply_packed_rows_of_at_most_128_values(spec, sizes, wanted):
    """On Hopper: one where it has all rows of a sequence."""
    hopper = {**sizes_of(*sizes), "clusters": 1, "wgmma": 1}
    config = prefill.defaults(spec, "cuda", hopper)
    assert config.get("multipliers") == wanted
    assert prefill.rejected(spec, "cuda", config) is None
    assert set(config) == set(prefill.options(spec, "cuda", hopper))
    others = {**sizes_of(*sizes), "clusters": 1}
    assert "warps" in prefill.defaults(spec, "cuda", others)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"places": 7}, "bytes of shared memory"),
        ({"decoders": 8}, "256 threads exceed 2 lanes"),
        ({"registers": 136}, "136 registers are fewer"),
        ({"multipliers": 3}, "threads that decode"),
    ],
)
def test_what_warpgroups_cannot_have_is_rejected(changed, reason):
    config = prefill.defaults(SPEC, "cuda", {**sizes_of(1, 32768, 512), "wgmma": 1})
    assert reason in prefill.rejected(SPEC, "cuda", config | changed)


@pytest.mark.parametrize("name", ["nvidia_l4", "nvidia_a100", "nvidia_h100"])
@pytest.mark.parametrize(
    "dims",
    [
        *((64, None), (128, None), (192, None), (256, None), (512, 128), (512, 256), (576, None)),
        (576, 256),
    ],
)
@pytest.mark.parametrize("format", ["k4v2", "tq44", "int8", "none"])
def test_defaults_fit_the_shared_memory_of_a_gpu(name, dims, format):
    """An L4's CTA has 99 KiB, an H100's 227."""
    target, spec = get_target(name), CacheSpec(dims[0], 32, 8, format=format, head_dim_v=dims[1])
    limit = target.attrs["max_shared_memory_per_block"]
    for function, queries in (("attend", 1), ("attend", 8), ("prefill", 512)):
        if function not in functions_on(spec, "cuda"):
            continue
        sizes = decision_sizes(function, sizes_of(64, 8192, queries), target)
        config = MODULES[function].defaults(spec, "cuda", sizes)
        assert MODULES[function].rejected(spec, "cuda", config, limit) is None
        instance = schedules.instantiate(function, spec, "cuda", None, sizes)
        assert instance.config == config
        assert instance.launch.get("shared_bytes", 0) < limit


@pytest.mark.parametrize("group", [1, 4, 5, 16])
@pytest.mark.parametrize("head_dim", GPU_DECODE_DIMS)
@pytest.mark.parametrize("format", ["k4v2", "tq22", "tq43", "tq44", "mse2-mse4-signed-matched"])
def test_defaults_of_decode_fit_the_smallest_gpu(format, head_dim, group):
    """Without sizes, which GPUs with clusters are given."""
    spec = CacheSpec(head_dim, 8 * group, 8, format=format)
    config = decode.DecodeConfig(**decode.defaults(spec, "cuda"))
    limit = get_target("nvidia_l4").attrs["max_shared_memory_per_block"]
    assert sum(decode.decode_shared_bytes(spec, config)) <= limit


def test_a_gpu_of_less_shared_memory_has_fewer_warps():
    spec = CacheSpec(128, 32, 8, format="tq42")
    for module, warps in ((attend, 4), (prefill, 4)):
        sizes = sizes_of(64, 8192, 8)
        small, large = ({**sizes, "shared_bytes": kib * 1024} for kib in (99, 227))
        assert module.defaults(spec, "cuda", large)["warps"] == 8
        assert module.defaults(spec, "cuda", small)["warps"] == warps
