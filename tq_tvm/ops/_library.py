"""Registration with torch.library, and the way a call takes to its kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from tq_tvm.artifacts import LoadedFunction, LoadedVariant
from tq_tvm.errors import ArtifactCorruptError

__all__ = ["REFUSALS", "call_again", "destination_op"]

REFUSALS = (TypeError, ValueError)
"""What a kernel raises about its arguments.

It compares dtypes, shapes, strides and devices itself before it launches anything, so the Python
checks, which say it in the caller's words, need not run before each call.
"""

_Body = TypeVar("_Body", bound=Callable[..., None])


def destination_op(name: str, mutates: Sequence[str]) -> Callable[[_Body], _Body]:
    """Register a function that writes into its arguments as the torch op ``tq_tvm::<name>``.

    In eager mode the decorated function is called as it is: the dispatcher costs more than a
    kernel. Under ``torch.compile`` the registered op is called; its fake implementation does
    nothing, because there is no result. All checks are in the body, so they run in both.

    Parameters
    ----------
    name
        Name in the namespace ``tq_tvm``.
    mutates
        Arguments that the function writes.
    """

    def decorate(body: _Body) -> _Body:
        op = torch.library.custom_op(f"tq_tvm::{name}", body, mutates_args=mutates)
        op.register_fake(_no_result)

        @functools.wraps(body)
        def call(*args: Any) -> None:
            (op if torch.compiler.is_compiling() else body)(*args)

        return call  # type: ignore[return-value]

    return decorate


def call_again(
    loaded: LoadedFunction, variant: LoadedVariant, arguments: Sequence[torch.Tensor | int | float]
) -> None:
    """Call a kernel that has refused its arguments, with those that all checks let pass.

    They differ in strides of axes of size 1, on which a kernel insists.

    Raises
    ------
    ArtifactCorruptError
        The kernel refuses valid arguments: it is not the one that its manifest describes.
    """
    try:
        variant.call(*arguments)
    except REFUSALS as error:
        raise ArtifactCorruptError(
            f"load: {variant.symbol} in {loaded.directory} must be the kernel that its "
            f"manifest describes, got one that refuses valid arguments ({error}); "
            f"run `{loaded.manifest.build_command}` to build it again"
        ) from error


def _no_result(*args: Any, **kwargs: Any) -> None:
    return None
