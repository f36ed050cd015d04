"""Put the tables of a ``bench.json`` into README.md, and draw its picture.

Where a ``compare.json`` lies beside it, a run with ``--compare``, other programs are taken from it.
"""

from pathlib import Path

import click

from tq_tvm.bench.results import read_rows
from tq_tvm.bench.roofline import draw
from tq_tvm.bench.table import replace_table

_ROOT = Path(__file__).parents[1]


@click.command()
@click.argument(
    "bench",
    type=click.Path(path_type=Path, exists=True),
    default=_ROOT / "tuning_logs" / "nvidia_h200" / "bench.json",
)
@click.option("--readme", type=click.Path(path_type=Path), default=_ROOT / "README.md")
@click.option(
    "--roofline",
    type=click.Path(path_type=Path),
    help="Picture to draw; roofline.svg beside BENCH by default.",
)
@click.option("--name", default="bench", show_default=True, help="Of the marks in README.")
@click.option("--picture/--no-picture", default=True, show_default=True)
def main(bench: Path, readme: Path, roofline: Path | None, name: str, picture: bool) -> None:
    """Rewrite what lies between README's marks from BENCH."""
    rows = read_rows(bench)
    beside = bench.with_name("compare.json")
    compared = read_rows(beside) if beside.exists() else None
    drawn = (roofline or bench.with_name("roofline.svg")) if picture else None
    if drawn is not None:
        draw(compared or rows, drawn)
    replace_table(readme, rows, compared, drawn, name=name)


if __name__ == "__main__":
    main()
