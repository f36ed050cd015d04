r"""``rotate``: the orthonormal Hadamard transform of rows.

Equation
    y = x H / sqrt(D), H a symmetric Hadamard matrix, so that H / sqrt(D) is its own inverse:
    Sylvester's of a power of two, else a product of `tq_tvm.formats.hadamard_factors`.

Buffers
    ====  =======  =======  ====
    name  shape    dtype    use
    ====  =======  =======  ====
    x     [n, D]   dtype    in
    y     [n, D]   dtype    out, may be x: a row is read whole before it is written
    ====  =======  =======  ====

Static: D, dtype. Dynamic: n >= 1.

Tail
    On a GPU the row loop is padded to a multiple of ``ROW_MULTIPLE``; padded rows read the last row
    and write nothing.

Numerics
    float32 butterflies in log2(D) steps, sums of 12, 20 or 28 values where D has such a factor,
    scaled by 1/sqrt(D) at the end, one rounding to dtype.

Cost of one value (D = 128, bf16)
    2 bytes read and 2 written; 7 additions and 1 multiplication.

GPUs have a second design, `rotate_cuda`, which is the only one for D > 256.

Blocks that schedules name: ``row`` > ``x_load``, ``x_widen``, ``x_stage*``, ``x_paley*``,
``y_narrow``, ``y_store``.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tq_tvm.kernels import blocks
from tq_tvm.spec import RotateSpec

__all__ = ["rotate"]


def rotate(spec: RotateSpec, *, row_multiple: int, n: int | None = None) -> PrimFunc:
    """The TensorIR of ``rotate``; ``n`` fixes the number of rows for a search."""
    d, dtype = spec.dim, spec.dtype
    rows = n

    def emit(X, Y, vr, total):
        row = T.min(vr, total - 1)
        x = blocks.load_row("x", X, lambda j: [row, j], d, dtype)
        y = blocks.hadamard("x", x, d)
        blocks.store_row("y", y, Y, lambda j: [vr, j], d, dtype, d**-0.5, lambda: vr < total)

    @T.prim_func(s_tir=True)
    def main(x: T.handle, y: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        if rows is None:
            n = T.int64()
        else:
            n = T.meta_var(T.int64(rows))
        X = T.match_buffer(x, (n, d), dtype, align=16)
        Y = T.match_buffer(y, (n, d), dtype, align=16)
        for i in T.serial(blocks.padded(n, row_multiple)):
            with T.sblock("row"):
                vr = T.axis.spatial(blocks.padded(n, row_multiple), i)
                T.reads(X[0:n, 0:d])
                T.writes(Y[0:n, 0:d])
                emit(X, Y, vr, n)

    return main
