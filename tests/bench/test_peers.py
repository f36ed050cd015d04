"""Adapters of other programs, against stand-ins that take the same calls and compute in torch."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import sys
import types

import pytest
import torch

from tq_tvm import reference
from tq_tvm.bench import peers
from tq_tvm.bench.baseline import checked
from tq_tvm.errors import BenchmarkError
from tq_tvm.ops import PagedKVCache
from tq_tvm.spec import CacheSpec

SPEC = CacheSpec(64, 8, 2, 16, "bfloat16", "bshd")
LENGTHS = [17, 1, 48, 33]
TOKENS = sum(LENGTHS)
Q_BYTES = 2 * len(LENGTHS) * 8 * 64 * 2


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    width = 3
    cache = PagedKVCache(SPEC, len(LENGTHS) * width + 1, "cpu")
    slots = torch.arange(cache.num_pages * SPEC.page_size)
    k, v = torch.randn(2, len(slots), 2, 64)
    reference.fill_kv_cache(SPEC, k, v, *cache.tensors(), slot_mapping=slots)
    table = torch.randperm(cache.num_pages)[: len(LENGTHS) * width].int().view(-1, width)
    q = torch.randn(len(LENGTHS), 8, 64, dtype=torch.bfloat16)
    return peers.DecodeInputs(SPEC, cache, q, table, torch.tensor(LENGTHS, dtype=torch.int32))


@pytest.fixture
def install(monkeypatch):
    """Put a stand-in with these attributes where an import finds it, and packages above it."""

    def put(name, **attributes):
        for depth in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:depth])
            if part not in sys.modules or part == name:
                module = types.ModuleType(part)
                module.__version__ = "1.2.3"
                module.__path__ = []
                monkeypatch.setitem(sys.modules, part, module)
        for key, value in attributes.items():
            setattr(sys.modules[name], key, value)

    return put


class FlashInfer:
    """``BatchDecodeWithPagedKVCacheWrapper`` by the definition of its page indices."""

    def __init__(self, workspace, layout, *, use_tensor_cores):
        assert layout == "NHD"
        assert use_tensor_cores == (SPEC.group_size >= 4)

    def plan(self, starts, indices, last, hq, hk, d, page_size, *, q_data_type, kv_data_type):
        assert (hq, hk, d, page_size) == (8, 2, 64, 16)
        assert starts.dtype == indices.dtype == last.dtype == torch.int32
        self.kv_dtype = kv_data_type
        self.sequences = [indices[a:b].long() for a, b in itertools.pairwise(starts)]
        self.lengths = [
            (len(pages) - 1) * page_size + int(n)
            for pages, n in zip(self.sequences, last, strict=True)
        ]

    def run(self, q, pages, *, out):
        assert {side.dtype for side in pages} == {self.kv_dtype}
        k, v = (side.float() for side in pages)
        for i, (used, length) in enumerate(zip(self.sequences, self.lengths, strict=True)):
            rows = (side[used].flatten(0, 1)[:length] for side in (k, v))
            out[i] = reference.attention(q[i], *rows).to(out.dtype)
        return out


@pytest.mark.parametrize(("name", "width"), [("FlashInfer", 2), ("FlashInfer fp8", 1)])
def test_flashinfer_gets_the_same_sequences(inputs, install, name, width):
    install("flashinfer", BatchDecodeWithPagedKVCacheWrapper=FlashInfer)
    baseline = peers.decode_peers(inputs)[name]()
    assert baseline.bytes == TOKENS * 2 * 2 * 64 * width + Q_BYTES
    assert baseline.versions == {"flashinfer": "1.2.3"}


def test_a_wrong_result_is_no_baseline(inputs, install):
    class OneTokenLess(FlashInfer):
        def plan(self, *arguments, **options):
            super().plan(*arguments, **options)
            self.lengths = [max(n - 1, 1) for n in self.lengths]

    install("flashinfer", BatchDecodeWithPagedKVCacheWrapper=OneTokenLess)
    with pytest.raises(BenchmarkError, match=r"relative error must be at most 0\.05, got"):
        peers.decode_peers(inputs)["FlashInfer"]()


def test_no_number_is_no_result():
    peer = peers.fast_hadamard.Peer(
        call=lambda: torch.full((2, 4), float("nan")),
        bytes=1,
        versions={},
        rows=[0, 1],
        wanted=[torch.ones(2, 4)],
        tolerance=0.5,
    )
    with pytest.raises(BenchmarkError, match="got nan"):
        checked(peer)


class Policy(enum.IntEnum):
    TURBO_QUANT = 42


@pytest.mark.parametrize("scale", [1.0, 0.5**0.5])
def test_lmdeploy_gets_our_cache_with_either_scale_of_centroids(inputs, install, scale):
    def attend(q, k, v, lengths, table, *, k_scales_zeros, v_scales_zeros, quant_policy, kv_layout):
        assert (quant_policy, kv_layout) == (42, "bshd")
        codec = SPEC.cache_format.key
        codec = dataclasses.replace(codec, centroids=tuple(scale * c for c in codec.centroids))
        k_rows = reference.decode_rows(k, k_scales_zeros, codec)
        v_rows = reference.decode_rows(v, v_scales_zeros, SPEC.cache_format.value)
        out = []
        for i, length in enumerate(lengths.tolist()):
            rows = (side[table[i].long()].flatten(0, 1)[:length] for side in (k_rows, v_rows))
            rotated = reference.attention(reference.hadamard_rotate(q[i]), *rows)
            out.append(reference.hadamard_rotate(rotated))
        return torch.stack(out).to(q.dtype)

    install("triton")
    install("lmdeploy")
    install("lmdeploy.messages", QuantPolicy=Policy)
    install("lmdeploy.pytorch.kernels.cuda.pagedattention", flash_attn_with_kvcache=attend)
    baseline = peers.decode_peers(inputs)["lmdeploy K4V2"]()
    assert baseline.bytes == TOKENS * SPEC.bytes_per_token + Q_BYTES
    assert set(baseline.versions) == {"lmdeploy", "triton"}


class Config:
    centroid_bits = key_mse_bits = effective_value_quant_bits = 4
    key_packed_size, slot_size_aligned = 34, 70
    key_fp8, norm_correction = False, True

    @classmethod
    def from_cache_dtype(cls, preset, dim):
        assert (preset, dim) == ("turboquant_4bit_nc", 64)
        return cls()


def test_vllm_fills_every_page_itself(inputs, install, monkeypatch):
    stored = {}

    def store(k, v, pages, slots, rotation, midpoints, **packing):
        assert pages.shape == (13, 16, 2, 70)
        assert midpoints.tolist() == [0.5, 1.5]
        stored.update({int(slot): rows for slot, *rows in zip(slots, k, v, strict=True)})

    def attend(*, query, seq_lens, block_table, output_buf, mid_o_buf, Pi, PiT, **rest):
        assert mid_o_buf.shape == (4, 8, 32, 65)
        assert rest["scale"] == 64**-0.5
        for i, length in enumerate(seq_lens.tolist()):
            slots = [int(block_table[i, t // 16]) * 16 + t % 16 for t in range(length)]
            k, v = (torch.stack([stored[s][side] for s in slots]) for side in (0, 1))
            output_buf[i] = reference.attention(query[i], k, v).to(query.dtype)
        return output_buf

    package = "vllm.model_executor.layers.quantization.turboquant"
    install("vllm")
    install("vllm.triton_utils", triton=types.SimpleNamespace(__version__="3.6.0"))
    install(f"{package}.config", TurboQuantConfig=Config)
    install(f"{package}.centroids", get_centroids=lambda dim, bits: torch.tensor([2.0, 0.0, 1.0]))
    ops = "vllm.v1.attention.ops.triton_turboquant"
    install(f"{ops}_store", triton_turboquant_store=store)
    install(f"{ops}_decode", triton_turboquant_decode_attention=attend)
    monkeypatch.setattr(peers.vllm, "_STORE_TOKENS", 48)
    baseline = peers.decode_peers(inputs)["vLLM 4bit_nc"]()
    assert len(stored) == 13 * 16
    assert baseline.bytes == TOKENS * 2 * 70 + Q_BYTES
    assert baseline.versions == {"vllm": "1.2.3", "triton": "3.6.0"}


def test_fast_hadamard_transform(install):
    install(
        "fast_hadamard_transform",
        hadamard_transform=lambda x, scale: reference.hadamard_rotate(x) * scale * 8,
    )
    x = torch.randn(100, 64)
    baseline = peers.rotate_peers(x)["fast_hadamard_transform"]()
    assert baseline.bytes == 2 * 100 * 64 * 4


@pytest.fixture
def latents():
    torch.manual_seed(0)
    pages = torch.randn(7, 16, 1, 96, dtype=torch.bfloat16)
    table = torch.randperm(7)[:6].int().view(2, 3)
    q = torch.randn(2, 4, 96, dtype=torch.bfloat16)
    lengths = torch.tensor([40, 40], dtype=torch.int32)
    return peers.LatentInputs(q, 64, pages, table, lengths, 0.25)


def flash_mla(missing=0):
    """``flash_mla_with_kvcache`` by its documentation."""

    def metadata(lengths, heads, kv_heads):
        assert (lengths.tolist(), heads, kv_heads) == ([40, 40], 4, 1)
        return "metadata", "splits"

    def attend(q, pages, table, lengths, dim, *plan, softmax_scale):
        assert plan == ("metadata", "splits")
        assert q.shape == (2, 1, 4, 96)
        out = []
        for i, length in enumerate(lengths.tolist()):
            keys = pages[table[i].long()].flatten(0, 2)[: length - missing].float()
            weights = (q[i, 0].float() @ keys.T * softmax_scale).softmax(-1)
            out.append((weights @ keys[:, :dim]).to(q.dtype))
        return torch.stack(out)[:, None], None

    return {"get_mla_metadata": metadata, "flash_mla_with_kvcache": attend}


def test_flash_mla_gets_the_same_sequences(latents, install):
    install("flash_mla", **flash_mla())
    baseline = peers.mla_peers(latents)["FlashMLA"]()
    assert baseline.bytes == 2 * (80 * 96 + 2 * 4 * (96 + 64))
    assert baseline.versions == {"flash_mla": "1.2.3"}


def test_flash_mla_that_leaves_tokens_out_is_no_baseline(latents, install):
    install("flash_mla", **flash_mla(missing=8))
    with pytest.raises(BenchmarkError, match="relative error must be at most"):
        peers.mla_peers(latents)["FlashMLA"]()
