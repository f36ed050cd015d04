r"""``flatten``: gather the pages of a ragged batch and dequantise them into dense K and V.

Equation
    Each row as its codec decodes it (``tq_tvm.formats``), in the rotated domain; ``unrotated``
    undoes the format's rotation: multiplies by H / sqrt(D) once more, and by the signs if any.

Buffers
    ===========  ========================================  ======  ===
    name         shape                                     dtype   use
    ===========  ========================================  ======  ===
    k_cache      [P, PS, HK, BK], free page stride         uint8   in; dtype where codec is none
    v_cache      [P, PS, HK, BV], free page stride         uint8   in
    k_meta       [P, PS, HK, MK], free page stride         dtype   in; [1] float32 of fp8
    v_meta       [P, PS, HK, MV], free page stride         dtype   in
    block_table  [B, MB]                                   int32   in
    seq_lens     [B]                                       int32   in
    start_loc    [B], first output row of each sequence    int32   in
    k_out        [N, HK, D], free token stride              dtype   out
    v_out        [N, HK, DV], free token stride             dtype   out
    ===========  ========================================  ======  ===

Static: format, D, DV, HK, PS, dtype, layout, unrotated. Dynamic: N, B >= 1, P, MB, lengths and
strides.

Tail
    As in ``rotate``. Output rows that belong to no sequence become zero.

Numerics
    float32, one rounding to dtype at the end.

Cost of one value (k4v2, D = 128, bf16)
    0.4 bytes read, 2 written; about 9 operations for K and 5 for V, 8 more to rotate back.

Blocks that schedules name: ``row`` > ``sequence``, ``slot``, then for ``k`` and ``v``: ``load``,
``scales``, ``value``, ``stage*`` and ``paley*`` (unrotated), ``narrow``, ``store``.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import blocks, codecs, pages
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["flatten"]


def _emit_side(
    prefix: str,
    spec: CacheSpec,
    codec: Codec,
    dim: int,
    unrotated: bool,
    cache,
    meta,
    out,
    slot,
    row_of_out,
) -> None:
    """Decode the row of one side and write it to its output row."""
    rotation = spec.cache_format.rotation if unrotated else "none"
    row, head, total = row_of_out
    # A row of no sequence reads slot 0 with scales of zero.
    index = pages.slot_row(spec, T.max(slot[0], T.int64(0)), head)

    def present():
        return slot[0] >= T.int64(0)

    values = codecs.decode(prefix, cache, meta, index, codec, dim, spec.dtype, present)
    values = blocks.rotate(prefix, values, rotation, dim)
    blocks.store_row(
        prefix, values, out, lambda j: [row, head, j], dim, spec.dtype,
        blocks.rotation_scale(rotation, dim), lambda: row < total,
        signed=rotation == "signed_hadamard",
    )  # fmt: skip


def flatten(
    spec: CacheSpec,
    *,
    unrotated: bool,
    row_multiple: int,
    tokens: int | None = None,
    num_pages: int | None = None,
    batch: int | None = None,
    table_width: int | None = None,
) -> PrimFunc:
    """The TensorIR of ``flatten``; the sizes fix a search's shapes."""
    dtype, hk = spec.dtype, spec.num_kv_heads
    fmt = spec.cache_format

    def emit(caches, table, lens, starts, k_out, v_out, vr, total, sequences):
        row = vr // hk
        found = blocks.find_sequence(starts, sequences, row)
        slot = I.sblock_alloc_buffer((1,), "int64")
        b = found[0]
        position = T.cast(row, "int32") - starts[b]
        value = T.if_then_else(
            T.And(position >= 0, position < lens[b]),
            pages.page_slot(spec, table, b, position),
            T.int64(-1),
        )
        pages.store_slot(slot, value, [pages.whole(t) for t in (table, lens, starts)] + [found[0]])
        place = (row, vr % hk, total)
        for prefix, codec, dim, cache, meta, out in (
            ("k", fmt.key, spec.head_dim, caches.k_cache, caches.k_meta, k_out),
            ("v", fmt.value, spec.value_dim, caches.v_cache, caches.v_meta, v_out),
        ):
            _emit_side(prefix, spec, codec, dim, unrotated, cache, meta, out, slot, place)

    @T.prim_func(s_tir=True)
    def main(
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        start_loc: T.handle,
        k_out: T.handle,
        v_out: T.handle,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        if tokens is None:
            n = T.int64()
            p = T.int64()
            b = T.int64()
            w = T.int64()
        else:
            n = T.meta_var(T.int64(tokens))
            p = T.meta_var(T.int64(num_pages))
            b = T.meta_var(T.int64(batch))
            w = T.meta_var(T.int64(table_width))
        cache_args = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        ST = T.match_buffer(start_loc, (b,), "int32", align=4)
        k_rows = T.meta_var(pages.match_rows(k_out, n, hk, spec.head_dim, dtype))
        v_rows = T.meta_var(pages.match_rows(v_out, n, hk, spec.value_dim, dtype))
        KO = T.meta_var(k_rows.view())
        VO = T.meta_var(v_rows.view())
        caches = T.meta_var(pages.view_caches(cache_args))
        for i in T.serial(blocks.padded(n * hk, row_multiple)):
            with T.sblock("row"):
                vr = T.axis.spatial(blocks.padded(n * hk, row_multiple), i)
                T.reads(*caches.regions(), pages.whole(BT), pages.whole(SL), pages.whole(ST))
                T.writes(pages.whole(KO), pages.whole(VO))
                emit(caches, BT, SL, ST, KO, VO, vr, n, b)

    return main
