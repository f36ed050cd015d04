"""``tuning.strategy``: which candidates a search measures."""

from __future__ import annotations

import math
import time

import pytest

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

import tvm_ffi
from tq_tvm.schedules import decode
from tq_tvm.schedules.decisions import decided
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.runner import RunnerResult

from tq_tvm import schedules
from tq_tvm.build.compile import tvm_target
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import get_target
from tq_tvm.tuning.database import search_workload
from tq_tvm.tuning.strategy import (
    Evolutionary,
    Exhaustive,
    Feasible,
    RedrawDecision,
    space_size,
)

SPEC = CacheSpec(128, 8, 2, 16, "bfloat16", "bshd")
PAGES = {"batch": 1, "pages": 2, "table_width": 2}
SHAPES = {
    "rotate": {"n": 128},
    "flatten": {"tokens": 32, **PAGES},
    "decode": PAGES,
    "attend": {"tokens": 8, **PAGES},
    "prefill": {"tokens": 8, **PAGES},
}
TARGETS = {"llvm": get_target("x86_64"), "cuda": get_target("nvidia_h200")}
# Points by the tables of options: on a CPU 4 x 3 x 3, 3 x 3 x 2 x 2 and 3 x 3 x 3 x 2, on a GPU at
# head_dim 128 2 vectors x 3 x 4 x 2, 3 x 3 x 3 x 3, 4 x 3 x 2 x 3 x 2 x 2 x 3 x 2 x 3,
# 3 x 2 x 3 x 3 x 3 x 2 and 4 x 2 x 3 x 3 x 3.
POINTS = {
    ("rotate", "llvm"): 36,
    ("decode", "llvm"): 36,
    ("attend", "llvm"): 54,
    ("rotate", "cuda"): 48,
    ("flatten", "cuda"): 81,
    ("decode", "cuda"): 5184,
    ("attend", "cuda"): 324,
    ("prefill", "cuda"): 216,
}
# Of rotate's factory for GPUs, 3 x 3 x 3 x 3 x 3.
MORE = {("rotate", "cuda"): 243}
FOREVER = math.inf


def size(function, kind) -> int:
    """Points of all designs."""
    return POINTS[function, kind] + MORE.get((function, kind), 0)


def sampled(trace):
    return [inst for inst in trace.insts if inst.kind.name == "SampleCategorical"]


def decisions(trace) -> tuple[int, ...]:
    """Index of every decision, in the order of the space."""
    return tuple(int(trace.decisions[inst]) for inst in sampled(trace))


class Search:
    """The part of a search that a strategy sees: a context, design spaces and a database."""

    def __init__(self, function, kind, strategy, database, batch=7, postprocs=()):
        self.target = tvm_target(TARGETS[kind])
        self.database = database
        self.context = ms.TuneContext(
            search_workload(function, SPEC, kind, SHAPES[function]),
            target=self.target,
            space_generator=ms.space_generator.ScheduleFn(
                schedules.space(function, SPEC, kind),
                sch_rules=[],
                postprocs=list(postprocs),
                mutator_probs={RedrawDecision(): 1.0},
            ),
            search_strategy=strategy,
            task_name="test",
            rand_state=1,
            num_threads=1,
        )
        self.spaces = self.context.generate_design_space()
        self.context.pre_tuning(1000, batch, self.spaces, database, ms.cost_model.RandomModel())

    def batch(self) -> list[tuple[int, ...]] | None:
        """Decisions of the next candidates, which are measured and filed."""
        candidates = self.context.generate_measure_candidates()
        if candidates is None:
            return None
        self.context.notify_runner_results(
            candidates, [RunnerResult([1e-3], None) for _ in candidates]
        )
        workload = self.database.commit_workload(self.context.mod)
        for candidate in candidates:
            self.database.commit_tuning_record(
                ms.database.TuningRecord(
                    candidate.sch.trace, workload, [1e-3], self.target, candidate.args_info
                )
            )
        return [decisions(candidate.sch.trace) for candidate in candidates]

    def batches(self, most=1000) -> list[list[tuple[int, ...]]]:
        found = []
        while len(found) < most and (batch := self.batch()) is not None:
            found.append(batch)
        return found


def flat(batches):
    return [point for batch in batches for point in batch]


def random_trace(function, kind, seed):
    sch = Schedule(search_workload(function, SPEC, kind, SHAPES[function]), seed=seed)
    schedules.space(function, SPEC, kind)(sch)
    return sch


@pytest.mark.parametrize(("function", "kind"), POINTS)
def test_space_size(function, kind):
    sch = Schedule(search_workload(function, SPEC, kind, SHAPES[function]), seed=1)
    first, *others = map(space_size, schedules.space(function, SPEC, kind)(sch))
    assert first == space_size(sch) == POINTS[function, kind]
    assert sum(others) == MORE.get((function, kind), 0)


@pytest.mark.parametrize(("function", "kind"), POINTS)
def test_exhaustive_visits_every_point_once(function, kind):
    batches = Search(function, kind, Exhaustive(FOREVER), ms.database.MemoryDatabase()).batches()
    points = flat(batches)
    assert len(points) == len(set(points)) == size(function, kind)
    assert [len(batch) for batch in batches[:-1]] == [7] * (len(batches) - 1)


def test_exhaustive_spreads_over_the_space():
    """A search that stops early has seen several values of every decision."""
    search = Search("decode", "cuda", Exhaustive(FOREVER), ms.database.MemoryDatabase(), batch=12)
    first = search.batch()
    assert all(len({point[i] for point in first}) > 1 for i in range(5))


@pytest.mark.parametrize(("function", "kind"), POINTS)
def test_exhaustive_goes_on_where_a_search_stopped(tmp_path, function, kind):
    """By way of the files, as between two processes."""

    def search():
        files = [str(tmp_path / name) for name in ("workload.json", "record.json")]
        return Search(function, kind, Exhaustive(FOREVER), ms.database.JSONDatabase(*files))

    before, after = flat(search().batches(2)), flat(search().batches())
    assert len(before) == 14
    assert not set(before) & set(after)
    assert len(set(before) | set(after)) == size(function, kind)
    assert search().batch() is None


def test_exhaustive_knows_a_point_of_an_older_table():
    """By its values: their indices were others."""
    database = ms.database.MemoryDatabase()
    search = Search("decode", "llvm", Exhaustive(FOREVER), database)
    sch = Schedule(search.context.mod)
    made = {}

    def decide(name, options):
        made[name] = options[0]
        then = options[::-1]
        return sch.sample_categorical(then, [1.0 / len(then)] * len(then), len(then) - 1)

    decode.apply(sch, "decode", SPEC, "llvm", decide)
    database.commit_tuning_record(
        ms.database.TuningRecord(
            sch.trace, database.commit_workload(search.context.mod), [1.0], search.target, []
        )
    )
    points = flat(Search("decode", "llvm", Exhaustive(FOREVER), database).batches())
    assert len(points) == size("decode", "llvm") - 1
    assert (0,) * len(made) not in points


@pytest.mark.parametrize("strategy", [Exhaustive, Evolutionary])
def test_a_deadline_ends_a_search(strategy):
    """One batch is measured, however short the time."""
    search = Search("rotate", "llvm", strategy(time.monotonic() - 1), ms.database.MemoryDatabase())
    assert search.batch()
    assert search.batch() is None


@pytest.mark.parametrize(("function", "kind"), [("decode", "cuda"), ("rotate", "llvm")])
def test_evolutionary_measures_no_point_twice(function, kind):
    search = Search(function, kind, Evolutionary(FOREVER), ms.database.MemoryDatabase())
    points = flat(search.batches(4))
    assert len(points) == len(set(points))
    assert len(points) >= 14


@pytest.mark.parametrize("strategy", [Exhaustive, Evolutionary])
def test_infeasible_points_are_no_trials(strategy):
    """And all others are."""
    database = ms.database.MemoryDatabase()
    search = Search("decode", "cuda", strategy(FOREVER), database, 32, [Feasible()])
    candidates = search.context.generate_measure_candidates()
    assert len(candidates) >= 16
    for candidate in candidates:
        schedules.candidate(candidate.sch.mod)
    names, infeasible = list(decode.options(SPEC, "cuda")), 0
    for seed in range(1, 41):
        values = decided(random_trace("decode", "cuda", seed).trace)
        config = dict(zip(names, values, strict=True))
        infeasible += decode.rejected(SPEC, "cuda", config) is not None
    assert infeasible > 3, "there is something to leave out"


def redraw(trace, seed):
    """What the search asks of the mutator; TVM's own call from Python chooses the seed."""
    return RedrawDecision()._inst.apply(trace, seed)


@pytest.mark.parametrize(("function", "kind"), POINTS)
def test_redraw_changes_one_decision(function, kind):
    sch = random_trace(function, kind, 1)
    before = decisions(sch.trace)
    changed = set()
    for seed in range(150):
        after = decisions(redraw(sch.trace, seed))
        different = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert len(different) == 1
        changed.add((different[0], after[different[0]]))
    others = sum(len(inst.attrs[0]) - 1 for inst in sampled(sch.trace))
    assert len(changed) == others, "any decision may become any other value"


def test_redraw_has_no_choice_where_there_is_one_option():
    sch = Schedule(search_workload("decode", SPEC, "llvm", SHAPES["decode"]))
    sch.sample_categorical([4], [1.0])
    assert redraw(sch.trace, 1) is None


def test_redraw_through_tvm_gives_a_trace_that_replays():
    sch = random_trace("rotate", "llvm", 1)
    trace = RedrawDecision().apply(sch.trace)
    instance = schedules.instantiate("rotate", SPEC, "llvm", trace)
    before = schedules.instantiate("rotate", SPEC, "llvm", sch.trace)
    assert instance.config != before.config
    assert not tvm_ffi.structural_equal(instance.func, before.func)
