"""Print what the kernels do on this machine; exit code 0 if their errors are within the limits."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence

import click
import torch
from tabulate import tabulate

from tq_tvm import env
from tq_tvm.artifacts import schedule_word
from tq_tvm.demo.batch import OFFSET, OFFSET_CHANNELS, Batch
from tq_tvm.demo.measure import Call, Errors, calls, measure_errors, time_call
from tq_tvm.demo.prepare import prepare
from tq_tvm.errors import TQError
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import as_device, detect

__all__ = ["Result", "main", "run"]

SPEC = CacheSpec(head_dim=128, num_q_heads=32, num_kv_heads=8, page_size=64, dtype="bfloat16")
LENGTHS = (1, 17, 65, 333, 1000, 2048, 4097)
"""A lone token, parts of pages, and two sequences whose newest token opens a page."""

ATTENTION_LIMITS = {"bfloat16": 1e-2, "float16": 5e-3, "float32": 1e-5}
"""Relative error of ``decode`` against float32 attention over the dequantised cache."""

DISTORTION_LIMIT = 0.10
"""How far distortions of Gaussian rows may be from the theory, relatively."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The numbers that were printed. ``problems`` says which limits they exceed."""

    bytes_per_token: float
    compression: float
    errors: Errors
    problems: list[str]


def run(
    spec: CacheSpec = SPEC,
    lengths: Sequence[int] = LENGTHS,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
    retune: bool = False,
    times: bool = True,
) -> Result:
    """Fill, flatten and decode a ragged batch, and print tables of bytes, errors and times.

    Parameters
    ----------
    spec
        What the kernels are specialised for.
    lengths
        Length of each sequence, at least 1.
    device
        Where; None is a CUDA GPU, or the CPU where there is none.
    seed
        Seed of the data and of a search.
    retune
        Search for a minute even where there are kernels.
    times
        Whether to measure times too.

    Raises
    ------
    TQError
        There are no kernels and none can be made; the message says what to do.
    """
    device = _choose_device(device)
    _print_machine(spec, device)
    prepare(spec, device, retune=retune, seed=seed)
    batch = Batch.make(spec, lengths, device, seed)
    batch.fill()
    click.echo(
        f"Batch    {len(lengths)} sequences of {', '.join(map(str, lengths))} tokens in "
        f"{batch.cache.num_pages} pages of {spec.page_size}, permuted"
    )
    result = _print_sizes_and_errors(batch)
    served = calls(batch)
    if times:
        _print_times(served, batch)
    _print_variants(served)
    return result


def _choose_device(device: torch.device | str | None) -> torch.device:
    device = as_device("demo", device)
    if device.type == "cuda":
        # Kernels run on the current device's stream.
        torch.cuda.set_device(device)
    return device


def _print_machine(spec: CacheSpec, device: torch.device) -> None:
    target = detect(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif torch.cuda.is_available():
        name = f"{torch.get_num_threads()} threads"
    else:
        name = f"{torch.get_num_threads()} threads; torch {torch.__version__} sees no CUDA GPU"
    click.echo(f"Device   {device} ({name})")
    click.echo(f"Target   {target.name} ({target.kind}, {target.arch})")
    click.echo(f"Spec     {spec.label}")


def _print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    click.echo(f"\n{title}\n")
    right = ["left", *["right"] * (len(headers) - 1)]
    click.echo(tabulate(rows, headers, disable_numparse=True, colalign=right))


def _print_sizes_and_errors(batch: Batch) -> Result:
    spec, cache = batch.spec, batch.cache
    errors = measure_errors(batch)
    bytes_per_token = cache.bytes / (cache.num_pages * spec.page_size)
    dense = 2 * spec.num_kv_heads * spec.head_dim * torch.bfloat16.itemsize
    compression = dense / bytes_per_token
    _print_table(
        "Cache, one layer",
        ["", "bytes a token", "compression"],
        [
            ["dense bfloat16", f"{dense}", "1.00"],
            [spec.format, f"{bytes_per_token:.0f}", f"{compression:.2f}"],
        ],
    )

    def distortion(name: str, measured: float, theory: float) -> list[str]:
        return [name, f"{measured:.4f}", f"{theory:.4f}", f"{measured / theory:.3f}"]

    rows = [distortion("K, Gaussian rows", errors.k_gaussian, errors.k_theory)]
    if errors.k_offset is not None:
        name = f"K, {OFFSET_CHANNELS} channels offset by {OFFSET:g} sigma"
        rows.append(distortion(name, errors.k_offset, errors.k_theory))
    rows.append(distortion("V, Gaussian rows", errors.v, errors.v_theory))
    _print_table(
        "Distortion of a row, |x - x^|^2 / |x|^2; theory: Gaussian rows, head_dim to infinity",
        ["", "measured", "theory", "ratio"],
        rows,
    )
    limit = ATTENTION_LIMITS[spec.dtype]
    _print_table(
        f"Relative error of decode ({spec.dtype}) against float32 attention",
        ["", "all sequences", "worst", "limit"],
        [
            ["on the unquantised rows", *_error_cells(errors.attention_unquantised), ""],
            ["on the dequantised cache", *_error_cells(errors.attention_dequantised), f"{limit:g}"],
        ],
    )
    click.echo(
        "\nRows are independent here, so averaging cancels values as it cancels their errors:\n"
        f"sqrt(V distortion) = {errors.v**0.5:.3f} of the first line is V's own."
    )
    return Result(bytes_per_token, compression, errors, _problems(errors, limit))


def _error_cells(pair: tuple[float, float]) -> list[str]:
    return [f"{value:.2g}" for value in pair]


def _problems(errors: Errors, limit: float) -> list[str]:
    problems = []
    worst = errors.attention_dequantised[1]
    # A NaN is a problem too, so what is asked is whether the number is good.
    if not worst <= limit:
        problems.append(
            f"decode must be within {limit:g} of float32 attention on the dequantised cache, "
            f"got {worst:.3g}"
        )
    for side, measured, theory in (
        ("K", errors.k_gaussian, errors.k_theory),
        ("V", errors.v, errors.v_theory),
    ):
        if not abs(measured / theory - 1) <= DISTORTION_LIMIT:
            problems.append(
                f"{side} distortion of Gaussian rows must be within {DISTORTION_LIMIT:.0%} of "
                f"{theory:.4f}, got {measured:.4f}"
            )
    return problems


def _print_times(served: list[Call], batch: Batch) -> None:
    rows = []
    for call in served:
        us, way, torch_us = time_call(call, batch.cache.device)
        rows.append([call.name, f"{us:.1f}", f"{torch_us:.1f}", f"{torch_us / us:.2f}", way])
    _print_table(
        f"Time, median from cold caches; torch on the dense {batch.spec.dtype} rows, "
        "its fastest way",
        ["kernel", "us", "torch us", "torch / kernel", "torch by"],
        rows,
    )


def _print_variants(served: list[Call]) -> None:
    rows = []
    for call in served:
        variant = call.variant
        label = schedule_word(variant.tuned, variant.workload)
        if variant.workload is not None:
            label = f"{variant.workload.rsplit('-', 1)[0]}, {label}"
        decisions = " ".join(f"{name}={value}" for name, value in variant.config.items())
        us = f"{variant.us:.1f}" if variant.us is not None else ""
        rows.append([call.name, label, us, decisions])
    _print_table(
        "Variant of the kernel that served each call: the nearest tuned workload",
        ["kernel", "record", "us there", "decisions"],
        rows,
    )


def _parse_lengths(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r}; write positive numbers with commas between them")
    return tuple(int(part) for part in parts)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", help="Torch device; by default a CUDA GPU, or the CPU.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the data and a search.")
@click.option(
    "--lengths",
    default=",".join(map(str, LENGTHS)),
    show_default=True,
    callback=_parse_lengths,
    help="Length of each sequence.",
)
@click.option("--retune", is_flag=True, help="Tune for a minute even where there are kernels.")
@click.option("--no-times", is_flag=True, help="Measure errors only.")
def main(
    device: str | None, seed: int, lengths: tuple[int, ...], retune: bool, no_times: bool
) -> None:
    """Run every kernel on a ragged batch; print sizes, errors and times."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        logging.getLogger("tq_tvm").setLevel(env.log_level())
        result = run(lengths=lengths, device=device, seed=seed, retune=retune, times=not no_times)
    except TQError as error:
        raise click.ClickException(str(error)) from error
    if result.problems:
        raise click.ClickException("\n".join(result.problems))
    click.echo("\nAll errors are within their limits.")


if __name__ == "__main__":
    main(prog_name="python -m tq_tvm.demo")
