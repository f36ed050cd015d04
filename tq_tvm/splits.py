"""Into how many parts ``decode`` splits a context: shapes decide, lengths stay on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tq_tvm.spec import CacheSpec

__all__ = ["HEAD_TILE", "LAUNCH_KEYS", "num_splits", "workspace_floats"]

HEAD_TILE = 8
"""Query heads of a group that one CTA serves."""

LAUNCH_KEYS = ("ctas_per_sm", "split_tokens")
"""What a kernel says about itself: CTAs resident on a processor, and the tokens that a CTA could
have read in the time by which one more split makes the merge longer."""


def num_splits(
    spec: CacheSpec, batch: int, context: int, launch: Mapping[str, int], processors: int
) -> int:
    """As many as are resident at once, but no more than pay for their merge.

    A CTA reads context / splits tokens and the merge costs split_tokens * splits, which is least at
    the root of their ratio. On an H200 the times of 9 shapes and 3 kernels at 20 numbers of splits
    have their minima there, but for 10 % at most; a second wave of CTAs always costs more.

    Parameters
    ----------
    batch, context
        B and an upper bound of the lengths.
    launch
        The kernel's numbers, see `LAUNCH_KEYS`.
    processors
        Multiprocessors of a GPU, threads of a CPU.
    """
    ctas = batch * spec.num_kv_heads * -(-spec.group_size // HEAD_TILE)
    resident = launch["ctas_per_sm"] * processors // ctas
    return max(1, min(resident, math.isqrt(context // launch["split_tokens"])))


def workspace_floats(spec: CacheSpec, batch: int, splits: int) -> int:
    """float32 values of workspace: a partial output, a maximum and a sum a query head and split."""
    return batch * spec.num_q_heads * splits * (spec.head_dim + 2)
