"""``attend``: paged_decode with several query tokens and features, against the reference."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import rows
from specs import (
    CPU_SPECS,
    DIMS,
    DIRECT,
    FORMAT_SPECS,
    NARROW,
    SERVED,
    SPECS,
    make_batch,
    scales_of,
)

from tq_tvm import (
    PagedKVCache,
    UnsupportedSpecError,
    merge_attention_states,
    paged_decode,
    paged_decode_workspace_size,
    reference,
)
from tq_tvm.ops import attend as attend_ops
from tq_tvm.ops import workspace
from tq_tvm.served import functions_on
from tq_tvm.spec import CacheSpec

INF = float("inf")

# Libraries that other tests of this folder build too: k4v2, and every codec on every side.
PLAIN = CPU_SPECS[-1]
GPU_FORMATS = [SPECS[2], *SERVED[1:], *DIRECT, *DIMS]
FORMATS = [PLAIN, SPECS[1], SPECS[4], *FORMAT_SPECS, SERVED[0], *GPU_FORMATS]
DRAWN = [PLAIN, SPECS[1], *FORMAT_SPECS[:2], SERVED[0]]

# Relative error of outputs (Frobenius) and error of lse, which is one of all weights.
LIMIT = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}
LSE_LIMIT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# There queries and decoded rows are rounded to the model's dtype: 2^-12 or 2^-9 of a logit of 10.
GPU_LSE_LIMIT = {torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture
def served(library, device):
    """Make sure of a library with ``attend``; on a GPU without it see the refusal instead."""

    def ensure(spec):
        if device.type == "cuda" and "attend" not in functions_on(spec, "cuda"):
            if spec.dtype != "float32":
                with pytest.raises(UnsupportedSpecError, match=r"GPUs have kernels of .* attend"):
                    Batch(spec, device, [20], [2]).call()
            pytest.skip("GPUs have no kernel of attend for this spec")
        if device.type == "cpu" and spec in GPU_FORMATS:
            pytest.skip("other specs are of these codecs and head_dims on a CPU")
        library(spec, device)

    return ensure


class Batch:
    """A ragged batch in a filled cache, and the same on the CPU for the reference."""

    def __init__(self, spec, device, lengths, new, spare=0, scale=2.0):
        self.spec, self.device, self.new = spec, device, new
        self.cpu = make_batch(spec, "cpu", lengths)
        dtype = getattr(torch, spec.dtype)
        self.k, self.v = (
            rows("gaussian", self.cpu.tokens, spec.num_kv_heads, dim, seed=s).to(dtype)
            for dim, s in ((spec.head_dim, 1), (spec.value_dim, 2))
        )
        self.window = None
        if spec.window:
            shape = (len(lengths) + 1, spec.window, spec.num_kv_heads)
            rings = [
                torch.full((*shape, dim), float("nan"), dtype=dtype)
                for dim in (spec.head_dim, spec.value_dim)
            ]
            slots = torch.arange(len(lengths), 0, -1, dtype=torch.int32)
            self.window = (*rings, slots)
        self.scales = scales_of(spec)
        reference.fill_kv_cache(
            spec, self.k, self.v, *self.cpu.caches, block_table=self.cpu.block_table,
            seq_lens=self.cpu.seq_lens, q_start_loc=self.cpu.starts, window=self.window,
            **self.scales,
        )  # fmt: skip
        self.tokens = sum(new)
        self.starts = torch.tensor([0, *new]).cumsum(0).int()
        shape = (self.tokens + spare, spec.num_q_heads, spec.head_dim)
        self.q = (rows("gaussian", *shape, seed=3) * scale).to(dtype)

    def on_device(self, value):
        if isinstance(value, tuple):
            return tuple(self.on_device(v) for v in value)
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def call(self, **options):
        """Output and lse on the CPU, from poisoned tensors."""
        shape = (*self.q.shape[:2], self.spec.value_dim)
        out = torch.full(shape, float("nan"), dtype=self.q.dtype, device=self.device)
        lse = torch.full(self.q.shape[:2], float("nan"), device=self.device)
        given = {
            "cu_seqlens_q": self.starts, "window": self.window, "layout": self.spec.layout,
            "policy": self.spec.format, "return_lse": True, **self.scales, **options,
        }  # fmt: skip
        got = paged_decode(
            *self.on_device((self.q, *self.cpu.caches, self.cpu.block_table, self.cpu.seq_lens)),
            out=out, lse=lse, **{name: self.on_device(value) for name, value in given.items()},
        )  # fmt: skip
        assert got[0] is out and got[1] is lse
        return out.cpu(), lse.cpu()

    def want(self, **options):
        given = {"cu_seqlens_q": self.starts, "window": self.window, **self.scales, **options}
        return reference.paged_attend(
            self.spec, self.q, *self.cpu.caches, self.cpu.block_table, self.cpu.seq_lens, **given
        )

    @property
    def lse_limit(self):
        limits = GPU_LSE_LIMIT if self.device.type == "cuda" else LSE_LIMIT
        return limits[self.q.dtype]

    def check(self, **options):
        out, lse = self.call(**options)
        self.compare(out, lse, *self.want(**options))
        return out, lse

    def compare(self, out, lse, want, want_lse):
        used = slice(0, self.tokens)
        assert bool(out[self.tokens :].isnan().all()), "rows of no sequence are left alone"
        assert bool(lse[self.tokens :].isnan().all())
        out, want, lse, want_lse = out[used], want[used], lse[used], want_lse[used]
        error = (out.float() - want).norm() / want.norm().clamp_min(1e-3)
        assert error <= LIMIT[out.dtype]
        nothing = want_lse == -INF
        assert bool((lse[nothing] == -INF).all()) and bool((out[nothing] == 0).all())
        off = (lse - want_lse)[~nothing].abs()
        assert not off.numel() or off.max() <= self.lse_limit


@contextlib.contextmanager
def chunks_are_of(kernel):
    """Have a GPU give several tokens a sequence to one of two kernels, however few they are."""
    with mock.patch.object(workspace, "prefills", lambda *sizes: kernel == "prefill"):
        workspace.choose_prefill.cache_clear()
        yield
    workspace.choose_prefill.cache_clear()


def features_of(spec):
    """Every feature that is a tensor a head."""
    heads = spec.num_q_heads
    return {
        "sinks": rows("gaussian", heads, seed=4) * 2,
        "alibi_slopes": rows("gaussian", heads, seed=5).abs() * 0.1,
    }


@pytest.mark.parametrize("spec", FORMATS, ids=lambda s: s.label)
def test_each_feature_alone_and_all(served, device, spec):
    """Every codec on both sides, with and without a window of unquantised rows."""
    served(spec)
    batch = Batch(spec, device, [90, 0, 33, 1, 70], [3, 0, 1, 1, 20], spare=2)
    each = {
        "sm_scale": 2 * spec.head_dim**-0.5,
        "window_left": 20,
        "soft_cap": 3.0,
        **features_of(spec),
    }
    # Of 90 and 70 tokens prefill has a second tile: registers that live on, places of a ring.
    for kernel in ("attend", "prefill") if device.type == "cuda" else ("attend",):
        with chunks_are_of(kernel):
            plain, _ = batch.check()
            for name, value in each.items():
                assert not torch.equal(batch.check(**{name: value})[0], plain), name
            batch.check(window_left=9, kept_tokens=4)
            batch.check(**each, kept_tokens=4)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_combinations(served, device, data):
    """Ragged lengths and tokens, every feature or none, any number of splits on a CPU."""
    spec = data.draw(st.sampled_from(DRAWN), label="spec")
    served(spec)
    lengths = data.draw(st.lists(st.integers(0, 140), min_size=1, max_size=4), label="lengths")
    if not any(lengths):
        lengths[0] = 1
    new = [data.draw(st.integers(0, min(n, 40)), label="new") for n in lengths]
    batch = Batch(spec, device, lengths, new, spare=data.draw(st.integers(0, 1)))
    options = {}
    if data.draw(st.booleans(), label="windowed"):
        options["window_left"] = data.draw(st.integers(0, 80), label="window_left")
        options["kept_tokens"] = data.draw(st.integers(0, 70), label="kept_tokens")
    if data.draw(st.booleans(), label="capped"):
        options["soft_cap"] = data.draw(st.sampled_from([0.5, 4.0, 50.0]), label="soft_cap")
    for name, value in features_of(spec).items():
        if data.draw(st.booleans(), label=name):
            options[name] = value
    parts = data.draw(st.sampled_from([None, 2, 7]), label="parts")
    if device.type == "cuda":
        with chunks_are_of(data.draw(st.sampled_from(["attend", "prefill"]), label="kernel")):
            batch.check(**options)
        return
    if parts is None:
        batch.check(**options)
        return
    choose = attend_ops.choose_attend_launch
    with mock.patch.object(
        attend_ops, "choose_attend_launch", lambda *arguments: (choose(*arguments)[0], parts)
    ):
        batch.check(**options)


def test_one_token_a_sequence(served, device):
    """Without cu_seqlens_q, and as plain decode; empty sequences give zeros and -inf."""
    spec = SPECS[1]
    served(spec)
    batch = Batch(spec, device, [70, 0, 5], [1, 1, 1])
    out, lse = batch.check(cu_seqlens_q=None)
    assert bool((out[1] == 0).all()) and bool((lse[1] == -INF).all())
    sinks = features_of(spec)["sinks"]
    out, lse = batch.check(cu_seqlens_q=None, sinks=sinks)
    assert bool((out[1] == 0).all())
    torch.testing.assert_close(lse[1], sinks)
    arguments = batch.on_device(
        (batch.q, *batch.cpu.caches, batch.cpu.block_table, batch.cpu.seq_lens)
    )
    plain = paged_decode(*arguments, layout=spec.layout)
    # Nothing that is asked for is decode itself.
    again = paged_decode(*arguments, layout=spec.layout, window_left=-1, soft_cap=0.0)
    assert torch.equal(plain, again)
    given = paged_decode(*arguments, layout=spec.layout, cu_seqlens_q=batch.on_device(batch.starts))
    error = (given.float() - plain.float()).norm() / plain.float().norm()
    assert error <= LIMIT[plain.dtype]


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[4], DIMS[-1]], ids=lambda s: s.label)
def test_one_token_in_a_window(served, device, spec):
    """GPUs have a form of decode for it; entries of pages before the window may be anything."""
    served(spec)
    lengths = [300, 1, 0, 129, 64]
    batch = Batch(spec, device, lengths, [1] * len(lengths))
    for left in (0, 20, 63, 64, 500):
        batch.check(cu_seqlens_q=None, window_left=left)
    batch.check(cu_seqlens_q=None, window_left=20, kept_tokens=3)
    options = {"window_left": 20, "soft_cap": 3.0, **features_of(spec)}
    out, lse = batch.check(cu_seqlens_q=None, **options)
    for table, length in zip(batch.cpu.block_table, lengths, strict=True):
        table[: max(length - 21, 0) // spec.page_size] = -1
    again, lse_again = batch.call(cu_seqlens_q=None, **options)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)


def test_a_chunk_of_prefill_and_a_reused_prefix(served, device):
    """70 new tokens after 100, of two sequences that share the pages of the first 64."""
    spec = SPECS[1]
    served(spec)
    batch = Batch(spec, device, [170, 170], [70, 70])
    page = spec.page_size
    batch.cpu.block_table[1, : 64 // page] = batch.cpu.block_table[0, : 64 // page]
    for kernel in ("attend", "prefill"):
        with chunks_are_of(kernel):
            out, lse = batch.call(max_seqlen_q=70, max_seq_len=170)
        batch.compare(out, lse, *batch.want())
    # Token by token it is the same.
    for i in (0, 31, 69):
        for b in (0, 1):
            want, want_lse = reference.paged_attend(
                spec, batch.q[b * 70 + i][None], *batch.cpu.caches,
                batch.cpu.block_table[b][None], torch.tensor([101 + i]),
            )  # fmt: skip
            error = (out[b * 70 + i].float() - want[0]).norm() / want.norm()
            assert error <= LIMIT[out.dtype]
            torch.testing.assert_close(lse[b * 70 + i], want_lse[0], rtol=0, atol=batch.lse_limit)


def test_what_no_query_sees_is_not_read(served, device):
    """Pages before a window may be anybody's, and rows of later tokens may be nan."""
    spec = SPECS[1]  # pages of 16, codes whose scales are in the metas
    served(spec)
    batch = Batch(spec, device, [200, 130], [3, 9])
    options = {"window_left": 40, "kept_tokens": 5}
    out, lse = batch.check(**options)
    for b, length, new in ((0, 200, 3), (1, 130, 9)):
        seen = {0, *range((length - new - 40) // 16, -(-length // 16))}
        freed = [p for p in range(batch.cpu.block_table.shape[1]) if p not in seen]
        assert freed
        batch.cpu.block_table[b, freed] = -1
    again, lse_again = batch.call(**options)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)
    # The last token of the second sequence is seen by itself alone; on a GPU it shares a block of
    # rows with others, in which a weight of zero does not drop what is not a number.
    slot = int(batch.cpu.block_table[1, 129 // 16]), 129 % 16
    for meta in batch.cpu.caches[2:]:
        meta.transpose(1, 2)[slot] = float("nan")
    broken, lse_broken = batch.call(**options)
    whole = 3 if device.type == "cuda" else len(out) - 1
    assert torch.equal(broken[:whole], out[:whole])
    assert torch.equal(lse_broken[:whole], lse[:whole])
    assert bool(broken[-1].isnan().all()) and bool(lse_broken[-1].isnan().all())


def test_a_cascade_is_the_whole(served, device):
    """A shared prefix and the rest of each sequence, merged by lse, are plain attention."""
    spec = SPECS[1]
    served(spec)
    batch = Batch(spec, device, [150, 101], [1, 1])
    table, lens = batch.cpu.block_table, batch.cpu.seq_lens
    whole = batch.want(cu_seqlens_q=None)
    prefix = 64 // spec.page_size
    parts = []
    for columns, lengths in (
        (slice(0, prefix), lens.clamp(max=64)),
        (slice(prefix, 99), lens - 64),
    ):
        batch.cpu.block_table, batch.cpu.seq_lens = table[:, columns].contiguous(), lengths
        parts += batch.call(cu_seqlens_q=None)
    out, lse = merge_attention_states(*parts)
    batch.compare(out, lse, *whole)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_without_any_page(served, device, with_sinks):
    """No sequence has a token: zeros, and an lse of -inf or the sinks, for queries of sequences."""
    spec = SPECS[1]
    served(spec)
    batch = Batch(spec, device, [1, 1], [1, 1], spare=1)
    batch.cpu.seq_lens.zero_()
    batch.cpu.block_table = batch.cpu.block_table[:, :0]
    options = {"sinks": features_of(spec)["sinks"]} if with_sinks else {}
    out, lse = batch.check(**options)
    assert bool((out[:2] == 0).all()) and bool(out[2].isnan().all())
    want = options.get("sinks", torch.full((spec.num_q_heads,), -INF))
    assert torch.equal(lse[:2], want.expand(2, -1)) and bool(lse[2].isnan().all())


def test_workspace(served, device):
    """The size that is promised is enough for fewer tokens too, and its contents do not matter."""
    spec = NARROW if device.type == "cuda" else PLAIN
    served(spec)
    batch = Batch(spec, device, [200, 33], [5, 2])
    context = batch.cpu.block_table.shape[1] * spec.page_size
    size = paged_decode_workspace_size(spec, 2, context, device, max_tokens=9)
    assert size >= paged_decode_workspace_size(spec, 2, context, device)
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
    out, lse = batch.check()
    again = batch.call(workspace=workspace)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_views_of_a_page_buffer_beyond_two_gigabytes(library, layout):
    """The last page begins 3 GB in; what is between pages is never touched and takes no memory."""
    device = torch.device("cpu")
    spec = SPECS[1] if layout == "bhsd" else FORMAT_SPECS[0]
    library(spec, device)
    batch = Batch(spec, device, [70, 33], [7, 2])
    pages = len(batch.cpu.caches[0])
    stride = (3 << 30) // (pages - 1) // 64 * 64
    buffer = torch.empty((pages - 1) * stride + (1 << 20), dtype=torch.uint8)
    views, offset = [], 0
    for cache in batch.cpu.caches:
        size = cache.element_size()
        flat = buffer.view(cache.dtype)
        step = (stride // size, *cache.stride()[1:])
        view = flat.as_strided(cache.shape, step, offset // size)
        view.copy_(cache)
        views.append(view)
        offset += -(-cache[0].numel() * size // 64) * 64
    want = batch.call(), batch.want()
    batch.cpu.caches = views
    out, lse = batch.call()
    assert torch.equal(out, want[0][0]) and torch.equal(lse, want[0][1])
    batch.compare(out, lse, *want[1])
    plain = dict(layout=spec.layout, policy=spec.format, window=batch.window)
    table = (batch.cpu.block_table, batch.cpu.seq_lens)
    assert torch.equal(
        paged_decode(batch.q[:2], *views, *table, **plain),
        paged_decode(batch.q[:2], *[v.clone() for v in views], *table, **plain),
    )


def test_pages_of_eight_and_head_dim_512(library):
    """On CPUs, through every call of a cache: filled, read, and attended with features."""
    spec = CacheSpec(512, 4, 1, 8, "float16", format="tq42")
    library(spec, torch.device("cpu"))
    cache = PagedKVCache(spec, 12, "cpu", contiguous_pages=True)
    k, v = (rows("gaussian", 50, 1, 512, seed=s).half() for s in (1, 2))
    table = torch.randperm(12)[None].int()
    lens, starts = torch.tensor([50]).int(), torch.tensor([0, 50]).int()
    cache.fill(k, v, block_table=table, seq_lens=lens, q_start_loc=starts)
    q = rows("gaussian", 6, 4, 512, seed=3).half()
    options = {"window_left": 20, "kept_tokens": 3, "soft_cap": 4.0, **features_of(spec)}
    new = torch.tensor([0, 6]).int()
    workspace = torch.empty(cache.workspace_size(1, 96, max_tokens=6), dtype=torch.uint8)
    out, lse = cache.decode(
        q, table, lens, cu_seqlens_q=new, return_lse=True, workspace=workspace, **options
    )
    want = reference.paged_attend(
        spec, q, *cache.tensors(), table, lens, cu_seqlens_q=new, **options
    )
    assert (out.float() - want[0]).norm() / want[0].norm() <= LIMIT[torch.float16]
    torch.testing.assert_close(lse, want[1], rtol=0, atol=1e-3)
    flat, _ = cache.flatten(table, lens, out_tokens=50, rotate_back=True)
    assert (flat.float() - k.float()).norm() / k.float().norm() < 0.15
    one = cache.decode(q[-1:], table, lens)
    want = reference.paged_decode(spec, q[-1:], *cache.tensors(), table, lens)
    assert (one.float() - want).norm() / want.norm() <= LIMIT[torch.float16]


def test_starts_of_single_queries_are_made_once_for_many_batches(device, monkeypatch):
    """What a graph has seen stays where it is when more are needed."""
    monkeypatch.setattr(attend_ops, "_starts", {})
    single_starts = attend_ops._single_starts
    few = single_starts(3, device)
    assert few.tolist() == [0, 1, 2, 3]
    many = single_starts(5000, device)
    assert many.dtype == torch.int32
    assert torch.equal(many.cpu(), torch.arange(5001).int())
    assert single_starts(3, device).data_ptr() == many.data_ptr() != few.data_ptr()
    assert few.tolist() == [0, 1, 2, 3]
