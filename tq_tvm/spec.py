r"""Cache shapes and bytes: what a kernel is specialised for, the one definition of it.

A *format* (`tq_tvm.formats`) names how one token's key and value of one KV head are stored. A
*spec* adds what a compiled kernel is specialised for: head counts, page size, the model's dtype and
the axis order.

Symbols used in shapes throughout the package::

    B    sequences in the batch          P    pages (blocks) in the cache
    T    new tokens in a ragged batch    PS   page size, in tokens
    HQ   query heads                     HK   key/value heads
    G    HQ / HK, the GQA group          D    head_dim, of values DV where it differs
    BK   elements of a key's row in its cache: bytes of codes; BV of a value's
    MK   scales of a key's row; MV of a value's
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.formats import (
    FORMATS,
    K4V2,
    NORM_EPS,
    CacheFormat,
    Codec,
    QuantPolicy,
    get_format,
)

__all__ = [
    "DTYPES",
    "FORMATS",
    "FUNCTIONS",
    "HEAD_DIMS",
    "K4V2",
    "LATENT_DIMS",
    "LAYOUTS",
    "MAX_WINDOW",
    "NORM_EPS",
    "PAGE_SIZES",
    "ROTATE_DIMS",
    "CacheFormat",
    "CacheSpec",
    "Codec",
    "QuantPolicy",
    "RotateSpec",
    "Spec",
    "get_format",
    "parse_spec",
]

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 512, 576)
ROTATE_DIMS = (64, 80, 96, 112, 128, 192, 256, 512, 576, 1024, 2048, 4096)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
MAX_WINDOW = 256
LATENT_DIMS = (512, 64)
"""Of a latent cache of MLA: the latent, kept as K, and the rope part of keys, kept as V."""
DTYPES = ("float16", "bfloat16", "float32")
LAYOUTS = ("bshd", "bhsd")

FUNCTIONS = {
    "rotate": "rotate",
    "fill_slots": "fill",
    "fill_table": "fill",
    "flatten": "flatten",
    "flatten_unrotated": "flatten",
    "decode": "decode",
    "decode_featured": "decode",
    "attend": "attend",
    "prefill": "prefill",
    "mla": "mla",
}
"""Functions of a library, each with the kernel that it is a form of."""

_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_DTYPE_SLUG = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
_SLUG_DTYPE = {slug: dtype for dtype, slug in _DTYPE_SLUG.items()}


def _check_fields(name: str, fields: Iterable[tuple[str, object, tuple]]) -> None:
    """Refuse a value that is not among those allowed, of fields (name, value, allowed)."""
    for field, value, allowed in fields:
        # 64.0 equals 64, and 42 names a format too, but neither spells a label.
        if type(value) is not type(allowed[0]) or value not in allowed:
            raise UnsupportedSpecError(
                f"{name}: {field} must be one of {', '.join(map(str, allowed))}, got {value!r}"
            )


@dataclasses.dataclass(frozen=True)
class RotateSpec:
    """What ``rotate`` is specialised for; a library of it alone serves `hadamard_rotate`.

    Parameters
    ----------
    dim
        Values of a row (D), one of `ROTATE_DIMS`.
    dtype
        Their dtype. ``"float32"`` is for the CPU.

    Raises
    ------
    UnsupportedSpecError
        A value for which no kernel can be generated.

    Examples
    --------
    >>> RotateSpec(1024).label
    'rotate_d1024_bf16'
    """

    dim: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _check_fields("RotateSpec", (("dim", self.dim, ROTATE_DIMS), ("dtype", self.dtype, DTYPES)))

    @property
    def functions(self) -> tuple[str, ...]:
        """Functions of a library of this spec."""
        return ("rotate",)

    @property
    def rotation(self) -> RotateSpec:
        """What ``rotate`` depends on: the spec itself."""
        return self

    def relevant_to(self, function: str) -> RotateSpec:
        """The spec itself: no field can be put aside."""
        return self

    @property
    def label(self) -> str:
        """A slug of every field; `parse_spec` reads it back."""
        return f"rotate_d{self.dim}_{_DTYPE_SLUG[self.dtype]}"


_ROTATE_LABEL = re.compile(r"rotate_d(?P<d>\d+)_(?P<dtype>f16|bf16|f32)")
_LABEL = re.compile(
    r"(?P<format>[a-z0-9]+(?:-[a-z0-9]+)*)_d(?P<d>\d+)(?:v(?P<dv>\d+))?_hq(?P<hq>\d+)_hk(?P<hk>\d+)"
    r"_p(?P<ps>\d+)_(?P<dtype>f16|bf16|f32)_(?P<layout>bshd|bhsd)(?:_w(?P<window>\d+))?"
)


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a set of kernels is specialised for. Everything else is dynamic.

    Parameters
    ----------
    head_dim, num_q_heads, num_kv_heads
        D, HQ and HK; HQ is a multiple of HK, D one of `HEAD_DIMS`.
    page_size
        Tokens a page (PS), one of `PAGE_SIZES`.
    dtype
        The model's dtype: of queries, new rows, outputs and metas. ``"float32"`` is for the CPU.
    layout
        ``"bshd"``: pages are [PS, HK, ...]; ``"bhsd"``: pages are [HK, PS, ...].
    format
        The cache format: a preset, a slug or a `CacheFormat`, kept by its name.
    head_dim_v
        DV of values where it is not D; one of `HEAD_DIMS` too.
    window
        Newest tokens of a sequence that are attended unquantised, beside the packed ones, 0 to
        `MAX_WINDOW`. Their rows are in buffers that `tq_tvm.PagedKVCache` describes.

    Raises
    ------
    UnsupportedSpecError
        A value for which no kernel can be generated.

    Examples
    --------
    >>> spec = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8)
    >>> spec.label
    'k4v2_d128_hq32_hk8_p64_bf16_bshd'
    >>> spec.bytes_per_token_head  # 64 code bytes of K, 32 of V, 2 + 1 metas of 2 bytes
    102
    """

    head_dim: int
    num_q_heads: int
    num_kv_heads: int
    page_size: int = 64
    dtype: str = "bfloat16"
    layout: str = "bshd"
    format: str = "k4v2"
    head_dim_v: int | None = None
    window: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.format, str | CacheFormat):
            raise UnsupportedSpecError(
                f"CacheSpec: format must be a name or a CacheFormat, got {self.format!r}"
            )
        # One spelling of every spec: labels and equality depend on it.
        object.__setattr__(self, "format", get_format(self.format).name)
        if self.head_dim_v is not None:
            _check_fields("CacheSpec", (("head_dim_v", self.head_dim_v, HEAD_DIMS),))
            if self.head_dim_v == self.head_dim:
                object.__setattr__(self, "head_dim_v", None)
        if type(self.window) is not int or not 0 <= self.window <= MAX_WINDOW:
            raise UnsupportedSpecError(
                f"CacheSpec: window must be an integer from 0 to {MAX_WINDOW}, got {self.window!r}"
            )
        _check_fields(
            "CacheSpec",
            (
                ("head_dim", self.head_dim, HEAD_DIMS),
                ("page_size", self.page_size, PAGE_SIZES),
                ("dtype", self.dtype, DTYPES),
                ("layout", self.layout, LAYOUTS),
            ),
        )
        for name, heads in (
            ("num_q_heads", self.num_q_heads),
            ("num_kv_heads", self.num_kv_heads),
        ):
            if type(heads) is not int or heads < 1:
                raise UnsupportedSpecError(
                    f"CacheSpec: {name} must be a positive integer, got {heads!r}"
                )
        if self.num_q_heads % self.num_kv_heads:
            raise UnsupportedSpecError(
                "CacheSpec: num_q_heads must be a multiple of num_kv_heads, "
                f"got {self.num_q_heads} and {self.num_kv_heads}"
            )

    @property
    def cache_format(self) -> CacheFormat:
        """The `CacheFormat` that ``format`` names."""
        return get_format(self.format)

    @property
    def value_dim(self) -> int:
        """Values of a row of V (DV)."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head (G)."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def functions(self) -> tuple[str, ...]:
        """Functions of a library of this spec, on some target or other: see `served`."""
        return tuple(name for name in FUNCTIONS if name != "mla" or self.is_latent)

    @property
    def is_latent(self) -> bool:
        """Whether the cache may be one of MLA, which ``mla`` attends to: see `latent_parts`."""
        fmt = self.cache_format
        dims = (self.head_dim, self.value_dim) == LATENT_DIMS and self.num_kv_heads == 1
        return (
            dims and self.window == 0 and fmt.value.family == "none" and not fmt.key.residual_sign
        )

    @property
    def latent_parts(self) -> tuple[CacheSpec, CacheSpec]:
        """Of a latent cache: latents as K and V at once, and rope parts as both."""
        fmt = self.cache_format
        rope = CacheFormat(fmt.value, fmt.value, fmt.rotation)
        latent = CacheFormat(fmt.key, fmt.key, fmt.rotation, fmt.scale_rule)
        return (
            dataclasses.replace(self, format=latent.name, head_dim_v=None),
            dataclasses.replace(self, format=rope.name, head_dim=self.value_dim, head_dim_v=None),
        )

    @property
    def rotation(self) -> RotateSpec:
        """What ``rotate`` depends on."""
        return RotateSpec(self.head_dim, self.dtype)

    def relevant_to(self, function: str) -> Spec:
        """The spec with what a function does not depend on put aside.

        A library or a record of any spec with the same one serves the function.

        Parameters
        ----------
        function
            A key of `FUNCTIONS`.
        """
        if function == "rotate":
            return self.rotation
        if function in ("decode", "decode_featured", "attend", "prefill", "mla"):
            return self._as_read()
        spec = dataclasses.replace(self, num_q_heads=self.num_kv_heads)
        if function == "fill_table":
            return spec
        spec = dataclasses.replace(spec, window=0)
        return spec if function == "fill_slots" else spec._as_read()

    def _as_read(self) -> CacheSpec:
        """The spec with the scale rule put aside, which only ``fill`` knows."""
        return dataclasses.replace(self, format=self.cache_format.as_read.name)

    @property
    def label(self) -> str:
        """A slug of every field; `parse` and `parse_spec` read it back."""
        values = "" if self.head_dim_v is None else f"v{self.head_dim_v}"
        window = f"_w{self.window}" if self.window else ""
        return (
            f"{self.format}_d{self.head_dim}{values}_hq{self.num_q_heads}_hk{self.num_kv_heads}"
            f"_p{self.page_size}_{_DTYPE_SLUG[self.dtype]}_{self.layout}{window}"
        )

    @classmethod
    def parse(cls, label: str) -> CacheSpec:
        """Read a spec back from its `label`."""
        match = _LABEL.fullmatch(label)
        if match is None:
            raise UnsupportedSpecError(
                "CacheSpec.parse: label must look like 'k4v2_d128_hq32_hk8_p64_bf16_bshd', "
                f"got {label!r}"
            )
        return cls(
            head_dim=int(match["d"]),
            num_q_heads=int(match["hq"]),
            num_kv_heads=int(match["hk"]),
            page_size=int(match["ps"]),
            dtype=_SLUG_DTYPE[match["dtype"]],
            layout=match["layout"],
            format=match["format"],
            head_dim_v=int(match["dv"]) if match["dv"] else None,
            window=int(match["window"] or 0),
        )

    def _page(self, last: int) -> tuple[int, int, int]:
        axes = (self.page_size, self.num_kv_heads)
        return (*(axes if self.layout == "bshd" else axes[::-1]), last)

    def tensor_shapes(self, num_pages: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each cache tensor, by name, in argument order.

        The scales of a codec that has none are an empty tensor ``[..., 0]``.
        """
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, codec, dim in self._sides():
            dtype = "uint8" if codec.packed else self.dtype
            shapes[f"{name}_cache"] = ((num_pages, *self._page(codec.packed_bytes(dim))), dtype)
        for name, codec, _ in self._sides():
            shapes[f"{name}_meta"] = ((num_pages, *self._page(len(codec.meta))), self.dtype)
        return shapes

    def _sides(self) -> tuple[tuple[str, Codec, int], ...]:
        fmt = self.cache_format
        return ("k", fmt.key, self.head_dim), ("v", fmt.value, self.value_dim)

    @property
    def bytes_per_token_head(self) -> int:
        """Bytes that one token of one KV head takes, codes and metas of K and V."""
        size = _DTYPE_BYTES[self.dtype]
        return sum(
            codec.packed_bytes(dim) * (1 if codec.packed else size) + len(codec.meta) * size
            for _, codec, dim in self._sides()
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in one layer."""
        return self.bytes_per_token_head * self.num_kv_heads

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in one layer."""
        return self.bytes_per_token * self.page_size

    @property
    def compression(self) -> float:
        """How many times smaller than a 16-bit cache (for a float32 model: than its cache)."""
        dense = (self.head_dim + self.value_dim) * _DTYPE_BYTES[self.dtype]
        return dense / self.bytes_per_token_head


Spec = CacheSpec | RotateSpec
"""What a library is specialised for."""


def parse_spec(label: str) -> Spec:
    """Read a spec back from its label.

    Raises
    ------
    UnsupportedSpecError
        No kernels can be generated for the label.

    Examples
    --------
    >>> parse_spec("rotate_d4096_f16")
    RotateSpec(dim=4096, dtype='float16')
    """
    match = _ROTATE_LABEL.fullmatch(label)
    if match is not None:
        return RotateSpec(int(match["d"]), _SLUG_DTYPE[match["dtype"]])
    if _LABEL.fullmatch(label) is None:
        raise UnsupportedSpecError(
            "parse_spec: label must look like 'k4v2_d128_hq32_hk8_p64_bf16_bshd' or "
            f"'rotate_d1024_bf16', got {label!r}"
        )
    return CacheSpec.parse(label)
