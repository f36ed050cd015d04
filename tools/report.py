"""Put the tables of a target's ``bench.json`` into Markdown, and draw its picture.

All of them go between the marks ``bench`` of the ``README.md`` beside it, the headline rows between
those of the repository's README.md that bear the target's name, such as ``bench nvidia_h100``.
Where a ``compare.json`` lies beside it, a run with ``--compare``, other programs are taken from it.
"""

from pathlib import Path

import click

from tq_tvm.bench.results import read_rows
from tq_tvm.bench.roofline import draw
from tq_tvm.bench.table import all_tables, headline, replace_between

_ROOT = Path(__file__).parents[1]


@click.command()
@click.argument("bench", type=click.Path(path_type=Path, exists=True, resolve_path=True))
@click.option(
    "--readme",
    type=click.Path(path_type=Path),
    default=_ROOT / "README.md",
    help="File of the headline rows; this repository's README.md by default.",
)
@click.option(
    "--picture",
    is_flag=True,
    help="Draw roofline.svg beside BENCH, and show it below the tables there.",
)
def main(bench: Path, readme: Path, picture: bool) -> None:
    """Write the tables of BENCH, tuning_logs/<target>/bench.json."""
    rows = read_rows(bench)
    beside = bench.with_name("compare.json")
    compared = read_rows(beside) if beside.exists() else None
    drawn = "roofline.svg" if picture else ""
    if drawn:
        draw(compared or rows, bench.with_name(drawn))
    everything, few = all_tables(rows, compared, drawn), headline(compared or rows)
    replace_between(bench.with_name("README.md"), "bench", everything, op="report")
    replace_between(readme, f"bench {bench.parent.name}", few, op="report")


if __name__ == "__main__":
    main()
