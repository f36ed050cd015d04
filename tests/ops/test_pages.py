"""Pages copied, swapped and moved, all planes together."""

from __future__ import annotations

import pytest
import torch

from tq_tvm import (
    ArgumentTypeError,
    ArgumentValueError,
    CacheSpec,
    PagedKVCache,
    copy_pages,
    table_from_indptr,
    table_to_indptr,
)


def index(values):
    """A tensor of indices, or of what is none."""
    return torch.tensor(values, dtype=torch.int32 if isinstance(values[0], int) else None)


SPEC = CacheSpec(64, 4, 2, 16)
PAGES = 6


def filled(device, pages=PAGES, **options):
    """Two layers of random bytes."""
    cache = PagedKVCache(SPEC, pages, device, formats=["k4v2", "fp8"], **options)
    for layer in range(2):
        for tensor in cache.tensors(layer):
            tensor.copy_(torch.randint(0, 100, tensor.shape))
    return cache


def contents(cache):
    return [t.cpu().clone() for layer in range(2) for t in cache.tensors(layer)]


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pages_move_at_once(device, contiguous, dtype):
    """A swap, a chain and a fork: every source is what it was before the call."""
    cache = filled(device, contiguous_pages=contiguous)
    before = contents(cache)
    cache.copy_pages(torch.tensor([[0, 1], [1, 0], [3, 4], [4, 5]], dtype=dtype, device=device))
    for old, new in zip(before, contents(cache), strict=True):
        assert torch.equal(new, old[[1, 0, 2, 3, 3, 4]])


def test_to_the_host_and_back(device):
    cache, host = filled(device), filled("cpu", pages=3)
    before, kept = contents(cache), contents(host)
    cache.copy_pages(torch.tensor([[5, 0], [2, 1]], device=device), host)
    for old, new, rest in zip(before, contents(host), kept, strict=True):
        assert torch.equal(new[:2], old[[5, 2]]) and torch.equal(new[2:], rest[2:])
    host.copy_pages(torch.tensor([[0, 2], [1, 5]]), cache)
    for old, new in zip(before, contents(cache), strict=True):
        assert torch.equal(new, old[[0, 1, 5, 3, 4, 2]])


def test_nothing_to_copy(device):
    cache = filled(device)
    before = contents(cache)
    cache.copy_pages(torch.zeros(0, 2, dtype=torch.int64, device=device))
    assert all(map(torch.equal, before, contents(cache)))


@pytest.mark.gpu
def test_in_a_graph(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs are of GPUs")
    cache = filled(device)
    before, pairs = contents(cache), torch.tensor([[0, 1], [1, 0]], device=device)
    copy_pages(cache.tensors(), pairs[:0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy_pages(cache.tensors(), pairs)
    graph.replay()
    for old, new in zip(before[:4], contents(cache)[:4], strict=True):
        assert torch.equal(new, old[[1, 0, 2, 3, 4, 5]])


@pytest.mark.parametrize(
    ("pairs", "error", "part"),
    [
        ([[0, 6]], ArgumentValueError, "pairs must be pages 0 to 5 to copy to, got 6"),
        ([[-1, 2]], ArgumentValueError, "pairs must be pages 0 to 5 to copy from, got -1"),
        ([[0, 2], [1, 2]], ArgumentValueError, "pairs must be no page that is written twice"),
        ([[0, 1, 2]], ArgumentValueError, r"pairs must be of shape \[N, 2\]"),
        ([[0.0, 1.0]], ArgumentTypeError, "pairs must be"),
    ],
)
def test_pairs_that_cannot_be(pairs, error, part):
    cache = filled("cpu")
    before = contents(cache)
    with pytest.raises(error, match=f"copy_pages: {part}"):
        cache.copy_pages(torch.tensor(pairs))
    assert all(map(torch.equal, before, contents(cache)))


def test_caches_that_differ():
    cache, other = filled("cpu"), PagedKVCache(SPEC, PAGES)
    with pytest.raises(ArgumentValueError, match="copy_pages: to must be a cache of 2 layers"):
        cache.copy_pages(torch.tensor([[0, 1]]), other)
    with pytest.raises(ArgumentValueError, match=r"destination\[1\] must be pages"):
        copy_pages(cache.tensors()[:2], torch.tensor([[0, 1]]), cache.tensors()[::3])
    with pytest.raises(ArgumentValueError, match="destination must be 2 tensors"):
        copy_pages(cache.tensors()[:2], torch.tensor([[0, 1]]), cache.tensors()[:1])
    with pytest.raises(ArgumentValueError, match="source must be at least one tensor"):
        copy_pages([], torch.tensor([[0, 1]]))


# --- tables by pointers


def pointers(device):
    """Sequences of 33, 0, 16 and 1 tokens in pages of 16."""
    values = ([0, 3, 3, 4, 5], [4, 0, 5, 2, 3], [1, 0, 16, 1])
    return [torch.tensor(v, dtype=torch.int32, device=device) for v in values]


def test_a_table_of_pointers(device):
    table, lens = table_from_indptr(*pointers(device), page_size=16, max_pages=4)
    assert table.tolist() == [[4, 0, 5, 0], [0, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0]]
    assert lens.tolist() == [33, 0, 16, 1]
    assert table.dtype == lens.dtype == torch.int32 and table.device == device


def test_pointers_of_a_table(device):
    """What is behind the last sequence's pages is padding."""
    given = pointers(device)
    table, lens = table_from_indptr(*given, page_size=16, max_pages=4)
    indptr, indices, last = table_to_indptr(table, lens, page_size=16)
    assert torch.equal(indptr, given[0])
    assert torch.equal(indices[:5], given[1]) and not bool(indices[5:].any())
    assert torch.equal(last, given[2])


def test_nothing_in_tables(device):
    empty = torch.zeros(1, dtype=torch.int32, device=device)
    table, lens = table_from_indptr(empty, empty[:0], empty[:0], page_size=16, max_pages=2)
    assert table.shape == (0, 2) and lens.shape == (0,)
    table, lens = table_from_indptr(
        torch.zeros(3, dtype=torch.int32, device=device), empty[:0], lens.new_zeros(2),
        page_size=16, max_pages=2,
    )  # fmt: skip
    assert table.tolist() == [[0, 0], [0, 0]] and lens.tolist() == [0, 0]
    assert table_to_indptr(table, lens, page_size=16)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"page_size": 0}, "page_size must be at least 1"),
        ({"max_pages": 2}, "max_pages must be at least 3"),
        ({"kv_last_page_len": index([1, 0, 16])}, r"kv_last_page_len must be of shape \[B\]"),
        ({"kv_indptr": index([0, 3, 3, 4, 6])}, "kv_indptr must be 0 to 5, ascending"),
        ({"kv_indices": index([0.0])}, "kv_indices must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pointers_that_cannot_be(changes, part):
    names = ("kv_indptr", "kv_indices", "kv_last_page_len")
    given = dict(zip(names, pointers("cpu"), strict=True))
    sizes = {"page_size": 16, "max_pages": 4}
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=f"table_from_indptr: {part}"):
        table_from_indptr(**{**given, **sizes, **changes})
