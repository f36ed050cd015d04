#!/usr/bin/env python3
"""Train a small language model, then its perplexity with every preset in the cache.

Decoding goes token by token through `PagedKVCache`, so through this package's kernels for
``--device``; presets without kernels there are left out and named. Writes a JSON file.
"""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate

from tq_tvm.bench.table import replace_between
from tq_tvm.errors import TQError
from tq_tvm.quality.language_model import Decoder, DecoderConfig, read_text, train
from tq_tvm.quality.perplexity import held_out_windows, keys_of, negative_log_likelihoods
from tq_tvm.spec import FORMATS, get_format

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--steps", default=900, show_default=True, help="Updates of the training.")
@click.option("--batch", default=64, show_default=True, help="Windows of an update.")
@click.option("--context", default=1024, show_default=True, help="Tokens of a window.")
@click.option("--sequences", default=16, show_default=True, help="Held-out windows.")
@click.option("--seed", default=0, show_default=True)
@click.option("--train-on", default="cuda", show_default=True, help="Device of the training.")
@click.option("--device", default="cpu", show_default=True, help="Device of the decoding.")
@click.option("--format", "formats", multiple=True, help="A preset or slug; all presets if none.")
@click.option("--json", "path", type=_FILE, help="Write results there.")
@click.option(
    "--rows", "rows_path", type=_FILE, help="Save keys there, for `tq-tvm quality --rows`."
)
@click.option("--readme", type=_FILE, help="Only put the table of --json between its marks there.")
def main(
    steps: int,
    batch: int,
    context: int,
    sequences: int,
    seed: int,
    train_on: str,
    device: str,
    formats: tuple[str, ...],
    path: Path | None,
    rows_path: Path | None,
    readme: Path | None,
) -> None:
    """Train, decode, print a table."""
    if readme is not None:
        if path is None:
            raise click.UsageError("--readme needs the --json file of a run")
        text = _table(json.loads(path.read_text())["rows"])
        replace_between(readme, "language model", text, op="language_model")
        return
    learn, test = read_text()
    begin = time.monotonic()
    model = train(
        DecoderConfig(), learn, steps=steps, batch=batch, context=context, seed=seed,
        device=torch.device(train_on),
        report=lambda step, loss: click.echo(f"step {step}: {loss / math.log(2):.3f} bits a byte"),
    )  # fmt: skip
    seconds = time.monotonic() - begin
    model = model.to(device).eval()
    windows = held_out_windows(test, sequences, context)
    if rows_path is not None:
        torch.save(keys_of(model, windows, 8192), rows_path)
    rows, absent = _measure(model, windows, list(dict.fromkeys(["none", *(formats or FORMATS)])))
    click.echo(_table(rows))
    if path is not None:
        parameters = sum(p.numel() for p in model.parameters())
        result = {
            "model": {"parameters": parameters, "steps": steps, "batch": batch, "seed": seed},
            "text": {
                "python": platform.python_version(),
                "learnt": len(learn),
                "held_out": len(test),
            },
            "training": {"device": _name(train_on), "seconds": round(seconds, 1)},
            "decoding": {"device": _name(device), "sequences": sequences, "context": context},
            "rows": rows,
            "absent": absent,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")


def _measure(
    model: Decoder, windows: torch.Tensor, formats: list[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of the table, and why formats have none; the first format is what others change."""
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    exact: torch.Tensor | None = None
    for name in formats:
        try:
            losses = negative_log_likelihoods(model, windows, name).double()
        except TQError as error:
            absent[name] = str(error)
            click.echo(f"{name}: {error}", err=True)
            continue
        exact = losses if exact is None else exact
        # Sequences are independent; bytes of one are not.
        change = (losses - exact).mean(1)
        rows.append(
            {
                "format": get_format(name).name,
                "bits_per_byte": losses.mean().item() / math.log(2),
                "perplexity": math.exp(losses.mean()),
                "change_percent": 100 * math.expm1(change.mean()),
                "error_percent": 100 * change.std().item() / math.sqrt(len(change)),
            }
        )
        click.echo(f"{name}: {rows[-1]['change_percent']:+.3f} %")
    return rows, absent


def _table(rows: list[dict[str, Any]]) -> str:
    """For a terminal and for the README."""
    cells = [
        [
            row["format"],
            f"{row['perplexity']:.4f}",
            f"{row['change_percent']:+.2f} %",
            f"{row['error_percent']:.2f} %",
        ]
        for row in rows
    ]
    headers = ["format", "perplexity of a byte", "change", "standard error"]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def _name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
