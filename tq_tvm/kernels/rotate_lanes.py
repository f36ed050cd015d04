"""``rotate`` on GPUs of rows whose matrix has a factor of Paley's: the threads of `kernels.rotate`.

A warp takes 32 rows at a time, fewer where lanes share one (`lane_rows`), in and out through
shared memory. Rows past the end read the last one and write nothing.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tq_tvm.kernels.device import (
    PAIR,
    access,
    f32,
    let,
    local,
    loop,
    ptx,
    shared_dynamic,
    store,
    warp_barrier,
    when,
)
from tq_tvm.kernels.lane_rows import LaneRow, copy_turns, padded_words
from tq_tvm.spec import RotateSpec

__all__ = ["emit_lanes"]


def emit_lanes(spec: RotateSpec, config: Any, x, y, n, block, thread) -> None:
    """``32 tiles`` rows of a warp."""
    dim, dtype = spec.dim, spec.dtype
    row = LaneRow(dim)
    abreast, apart, chunks = 32 // row.lanes, padded_words(dim), dim // 8
    warp, lane = let(thread // 32), let(thread % 32)
    own, part = let(lane // row.lanes), let(lane % row.lanes)
    words = shared_dynamic(config.warps * abreast * apart, "uint32")
    begin = let(warp * (abreast * apart))
    mine = let(begin + own * apart)
    first = local(1, "int64")
    start = (T.cast(block, "int64") * config.warps + T.cast(warp, "int64")) * (32 * config.tiles)
    last = let(T.min(start + T.int64(32 * config.tiles), n))
    pairs, value = local(row.values // 2, "uint32"), local(row.values, "float32")

    def pieces():
        """Row, element of the row and place in shared memory of what a lane copies in turn."""
        for turn in copy_turns(dim, abreast):
            piece = let(turn * 32 + lane)
            inside, chunk = let(T.truncdiv(piece, chunks)), let(T.truncmod(piece, chunks))
            there = let(first[0] + T.cast(inside, "int64"))
            yield there, chunk * 8, let(begin + inside * apart + chunk * 4)

    def pointer(at):
        return words.ptr_to([mine + at])

    store(first, start)
    with loop(first[0] < last):
        for there, element, place in pieces():
            at = T.min(there, n - 1) * dim + T.cast(element, "int64")
            ptx("cp.async.cg.shared.global", words.ptr_to([place]), x.ptr_to([at]), 16)
        ptx("cp.async.commit_group")
        ptx("cp.async.wait_group", 0)
        warp_barrier()
        row.read(pairs, pointer, part)
        row.widen(dtype, pairs, value)
        row.rotate(value, part)
        for i in range(row.values // 2):
            scaled = [value[2 * i + e] * f32(dim**-0.5) for e in (1, 0)]
            ptx(PAIR[dtype], pairs[i], *scaled)
        row.write(pairs, pointer, part)
        warp_barrier()
        four = local(4, "uint32")
        for there, element, place in pieces():
            with when(there < last):
                registers = [four[i] for i in range(4)]
                access("ld.shared", registers, words.ptr_to([place]))
                at = y.ptr_to([there * dim + T.cast(element, "int64")])
                access("st.global", registers, at)
        warp_barrier()
        store(first, first[0] + T.int64(abreast))
