"""A paged cache: the tensors of some layers, and the calls on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tq_tvm.ops import _check
from tq_tvm.ops.decode import paged_decode
from tq_tvm.ops.fill import fill_kv_cache
from tq_tvm.ops.flatten import flatten_kv_cache
from tq_tvm.ops.pages import copy_pages
from tq_tvm.ops.workspace import paged_decode_workspace_size
from tq_tvm.spec import CacheFormat, CacheSpec, Codec
from tq_tvm.targets import as_device

__all__ = ["PagedKVCache"]

_OP = "PagedKVCache"

_PLANE_ALIGNMENT = 16


class PagedKVCache:
    """The tensors of some layers, zeroed, and `fill`, `flatten` and `decode` on them.

    Parameters
    ----------
    spec
        Format, heads, page size, dtype, layout and window.
    num_pages
        P, of every layer.
    device
        Where the tensors are; None is torch's default device.
    contiguous_pages
        Put each page's bytes together: one uint8 ``buffer`` ``[P, page bytes]`` a layer, of which
        the tensors are views with a page stride. A page is then copied or sent in one piece.
    formats
        One format a layer, by number, name or itself; None is one layer of the spec's. The first
        and the last layers are often kept in more bits.
    sequences
        S, rings of a spec with a window: how many sequences it serves at a time.
    k_scale, v_scale
        Scale of all keys, of all values, in layers of ``fp8``: one number or one for each layer.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Not a spec, a size that is no integer or negative, or a device that torch does not have;
        rings without a window, or a window without rings; scales without ``fp8``.
    UnsupportedSpecError
        A format that there is not.

    Attributes
    ----------
    specs
        The spec of each layer.
    k_cache, v_cache, k_meta, v_meta
        Tensors of layer 0, in the shapes of ``spec.tensor_shapes(num_pages)``; `tensors` gives
        those of any.
    buffer
        The page buffer of layer 0, or None.

    Examples
    --------
    >>> spec = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8)
    >>> cache = PagedKVCache(spec, num_pages=1024)
    >>> cache.bytes_per_token, cache.bytes == 1024 * 64 * 816
    (816, True)
    >>> PagedKVCache(spec, 1, formats=["int8", "k4v2", "k4v2", "int8"]).bytes_per_token
    5856
    """

    def __init__(
        self,
        spec: CacheSpec,
        num_pages: int,
        device: torch.device | str | None = None,
        *,
        contiguous_pages: bool = False,
        formats: Sequence[CacheFormat | str | int] | None = None,
        sequences: int = 0,
        k_scale: float | Sequence[float] | None = None,
        v_scale: float | Sequence[float] | None = None,
    ) -> None:
        _check.check_spec(_OP, spec)
        num_pages = _check.as_integer(_OP, "num_pages", num_pages)
        sequences = _check.as_integer(_OP, "sequences", sequences)
        if bool(sequences) != bool(spec.window):
            expected = "at least 1 with a window" if spec.window else "0 without a window"
            _check.fail(_OP, "sequences", expected, sequences, "size it with spec.window")
        if device is not None:
            device = as_device(_OP, device)
        names = (
            [spec.format] if formats is None else [_check.format_of(_OP, f).name for f in formats]
        )
        if not names:
            _check.fail(_OP, "formats", "one format a layer", "none", "name at least one")
        self.specs = tuple(dataclasses.replace(spec, format=name) for name in names)
        self.num_pages = num_pages
        scales = zip(
            _layer_scales("k_scale", k_scale, [s.cache_format.key for s in self.specs]),
            _layer_scales("v_scale", v_scale, [s.cache_format.value for s in self.specs]),
            strict=True,
        )
        self._layers = [
            _Layer.allocate(s, num_pages, device, contiguous_pages, sequences, pair)
            for s, pair in zip(self.specs, scales, strict=True)
        ]
        self.k_cache, self.v_cache, self.k_meta, self.v_meta = self._layers[0].tensors
        self.buffer = self._layers[0].buffer

    @property
    def spec(self) -> CacheSpec:
        """The spec of layer 0."""
        return self.specs[0]

    def tensors(
        self, layer: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``k_cache, v_cache, k_meta, v_meta`` of a layer: the order that every call takes."""
        return self._layers[layer].tensors

    def window(self, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``k_window`` ``[S, N, HK, D]`` and ``v_window`` ``[S, N, HK, DV]``, or None."""
        return self._layers[layer].window

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.k_cache.device

    @property
    def bytes(self) -> int:
        """Bytes of all pages of all layers."""
        return sum(layer.bytes for layer in self._layers)

    @property
    def window_bytes(self) -> int:
        """Bytes of the windows of all layers."""
        rings = (ring for layer in self._layers for ring in layer.window or ())
        return sum(ring.numel() * ring.element_size() for ring in rings)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in pages, all KV heads and layers."""
        return sum(spec.bytes_per_token for spec in self.specs)

    def fill(
        self,
        k: Any,
        v: Any,
        *,
        layer: int = 0,
        slot_mapping: Any = None,
        block_table: Any = None,
        seq_lens: Any = None,
        q_start_loc: Any = None,
        window_slots: Any = None,
    ) -> None:
        """`fill_kv_cache` into a layer; with a window by block table and ``window_slots``."""
        kept = self._layers[layer]
        fill_kv_cache(
            k,
            v,
            *kept.tensors,
            slot_mapping=slot_mapping,
            block_table=block_table,
            seq_lens=seq_lens,
            q_start_loc=q_start_loc,
            layout=self.spec.layout,
            policy=self.specs[layer].format,
            k_scale=kept.scales[0],
            v_scale=kept.scales[1],
            window=self._window("fill_kv_cache", kept, window_slots),
        )

    def flatten(
        self,
        block_table: Any,
        seq_lens: Any,
        *,
        layer: int = 0,
        out_tokens: int,
        start_loc: Any = None,
        rotate_back: bool = False,
        out: tuple[Any, Any] | None = None,
    ) -> tuple[Any, Any]:
        """`flatten_kv_cache` of a layer: of what is packed, its window apart."""
        kept = self._layers[layer]
        return flatten_kv_cache(
            *kept.tensors,
            block_table,
            seq_lens,
            out_tokens=out_tokens,
            start_loc=start_loc,
            rotate_back=rotate_back,
            layout=self.spec.layout,
            policy=self.specs[layer].format,
            k_scale=kept.scales[0],
            v_scale=kept.scales[1],
            out=out,
        )

    def decode(
        self,
        q: Any,
        block_table: Any,
        seq_lens: Any,
        *,
        layer: int = 0,
        window_slots: Any = None,
        sm_scale: float | None = None,
        max_seq_len: int | None = None,
        cu_seqlens_q: Any = None,
        max_seqlen_q: int | None = None,
        window_left: int | None = None,
        kept_tokens: int = 0,
        soft_cap: float | None = None,
        sinks: Any = None,
        alibi_slopes: Any = None,
        return_lse: bool = False,
        lse: Any = None,
        out: Any = None,
        workspace: Any = None,
    ) -> Any:
        """`paged_decode` over a layer; with a window by ``window_slots``."""
        kept = self._layers[layer]
        return paged_decode(
            q,
            *kept.tensors,
            block_table,
            seq_lens,
            sm_scale=sm_scale,
            max_seq_len=max_seq_len,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            window_left=window_left,
            kept_tokens=kept_tokens,
            soft_cap=soft_cap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            return_lse=return_lse,
            lse=lse,
            layout=self.spec.layout,
            policy=self.specs[layer].format,
            k_scale=kept.scales[0],
            v_scale=kept.scales[1],
            window=self._window("paged_decode", kept, window_slots),
            out=out,
            workspace=workspace,
        )

    def copy_pages(self, pairs: Any, to: PagedKVCache | None = None) -> None:
        """`copy_pages` of every layer, within this cache or to one of the same layers.

        Rings of unquantised rows belong to sequences, not to pages, and stay where they are.
        """
        other = self if to is None else to
        if self.specs != other.specs:
            _check.fail(
                "copy_pages", "to", f"a cache of {len(self.specs)} layers like these",
                [spec.label for spec in other.specs], "copy between caches of the same specs",
            )  # fmt: skip
        for own, theirs in zip(self._layers, other._layers, strict=True):
            copy_pages(own.planes, pairs, None if to is None else theirs.planes)

    @staticmethod
    def _window(op: str, layer: _Layer, slots: Any) -> tuple[Any, Any, Any] | None:
        if (slots is None) != (layer.window is None):
            expected = "None without a window" if layer.window is None else "[B] with a window"
            actual = "None" if slots is None else "a tensor"
            _check.fail(op, "window_slots", expected, actual, "pass the ring of each sequence")
        return None if layer.window is None else (*layer.window, slots)

    def workspace_size(self, batch: int, max_context: int, *, max_tokens: int | None = None) -> int:
        """`paged_decode_workspace_size` for any layer of this cache, in bytes."""
        return max(
            paged_decode_workspace_size(
                spec, batch, max_context, self.device, max_tokens=max_tokens
            )
            for spec in dict.fromkeys(self.specs)
        )


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What one layer keeps."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    buffer: torch.Tensor | None
    scales: tuple[torch.Tensor | None, torch.Tensor | None]
    window: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def allocate(
        cls,
        spec: CacheSpec,
        num_pages: int,
        device: torch.device | str | None,
        contiguous_pages: bool,
        sequences: int,
        scales: tuple[float | None, float | None],
    ) -> _Layer:
        buffer = None
        if contiguous_pages:
            buffer, planes = _allocate_pages(spec, num_pages, device)
        else:
            planes = [
                torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
                for shape, dtype in spec.tensor_shapes(num_pages).values()
            ]
        k_scale, v_scale = (
            None if scale is None else torch.full((1,), scale, dtype=torch.float32, device=device)
            for scale in scales
        )
        window = None
        if spec.window:
            rows = (sequences, spec.window, spec.num_kv_heads)
            dtype = getattr(torch, spec.dtype)
            k_window, v_window = (
                torch.zeros((*rows, dim), dtype=dtype, device=device)
                for dim in (spec.head_dim, spec.value_dim)
            )
            window = (k_window, v_window)
        k_cache, v_cache, k_meta, v_meta = planes
        return cls((k_cache, v_cache, k_meta, v_meta), buffer, (k_scale, v_scale), window)

    @property
    def planes(self) -> tuple[torch.Tensor, ...]:
        """What has a page's bytes: the tensors that are not empty."""
        return tuple(tensor for tensor in self.tensors if tensor.numel())

    @property
    def bytes(self) -> int:
        if self.buffer is not None:
            return self.buffer.numel()
        return sum(t.numel() * t.element_size() for t in self.tensors)


def _layer_scales(name: str, value: Any, codecs: list[Codec]) -> list[float | None]:
    """The scale of each layer; None of layers whose rows have scales."""
    scaled = [codec.tensor_scale for codec in codecs]
    if value is not None and not any(scaled):
        _check.fail(_OP, name, "None without a layer of fp8", value, "leave it out")
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(codecs):
            expected = f"one number for each of {len(codecs)} layers"
            _check.fail(_OP, name, expected, f"{len(value)} of them", "pass a list of that length")
        numbers = [_check.as_number(_OP, name, number) for number in value]
    else:
        one = 1.0 if value is None else _check.as_number(_OP, name, value)
        numbers = [one] * len(codecs)
    return [n if has else None for n, has in zip(numbers, scaled, strict=True)]


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
        planes.append(torch.from_dlpack(plane) if plane.numel() else plane)
    return buffer, planes
