"""``tq-tvm bench`` and ``quality``: what calls and formats cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tq_tvm import artifacts, env
from tq_tvm.cli.options import (
    KERNELS,
    json_option,
    kernel_option,
    print_json,
    reported,
    require_compiler,
)
from tq_tvm.errors import ArgumentValueError, ArtifactNotFoundError
from tq_tvm.formats import FORMATS, get_format
from tq_tvm.spec import FUNCTIONS, HEAD_DIMS, Spec
from tq_tvm.targets import TargetInfo, as_device, detect

__all__ = ["bench", "quality"]


@click.command()
@kernel_option
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
    "--only",
    multiple=True,
    help="Time rows whose workload, as the table has it, has this in it; may be repeated.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the rows there; of a file that exists, --only leaves the others as they are.",
)
@reported
def bench(
    kernels: tuple[str, ...],
    device: str | None,
    defaults: Path | None,
    compare: bool,
    launches: int,
    only: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Time the calls beside torch on dense data; missing libraries are built where TVM is."""
    from tqdm import tqdm

    from tq_tvm.bench import results, run, table, workloads

    where = as_device("bench", device)
    target = detect(where)
    rows = [w for w in workloads.workloads(target.kind) if w.kernel in (kernels or KERNELS)]
    if only:
        labels = {w: table.describe(w.kernel, w.describe()) for w in rows}
        rows = [w for w in rows if any(text in labels[w] for text in only)]
        if not rows:
            raise ArgumentValueError(
                f"bench: only must be in one of {'; '.join(labels.values())}, "
                f"got {', '.join(only)}; name another part"
            )
    older = results.read_rows(json_path) if only and json_path and json_path.exists() else []
    for spec in workloads.specs(rows):
        _ensure_library(spec, target, {row.kernel for row in rows if row.spec == spec})
    bar = tqdm(total=len(rows), unit="row", disable=None)
    done: list[results.Row] = []

    def keep(row: results.Row) -> None:
        done.append(row)
        bar.update()
        # What stops a later row leaves the file with the rows before it.
        if json_path:
            results.write_rows(json_path, results.replaced(older, done))

    run.run_rows(rows, where, defaults=defaults, compare=compare, launches=launches, report=keep)
    bar.close()
    click.echo("\n\n".join([table.table(done), *table.compare_tables(done).values()]))
    absent = {f"{name}: {why}" for row in done for name, why in row.peers_absent.items()}
    for line in sorted(absent):
        click.echo(f"not timed: {line}", err=True)


@click.command()
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
@json_option
@reported
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
        print_json({"codecs": codecs, "presets": [_flat(preset) for preset in presets]})
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
        require_compiler("bench")
        from tq_tvm.build.library import build_library

        click.echo(f"building {spec.label} for {target.name}", err=True)
        build_library(spec, target, env.user_artifact_dir())
