"""``manifest.json``: what one library says about itself.

A library is a directory ``<root>/<target name>/<spec label>`` with a ``manifest.json`` and the
files that it names.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from tq_tvm.errors import ArtifactCorruptError
from tq_tvm.spec import Spec, parse_spec
from tq_tvm.targets import TargetInfo

__all__ = [
    "ABI",
    "FORMAT",
    "LIBRARY_NAME",
    "MANIFEST_NAME",
    "FileRecord",
    "Manifest",
    "Variant",
    "build_command",
    "schedule_word",
]

FORMAT = 1
"""Version of the manifest's fields; a library with another one is not loaded."""

ABI = 3
"""What calls and kernels agree on: arguments, their order and strides, launch numbers, byte order.

A library with another number is not loaded. It changes with any of them.
"""

MANIFEST_NAME = "manifest.json"
LIBRARY_NAME = "kernels.so"


def build_command(target: str, spec: str) -> str:
    """Return the command that builds the library of a target name and a spec label."""
    return f"tq-tvm build --target {target} --spec {spec}"


def schedule_word(tuned: bool, workload: str | None) -> str:
    """Where a variant's decisions come from, see `Variant`."""
    if tuned:
        return "tuned"
    return "default" if workload is None else "default is best"


class FileRecord(msgspec.Struct, frozen=True):
    """Digest and size of one file of a library."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Describe an existing file."""
        data = path.read_bytes()
        return cls(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


class Variant(msgspec.Struct, frozen=True):
    """One compiled kernel of a function, and the decisions that it was compiled with.

    Parameters
    ----------
    symbol
        Name in the library.
    size
        Problem size that it was tuned at; a call takes the nearest variant.
    tuned
        Whether a tuning record chose other decisions than the default schedule's.
    workload
        Label of the record's workload; with ``tuned`` False the default is the best for it.
    us
        Time that the record was kept for, in microseconds.
    config
        Decisions, by name.
    launch
        Numbers that the caller needs to choose scalar arguments.
    batch
        Sequences of that problem, where they say more than the size: of ``decode``.
    """

    symbol: str
    size: int
    tuned: bool
    workload: str | None = None
    us: float | None = None
    config: dict[str, int] = {}
    launch: dict[str, int] = {}
    batch: int | None = None


class _Header(msgspec.Struct, frozen=True):
    format: int
    abi: int = 0


class Manifest(msgspec.Struct, frozen=True):
    """Everything in ``manifest.json``.

    Parameters
    ----------
    spec
        Label of the `Spec` that the kernels are specialised for.
    target
        Device that they are compiled for.
    files
        Digest and size of each file beside the manifest, by name.
    functions
        Variants of each kernel function, by name.
    versions, flags
        What compiled the library, and how.
    sources
        Digest of the sources that it was compiled from, see `tq_tvm.build.sources`.
    format, abi
        `FORMAT` of these fields and `ABI` of the kernels.
    """

    spec: str
    target: TargetInfo
    files: dict[str, FileRecord]
    functions: dict[str, list[Variant]]
    versions: dict[str, str] = {}
    flags: list[str] = []
    sources: str = ""
    format: int = FORMAT
    abi: int = ABI

    @property
    def parsed_spec(self) -> Spec:
        """The spec that ``spec`` names."""
        return parse_spec(self.spec)

    @property
    def build_command(self) -> str:
        """The command that builds this library again."""
        return build_command(self.target.name, self.spec)

    def counts(self) -> dict[str, tuple[int, int]]:
        """(tuned variants, all variants) of each function."""
        return {
            name: (sum(v.tuned for v in variants), len(variants))
            for name, variants in self.functions.items()
        }

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest in ``directory``.

        Raises
        ------
        ArtifactCorruptError
            The manifest is missing, malformed, of another format or for another ABI.
        """
        path = directory / MANIFEST_NAME
        command = build_command(directory.parent.name, directory.name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ArtifactCorruptError(
                f"manifest: {path} must be a readable file, got {error.strerror}; run `{command}`"
            ) from error
        try:
            header = msgspec.json.decode(data, type=_Header)
            for name, version, ours in (
                ("format", header.format, FORMAT),
                ("abi", header.abi, ABI),
            ):
                if version != ours:
                    raise ArtifactCorruptError(
                        f"manifest: {name} of {path} must be {ours}, got {version}; update tq_tvm, "
                        f"or run `{command}` to build the library with this version"
                    )
            manifest = msgspec.json.decode(data, type=cls)
            manifest._check(directory)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            raise ArtifactCorruptError(
                f"manifest: {path} must be a manifest of format {FORMAT}, got {error}; "
                f"run `{command}`"
            ) from error
        return manifest

    def write(self, directory: Path) -> Path:
        """Write ``manifest.json`` into ``directory`` in one step, and return its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / MANIFEST_NAME
        partial = path.with_name(f".{MANIFEST_NAME}.{os.getpid()}")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
        partial.replace(path)
        return path

    def _check(self, directory: Path) -> None:
        """Raise a ValueError for what the types alone do not say."""
        parse_spec(self.spec)
        for name in self.files:
            if name != Path(name).name:
                raise ValueError(f"the file name {name!r}, which is a path")
        if LIBRARY_NAME not in self.files:
            raise ValueError(f"no digest of {LIBRARY_NAME}")
        for name, variants in self.functions.items():
            if not variants or any(v.size < 1 for v in variants):
                raise ValueError(f"no variant, or one without a size, of function {name!r}")
