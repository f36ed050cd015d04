"""Options and habits that commands of ``tq-tvm`` share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from tq_tvm.errors import BuildError, TQError
from tq_tvm.spec import FUNCTIONS, CacheSpec, RotateSpec, Spec, parse_spec
from tq_tvm.targets import TARGETS, TargetInfo, detect, get_target

__all__ = [
    "KERNELS",
    "counted",
    "json_option",
    "kernel_option",
    "logs_option",
    "print_json",
    "reported",
    "require_compiler",
    "spec_option",
    "target_option",
]

_DEFAULT_SPEC = "k4v2_d128_hq32_hk8_p64_bf16_bshd"

KERNELS = tuple(dict.fromkeys(FUNCTIONS.values()))
"""Names that ``--kernel`` takes."""


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


target_option = click.option(
    "--target",
    type=_Target(),
    default="auto",
    show_default=True,
    help=f"auto (this machine), or one of {', '.join(TARGETS)}.",
)
spec_option = click.option(
    "--spec",
    "specs",
    type=_Spec(),
    multiple=True,
    default=[_DEFAULT_SPEC],
    show_default=True,
    help="Label of a cache spec or of a rotation, such as rotate_d1024_bf16; may be repeated.",
)
kernel_option = click.option(
    "--kernel",
    "kernels",
    type=click.Choice(KERNELS),
    multiple=True,
    help="Kernel; may be repeated. All by default.",
)
logs_option = click.option(
    "--logs",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Directory of tuning logs, instead of the package's and this user's.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the package's errors into a message and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except TQError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def print_json(value: Any) -> None:
    """Print a value of the package's types as JSON."""

    def encode(item: Any) -> Any:
        if isinstance(item, Path):
            return str(item)
        raise NotImplementedError

    data = msgspec.json.encode(value, enc_hook=encode)
    click.echo(msgspec.json.format(data, indent=2).decode())


def require_compiler(command: str) -> None:
    """Refuse a command where TVM is not installed."""
    try:
        import tvm  # noqa: F401
    except ImportError as error:
        raise BuildError(
            f"{command}: the compiler must be installed, got {error}; "
            "run `pip install 'tq-tvm[tune]'`"
        ) from error


def counted(counts: dict[str, tuple[int, int]]) -> str:
    """Tuned variants of all, by function."""
    return " ".join(f"{name} {tuned}/{total}" for name, (tuned, total) in counts.items())
