"""Formats and specs: numbers that caches on disk and in engines depend on."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import specs, untimed

from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.formats import CODECS, ROTATIONS, SCALE_RULES, CacheFormat
from tq_tvm.spec import (
    FORMATS,
    HEAD_DIMS,
    K4V2,
    ROTATE_DIMS,
    CacheSpec,
    QuantPolicy,
    RotateSpec,
    get_format,
    parse_spec,
)

SPEC = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8)
TABLES = [CODECS[name] for name in ("qjl4", "mse2", "mse3", "mse4")]


def by_name(codec):
    return codec.name


# --- labels


@untimed
@given(specs)
def test_label_round_trip(spec):
    assert CacheSpec.parse(spec.label) == spec


@pytest.mark.parametrize("spec", [SPEC, *map(RotateSpec, ROTATE_DIMS)], ids=lambda s: s.label)
def test_any_label_round_trip(spec):
    assert parse_spec(spec.label) == spec


@pytest.mark.parametrize(
    ("label", "part"),
    [
        ("rotate_d72_bf16", "RotateSpec: dim must be one of 64, 80, 96, 112, .*, got 72"),
        ("rotate_n1024_bf16", "label must look like 'k4v2_.*' or 'rotate_d1024_bf16', got"),
        ("rotate_d1024_f8", "label must look like"),
        ("rotate_d1024_bf16_", "label must look like"),
    ],
)
def test_labels_of_no_rotation(label, part):
    with pytest.raises(UnsupportedSpecError, match=part):
        parse_spec(label)


@pytest.mark.parametrize("fields", [(1024.0,), (True,), (1024, "bfloat"), (8192,)])
def test_rotations_without_kernels(fields):
    with pytest.raises(UnsupportedSpecError, match=r"RotateSpec: (dim|dtype) must be one of"):
        RotateSpec(*fields)


@untimed
@given(specs, specs)
def test_labels_differ_as_specs_do(a, b):
    assert (a.label == b.label) == (a == b)


def test_label_is_spelled_as_documented():
    """Artifacts and tuning logs on disk are found by this text."""
    assert SPEC.label == "k4v2_d128_hq32_hk8_p64_bf16_bshd"


@pytest.mark.parametrize(
    "label",
    [
        "",
        "k4v2",
        "k4v2_d128_hq32_hk8_p64_bf16",
        "k4v2_d128_hq32_hk8_p64_bf16_bshd_x",
        "k4v2_d128_hq32_hk8_p64_bf16_bshd\n",
        " k4v2_d128_hq32_hk8_p64_bf16_bshd",
        "K4V2_d128_hq32_hk8_p64_bf16_bshd",
        "k4v2_d128_hq32_hk8_p64_bfloat16_bshd",
        "k4v2_d-128_hq32_hk8_p64_bf16_bshd",
        "k4v2_d128_hk8_hq32_p64_bf16_bshd",
    ],
)
def test_parse_rejects_other_text(label):
    with pytest.raises(UnsupportedSpecError, match=r"parse: label must look like 'k4v2_.*got"):
        CacheSpec.parse(label)


@pytest.mark.parametrize(
    ("label", "argument"),
    [
        ("k9v9_d128_hq32_hk8_p64_bf16_bshd", "name"),
        ("k4v2_d72_hq32_hk8_p64_bf16_bshd", "head_dim"),
        ("k4v2_d128_hq32_hk8_p48_bf16_bshd", "page_size"),
        ("k4v2_d128_hq30_hk8_p64_bf16_bshd", "num_q_heads"),
    ],
)
def test_parse_rejects_what_the_constructor_rejects(label, argument):
    with pytest.raises(UnsupportedSpecError, match=f"{argument} must be"):
        CacheSpec.parse(label)


# --- rejected values

DIMS = "64, 80, 96, 112, 128, 192, 256, 512, 576"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("head_dim", 72, DIMS),
        ("head_dim", 0, DIMS),
        ("page_size", 4, "8, 16, 32, 64, 128, 256"),
        ("page_size", 512, "8, 16, 32, 64, 128, 256"),
        ("dtype", "float64", "float16, bfloat16, float32"),
        ("dtype", torch.bfloat16, "float16, bfloat16, float32"),
        ("layout", "bhdk", "bshd, bhsd"),
        ("head_dim", 128.0, DIMS),
        ("head_dim_v", 72, DIMS),
        ("page_size", 64.0, "8, 16, 32, 64, 128, 256"),
    ],
)
def test_values_out_of_a_list(field, value, expected):
    with pytest.raises(UnsupportedSpecError) as error:
        dataclasses.replace(SPEC, **{field: value})
    message = str(error.value)
    assert message == f"CacheSpec: {field} must be one of {expected}, got {value!r}"


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(33, 8), (4, 8), (8, 3)])
def test_head_counts(q_heads, kv_heads):
    with pytest.raises(UnsupportedSpecError, match=f"multiple.*got {q_heads} and {kv_heads}$"):
        dataclasses.replace(SPEC, num_q_heads=q_heads, num_kv_heads=kv_heads)


@pytest.mark.parametrize("field", ["num_q_heads", "num_kv_heads"])
@pytest.mark.parametrize("count", [0, -8, 32.0, "32", True, None])
def test_head_counts_are_positive_integers(field, count):
    with pytest.raises(UnsupportedSpecError) as error:
        dataclasses.replace(SPEC, **{field: count})
    message = str(error.value)
    assert message == f"CacheSpec: {field} must be a positive integer, got {count!r}"


def test_errors_are_value_errors():
    with pytest.raises(ValueError, match="head_dim"):
        dataclasses.replace(SPEC, head_dim=1)


def test_is_immutable_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.head_dim = 64
    assert {SPEC: 1}[CacheSpec.parse(SPEC.label)] == 1


@pytest.mark.parametrize("window", [-1, 257, 1.0, None])
def test_windows_out_of_range(window):
    with pytest.raises(UnsupportedSpecError, match="window must be an integer from 0 to 256, got"):
        dataclasses.replace(SPEC, window=window)


# --- formats


@pytest.mark.parametrize(
    "name", ["k4v2", 42, QuantPolicy.TURBO_QUANT, "qjl4-mse2-plain-norm", K4V2]
)
def test_a_format_by_all_its_names(name):
    assert get_format(name) is get_format("k4v2") or get_format(name) == K4V2
    if not isinstance(name, int):
        assert dataclasses.replace(SPEC, format=name) == SPEC


def test_policies_are_the_engines_numbers():
    names = {int(policy): get_format(policy).name for policy in QuantPolicy}
    assert names == {0: "none", 4: "int4", 8: "int8", 16: "fp8", 42: "k4v2"}
    assert [get_format(name).policy for name in names.values()] == list(names)
    assert get_format("tq42").policy is None


KEY_CODECS = tuple(CODECS)
VALUE_CODECS = tuple(name for name in CODECS if name != "qjl4")


@pytest.mark.parametrize("value", VALUE_CODECS)
@pytest.mark.parametrize("key", KEY_CODECS)
def test_any_key_codec_with_any_value_codec(key, value):
    """Every combination has a label of its own that reads back, with every rotation and rule."""
    tables = "lloyd_max" in (CODECS[key].family, CODECS[value].family)
    labels = set()
    for rotation in ROTATIONS[1:] if tables else ROTATIONS:
        for rule in SCALE_RULES if tables else [None]:
            fmt = CacheFormat(CODECS[key], CODECS[value], rotation, rule)
            spec = dataclasses.replace(SPEC, format=fmt)
            assert get_format(fmt.name) == get_format(fmt.slug) == fmt
            assert parse_spec(spec.label) == spec
            assert spec.cache_format == fmt
            labels.add(spec.label)
    assert len(labels) == (8 if tables else 3)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        (("mse2", "qjl4", "hadamard", "norm"), "value must be a codec without residual signs"),
        (("mse2", "int8", "none", "norm"), "rotation must be one of hadamard, .* with mse2"),
        (("mse2", "mse2", "fourier", "norm"), "rotation must be one of"),
        (("mse2", "mse2", "hadamard", None), "scale_rule must be one of norm, .*got None"),
        (("int8", "int8", "none", "norm"), "scale_rule must be None without a Lloyd-Max codec"),
    ],
)
def test_formats_that_mean_nothing(fields, part):
    key, value, *options = fields
    with pytest.raises(UnsupportedSpecError, match=f"CacheFormat: {part}"):
        CacheFormat(CODECS[key], CODECS[value], *options)


UNKNOWN = [
    "42", "K4V2", 3, "", True, 42.0, "mse4-mse2-matched-signed", "mse4_mse2", "mse4-mse2-signed-x",
]  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_formats(name):
    with pytest.raises(UnsupportedSpecError):
        get_format(name)
    with pytest.raises(UnsupportedSpecError):
        dataclasses.replace(SPEC, format=name)


def test_the_error_names_presets_and_policies():
    with pytest.raises(
        UnsupportedSpecError, match=r"one of 'k4v2' \(42\), 'tq22', .*slug.*got 'x'"
    ):
        get_format("x")


def test_presets_cost_what_the_documents_say():
    """Bytes of a token and head at head_dim 128."""
    sizes = {name: dataclasses.replace(SPEC, format=name).bytes_per_token_head for name in FORMATS}
    assert sizes == {
        "k4v2": 102, "tq22": 68, "tq32": 84, "tq33": 100, "tq42": 100, "tq43": 116, "tq44": 132,
        "tq84": 198, "int4": 136, "int8": 264, "fp8": 256, "none": 512,
    }  # fmt: skip


def test_what_readers_need_not_know():
    """A scale rule is decided when filling: other functions are the same for all of them."""
    for rule in ("unbiased", "matched", "leastsquares"):
        spec = dataclasses.replace(SPEC, format=f"qjl4-mse2-plain-{rule}")
        for function in ("decode", "attend", "prefill", "flatten", "flatten_unrotated", "rotate"):
            assert spec.relevant_to(function) == SPEC.relevant_to(function)
        assert spec.relevant_to("fill_slots") != SPEC.relevant_to("fill_slots")


# --- functions


@pytest.mark.parametrize(
    ("function", "ignored"),
    [
        ("rotate", {"num_q_heads", "num_kv_heads", "page_size", "layout"}),
        ("fill_slots", {"num_q_heads"}),
        ("flatten", {"num_q_heads"}),
        ("decode", set()),
        ("attend", set()),
    ],
)
def test_relevant_fields(function, ignored):
    changes = {
        "head_dim": 64,
        "num_q_heads": 64,
        "num_kv_heads": 4,
        "page_size": 16,
        "dtype": "float16",
        "layout": "bhsd",
    }
    for field, value in changes.items():
        same = dataclasses.replace(SPEC, **{field: value}).relevant_to(function)
        assert (same == SPEC.relevant_to(function)) == (field in ignored)


# --- bytes


@pytest.mark.parametrize(
    ("head_dim", "dtype", "expected"),
    [
        (64, "bfloat16", 54),
        (128, "bfloat16", 102),
        (128, "float16", 102),
        (256, "bfloat16", 198),
        (128, "float32", 108),
    ],
)
def test_bytes_of_a_token_and_head(head_dim, dtype, expected):
    """D/2 + D/4 bytes of codes and three scales."""
    spec = CacheSpec(head_dim, 32, 8, dtype=dtype)
    assert spec.bytes_per_token_head == expected
    assert spec.bytes_per_token == 8 * expected
    assert spec.page_bytes == 64 * 8 * expected


def test_compression():
    assert SPEC.compression == pytest.approx(512 / 102)
    assert dataclasses.replace(SPEC, dtype="float32").compression == pytest.approx(1024 / 108)


@untimed
@given(specs, st.integers(1, 9))
def test_bytes_are_those_of_the_tensors(spec, pages):
    total = sum(
        math.prod(shape) * getattr(torch, dtype).itemsize
        for shape, dtype in spec.tensor_shapes(pages).values()
    )
    assert total == pages * spec.page_bytes


def test_tensor_shapes():
    assert SPEC.tensor_shapes(7) == {
        "k_cache": ((7, 64, 8, 64), "uint8"),
        "v_cache": ((7, 64, 8, 32), "uint8"),
        "k_meta": ((7, 64, 8, 2), "bfloat16"),
        "v_meta": ((7, 64, 8, 1), "bfloat16"),
    }
    assert list(SPEC.tensor_shapes(1)) == ["k_cache", "v_cache", "k_meta", "v_meta"]
    bhsd = dataclasses.replace(SPEC, layout="bhsd", dtype="float16").tensor_shapes(7)
    assert bhsd["k_cache"] == ((7, 8, 64, 64), "uint8")
    assert bhsd["v_meta"] == ((7, 8, 64, 1), "float16")


# --- codebooks


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def integral(function, low: float, high: float, steps: int = 4000) -> float:
    """Simpson's rule."""
    h = (high - low) / steps
    inner = sum((4 if i % 2 else 2) * function(low + i * h) for i in range(1, steps))
    return (function(low) + inner + function(high)) * h / 3


@pytest.mark.parametrize("codec", TABLES, ids=by_name)
def test_codebook_is_sorted_and_symmetric(codec):
    for table in (codec.centroids, codec.boundaries):
        assert list(table) == sorted(set(table))
        assert [-x for x in reversed(table)] == list(table)
    assert len(codec.centroids) == len(codec.boundaries) + 1


@pytest.mark.parametrize("codec", TABLES, ids=by_name)
def test_boundaries_are_midpoints(codec):
    """Nearest-neighbour condition of Lloyd-Max, to the digits that the tables have."""
    for low, high, boundary in zip(
        codec.centroids, codec.centroids[1:], codec.boundaries, strict=False
    ):
        assert boundary == pytest.approx((low + high) / 2, abs=1e-6)


@pytest.mark.parametrize("codec", TABLES, ids=by_name)
def test_centroids_are_means_of_their_cells(codec):
    """Centroid condition of Lloyd-Max: with the one above it makes the quantiser of N(0, 1)."""
    edges = [-12.0, *codec.boundaries, 12.0]
    for low, high, centroid in zip(edges, edges[1:], codec.centroids, strict=False):
        mean = integral(lambda x: x * density(x), low, high) / integral(density, low, high)
        assert centroid == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("codec", TABLES, ids=by_name)
def test_bits_hold_the_codes(codec):
    assert 2**codec.bits == len(codec.centroids) * (2 if codec.residual_sign else 1)
    for head_dim in HEAD_DIMS:
        assert codec.packed_bytes(head_dim) * 8 == head_dim * codec.bits
        assert codec.head_dim_of(codec.packed_bytes(head_dim)) == head_dim
    assert sum(codec.plane_bits) == codec.bits


def test_formats_are_found_by_their_own_name():
    assert all(fmt.name == name for name, fmt in FORMATS.items())
