"""Every codec against an independent implementation, the test vectors, and what formats promise."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import independent
import pytest
import torch
from rows import KINDS, rows

from tq_tvm import reference
from tq_tvm.formats import CODECS, LAYOUT_VERSION, SCALE_RULES, get_format

VECTORS = Path(__file__).parents[1] / "vectors"
TABLES = ("qjl4", "mse2", "mse3", "mse4")
RULES = {name: SCALE_RULES if name in TABLES else (None,) for name in CODECS}
EVERY = [(name, rule) for name, rules in RULES.items() for rule in rules]
PACKED = [(name, rule) for name, rule in EVERY if name != "none"]

# float32 against float64: only values this near to a decision may get another code.
TIE = 1e-5


def coded(x, codec, rule, dtype=torch.bfloat16, tensor_scale=1.0):
    """Rows after encoding and decoding, with scales as the model's dtype keeps them."""
    packed, scales = reference.encode_rows(x, codec, rule, tensor_scale=tensor_scale, dtype=dtype)
    return reference.decode_rows(packed, scales.to(dtype), codec, tensor_scale=tensor_scale)


# --- bytes


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize(("name", "rule"), PACKED)
def test_encodes_as_the_independent_implementation(name, rule, dim):
    codec, ties = CODECS[name], 0
    x = torch.cat([rows(kind, 3, dim, seed=1) for kind in KINDS])
    packed, scales = reference.encode_rows(x, codec, rule, tensor_scale=0.5)
    near = reference.boundary_distance(x, codec).amin(-1)
    for i, row in enumerate(x.tolist()):
        want, want_scales = independent.encode(name, row, rule, tensor_scale=0.5)
        if packed[i].tolist() != want:
            assert near[i] < TIE
            ties += 1
        assert scales[i].tolist() == pytest.approx(want_scales, rel=2e-5)
    assert ties <= 1


@pytest.mark.parametrize("dim", [64, 112])
@pytest.mark.parametrize("name", [name for name in CODECS if name != "none"])
def test_decodes_any_bytes_as_the_independent_implementation(name, dim):
    codec = CODECS[name]
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (5, codec.packed_bytes(dim)), generator=generator).byte()
    scales = torch.rand(5, len(codec.meta), generator=generator) + 0.5
    got = reference.decode_rows(packed, scales, codec, tensor_scale=0.5)
    for i in range(5):
        want = independent.decode(name, packed[i].tolist(), scales[i].tolist(), 0.5)
        torch.testing.assert_close(got[i], torch.tensor(want), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_every_byte_of_fp8_survives():
    every = torch.arange(256).byte()
    values = reference.decode_rows(every, torch.empty(0), CODECS["fp8"])
    again, _ = reference.encode_rows(values, CODECS["fp8"])
    assert again[0x7F] == again[0xFF] == 0x7F
    kept = (every & 0x7F) != 0x7F
    assert torch.equal(again[kept], every[kept])


@pytest.mark.parametrize(("name", "rule"), EVERY)
def test_round_trips_are_deterministic(name, rule):
    """The same bytes again, and for any batch around the row."""
    x = rows("gaussian", 7, 128)
    first, scales = reference.encode_rows(x, CODECS[name], rule)
    second, second_scales = reference.encode_rows(x[3:4], CODECS[name], rule)
    assert torch.equal(first[3:4], second) and torch.equal(scales[3:4], second_scales)


# --- test vectors


def vectors():
    for path in sorted(VECTORS.glob("*.json")):
        file = json.loads(path.read_text())
        for number, row in enumerate(file["rows"]):
            yield pytest.param(file, row, id=f"{path.stem}-{number}")


def test_there_are_vectors_of_every_codec_and_version():
    files = [json.loads(path.read_text()) for path in VECTORS.glob("*.json")]
    assert {file["codec"] for file in files} == set(CODECS)
    assert {file["layout_version"] for file in files} == {LAYOUT_VERSION}


@pytest.mark.parametrize(("file", "row"), list(vectors()))
def test_vectors_are_read_by_an_independent_reader(file, row):
    codec, signed = file["codec"], row["rotation"] == "signed_hadamard"
    stored = list(bytes.fromhex(row["bytes"]))
    if codec == "none":
        values = torch.tensor(stored, dtype=torch.uint8).view(torch.float16).float().tolist()
    else:
        values = independent.decode(codec, stored, row["scales"], row["tensor_scale"] or 1.0)
    if row["rotation"] != "none":
        values = independent.rotate_back(values, signed)
    assert list(values) == pytest.approx(row["values"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("file", "row"), [p for p in vectors() if not p.id.startswith("none")])
def test_vectors_are_written_by_an_independent_writer(file, row):
    x = row["row"]
    if row["rotation"] != "none":
        x = independent.rotate(x, row["rotation"] == "signed_hadamard")
    packed, scales = independent.encode(
        file["codec"], x, row["scale_rule"], row["tensor_scale"] or 1.0
    )
    assert bytes(packed).hex() == row["bytes"]
    assert row["scales"] == pytest.approx(scales, rel=1e-3)


def test_vectors_are_what_the_reference_makes():
    spec = importlib.util.spec_from_file_location("make", VECTORS / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    for codec in CODECS.values():
        file = json.loads((VECTORS / f"{codec.name}.json").read_text())
        for old, new in zip(file["rows"], make.contents(codec)["rows"], strict=True):
            assert old.keys() == new.keys()
            assert old["bytes"] == new["bytes"] and old["row"] == new["row"]
            assert old["values"] == pytest.approx(new["values"], rel=1e-3, abs=1e-5)


# --- what scale rules promise


def products(x, got, rows_of_queries=2048):
    q = rows("gaussian", rows_of_queries, x.shape[-1], seed=9)
    return x @ q.T, got @ q.T


def slope(x, got):
    exact, coded_ = products(x, got)
    return float((exact * coded_).sum() / exact.square().sum())


@pytest.mark.parametrize("name", TABLES)
def test_unbiased_has_logits_of_slope_one(name):
    x = rows("gaussian", 8192, 128)
    assert slope(x, coded(x, CODECS[name], "unbiased")) == pytest.approx(1, abs=3e-3)


def test_norm_has_the_slope_of_the_seed():
    x = rows("gaussian", 8192, 128)
    assert slope(x, coded(x, CODECS["qjl4"], "norm")) == pytest.approx(0.982, abs=3e-3)


@pytest.mark.parametrize("name", TABLES)
def test_matched_keeps_lengths(name):
    x = rows("heavy_tailed", 256, 128)
    got = coded(x, CODECS[name], "matched", torch.float32)
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", TABLES)
def test_least_squares_has_the_least_distortion(name):
    x = rows("heavy_tailed", 256, 128)
    errors = {
        rule: (coded(x, CODECS[name], rule, torch.float32) - x).square().sum(-1)
        for rule in SCALE_RULES
    }
    # qjl4's norm has another residual.
    for rule in ("matched", "unbiased", *(["norm"] if name != "qjl4" else [])):
        assert bool((errors["least_squares"] <= errors[rule] * (1 + 1e-5)).all()), rule


def test_unbiased_products_are_exact_with_the_row_itself():
    x = rows("gaussian", 64, 128)
    got = coded(x, CODECS["mse2"], "unbiased", torch.float32)
    torch.testing.assert_close((x * got).sum(-1), x.square().sum(-1), rtol=1e-5, atol=0)


# --- rows that are not ordinary


def unusual(dim=128):
    """Ordinary rows around one of each kind."""
    x = rows("gaussian", 6, dim)
    x[1] = 0
    x[2] = 0
    x[2, 5] = 1e4
    x[3] = rows("gaussian", dim, seed=3) * 6e-8
    x[4, 7] = math.inf
    x[5, 7] = math.nan
    return x


@pytest.mark.parametrize(("name", "rule"), EVERY)
@pytest.mark.parametrize("rotation", ["none", "signed_hadamard"])
def test_unusual_rows(name, rule, rotation):
    codec = CODECS[name]
    if codec.family == "lloyd_max" and rotation == "none":
        pytest.skip("Lloyd-Max codecs are of rotated rows")
    x = unusual().half().float()
    y = reference.rotate_rows(x, rotation)
    scale = 64.0 if name == "fp8" else 1.0
    got = coded(y, codec, rule, torch.float16, scale)
    back = reference.rotate_back(got, rotation)
    assert bool(back[:4].isfinite().all())
    alone = reference.rotate_back(coded(y[:1], codec, rule, torch.float16, scale), rotation)
    torch.testing.assert_close(back[:1], alone)
    assert back[1].abs().max() <= (1e-4 if rule == "norm" else 0)
    error = float((back[2] - x[2]).norm() / 1e4)
    assert error <= {2: 0.7, 3: 0.6, 4: 0.4, 8: 0.05, 16: 1e-3}[codec.bits]
    if name == "none" and rotation == "none":
        torch.testing.assert_close(back, x, rtol=0, atol=0, equal_nan=True)
    elif name == "fp8":
        assert bool(back[5].isnan().any())
    else:
        assert not bool(back[4].isfinite().any() or back[5].isfinite().any())


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("value", [0.0, 3.0, -0.125, 6e4])
def test_constant_rows_of_affine_codecs(name, value):
    """A seed's scale of 0 would make them nan; a nearly constant row's zero must not overflow."""
    x = torch.full((2, 64), value)
    x[1, 3] *= 1 + 2**-9
    got = coded(x, CODECS[name], None, torch.float16)
    torch.testing.assert_close(got, x, rtol=2e-3, atol=0)


# --- the formats against each other


def divergence(k, got, q):
    """Mean KL of the attention weights of q over k from those over the coded rows."""
    true, other = ((q @ t.T * k.shape[-1] ** -0.5).log_softmax(-1) for t in (k, got))
    return float((true.exp() * (true - other)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["gaussian", "offset"])
def test_tq42_is_better_than_k4v2_in_fewer_bytes(kind):
    """Distortion of keys, and KL of the weights at logits of standard deviation 1 and 2."""
    k, q = rows(kind, 4096, 128, seed=1), rows("gaussian", 128, 128, seed=2)
    both = {}
    for name in ("k4v2", "tq42"):
        fmt = get_format(name)
        y = reference.rotate_rows(k, fmt.rotation)
        both[name] = reference.rotate_back(coded(y, fmt.key, fmt.scale_rule), fmt.rotation)
    got = both["tq42"]
    distortion = float(((got - k).square().sum(-1) / k.square().sum(-1)).mean())
    assert distortion <= 0.0095
    for scale in (1.0, 2.0):
        ours, theirs = (divergence(k, both[name], scale * q) for name in ("tq42", "k4v2"))
        assert ours <= 0.75 * theirs
