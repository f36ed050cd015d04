"""Where a schedule's numbers come from: MetaSchedule's samples, or given values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tvm.s_tir import Schedule, Trace

__all__ = ["Decide", "decided", "sampled"]


class Decide(Protocol):
    """Chooses one of ``options`` for the decision called ``name``."""

    def __call__(self, name: str, options: Sequence[int]) -> object:
        """Return the choice, as a schedule takes it."""
        ...


def sampled(sch: Schedule, values: Mapping[str, int] | None = None) -> Decide:
    """Make every decision a `sample_categorical` instruction of the trace, in order of request.

    With ``values`` the outcome is theirs, or the nearest option below where that is not on offer.
    """

    def decide(name: str, options: Sequence[int]) -> object:
        decision = None
        if values is not None:
            below = [o for o in options if o <= values[name]]
            decision = options.index(max(below) if below else min(options))
        return sch.sample_categorical(list(options), [1.0 / len(options)] * len(options), decision)

    return decide


def decided(trace: Trace) -> list[int]:
    """Value of every sampled decision, in order of request.

    Read off the trace's own options: those on offer may have changed since.
    """
    # The map of decisions has an order of its own.
    return [
        int(inst.attrs[0][int(trace.decisions[inst])])
        for inst in trace.insts
        if inst.kind.name == "SampleCategorical"
    ]
