"""Print how long a fresh process takes to `import tq_tvm` and make its first call.

`torch` and `tvm_ffi` are imported, and the tensors are there, before the clock starts. The
libraries are those that calls find; the compiler must not have been imported.
"""

import json
import statistics
import subprocess
import sys

import click
from tabulate import tabulate

_SCRIPT = """
import json, sys, time
import torch, tvm_ffi
device = torch.device({device!r})
x = torch.zeros(1, 128, dtype=torch.bfloat16, device=device)
q = torch.zeros(1, 32, 128, dtype=torch.bfloat16, device=device)
rows = torch.zeros(1, 8, 128, dtype=torch.bfloat16, device=device)
table = torch.zeros(1, 1, dtype=torch.int32, device=device)
one = torch.ones(1, dtype=torch.int32, device=device)
begin = time.perf_counter()
import tq_tvm
times = {{"import tq_tvm": time.perf_counter() - begin}}
if {call!r} == "hadamard_rotate":
    tq_tvm.hadamard_rotate(x)
else:
    cache = tq_tvm.PagedKVCache(tq_tvm.CacheSpec(128, 32, 8), 1, device)
    cache.fill(rows, rows, slot_mapping=table.long().view(1))
    cache.decode(q, table, one)
if device.type == "cuda":
    torch.cuda.synchronize()
times["and the call"] = time.perf_counter() - begin
times["compiler"] = "tvm" in sys.modules
print(json.dumps(times))
"""
_CALLS = ("hadamard_rotate", "fill and decode")


def _run(call: str, device: str) -> dict:
    script = _SCRIPT.format(call=call, device=device)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    times = json.loads(done.stdout.splitlines()[-1])
    if times.pop("compiler"):
        raise click.ClickException("loading: tvm must stay unimported, got an import of it")
    return times


@click.command()
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--runs", type=click.IntRange(1), default=9, show_default=True)
def main(device: str, runs: int) -> None:
    """Run fresh processes; medians and extremes in seconds."""
    cells = []
    for call in _CALLS:
        found = [_run(call, device) for _ in range(runs)]
        for step in found[0]:
            times = sorted(f[step] for f in found)
            cells.append([call, step, statistics.median(times), times[0], times[-1]])
    headers = ["call", "seconds for", "median", "least", "most"]
    click.echo(tabulate(cells, headers=headers, floatfmt=".3f"))


if __name__ == "__main__":
    main()
