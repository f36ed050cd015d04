"""``python -m tq_tvm.demo``: every kernel on a ragged batch, its errors and its times.

`prepare` finds or makes the kernels, `theory` says what distortion to expect, `batch` holds the
data, `measure` the errors and the times, `__main__` prints them.
"""
