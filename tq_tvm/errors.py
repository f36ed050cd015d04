"""Every error that tq_tvm raises on purpose.

Messages: ``<operation>: <argument> must be <expected>, got <actual>; <what to do>``.
Argument errors are also ``ValueError`` or ``TypeError``, so that a caller can catch those alone.
"""

from __future__ import annotations

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "ArtifactCorruptError",
    "ArtifactNotFoundError",
    "BenchmarkError",
    "BuildError",
    "TQError",
    "TuningLogError",
    "UnsupportedSpecError",
]


class TQError(Exception):
    """Base class of all errors of this package."""


class ArgumentValueError(TQError, ValueError):
    """An argument has a wrong shape, stride, device, alignment or value."""


class ArgumentTypeError(TQError, TypeError):
    """An argument has a wrong type or dtype."""


class UnsupportedSpecError(TQError, ValueError):
    """No kernel can be generated for the requested specialisation."""


class ArtifactNotFoundError(TQError, LookupError):
    """No library serves this kernel, specialisation and device.

    The message lists every candidate with the reason why it was rejected.
    """


class ArtifactCorruptError(TQError, RuntimeError):
    """A library or its manifest is missing, truncated, altered or malformed."""


class TuningLogError(TQError, RuntimeError):
    """A tuning log is malformed, or was recorded for another device or kernel."""


class BenchmarkError(TQError, RuntimeError):
    """Another program computed something else than asked, or a picture lacks its package."""


class BuildError(TQError, RuntimeError):
    """A library could not be compiled."""
