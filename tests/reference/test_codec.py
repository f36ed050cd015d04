"""``reference.codec`` against an independent implementation, the equations and the theory."""

from __future__ import annotations

import math

import independent
import pytest
import torch
from rows import KINDS, rows

from tq_tvm import reference
from tq_tvm.spec import HEAD_DIMS, K4V2, Codec

QJL4, MSE2 = CODECS = [K4V2.key, K4V2.value]
INDEPENDENT = {"qjl4": independent.encode_key, "mse2": independent.encode_value}

# float32 against float64: only values this near to a decision may get another code.
TIE = 1e-5


def by_name(codec):
    return codec.name


def decoded(rotated, codec):
    """Rows after encoding and decoding, scales in float32."""
    return reference.decode_rows(*reference.encode_rows(rotated, codec), codec)


@pytest.mark.parametrize("codec", CODECS, ids=by_name)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_encodes_as_the_independent_implementation(kind, head_dim, codec):
    x = rows(kind, 12, head_dim)
    packed, scales = reference.encode_rows(reference.hadamard_rotate(x), codec)
    ties = 0
    for row, got, got_scales in zip(x.tolist(), packed.tolist(), scales.tolist(), strict=True):
        want, want_scales, margins = INDEPENDENT[codec.name](row)
        if got != want:
            assert min(margins) < TIE
            ties += 1
        assert got_scales == pytest.approx(want_scales, rel=1e-5)
    assert ties <= 1


def from_equations(packed, scales, head_dim, key):
    """One row, by k = n (c3[idx]/sqrt(D) + g sign) and v = n c2[idx]/sqrt(D)."""
    root = math.sqrt(head_dim)
    row = []
    for i in range(head_dim):
        if key:
            nibble = packed[i % (head_dim // 2)] >> (4 if i >= head_dim // 2 else 0) & 15
            sign = 1.0 if nibble & 8 else -1.0
            row.append(scales[0] * (independent.C3[nibble & 7] / root + scales[1] * sign))
        else:
            index = packed[i % (head_dim // 4)] >> 2 * (i // (head_dim // 4)) & 3
            row.append(scales[0] * independent.C2[index] / root)
    return row


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("codec", CODECS, ids=by_name)
def test_decodes_any_bytes_by_the_equations(codec, head_dim):
    generator = torch.Generator().manual_seed(0)
    shape = (9, codec.packed_bytes(head_dim))
    packed = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    scales = torch.rand(9, len(codec.meta), generator=generator) + 0.5
    got = reference.decode_rows(packed, scales, codec)
    assert got.dtype == torch.float32
    for i in range(9):
        want = from_equations(packed[i].tolist(), scales[i].tolist(), head_dim, codec is QJL4)
        torch.testing.assert_close(got[i], torch.tensor(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decodes_scales_of_the_models_dtype(dtype):
    packed, scales = reference.encode_rows(rows("gaussian", 4, 128), QJL4)
    narrow = scales.to(dtype)
    got = reference.decode_rows(packed, narrow, QJL4)
    assert torch.equal(got, reference.decode_rows(packed, narrow.float(), QJL4))


def test_a_value_on_a_decision():
    """A boundary belongs to the cell below it, and a residual of zero counts as positive."""
    zero = torch.zeros(1, 128)
    packed, scales = reference.encode_rows(zero, QJL4)
    # idx 3, whose centroid is below zero, and so a positive residual.
    assert packed.unique().tolist() == [0xBB]
    assert scales[0].tolist() == pytest.approx(
        [1e-4, math.sqrt(128 * 0.2450942**2 / 128 + 1e-8) / math.sqrt(128)], rel=1e-5
    )
    packed, _ = reference.encode_rows(zero, MSE2)
    assert packed.unique().tolist() == [0b01010101]

    # In a codec whose arithmetic is exact: residuals of zero.
    exact = Codec("exact", 2, (-1.0, 1.0), (0.0,), residual_sign=True, meta=("norm", "residual"))
    alternating = torch.tensor([1.0, -1.0]).repeat(32)[None]
    codes = reference.unpack_codes(reference.encode_rows(alternating, exact)[0], 2)[0]
    assert codes[:2].tolist() == [1 | 2, 0 | 2]


def test_codes_far_from_any_decision():
    """Coordinates of magnitude 1/sqrt(D) lie between 0.50 and 1.05, above the centroid 0.756."""
    alternating = torch.tensor([1.0, -1.0]).repeat(64)[None]
    codes = reference.unpack_codes(reference.encode_rows(alternating, QJL4)[0], 4)[0]
    assert codes[:2].tolist() == [5 | 8, 2]
    codes = reference.unpack_codes(reference.encode_rows(alternating, MSE2)[0], 2)[0]
    assert codes[:2].tolist() == [3, 0]


def lloyd_max_error(codec) -> float:
    """Expected squared error of a coordinate of N(0, 1), by numeric integration."""
    steps, reach = 240000, 12.0
    x = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * 2 * reach - reach
    weight = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (2 * reach / steps)
    boundaries = torch.tensor(codec.boundaries, dtype=torch.float64)
    centroids = torch.tensor(codec.centroids, dtype=torch.float64)
    residual = x - centroids[torch.bucketize(x, boundaries)]
    if codec.residual_sign:
        residual = residual.abs() - (residual.square() * weight).sum().sqrt()
    return float((residual.square() * weight).sum())


def test_theory_is_the_papers():
    """Theorem 1 of arXiv 2504.19874 at 2 bits."""
    assert lloyd_max_error(MSE2) == pytest.approx(0.1175, abs=1e-4)


# Figures of the format at head_dim 128; a mean over 4096 rows is right to a few in ten thousand.
@pytest.mark.parametrize(
    ("codec", "distortion", "cosine"),
    [(QJL4, 0.0130, 0.9936), (MSE2, 0.1163, 0.9405)],
    ids=["qjl4", "mse2"],
)
def test_distortion_of_gaussian_rows(codec, distortion, cosine):
    y = reference.hadamard_rotate(rows("gaussian", 4096, 128))
    got = decoded(y, codec)
    error = ((got - y).square().sum(-1) / y.square().sum(-1)).mean().item()
    assert error == pytest.approx(distortion, rel=0.01)
    assert torch.cosine_similarity(got, y, dim=-1).mean().item() == pytest.approx(cosine, abs=5e-4)


@pytest.mark.parametrize("codec", CODECS, ids=by_name)
def test_distortion_nears_theory_as_rows_grow(codec):
    """A normalised row of D values is nearly D values of N(0, 1)/sqrt(D)."""
    theory = lloyd_max_error(codec)
    for head_dim in HEAD_DIMS:
        y = rows("gaussian", 4096, head_dim)
        error = ((decoded(y, codec) - y).square().sum(-1) / y.square().sum(-1)).mean().item()
        assert error == pytest.approx(theory, rel=6 / head_dim)


@pytest.mark.parametrize("codec", CODECS, ids=by_name)
def test_keeps_the_direction_whatever_the_length(codec):
    """Codes ignore the length of a row, scales are proportional to it."""
    y = rows("gaussian", 64, 128)
    packed, scales = reference.encode_rows(y, codec)
    for factor in (2.0**-6, 2.0**10):
        other, other_scales = reference.encode_rows(y * factor, codec)
        assert torch.equal(other, packed)
        torch.testing.assert_close(other_scales[:, 0], scales[:, 0] * factor)


def test_a_keys_error_is_not_a_change_of_slope():
    """Logits q.k^ over q.k: the residual's sign makes their slope one within a hundredth."""
    k, q = rows("gaussian", 4096, 128, seed=1), rows("gaussian", 4096, 128, seed=2)
    exact, got = (q * k).sum(-1), (q * decoded(k, QJL4)).sum(-1)
    slope = ((exact * got).sum() / exact.square().sum()).item()
    assert slope == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("codec", CODECS, ids=by_name)
@pytest.mark.parametrize("kind", KINDS)
def test_boundary_distance(kind, codec):
    x = rows(kind, 3, 64)
    got = reference.boundary_distance(reference.hadamard_rotate(x), codec)
    assert got.shape == x.shape
    for row, distances in zip(x.tolist(), got, strict=True):
        _, _, margins = INDEPENDENT[codec.name](row)
        torch.testing.assert_close(distances, torch.tensor(margins).float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS, ids=by_name)
def test_constants_are_those_of_the_independent_implementation(codec):
    centroids, boundaries = {
        "qjl4": (independent.C3, independent.B3),
        "mse2": (independent.C2, independent.B2),
    }[codec.name]
    assert list(codec.centroids) == centroids
    assert list(codec.boundaries) == boundaries
