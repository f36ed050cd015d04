"""Ctrl-C in a search: it ends the measuring, not the keeping of what was measured."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from tvm.support import popen_pool

from tq_tvm.tuning.database import Entry

__all__ = ["Interrupt", "SearchInterrupted", "shield_workers"]


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a search; ``entry`` is what was kept, None where nothing was found yet."""

    def __init__(self, entry: Entry | None) -> None:
        super().__init__()
        self.entry = entry


class Interrupt:
    """Context in which Ctrl-C raises KeyboardInterrupt, or waits for the end of what is held.

    An exception that crosses TVM comes out as a RuntimeError, so its type does not tell: ``came``
    does, and ``insisted``, of a second Ctrl-C, which never waits. Outside of the main thread, which
    gets no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.came = False
        self.insisted = False
        self._held = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def hold(self) -> None:
        """From now on the first Ctrl-C is only noted."""
        self._held = True

    def release(self) -> None:
        """End of `hold`: a Ctrl-C that came raises now."""
        self._held = False
        if self.came:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.insisted, self.came = self.came, True
        if self.insisted or not self._held:
            raise KeyboardInterrupt


def shield_workers() -> None:
    """Start TVM's workers with SIGINT blocked: a terminal sends it to them too.

    They end with the process that started them.
    """
    start = popen_pool.PopenWorker._start
    if getattr(start, "shielded", False):
        return

    def shielded(self: Any) -> None:
        # A child inherits the mask of the thread that starts it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            start(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    shielded.shielded = True  # type: ignore[attr-defined]
    popen_pool.PopenWorker._start = shielded
