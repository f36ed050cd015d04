"""A paged cache of one layer: the tensors of a spec, and the calls on them."""

from __future__ import annotations

from typing import Any

import torch

from tq_tvm.ops import _check
from tq_tvm.ops.decode import paged_decode
from tq_tvm.ops.fill import fill_kv_cache
from tq_tvm.ops.flatten import flatten_kv_cache
from tq_tvm.ops.workspace import paged_decode_workspace_size
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import as_device

__all__ = ["PagedKVCache"]

_OP = "PagedKVCache"

_PLANE_ALIGNMENT = 16


class PagedKVCache:
    """The four tensors of a spec, zeroed, and `fill`, `flatten` and `decode` on them.

    Parameters
    ----------
    spec
        Format, heads, page size, dtype and layout.
    num_pages
        P.
    device
        Where the tensors are; None is torch's default device.
    contiguous_pages
        Put each page's bytes together: one uint8 ``buffer`` ``[P, page bytes]``, of which the
        tensors are views with a page stride. A page is then copied or sent in one piece.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Not a spec, a size that is no integer or negative, or a device that torch does not have.

    Attributes
    ----------
    k_cache, v_cache, k_meta, v_meta
        The tensors, in the shapes of ``spec.tensor_shapes(num_pages)``.
    buffer
        The page buffer, or None.

    Examples
    --------
    >>> spec = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8)
    >>> cache = PagedKVCache(spec, num_pages=1024)
    >>> cache.bytes_per_token, cache.bytes == 1024 * 64 * 816
    (816, True)
    """

    def __init__(
        self,
        spec: CacheSpec,
        num_pages: int,
        device: torch.device | str | None = None,
        *,
        contiguous_pages: bool = False,
    ) -> None:
        _check.check_spec(_OP, spec)
        num_pages = _check.as_integer(_OP, "num_pages", num_pages)
        if device is not None:
            device = as_device(_OP, device)
        self.spec = spec
        self.num_pages = num_pages
        self.buffer: torch.Tensor | None = None
        if contiguous_pages:
            self.buffer, planes = _allocate_pages(spec, num_pages, device)
        else:
            planes = [
                torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
                for shape, dtype in spec.tensor_shapes(num_pages).values()
            ]
        self.k_cache, self.v_cache, self.k_meta, self.v_meta = planes

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``k_cache, v_cache, k_meta, v_meta``: the order that every call takes."""
        return self.k_cache, self.v_cache, self.k_meta, self.v_meta

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.k_cache.device

    @property
    def bytes(self) -> int:
        """Bytes of all pages."""
        if self.buffer is not None:
            return self.buffer.numel()
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token, all KV heads."""
        return self.spec.bytes_per_token

    def fill(
        self,
        k: Any,
        v: Any,
        *,
        slot_mapping: Any = None,
        block_table: Any = None,
        seq_lens: Any = None,
        q_start_loc: Any = None,
    ) -> None:
        """`fill_kv_cache` into this cache."""
        fill_kv_cache(
            k,
            v,
            *self.tensors(),
            slot_mapping=slot_mapping,
            block_table=block_table,
            seq_lens=seq_lens,
            q_start_loc=q_start_loc,
            layout=self.spec.layout,
            policy=self.spec.format,
        )

    def flatten(
        self,
        block_table: Any,
        seq_lens: Any,
        *,
        out_tokens: int,
        start_loc: Any = None,
        rotate_back: bool = False,
        out: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]:
        """`flatten_kv_cache` of this cache."""
        return flatten_kv_cache(
            *self.tensors(),
            block_table,
            seq_lens,
            out_tokens=out_tokens,
            start_loc=start_loc,
            rotate_back=rotate_back,
            layout=self.spec.layout,
            policy=self.spec.format,
            out=out,
        )

    def decode(
        self,
        q: Any,
        block_table: Any,
        seq_lens: Any,
        *,
        sm_scale: float | None = None,
        max_seq_len: int | None = None,
        out: Any = None,
        workspace: Any = None,
    ) -> Any:
        """`paged_decode` over this cache."""
        return paged_decode(
            q,
            *self.tensors(),
            block_table,
            seq_lens,
            sm_scale=sm_scale,
            max_seq_len=max_seq_len,
            layout=self.spec.layout,
            policy=self.spec.format,
            out=out,
            workspace=workspace,
        )

    def workspace_size(self, batch: int, max_context: int) -> int:
        """`paged_decode_workspace_size` for this cache, in bytes."""
        return paged_decode_workspace_size(self.spec, batch, max_context, self.device)


def _allocate_pages(
    spec: CacheSpec, num_pages: int, device: torch.device | str | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One buffer of whole pages, and its planes as views."""
    layout = []
    offset = 0
    for shape, name in spec.tensor_shapes(num_pages).values():
        dtype: torch.dtype = getattr(torch, name)
        size = shape[1] * shape[2] * shape[3] * dtype.itemsize
        layout.append((shape, dtype, offset))
        offset += -(-size // _PLANE_ALIGNMENT) * _PLANE_ALIGNMENT
    buffer = torch.zeros((num_pages, offset), dtype=torch.uint8, device=device)
    planes = []
    for (_, outer, inner, last), dtype, start in layout:
        typed = buffer.view(dtype)
        plane = typed.as_strided(
            (num_pages, outer, inner, last),
            (offset // dtype.itemsize, inner * last, last, 1),
            start // dtype.itemsize,
        )
        # torch.compile refuses to mutate views of one tensor that differ in dtype. The planes do
        # not overlap, so each may have a storage of its own on the shared memory.
        planes.append(torch.from_dlpack(plane) if num_pages else plane)
    return buffer, planes
