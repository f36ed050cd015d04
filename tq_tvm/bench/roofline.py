"""A picture of what ``decode`` and its peers make of the memory bandwidth."""

from __future__ import annotations

from pathlib import Path

from tq_tvm.bench.results import Row
from tq_tvm.errors import ArgumentValueError, BenchmarkError

__all__ = ["draw"]

_MARKERS = "osD^vP*X<>"
_TIMES_US = (10, 100, 1000, 10000)
_TICKS = [digit * 10.0**power for power in range(-5, 2) for digit in (1, 2, 5)]


def _series(rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """Points (bytes, TB/s) of ours and of every baseline, each at its own bytes."""
    series: dict[str, list[tuple[float, float]]] = {"tq_tvm": []}
    for row in rows:
        series["tq_tvm"].append((row.bytes, row.bytes / row.us / 1e6))
        for name, moved in row.baseline_bytes.items():
            point = (moved, moved / row.baselines[name] / 1e6)
            series.setdefault(name, []).append(point)
    return series


def draw(rows: list[Row], path: Path) -> None:
    """Draw the ``decode`` rows: achieved bandwidth over the bytes of a call, below the copy's.

    A format of fewer bytes lies further left; points on one thin line take the same time.

    Parameters
    ----------
    rows
        Rows of one run; those of other kernels are passed over.
    path
        Where to; its suffix says what kind of picture, ``.svg`` or ``.png``.

    Raises
    ------
    ArgumentValueError
        No row is of ``decode``.
    BenchmarkError
        matplotlib is not installed.
    """
    rows = [row for row in rows if row.kernel == "decode"]
    if not rows:
        raise ArgumentValueError(
            "roofline: rows must have some of decode, got none; run `tq-tvm bench --kernel decode`"
        )
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchmarkError(
            f"roofline: matplotlib must be installed, got {error}; run `pip install 'tq-tvm[plot]'`"
        ) from error

    series = _series(rows)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [point for line in series.values() for point in line]
    left, right = min(p[0] for p in points) / 2, max(p[0] for p in points) * 2
    bottom, top = min(p[1] for p in points) / 2, rows[0].copy_tb_per_s * 1.5
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.axhline(rows[0].copy_tb_per_s, color="black", label="large copy")
    for us in _TIMES_US:
        axes.plot([left, right], [left / us / 1e6, right / us / 1e6], color="0.8", lw=0.8, zorder=0)
        x = min(right, top * us * 1e6) / 1.2
        y = x / us / 1e6
        if x > left and y > bottom:
            axes.text(x, y, f"{us} us", ha="right", va="bottom", color="0.5", fontsize="small")
    for marker, (name, line) in zip(_MARKERS * len(series), series.items(), strict=False):
        axes.scatter(*zip(*line, strict=True), marker=marker, label=name, zorder=2)
    axes.set(
        xlabel="bytes that a call has to move, in the program's own format",
        ylabel="TB/s",
        yticks=[tick for tick in _TICKS if bottom < tick < top],
        title=f"decode on {rows[0].conditions['device']}",
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same rows give the same file, and its text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "tq_tvm", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
