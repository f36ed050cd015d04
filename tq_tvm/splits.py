"""Into how many parts ``decode`` cuts its work: shapes decide, lengths stay on the device.

A CPU's kernel splits every context. A GPU's shares out all tokens of the batch among groups of CTAs
or, for short contexts, gives each sequence and unit of heads a cluster of CTAs. Launch numbers tell
which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tq_tvm.spec import CacheSpec

__all__ = [
    "WORKSPACE_BYTES",
    "launch_keys",
    "num_ctas",
    "num_groups",
    "num_parts",
    "num_splits",
    "workspace_floats",
]

WORKSPACE_BYTES = 2 << 20
"""What the workspace of groups may take beside a hundredth of the cache."""


def launch_keys(launch: Mapping[str, int]) -> tuple[str, ...]:
    """What a kernel has to say about itself.

    ``ctas_per_sm`` is the CTAs resident on a processor; ``split_tokens`` the tokens that a thread
    could have read in the time by which one more split makes the merge longer; ``units`` the
    CTAs of a group, and ``group_tokens`` its least tokens; ``cluster`` the most CTAs of a cluster,
    and ``cta_tokens`` what one of them takes at a time.
    """
    if "cluster" in launch:
        return ("ctas_per_sm", "units", "cluster", "cta_tokens")
    if "group_tokens" in launch:
        return ("ctas_per_sm", "units", "group_tokens")
    return ("ctas_per_sm", "split_tokens")


def num_parts(
    spec: CacheSpec, batch: int, context: int, launch: Mapping[str, int], processors: int
) -> int:
    """The number that a kernel is called with: splits, groups of CTAs, or CTAs of a cluster.

    Parameters
    ----------
    batch, context
        B and an upper bound of the lengths.
    launch
        The kernel's numbers, see `launch_keys`.
    processors
        Multiprocessors of a GPU, threads of a CPU.
    """
    if "cluster" in launch:
        return num_ctas(batch, context, launch, processors)
    choose = num_groups if "group_tokens" in launch else num_splits
    return choose(spec, batch, context, launch, processors)


def num_splits(
    spec: CacheSpec, batch: int, context: int, launch: Mapping[str, int], processors: int
) -> int:
    """As many splits as run at once, but no more than pay for their merge.

    A thread reads context / splits tokens and the merge costs split_tokens * splits, which is least
    at the root of their ratio.
    """
    resident = launch["ctas_per_sm"] * processors // (batch * spec.num_kv_heads)
    return max(1, min(resident, math.isqrt(context // launch["split_tokens"])))


def num_groups(
    spec: CacheSpec, batch: int, context: int, launch: Mapping[str, int], processors: int
) -> int:
    """As many groups as are resident at once, but no more than have the least tokens to read.

    The CTAs of a group have all heads between them; it gets an equal share of all tokens of the
    batch. Their workspace stays within `WORKSPACE_BYTES` and a hundredth of the cache that is read.
    """
    resident = launch["ctas_per_sm"] * processors // launch["units"]
    budget = WORKSPACE_BYTES + batch * context * spec.bytes_per_token // 100
    affordable = budget // (4 * workspace_floats(spec, batch, 1, launch))
    enough = -(-batch * context // launch["group_tokens"])
    return max(1, min(resident, affordable, enough))


def num_ctas(batch: int, context: int, launch: Mapping[str, int], processors: int) -> int:
    """As many CTAs a cluster as are resident at once and have tokens: a power of two.

    A cluster's CTAs have to be on neighbouring processors, which other numbers leave unused.
    """
    resident = launch["ctas_per_sm"] * processors // (batch * launch["units"])
    useful = -(-context // launch["cta_tokens"])
    most = max(1, min(launch["cluster"], resident, useful))
    return 1 << (most.bit_length() - 1)


def workspace_floats(spec: CacheSpec, batch: int, parts: int, launch: Mapping[str, int]) -> int:
    """float32 values of workspace: a partial output, a maximum and a sum a query head and piece.

    Splits make a piece of every sequence each; of a group, only the first and the last piece can be
    parts of a sequence. Clusters need none.
    """
    if "cluster" in launch:
        return 0
    pieces = 2 * parts if "group_tokens" in launch else batch * parts
    return pieces * spec.num_q_heads * (spec.value_dim + 2)
