"""Every codec on both sides through the torch calls, against the reference; layers and windows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rows import rows
from specs import DIMS, DIRECT, SERVED, by_slot, make_batch, scales_of
from specs import FORMAT_SPECS as SPECS

from tq_tvm import (
    ArgumentTypeError,
    ArgumentValueError,
    CacheSpec,
    PagedKVCache,
    UnsupportedSpecError,
    fill_kv_cache,
    flatten_kv_cache,
    paged_decode,
    paged_decode_workspace_size,
    reference,
)

LENGTHS = [5, 0, 1, 16, 33]

# Distance from a decision below which float32 programs may disagree; a value of fp8 or of a
# rounded row may be its neighbour then.
TIE = 1e-4
SCALE_ERROR = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
OUTPUT_ERROR = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 6e-3}

each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.label)


@pytest.fixture
def served(library, device):
    """Make sure of a library."""
    return lambda spec: library(spec, device)


def new_rows(spec, tokens, seed=1):
    dtype = getattr(torch, spec.dtype)
    return [
        rows("gaussian", tokens, spec.num_kv_heads, dim, seed=s).to(dtype)
        for dim, s in ((spec.head_dim, seed), (spec.value_dim, seed + 1))
    ]


def on(device, values):
    """Tensors of a device, or None."""
    return None if values is None else tuple(value.to(device) for value in values)


def attention_limit(spec, device):
    """On GPUs queries and weights are rounded, too."""
    return 1e-2 if device.type == "cuda" else OUTPUT_ERROR[spec.dtype]


def rings(spec):
    """Poisoned windows in rings of another order, or none."""
    if not spec.window:
        return None
    dims, dtype = (spec.head_dim, spec.value_dim), getattr(torch, spec.dtype)
    shape = (len(LENGTHS) + 2, spec.window, spec.num_kv_heads)
    slots = torch.tensor([6, 2, 0, 3, 1], dtype=torch.int32)
    return (*(torch.full((*shape, dim), float("nan"), dtype=dtype) for dim in dims), slots)


def relative(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


@each_spec
def test_fill(served, device, spec):
    """Prefill, then append: bytes of the reference but for ties, and nothing else touched."""
    served(spec)
    fmt = spec.cache_format
    ours, theirs = (make_batch(spec, "cpu", LENGTHS) for _ in range(2))
    window, wanted = on(device, rings(spec)), rings(spec)
    caches = on(device, ours.caches)
    k, v = new_rows(spec, ours.tokens)
    appended = ours.seq_lens.clamp(max=3)
    for lens, counts in (
        (ours.seq_lens - appended, ours.seq_lens - appended),
        (ours.seq_lens, appended),
    ):
        starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
        ends = (ours.starts[:-1] + lens).tolist()
        chosen = torch.cat(
            [torch.arange(e - c, e) for e, c in zip(ends, counts.tolist(), strict=True)]
        )
        table = {"block_table": ours.block_table, "seq_lens": lens, "q_start_loc": starts}
        new = (k[chosen], v[chosen])
        fill_kv_cache(
            *on(device, new), *caches, **{name: value.to(device) for name, value in table.items()},
            layout=spec.layout, policy=spec.format, window=window, **scales_of(spec),
        )  # fmt: skip
        reference.fill_kv_cache(
            spec, *new, *theirs.caches, **table, window=wanted, **scales_of(spec)
        )
    ours.caches = on("cpu", caches)
    for side, (codec, x) in enumerate(((fmt.key, k), (fmt.value, v))):
        got, want = (by_slot(spec, b.caches[side])[ours.slots] for b in (ours, theirs))
        y = reference.rotate_rows(x, fmt.rotation)
        if codec.packed:
            codes, wants = (reference.unpack_codes(t, *codec.plane_bits) for t in (got, want))
            near = reference.boundary_distance(y, codec) < TIE
            if codec.tensor_scale and fmt.rotation != "none":
                near |= (codes - wants).abs() == 1
            assert not bool(((codes != wants) & ~near).any())
            assert int((codes != wants).sum()) <= 2
        else:
            assert relative(got, want) <= OUTPUT_ERROR[spec.dtype]
        metas = [by_slot(spec, b.caches[side + 2])[ours.slots].float() for b in (ours, theirs)]
        torch.testing.assert_close(*metas, rtol=SCALE_ERROR[spec.dtype], atol=1e-5)
        others = torch.ones(by_slot(spec, ours.caches[side]).shape[0], dtype=torch.bool)
        others[ours.slots] = False
        for mine, reference_s in zip(ours.caches[side::2], theirs.caches[side::2], strict=True):
            torch.testing.assert_close(
                by_slot(spec, mine)[others], by_slot(spec, reference_s)[others],
                rtol=0, atol=0, equal_nan=True,
            )  # fmt: skip
    for got, want in zip((window or ())[:2], (wanted or ())[:2], strict=True):
        torch.testing.assert_close(
            got.cpu(), want, rtol=OUTPUT_ERROR[spec.dtype], atol=1e-3, equal_nan=True
        )


def filled(spec):
    batch, window = make_batch(spec, "cpu", LENGTHS), rings(spec)
    table = {"block_table": batch.block_table, "seq_lens": batch.seq_lens}
    reference.fill_kv_cache(
        spec, *new_rows(spec, batch.tokens), *batch.caches, **table, q_start_loc=batch.starts,
        window=window, **scales_of(spec),
    )  # fmt: skip
    return batch, table, window


@pytest.mark.parametrize("spec", [*SERVED, *DIRECT, *DIMS], ids=lambda s: s.label)
def test_every_call_on_every_device(library, device, spec):
    """Fill, then read what was filled: codes of the reference, its rows, its attention."""
    if device.type == "cpu" and spec in (*DIRECT, *DIMS):
        pytest.skip("other tests are of these codecs and head_dims on a CPU")
    library(spec, device)
    fmt, dtype, scales = spec.cache_format, getattr(torch, spec.dtype), scales_of(spec)
    lengths = [0, 1, 300, 64, 129]
    ours, theirs = (make_batch(spec, d, lengths) for d in (device, "cpu"))
    k, v = (x * 3 for x in new_rows(spec, ours.tokens))
    k[7] = 0
    # Of a constant row another matrix makes sums that the reference rounds to either side of zero.
    v[9, 0] = 60 if spec.value_dim & (spec.value_dim - 1) == 0 else v[9, 0] * 20
    table = ("block_table", "seq_lens")
    fill_kv_cache(
        k.to(device), v.to(device), *ours.caches, q_start_loc=ours.starts, layout=spec.layout,
        policy=spec.format, **{name: getattr(ours, name) for name in table}, **scales,
    )  # fmt: skip
    reference.fill_kv_cache(spec, k, v, *theirs.caches, slot_mapping=theirs.slots, **scales)
    for side, (codec, x) in enumerate(((fmt.key, k), (fmt.value, v))):
        pair = [by_slot(spec, b.caches[side].cpu())[theirs.slots] for b in (ours, theirs)]
        if not codec.packed:
            assert relative(*pair) <= (1e-4 if fmt.rotation != "none" else 0)
            continue
        codes, wants = (reference.unpack_codes(t, *codec.plane_bits) for t in pair)
        if codec.tensor_scale:
            assert int((codes != wants).sum()) <= (20 if fmt.rotation != "none" else 0)
            continue
        near = reference.boundary_distance(reference.rotate_rows(x, fmt.rotation), codec) < TIE
        assert not bool(((codes != wants) & ~near).any())
        assert int((codes != wants).sum()) <= 20
        metas = [
            by_slot(spec, b.caches[side + 2].cpu())[theirs.slots].float() for b in (ours, theirs)
        ]
        assert relative(*metas) <= SCALE_ERROR[spec.dtype]

    caches = [cache.cpu() for cache in ours.caches]
    lens = theirs.seq_lens
    for rotate_back in (False, True):
        dense = flatten_kv_cache(
            *ours.caches, ours.block_table, ours.seq_lens, out_tokens=ours.tokens,
            rotate_back=rotate_back, layout=spec.layout, policy=spec.format, **scales,
        )  # fmt: skip
        want = reference.flatten_kv_cache(
            spec, *caches, theirs.block_table, lens, out_tokens=ours.tokens,
            rotate_back=rotate_back, **scales,
        )  # fmt: skip
        for got, rows_wanted in zip(dense, want, strict=True):
            assert relative(got.cpu(), rows_wanted) <= 5e-3

    q = rows("gaussian", len(lengths), spec.num_q_heads, spec.head_dim, seed=9).to(dtype)
    out = paged_decode(
        q.to(device), *ours.caches, ours.block_table, ours.seq_lens, layout=spec.layout,
        policy=spec.format, **scales,
    )  # fmt: skip
    want = reference.paged_decode(spec, q, *caches, theirs.block_table, lens, **scales)
    assert relative(out.cpu(), want) <= (1e-2 if spec.dtype == "bfloat16" else 5e-3)
    assert bool((out[0] == 0).all())


@each_spec
def test_flatten(served, device, spec):
    served(spec)
    batch, table, _ = filled(spec)
    for back in (False, True):
        got = flatten_kv_cache(
            *on(device, (*batch.caches, *table.values())), out_tokens=batch.tokens + 2,
            rotate_back=back, layout=spec.layout, policy=spec.format, **scales_of(spec),
        )  # fmt: skip
        want = reference.flatten_kv_cache(
            spec, *batch.caches, **table, out_tokens=batch.tokens + 2, rotate_back=back,
            **scales_of(spec),
        )  # fmt: skip
        for mine, dense in zip(on("cpu", got), want, strict=True):
            assert mine.shape == dense.shape
            assert relative(mine, dense) <= OUTPUT_ERROR[spec.dtype]
            assert bool((mine[batch.tokens :] == 0).all())


@each_spec
def test_decode(served, device, spec):
    served(spec)
    batch, table, window = filled(spec)
    shape = (len(LENGTHS), spec.num_q_heads, spec.head_dim)
    q = rows("gaussian", *shape, seed=3).to(getattr(torch, spec.dtype)) * 2
    got = paged_decode(
        *on(device, (q, *batch.caches, *table.values())), layout=spec.layout,
        policy=spec.cache_format, window=on(device, window), **scales_of(spec),
    ).cpu()  # fmt: skip
    want = reference.paged_decode(spec, q, *batch.caches, **table, window=window, **scales_of(spec))
    assert got.shape == want.shape == (*shape[:2], spec.value_dim)
    assert relative(got, want) <= attention_limit(spec, device)
    assert bool((got[batch.seq_lens == 0] == 0).all())


def test_a_window_of_all_tokens_is_attention_of_the_rows_themselves(served, device):
    """Against dense attention over what was never quantised, not over the reference's cache."""
    spec = SPECS[0]
    served(spec)
    length = spec.window
    batch = make_batch(spec, device, [length, length])
    slots = torch.tensor([1, 0], device=device).int()
    cache = PagedKVCache(spec, batch.caches[0].shape[0], device, sequences=2)
    k, v = new_rows(spec, 2 * length)
    table = (batch.block_table, batch.seq_lens)
    cache.fill(
        *on(device, (k, v)), block_table=table[0], seq_lens=table[1], q_start_loc=batch.starts,
        window_slots=slots,
    )  # fmt: skip
    q = rows("gaussian", 2, spec.num_q_heads, spec.head_dim, seed=3).bfloat16()
    got = cache.decode(q.to(device), *table, window_slots=slots).cpu()
    for b in range(2):
        part = slice(b * length, (b + 1) * length)
        assert relative(got[b], reference.attention(q[b], k[part], v[part])) <= 1e-2
    packed = PagedKVCache(dataclasses.replace(spec, window=0), 1, device)
    assert cache.bytes_per_token == packed.bytes_per_token
    assert cache.window_bytes == 2 * 2 * length * spec.num_kv_heads * 128 * 2


@pytest.mark.gpu
def test_a_window_in_a_graph(library):
    """Lengths stay on the device: a replay has those of its time, and room in the workspace."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    device = torch.device("cuda", torch.cuda.current_device())
    spec = SPECS[0]
    library(spec, device)
    batch, _, window = filled(spec)
    caches, rings_ = on(device, batch.caches), on(device, window)
    table, lens = on(device, (batch.block_table, batch.seq_lens))
    q = rows("gaussian", len(LENGTHS), spec.num_q_heads, spec.head_dim, seed=3).bfloat16()
    q = q.to(device)
    context = table.shape[1] * spec.page_size
    size = paged_decode_workspace_size(spec, len(LENGTHS), context, device)
    options = {
        "window": rings_, "policy": spec.format, "out": torch.empty_like(q),
        "workspace": torch.empty(size, dtype=torch.uint8, device=device),
    }  # fmt: skip
    paged_decode(q, *caches, table, lens, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_decode(q, *caches, table, lens, **options)
    for emptied in (0, 3):
        lens[:emptied] = 0
        options["out"].fill_(float("nan"))
        graph.replay()
        want = reference.paged_decode(
            spec, q.cpu(), *batch.caches, batch.block_table, lens.cpu(), window=window
        )
        assert relative(options["out"].cpu(), want) <= attention_limit(spec, device)


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_format_for_each_layer(served, contiguous):
    """The first and the last in other formats: every layer is filled and read as its own."""
    base = CacheSpec(64, 2, 2, 16, "float32")
    formats = ["none-fp8-signed", "qjl4-mse3-signed-unbiased", 0]
    cache = PagedKVCache(
        base, 4, "cpu", formats=formats, contiguous_pages=contiguous, v_scale=[0.5, 1.0, 1.0]
    )
    assert [spec.format for spec in cache.specs] == [*formats[:2], "none"]
    table, lens = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    starts = torch.tensor([0, 20], dtype=torch.int32)
    q = rows("gaussian", 1, 2, 64, seed=3)
    for layer, spec in enumerate(cache.specs):
        served(spec)
        k, v = new_rows(spec, 20, seed=10 * layer)
        cache.fill(k, v, layer=layer, block_table=table, seq_lens=lens, q_start_loc=starts)
        scale = 0.5 if layer == 0 else 1.0
        want = reference.paged_decode(spec, q, *cache.tensors(layer), table, lens, v_scale=scale)
        assert relative(cache.decode(q, table, lens, layer=layer), want) <= 1e-5
        flat, _ = cache.flatten(table, lens, layer=layer, out_tokens=20, rotate_back=True)
        assert relative(flat, k) <= (0.2 if layer == 1 else 1e-5)
    assert cache.bytes_per_token == sum(spec.bytes_per_token for spec in cache.specs)


# --- errors


SMALL = CacheSpec(64, 2, 2, 16, "float32", format="fp8")


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"formats": []}, ArgumentValueError, "formats must be one format a layer"),
        ({"formats": ["k9"]}, UnsupportedSpecError, "policy must be one of"),
        ({"formats": ["int8"], "k_scale": 2.0}, ArgumentValueError, "k_scale must be None"),
        ({"k_scale": [1.0, 2.0]}, ArgumentValueError, "k_scale must be one number for each of 1"),
        ({"v_scale": "x"}, ArgumentTypeError, "v_scale must be a number"),
        ({"sequences": 2}, ArgumentValueError, "sequences must be 0 without a window"),
    ],
)
def test_caches_that_cannot_be(changes, error, part):
    with pytest.raises(error, match=part):
        PagedKVCache(SMALL, 2, "cpu", **changes)


def test_windows_need_rings_and_positions():
    spec = dataclasses.replace(SMALL, window=4)
    with pytest.raises(ArgumentValueError, match="sequences must be at least 1 with a window"):
        PagedKVCache(spec, 2, "cpu")
    cache = PagedKVCache(spec, 2, "cpu", sequences=2)
    q, (k, v) = torch.zeros(1, 2, 64), new_rows(spec, 1)
    table, one = torch.zeros(1, 1).int(), torch.ones(1).int()
    with pytest.raises(ArgumentValueError, match=r"window_slots must be \[B\] with a window"):
        cache.decode(q, table, one)
    with pytest.raises(ArgumentValueError, match="window must be None with slot_mapping"):
        cache.fill(k, v, slot_mapping=torch.zeros(1).long(), window_slots=table[0])
    with pytest.raises(ArgumentValueError, match="window_slots must be different rings from 0 to"):
        cache.decode(q, table, one, window_slots=torch.tensor([2]).int())
    with pytest.raises(ArgumentValueError, match="window_slots must be None without a window"):
        PagedKVCache(SMALL, 2, "cpu").decode(q, table, one, window_slots=table[0])


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"k_scale": "x"}, ArgumentTypeError, "k_scale must be a number"),
        ({"k_scale": torch.ones(2)}, ArgumentValueError, r"k_scale must be of shape \[1\]"),
        ({"v_scale": torch.ones(1).half()}, ArgumentTypeError, "v_scale must be float32"),
        ({"policy": "int8", "v_scale": 1.0}, ArgumentValueError, "v_scale must be None for a"),
        ({"window": (1, 2)}, ArgumentValueError, "window must be three tensors, got 2 of them"),
        (
            {"window": (torch.ones(1, 2, 2, 64).half(), torch.ones(1, 2, 2, 64), torch.zeros(1))},
            ArgumentTypeError,
            "k_window must be float32",
        ),
    ],
)
def test_scales_and_windows_that_cannot_be(changes, error, part):
    cache = PagedKVCache(SMALL, 2, "cpu")
    table, one = torch.zeros(1, 1).int(), torch.ones(1).int()
    with pytest.raises(error, match=part):
        paged_decode(
            torch.zeros(1, 2, 64), *cache.tensors(), table, one, **({"policy": "fp8"} | changes)
        )


# --- rows that are not ordinary


@pytest.mark.parametrize("spec", SPECS[:6], ids=lambda s: s.label)
def test_unusual_rows_stay_where_they_are(served, device, spec):
    """Zeros, a huge value, denormals, inf and nan: as the reference has them, others untouched."""
    served(spec)
    spec = dataclasses.replace(spec, window=0)
    library_rows = new_rows(spec, 6)
    for x in library_rows:
        x[1] = 0
        x[2] = 0
        x[2, ..., 5] = 1e4
        x[3] *= 6e-8
        x[4, ..., 7] = float("inf")
        x[5, ..., 7] = float("nan")
    batch = make_batch(spec, device, [6])
    scales = {name: 64.0 for name in scales_of(spec)}
    options = {"layout": spec.layout, "policy": spec.format}
    fill_kv_cache(
        *on(device, library_rows), *batch.caches, slot_mapping=batch.slots, **options, **scales
    )  # fmt: skip
    got = flatten_kv_cache(
        *batch.caches, batch.block_table, batch.seq_lens, out_tokens=6, rotate_back=True,
        **options, **scales,
    )  # fmt: skip
    theirs = make_batch(spec, "cpu", [6])
    reference.fill_kv_cache(
        spec, *library_rows, *theirs.caches, slot_mapping=theirs.slots, **scales
    )
    want = reference.flatten_kv_cache(
        spec, *theirs.caches, theirs.block_table, theirs.seq_lens, rotate_back=True, **scales
    )
    for mine, dense in zip(on("cpu", got), want, strict=True):
        assert bool(mine[:4].isfinite().all())
        for i in (0, 2):
            assert relative(mine[i], dense[i]) <= OUTPUT_ERROR[spec.dtype]
        assert bool((mine[1] == 0).all())
        torch.testing.assert_close(mine[3].float(), dense[3], rtol=0.1, atol=1e-6)
        assert torch.equal(mine[4:].isfinite(), dense[4:].isfinite())
        assert not bool(mine[5].isfinite().all())


def test_compiles_without_graph_break(served, device):
    """Tensor scales and windows are arguments of the registered ops."""
    spec = SPECS[5]
    served(spec)
    batch, table, window = filled(spec)
    caches, window = on(device, batch.caches), on(device, window)
    k, v = on(device, new_rows(spec, batch.tokens))
    q = rows("gaussian", len(LENGTHS), spec.num_q_heads, 64, seed=3).to(k)
    options = {
        "policy": spec.format, "k_scale": torch.full((1,), 0.5, device=device), "window": window,
        **{name: value.to(device) for name, value in table.items()},
    }  # fmt: skip
    starts = batch.starts.to(device)

    def step(k, v, q):
        fill_kv_cache(k, v, *caches, q_start_loc=starts, **options)
        return paged_decode(q, *caches, **options)

    want = step(k, v, q)
    for tensor in (*caches, *window[:2]):
        tensor.zero_()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(k, v, q), want)
