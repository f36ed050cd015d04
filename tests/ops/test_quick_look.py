"""The quick look at arguments on a GPU's hot path: what the checks refuse does not pass it."""

from __future__ import annotations

import pytest
import torch

from tq_tvm import CacheSpec, PagedKVCache
from tq_tvm.ops._check import suspect_rows
from tq_tvm.ops._check_caches import suspect_caches

CACHES = ("k_cache", "v_cache", "k_meta", "v_meta")


@pytest.fixture(params=[False, True], ids=["planes", "pages"])
def caches(request):
    cache = PagedKVCache(CacheSpec(64, 4, 2, page_size=16), 6, contiguous_pages=request.param)
    return dict(zip(CACHES, cache.tensors(), strict=True))


@pytest.fixture
def rows():
    return torch.zeros(6, 4, 64, dtype=torch.bfloat16)


def off_by_one(tensor):
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


def far_apart(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_strided(
        tensor.shape, (2**31, *tensor.stride()[1:])
    )


def test_good_arguments_pass(caches, rows):
    assert not suspect_caches(**caches)
    assert not suspect_rows(rows, rows)
    assert not suspect_rows(rows, rows.clone(), apart=True)
    assert not suspect_rows(rows.flatten()[: 4 * 64].view(4, 64), rows[0], compact=True)


@pytest.mark.parametrize("spoil", [far_apart, torch.Tensor.to_sparse, lambda t: t.flatten()[0]])
@pytest.mark.parametrize("name", CACHES)
def test_wrong_caches(caches, name, spoil):
    assert suspect_caches(**caches | {name: spoil(caches[name])})


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k_meta"])
def test_misaligned_caches(caches, name):
    assert suspect_caches(**caches | {name: off_by_one(caches[name])})


@pytest.mark.parametrize("name", ["k_meta", "v_meta"])
def test_negated_scales(caches, name):
    assert suspect_caches(**caches | {name: torch._neg_view(caches[name])})


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("spoil", [off_by_one, torch._neg_view, torch.Tensor.to_sparse])
def test_wrong_rows(rows, spoil, compact):
    assert suspect_rows(rows, spoil(rows), compact=compact)
    assert suspect_rows(spoil(rows), rows, compact=compact)


def test_misaligned_stride(rows):
    wide = torch.zeros(6, 4 * 64 + 1, dtype=rows.dtype)[:, :-1]
    assert suspect_rows(rows, wide)


def test_the_same_rows(rows):
    assert suspect_rows(rows, rows, apart=True)


@pytest.mark.parametrize("ahead", [4, -4])
def test_rows_that_overlap(ahead):
    many = torch.zeros(16, 64, dtype=torch.bfloat16)
    first, second = many[4:12], many[4 + ahead : 12 + ahead]
    assert suspect_rows(first, second, compact=True)
    assert not suspect_rows(many[:8], many[8:], compact=True, apart=True)
