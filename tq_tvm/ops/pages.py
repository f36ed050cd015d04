"""Pages as a whole, and tables of pages in the form that FlashInfer takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tq_tvm.ops import _check

__all__ = ["copy_pages", "table_from_indptr", "table_to_indptr"]

_OP = "copy_pages"


def copy_pages(
    source: Sequence[torch.Tensor],
    pairs: torch.Tensor,
    destination: Sequence[torch.Tensor] | None = None,
) -> None:
    """Copy pages: all tensors of a page together, within a cache or from one to another.

    To fork a sequence, copy its last page; to swap pages out, copy to a cache on the host; to swap
    two pages or close gaps, name all pairs in one call. All sources are read before any destination
    is written, so a page may be both.

    Parameters
    ----------
    source
        Tensors ``[P, ...]`` of a layer, such as ``PagedKVCache.tensors(layer)``, or page buffers;
        the page stride is free.
    pairs
        ``[N, 2]`` int32 or int64, on the device of ``source``: from page, to page. No page is
        written twice.
    destination
        Tensors like ``source`` of any number of pages, on any device; None is ``source`` itself.
        Written in place.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Tensors whose pages differ in number, shape or dtype; pairs of another shape, dtype or
        device.

    Notes
    -----
    On one GPU nothing waits for it, and the call can be captured in a CUDA graph; it allocates what
    it copies. From one device to another it waits. On the CPU page numbers are checked, on a GPU
    they cannot be without waiting: a wrong one is torch's assertion.

    Examples
    --------
    >>> import torch
    >>> cache = torch.arange(4)[:, None]
    >>> copy_pages([cache], torch.tensor([[0, 1], [1, 0]]))
    >>> cache.flatten().tolist()
    [1, 0, 2, 3]
    """
    planes = _planes("source", source)
    targets = planes if destination is None else _planes("destination", destination)
    if len(planes) != len(targets):
        _fail("destination", f"{len(planes)} tensors like source", len(targets))
    for number, (plane, target) in enumerate(zip(planes, targets, strict=True)):
        page, other = (plane.shape[1:], plane.dtype), (target.shape[1:], target.dtype)
        if page != other:
            _fail(f"destination[{number}]", f"pages {page} like source's", other)
    pairs = _check.as_tensor(_OP, "pairs", pairs)
    _check.check_dtype(_OP, "pairs", pairs, torch.int32, torch.int64)
    _check.check_shape(_OP, "pairs", pairs, "[N, 2]", (None, 2))
    devices = {plane.device for plane in (*planes, pairs)}
    if len(devices) != 1:
        _fail("pairs", f"on {planes[0].device} like source", pairs.device)
    begin, end = pairs.long().unbind(1)
    if pairs.device.type == "cpu":
        _check_numbers(begin, end, len(planes[0]), len(targets[0]))
    rows = [plane.index_select(0, begin) for plane in planes]
    for target, row in zip(targets, rows, strict=True):
        target.index_copy_(0, end.to(target.device), row.to(target.device))


def table_from_indptr(
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    *,
    page_size: int,
    max_pages: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``block_table`` and ``seq_lens``, which every call takes, of FlashInfer's pointers to pages.

    Parameters
    ----------
    kv_indptr
        ``[B + 1]`` int32: where each sequence's pages begin in ``kv_indices``.
    kv_indices
        ``[N]`` int32: pages of the sequences, one after another; more may follow.
    kv_last_page_len
        ``[B]`` int32: tokens in the last page of each sequence, 1 to ``page_size``.
    page_size, max_pages
        Tokens of a page, and pages of the longest sequence.

    Returns
    -------
    ``[B, max_pages]`` and ``[B]``, int32; what is behind a sequence's pages is 0.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape or device; on the CPU also pointers that do not ascend or leave
        ``kv_indices``, and too few ``max_pages``.

    Notes
    -----
    On a GPU nothing waits for it, and the call can be captured in a CUDA graph.
    """
    op = "table_from_indptr"
    page_size = _check.as_integer(op, "page_size", page_size, 1)
    max_pages = _check.as_integer(op, "max_pages", max_pages, 1)
    named = {
        "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_last_page_len": kv_last_page_len,
    }  # fmt: skip
    for name, tensor in named.items():
        _check.check_dtype(op, name, _check.as_tensor(op, name, tensor), torch.int32)
        if tensor.ndim != 1:
            _check.check_shape(op, name, tensor, "[N]", (None,))
    device = _check.check_device(op, named)
    batch = max(len(kv_indptr) - 1, 0)
    _check.check_shape(op, "kv_last_page_len", kv_last_page_len, "[B]", (batch,))
    begin, counts = kv_indptr[:-1], kv_indptr.diff()
    if device.type == "cpu" and batch:
        if int(counts.min()) < 0 or int(begin[0]) < 0 or int(kv_indptr[-1]) > len(kv_indices):
            wanted = f"0 to {len(kv_indices)}, ascending"
            _check.fail(op, "kv_indptr", wanted, kv_indptr.tolist(), "pass the pages' pointers")
        if int(counts.max()) > max_pages:
            wanted = f"at least {int(counts.max())}"
            _check.fail(
                op, "max_pages", wanted, max_pages, "pass the pages of the longest sequence"
            )
    columns = torch.arange(max_pages, device=device, dtype=torch.int32)
    used = columns < counts[:, None]
    # One more entry, so that there is one to read where there are no pages.
    indices = torch.cat([kv_indices, kv_indices.new_zeros(1)])
    at = torch.where(used, begin[:, None] + columns, len(kv_indices))
    lens = torch.where(counts > 0, (counts - 1) * page_size + kv_last_page_len, 0)
    return indices[at.long()], lens.int()


def table_to_indptr(
    block_table: torch.Tensor, seq_lens: torch.Tensor, *, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's pointers to pages of a block table: `table_from_indptr` the other way.

    Parameters
    ----------
    block_table, seq_lens
        ``[B, MB]`` and ``[B]``, int32.
    page_size
        Tokens of a page.

    Returns
    -------
    ``kv_indptr [B + 1]``, ``kv_indices [B * MB]`` and ``kv_last_page_len [B]``, int32. Indices
    behind those of the last sequence are 0, and so is the last page of an empty sequence.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape or device.

    Notes
    -----
    On a GPU nothing waits for it, and the call can be captured in a CUDA graph.
    """
    op = "table_to_indptr"
    page_size = _check.as_integer(op, "page_size", page_size, 1)
    named = {"block_table": block_table, "seq_lens": seq_lens}
    for name, tensor in named.items():
        _check.check_dtype(op, name, _check.as_tensor(op, name, tensor), torch.int32)
    device = _check.check_device(op, named)
    _check.check_shape(op, "block_table", block_table, "[B, MB]", (None, None))
    batch, width = block_table.shape
    _check.check_shape(op, "seq_lens", seq_lens, "[B]", (batch,))
    counts = (seq_lens + (page_size - 1)) // page_size
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    columns = torch.arange(width, device=device, dtype=torch.int32)
    used = columns < counts[:, None]
    # Entries that no sequence has go to one behind the others.
    to = torch.where(used, indptr[:-1, None] + columns, batch * width).long()
    indices = block_table.new_zeros(batch * width + 1)
    indices.scatter_(0, to.flatten(), torch.where(used, block_table, 0).flatten())
    last = torch.where(counts > 0, seq_lens - (counts - 1) * page_size, 0)
    return indptr, indices[:-1], last.int()


def _planes(name: str, tensors: Any) -> list[torch.Tensor]:
    planes = [_check.as_tensor(_OP, f"{name}[{i}]", tensor) for i, tensor in enumerate(tensors)]
    if not planes:
        _fail(name, "at least one tensor", "none")
    for i, plane in enumerate(planes):
        if plane.ndim < 1 or len(plane) != len(planes[0]):
            _fail(f"{name}[{i}]", f"[{planes[0].shape[:1].numel()}, ...] pages", tuple(plane.shape))
        if plane.device != planes[0].device:
            _fail(f"{name}[{i}]", f"on {planes[0].device} like the first", plane.device)
    return planes


def _check_numbers(begin: torch.Tensor, end: torch.Tensor, pages: int, others: int) -> None:
    for which, numbers, count in (("from", begin, pages), ("to", end, others)):
        wrong = numbers[(numbers < 0) | (numbers >= count)]
        if len(wrong):
            _fail("pairs", f"pages 0 to {count - 1} to copy {which}", int(wrong[0]))
    if len(end.unique()) != len(end):
        _fail("pairs", "no page that is written twice", end.tolist())


def _fail(argument: str, expected: str, actual: object) -> None:
    _check.fail(_OP, argument, expected, actual, "pass tensors of one cache spec and its pages")
