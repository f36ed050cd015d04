"""Where a schedule's numbers come from: sampled by MetaSchedule, or the hand-picked defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tvm.s_tir import Schedule

__all__ = ["Decide", "fixed", "sampled"]


class Decide(Protocol):
    """Chooses one of ``options`` for the decision called ``name``."""

    def __call__(self, name: str, options: Sequence[int]) -> object:
        """Return the choice, as a schedule takes it."""
        ...


def sampled(sch: Schedule) -> Decide:
    """Every decision is a `sample_categorical` instruction of the trace, in order of request."""

    def decide(name: str, options: Sequence[int]) -> object:
        return sch.sample_categorical(list(options), [1.0 / len(options)] * len(options))

    return decide


def fixed(values: Mapping[str, int]) -> Decide:
    """The value of ``values``, or the nearest option below it where that one is not offered."""

    def decide(name: str, options: Sequence[int]) -> object:
        below = [o for o in options if o <= values[name]]
        return max(below) if below else min(options)

    return decide
