r"""Formats, cache shapes and bytes: the one definition that every other module reads.

A *format* names how one token's key and value of one KV head are stored. A *spec* adds what a
compiled kernel is specialised for: head counts, page size, the model's dtype and the axis order.

Symbols used in shapes throughout the package::

    B    sequences in the batch          P    pages (blocks) in the cache
    T    new tokens in a ragged batch    PS   page size, in tokens
    HQ   query heads                     HK   key/value heads
    G    HQ / HK, the GQA group          D    head_dim

Format ``k4v2`` (policy 42, byte order version 1), with H the Sylvester Walsh-Hadamard matrix::

    y = x H / sqrt(D)
    K: n = sqrt(sum y^2 + 1e-8)   u = y / n   idx = #{u > b3/sqrt(D)}   c = c3[idx]/sqrt(D)
       r = u - c   sign = (r >= 0)   g = sqrt(sum r^2 + 1e-8) / sqrt(D)
       nibble = idx | sign << 3         byte[j] = nibble[j] | nibble[j + D/2] << 4       j < D/2
       meta = (n, g)                    k = n (c3[idx]/sqrt(D) + g (sign ? 1 : -1))
    V: n = sqrt(sum y^2 + 1e-8)   u = y / n   idx = #{u > b2/sqrt(D)}
       byte[j] = idx[j] | idx[j + D/4] << 2 | idx[j + D/2] << 4 | idx[j + 3D/4] << 6     j < D/4
       meta = (n)                       v = n c2[idx]/sqrt(D)
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable

from tq_tvm.errors import UnsupportedSpecError

__all__ = [
    "DTYPES",
    "FORMATS",
    "FUNCTIONS",
    "HEAD_DIMS",
    "K4V2",
    "LAYOUTS",
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

NORM_EPS = 1e-8
"""Added to every sum of squares before its square root; part of the format."""

HEAD_DIMS = (64, 128, 256)
ROTATE_DIMS = (64, 128, 256, 512, 1024, 2048, 4096)
PAGE_SIZES = (16, 32, 64, 128, 256)
DTYPES = ("float16", "bfloat16", "float32")
LAYOUTS = ("bshd", "bhsd")

FUNCTIONS = {
    "rotate": "rotate",
    "fill_slots": "fill",
    "fill_table": "fill",
    "flatten": "flatten",
    "flatten_unrotated": "flatten",
    "decode": "decode",
}
"""Functions of a library, each with the kernel that it is a form of."""

_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_DTYPE_SLUG = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
_SLUG_DTYPE = {slug: dtype for dtype, slug in _DTYPE_SLUG.items()}


class QuantPolicy(enum.IntEnum):
    """Numbers by which serving engines name a cache format."""

    TURBO_QUANT = 42


@dataclasses.dataclass(frozen=True)
class Codec:
    """How one rotated row of D values becomes packed codes and a few scales.

    ``centroids`` and ``boundaries`` are the Lloyd-Max quantiser of N(0, 1); a row normalised to
    unit length has coordinates of standard deviation 1/sqrt(D), so both are divided by sqrt(D).
    """

    name: str
    bits: int
    centroids: tuple[float, ...]
    boundaries: tuple[float, ...]
    residual_sign: bool
    meta: tuple[str, ...]

    @property
    def codes_per_byte(self) -> int:
        """Codes in one byte: value ``j + i * D / codes_per_byte`` sits at bit ``i * bits``."""
        return 8 // self.bits

    def packed_bytes(self, head_dim: int) -> int:
        """Bytes of the codes of one row."""
        return head_dim // self.codes_per_byte


def _symmetric(positive: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-x for x in reversed(positive)) + positive


QJL4 = Codec(
    name="qjl4",
    bits=4,
    centroids=_symmetric((0.2450942, 0.7560052, 1.3439093, 2.1519456)),
    boundaries=(-1.7479274, -1.0499573, -0.5005497, 0.0, 0.5005497, 1.0499573, 1.7479274),
    residual_sign=True,
    meta=("norm", "residual"),
)
MSE2 = Codec(
    name="mse2",
    bits=2,
    centroids=_symmetric((0.4527808, 1.5104176)),
    boundaries=(-0.9815992, 0.0, 0.9815992),
    residual_sign=False,
    meta=("norm",),
)


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """A key codec, a value codec and the rotation in front of both."""

    name: str
    policy: QuantPolicy
    version: int
    key: Codec
    value: Codec
    rotation: str


K4V2 = CacheFormat(
    name="k4v2",
    policy=QuantPolicy.TURBO_QUANT,
    version=1,
    key=QJL4,
    value=MSE2,
    rotation="hadamard",
)
FORMATS = {K4V2.name: K4V2}


def get_format(name: str | int) -> CacheFormat:
    """Return the format of a name (``"k4v2"``) or of a policy number (``42``).

    Raises
    ------
    UnsupportedSpecError
        No such format.
    """
    for fmt in FORMATS.values():
        if name in (fmt.name, int(fmt.policy)):
            return fmt
    known = ", ".join(f"{f.name!r} ({int(f.policy)})" for f in FORMATS.values())
    raise UnsupportedSpecError(f"get_format: name must be one of {known}, got {name!r}")


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
    r"(?P<format>[a-z0-9]+)_d(?P<d>\d+)_hq(?P<hq>\d+)_hk(?P<hk>\d+)_p(?P<ps>\d+)"
    r"_(?P<dtype>f16|bf16|f32)_(?P<layout>bshd|bhsd)"
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
        Name of the cache format.

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

    def __post_init__(self) -> None:
        get_format(self.format)
        _check_fields(
            "CacheSpec",
            (
                ("head_dim", self.head_dim, HEAD_DIMS),
                ("page_size", self.page_size, PAGE_SIZES),
                ("dtype", self.dtype, DTYPES),
                ("layout", self.layout, LAYOUTS),
                ("format", self.format, tuple(FORMATS)),
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
        return FORMATS[self.format]

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head (G)."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def functions(self) -> tuple[str, ...]:
        """Functions of a library of this spec."""
        return tuple(FUNCTIONS)

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
        if function == "decode":
            return self
        if function == "rotate":
            return self.rotation
        return dataclasses.replace(self, num_q_heads=self.num_kv_heads)

    @property
    def label(self) -> str:
        """A slug of every field; `parse` and `parse_spec` read it back."""
        return (
            f"{self.format}_d{self.head_dim}_hq{self.num_q_heads}_hk{self.num_kv_heads}"
            f"_p{self.page_size}_{_DTYPE_SLUG[self.dtype]}_{self.layout}"
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
        )

    def _page(self, last: int) -> tuple[int, int, int]:
        axes = (self.page_size, self.num_kv_heads)
        return (*(axes if self.layout == "bshd" else axes[::-1]), last)

    def tensor_shapes(self, num_pages: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each cache tensor, by name, in argument order."""
        fmt = self.cache_format
        return {
            "k_cache": ((num_pages, *self._page(fmt.key.packed_bytes(self.head_dim))), "uint8"),
            "v_cache": ((num_pages, *self._page(fmt.value.packed_bytes(self.head_dim))), "uint8"),
            "k_meta": ((num_pages, *self._page(len(fmt.key.meta))), self.dtype),
            "v_meta": ((num_pages, *self._page(len(fmt.value.meta))), self.dtype),
        }

    @property
    def bytes_per_token_head(self) -> int:
        """Bytes that one token of one KV head takes, codes and metas of K and V."""
        fmt = self.cache_format
        codes = fmt.key.packed_bytes(self.head_dim) + fmt.value.packed_bytes(self.head_dim)
        return codes + (len(fmt.key.meta) + len(fmt.value.meta)) * _DTYPE_BYTES[self.dtype]

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
        dense = 2 * self.head_dim * _DTYPE_BYTES[self.dtype]
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
