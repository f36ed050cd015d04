"""Which library serves a kernel function, a spec and a device, and why the others do not."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from tq_tvm import env
from tq_tvm.artifacts import verify
from tq_tvm.artifacts.manifest import Manifest, build_command
from tq_tvm.errors import ArtifactCorruptError, ArtifactNotFoundError, UnsupportedSpecError
from tq_tvm.spec import Spec, parse_spec
from tq_tvm.targets import CPU_LEVELS, TargetInfo, missing_cpu_features

__all__ = ["ArtifactInfo", "Candidate", "candidates", "list_artifacts", "locate"]

_log = logging.getLogger("tq_tvm")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A library on the search path; ``reason`` says why it was rejected, None that it was not."""

    directory: Path
    manifest: Manifest | None
    reason: str | None = None
    corrupt: bool = False
    rank: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class ArtifactInfo:
    """One library on the search path, for lists. ``functions``: (tuned, all variants) of each."""

    root: Path
    directory: Path
    target: str
    spec: str
    functions: dict[str, tuple[int, int]]
    bytes: int
    problem: str | None


def candidates(function: str, spec: Spec, device: TargetInfo) -> list[Candidate]:
    """Every library on the search path, judged; accepted ones first, best first."""
    found = [
        _judge(directory, index, function, spec, device)
        for index, root in enumerate(env.artifact_dirs())
        for directory in verify.library_directories(root)
    ]
    return sorted(found, key=lambda c: (c.reason is not None, c.rank))


def locate(function: str, spec: Spec, device: TargetInfo) -> tuple[Path, Manifest]:
    """Directory and manifest of the best library.

    A library of the very GPU comes before one of its architecture; a better CPU level before a
    lesser one; then an earlier directory of the search path before a later one.

    Parameters
    ----------
    function
        Kernel function, a key of ``Manifest.functions``.
    spec
        Its specialisation; fields that the function does not depend on may differ.
    device
        Target of the device, from `tq_tvm.targets.detect`.

    Raises
    ------
    ArtifactNotFoundError
        No library is accepted. The message gives the reason for each, and the command to run.
    ArtifactCorruptError
        No library is accepted, and the manifest of one that might be cannot be read.
    """
    judged = candidates(function, spec, device)
    unreadable = [
        c for c in judged if c.corrupt and _may_serve(c.directory, function, spec, device)
    ]
    if judged and judged[0].reason is None:
        best = judged[0]
        assert best.manifest is not None
        for candidate in unreadable:
            _log.warning("%s", candidate.reason)
        return best.directory, best.manifest
    if unreadable:
        raise ArtifactCorruptError(str(unreadable[0].reason))
    raise ArtifactNotFoundError(_not_found(function, spec, device, judged))


def list_artifacts(*, digests: bool = False) -> list[ArtifactInfo]:
    """Every library on the search path.

    Parameters
    ----------
    digests
        Read the files and compare their digests, not only their presence and sizes.
    """
    listed = []
    for root in env.artifact_dirs():
        for directory in verify.library_directories(root):
            manifest, problem = None, None
            try:
                manifest = Manifest.read(directory)
                _check_place(directory, manifest)
                verify.check_present(directory, manifest)
                if digests:
                    verify.verify_directory(directory)
            except ArtifactCorruptError as error:
                problem = str(error)
            listed.append(
                ArtifactInfo(
                    root=root,
                    directory=directory,
                    target=directory.parent.name,
                    spec=directory.name,
                    functions=manifest.counts() if manifest else {},
                    bytes=sum(f.bytes for f in manifest.files.values()) if manifest else 0,
                    problem=problem,
                )
            )
    return listed


def _judge(
    directory: Path, root_index: int, function: str, spec: Spec, device: TargetInfo
) -> Candidate:
    try:
        manifest = Manifest.read(directory)
        _check_place(directory, manifest)
    except ArtifactCorruptError as error:
        return Candidate(directory, None, str(error), corrupt=True)
    target_rank, reason = _judge_target(manifest.target, device)
    reason = reason or _judge_spec(manifest.parsed_spec, function, spec)
    if reason is None and function not in manifest.functions:
        reason = f"it has no function {function}"
    return Candidate(
        directory, manifest, reason, rank=(target_rank, root_index, manifest.spec != spec.label)
    )


def _check_place(directory: Path, manifest: Manifest) -> None:
    place = (directory.parent.name, directory.name)
    if place != (manifest.target.name, manifest.spec):
        raise ArtifactCorruptError(
            f"manifest: target and spec in {directory} must be those of the directory, "
            f"got {manifest.target.name} and {manifest.spec}; run `{build_command(*place)}`"
        )


def _judge_target(target: TargetInfo, device: TargetInfo) -> tuple[int, str | None]:
    """(rank, reason to reject): 0 is the device itself."""
    if target.kind != device.kind:
        return 0, f"it is for {_described(target)}, not for {_described(device)}"
    if target.kind == "llvm":
        missing = missing_cpu_features(target.arch)
        levels = list(CPU_LEVELS)
        rank = levels.index(target.arch) if target.arch in levels else len(levels)
        return rank, f"it needs a CPU with {', '.join(missing)}" if missing else None
    if target.name == device.name:
        return 0, None
    if target.arch == device.arch:
        return 1, None
    return 0, f"it is for {_described(target)}, not for {_described(device)}"


def _judge_spec(theirs: Spec, function: str, spec: Spec) -> str | None:
    if function not in theirs.functions:
        return f"it has no function {function}"
    has, wanted = (dataclasses.asdict(s.relevant_to(function)) for s in (theirs, spec))
    differ = [
        f"{name} {has[name]}, not {wanted[name]}" for name in has if has[name] != wanted[name]
    ]
    return f"it has {'; '.join(differ)}" if differ else None


def _may_serve(directory: Path, function: str, spec: Spec, device: TargetInfo) -> bool:
    """Judge by the directory's names, for a manifest that cannot be read."""
    try:
        theirs = parse_spec(directory.name)
    except UnsupportedSpecError:
        return False
    return directory.parent.name == device.name and _judge_spec(theirs, function, spec) is None


def _described(target: TargetInfo) -> str:
    return f"{target.name} ({target.arch})"


def _not_found(function: str, spec: Spec, device: TargetInfo, judged: list[Candidate]) -> str:
    rejected: dict[tuple[Path, str], list[str]] = {}
    for candidate in judged:
        group = (candidate.directory.parent, str(candidate.reason))
        rejected.setdefault(group, []).append(candidate.directory.name)
    lines = [
        f"  {parent}/{{{', '.join(sorted(names))}}}: {reason}"
        for (parent, reason), names in rejected.items()
    ]
    searched = ", ".join(map(str, env.artifact_dirs()))
    count = f"{len(judged)} that serve others" if judged else "none"
    return "\n".join(
        [
            f"load: a library must serve {function} of {spec.label} on {_described(device)}, "
            f"got {count} in {searched}; run `{build_command(device.name, spec.label)}`",
            *lines,
        ]
    )
