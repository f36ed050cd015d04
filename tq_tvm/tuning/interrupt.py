"""Ctrl-C in a search: it ends the measuring, not the keeping of what was measured."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from tvm.support import popen_pool

__all__ = ["Interrupt", "shield_workers"]


class Interrupt:
    """Context in which Ctrl-C is noted, and raises KeyboardInterrupt until it is held.

    An exception that crosses TVM comes out as a RuntimeError, so its type does not tell. Outside of
    the main thread, which gets no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.came = False
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
        """From now on the first Ctrl-C is only noted; a second one raises."""
        self._held = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.came = not self.came, True
        if not (self._held and first):
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
