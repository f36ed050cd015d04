"""``tq-tvm list``, ``verify`` and ``show-config``: what is there."""

from __future__ import annotations

import sys

import click
from tabulate import tabulate

from tq_tvm import artifacts, env
from tq_tvm._version import __version__
from tq_tvm.cli.options import counted, json_option, print_json, reported
from tq_tvm.targets import cpu_threads, detect

__all__ = ["list_", "show_config", "verify"]


@click.command(name="list")
@json_option
@reported
def list_(as_json: bool) -> None:
    """List the libraries that calls can find, and what is in them."""
    found = artifacts.list_artifacts()
    if as_json:
        print_json(found)
        return
    cells = [
        [
            a.root,
            a.target,
            a.spec,
            f"{a.bytes / 1e6:.1f} MB",
            counted(a.functions),
            a.problem or "",
        ]
        for a in found
    ]
    headers = ["root", "target", "spec", "size", "tuned/variants", "problem"]
    click.echo(tabulate(cells, headers=headers) if cells else _nothing_found())


def _nothing_found() -> str:
    searched = ", ".join(map(str, env.artifact_dirs()))
    return f"no library in {searched}; run `tq-tvm build`"


@click.command()
@json_option
@reported
def verify(as_json: bool) -> None:
    """Compare every file of every library with the digest in its manifest."""
    problems = artifacts.verify_all(env.artifact_dirs())
    if as_json:
        print_json({str(directory): problem for directory, problem in problems.items()})
    else:
        for directory, problem in problems.items():
            click.echo(f"{directory}: {problem or 'ok'}")
        if not problems:
            click.echo(_nothing_found())
    if any(problems.values()):
        sys.exit(1)


@click.command(name="show-config")
@json_option
@reported
def show_config(as_json: bool) -> None:
    """Tell versions, devices, directories and settings."""
    facts = _facts()
    if as_json:
        print_json(facts)
    else:
        click.echo(tabulate(facts.items(), tablefmt="plain"))


def _facts() -> dict[str, str]:
    import importlib.metadata

    import torch

    facts = {"tq_tvm": __version__}
    for name in ("torch", "apache-tvm-ffi", "apache-tvm", "xgboost-cpu"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["cpu target"] = detect("cpu").name
    for index in range(torch.cuda.device_count()):
        facts[f"gpu {index}"] = (
            f"{torch.cuda.get_device_name(index)}: {detect(torch.device('cuda', index)).name}"
        )
    facts["artifact directories"] = ", ".join(map(str, env.artifact_dirs()))
    facts["cache directory"] = str(env.cache_dir())
    facts["threads"] = str(cpu_threads())
    facts["log level"] = env.log_level()
    facts["libraries"] = str(len(artifacts.list_artifacts()))
    return facts
