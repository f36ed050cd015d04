"""Pictures of quality: distortion over bits beside its bounds, and attention over context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tq_tvm.errors import BenchmarkError
from tq_tvm.quality.measure import CodecQuality, PresetQuality
from tq_tvm.quality.theory import shannon_bound

__all__ = ["draw"]

_MARKERS = "osD^vP*X<>hd"


def draw(codecs: list[CodecQuality], presets: list[PresetQuality], directory: Path) -> list[Path]:
    """Draw ``distortion.svg`` and ``attention.svg`` into a directory; return their paths.

    Raises
    ------
    BenchmarkError
        matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchmarkError(
            f"quality: matplotlib must be installed, got {error}; run `pip install 'tq-tvm[plot]'`"
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / "distortion.svg", directory / "attention.svg"]
    figures = [Figure(figsize=(8, 4.5), layout="constrained") for _ in paths]
    _draw_distortion(figures[0].subplots(), codecs)
    _draw_attention(figures[1].subplots(1, 2), presets)
    # The same numbers give the same file, and its text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "tq_tvm", "svg.fonttype": "none"}):
        for figure, path in zip(figures, paths, strict=True):
            figure.savefig(path, metadata={"Date": None})
    return paths


def _draw_distortion(axes: Any, codecs: list[CodecQuality]) -> None:
    from tq_tvm.formats import CODECS

    bits = [1.5 + step / 10 for step in range(80)]
    axes.plot(bits, [shannon_bound(b) for b in bits], color="black", label="Shannon, 4^-bits")
    limits = {CODECS[row.codec].bits: row.limit for row in codecs if row.codec.startswith("mse")}
    axes.plot(list(limits), list(limits.values()), "k--", label="Lloyd-Max, D to infinity")
    drawn = [row for row in codecs if row.scale_rule in (None, "matched") and row.codec != "none"]
    for marker, row in zip(_MARKERS, drawn, strict=False):
        axes.scatter(CODECS[row.codec].bits, row.distortion, marker=marker, label=row.codec)
    axes.set(yscale="log", xlabel="bits of a code", ylabel="distortion of Gaussian rows")
    axes.legend(frameon=False)


def _draw_attention(axes: Any, presets: list[PresetQuality]) -> None:
    scales = sorted({scale for _, scale in presets[0].divergence})
    scale = scales[len(scales) // 2]
    contexts = sorted({context for context, _ in presets[0].divergence})
    # What loses nothing has no place on a logarithmic axis.
    lossy = [row for row in presets if row.output[contexts[0], scale] > 0]
    for row, marker in zip(lossy, _MARKERS * len(presets), strict=False):
        for one, values in zip(axes, (row.divergence, row.output), strict=True):
            line = [values[context, scale] for context in contexts]
            one.plot(contexts, line, marker=marker, label=row.format)
    for one, what in zip(axes, ("KL of the weights", "relative error of the output"), strict=True):
        one.set(xscale="log", yscale="log", xlabel="context", ylabel=what)
        one.set_xticks(contexts, [str(context) for context in contexts])
        one.minorticks_off()
    axes[0].set(title=f"logits of standard deviation {scale:g}")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
