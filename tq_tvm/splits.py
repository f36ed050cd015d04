"""Into how many parts ``decode``, ``attend``, ``prefill`` and ``mla`` cut their work.

Shapes decide; lengths stay on the device. A CPU's kernel splits every context. A GPU's shares out
all tokens of the batch among groups of CTAs or, in ``decode`` of short contexts, gives each
sequence and unit of heads a cluster of CTAs, as ``prefill`` does a block of rows. Launch numbers
tell which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tq_tvm.spec import CacheSpec

__all__ = [
    "WORKSPACE_BYTES",
    "attend_floats",
    "attend_launch_keys",
    "attend_parts",
    "launch_keys",
    "mla_floats",
    "mla_launch_keys",
    "mla_parts",
    "most_attend_floats",
    "num_ctas",
    "num_groups",
    "num_parts",
    "num_splits",
    "prefill_launch_keys",
    "prefill_parts",
    "prefills",
    "workspace_floats",
]

_PREFILL_ROWS = 53
"""Rows of ``attend`` that take as long over a tile as a CTA of ``prefill`` alone on a processor.

An H100, k4v2, 128 values: 1.5 us a tile of 64 tokens, 0.45 us for each 16 rows.
"""

_CLUSTERED = (10, 11)
"""Of a GPU's slots for CTAs, those that clusters of 4 or 8 find in one part of the chip.

``cudaOccupancyMaxActiveClusters`` of an H100: of 132 slots clusters of 2 take all, those of 4 and 8
120; of 264 they take all, 248 and 240.
"""

WORKSPACE_BYTES = 2 << 20
"""What the workspace of groups may take beside a hundredth of the cache.

Of ``attend`` for every 16 rows of a block: pairs of a query token and a head of the group.
"""


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
    """As many CTAs a cluster as have tokens, and a processor each: a power of two.

    Two on a processor share its integer pipe, and both wait for the later one: at 8 x 2048 of 8 KV
    heads a call took 15.3 us with 2 CTAs a cluster and 21.4 with 4 (H100; 12.9 with 2 since L2 is
    clean before it). CTAs of a cluster have to be on neighbouring processors, which other numbers
    leave unused.
    """
    alone = processors // (batch * launch["units"])
    useful = -(-context // launch["cta_tokens"])
    most = max(1, min(launch["cluster"], alone, useful))
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


def attend_launch_keys(launch: Mapping[str, int]) -> tuple[str, ...]:
    """What a kernel of ``attend`` has to say: as `launch_keys`, and the rows of a block of queries.

    ``block_tokens`` are query tokens; ``rows`` pairs of a query token and a head of a group.
    """
    if "group_tokens" in launch:
        return ("ctas_per_sm", "units", "group_tokens", "rows")
    return ("ctas_per_sm", "split_tokens", "block_tokens")


def _blocks(tokens: int, batch: int, block: int, longest: int | None) -> int:
    """Most blocks that T rows of B sequences are in."""
    blocks = tokens // block + batch
    if longest is not None:
        # Not fewer than T tokens have, whatever the caller believes.
        blocks = min(blocks, max(batch * -(-longest // block), -(-tokens // block)))
    return max(blocks, 1)


def attend_parts(
    spec: CacheSpec,
    tokens: int,
    batch: int,
    context: int,
    launch: Mapping[str, int],
    processors: int,
    longest: int | None = None,
) -> int:
    """The number that ``attend`` is called with: splits, or groups of CTAs.

    As `num_splits` and `num_groups`, of blocks of queries.

    Parameters
    ----------
    tokens, batch, context
        T, B and an upper bound of the lengths.
    longest
        An upper bound of the query tokens of a sequence; None if there is none but T.
    """
    if "group_tokens" in launch:
        group = spec.group_size
        rows = None if longest is None else longest * group
        read = _blocks(tokens * group, batch, launch["rows"], rows) * context
        resident = launch["ctas_per_sm"] * processors // launch["units"]
        # Pieces have as many rows as a block.
        budget = (WORKSPACE_BYTES + read * spec.bytes_per_token // 100) * -(-launch["rows"] // 16)
        affordable = budget // (4 * attend_floats(spec, tokens, 1, launch))
        return max(1, min(resident, affordable, -(-read // launch["group_tokens"])))
    blocks = _blocks(tokens, batch, launch["block_tokens"], longest)
    return num_splits(spec, blocks, context, launch, processors)


def attend_floats(spec: CacheSpec, tokens: int, parts: int, launch: Mapping[str, int]) -> int:
    """float32 values of workspace of ``attend``: as `workspace_floats`, none for one split."""
    if "group_tokens" in launch:
        return 2 * parts * spec.num_kv_heads * launch["rows"] * (spec.value_dim + 2)
    return workspace_floats(spec, tokens, parts, launch) if parts > 1 else 0


def most_attend_floats(
    spec: CacheSpec, tokens: int, context: int, launch: Mapping[str, int], processors: int
) -> int:
    """`attend_floats` that serve every call of at most ``tokens`` and ``context``, of any batch."""
    if "group_tokens" in launch:
        parts = attend_parts(spec, tokens, tokens, context, launch, processors)
        return attend_floats(spec, tokens, parts, launch)
    most, parts = 0, attend_parts(spec, 1, 1, context, launch, processors, 1)
    for count in range(2, parts + 1):
        # Where there are so many parts, blocks are few, and so are tokens.
        blocks = launch["ctas_per_sm"] * processors // (spec.num_kv_heads * count)
        most = max(
            most, attend_floats(spec, min(tokens, blocks * launch["block_tokens"]), count, launch)
        )
    return most


def prefill_launch_keys(launch: Mapping[str, int]) -> tuple[str, ...]:
    """What a kernel of ``prefill`` has to say: the rows of a CTA, and with clusters their numbers.

    ``cta_tokens`` are those of a tile.
    """
    if "cluster" in launch:
        return ("ctas_per_sm", "units", "rows", "cluster", "cta_tokens")
    return ("rows",)


def prefill_parts(
    spec: CacheSpec, tokens: int, context: int, launch: Mapping[str, int], processors: int
) -> int:
    """CTAs that share a block of rows: a power of two, for processors that would be idle.

    Each has eight tiles at least. ``tokens`` is T, ``context`` an upper bound of the lengths.
    """
    parts = 1
    if "cluster" not in launch:
        return parts
    blocks = max(1, tokens * spec.group_size // launch["rows"])
    slots = launch["ctas_per_sm"] * processors
    while 2 * parts <= launch["cluster"]:
        more = 2 * parts
        # 16 clusters of 8 were two waves: 73 us at 1 x 64 over 8192, 40 at half of the rows (H100).
        fitting = slots if more == 2 else slots * _CLUSTERED[0] // _CLUSTERED[1]
        if more * blocks * launch["units"] > fitting or context < more * 8 * launch["cta_tokens"]:
            break
        parts = more
    return parts


def prefills(
    spec: CacheSpec,
    tokens: int,
    context: int,
    longest: int,
    launch: Mapping[str, int],
    processors: int,
) -> bool:
    """Whether ``prefill`` takes less time than ``attend``.

    Its CTAs have to be more than half full, and many enough: ``attend`` shares out work equally.
    16 x 16 query tokens over 4096 take 122 us of ``attend`` and 66 of ``prefill``, 1 x 128 over
    32768 384 and 346 (32/8 heads, H100).

    Parameters
    ----------
    tokens, context, longest
        T, an upper bound of the lengths, and one of the query tokens of a sequence.
    launch
        Of the variant of ``prefill``, see `prefill_launch_keys`.
    """
    rows = min(longest * spec.group_size, launch["rows"])
    if 2 * rows <= launch["rows"]:
        return False
    parts = prefill_parts(spec, tokens, context, launch, processors)
    ctas = max(1, tokens * spec.group_size // rows) * spec.num_kv_heads * parts
    return ctas * rows >= _PREFILL_ROWS * processors


def mla_launch_keys(launch: Mapping[str, int]) -> tuple[str, ...]:
    """What a kernel of ``mla`` has to say: as `launch_keys`, and of a GPU's parts of a sequence.

    ``part_tokens`` are its least tokens, and ``pieces`` what it leaves of each head for the merge.
    """
    if "part_tokens" in launch:
        return ("ctas_per_sm", "units", "part_tokens", "pieces")
    return launch_keys(launch)


def mla_parts(
    spec: CacheSpec, batch: int, context: int, launch: Mapping[str, int], processors: int
) -> int:
    """The number that ``mla`` is called with: splits, or parts of every sequence.

    As many as are resident at once, but no more than have the least tokens.
    """
    if "part_tokens" in launch:
        resident = launch["ctas_per_sm"] * processors // (launch["units"] * batch)
        return max(1, min(resident, -(-context // launch["part_tokens"])))
    return num_splits(spec, batch, context, launch, processors)


def mla_floats(spec: CacheSpec, batch: int, parts: int, launch: Mapping[str, int]) -> int:
    """float32 values of workspace of ``mla``: as `workspace_floats`, of latents."""
    latents, _ = spec.latent_parts
    return workspace_floats(latents, batch, parts * launch.get("pieces", 1), launch)
