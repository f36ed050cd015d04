"""What a search shows while it runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

__all__ = ["Progress"]

_log = logging.getLogger("tq_tvm")


class Progress:
    """Counts candidates: trial, best time, failures, and the time left.

    Parameters
    ----------
    label
        Name of the workload.
    total
        Trials to expect.
    """

    def __init__(self, label: str, total: int) -> None:
        self.best_us: float | None = None
        self.failures = 0
        self.trials = 0
        self.last_error: str | None = None
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=label,
            unit="trial",
            mininterval=0.1 if interactive else 30.0,
            dynamic_ncols=interactive,
        )

    def report(self, us: float | None, error: str | None) -> None:
        """Count one measured candidate; ``us`` is None for a failed one."""
        self.trials += 1
        if us is None:
            self.failures += 1
            self.last_error = error
            _log.debug("candidate %d failed: %s", self.trials, error)
        elif self.best_us is None or us < self.best_us:
            self.best_us = us
        best = "-" if self.best_us is None else f"{self.best_us:.1f}us"
        self._bar.set_postfix_str(f"best {best}, failed {self.failures}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
