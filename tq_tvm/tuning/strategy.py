"""Which candidates are measured: all of a small space, an evolutionary sample of a large one.

Both skip what the database already has, so an interrupted search goes on where it stopped, and both
stop at a deadline.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.arg_info import ArgInfo
from tvm.s_tir.meta_schedule.search_strategy import MeasureCandidate, PySearchStrategy

from tq_tvm import schedules
from tq_tvm.schedules.decisions import decided

__all__ = ["Evolutionary", "Exhaustive", "Feasible", "RedrawDecision", "space_size"]


def _sampled(trace: Any) -> list[Any]:
    return [inst for inst in trace.insts if inst.kind.name == "SampleCategorical"]


def space_size(sch: Schedule) -> int:
    """Points in the space that ``sch`` was sampled from."""
    return math.prod(len(inst.attrs[0]) for inst in _sampled(sch.trace))


@derived_object
class Exhaustive(PySearchStrategy):
    """Every point of the space, in an order that spreads over it."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline
        self._begun = False
        self._pending: Iterator[Any] = iter(())
        self._batch = 1
        self._context: Any = None

    def _initialize_with_tune_context(self, context: Any) -> None:
        self._context = context

    def pre_tuning(
        self,
        max_trials: int,
        num_trials_per_iter: int,
        design_spaces: list[Any],
        database: Any = None,
        cost_model: Any = None,
    ) -> None:
        """Enumerate what the database does not have."""
        self._batch = int(num_trials_per_iter)
        seen = set()
        if database is not None:
            workload = database.commit_workload(self._context.mod)
            for record in database.get_top_k(workload, 1 << 20):
                seen.add(tuple(decided(record.trace)))
        self._pending = iter(
            [
                (space.trace, point)
                for space in design_spaces
                for point in _points(space.trace)
                if _values(space.trace, point) not in seen
            ]
        )

    def post_tuning(self) -> None:
        """Nothing to release."""

    def generate_measure_candidates(self) -> list[Any] | None:
        """The next batch, or None when all are done or, after the first, the time is up."""
        if self._begun and time.monotonic() > self._deadline:
            return None
        self._begun = True
        batch = []
        for trace, point in self._pending:
            sch = Schedule(self._context.mod)
            for inst_index, decision in enumerate(point):
                trace = trace.with_decision(
                    _sampled(trace)[inst_index], decision, remove_postproc=True
                )
            trace.apply_to_schedule(sch, remove_postproc=True)
            postprocs = self._context.space_generator.postprocs or []
            if all(p.apply(sch) for p in postprocs):
                batch.append(
                    MeasureCandidate(sch, ArgInfo.from_entry_func(sch.mod, remove_preproc=True))
                )
            if len(batch) == self._batch:
                break
        return batch or None

    def notify_runner_results(self, measure_candidates: list[Any], results: list[Any]) -> None:
        """Enumeration does not learn."""

    def clone(self) -> Exhaustive:
        """A fresh strategy with the same deadline."""
        return Exhaustive(self._deadline)


@derived_object
class Evolutionary(PySearchStrategy):
    """MetaSchedule's evolutionary search, ended by a deadline."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline
        self._begun = False
        self._search = ms.search_strategy.EvolutionarySearch(
            # The spaces have tens to thousands of points; MetaSchedule's defaults are for millions.
            population_size=128,
            genetic_num_iters=3,
            init_min_unmeasured=8,
        )

    def _initialize_with_tune_context(self, context: Any) -> None:
        self._search._initialize_with_tune_context(context)

    def pre_tuning(
        self,
        max_trials: int,
        num_trials_per_iter: int,
        design_spaces: list[Any],
        database: Any = None,
        cost_model: Any = None,
    ) -> None:
        """Start the search."""
        self._search.pre_tuning(
            max_trials, num_trials_per_iter, design_spaces, database, cost_model
        )

    def post_tuning(self) -> None:
        """End the search."""
        self._search.post_tuning()

    def generate_measure_candidates(self) -> list[Any] | None:
        """The next batch, or None when the search is done or, after the first, the time is up."""
        if self._begun and time.monotonic() > self._deadline:
            return None
        self._begun = True
        return self._search.generate_measure_candidates()

    def notify_runner_results(self, measure_candidates: list[Any], results: list[Any]) -> None:
        """Tell the search what was measured."""
        self._search.notify_runner_results(measure_candidates, results)

    def clone(self) -> Evolutionary:
        """A fresh strategy with the same deadline."""
        return Evolutionary(self._deadline)


def _points(trace: Any) -> list[tuple[int, ...]]:
    """All points of a space; a stride coprime to their number visits distant ones first."""
    points = list(itertools.product(*[range(len(i.attrs[0])) for i in _sampled(trace)]))
    stride = next(s for s in range(max(1, len(points) * 5 // 8), 0, -1) if _coprime(s, len(points)))
    return [points[i * stride % len(points)] for i in range(len(points))]


def _values(trace: Any, point: tuple[int, ...]) -> tuple[int, ...]:
    """What the options of a space say at a point."""
    return tuple(int(i.attrs[0][at]) for i, at in zip(_sampled(trace), point, strict=True))


def _coprime(a: int, b: int) -> bool:
    return math.gcd(a, b) == 1


@derived_object
class Feasible(ms.postproc.PyPostproc):
    """Keeps points whose decisions exclude each other from being trials.

    They were up to a third of those of ``decode`` at head_dim 128, most at 512.
    """

    def _initialize_with_tune_context(self, context: Any) -> None:
        """Decisions are all in the schedule."""

    def apply(self, sch: Schedule) -> bool:
        """Whether a schedule is to be measured."""
        return schedules.is_feasible(sch.mod)

    def clone(self) -> Feasible:
        """A postprocessor has no state."""
        return Feasible()


@derived_object
class RedrawDecision(ms.mutator.PyMutator):
    """Draw one categorical decision anew: the step of the evolutionary search.

    MetaSchedule's own mutators know tile sizes and annotations, not plain categorical samples.
    """

    def _initialize_with_tune_context(self, context: Any) -> None:
        """Decisions are all in the trace."""

    def apply(self, trace: Any, seed: Any) -> Any:
        """Return the trace with another value of one decision, or None if there is no choice."""
        open_decisions = [i for i in _sampled(trace) if len(i.attrs[0]) > 1]
        if not open_decisions:
            return None
        draw = random.Random(int(seed))
        inst = draw.choice(open_decisions)
        others = [i for i in range(len(inst.attrs[0])) if i != int(trace.decisions[inst])]
        return trace.with_decision(inst, draw.choice(others), remove_postproc=True)

    def clone(self) -> RedrawDecision:
        """A mutator has no state."""
        return RedrawDecision()
