"""Tables of quality, for a terminal and for the README."""

from __future__ import annotations

from tabulate import tabulate

from tq_tvm.quality.measure import CodecQuality, PresetQuality

__all__ = ["attention_table", "codec_table", "preset_table"]


def codec_table(found: list[CodecQuality]) -> str:
    """Codecs under their scale rules, on Gaussian rows."""
    headers = [
        "codec", "scale rule", "distortion", "tables at D", "D to infinity", "x Shannon",
        "cosine", "slope",
    ]  # fmt: skip
    cells = [
        [
            row.codec,
            row.scale_rule or "-",
            _short(row.distortion),
            _short(row.theory),
            _short(row.limit),
            f"{row.over_shannon:.2f}" if row.codec != "none" else "-",
            f"{row.cosine:.5f}",
            f"{row.slope:.4f}",
        ]
        for row in found
    ]
    return _table(cells, headers)


def preset_table(found: list[PresetQuality]) -> str:
    """Formats: bytes, distortion of each kind of rows, attention and needle."""
    context, scale = _point(found[0])
    kinds = list(found[0].key)
    headers = [
        "format", "bytes", "bits",
        *(f"K {kind.replace('_', ' ')}" for kind in kinds),
        "V gaussian", "slope",
        "KL", "KL offset", "output", "needle", "weight",
    ]  # fmt: skip
    cells = [
        [
            row.format,
            row.bytes_per_token_head,
            f"{row.bits_per_value:.2f}",
            *(_short(row.key[kind]) for kind in kinds),
            _short(row.value["gaussian"]),
            f"{row.slope['gaussian']:.3f}",
            _short(row.divergence[context, scale]),
            _short(row.offset_divergence[context, scale]),
            _short(row.output[context, scale]),
            f"{row.needle_found:.0%}",
            f"{row.needle_weight:.2f}",
        ]
        for row in found
    ]
    return _table(cells, headers)


def attention_table(found: list[PresetQuality]) -> str:
    """KL of the weights / relative error of the output, against context and logit scale."""
    points = list(found[0].divergence)
    headers = ["KL / output", *(f"{_tokens(c)}, {s:g}" for c, s in points)]
    cells = [
        [row.format, *(f"{_short(row.divergence[p])} / {_short(row.output[p])}" for p in points)]
        for row in found
    ]
    return _table(cells, headers)


def _point(row: PresetQuality) -> tuple[int, float]:
    """The longest context at the middle logit scale, which `preset_table` shows."""
    scales = sorted({scale for _, scale in row.divergence})
    return max(context for context, _ in row.divergence), scales[len(scales) // 2]


def _tokens(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 1e-3 else f"{value:.4f}"


def _table(cells: list[list], headers: list[str]) -> str:
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)
