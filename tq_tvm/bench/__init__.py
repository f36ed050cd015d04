"""Timing of kernels and of public calls, and the rows of ``bench.json``."""
