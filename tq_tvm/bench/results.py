"""One row of a benchmark, as ``bench.json`` holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tq_tvm.errors import ArgumentValueError

__all__ = ["Row", "read_rows", "replaced", "write_rows"]


class Row(msgspec.Struct):
    """Time of one call on one workload.

    Parameters
    ----------
    kernel
        ``rotate``, ``fill``, ``flatten`` or ``decode``.
    workload
        Sizes and spec. ``context`` counts the tokens of each sequence; ``graph`` tells whether the
        call was replayed from a CUDA graph.
    us
        Median time of the whole call, L2 cold, in microseconds.
    bytes
        What has to be read and written, once.
    tb_per_s, copy_tb_per_s, fraction_of_copy
        ``bytes`` over ``us``; the bandwidth of a large copy in the same run; their ratio.
    tuned
        Whether a tuning record chose other decisions than the default schedule's.
    record
        Label of the record that served; with ``tuned`` False the default is the best for it.
    default_us
        The same call with the default schedule, in the same run; None if no library had it.
    baselines
        Times of other programs that do the same, in the same run.
    conditions
        Device, driver and versions.
    baseline_bytes
        What each of the ``baselines`` has to read and write, once, in its own format.
    peers_absent
        Why a program that was asked for has no time, by its name.
    """

    kernel: str
    workload: dict[str, Any]
    us: float
    bytes: int
    tb_per_s: float
    copy_tb_per_s: float
    fraction_of_copy: float
    tuned: bool
    record: str | None
    default_us: float | None
    baselines: dict[str, float]
    conditions: dict[str, str]
    baseline_bytes: dict[str, int] = {}
    peers_absent: dict[str, str] = {}


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a list of rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n")


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=list[Row])


def replaced(older: list[Row], rows: list[Row]) -> list[Row]:
    """``older`` with ``rows`` in place of those of the same workloads; new ones come last.

    Raises
    ------
    ArgumentValueError
        They are of different devices.
    """

    def key(row: Row) -> bytes:
        return msgspec.json.encode((row.kernel, row.workload))

    one, other = ({row.conditions["device"] for row in some} for some in (older, rows))
    if one and other and one != other:
        raise ArgumentValueError(
            f"bench: rows must be of {', '.join(sorted(one))} like the others of the file, "
            f"got {', '.join(sorted(other))}; write them to another file"
        )
    fresh = {key(row): row for row in rows}
    kept = [fresh.pop(key(row), row) for row in older]
    return [*kept, *fresh.values()]
