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
from tq_tvm.formats import K4V2

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


def test_decode_out_that_overlaps(arguments):
    storage = torch.zeros(B + 1, HQ, D, dtype=torch.float16)
    for q, out in (
        (storage[:B], storage[:B]),
        (storage[:B], storage[1:]),
        (storage[1:], storage[:B]),
    ):
        refuse(
            arguments, "paged_decode", ArgumentValueError, "out", "apart from q", q=q, out=out
        )  # fmt: skip


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


def test_flatten_out_that_overlaps(arguments):
    one = torch.zeros(68, HK, D).half()
    longer = torch.zeros(70, HK, D).half()
    fused = torch.zeros(68, 2 * HK + 1, D).half()
    for k_out, v_out in (
        (one, one),
        (longer[:-2], longer[2:]),
        (fused[:, :HK], fused[:, 1 : HK + 1]),
    ):
        refuse(
            arguments, "flatten_kv_cache", ArgumentValueError, "out[1]", "apart from out[0]",
            out=(k_out, v_out),
        )  # fmt: skip
    refuse(
        arguments, "flatten_kv_cache", ArgumentValueError, "out[0]", "a stride of 0 bytes",
        out=(one[:1].expand(68, HK, D), one),
    )  # fmt: skip


def test_rows_between_the_rows_of_another_do_not_overlap(arguments):
    fused = torch.zeros(68, 2 * HK, D).half()
    with pytest.raises(ArtifactNotFoundError):
        flatten_kv_cache(**arguments["flatten_kv_cache"], out=(fused[:, HK:], fused[:, :HK]))


def test_fill_caches_that_overlap(arguments):
    """Pages of 4 bytes a token and head for both, but the scales of V begin inside those of K."""
    buffer = torch.zeros(P, PS, HK, 4, dtype=torch.float16)
    flat = buffer.view(P, -1)
    k_meta = flat[:, : 2 * PS * HK].view(P, PS, HK, 2)
    v_meta = flat[:, PS * HK : 2 * PS * HK].view(P, PS, HK, 1)
    refuse(
        arguments, "fill_slots", ArgumentValueError, "v_meta", "apart from k_meta",
        k_meta=k_meta, v_meta=v_meta,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "name"), [(o, n) for o, n in EVERY_TENSOR if n not in ("k_cache", "v_cache")]
)
def test_negative_bit(arguments, operation, name):
    """The memory of such a view holds the values with the other sign."""
    wrong = torch._neg_view(arguments[operation][name])
    refuse(arguments, operation, ArgumentValueError, name, "negative bit", **{name: wrong})


@pytest.mark.parametrize("operation", ["hadamard_rotate", "paged_decode"])
def test_negative_bit_of_out(arguments, operation):
    wrong = torch._neg_view(torch.zeros_like(arguments[operation][ROWS[operation]]))
    refuse(arguments, operation, ArgumentValueError, "out", "negative bit", out=wrong)


@pytest.mark.parametrize(("operation", "name"), EVERY_TENSOR)
def test_sparse(arguments, operation, name):
    wrong = arguments[operation][name].to_sparse()
    refuse(arguments, operation, ArgumentValueError, name, "to_dense()", **{name: wrong})


@pytest.mark.parametrize("operation", CACHE_OPERATIONS)
def test_page_stride_of_more_than_31_bits(arguments, operation):
    good = {name: arguments[operation][name][:2] for name in TENSORS}
    inner = good["k_cache"][0].numel()
    storage = torch.empty(2**31 + inner, dtype=torch.uint8)  # of which nothing is touched
    wrong = storage.as_strided(good["k_cache"].shape, (2**31, *good["k_cache"].stride()[1:]))
    arguments[operation] |= good
    refuse(
        arguments, operation, ArgumentValueError, "k_cache", "below 2147483648 elements",
        k_cache=wrong,
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
    refuse(arguments, operation, ArgumentValueError, "layout", "'bshd' or", layout=["bshd"])
    for policy in (3, "k8v8", None):
        refuse(
            arguments, operation, UnsupportedSpecError, "policy", "'k4v2' (42)", repr(policy),
            policy=policy,
        )  # fmt: skip
    for policy in ("k4v2", 42, K4V2):
        with pytest.raises(ArtifactNotFoundError):
            CALLS[operation](**arguments[operation], policy=policy)


@pytest.mark.parametrize("dim", [32, 72, 8192])
def test_rotation_without_a_kernel(arguments, dim):
    rows = torch.zeros(T, dim, dtype=torch.float16)
    refuse(
        arguments, "hadamard_rotate", UnsupportedSpecError, "dim", "64, 80, 96, 112",
        str(dim), x=rows,
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [32, 72, 1024])
def test_head_dim_without_a_kernel(arguments, head_dim):
    q = torch.zeros(B, HQ, head_dim, dtype=torch.float16)
    refuse(arguments, "paged_decode", UnsupportedSpecError, "head_dim", str(head_dim), q=q)


def test_other_shapes_without_a_kernel(arguments):
    q = torch.zeros(B, HK + 1, D, dtype=torch.float16)
    refuse(arguments, "paged_decode", UnsupportedSpecError, "num_q_heads", "multiple", q=q)
    pages = torch.zeros(P, 24, HK, D // 2, dtype=torch.uint8)
    refuse(arguments, "paged_decode", UnsupportedSpecError, "page_size", "24", k_cache=pages)


@pytest.mark.parametrize("value", ["a", "2", [1.0]])
def test_scale_is_a_number(arguments, value):
    refuse(
        arguments, "paged_decode", ArgumentTypeError, "sm_scale", "a number", repr(value),
        sm_scale=value,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "name"), [("paged_decode", "max_seq_len"), ("flatten_kv_cache", "out_tokens")]
)
def test_sizes_are_integers(arguments, operation, name):
    for value in (64.0, "64"):
        refuse(
            arguments, operation, ArgumentTypeError, name, "an integer", repr(value),
            **{name: value},
        )  # fmt: skip
    refuse(arguments, operation, ArgumentValueError, name, "at least 0", **{name: -1})


@pytest.mark.parametrize("count", [1, 3])
def test_flatten_out_is_a_pair(arguments, count):
    out = tuple(torch.zeros(count, 68, HK, D).half())
    refuse(
        arguments, "flatten_kv_cache", ArgumentValueError, "out", "a pair", f"{count} of them",
        out=out,
    )  # fmt: skip


def test_cache_of_wrong_arguments():
    spec = CacheSpec(D, HQ, HK)
    with pytest.raises(ArgumentTypeError, match="PagedKVCache: spec must be a CacheSpec, got str"):
        PagedKVCache(spec.label, 4)
    with pytest.raises(ArgumentTypeError, match=r"num_pages must be an integer, got 4\.0"):
        PagedKVCache(spec, 4.0)
    with pytest.raises(ArgumentValueError, match="num_pages must be at least 0, got -1"):
        PagedKVCache(spec, -1)


def _missing_device():
    return f"cuda:{torch.cuda.device_count()}"


def test_device_that_is_not_there():
    spec = CacheSpec(D, HQ, HK)
    for device in ("foo", _missing_device()):
        with pytest.raises(ArgumentValueError, match=f"PagedKVCache: device must be .*{device}"):
            PagedKVCache(spec, 4, device)
        with pytest.raises(ArgumentValueError, match=f"workspace_size: device must .*{device}"):
            paged_decode_workspace_size(spec, 1, 64, device)


def test_workspace_size_of_nothing():
    spec = CacheSpec(D, HQ, HK)
    with pytest.raises(ArgumentValueError, match="batch must be at least 0, got -1"):
        paged_decode_workspace_size(spec, -1, 64, "cpu")
    with pytest.raises(ArgumentTypeError, match="max_context must be an integer, got '64'"):
        paged_decode_workspace_size(spec, 1, "64", "cpu")
    with pytest.raises(ArtifactNotFoundError, match="must serve decode"):
        paged_decode_workspace_size(spec, 1, 64, "cpu")
