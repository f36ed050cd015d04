"""One library of a spec: every kernel function, in its tuned variants or in the default one."""

from __future__ import annotations

import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import filelock
import msgspec
from tvm.tirx import PrimFunc

from tq_tvm._version import __version__
from tq_tvm.artifacts.manifest import LIBRARY_NAME, FileRecord, Manifest, Variant, build_command
from tq_tvm.build.compile import compile_library
from tq_tvm.build.occupancy import with_occupancy
from tq_tvm.build.sources import sources_digest
from tq_tvm.errors import TuningLogError
from tq_tvm.schedules import Instance, featured, instantiate
from tq_tvm.served import check_target
from tq_tvm.spec import FUNCTIONS, CacheSpec, Spec
from tq_tvm.targets import TargetInfo
from tq_tvm.tuning.database import TunedRecord, find_records
from tq_tvm.tuning.workloads import chosen_by_batch, decision_sizes, workloads

__all__ = ["build_library"]


def build_library(
    spec: Spec,
    target: TargetInfo,
    root: Path,
    *,
    use_records: bool = True,
    logs: Path | None = None,
) -> Path:
    """Compile the functions of ``spec`` into ``<root>/<target name>/<spec label>``.

    Those that the target has kernels of (`TargetInfo.functions`): calls of others are refused.

    A function with records gets a variant for each, and the default schedule at sizes of
    `tq_tvm.tuning.workloads` that have none; one without records gets the default schedules;
    ``decode_featured`` has the default decisions of ``decode``. The directory appears, or replaces
    the one that was there, only when it is complete. No GPU is needed.

    Parameters
    ----------
    spec, target
        What to specialise for, and where it will run.
    root
        Directory of artifacts.
    use_records
        False builds every function with the default schedule.
    logs
        Directory of tuning logs; None takes this user's and the package's.

    Returns
    -------
    The directory.

    Raises
    ------
    UnsupportedSpecError
        The target has no kernels of the spec.
    BuildError
        A compiler is missing or failed.
    TuningLogError
        The log is malformed, for another target, or a record no longer fits the kernel.
    """
    check_target("build_library", spec, target.kind)
    functions: dict[str, PrimFunc] = {}
    variants: dict[str, list[Variant]] = {}
    for function in target.functions(spec):
        if function == "decode_featured":
            assert isinstance(spec, CacheSpec)
            variants[function] = _featured_variants(spec, target, functions)
            continue
        records = find_records(function, spec, target, logs) if use_records else []
        variants[function] = _variants(function, spec, target, records, functions)
    parent = Path(root) / target.name
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{spec.label}.", dir=parent))
    try:
        library = scratch / LIBRARY_NAME
        compiled = compile_library(functions, target, library)
        for function, chosen in variants.items():
            variants[function] = [
                msgspec.structs.replace(
                    v,
                    launch=with_occupancy(v.launch, v.symbol, target.arch, compiled.resources),
                )
                for v in chosen
            ]
        manifest = Manifest(
            spec=spec.label,
            target=target,
            files={LIBRARY_NAME: FileRecord.of(library)},
            functions=variants,
            versions={**_versions(), **compiled.versions},
            flags=compiled.flags,
            sources=sources_digest(),
        )
        manifest.write(scratch)
        scratch.chmod(0o755)
        final = parent / spec.label
        with filelock.FileLock(parent / f".{spec.label}.lock"):
            _replace(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _variants(
    function: str,
    spec: Spec,
    target: TargetInfo,
    records: list[TunedRecord],
    functions: dict[str, PrimFunc],
) -> list[Variant]:
    """Variants of one function; adds what they call to ``functions``, equal kernels once."""
    variants: list[Variant] = []
    for record in sorted(records, key=lambda r: r.size):
        symbol = f"tq_{function}_{len(variants)}"
        instance = _replay(function, spec, target, record, symbol)
        same = next((v for v in variants if v.config == instance.config), None)
        if same is None:
            functions[symbol] = instance.func
        else:
            symbol = same.symbol
        variants.append(
            Variant(
                symbol=symbol,
                size=record.size,
                tuned=instance.tuned,
                workload=record.workload,
                us=record.us,
                config=instance.config,
                launch=instance.launch,
                batch=chosen_by_batch(function, record.shape),
            )
        )
    searched = {(variant.size, variant.batch) for variant in variants}
    others = [w for w in workloads(spec, target) if w.function == function]
    others = [w for w in others if (w.size, w.batch) not in searched]
    if variants and not others:
        return variants
    # A record says nothing of sizes that were not searched.
    defaults: list[Variant] = []
    for workload in others:
        symbol = f"tq_{function}_{len(variants) + len(defaults)}"
        shape = decision_sizes(function, workload.shape, target)
        instance = instantiate(function, spec, target.kind, None, shape, symbol)
        same = next((v for v in [*variants, *defaults] if v.config == instance.config), None)
        if same is None:
            functions[symbol] = instance.func
        else:
            symbol = same.symbol
        defaults.append(
            Variant(
                symbol=symbol,
                size=workload.size,
                tuned=False,
                config=instance.config,
                launch=instance.launch,
                batch=workload.batch,
            )
        )
    if not variants and len({v.symbol for v in defaults}) == 1:
        # One kernel for all sizes.
        defaults = [msgspec.structs.replace(defaults[0], size=1, batch=None)]
    return sorted([*variants, *defaults], key=lambda variant: variant.size)


def _featured_variants(
    spec: CacheSpec, target: TargetInfo, functions: dict[str, PrimFunc]
) -> list[Variant]:
    """Variants of ``decode_featured``, with the decisions of the default ones of ``decode``.

    What was found for ``decode`` is not good with features: by the record of 64 x 8192 on an H100 a
    soft cap takes 193 us of 174, a plain call 173 of 172.
    """
    variants: list[Variant] = []
    for decode in _variants("decode", spec, target, [], {}):
        instance = featured(spec, decode.config, f"tq_decode_featured_{len(variants)}")
        symbol = next((v.symbol for v in variants if v.config == instance.config), None)
        if symbol is None:
            symbol = f"tq_decode_featured_{len(variants)}"
            functions[symbol] = instance.func
        variants.append(
            msgspec.structs.replace(
                decode,
                symbol=symbol,
                config=instance.config,
                launch=instance.launch,
            )
        )
    return variants


def _replay(
    function: str, spec: Spec, target: TargetInfo, record: TunedRecord, symbol: str
) -> Instance:
    try:
        shape = decision_sizes(function, record.shape, target)
        return instantiate(function, spec, target.kind, record.trace, shape, symbol)
    except Exception as error:
        raise TuningLogError(
            f"build_library: record {record.workload} of {function} for {target.name} must replay "
            f"on {spec.label}, got: {error}; run `tq-tvm tune --target {target.name} "
            f"--kernel {FUNCTIONS[function]}`, or `{build_command(target.name, spec.label)} "
            "--no-records` for the default schedule"
        ) from error


def _replace(scratch: Path, final: Path) -> None:
    """Put ``scratch`` where ``final`` is; a directory cannot be replaced in one step."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    scratch.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _versions() -> dict[str, str]:
    return {
        "tq_tvm": __version__,
        "apache-tvm": metadata.version("apache-tvm"),
        "apache-tvm-ffi": metadata.version("apache-tvm-ffi"),
    }
