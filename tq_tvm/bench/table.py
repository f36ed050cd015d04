"""Rows of a benchmark as a table, and that table in a Markdown file."""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from tq_tvm.artifacts import schedule_word
from tq_tvm.bench.results import Row
from tq_tvm.errors import ArgumentValueError

__all__ = ["replace_table", "table"]

_BEGIN, _END = "<!-- bench: begin -->", "<!-- bench: end -->"


def _describe(row: Row) -> str:
    size = row.workload
    if row.kernel == "rotate":
        text = f"{size['rows']} x {size['n']}"
    else:
        text = f"{size['batch']} x {size['context']}"
        if "shortest" in size:
            text = f"{size['batch']} x {size['shortest']}..{size['context']}"
        if row.kernel == "decode":
            text += f", {size['q_heads']}/{size['kv_heads']}"
        if size.get("rotate_back"):
            text += ", rotated back"
    return text + (", graph" if size["graph"] else "")


def table(rows: list[Row], style: str = "simple") -> str:
    """Format rows; ``style`` is one of tabulate's (``"github"`` for Markdown)."""
    cells = []
    for row in rows:
        name, baseline = min(row.baselines.items(), key=lambda pair: pair[1], default=("", None))
        cells.append(
            [
                row.kernel,
                _describe(row),
                f"{row.us:.1f}",
                f"{row.fraction_of_copy:.0%}",
                "-" if row.default_us is None else f"{row.default_us:.1f}",
                "-" if baseline is None else f"{baseline:.1f} ({name})",
                "-" if baseline is None else f"{baseline / row.us:.2f}x",
                schedule_word(row.tuned, row.record),
            ]
        )
    headers = [
        "kernel",
        "workload",
        "us",
        "of copy",
        "default us",
        "torch us",
        "speed-up",
        "schedule",
    ]
    return tabulate(cells, headers=headers, tablefmt=style, disable_numparse=True)


def replace_table(path: Path, rows: list[Row]) -> None:
    """Put the table of ``rows`` between the marks in a Markdown file.

    Raises
    ------
    ArgumentValueError
        The file has no marks.
    """
    text = path.read_text()
    if text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise ArgumentValueError(
            f"report: {path} must have one {_BEGIN} and one {_END}, got neither; add them"
        )
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    facts = ", ".join(f"{k} {v}" for k, v in rows[0].conditions.items())
    note = f"Copy bandwidth in that run: {rows[0].copy_tb_per_s:.3f} TB/s. Conditions: {facts}."
    path.write_text(f"{before}{_BEGIN}\n{table(rows, 'github')}\n\n{note}\n{_END}{after}")
