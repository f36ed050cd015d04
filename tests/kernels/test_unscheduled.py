"""The TensorIR of the row kernels before any schedule, run on the CPU, against the reference.

The program for a GPU is the same loops over more rows, and so runs here too.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rows import rows
from specs import SENTINEL, by_slot, make_batch

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

import tvm_ffi

from tq_tvm import reference, schedules
from tq_tvm.build.compile import compile_library
from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.spec import FUNCTIONS, CacheSpec, RotateSpec
from tq_tvm.targets import detect

# Every head_dim, dtype and layout.
SPECS = [
    CacheSpec(64, 4, 2, 16, "float16", "bhsd"),
    CacheSpec(128, 4, 2, 16, "bfloat16", "bshd"),
    CacheSpec(256, 3, 3, 32, "bfloat16", "bhsd"),
    CacheSpec(128, 2, 1, 16, "float32", "bhsd"),
]
LONG = [RotateSpec(512, "float16"), RotateSpec(1024), RotateSpec(4096), RotateSpec(4096, "float32")]
ATTENTION = ("decode", "decode_featured", "attend", "prefill", "mla")
ROW_KERNELS = [name for name in FUNCTIONS if name not in ATTENTION]
LENGTHS = [5, 0, 1, 16, 33]

# Distance from a decision, in standard deviations, below which float32 programs may disagree.
TIE = 1e-4
META = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3 + 2**-8}
ROUNDING = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


@dataclasses.dataclass(frozen=True)
class Program:
    spec: CacheSpec
    kind: str
    call: dict

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.spec.dtype)

    def rows(self, tokens, seed):
        shape = (tokens, self.spec.num_kv_heads, self.spec.head_dim)
        return rows("gaussian", *shape, seed=seed).to(self.dtype)


@pytest.fixture(
    scope="module",
    params=[(spec, kind) for spec in SPECS for kind in ("llvm", "cuda")],
    ids=lambda p: f"{p[0].label}-{p[1]}",
)
def program(request, tmp_path_factory) -> Program:
    spec, kind = request.param
    path = tmp_path_factory.mktemp("unscheduled") / "kernels.so"
    compile_library(
        {name: schedules.unscheduled(name, spec, kind) for name in ROW_KERNELS},
        detect("cpu"),
        path,
    )
    module = tvm_ffi.load_module(str(path))
    return Program(spec, kind, {name: module[name] for name in ROW_KERNELS})


def poisoned(like):
    return torch.full_like(like, float("nan"))


def check_rotate(call, x):
    y = poisoned(x)
    call(x, y)
    want = reference.hadamard_rotate(x)
    assert (y.float() - want).norm() <= ROUNDING[x.dtype] * want.norm()
    call(x, x)
    assert torch.equal(x, y), "in place"


# 128 is what a GPU's rows are padded to.
@pytest.mark.parametrize("count", [1, 127, 128, 129])
def test_rotate(program, count):
    x = rows("gaussian", count, program.spec.head_dim, seed=count).to(program.dtype)
    check_rotate(program.call["rotate"], x)


@pytest.fixture(scope="module")
def rotations(tmp_path_factory):
    path = tmp_path_factory.mktemp("rotations") / "kernels.so"
    functions = {spec.label: schedules.unscheduled("rotate", spec, "llvm") for spec in LONG}
    compile_library(functions, detect("cpu"), path)
    return tvm_ffi.load_module(str(path))


@pytest.mark.parametrize("spec", LONG, ids=lambda s: s.label)
def test_rotate_long_rows(rotations, spec):
    x = rows("heavy_tailed", 5, spec.dim).to(getattr(torch, spec.dtype))
    check_rotate(rotations[spec.label], x)


def check_filled(program, batch, k, v, slots):
    """Codes equal but for ties, which are counted; scales close; other slots untouched."""
    spec, fmt = program.spec, program.spec.cache_format
    written = torch.zeros(len(by_slot(spec, batch.caches[0])), dtype=torch.bool)
    written[slots] = True
    for new, codec, cache, meta in (
        (k, fmt.key, batch.caches[0], batch.caches[2]),
        (v, fmt.value, batch.caches[1], batch.caches[3]),
    ):
        rotated = reference.hadamard_rotate(new)
        packed, scales = reference.encode_rows(rotated, codec)
        got = reference.unpack_codes(by_slot(spec, cache)[slots], *codec.plane_bits)
        differ = got != reference.unpack_codes(packed, *codec.plane_bits)
        ties = reference.boundary_distance(rotated, codec) < TIE
        assert not bool((differ & ~ties).any()), "a code differs that is no tie"
        assert int(differ.sum()) <= max(2, 1e-4 * differ.numel())
        got_scales = by_slot(spec, meta)[slots].float()
        assert bool(((got_scales - scales).abs() <= META[meta.dtype] * scales).all())
        assert bool((by_slot(spec, cache)[~written] == SENTINEL).all())
        assert bool(by_slot(spec, meta)[~written].isnan().all())


def test_fill_slots(program):
    batch = make_batch(program.spec, "cpu", LENGTHS)
    k, v = (program.rows(batch.tokens, seed) for seed in (1, 2))
    slots = batch.slots.clone()
    slots[::4] = -1
    program.call["fill_slots"](k, v, *batch.caches, slots)
    kept = slots >= 0
    check_filled(program, batch, k[kept], v[kept], slots[kept])


def test_fill_table(program):
    """Appends to sequences that have a past; rows behind the last sequence's are skipped."""
    batch = make_batch(program.spec, "cpu", LENGTHS)
    counts = torch.tensor([2, 0, 1, 16, 20])
    starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    k, v = (program.rows(int(counts.sum()) + 3, seed) for seed in (1, 2))
    program.call["fill_table"](k, v, *batch.caches, batch.block_table, batch.seq_lens, starts)
    slots = reference.token_slots(batch.block_table, batch.seq_lens, starts, program.spec.page_size)
    check_filled(program, batch, k[: len(slots)], v[: len(slots)], slots)


def test_fill_table_skips_tokens_before_a_sequence(program):
    """More new tokens than the sequence is long: the first have no position."""
    batch = make_batch(program.spec, "cpu", [3])
    k, v = (program.rows(5, seed) for seed in (1, 2))
    starts = torch.tensor([0, 5], dtype=torch.int32)
    program.call["fill_table"](k, v, *batch.caches, batch.block_table, batch.seq_lens, starts)
    check_filled(program, batch, k[2:], v[2:], batch.slots)


@pytest.mark.parametrize("function", ["flatten", "flatten_unrotated"])
def test_flatten(program, function):
    spec = program.spec
    batch = make_batch(spec, "cpu", LENGTHS)
    k, v = (program.rows(batch.tokens, seed) for seed in (1, 2))
    reference.fill_kv_cache(spec, k, v, *batch.caches, slot_mapping=batch.slots)
    total = batch.tokens + 9
    out = [poisoned(program.rows(total, 0)) for _ in range(2)]
    program.call[function](
        *batch.caches, batch.block_table, batch.seq_lens, batch.starts[:-1].contiguous(), *out
    )
    want = reference.flatten_kv_cache(
        spec, *batch.caches, batch.block_table, batch.seq_lens,
        rotate_back=function == "flatten_unrotated", out_tokens=total,
    )  # fmt: skip
    for got, dense in zip(out, want, strict=True):
        assert (got.float() - dense).norm() <= ROUNDING[program.dtype] * dense.norm()
        assert bool((got[batch.tokens :] == 0).all()), "rows past the last sequence are zero"


def strided_pages(cache, spare: int):
    """A copy of ``cache`` whose pages are ``spare`` elements apart, and the whole buffer."""
    pages, page = len(cache), cache[0].numel()
    buffer = torch.zeros(pages, page + spare, dtype=cache.dtype)
    view = buffer[:, :page].view(cache.shape)
    view.copy_(cache)
    return view, buffer


def test_strided_pages_and_rows(program):
    """One page buffer a layer, and K and V as halves of one projection: nothing between is hit."""
    spec = program.spec
    batch = make_batch(spec, "cpu", LENGTHS)
    both = torch.cat([program.rows(batch.tokens, seed) for seed in (1, 2)], dim=1)
    k, v = both[:, : spec.num_kv_heads], both[:, spec.num_kv_heads :]
    views, buffers = zip(*[strided_pages(cache, 32) for cache in batch.caches], strict=True)
    program.call["fill_slots"](k, v, *views, batch.slots)
    program.call["fill_slots"](k.contiguous(), v.contiguous(), *batch.caches, batch.slots)
    for view, buffer, cache in zip(views, buffers, batch.caches, strict=True):
        torch.testing.assert_close(view, cache, rtol=0, atol=0, equal_nan=True)
        assert bool((buffer[:, -32:] == 0).all())


@pytest.mark.parametrize("function", ["decode", "attend", "rotat"])
def test_only_row_kernels_have_one(function):
    with pytest.raises(UnsupportedSpecError, match="function must be one of"):
        schedules.unscheduled(function, SPECS[0], "llvm")
