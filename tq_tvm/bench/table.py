"""Rows of a benchmark as tables, and these tables in a Markdown file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from tq_tvm.artifacts import schedule_word
from tq_tvm.bench.results import Row
from tq_tvm.errors import ArgumentValueError

__all__ = ["all_tables", "compare_tables", "describe", "headline", "replace_between", "table"]


def describe(kernel: str, size: dict[str, Any]) -> str:
    """Sizes of a kernel's row, as ``bench.json`` has them, in a few words."""
    if kernel == "rotate":
        text = f"{size['rows']} x {size['n']}"
    else:
        text = f"{size['batch']} x {size['context']}"
        if "shortest" in size:
            text = f"{size['batch']} x {size['shortest']}..{size['context']}"
        if kernel in ("decode", "mla"):
            text += f", {size['q_heads']}/{size['kv_heads']}"
        if "new_tokens" in size:
            text = f"{size['batch']} x {size['new_tokens']} over {size['context']}"
            text += f", {size['feature']}" if size["feature"] else ""
        text += "".join(f", {name}" for name in _unusual(size))
        if size.get("rotate_back"):
            text += ", rotated back"
    return text + (", graph" if size["graph"] else "")


def _unusual(size: dict[str, Any]) -> list[str]:
    """What most rows have alike and this one does not."""
    found = [] if size["format"] == "k4v2" else [size["format"]]
    if size["head_dim"] != 128:
        found.append(f"D = {size['head_dim']}")
    if "window" in size:
        found.append(f"newest {size['window']} unquantised")
    usual = {"dtype": ("bfloat16", "float32"), "layout": ("bshd",)}
    return found + [size[name] for name, values in usual.items() if size[name] not in values]


def _is_torch(baseline: str) -> bool:
    return baseline.startswith("torch")


def table(rows: list[Row], style: str = "simple") -> str:
    """Format rows; ``style`` is one of tabulate's (``"github"`` for Markdown)."""
    cells = []
    for row in rows:
        of_torch = {name: us for name, us in row.baselines.items() if _is_torch(name)}
        name, baseline = min(of_torch.items(), key=lambda pair: pair[1], default=("", None))
        cells.append(
            [
                row.kernel,
                describe(row.kernel, row.workload),
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


def compare_tables(rows: list[Row], style: str = "simple") -> dict[str, str]:
    """Format what other programs took, in us and as a multiple of our time, by kernel.

    Rows that no other program than torch was timed on are left out.
    """
    rows = [row for row in rows if not all(map(_is_torch, row.baselines))]
    tables = {}
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in rows if row.kernel == kernel]
        names = dict.fromkeys(name for row in own for name in row.baselines)
        tables[kernel] = _beside(own, list(names), style)
    return tables


def _beside(rows: list[Row], names: list[str], style: str) -> str:
    cells = [
        [
            describe(row.kernel, row.workload),
            f"{row.us:.1f}",
            f"{row.fraction_of_copy:.0%}",
            *(_ratio(row, name) for name in names),
        ]
        for row in rows
    ]
    headers = [rows[0].kernel, "us", "of copy", *names]
    return tabulate(cells, headers=headers, tablefmt=style, disable_numparse=True)


def _ratio(row: Row, name: str) -> str:
    if name not in row.baselines:
        return "-"
    return f"{row.baselines[name]:.1f} ({row.baselines[name] / row.us:.2f}x)"


def _note(rows: list[Row]) -> str:
    # Rows differ in the programs that they name alone.
    conditions = {k: v for row in rows for k, v in row.conditions.items()}
    facts = ", ".join(f"{k} {v}" for k, v in conditions.items())
    # So do those of several runs.
    reached = sorted({f"{row.copy_tb_per_s:.3f}" for row in rows})
    runs = "that run" if len(reached) == 1 else "these runs"
    bandwidth = " to ".join(dict.fromkeys((reached[0], reached[-1])))
    return f"Copy bandwidth in {runs}: {bandwidth} TB/s. Conditions: {facts}."


def headline(rows: list[Row]) -> str:
    """Markdown of the rows of ``decode`` that FlashInfer was timed on, beside it and torch.

    Raises
    ------
    ArgumentValueError
        There are none.
    """
    rows = [row for row in rows if row.kernel == "decode" and "FlashInfer" in row.baselines]
    if not rows:
        raise ArgumentValueError(
            "report: rows must have some of decode beside FlashInfer, got none; "
            "run `tq-tvm bench --kernel decode --compare`"
        )
    every = dict.fromkeys(name for row in rows for name in row.baselines)
    names = [name for name in every if _is_torch(name) or name.startswith("FlashInfer")]
    return f"{_beside(rows, names, 'github')}\n\n{_note(rows)}"


def all_tables(rows: list[Row], compared: list[Row] | None = None, picture: str = "") -> str:
    """Markdown of all rows, and of those beside other programs than torch.

    Parameters
    ----------
    rows
        At least one.
    compared
        Rows of another run, beside other programs; None where ``rows`` are.
    picture
        What to show below the tables, as the file links to it.
    """
    parts = [table(rows, "github")]
    if compared is not None:
        parts.append(_note(rows))
    parts += [*compare_tables(compared or rows, "github").values(), _note(compared or rows)]
    if picture:
        parts.append(f"![bandwidth of decode over bytes moved]({picture})")
    return "\n\n".join(parts)


def replace_between(path: Path, name: str, text: str, *, op: str) -> None:
    """Put ``text`` between the marks of a Markdown file that have a name.

    Raises
    ------
    ArgumentValueError
        The file has no such marks, or several; ``op`` is who says so.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = path.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ArgumentValueError(
            f"{op}: {path} must have one {begin} and one {end}, got neither; add them"
        )
    before, rest = content.split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
