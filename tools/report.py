"""Put the table of a ``bench.json`` into README.md."""

from pathlib import Path

import click

from tq_tvm.bench.results import read_rows
from tq_tvm.bench.table import replace_table

_ROOT = Path(__file__).parents[1]


@click.command()
@click.argument(
    "bench",
    type=click.Path(path_type=Path, exists=True),
    default=_ROOT / "tuning_logs" / "nvidia_h200" / "bench.json",
)
@click.option("--readme", type=click.Path(path_type=Path), default=_ROOT / "README.md")
def main(bench: Path, readme: Path) -> None:
    """Rewrite the table between README's marks from BENCH."""
    replace_table(readme, read_rows(bench))


if __name__ == "__main__":
    main()
