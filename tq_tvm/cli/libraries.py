"""``tq-tvm tune``, ``refile`` and ``build``: from a search to libraries."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from tabulate import tabulate

from tq_tvm import artifacts, env
from tq_tvm.cli.options import (
    KERNELS,
    counted,
    json_option,
    kernel_option,
    logs_option,
    print_json,
    reported,
    require_compiler,
    spec_option,
    target_option,
)
from tq_tvm.errors import TQError
from tq_tvm.formats import get_format
from tq_tvm.model_config import specs_of_model
from tq_tvm.spec import LAYOUTS, Spec
from tq_tvm.targets import TargetInfo

__all__ = ["build", "refile", "tune"]


@click.command()
@target_option
@kernel_option
@spec_option
@click.option("--trials", type=click.IntRange(1), default=96, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    default=600.0,
    show_default=True,
    help="Time for each workload; a batch that is being measured is finished.",
)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--fresh", is_flag=True, help="Forget what an earlier search measured.")
@click.option(
    "--logs",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of tuning logs to keep records in, instead of the package's or this user's.",
)
@json_option
@reported
def tune(
    target: TargetInfo,
    kernels: tuple[str, ...],
    specs: tuple[Spec, ...],
    trials: int,
    seconds: float,
    seed: int,
    fresh: bool,
    logs: Path | None,
    as_json: bool,
) -> None:
    """Search decisions on this machine and keep the best in the tuning logs.

    Ctrl-C keeps what was found; the same command goes on from there.
    """
    require_compiler("tune")
    import torch

    from tq_tvm.tuning.interrupt import SearchInterrupted
    from tq_tvm.tuning.search import check_tunable
    from tq_tvm.tuning.search import tune as search
    from tq_tvm.tuning.workloads import workloads

    device = torch.device("cuda" if target.kind == "cuda" else "cpu")
    chosen = kernels or KERNELS
    check_tunable(chosen, target, device, logs)
    kept, failed = [], []
    try:
        # Specs may share the workloads of their rotation.
        for workload in dict.fromkeys(w for spec in specs for w in workloads(spec, target)):
            if workload.kernel not in chosen:
                continue
            try:
                kept.append(
                    search(
                        workload,
                        target,
                        device,
                        trials=trials,
                        seconds=seconds,
                        seed=seed,
                        fresh=fresh,
                        logs=logs,
                    )
                )
            except TQError as error:
                failed.append(workload.label)
                click.echo(f"Error: {error}", err=True)
    except KeyboardInterrupt as stop:
        failed.append("interrupted")
        if isinstance(stop, SearchInterrupted) and stop.entry is not None:
            kept.append(stop.entry)
    if as_json:
        print_json(kept)
    else:
        cells = [
            [e.workload, f"{e.us:.1f}", f"{e.default_us:.1f}", e.trials, e.failures, _decided(e)]
            for e in kept
        ]
        headers = ["workload", "us", "default us", "trials", "failed", "decisions"]
        click.echo(tabulate(cells, headers=headers))
    if failed:
        sys.exit(130 if failed[-1] == "interrupted" else 1)


@click.command()
@target_option
@kernel_option
@logs_option
@reported
def refile(target: TargetInfo, kernels: tuple[str, ...], logs: Path | None) -> None:
    """Keep decisions of records whose kernel has changed, until it is searched again."""
    require_compiler("refile")
    from tq_tvm.tuning import database

    for kernel in kernels or KERNELS:
        for entry in database.refile(kernel, target, logs):
            click.echo(f"{entry.workload} {_decided(entry)}")


def _decided(entry: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in entry.config.items())


@click.command()
@target_option
@spec_option
@click.option(
    "--model-config",
    "configs",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True,
    help="Hugging Face config.json whose specs to build; may be repeated, beside --spec.",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    default=["k4v2"],
    show_default=True,
    help="Cache format of --model-config: preset, policy or slug; may be repeated.",
)
@click.option(
    "--page-size", type=int, default=64, show_default=True, help="Page size of --model-config."
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="bshd",
    show_default=True,
    help="Layout of --model-config.",
)
@click.option(
    "--tp",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Ranks that share the heads of --model-config.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of artifacts; by default the one that calls search.",
)
@click.option("--no-records", is_flag=True, help="Build the default schedules.")
@logs_option
@json_option
@reported
def build(
    target: TargetInfo,
    specs: tuple[Spec, ...],
    configs: tuple[Path, ...],
    formats: tuple[str, ...],
    page_size: int,
    layout: str,
    tp: int,
    out: Path | None,
    no_records: bool,
    logs: Path | None,
    as_json: bool,
) -> None:
    """Compile the libraries of specs from the tuning logs. No GPU is needed."""
    require_compiler("build")
    from tqdm import tqdm

    from tq_tvm.build.library import build_library

    models = [
        spec
        for path in configs
        for name in formats
        for spec in specs_of_model(
            path,
            format=get_format(int(name) if name.isdecimal() else name).name,
            page_size=page_size,
            layout=layout,
            tensor_parallel=tp,
        )
    ]
    named = click.get_current_context().get_parameter_source("specs")
    if models and named is ParameterSource.DEFAULT:
        specs = ()
    specs = tuple(dict.fromkeys([*specs, *models]))
    root = out or env.user_artifact_dir()
    bar = tqdm(specs, unit="library", disable=None)
    built = []
    for spec in bar:
        bar.set_description(spec.label)
        built.append(build_library(spec, target, root, use_records=not no_records, logs=logs))
    manifests = [artifacts.Manifest.read(directory) for directory in built]
    if as_json:
        print_json([{"directory": d, **m.counts()} for d, m in zip(built, manifests, strict=True)])
    else:
        cells = [
            [directory, counted(manifest.counts())]
            for directory, manifest in zip(built, manifests, strict=True)
        ]
        click.echo(tabulate(cells, headers=["library", "tuned/variants"]))
