"""What a call is compared with: another way to do the same work, and what it has to move."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from tq_tvm.errors import BenchmarkError

__all__ = ["Baseline", "Peer", "checked"]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A call, and the bytes that it has to read and write, once, in its own format."""

    call: Callable[[], object]
    bytes: int
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another program's call, and what is known about its result.

    Parameters
    ----------
    call
        Returns the result, ``[N, ...]``.
    bytes
        As of a `Baseline`.
    versions
        Of the program and of the compiler of its kernels.
    rows
        Which of the N are checked.
    wanted
        Float32 results of these rows, ``[len(rows), ...]``; one of them has to be met.
    tolerance
        Largest relative error of a row, by the Euclidean norm.
    """

    call: Callable[[], torch.Tensor]
    bytes: int
    versions: dict[str, str]
    rows: Sequence[int]
    wanted: Sequence[torch.Tensor]
    tolerance: float


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    error, size = (got - want).flatten(1), want.flatten(1)
    return float((error.norm(dim=1) / size.norm(dim=1)).max())


def checked(peer: Peer) -> Baseline:
    """Call a peer once and compare its result, so that no time of a wrong call is reported.

    Raises
    ------
    BenchmarkError
        The result meets none of ``wanted``.
    """
    got = peer.call()[list(peer.rows)].float()
    errors = [_error(got, want) for want in peer.wanted]
    if not any(error <= peer.tolerance for error in errors):
        raise BenchmarkError(
            f"bench: relative error must be at most {peer.tolerance}, got {min(errors):.3g}; "
            "this version may take its arguments otherwise"
        )
    return Baseline(peer.call, peer.bytes, peer.versions)
