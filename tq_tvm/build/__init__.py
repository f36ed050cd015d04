"""Records to libraries: schedules are replayed, lowered, compiled and described by a manifest."""

from tq_tvm import _fast_stack as _fast_stack
