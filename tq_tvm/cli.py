"""The command ``tq-tvm``: tune, build, list, verify, bench, quality, show-config.

Exit codes: 0 all is well, 1 an operation failed (the message says what to do), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
from click.core import ParameterSource
from tabulate import tabulate

from tq_tvm import artifacts, env
from tq_tvm._version import __version__
from tq_tvm.errors import ArgumentValueError, ArtifactNotFoundError, BuildError, TQError
from tq_tvm.formats import FORMATS, get_format
from tq_tvm.model_config import spec_of_model
from tq_tvm.spec import (
    FUNCTIONS,
    HEAD_DIMS,
    LAYOUTS,
    CacheSpec,
    RotateSpec,
    Spec,
    parse_spec,
)
from tq_tvm.targets import TARGETS, TargetInfo, as_device, cpu_threads, detect, get_target

__all__ = ["main"]

_DEFAULT_SPEC = "k4v2_d128_hq32_hk8_p64_bf16_bshd"
_KERNELS = tuple(dict.fromkeys(FUNCTIONS.values()))


class _Spec(click.ParamType):
    """A spec by its label."""

    name = "spec"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Spec:
        if isinstance(value, CacheSpec | RotateSpec):
            return value
        try:
            return parse_spec(value)
        except TQError as error:
            self.fail(str(error), param, ctx)


class _Target(click.ParamType):
    """A target by its name, or ``auto``."""

    name = "target"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> TargetInfo:
        if isinstance(value, TargetInfo):
            return value
        try:
            local = detect()
            # A GPU that the table misses has a target only where it is.
            return local if value in ("auto", local.name) else get_target(value)
        except TQError as error:
            self.fail(str(error), param, ctx)


_target_option = click.option(
    "--target",
    type=_Target(),
    default="auto",
    show_default=True,
    help=f"auto (this machine), or one of {', '.join(TARGETS)}.",
)
_spec_option = click.option(
    "--spec",
    "specs",
    type=_Spec(),
    multiple=True,
    default=[_DEFAULT_SPEC],
    show_default=True,
    help="Label of a cache spec or of a rotation, such as rotate_d1024_bf16; may be repeated.",
)
_kernel_option = click.option(
    "--kernel",
    "kernels",
    type=click.Choice(_KERNELS),
    multiple=True,
    help="Kernel; may be repeated. All by default.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the package's errors into a message and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except TQError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def _print_json(value: Any) -> None:
    def encode(item: Any) -> Any:
        if isinstance(item, Path):
            return str(item)
        raise NotImplementedError

    data = msgspec.json.encode(value, enc_hook=encode)
    click.echo(msgspec.json.format(data, indent=2).decode())


def _require_compiler(command: str) -> None:
    try:
        import tvm  # noqa: F401
    except ImportError as error:
        raise BuildError(
            f"{command}: the compiler must be installed, got {error}; "
            "run `pip install 'tq-tvm[tune]'`"
        ) from error


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tq-tvm")
@_reported
def main() -> None:
    """Kernels for a TurboQuant KV cache: search them, build them, look at them."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("tq_tvm").setLevel(env.log_level())


@main.command()
@_target_option
@_kernel_option
@_spec_option
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
@_json_option
@_reported
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
    _require_compiler("tune")
    import torch

    from tq_tvm.tuning.interrupt import SearchInterrupted
    from tq_tvm.tuning.search import check_tunable
    from tq_tvm.tuning.search import tune as search
    from tq_tvm.tuning.workloads import workloads

    device = torch.device("cuda" if target.kind == "cuda" else "cpu")
    chosen = kernels or _KERNELS
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
        _print_json(kept)
    else:
        cells = [
            [e.workload, f"{e.us:.1f}", f"{e.default_us:.1f}", e.trials, e.failures, _decided(e)]
            for e in kept
        ]
        headers = ["workload", "us", "default us", "trials", "failed", "decisions"]
        click.echo(tabulate(cells, headers=headers))
    if failed:
        sys.exit(130 if failed[-1] == "interrupted" else 1)


def _decided(entry: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in entry.config.items())


@main.command()
@_target_option
@_spec_option
@click.option(
    "--model-config",
    "configs",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True,
    help="Hugging Face config.json whose spec to build; may be repeated, beside --spec.",
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
@click.option(
    "--logs",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Directory of tuning logs, instead of the package's and this user's.",
)
@_json_option
@_reported
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
    _require_compiler("build")
    from tqdm import tqdm

    from tq_tvm.build.library import build_library

    models = [
        spec_of_model(
            path,
            format=get_format(int(name) if name.isdecimal() else name).name,
            page_size=page_size,
            layout=layout,
            tensor_parallel=tp,
        )
        for path in configs
        for name in formats
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
        _print_json([{"directory": d, **m.counts()} for d, m in zip(built, manifests, strict=True)])
    else:
        cells = [
            [directory, _counted(manifest.counts())]
            for directory, manifest in zip(built, manifests, strict=True)
        ]
        click.echo(tabulate(cells, headers=["library", "tuned/variants"]))


def _counted(counts: dict[str, tuple[int, int]]) -> str:
    return " ".join(f"{name} {tuned}/{total}" for name, (tuned, total) in counts.items())


@main.command(name="list")
@_json_option
@_reported
def list_(as_json: bool) -> None:
    """List the libraries that calls can find, and what is in them."""
    found = artifacts.list_artifacts()
    if as_json:
        _print_json(found)
        return
    cells = [
        [
            a.root,
            a.target,
            a.spec,
            f"{a.bytes / 1e6:.1f} MB",
            _counted(a.functions),
            a.problem or "",
        ]
        for a in found
    ]
    headers = ["root", "target", "spec", "size", "tuned/variants", "problem"]
    click.echo(tabulate(cells, headers=headers) if cells else _nothing_found())


def _nothing_found() -> str:
    searched = ", ".join(map(str, env.artifact_dirs()))
    return f"no library in {searched}; run `tq-tvm build`"


@main.command()
@_json_option
@_reported
def verify(as_json: bool) -> None:
    """Compare every file of every library with the digest in its manifest."""
    problems = artifacts.verify_all(env.artifact_dirs())
    if as_json:
        _print_json({str(directory): problem for directory, problem in problems.items()})
    else:
        for directory, problem in problems.items():
            click.echo(f"{directory}: {problem or 'ok'}")
        if not problems:
            click.echo(_nothing_found())
    if any(problems.values()):
        sys.exit(1)


@main.command()
@_kernel_option
@click.option("--device", default=None, help="torch device; the GPU if there is one.")
@click.option(
    "--defaults",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Libraries of the default schedules, timed in turn (see build --no-records).",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Time FlashInfer's, lmdeploy's and vLLM's decode too, where they are installed.",
)
@click.option("--launches", type=click.IntRange(3), default=50, show_default=True)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the rows there.",
)
@_reported
def bench(
    kernels: tuple[str, ...],
    device: str | None,
    defaults: Path | None,
    compare: bool,
    launches: int,
    json_path: Path | None,
) -> None:
    """Time the calls beside torch on dense data; missing libraries are built where TVM is."""
    from tqdm import tqdm

    from tq_tvm.bench import cases, results, run, table

    where = as_device("bench", device)
    target = detect(where)
    rows = [w for w in cases.workloads(target.kind) if w.kernel in (kernels or _KERNELS)]
    for spec in cases.specs(rows):
        _ensure_library(spec, target, {row.kernel for row in rows if row.spec == spec})
    bar = tqdm(total=len(rows), unit="row", disable=None)
    done: list[results.Row] = []

    def keep(row: results.Row) -> None:
        done.append(row)
        bar.update()
        # What stops a later row leaves the file with the rows before it.
        if json_path:
            results.write_rows(json_path, done)

    run.run_rows(rows, where, defaults=defaults, compare=compare, launches=launches, report=keep)
    bar.close()
    click.echo("\n\n".join([table.table(done), *table.compare_tables(done).values()]))
    absent = {f"{name}: {why}" for row in done for name, why in row.peers_absent.items()}
    for line in sorted(absent):
        click.echo(f"not timed: {line}", err=True)


@main.command()
@click.option(
    "--format",
    "formats",
    multiple=True,
    help="Preset, policy or slug; may be repeated. Every preset by default.",
)
@click.option("--head-dim", type=click.Choice(tuple(map(str, HEAD_DIMS))), default="128")
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(16),
    multiple=True,
    help="Tokens attended to; may be repeated. 1k, 8k, 32k and 128k by default.",
)
@click.option(
    "--rows",
    "rows_path",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Rows of a real model: a tensor [N, head_dim] that torch.save wrote.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option(
    "--pictures",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory to draw distortion.svg and attention.svg into; needs the extra 'plot'.",
)
@click.option(
    "--readme",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="File whose marks the tables are put between.",
)
@_json_option
@_reported
def quality(
    formats: tuple[str, ...],
    head_dim: str,
    contexts: tuple[int, ...],
    rows_path: Path | None,
    seed: int,
    device: str,
    pictures: Path | None,
    readme: Path | None,
    as_json: bool,
) -> None:
    """Measure what formats cost: distortion, logits, attention and a needle, beside theory."""
    import torch
    from tqdm import tqdm

    from tq_tvm.quality import measure, table

    where, dim = as_device("quality", device), int(head_dim)
    names = [get_format(int(f) if f.isdigit() else f).name for f in formats or FORMATS]
    rows = {}
    if rows_path is not None:
        real = torch.load(rows_path, map_location=where, weights_only=True)
        if not isinstance(real, torch.Tensor) or real.ndim != 2 or real.shape[1] != dim:
            shape = list(real.shape) if isinstance(real, torch.Tensor) else type(real).__name__
            raise ArgumentValueError(
                f"quality: rows must be a tensor [N, {dim}], got {shape}; pass --head-dim"
            )
        rows["real"] = real.float()
    codecs = measure.measure_codecs(dim, seed=seed, device=where)
    presets = [
        measure.measure_preset(
            name,
            dim,
            contexts=sorted(contexts) or measure.CONTEXTS,
            rows=rows,
            seed=seed,
            device=where,
        )
        for name in tqdm(names, unit="format", disable=None)
    ]
    kept = [table.preset_table(presets), table.codec_table(codecs)]
    if pictures is not None:
        from tq_tvm.quality.pictures import draw

        for path in draw(codecs, presets, pictures):
            click.echo(f"drawn: {path}", err=True)
    if readme is not None:
        from tq_tvm.bench.table import replace_between

        replace_between(readme, "quality", "\n\n".join(kept), op="quality")
    if as_json:
        _print_json({"codecs": codecs, "presets": [_flat(preset) for preset in presets]})
    else:
        click.echo("\n\n".join([*kept, table.attention_table(presets)]))


def _flat(preset: Any) -> dict[str, Any]:
    """A preset's numbers with keys that JSON has."""
    return {
        name: {f"{k[0]}, {k[1]:g}" if isinstance(k, tuple) else k: v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in vars(preset).items()
    }


def _ensure_library(spec: Spec, target: TargetInfo, kernels: set[str]) -> None:
    """Build the library of a spec if calls of these kernels cannot find one."""
    if kernels & {"attend", "prefill"}:
        # One call serves all three.
        kernels = kernels | {"attend", "prefill", "decode"}
    try:
        for function in target.functions(spec):
            if FUNCTIONS[function] in kernels:
                artifacts.locate(function, spec, target)
    except ArtifactNotFoundError:
        _require_compiler("bench")
        from tq_tvm.build.library import build_library

        click.echo(f"building {spec.label} for {target.name}", err=True)
        build_library(spec, target, env.user_artifact_dir())


@main.command(name="show-config")
@_json_option
@_reported
def show_config(as_json: bool) -> None:
    """Tell versions, devices, directories and settings."""
    facts = _facts()
    if as_json:
        _print_json(facts)
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
