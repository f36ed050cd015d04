"""``served``: which functions there are of a spec, and how the others are refused."""

from __future__ import annotations

import dataclasses

import pytest

from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.served import attends_to_one, check_target, functions_on
from tq_tvm.spec import CacheSpec, RotateSpec
from tq_tvm.targets import get_target

SPEC = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8)


@pytest.mark.parametrize(
    "spec",
    [
        dataclasses.replace(SPEC, dtype="float32"),
        dataclasses.replace(SPEC, head_dim_v=64, dtype="float32", window=16),
        RotateSpec(576, "float32"),
    ],
    ids=lambda s: s.label,
)
def test_gpus_refuse_what_they_have_no_kernel_of(spec):
    with pytest.raises(UnsupportedSpecError, match=f"op: spec must be one that .*{spec.label}"):
        check_target("op", spec, "cuda")
    check_target("op", spec, "llvm")
    for served in (
        SPEC, dataclasses.replace(SPEC, head_dim=256), RotateSpec(576), RotateSpec(4096)
    ):  # fmt: skip
        check_target("op", served, "cuda")
        assert functions_on(served, "cuda") == served.functions


@pytest.mark.parametrize(
    ("dims", "format", "decodes"),
    [
        ((128, 512), "k4v2", False),
        ((512, 512), "k4v2", True),
        ((512, 512), "int8", False),
        ((576, 576), "k4v2", False),
        ((576, 64), "int4", False),
        ((64, 576), "fp8", False),
    ],
    ids=str,
)
def test_long_rows_are_attended_to_without_prefill(dims, format, decodes):
    """By decode, too, where K and V have 512 values."""
    spec = dataclasses.replace(SPEC, head_dim=dims[0], head_dim_v=dims[1], format=format)
    missing = {"prefill"} if decodes else {"decode", "decode_featured", "prefill"}
    assert set(functions_on(spec, "cuda")) == set(SPEC.functions) - missing


def test_latent_caches_have_a_function_of_their_own():
    latent = CacheSpec(512, 128, 1, format="mse4-none-signed-matched", head_dim_v=64)
    assert "mla" in functions_on(latent, "llvm")
    assert [part.value_dim for part in latent.latent_parts] == [512, 64]
    changes = [{"num_kv_heads": 2}, {"head_dim_v": 128}, {"window": 3}, {"format": "tq44"}]
    for change in (*changes, {"format": "qjl4-none-plain-norm"}):
        other = dataclasses.replace(latent, **change)
        assert "mla" not in functions_on(other, "llvm")
        with pytest.raises(UnsupportedSpecError, match="op: spec must be a latent cache's"):
            check_target("op", other, "llvm", "mla")


def test_gpus_attend_to_latents_where_warpgroups_multiply():
    latent = CacheSpec(512, 128, 1, format="mse4-none-signed-matched", head_dim_v=64)
    check_target("op", latent, "cuda", "mla")
    for name in ("nvidia_h100", "nvidia_h200"):
        assert get_target(name).functions(latent) == functions_on(latent, "cuda")
    others = set(functions_on(latent, "cuda")) - {"mla"}
    assert {"fill_slots", "fill_table", "flatten"} <= others
    for name in ("nvidia_a100", "nvidia_b200", "nvidia_l40s"):
        assert set(get_target(name).functions(latent)) == others
    assert "mla" in get_target("x86_64_v3").functions(latent)
    assert functions_on(dataclasses.replace(latent, dtype="float32"), "cuda") == ()
    with pytest.raises(UnsupportedSpecError, match="a latent cache"):
        check_target("op", latent, "cuda", "attend")


@pytest.mark.parametrize(
    "name", ["tq43", "int8", "int4", "fp8", "none", "tq84", "mse2-fp8-plain-norm"]
)
def test_gpus_have_some_functions_of_other_formats(name):
    """What there is not is refused by name."""
    spec = dataclasses.replace(SPEC, format=name, head_dim=64)
    assert set(functions_on(spec, "llvm")) - set(functions_on(spec, "cuda")) == {"decode"}
    assert set(functions_on(spec, "cuda")) - set(functions_on(spec, "llvm")) == {"prefill"}
    assert "decode_featured" in functions_on(SPEC, "cuda")
    windowed = dataclasses.replace(spec, window=16)
    assert set(functions_on(spec, "cuda")) - set(functions_on(windowed, "cuda")) == {"prefill"}
    check_target("op", spec, "cuda")
    check_target("op", spec, "cuda", "fill_slots")
    with pytest.raises(UnsupportedSpecError, match=f"op: spec .* got {spec.label} for decode;"):
        check_target("op", spec, "cuda", "decode")
    for served in ("tq43", "tq44"):
        check_target("op", dataclasses.replace(SPEC, format=served), "cuda", "decode")
    check_target("op", dataclasses.replace(SPEC, format="tq44", head_dim=64), "cuda", "decode")


@pytest.mark.parametrize(
    ("dims", "decodes"),
    [((128, None), True), ((512, None), True), ((96, None), False), ((512, 64), False)],
    ids=str,
)
def test_gpus_read_a_window_by_decode_and_attend(dims, decodes):
    """By attend alone where it does what decode does."""
    spec = dataclasses.replace(SPEC, head_dim=dims[0], head_dim_v=dims[1], window=16)
    missing = {"prefill"} if decodes else {"decode", "decode_featured", "prefill"}
    assert set(spec.functions) - set(functions_on(spec, "cuda")) == missing
    with pytest.raises(UnsupportedSpecError, match=f"got {spec.label} for prefill; use"):
        check_target("op", spec, "cuda", "prefill")


@pytest.mark.parametrize("dims", [(80, 80), (96, 112), (192, 128), (128, 64)], ids=str)
def test_gpus_attend_where_they_do_not_decode(dims):
    """Head_dims that are no power of two, and of K and V different ones."""
    spec = dataclasses.replace(SPEC, head_dim=dims[0], head_dim_v=dims[1])
    check_target("op", RotateSpec(dims[0]), "cuda")
    without = set(spec.functions) - set(functions_on(spec, "cuda"))
    assert without == {"decode", "decode_featured"}
    with pytest.raises(UnsupportedSpecError, match=r"one head_dim of 64, 128, 256, .* for decode"):
        check_target("op", spec, "cuda", "decode")


@pytest.mark.parametrize(
    ("changes", "context", "attended"),
    [
        ({}, 1 << 20, False),
        ({"num_q_heads": 72}, 2048, True),
        ({"num_q_heads": 72}, 2047, False),
        ({"num_q_heads": 72, "window": 16}, 8192, False),
        ({"num_q_heads": 72, "head_dim": 256}, 8192, True),
        ({"num_q_heads": 72, "head_dim": 512}, 8192, False),
    ],
)
def test_one_query_of_many_heads_is_attended_to(changes, context, attended):
    assert attends_to_one(dataclasses.replace(SPEC, **changes), context) == attended
