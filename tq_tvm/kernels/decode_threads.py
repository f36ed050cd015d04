"""Where a thread of a CTA of ``decode`` on GPUs stands.

A CTA has parts of query heads, `Shape.abreast` of them; a part has a column of warps, or where rows
are too long for one warp a column for each slice of them. All columns go through the same tokens,
warp w of each through the same tiles.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels.decode_shape import Shape
from tq_tvm.kernels.device import i32, let

__all__ = ["Standing"]


@dataclasses.dataclass(frozen=True)
class Standing:
    """Numbers of a thread's warp, and of the thread, in what they are parts of.

    ``g`` and ``t`` are ``lane / 4`` and ``lane % 4``, as fragments of ``mma`` have them, ``token``
    is the first of a tile's tokens that the lane weighs. ``inside`` counts the threads of a part of
    query heads and ``part_warp`` its warps; ``warp`` and ``column_thread`` count those of a column.
    ``kv_head``, ``first_head`` and ``heads`` say which query heads the part has.
    """

    part: Any
    slice: Any
    column: Any
    warp: Any
    part_warp: Any
    lane: Any
    g: Any
    t: Any
    token: Any
    inside: Any
    column_thread: Any
    kv_head: Any
    first_head: Any
    heads: Any

    @classmethod
    def of(cls, shape: Shape, unit, thread) -> Standing:
        """Work it out for a thread of CTA ``unit`` of a group, or of a cluster's row of CTAs."""
        spec, warps = shape.spec, shape.config.warps
        part, inside = let(thread // (32 * shape.part_warps)), let(thread % (32 * shape.part_warps))
        part_warp, lane = let(inside // 32), let(inside % 32)
        g, t = let(lane // 4), let(lane % 4)
        token = let(g + 8 * (t // 2)) if shape.packed else g
        slice_, column, warp, column_thread = i32(0), part, part_warp, inside
        if shape.slices > 1:
            slice_, warp = let(part_warp // warps), let(part_warp % warps)
            column, column_thread = let(part * shape.slices + slice_), let(inside % (32 * warps))
        number = let(unit * shape.abreast + part)
        kv_head, head_tile = let(number // shape.head_tiles), let(number % shape.head_tiles)
        first_head = let(kv_head * spec.group_size + head_tile * shape.heads)
        heads = let(T.min(i32(shape.heads), i32(spec.group_size) - head_tile * shape.heads))
        return cls(
            part, slice_, column, warp, part_warp, lane, g, t, token, inside, column_thread,
            kv_head, first_head, heads,
        )  # fmt: skip
