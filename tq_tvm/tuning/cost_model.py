"""XGBoost on the sampled decisions: the cost model for a kernel that its factory makes.

MetaSchedule's own model reads loops and buffers of the scheduled function; an anchor has none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

__all__ = ["DecisionModel"]


_MOST_DECISIONS = 12


def _features(candidate: Any) -> list[float]:
    """The number of categorical decisions, which tells designs apart, and the index of each."""
    trace = candidate.sch.trace
    decided = [
        float(int(trace.decisions[inst]))
        for inst in trace.insts
        if inst.kind.name == "SampleCategorical"
    ]
    return [float(len(decided)), *decided, *[float("nan")] * (_MOST_DECISIONS - len(decided))]


@derived_object
class DecisionModel(ms.cost_model.PyCostModel):
    """Predicts a score, best time over time, from the decisions of what was measured so far."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._features: list[list[float]] = []
        self._seconds: list[float] = []
        self._booster: Any = None

    def update(self, context: Any, candidates: list[Any], results: list[Any]) -> None:
        """Learn from measured candidates; a failed one counts as infinitely slow."""
        import xgboost

        for candidate, result in zip(candidates, results, strict=True):
            seconds = [float(s) for s in result.run_secs or []]
            self._features.append(_features(candidate))
            self._seconds.append(float(np.median(seconds)) if seconds else float("inf"))
        best = min(self._seconds)
        if np.isfinite(best):
            data = xgboost.DMatrix(np.array(self._features), best / np.array(self._seconds))
            options = {"max_depth": 4, "eta": 0.2, "nthread": 1, "seed": self._seed}
            self._booster = xgboost.train(options, data, num_boost_round=64)

    def predict(self, context: Any, candidates: list[Any]) -> np.ndarray:
        """Scores of candidates: the higher the faster, all equal before anything was measured."""
        if self._booster is None:
            return np.zeros(len(candidates), "float64")
        import xgboost

        data = xgboost.DMatrix(np.array([_features(c) for c in candidates]))
        return np.asarray(self._booster.predict(data), "float64")

    def load(self, path: str) -> None:
        """Start from nothing: the database is what a search resumes from."""

    def save(self, path: str) -> None:
        """Keep nothing: see `load`."""
