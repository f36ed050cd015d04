r"""Cache formats as data: a key codec, a value codec, a rotation and a scale rule.

``tq_tvm/FORMATS.md`` is the document of the bytes; `tq_tvm.reference` the mathematics in torch.

Names
    A *preset* is short (``"k4v2"``, ``"tq42"``, ``"int8"``); serving engines use *policy numbers*
    (42, 8). Any other format has a *slug*: key codec, value codec, rotation and scale rule, joined
    by dashes, ``"mse4-mse2-signed-matched"``. `get_format` takes all three.

Lloyd-Max codecs (``mse2``, ``mse3``, ``mse4``, ``qjl4``), y the rotated row, b and c the tables::

    n0 = sqrt(sum y^2 + 1e-8)    u = y / n0    idx = #{u > b/sqrt(D)}    x^ = scale u^
    mse:   u^ = c[idx]/sqrt(D)
    qjl4:  u^ = c[idx]/sqrt(D) + g s,    r = u - c[idx]/sqrt(D),    s = 1 where r >= 0, else -1
           g = sqrt(sum r^2 + 1e-8)/sqrt(D) under the scale rule norm, else sum |r| / D

    scale rule       scale                    what it makes exact
    norm             n0                       nothing: keys shrink, logits have a slope below 1
    matched          ||y|| / ||u^||           the length of a row
    least_squares    <y, u^> / <u^, u^>       least distortion
    unbiased         ||y||^2 / <y, u^>        the slope of logits: <y, x^> = ||y||^2
"""

from __future__ import annotations

import dataclasses
import enum
import functools

from tq_tvm.errors import UnsupportedSpecError

__all__ = [
    "CODECS",
    "FORMATS",
    "HADAMARD_ORDERS",
    "K4V2",
    "LAYOUT_VERSION",
    "NORM_EPS",
    "POLICIES",
    "RECOMMENDED",
    "ROTATIONS",
    "SCALE_RULES",
    "CacheFormat",
    "Codec",
    "QuantPolicy",
    "get_format",
    "hadamard_factors",
    "hadamard_row_masks",
    "rotation_signs",
]

NORM_EPS = 1e-8
"""Added to every sum of squares before its square root; part of the format."""

LAYOUT_VERSION = 1
"""Version of every byte layout in ``FORMATS.md``: it changes when bytes do."""

ROTATIONS = ("none", "hadamard", "signed_hadamard")
SCALE_RULES = ("norm", "matched", "least_squares", "unbiased")

_ROTATION_SLUGS = {"hadamard": "plain", "signed_hadamard": "signed"}
_RULE_SLUGS = {rule: rule.replace("_", "") for rule in SCALE_RULES}

_SIGN_SEED = 0x0CAD1998


class QuantPolicy(enum.IntEnum):
    """Numbers by which serving engines name a cache format."""

    NONE = 0
    INT4 = 4
    INT8 = 8
    FP8 = 16
    TURBO_QUANT = 42


@dataclasses.dataclass(frozen=True)
class Codec:
    """How one row of D values becomes packed codes and a few scales.

    Parameters
    ----------
    name, bits
        Its name, and bits of a code; 16 of ``none``, whose rows stay in the model's dtype.
    centroids, boundaries
        The Lloyd-Max quantiser of N(0, 1); a row normalised to unit length has coordinates of
        standard deviation 1/sqrt(D), so both are divided by sqrt(D). Empty for other families.
    residual_sign
        The highest bit of a code is the sign of what the centroid leaves.
    meta
        Scales of a row, in the order in which they are stored.
    family
        ``"lloyd_max"``, ``"affine"``, ``"fp8"`` or ``"none"``: who encodes and decodes it.
    planes
        Bits of a code in each plane of a row, low bits first; None is all in one.
    """

    name: str
    bits: int
    centroids: tuple[float, ...]
    boundaries: tuple[float, ...]
    residual_sign: bool
    meta: tuple[str, ...]
    family: str = "lloyd_max"
    planes: tuple[int, ...] | None = None

    @property
    def plane_bits(self) -> tuple[int, ...]:
        """Bits of a code in each plane. A row is all of its first plane, then the next."""
        return self.planes or (self.bits,)

    @property
    def codes_per_byte(self) -> int:
        """Codes in one byte: value ``j + i * D / codes_per_byte`` sits at bit ``i * bits``.

        Of a codec of one plane.
        """
        (bits,) = self.plane_bits
        return 8 // bits

    @property
    def packed(self) -> bool:
        """Rows are bytes of codes; otherwise values of the model's dtype."""
        return self.family != "none"

    @property
    def tensor_scale(self) -> bool:
        """One scale for the whole tensor, which the caller gives."""
        return self.family == "fp8"

    def packed_bytes(self, head_dim: int) -> int:
        """Elements of a row in the cache: bytes of codes, or values of the model's dtype."""
        return head_dim * self.bits // 8 if self.packed else head_dim

    def head_dim_of(self, elements: int) -> int:
        """D of a row that has this many elements in the cache."""
        return elements * 8 // self.bits if self.packed else elements


def _symmetric(positive: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-x for x in reversed(positive)) + positive


def _lloyd_max(
    name: str, centroids: tuple, boundaries: tuple, planes: tuple[int, ...] | None = None
) -> Codec:
    """A codec without residual signs, of the positive half of its tables."""
    negative = tuple(-x for x in reversed(boundaries))
    return Codec(
        name=name,
        bits=(2 * len(centroids)).bit_length() - 1,
        centroids=_symmetric(centroids),
        boundaries=(*negative, 0.0, *boundaries),
        residual_sign=False,
        meta=("scale",),
        planes=planes,
    )


_LEVELS3 = (0.2450942, 0.7560052, 1.3439093, 2.1519456)
_EDGES3 = (0.5005497, 1.0499573, 1.7479274)
_LEVELS4 = (
    0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896,
)  # fmt: skip
_EDGES4 = (0.2582217, 0.5224037, 0.7995498, 1.0992858, 1.4371388, 1.8435318, 2.4008034)

_MSE3 = _lloyd_max("mse3", _LEVELS3, _EDGES3, planes=(2, 1))
_QJL4 = dataclasses.replace(
    _MSE3, name="qjl4", bits=4, residual_sign=True, meta=("scale", "residual"), planes=None
)


def _affine(bits: int) -> Codec:
    return Codec(f"int{bits}", bits, (), (), False, ("scale", "zero"), family="affine")


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _QJL4,
        _lloyd_max("mse2", (0.4527808, 1.5104176), (0.9815992,)),
        _MSE3,
        _lloyd_max("mse4", _LEVELS4, _EDGES4),
        _affine(4),
        _affine(8),
        Codec("fp8", 8, (), (), False, (), family="fp8"),
        Codec("none", 16, (), (), False, (), family="none"),
    )
}
"""Every codec by its name. ``qjl4`` is for keys alone."""


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How one token's key and value of one KV head are stored.

    Parameters
    ----------
    key, value
        The codecs.
    rotation
        Of queries, keys and values alike, undone on outputs: ``"hadamard"`` multiplies a row by
        H / sqrt(D), ``"signed_hadamard"`` first by the signs of `rotation_signs`, ``"none"``
        leaves it. Lloyd-Max codecs need one of the two.
    scale_rule
        How Lloyd-Max codecs choose the scale of a row, see the module's table; None for formats
        without such a codec. It is decided when a cache is filled and not seen by whoever reads it.

    Raises
    ------
    UnsupportedSpecError
        ``qjl4`` for values, or a rotation or scale rule that is unknown or means nothing here.

    Examples
    --------
    >>> CacheFormat(CODECS["mse4"], CODECS["mse2"], "signed_hadamard", "unbiased").name
    'mse4-mse2-signed-unbiased'
    """

    key: Codec
    value: Codec
    rotation: str = "none"
    scale_rule: str | None = None

    def __post_init__(self) -> None:
        tables = [codec.name for codec in (self.key, self.value) if codec.family == "lloyd_max"]
        if self.value.residual_sign:
            _refuse("value", "a codec without residual signs", self.value.name)
        rotations = ROTATIONS[1:] if tables else ROTATIONS
        if self.rotation not in rotations:
            why = f" with {' and '.join(tables)}" if tables else ""
            _refuse("rotation", f"one of {', '.join(rotations)}{why}", self.rotation)
        if tables and self.scale_rule not in SCALE_RULES:
            _refuse("scale_rule", f"one of {', '.join(SCALE_RULES)}", self.scale_rule)
        if not tables and self.scale_rule is not None:
            _refuse("scale_rule", "None without a Lloyd-Max codec", self.scale_rule)

    @functools.cached_property
    def name(self) -> str:
        """The preset's name, or the slug; `get_format` reads both back."""
        return _preset_names().get(self) or self.slug

    @property
    def slug(self) -> str:
        """Codecs, rotation and scale rule."""
        parts = [self.key.name, self.value.name]
        if self.rotation != "none":
            parts.append(_ROTATION_SLUGS[self.rotation])
        if self.scale_rule is not None:
            parts.append(_RULE_SLUGS[self.scale_rule])
        return "-".join(parts)

    @property
    def policy(self) -> QuantPolicy | None:
        """The number that engines know it by."""
        return next((p for p, name in POLICIES.items() if FORMATS[name] == self), None)

    @property
    def version(self) -> int:
        """Version of its byte layout."""
        return LAYOUT_VERSION

    @property
    def as_read(self) -> CacheFormat:
        """The format with its scale rule put aside: same bytes, same reading."""
        if self.scale_rule is None:
            return self
        return dataclasses.replace(self, scale_rule="norm")


def _refuse(field: str, expected: str, actual: object) -> None:
    raise UnsupportedSpecError(f"CacheFormat: {field} must be {expected}, got {actual}")


def _format(key: str, value: str, rotation: str = "none", rule: str | None = None) -> CacheFormat:
    return CacheFormat(CODECS[key], CODECS[value], rotation, rule)


def _turbo(key: str, value: str) -> CacheFormat:
    return _format(key, value, "signed_hadamard", "matched")


FORMATS: dict[str, CacheFormat] = {
    "k4v2": _format("qjl4", "mse2", "hadamard", "norm"),
    "tq22": _turbo("mse2", "mse2"),
    "tq32": _turbo("mse3", "mse2"),
    "tq33": _turbo("mse3", "mse3"),
    "tq42": _turbo("mse4", "mse2"),
    "tq43": _turbo("mse4", "mse3"),
    "tq44": _turbo("mse4", "mse4"),
    "tq84": _turbo("int8", "mse4"),
    "int4": _format("int4", "int4"),
    "int8": _format("int8", "int8"),
    "fp8": _format("fp8", "fp8"),
    "none": _format("none", "none"),
}
"""Presets. ``tq`` and two digits: bits of a key and of a value, signed rotation, matched scales."""

K4V2 = FORMATS["k4v2"]

RECOMMENDED = "tq42"
"""The preset to start from; the README has the measured reasons."""

POLICIES = {
    QuantPolicy.NONE: "none",
    QuantPolicy.INT4: "int4",
    QuantPolicy.INT8: "int8",
    QuantPolicy.FP8: "fp8",
    QuantPolicy.TURBO_QUANT: "k4v2",
}
"""Presets that have a policy number."""


@functools.lru_cache(maxsize=1)
def _preset_names() -> dict[CacheFormat, str]:
    return {fmt: name for name, fmt in FORMATS.items()}


def get_format(name: CacheFormat | str | int) -> CacheFormat:
    """Return the format of a preset's name, a policy number or a slug; a format as it is.

    Raises
    ------
    UnsupportedSpecError
        No such format.

    Examples
    --------
    >>> get_format("qjl4-mse2-plain-norm") == get_format("k4v2") == get_format(42)
    True
    """
    if isinstance(name, CacheFormat):
        return name
    if isinstance(name, str):
        found = FORMATS.get(name) or _parse(name)
    else:
        # True equals 1 and 42.0 equals 42, but neither is a policy.
        known = type(name) in (int, QuantPolicy) and name in POLICIES
        found = FORMATS[POLICIES[QuantPolicy(name)]] if known else None
    if found is None:
        raise UnsupportedSpecError(f"get_format: name must be {_known()}, got {name!r}")
    return found


def _known() -> str:
    """What names a format, in words."""
    presets = ", ".join(
        f"{name!r} ({int(fmt.policy)})" if fmt.policy is not None else repr(name)
        for name, fmt in FORMATS.items()
    )
    return f"one of {presets} or a slug such as 'mse4-mse2-signed-unbiased'"


@functools.lru_cache(maxsize=1024)
def _parse(slug: str) -> CacheFormat | None:
    key, _, rest = slug.partition("-")
    value, *options = rest.split("-")
    if key not in CODECS or value not in CODECS:
        return None
    rotations = {s: rotation for rotation, s in _ROTATION_SLUGS.items()}
    rules = {s: rule for rule, s in _RULE_SLUGS.items()}
    # Slices: torch.compile of torch 2.11 does not trace list.pop.
    rotated = options[:1] if options and options[0] in rotations else []
    ruled = options[len(rotated) :]
    if len(ruled) > 1 or not set(ruled) <= set(rules):
        return None
    rotation = rotations[rotated[0]] if rotated else "none"
    return _format(key, value, rotation, rules[ruled[0]] if ruled else None)


# --- rotations

HADAMARD_ORDERS = {12: 11, 20: 19, 28: 13}
"""Orders of Hadamard matrices that are no power of two, each with the prime of its construction."""


@functools.lru_cache(maxsize=64)
def hadamard_factors(dim: int) -> tuple[int, ...]:
    """Orders whose Kronecker product, the first one outermost, is the Hadamard matrix of ``dim``.

    As few as can be of 12, 20 and 28, then a power of two of at least 4.

    Raises
    ------
    UnsupportedSpecError
        There is no such product.

    Examples
    --------
    >>> hadamard_factors(128), hadamard_factors(80), hadamard_factors(576)
    ((128,), (20, 4), (12, 12, 4))
    """
    factors: list[int] = []
    rest = dim
    while rest & (rest - 1):
        order = next((o for o in HADAMARD_ORDERS if rest % o == 0 and rest // o >= 4), None)
        if order is None:
            raise UnsupportedSpecError(
                f"hadamard_factors: dim must be a product of 12, 20, 28 and a power of two, "
                f"got {dim}"
            )
        factors.append(order)
        rest //= order
    return (*factors, rest)


def _character(prime: int) -> list[int]:
    """Quadratic character of 0 .. prime - 1."""
    squares = {x * x % prime for x in range(1, prime)}
    return [0] + [1 if x in squares else -1 for x in range(1, prime)]


@functools.lru_cache(maxsize=8)
def hadamard_row_masks(order: int) -> tuple[int, ...]:
    """The symmetric Hadamard matrix of order 12, 20 or 28: bit j of mask i is 1 where H[i][j] = -1.

    With chi the quadratic character modulo a prime p (Paley, 1933)::

        12, 20: p = order - 1.  H[0][j] = H[i][0] = 1, H[i+1][j+1] = chi(i+j), -1 where p | i+j
        28:     p = 13.  C[0][0] = 0, C[0][j] = C[i][0] = 1, C[i+1][j+1] = chi(i-j);
                H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]
    """
    prime = HADAMARD_ORDERS[order]
    chi = _character(prime)

    def first(i: int, j: int) -> int:
        return 1 if 0 in (i, j) else chi[(i + j - 2) % prime] or -1

    def second(i: int, j: int) -> int:
        a, b = i // 2, j // 2
        odd = i % 2 and j % 2
        if a == b:
            return 1 if i % 2 == j % 2 == 0 else -1
        core = 1 if 0 in (a, b) else chi[(a - b) % prime]
        return -core if odd else core

    entry = first if prime == order - 1 else second
    return tuple(sum((entry(i, j) < 0) << j for j in range(order)) for i in range(order))


def rotation_signs(dim: int) -> tuple[int, ...]:
    """The signs, 1 or -1, by which ``signed_hadamard`` multiplies a row before it rotates it.

    Sign j is -1 where the lowest bit of ``mix(j ^ 0x0CAD1998)`` is 1, mix being the last step of
    MurmurHash3: x ^= x >> 16, x *= 0x85EBCA6B, x ^= x >> 13, x *= 0xC2B2AE35, x ^= x >> 16 in 32
    bits. Of 400 seeds this one spreads a constant best over the rotated rows of 64 to 1024 values.
    """
    return tuple(1 - 2 * (_mix(j ^ _SIGN_SEED) & 1) for j in range(dim))


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16
