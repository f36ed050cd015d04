"""Digests: a file of a library is loaded only if it is the one that its manifest names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tq_tvm.artifacts.manifest import LIBRARY_NAME, MANIFEST_NAME, FileRecord, Manifest
from tq_tvm.errors import ArtifactCorruptError

__all__ = ["check_present", "library_directories", "verify_all", "verify_directory", "verify_file"]

_VERIFIED: set[tuple[Path, str]] = set()
"""(file, digest) pairs that were found equal in this process."""


def library_directories(root: Path) -> list[Path]:
    """Directories below ``root`` with a library or a manifest, in order of their names."""
    files = (*root.glob(f"*/*/{MANIFEST_NAME}"), *root.glob(f"*/*/{LIBRARY_NAME}"))
    return sorted({path.parent for path in files if not path.parent.name.startswith(".")})


def check_present(directory: Path, manifest: Manifest) -> None:
    """Check that the files exist and have the recorded sizes, without reading them.

    Raises
    ------
    ArtifactCorruptError
        A file is missing or has another size.
    """
    for name, record in manifest.files.items():
        _check_size(directory / name, record, manifest.build_command)


def verify_file(path: Path, record: FileRecord, command: str) -> None:
    """Check size and sha256 of ``path``; a file that passed is not read again in this process.

    Raises
    ------
    ArtifactCorruptError
        The file is missing, truncated or altered. The message names the file, both digests and
        ``command``.
    """
    _check_size(path, record, command)
    key = (path.resolve(), record.sha256)
    if key in _VERIFIED:
        return
    actual = FileRecord.of(path)
    if actual.sha256 != record.sha256:
        raise ArtifactCorruptError(
            f"verify: sha256 of {path} must be {record.sha256}, got {actual.sha256}; "
            f"run `{command}` to build it again"
        )
    _VERIFIED.add(key)


def verify_directory(directory: Path) -> Manifest:
    """Read the manifest in ``directory``, check every file that it names, and return it.

    Raises
    ------
    ArtifactCorruptError
        The manifest is not readable, or a file is not the recorded one.
    """
    manifest = Manifest.read(directory)
    for name, record in manifest.files.items():
        # Asked for explicitly, so what an earlier load of this process saw does not count.
        _VERIFIED.discard(((directory / name).resolve(), record.sha256))
        verify_file(directory / name, record, manifest.build_command)
    return manifest


def verify_all(roots: Iterable[Path]) -> dict[Path, str | None]:
    """Verify every library below each of ``roots``; the problem, or None, of each directory."""
    problems: dict[Path, str | None] = {}
    for root in roots:
        for directory in library_directories(Path(root)):
            try:
                verify_directory(directory)
                problems[directory] = None
            except ArtifactCorruptError as error:
                problems[directory] = str(error)
    return problems


def _check_size(path: Path, record: FileRecord, command: str) -> None:
    if not path.is_file():
        actual = "no such file"
    elif (size := path.stat().st_size) != record.bytes:
        digest = FileRecord.of(path).sha256
        actual = f"{size} bytes (sha256 {digest})"
    else:
        return
    raise ArtifactCorruptError(
        f"verify: {path} must be {record.bytes} bytes (sha256 {record.sha256}), got {actual}; "
        f"run `{command}` to build it again"
    )
