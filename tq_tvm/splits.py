"""Into how many parts ``decode`` splits a context: shapes decide, lengths stay on the device."""

from __future__ import annotations

from collections.abc import Mapping

from tq_tvm.spec import CacheSpec

__all__ = ["HEAD_TILE", "LAUNCH_KEYS", "num_splits", "workspace_floats"]

HEAD_TILE = 8
"""Query heads of a group that one CTA serves."""

LAUNCH_KEYS = ("ctas_per_sm", "min_tokens")
"""What a kernel says about itself: CTAs resident on a processor, tokens below which a split costs
more in merging than it gains."""


def num_splits(
    spec: CacheSpec, batch: int, context: int, launch: Mapping[str, int], processors: int
) -> int:
    """Enough CTAs to fill every processor once, no split below the kernel's smallest.

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
    wanted = -(-launch["ctas_per_sm"] * processors // ctas)
    return max(1, min(wanted, -(-context // launch["min_tokens"])))


def workspace_floats(spec: CacheSpec, batch: int, splits: int) -> int:
    """float32 values of workspace: a partial output, a maximum and a sum a query head and split."""
    return batch * spec.num_q_heads * splits * (spec.head_dim + 2)
