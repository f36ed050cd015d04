r"""``fill``: rotate, quantise, pack and write new K and V rows into pages, in one launch.

Equation
    ``tq_tvm.formats``: y = x H / sqrt(D), with signs or none as the format has it, then each
    codec's codes and scales, for the row of every (token, KV head).

Buffers
    ============  ================================  ======  ==========================
    name          shape                             dtype   use
    ============  ================================  ======  ==========================
    k, v          [T, HK, D], [T, HK, DV], free     dtype   in
                  token stride
    k_cache       [P, PS, HK, BK], free page str.   uint8   out, rows of new tokens only
    v_cache       [P, PS, HK, BV], free page str.   uint8   out; dtype where a codec is none
    k_meta        [P, PS, HK, MK], free page str.   dtype   out; [1] float32 in, of fp8
    v_meta        [P, PS, HK, MV], free page str.   dtype   out; [1] float32 in, of fp8
    slot_mapping  [T]                               int64   in, ``fill_slots``
    block_table   [B, MB]                           int32   in, ``fill_table``
    seq_lens      [B], after the append             int32   in, ``fill_table``
    q_start_loc   [B + 1], cumulative               int32   in, ``fill_table``
    k_window      [S, N, HK, D], N = window         dtype   out, ``fill_table`` with a window
    v_window      [S, N, HK, DV]                    dtype   out
    window_slots  [B], ring of each sequence        int32   in
    ============  ================================  ======  ==========================

    Layout ``bhsd`` swaps PS and HK. ``fill_slots``: slot = page * PS + offset, negative = skip.
    ``fill_table``: token t of sequence b sits at position
    seq_lens[b] - (q_start_loc[b+1] - q_start_loc[b]) + (t - q_start_loc[b]).

Static: format, D, DV, HK, PS, dtype, layout, window. Dynamic: T >= 1, B, P, MB, lengths, strides.

Tail
    As in ``rotate``. Tokens past q_start_loc[B], and those before position 0, are skipped.

Numerics
    float32 throughout. A reciprocal of the norm replaces the division, so a value within float
    rounding of a boundary may get the neighbouring code.

Cost of one value (k4v2, D = 128, bf16)
    2 bytes read, 0.4 written; about 7 additions to rotate, 10 operations to encode K, 6 for V.

Blocks that schedules name: ``row`` > ``slot``, then for ``k`` and ``v``: ``load``, ``widen``,
``stage*`` and ``paley*``, those of `tq_tvm.kernels.codecs`, ``scale``, ``meta``; with a window
``window_narrow`` and ``window_store``.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I
from tvm.tirx import PrimFunc

from tq_tvm.kernels import blocks, codecs, pages
from tq_tvm.spec import CacheSpec, Codec

__all__ = ["fill_slots", "fill_table"]


def _emit_side(
    prefix: str, spec: CacheSpec, codec: Codec, dim: int, src, token, head, slot, cache, meta
) -> tuple:
    """Encode the row of one side and write it where ``slot`` says; return it, and its scale."""
    fmt = spec.cache_format
    scale = blocks.rotation_scale(fmt.rotation, dim)
    index = pages.slot_row(spec, slot[0], head)

    def valid():
        return slot[0] >= T.int64(0)

    signed = fmt.rotation == "signed_hadamard"
    row = blocks.load_row(prefix, src, lambda j: [token, head, j], dim, spec.dtype, signed)
    row = blocks.rotate(prefix, row, fmt.rotation, dim)
    scales = codecs.encode(
        prefix, row, codec, fmt.scale_rule, dim, scale, cache, meta, index, spec.dtype, valid
    )
    if scales:
        blocks.store_meta(prefix, scales, meta, index, spec.dtype, valid)
    return row, scale


def _emit_row(spec: CacheSpec, k, v, caches: pages.Caches, token, head, slot) -> list:
    """Both sides of one (token, head)."""
    fmt = spec.cache_format
    return [
        _emit_side(
            "k", spec, fmt.key, spec.head_dim, k, token, head, slot, caches.k_cache, caches.k_meta
        ),
        _emit_side(
            "v", spec, fmt.value, spec.value_dim, v, token, head, slot, caches.v_cache,
            caches.v_meta,
        ),
    ]  # fmt: skip


def _emit_window(
    spec: CacheSpec, rows, rings: pages.Rings, head, sequence, position, newest
) -> None:
    """Leave the rotated rows in the sequence's ring too, if ``newest`` holds."""
    ring, at = rings.slots[sequence], position % spec.window
    sides = zip("kv", rows, (rings.k, rings.v), (spec.head_dim, spec.value_dim), strict=True)
    for prefix, (row, scale), buffer, dim in sides:
        blocks.store_row(
            f"{prefix}_window", row, buffer, lambda j: [ring, at, head, j], dim, spec.dtype, scale,
            lambda: newest,
        )  # fmt: skip


def fill_slots(
    spec: CacheSpec, *, row_multiple: int, tokens: int | None = None, num_pages: int | None = None
) -> PrimFunc:
    """The TensorIR of ``fill`` by slot mapping; the sizes fix a search's shapes."""
    dtype, hk = spec.dtype, spec.num_kv_heads

    def emit(k, v, caches, slot_mapping, vr, total):
        token = T.min(vr // hk, total - 1)
        slot = I.sblock_alloc_buffer((1,), "int64")
        value = T.Select(vr // hk < total, slot_mapping[token], T.int64(-1))
        pages.store_slot(slot, value, [slot_mapping[token]])
        _emit_row(spec, k, v, caches, token, vr % hk, slot)

    @T.prim_func(s_tir=True)
    def main(
        k: T.handle,
        v: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        slot_mapping: T.handle,
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        if tokens is None:
            n = T.int64()
            p = T.int64()
        else:
            n = T.meta_var(T.int64(tokens))
            p = T.meta_var(T.int64(num_pages))
        k_rows = T.meta_var(pages.match_rows(k, n, hk, spec.head_dim, dtype))
        v_rows = T.meta_var(pages.match_rows(v, n, hk, spec.value_dim, dtype))
        cache_args = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        SM = T.match_buffer(slot_mapping, (n,), "int64", align=8)
        K = T.meta_var(k_rows.view())
        V = T.meta_var(v_rows.view())
        caches = T.meta_var(pages.view_caches(cache_args))
        for i in T.serial(blocks.padded(n * hk, row_multiple)):
            with T.sblock("row"):
                vr = T.axis.spatial(blocks.padded(n * hk, row_multiple), i)
                T.reads(
                    pages.whole(K), pages.whole(V), pages.whole(SM), *caches.tensor_scales(spec)
                )
                T.writes(caches.written(spec))
                emit(K, V, caches, SM, vr, n)

    return main


def fill_table(
    spec: CacheSpec,
    *,
    row_multiple: int,
    tokens: int | None = None,
    num_pages: int | None = None,
    batch: int | None = None,
    table_width: int | None = None,
) -> PrimFunc:
    """The TensorIR of ``fill`` by block table; the sizes fix a search's shapes."""
    dtype, hk = spec.dtype, spec.num_kv_heads

    def emit(k, v, caches, table, lens, starts, vr, total, sequences, rings):
        token = T.min(vr // hk, total - 1)
        found = blocks.find_sequence(starts, sequences, token)
        slot = I.sblock_alloc_buffer((1,), "int64")
        b = found[0]
        position = lens[b] - starts[b + 1] + T.cast(token, "int32")
        in_range = T.And(
            T.And(vr // hk < total, T.cast(token, "int32") < starts[sequences]),
            position >= 0,
        )
        value = T.if_then_else(in_range, pages.page_slot(spec, table, b, position), T.int64(-1))
        pages.store_slot(slot, value, [pages.whole(t) for t in (table, lens, starts)] + [found[0]])
        rows = _emit_row(spec, k, v, caches, token, vr % hk, slot)
        if rings is not None:
            newest = T.And(slot[0] >= T.int64(0), position >= lens[b] - spec.window)
            _emit_window(spec, rows, rings, vr % hk, b, position, newest)

    def ring_slots(rings):
        return [] if rings is None else [pages.whole(rings.slots)]

    def written_rings(rings):
        return [] if rings is None else [pages.whole(rings.k), pages.whole(rings.v)]

    @pages.jit(spec, s_tir=True)
    def main(
        k: T.handle,
        v: T.handle,
        k_cache: T.handle,
        v_cache: T.handle,
        k_meta: T.handle,
        v_meta: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        q_start_loc: T.handle,
        k_window: T.Optional(T.handle),
        v_window: T.Optional(T.handle),
        window_slots: T.Optional(T.handle),
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
        k_rows = T.meta_var(pages.match_rows(k, n, hk, spec.head_dim, dtype))
        v_rows = T.meta_var(pages.match_rows(v, n, hk, spec.value_dim, dtype))
        cache_args = T.meta_var(pages.match_caches(spec, (k_cache, v_cache, k_meta, v_meta), p))
        BT = T.match_buffer(block_table, (b, w), "int32", align=4)
        SL = T.match_buffer(seq_lens, (b,), "int32", align=4)
        QS = T.match_buffer(q_start_loc, (b + 1,), "int32", align=4)
        rings = T.meta_var(pages.match_rings(spec, (k_window, v_window, window_slots), b))
        K = T.meta_var(k_rows.view())
        V = T.meta_var(v_rows.view())
        caches = T.meta_var(pages.view_caches(cache_args))
        for i in T.serial(blocks.padded(n * hk, row_multiple)):
            with T.sblock("row"):
                vr = T.axis.spatial(blocks.padded(n * hk, row_multiple), i)
                T.reads(
                    pages.whole(K),
                    pages.whole(V),
                    pages.whole(BT),
                    pages.whole(SL),
                    pages.whole(QS),
                    *ring_slots(rings),
                    *caches.tensor_scales(spec),
                )
                T.writes(*caches.written(spec), *written_rings(rings))
                emit(K, V, caches, BT, SL, QS, vr, n, b, rings)

    return main
