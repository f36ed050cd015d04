"""Bad input: every error names the operation, the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from tq_tvm import (
    ArgumentTypeError,
    ArgumentValueError,
    ArtifactNotFoundError,
    CacheSpec,
    PagedKVCache,
    UnsupportedSpecError,
    fill_kv_cache,
    flatten_kv_cache,
    hadamard_rotate,
    ops,
    paged_decode,
    paged_decode_workspace_size,
)

D, HQ, HK, PS, P, B, T = 64, 4, 2, 16, 6, 2, 5
TENSORS = ("k_cache", "v_cache", "k_meta", "v_meta")


@pytest.fixture(autouse=True)
def no_library(monkeypatch, tmp_path):
    """Arguments are checked before a library is looked for, so none is needed here."""
    monkeypatch.setenv("TQ_TVM_ARTIFACT_DIR", str(tmp_path))
    ops.clear_cache()
    yield
    ops.clear_cache()


def index(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def cache():
    spec = CacheSpec(D, HQ, HK, page_size=PS, dtype="float16")
    cache = PagedKVCache(spec, P)
    for tensor in cache.tensors():
        tensor.copy_(torch.randint(0, 100, tensor.shape))
    return cache


@pytest.fixture
def arguments(cache):
    """Valid arguments of every operation, by operation and name."""
    tensors = dict(zip(TENSORS, cache.tensors(), strict=True))
    k, v = torch.randn(2, T, HK, D).half()
    table = {"block_table": index([0, 1, 2], [3, 4, 5]), "seq_lens": index(20, 48)}
    return {
        "hadamard_rotate": {"x": torch.randn(T, D).half()},
        "fill_slots": {"k": k, "v": v, **tensors, "slot_mapping": torch.arange(T)},
        "fill_table": {"k": k, "v": v, **tensors, **table, "q_start_loc": index(0, 2, 5)},
        "flatten_kv_cache": {**tensors, **table, "out_tokens": 68},
        "paged_decode": {"q": torch.randn(B, HQ, D).half(), **tensors, **table},
    }


CALLS = {
    "hadamard_rotate": hadamard_rotate,
    "fill_slots": fill_kv_cache,
    "fill_table": fill_kv_cache,
    "flatten_kv_cache": flatten_kv_cache,
    "paged_decode": paged_decode,
}
CACHE_OPERATIONS = [name for name in CALLS if name != "hadamard_rotate"]
ROWS = {"hadamard_rotate": "x", "fill_slots": "k", "fill_table": "v", "paged_decode": "q"}
EVERY_TENSOR = [
    (operation, name)
    for operation, names in {
        "hadamard_rotate": ("x",),
        "fill_slots": ("k", "v", *TENSORS, "slot_mapping"),
        "fill_table": ("k", "v", *TENSORS, "block_table", "seq_lens", "q_start_loc"),
        "flatten_kv_cache": (*TENSORS, "block_table", "seq_lens"),
        "paged_decode": ("q", *TENSORS, "block_table", "seq_lens"),
    }.items()
    for name in names
]


def refuse(arguments, operation, error, name, *parts, **changes):
    """The call fails with an error about ``name``, and no cache tensor has changed."""
    given = arguments[operation]
    before = [given[t].clone() for t in TENSORS if t in given]
    with pytest.raises(error) as caught:
        CALLS[operation](**(given | changes))
    message = str(caught.value)
    public = CALLS[operation].__name__
    assert message.startswith(f"{public}: {name}"), message
    for part in (" must be ", "got ", *parts):
        assert part in message, message
    after = [given[t] for t in TENSORS if t in given]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("operation", CALLS)
def test_valid_arguments_only_lack_a_library(arguments, operation):
    with pytest.raises(ArtifactNotFoundError, match=r"must serve .* run `tq-tvm build --target"):
        CALLS[operation](**arguments[operation])


@pytest.mark.parametrize(("operation", "name"), EVERY_TENSOR)
def test_dtype(arguments, operation, name):
    wrong = torch.empty(arguments[operation][name].shape, dtype=torch.float64)
    # The metas of flatten say which dtype the model has.
    refuse(arguments, operation, ArgumentTypeError, name, "float64", **{name: wrong})


@pytest.mark.parametrize(("operation", "name"), EVERY_TENSOR)
def test_device(arguments, operation, name):
    wrong = arguments[operation][name].to("meta")
    # The first argument says where the others have to be.
    refuse(arguments, operation, ArgumentValueError, "", "meta", **{name: wrong})


@pytest.mark.parametrize(("operation", "name"), EVERY_TENSOR)
def test_type(arguments, operation, name):
    refuse(arguments, operation, ArgumentTypeError, name, "__dlpack__", "list", **{name: [1.0]})


@pytest.mark.parametrize(
    ("operation", "name"), [pair for pair in EVERY_TENSOR if pair[0] != "hadamard_rotate"]
)
def test_rank(arguments, operation, name):
    wrong = arguments[operation][name][None]
    refuse(arguments, operation, ArgumentValueError, name, "of shape [", **{name: wrong})


@pytest.mark.parametrize(
    ("operation", "name"), [pair for pair in EVERY_TENSOR if pair[0] != "hadamard_rotate"]
)
def test_scalar_instead_of_tensor(arguments, operation, name):
    wrong = arguments[operation][name].flatten()[0]
    refuse(arguments, operation, ArgumentValueError, name, "of shape [", **{name: wrong})


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("fill_slots", "v"),
        ("fill_slots", "slot_mapping"),
        ("fill_table", "q_start_loc"),
        ("flatten_kv_cache", "seq_lens"),
        ("flatten_kv_cache", "v_cache"),
        ("paged_decode", "block_table"),
        ("paged_decode", "v_meta"),
    ],
)
def test_shape(arguments, operation, name):
    wrong = arguments[operation][name][:-1]
    refuse(arguments, operation, ArgumentValueError, name, "of shape [", **{name: wrong})


@pytest.mark.parametrize(("operation", "name"), EVERY_TENSOR)
def test_last_axis_not_contiguous(arguments, operation, name):
    good = arguments[operation][name]
    if good.shape[-1] == 1:
        pytest.skip("an axis of size 1 has no stride that matters")
    wrong = torch.zeros(*good.shape, 2, dtype=good.dtype)[..., 0]
    wrong.copy_(good)
    refuse(arguments, operation, ArgumentValueError, name, "contiguous", **{name: wrong})


@pytest.mark.parametrize(
    ("operation", "name"),
    [(operation, t) for operation in CACHE_OPERATIONS for t in TENSORS],
)
def test_page_not_compact(arguments, operation, name):
    good = arguments[operation][name]
    wide = torch.zeros(P, PS, 2 * HK, good.shape[-1], dtype=good.dtype)
    wrong = wide[:, :, :HK]
    refuse(
        arguments, operation, ArgumentValueError, name, "contiguous inside axis 0", **{name: wrong}
    )


@pytest.mark.parametrize(
    ("operation", "name"),
    [*ROWS.items(), ("fill_slots", "k_cache"), ("flatten_kv_cache", "k_meta")],
)
def test_misaligned(arguments, operation, name):
    good = arguments[operation][name]
    wrong = torch.zeros(good.numel() + 1, dtype=good.dtype)[1:].view(good.shape)
    refuse(arguments, operation, ArgumentValueError, name, "aligned to", "0x", **{name: wrong})


@pytest.mark.parametrize(("operation", "name"), [("fill_slots", "k"), ("paged_decode", "k_cache")])
def test_misaligned_stride(arguments, operation, name):
    good = arguments[operation][name]
    inner = good[0].numel()
    storage = torch.zeros(good.shape[0] * (inner + 1), dtype=good.dtype)
    wrong = storage.as_strided(good.shape, (inner + 1, *good.stride()[1:]))
    refuse(arguments, operation, ArgumentValueError, name, "a stride of", **{name: wrong})


@pytest.mark.parametrize("operation", ["hadamard_rotate", "paged_decode"])
def test_out(arguments, operation):
    good = arguments[operation][ROWS[operation]]
    refuse(arguments, operation, ArgumentValueError, "out", "of shape", out=good[1:].clone())
    refuse(arguments, operation, ArgumentTypeError, "out", "bfloat16", out=good.bfloat16())


def test_rotate_out_that_overlaps():
    rows = torch.zeros(T + 1, D, dtype=torch.float16)
    with pytest.raises(ArgumentValueError, match="out must be x itself or apart from it"):
        hadamard_rotate(rows[:-1], out=rows[1:])


def test_flatten_out(arguments):
    k_out, v_out = torch.zeros(2, 68, HK, D).half()
    refuse(
        arguments, "flatten_kv_cache", ArgumentValueError, "out[1]", "[N, HK, D]",
        out=(k_out, v_out[:, :1]),
    )  # fmt: skip
    refuse(
        arguments, "flatten_kv_cache", ArgumentValueError, "out[0]", "out_tokens = 68",
        out=(k_out[1:], v_out[1:]),
    )  # fmt: skip


@pytest.mark.parametrize("addressing", [{}, {"block_table": index([0])}, {"both": True}])
def test_fill_addressing(arguments, addressing):
    given = dict(arguments["fill_table"])
    if addressing.pop("both", False):
        given["slot_mapping"] = torch.arange(T)
    else:
        given |= dict.fromkeys(("block_table", "seq_lens", "q_start_loc")) | addressing
    with pytest.raises(ArgumentValueError, match="addressing must be slot_mapping alone, or"):
        fill_kv_cache(**given)


@pytest.mark.parametrize("slot", [P * PS, 2**40])
def test_slot_out_of_range(arguments, slot):
    slots = torch.arange(T)
    slots[-1] = slot
    refuse(
        arguments, "fill_slots", ArgumentValueError, "slot_mapping", f"P * PS = {P * PS}",
        str(slot), slot_mapping=slots,
    )  # fmt: skip


@pytest.mark.parametrize("operation", ["fill_table", "flatten_kv_cache", "paged_decode"])
@pytest.mark.parametrize("page", [-1, P])
def test_page_out_of_range(arguments, operation, page):
    table = index([0, 1, 99], [3, 4, page])
    refuse(
        arguments, operation, ArgumentValueError, "block_table[1, 2]", f"got {page}",
        block_table=table,
    )  # fmt: skip


@pytest.mark.parametrize("operation", ["fill_table", "flatten_kv_cache", "paged_decode"])
def test_page_beyond_the_length_may_be_anything(arguments, operation):
    table = index([0, 1, -1], [3, 4, 5])
    with pytest.raises(ArtifactNotFoundError):
        CALLS[operation](**arguments[operation] | {"block_table": table})


@pytest.mark.parametrize("operation", ["fill_table", "flatten_kv_cache", "paged_decode"])
@pytest.mark.parametrize("length", [-1, 3 * PS + 1])
def test_length_out_of_range(arguments, operation, length):
    refuse(
        arguments, operation, ArgumentValueError, "seq_lens", f"MB * PS = {3 * PS}",
        f"got {length}", seq_lens=index(20, length),
    )  # fmt: skip


@pytest.mark.parametrize("starts", [(1, 2, 5), (0, 3, 2), (0, 2, T + 1)])
def test_query_starts(arguments, starts):
    refuse(
        arguments, "fill_table", ArgumentValueError, "q_start_loc", "cumulative",
        q_start_loc=index(*starts),
    )  # fmt: skip


def test_flatten_rows(arguments):
    refuse(
        arguments, "flatten_kv_cache", ArgumentValueError, "out_tokens", "sum(seq_lens) = 68",
        out_tokens=67,
    )  # fmt: skip
    refuse(arguments, "flatten_kv_cache", ArgumentValueError, "out_tokens", out_tokens=-1)
    refuse(
        arguments, "flatten_kv_cache", ArgumentValueError, "start_loc", "[0, 20]",
        start_loc=index(0, 21),
    )  # fmt: skip


@pytest.mark.parametrize("operation", CACHE_OPERATIONS)
def test_layout_and_policy(arguments, operation):
    refuse(arguments, operation, ArgumentValueError, "layout", "'bshd' or 'bhsd'", layout="bsdh")
    refuse(arguments, operation, UnsupportedSpecError, "policy", "k4v2", policy=8)


@pytest.mark.parametrize("head_dim", [32, 96, 512])
def test_head_dim_without_a_kernel(arguments, head_dim):
    rows = torch.zeros(T, head_dim, dtype=torch.float16)
    refuse(
        arguments, "hadamard_rotate", UnsupportedSpecError, "head_dim", "64, 128, 256",
        str(head_dim), x=rows,
    )  # fmt: skip
    q = torch.zeros(B, HQ, head_dim, dtype=torch.float16)
    refuse(arguments, "paged_decode", UnsupportedSpecError, "head_dim", str(head_dim), q=q)


def test_other_shapes_without_a_kernel(arguments):
    q = torch.zeros(B, HK + 1, D, dtype=torch.float16)
    refuse(arguments, "paged_decode", UnsupportedSpecError, "num_q_heads", "multiple", q=q)
    pages = torch.zeros(P, 24, HK, D // 2, dtype=torch.uint8)
    refuse(arguments, "paged_decode", UnsupportedSpecError, "page_size", "24", k_cache=pages)


def test_workspace_size_of_nothing():
    spec = CacheSpec(D, HQ, HK)
    with pytest.raises(ArgumentValueError, match="batch must be at least 0, got -1"):
        paged_decode_workspace_size(spec, -1, 64, "cpu")
    with pytest.raises(ArtifactNotFoundError, match="must serve decode"):
        paged_decode_workspace_size(spec, 1, 64, "cpu")
