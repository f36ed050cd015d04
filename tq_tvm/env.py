"""Environment variables and the directories they choose: the only user of ``os.environ``.

Every function reads the environment when it is called.

==========================  =======================================================================
variable                    meaning
==========================  =======================================================================
``TQ_TVM_ARTIFACT_DIR``     directories of libraries (``os.pathsep`` between them); if set, no other
                            place is searched
``TQ_TVM_CACHE_DIR``        where files of this user go, instead of the platform's cache and data
                            directories
``TQ_TVM_NUM_THREADS``      threads of the CPU kernels, instead of torch's number
``TQ_TVM_LOG_LEVEL``        level of the ``tq_tvm`` logger: DEBUG, INFO, WARNING (default) or ERROR
==========================  =======================================================================
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from tq_tvm._version import __version__
from tq_tvm.errors import ArgumentValueError

__all__ = [
    "LOG_LEVELS",
    "artifact_dirs",
    "cache_dir",
    "log_level",
    "num_threads",
    "only_artifact_dir",
    "prebuilt_dir",
    "user_artifact_dir",
    "user_logs_dir",
]

_ARTIFACT_DIR = "TQ_TVM_ARTIFACT_DIR"

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def cache_dir() -> Path:
    """Directory of what this package writes for the current user and can make again."""
    chosen = os.environ.get("TQ_TVM_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("tq_tvm"))


def prebuilt_dir() -> Path:
    """Directory of the libraries that come inside the package; a wheel may have none."""
    return Path(__file__).parent / "artifacts" / "prebuilt"


def user_artifact_dir() -> Path:
    """Where libraries built on this machine go: of one version of the package only.

    The first directory of ``TQ_TVM_ARTIFACT_DIR`` if it is set, so that what is built is found.
    """
    chosen = _chosen_artifact_dirs()
    return chosen[0] if chosen else cache_dir() / "artifacts" / __version__


def user_logs_dir() -> Path:
    """Where tuning logs of this user go if the package's directory is not for writing."""
    chosen = os.environ.get("TQ_TVM_CACHE_DIR")
    root = Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("tq_tvm"))
    return root / "tuning_logs"


def artifact_dirs() -> tuple[Path, ...]:
    """Every directory that is searched for libraries, in order."""
    chosen = _chosen_artifact_dirs()
    if chosen:
        return chosen
    prebuilt = prebuilt_dir()
    return (*((prebuilt,) if prebuilt.is_dir() else ()), user_artifact_dir())


@contextlib.contextmanager
def only_artifact_dir(root: Path) -> Iterator[None]:
    """Search no other directory for libraries than ``root``."""
    before = os.environ.get(_ARTIFACT_DIR)
    os.environ[_ARTIFACT_DIR] = str(root)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ARTIFACT_DIR]
        else:
            os.environ[_ARTIFACT_DIR] = before


def num_threads() -> int | None:
    """Threads of the CPU kernels; None leaves the choice to the caller.

    Raises
    ------
    ArgumentValueError
        ``TQ_TVM_NUM_THREADS`` is not a positive integer.
    """
    text = os.environ.get("TQ_TVM_NUM_THREADS")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentValueError(
            f"env: TQ_TVM_NUM_THREADS must be a positive integer, got {text!r}; correct or unset it"
        )
    return int(text)


def log_level() -> str:
    """Level of the ``tq_tvm`` logger, one of `LOG_LEVELS`.

    Raises
    ------
    ArgumentValueError
        ``TQ_TVM_LOG_LEVEL`` names no level.
    """
    level = os.environ.get("TQ_TVM_LOG_LEVEL", "WARNING").upper()
    if level not in LOG_LEVELS:
        raise ArgumentValueError(
            f"env: TQ_TVM_LOG_LEVEL must be one of {', '.join(LOG_LEVELS)}, got {level!r}; "
            "correct or unset it"
        )
    return level


def _chosen_artifact_dirs() -> tuple[Path, ...]:
    text = os.environ.get(_ARTIFACT_DIR, "")
    return tuple(Path(part).expanduser() for part in text.split(os.pathsep) if part)
