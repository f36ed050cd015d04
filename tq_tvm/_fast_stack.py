"""Make ``inspect.stack`` cheap; import this before TVM, in every process that parses TVMScript.

TVM's parser calls ``inspect.stack()`` for every function. The standard one resolves the module of
each frame by scanning ``sys.modules``, so with torch loaded, importing TVM's tensor intrinsics, as
each MetaSchedule worker does, takes 42 s instead of 4 s and every trial times out.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from types import FrameType

__all__: list[str] = []

_WITH_SOURCE = 4
"""Innermost frames whose source line is looked up; the parser reads no further ones."""


def _frame_info(frame: FrameType, with_source: bool) -> inspect.FrameInfo:
    code = frame.f_code
    line = [linecache.getline(code.co_filename, frame.f_lineno)] if with_source else None
    return inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, line, 0)


def _outer_frames(frame: FrameType | None, context: int = 1) -> list[inspect.FrameInfo]:
    frames: list[inspect.FrameInfo] = []
    while frame is not None:
        frames.append(_frame_info(frame, len(frames) < _WITH_SOURCE))
        frame = frame.f_back
    return frames


def _stack(context: int = 1) -> list[inspect.FrameInfo]:
    return _outer_frames(sys._getframe(1), context)


inspect.stack = _stack
inspect.getouterframes = _outer_frames  # type: ignore[assignment]
