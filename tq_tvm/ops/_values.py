"""Checks of the numbers in index tensors, for tensors on the CPU.

On a GPU they would have to be read back, so there they are the caller's responsibility, and every
function that takes them says so. All of them run before anything is written.
"""

from __future__ import annotations

import torch

from tq_tvm.ops._check import fail

__all__ = [
    "check_lengths",
    "check_new_tokens",
    "check_query_starts",
    "check_rings",
    "check_slots",
    "check_starts",
    "check_table",
]


def check_slots(op: str, slot_mapping: torch.Tensor, num_slots: int) -> None:
    """Check that slots are below P * PS; negative ones are skipped."""
    if slot_mapping.numel() and (top := int(slot_mapping.max())) >= num_slots:
        fail(op, "slot_mapping", f"below P * PS = {num_slots}", top, "use a slot of the cache")


def check_lengths(op: str, seq_lens: torch.Tensor, capacity: int) -> None:
    """Check that lengths are from 0 to what a row of the block table addresses."""
    low, high = int(seq_lens.min()), int(seq_lens.max())
    if low < 0 or high > capacity:
        expected = f"from 0 to MB * PS = {capacity}"
        fail(op, "seq_lens", expected, low if low < 0 else high, "widen block_table")


def check_table(
    op: str,
    block_table: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    page_size: int,
    num_pages: int,
) -> None:
    """Check the pages of the positions [begin, end) of each sequence."""
    column = torch.arange(block_table.shape[1])
    first = torch.div(begin.clamp_min(0), page_size, rounding_mode="floor")
    last = torch.div(end + page_size - 1, page_size, rounding_mode="floor")
    used = (column >= first[:, None]) & (column < last[:, None]) & (begin < end)[:, None]
    wrong = used & ((block_table < 0) | (block_table >= num_pages))
    if wrong.any():
        sequence, index = wrong.nonzero()[0].tolist()
        fail(
            op,
            f"block_table[{sequence}, {index}]",
            f"a page from 0 to {num_pages - 1}",
            int(block_table[sequence, index]),
            "enter a page of the cache or correct seq_lens",
        )


def check_query_starts(
    op: str, starts: torch.Tensor, tokens: int, name: str = "q_start_loc"
) -> torch.Tensor:
    """Check that starts rise from 0 to at most T; return the new tokens of each sequence."""
    counts = starts.diff()
    if starts[0] != 0 or (counts < 0).any() or starts[-1] > tokens:
        fail(
            op,
            name,
            f"cumulative from 0 to at most T = {tokens}",
            starts.tolist(),
            "pass the cumulative sums of new tokens, with a leading 0",
        )
    return counts


def check_new_tokens(op: str, counts: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Check that sequences have as many tokens as are new; empty ones may have any number."""
    short = (counts > seq_lens) & (seq_lens > 0)
    if short.any():
        b = int(short.nonzero()[0])
        fail(
            op,
            f"seq_lens[{b}]",
            f"at least the {int(counts[b])} tokens that cu_seqlens_q gives the sequence, or 0",
            int(seq_lens[b]),
            "count the new tokens in seq_lens",
        )


def check_rings(op: str, window: tuple[torch.Tensor, ...]) -> None:
    """Check that every sequence has a ring of its own; without a window there is nothing to do."""
    if not window:
        return
    k_window, _, slots = window
    rings = slots.tolist()
    if len(set(rings)) < len(rings) or any(not 0 <= r < len(k_window) for r in rings):
        expected = f"different rings from 0 to S - 1 = {len(k_window) - 1}"
        fail(op, "window_slots", expected, rings, "give each sequence its own")


def check_starts(op: str, start_loc: torch.Tensor, seq_lens: torch.Tensor, out_tokens: int) -> None:
    """Check that starts are the exclusive sums of lengths, and that all rows fit in the output."""
    ends = seq_lens.cumsum(0)
    if not torch.equal(start_loc.long(), ends - seq_lens):
        fail(
            op,
            "start_loc",
            f"the exclusive cumulative sums {(ends - seq_lens).tolist()} of seq_lens",
            start_loc.tolist(),
            "pass those, or None",
        )
    if int(ends[-1]) > out_tokens:
        fail(op, "out_tokens", f"at least sum(seq_lens) = {int(ends[-1])}", out_tokens, "raise it")
