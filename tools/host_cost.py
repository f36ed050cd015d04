"""Print what each eager call costs the host, see `tq_tvm.bench.host`."""

import click
from tabulate import tabulate

from tq_tvm.bench.host import host_costs
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import as_device


@click.command()
@click.option("--device", default=None, help="torch device; the GPU if there is one.")
@click.option("--spec", default="k4v2_d128_hq32_hk8_p64_bf16_bshd", show_default=True)
@click.option("--batches", type=click.IntRange(1), default=50, show_default=True)
def main(device: str | None, spec: str, batches: int) -> None:
    """Time calls for one token: whole, their kernel alone, and through torch.library."""
    costs = host_costs(CacheSpec.parse(spec), as_device("host_cost", device), batches)
    cells = [
        [c.name, c.call, c.kernel, c.call - c.kernel, c.through_torch, c.through_torch - c.call]
        for c in costs
    ]
    headers = ["call", "us", "kernel us", "package us", "torch.ops us", "boundary us"]
    click.echo(tabulate(cells, headers=headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
