"""Outputs of ``prefill`` on GPUs: a warp's own rows, or those that the CTAs of a cluster share.

Few long sequences have few blocks of rows: 512 new tokens of one sequence are 64 of them with 32
query heads, for 132 processors of an H100. The CTAs of a cluster take the tiles of a block in turn,
each with the softmax of its own ones, and read one another's outputs from shared memory at the end:
no workspace, and no second launch. 1 x 512 over 32768, 32/8 heads, k4v2, H100: 859 us with two CTAs
a cluster; 1698 before, when a CTA had a block to itself.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.attend_rows import Options, RowBlock, Softmax, finish_row
from tq_tvm.kernels.device import (
    LOWEST,
    access,
    arrive_at_cluster,
    f32,
    i32,
    let,
    local,
    loop,
    ptx,
    remote_address,
    shuffle_xor,
    store,
    wait_for_cluster,
    warp_barrier,
    when,
)
from tq_tvm.kernels.prefill_shape import PrefillShape
from tq_tvm.kernels.warp_rows import WarpRow

__all__ = ["leave_rows", "merge_cluster", "stand_by", "write_rows"]


def leave_rows(shape: PrefillShape, words, softmax: Softmax, warp, g, t) -> None:
    """A warp's output in shared memory, and behind the CTA's its bounds and totals."""
    stats = shape.stats
    for at in softmax.places:
        tile, half = at
        for mask in (1, 2):
            other = shuffle_xor(softmax.total[at], mask)
            store(softmax.total, softmax.total[at] + other, *at)
        row = let(warp * shape.warp.rows + (16 * tile + 8 * half) + g)
        begin = let(row * shape.warp.output_row + 2 * t)
        for octet in range(shape.spec.value_dim // 8):
            pair = [softmax.output[tile, octet, 2 * half + e] for e in range(2)]
            access("st.shared", pair, words.ptr_to([begin + 8 * octet]), "f32")
        with when(t == 0):
            for n, value in enumerate((softmax.bound[at], softmax.total[at])):
                ptx("st.shared.f32", words.ptr_to([stats + 2 * row + n]), value)


def write_rows(
    shape: PrefillShape, output: WarpRow, words, rows: RowBlock, options: Options, out, lse, warp,
    lane,
) -> None:  # fmt: skip
    """Finish what `leave_rows` left of the warp's rows, which the CTA has to itself."""
    warp_barrier()
    x, state = local(output.row_values, "float32"), local(2, "float32")
    with I.serial(0, shape.warp.rows) as turn:
        row = let(warp * shape.warp.rows + turn)
        with when(rows.exists(row)):
            for i, coordinate, wide in output.runs(lane):
                place = words.ptr_to([row * shape.warp.output_row + coordinate])
                access("ld.shared", [x[i + n] for n in range(wide)], place, "f32")
            for n in range(2):
                ptx("ld.shared.f32", state[n], words.ptr_to([shape.stats + 2 * row + n]))
            place = let(rows.token(row)), let(rows.head(row))
            finish_row(output, x, state[0], state[1], place, options, out, lse, lane)


def merge_cluster(
    shape: PrefillShape, output: WarpRow, words, rows: RowBlock, options: Options, out, lse, warp,
    lane, rank, parts,
) -> None:  # fmt: skip
    """Finish the CTA's share of every warp's rows, of which all CTAs of the cluster have parts."""
    arrive_at_cluster(release=True)
    wait_for_cluster()
    count = output.row_values
    x, part = local(count, "float32"), local(count, "float32")
    top, total, state = local(1, "float32"), local(1, "float32"), local(2, "float32")
    own, other = local(1, "int32"), local(1, "int32")
    store(own, rank)
    with loop(own[0] < shape.warp.rows):
        row = let(warp * shape.warp.rows + own[0])
        with when(rows.exists(row)):
            store(top, f32(LOWEST))
            store(total, f32(0))
            for i in range(count):
                store(x, f32(0), i)
            store(other, i32(0))
            with loop(other[0] < parts):
                stats = remote_address(words.ptr_to([shape.stats + 2 * row]), other[0])
                access("ld.shared::cluster", [state[0], state[1]], stats, "f32")
                highest = let(T.max(top[0], state[0]))
                shrink, raised = let(T.exp2(top[0] - highest)), let(T.exp2(state[0] - highest))
                store(top, highest)
                store(total, total[0] * shrink + state[1] * raised)
                own_row = words.ptr_to([row * shape.warp.output_row])
                begin = let(remote_address(own_row, other[0]))
                for i, coordinate, wide in output.runs(lane):
                    at = begin + T.cast(4 * coordinate, "uint32")
                    run = [part[i + n] for n in range(wide)]
                    access("ld.shared::cluster", run, at, "f32")
                    for n in range(i, i + wide):
                        store(x, x[n] * shrink + part[n] * raised, n)
                store(other, other[0] + 1)
            place = let(rows.token(row)), let(rows.head(row))
            finish_row(output, x, top[0], total[0], place, options, out, lse, lane)
        store(own, own[0] + parts)
    # Nobody leaves while others read what it has.
    arrive_at_cluster(release=False)
    wait_for_cluster()


def stand_by() -> None:
    """Of warps without rows: wait where the others do in `merge_cluster`."""
    for _ in range(2):
        arrive_at_cluster(release=False)
        wait_for_cluster()
