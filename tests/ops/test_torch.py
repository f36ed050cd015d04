"""Every call as torch sees it: compiled, registered, on foreign tensors, in graphs, on streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from rows import rows
from specs import LATENT, SPECS, make_batch

from tq_tvm import (
    CacheSpec,
    fill_kv_cache,
    flatten_kv_cache,
    hadamard_rotate,
    mla_decode,
    paged_decode,
    reference,
)
from tq_tvm.served import functions_on

SPEC = SPECS[1]  # of a dtype that numpy has
CACHES = ("k_cache", "v_cache", "k_meta", "v_meta")


@dataclasses.dataclass
class Case:
    """A call on valid arguments; ``out`` are tensors for its results, of which fill has none."""

    call: Callable
    tensors: dict[str, torch.Tensor]
    options: dict[str, object]
    out: tuple[torch.Tensor, ...] = ()

    def run(self, tensors=None, out=None):
        """Call with other tensors, and with ``out``, or without results to write into."""
        given = dict(self.tensors if tensors is None else tensors)
        if out:
            given["out"] = out if len(out) > 1 else out[0]
        return self.call(**given, **self.options)

    def results(self, returned) -> list[torch.Tensor]:
        """What a call wrote: what it returned, or its cache tensors."""
        if returned is None:
            return [self.tensors[name] for name in CACHES]
        return list(returned) if isinstance(returned, tuple) else [returned]

    def wanted(self) -> list[torch.Tensor]:
        """Results of a call in eager mode."""
        return [t.clone() for t in self.results(self.run(out=self.out))]

    def clear(self) -> None:
        """Forget the results."""
        for tensor in self.out or self.results(None):
            tensor.zero_()


def _rotate(batch, k, v):
    return Case(hadamard_rotate, {"x": k}, {}, (torch.empty_like(k),))


def _fill_slots(batch, k, v):
    tensors = {"k": k, "v": v, **_caches(batch), "slot_mapping": batch.slots}
    return Case(fill_kv_cache, tensors, {"layout": SPEC.layout})


def _fill_table(batch, k, v):
    tensors = {"k": k, "v": v, **_caches(batch), **_table(batch), "q_start_loc": batch.starts}
    return Case(fill_kv_cache, tensors, {"layout": SPEC.layout})


def _flatten(batch, k, v, rotate_back=False):
    reference.fill_kv_cache(SPEC, k, v, *batch.caches, slot_mapping=batch.slots)
    options = {"out_tokens": len(k), "rotate_back": rotate_back, "layout": SPEC.layout}
    out = (torch.empty_like(k), torch.empty_like(v))
    return Case(flatten_kv_cache, {**_caches(batch), **_table(batch)}, options, out)


def _flatten_unrotated(batch, k, v):
    return _flatten(batch, k, v, rotate_back=True)


def _decode(batch, k, v):
    reference.fill_kv_cache(SPEC, k, v, *batch.caches, slot_mapping=batch.slots)
    q = rows("gaussian", len(batch.seq_lens), SPEC.num_q_heads, SPEC.head_dim, seed=3).to(k)
    tensors = {"q": q, **_caches(batch), **_table(batch)}
    return Case(paged_decode, tensors, {"layout": SPEC.layout}, (torch.empty_like(q),))


def _attend(batch, k, v):
    """Several tokens a sequence, with every feature."""
    reference.fill_kv_cache(SPEC, k, v, *batch.caches, slot_mapping=batch.slots)
    heads = SPEC.num_q_heads
    q = rows("gaussian", 6, heads, SPEC.head_dim, seed=3).to(k)
    sinks, slopes = (rows("gaussian", heads, seed=s).abs().to(k.device) for s in (4, 5))
    starts = torch.tensor([0, 0, 1, 4, 6], dtype=torch.int32, device=k.device)
    tensors = {
        "q": q, **_caches(batch), **_table(batch), "cu_seqlens_q": starts, "sinks": sinks,
        "alibi_slopes": slopes, "lse": torch.empty(6, heads, device=k.device),
    }  # fmt: skip
    options = {"layout": SPEC.layout, "max_seqlen_q": 3, "window_left": 40, "kept_tokens": 2}
    return Case(paged_decode, tensors, {**options, "soft_cap": 5.0}, (torch.empty_like(q),))


def _mla(batch, k, v):
    reference.fill_kv_cache(LATENT, k, v, *batch.caches, slot_mapping=batch.slots)
    q, p = (
        rows("gaussian", len(batch.seq_lens), LATENT.num_q_heads, dim, seed=3).to(k)
        for dim in (LATENT.head_dim, LATENT.value_dim)
    )
    tensors = {"q_latent": q, "q_rope": p, **_caches(batch), **_table(batch)}
    options = {"sm_scale": 0.07, "policy": LATENT.format, "layout": LATENT.layout}
    return Case(mla_decode, tensors, options, (torch.empty_like(q),))


def _caches(batch):
    return dict(zip(CACHES, batch.caches, strict=True))


def _table(batch):
    return {"block_table": batch.block_table, "seq_lens": batch.seq_lens}


CASES = {
    "rotate": _rotate,
    "fill_slots": _fill_slots,
    "fill_table": _fill_table,
    "flatten": _flatten,
    "flatten_unrotated": _flatten_unrotated,
    "decode": _decode,
    "attend": _attend,
    "mla": _mla,
}
every_case = pytest.mark.parametrize("name", CASES)


def spec_of(name) -> CacheSpec:
    """The spec that a case is of."""
    return LATENT if name == "mla" else SPEC


def ensure(library, name, device) -> None:
    """Make sure of a case's library, where the device has one."""
    spec = spec_of(name)
    if device.type == "cuda" and name not in functions_on(spec, "cuda"):
        pytest.skip(f"GPUs have no kernel of {name}")
    library(spec, device)


def make_case(name, device) -> Case:
    spec = spec_of(name)
    batch = make_batch(spec, device, [0, 1, 63, 130])
    for tensor in batch.caches:
        tensor.zero_()  # a NaN would differ from itself
    k, v = (
        rows("gaussian", batch.tokens, spec.num_kv_heads, dim, seed=s)
        .to(device, getattr(torch, spec.dtype))
        for dim, s in ((spec.head_dim, 1), (spec.value_dim, 2))
    )  # fmt: skip
    return CASES[name](batch, k, v)


def assert_equal(got, want):
    assert len(got) == len(want)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("allocate", [False, True])
@every_case
def test_compiles_without_graph_break(library, device, name, allocate, dynamic):
    ensure(library, name, device)
    case = make_case(name, device)
    want = case.wanted()
    case.clear()
    torch._dynamo.reset()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got = compiled(case.tensors, None if allocate else case.out)
    assert_equal(case.results(got), want)


@every_case
def test_foreign_tensors(library, device, name):
    """Anything with __dlpack__ will do: on the CPU arrays of numpy."""
    ensure(library, name, device)
    case = make_case(name, device)
    want = case.wanted()
    case.clear()
    foreign = {key: Foreign.of(tensor) for key, tensor in case.tensors.items()}
    out = tuple(Foreign.of(tensor) for tensor in case.out)
    returned = case.run(foreign, out)
    if case.out:
        pair = returned if isinstance(returned, tuple) else (returned,)
        assert all(r is o for r, o in zip(pair, out, strict=True)), "out itself is returned"
    assert_equal(list(case.out) or case.results(None), want)


class Foreign:
    """A tensor of another library, of which only the protocol is known."""

    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def of(cls, tensor):
        return tensor.numpy() if tensor.device.type == "cpu" else cls(tensor)

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def registered_arguments(name, case):
    """Arguments of the op that a call goes to."""
    tensors, options = dict(case.tensors), (SPEC.layout, "k4v2", None, None)
    if name == "rotate":
        return [*tensors.values(), *case.out]
    window = [None] * 3
    if name == "decode":
        scale = SPEC.head_dim**-0.5
        return [*tensors.values(), *case.out, None, scale, None, *options, *window]
    if name == "mla":
        ending = (0.07, None, LATENT.layout, LATENT.format, None)
        return [*tensors.values(), *case.out, None, None, *ending]
    if name == "attend":
        extra = [tensors.pop(n) for n in ("cu_seqlens_q", "sinks", "alibi_slopes", "lse")]
        scale = SPEC.head_dim**-0.5
        first = [*tensors.values(), *case.out, None, scale, None, *options, *window]
        return [*first, extra[0], 3, 40, 2, 5.0, *extra[1:]]
    if name == "flatten":
        lens = tensors["seq_lens"]
        start_loc = (lens.cumsum(0) - lens).int()
        return [*tensors.values(), start_loc, *case.out, False, *options]
    return [*tensors.values(), *options, *(window if name == "fill_table" else ())]


OPS = ("rotate", "fill_slots", "fill_table", "flatten", "decode", "attend", "mla")


@pytest.mark.parametrize("name", OPS)
def test_is_registered_as_torch_wants_it(library, device, name):
    """Schema, mutated arguments, fake implementation and dispatch, with dynamic shapes too."""
    ensure(library, name, device)
    op = getattr(torch.ops.tq_tvm, name).default
    torch.library.opcheck(op, tuple(registered_arguments(name, make_case(name, device))))


def test_every_registered_op_is_checked():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tq_tvm::")]
    assert sorted(name.removeprefix("tq_tvm::") for name in names) == sorted(OPS)


@pytest.mark.gpu
@every_case
def test_cuda_graph_and_side_stream(library, name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    device = torch.device("cuda", torch.cuda.current_device())
    ensure(library, name, device)
    case = make_case(name, device)
    want = case.wanted()  # loads the library, which a capture must not
    case.clear()
    cleared = [t.clone() for t in case.results(case.out or None)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.run(out=case.out)
    torch.cuda.synchronize()
    assert_equal(case.results(case.out or None), want)
    case.clear()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            case.run(out=case.out)
    torch.cuda.synchronize()
    assert_equal(case.results(case.out or None), cleared)  # capture must not run the kernel
    for _ in range(2):
        case.clear()
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(case.results(case.out or None), want)
    # A replay reads what is in the tensors then.
    first = next(iter(case.tensors.values()))
    first.zero_()
    changed = case.wanted()
    case.clear()
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(case.results(case.out or None), changed)
    assert not all(torch.equal(a, b) for a, b in zip(changed, want, strict=True))
