"""Measurements of codecs and presets on rows of a model of 16 bits, by the package's reference.

With x a row, x^ what the cache gives back, q a query of N(0, 1), d = head_dim::

    distortion   mean ||x - x^||^2 / ||x||^2
    slope        sum (q.x)(q.x^) / sum (q.x)^2, the regression of logits on true ones
    KL           mean sum p log(p / p^), p = softmax(s q.k / sqrt(d)), s the logit scale: the
                 standard deviation of the logits of Gaussian keys
    output       ||o - o^|| / ||o||, o = sum p v, with keys and values from the cache
    needle       one key among all has a logit of 5 standard deviations, a few of the other keys
                 more: how often its logit is the largest, and its weight over its true weight at
                 a logit scale of 4
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tq_tvm import reference
from tq_tvm.formats import CODECS, SCALE_RULES, CacheFormat, Codec, get_format
from tq_tvm.quality.rows import KINDS, make_rows
from tq_tvm.quality.theory import expected_distortion, shannon_bound
from tq_tvm.spec import CacheSpec

__all__ = [
    "CONTEXTS",
    "LOGIT_SCALES",
    "CodecQuality",
    "PresetQuality",
    "as_cached",
    "measure_codecs",
    "measure_preset",
]

CONTEXTS = (1024, 8192, 32768, 131072)
LOGIT_SCALES = (1.0, 2.0, 4.0)

_ROWS = 8192
_QUERIES = 32
_NEEDLES = 128
_NEEDLE_DEVIATIONS = 5.0
_NEEDLE_SCALE = 4.0


@dataclasses.dataclass(frozen=True)
class CodecQuality:
    """One codec under one scale rule, on Gaussian rows.

    ``theory`` is the distortion of its tables at this head_dim, ``limit`` as head_dim grows; both
    None for codecs without tables. ``over_shannon`` is distortion / 4^-bits.
    """

    codec: str
    scale_rule: str | None
    distortion: float
    cosine: float
    slope: float
    theory: float | None
    limit: float | None
    over_shannon: float


@dataclasses.dataclass(frozen=True)
class PresetQuality:
    """One format.

    ``key`` and ``value`` map kinds of rows to distortions, ``slope`` kinds to slopes of logits;
    ``divergence`` and ``output`` map (context, logit scale) of Gaussian keys, ``offset_divergence``
    those of offset keys.
    """

    format: str
    bytes_per_token_head: int
    bits_per_value: float
    key: dict[str, float]
    value: dict[str, float]
    cosine: dict[str, float]
    slope: dict[str, float]
    divergence: dict[tuple[int, float], float]
    offset_divergence: dict[tuple[int, float], float]
    output: dict[tuple[int, float], float]
    needle_found: float
    needle_weight: float


def as_cached(rows: torch.Tensor, fmt: CacheFormat, codec: Codec) -> torch.Tensor:
    """Rows ``[..., D]`` as a bfloat16 model gets them back from a cache; float32."""
    rotated = reference.rotate_rows(rows, fmt.rotation)
    packed, scales = reference.encode_rows(rotated, codec, fmt.scale_rule, dtype=torch.bfloat16)
    back = reference.decode_rows(packed, scales.bfloat16(), codec)
    return reference.rotate_back(back, fmt.rotation)


def _distortion(rows: torch.Tensor, got: torch.Tensor) -> float:
    return float(((rows - got).square().sum(-1) / rows.square().sum(-1)).mean())


def _slope(rows: torch.Tensor, got: torch.Tensor, queries: torch.Tensor) -> float:
    exact, coded = rows @ queries.T, got @ queries.T
    return float((exact * coded).sum() / exact.square().sum())


def measure_codecs(
    head_dim: int = 128, *, seed: int = 0, device: torch.device | str = "cpu"
) -> list[CodecQuality]:
    """Measure every codec under every scale rule on Gaussian rows."""
    rows = make_rows("gaussian", _ROWS, head_dim, seed, device)
    queries = make_rows("gaussian", 1024, head_dim, seed + 1, device)
    found = []
    for codec in CODECS.values():
        tables = codec.family == "lloyd_max"
        theory = expected_distortion(codec, head_dim) if tables else None
        limit = expected_distortion(codec) if tables else None
        for rule in SCALE_RULES if tables else (None,):
            packed, scales = reference.encode_rows(rows, codec, rule, dtype=torch.bfloat16)
            got = reference.decode_rows(packed, scales.bfloat16(), codec)
            distortion = _distortion(rows, got)
            found.append(
                CodecQuality(
                    codec=codec.name,
                    scale_rule=rule,
                    distortion=distortion,
                    cosine=float(torch.cosine_similarity(rows, got, dim=-1).mean()),
                    slope=_slope(rows, got, queries),
                    theory=theory,
                    limit=limit,
                    over_shannon=distortion / shannon_bound(codec.bits),
                )
            )
    return found


def measure_preset(
    name: str,
    head_dim: int = 128,
    *,
    contexts: Sequence[int] = CONTEXTS,
    logit_scales: Sequence[float] = LOGIT_SCALES,
    rows: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PresetQuality:
    """Measure a format, by its name.

    Parameters
    ----------
    contexts, logit_scales
        Tokens attended to, and standard deviations of the logits. The needle is among as many keys
        as the longest context has.
    rows
        Further kinds of rows ``[N, D]``, of a real model say.
    """
    fmt = get_format(name)
    spec = CacheSpec(head_dim, 1, 1, format=fmt.name)
    kinds = {kind: make_rows(kind, _ROWS, head_dim, seed, device) for kind in KINDS} | (rows or {})
    queries = make_rows("gaussian", 1024, head_dim, seed + 1, device)
    keys = {kind: as_cached(x, fmt, fmt.key) for kind, x in kinds.items()}
    divergence, output = _attend("gaussian", fmt, head_dim, contexts, logit_scales, seed, device)
    offset, _ = _attend("offset", fmt, head_dim, contexts, logit_scales, seed, device)
    found, weight = _find_needles(fmt, head_dim, max(contexts), seed, device)
    return PresetQuality(
        format=fmt.name,
        bytes_per_token_head=spec.bytes_per_token_head,
        bits_per_value=8 * spec.bytes_per_token_head / (2 * head_dim),
        key={kind: _distortion(x, keys[kind]) for kind, x in kinds.items()},
        value={kind: _distortion(x, as_cached(x, fmt, fmt.value)) for kind, x in kinds.items()},
        cosine={
            kind: float(torch.cosine_similarity(x, keys[kind], dim=-1).mean())
            for kind, x in kinds.items()
        },
        slope={kind: _slope(x, keys[kind], queries) for kind, x in kinds.items()},
        divergence=divergence,
        offset_divergence=offset,
        output=output,
        needle_found=found,
        needle_weight=weight,
    )


_Grid = dict[tuple[int, float], float]


def _attend(
    kind: str,
    fmt: CacheFormat,
    head_dim: int,
    contexts: Sequence[int],
    logit_scales: Sequence[float],
    seed: int,
    device: torch.device | str,
) -> tuple[_Grid, _Grid]:
    """KL of the weights and error of the output, against context and logit scale."""
    longest = max(contexts)
    k, v = (make_rows(kind, longest, head_dim, seed + s, device) for s in (2, 3))
    v = v if kind == "gaussian" else v - v.mean(0)
    q = make_rows("gaussian", _QUERIES, head_dim, seed + 4, device)
    k_cached, v_cached = as_cached(k, fmt, fmt.key), as_cached(v, fmt, fmt.value)
    exact, coded = ((q @ t.T) * head_dim**-0.5 for t in (k, k_cached))
    divergence: _Grid = {}
    output: _Grid = {}
    for context in contexts:
        for scale in logit_scales:
            true, other = (
                (logits[:, :context] * scale).log_softmax(-1) for logits in (exact, coded)
            )
            weights = true.exp()
            divergence[context, scale] = float((weights * (true - other)).sum(-1).mean())
            want, got = weights @ v[:context], other.exp() @ v_cached[:context]
            output[context, scale] = float((want - got).norm() / want.norm())
    return divergence, output


def _find_needles(
    fmt: CacheFormat, head_dim: int, context: int, seed: int, device: torch.device | str
) -> tuple[float, float]:
    """How often a planted key is the nearest, and the weight that it keeps; one query each."""
    keys = make_rows("gaussian", context, head_dim, seed + 5, device)
    q = make_rows("gaussian", _NEEDLES, head_dim, seed + 6, device)
    direction = q / q.norm(dim=-1, keepdim=True)
    needles = make_rows("gaussian", _NEEDLES, head_dim, seed + 7, device)
    along = (needles * direction).sum(-1, keepdim=True)
    needles = (needles + (_NEEDLE_DEVIATIONS - along) * direction).bfloat16().float()
    cached, found_keys = as_cached(keys, fmt, fmt.key), as_cached(needles, fmt, fmt.key)
    scale = _NEEDLE_SCALE * head_dim**-0.5

    def weight(planted: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = q @ others.T
        needle = (q * planted).sum(-1)
        total = torch.logaddexp((logits * scale).logsumexp(-1), needle * scale)
        return needle > logits.amax(-1), (needle * scale - total).exp()

    _, exact = weight(needles, keys)
    nearest, kept = weight(found_keys, cached)
    return float(nearest.float().mean()), float((kept / exact).mean())
