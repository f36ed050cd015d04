"""``tuning.inputs``: the check that stands between a wrong kernel and the tuning log."""

from __future__ import annotations

import pytest
import torch

from tq_tvm import reference
from tq_tvm.served import functions_on
from tq_tvm.spec import CacheSpec
from tq_tvm.tuning.inputs import Case, WrongResultError, make_case
from tq_tvm.tuning.workloads import Workload

SPECS = [
    CacheSpec(64, 4, 2, 16, "float32", "bshd"),
    CacheSpec(128, 8, 2, 32, "bfloat16", "bhsd"),
]
CPU = torch.device("cpu")
LAUNCH = {"ctas_per_sm": 1, "split_tokens": 16, "block_tokens": 4}
OUTPUTS = {
    "rotate": [1],
    "fill_slots": [2, 3, 4, 5],
    "fill_table": [2, 3, 4, 5],
    "flatten": [7, 8],
    "flatten_unrotated": [7, 8],
    "decode": [8],
    "attend": [11, 12],
}
"""Positions of the arguments that a function writes."""


def workload(function, spec) -> Workload:
    pages = {"batch": 2, "pages": 8, "table_width": 3}
    tokens = pages["batch"] * pages["table_width"] * spec.page_size
    shape = {
        "rotate": {"n": 9},
        "fill_slots": {"tokens": 20, "pages": 8},
        "decode": pages,
        "attend": {"tokens": 6, **pages},
    }.get(function, {"tokens": tokens, **pages})
    return Workload(function, spec, shape, "a test")


def compute(function, spec, arguments) -> None:
    """What a right kernel does with the arguments, by the reference."""
    if function == "rotate":
        arguments[1].copy_(reference.hadamard_rotate(arguments[0]))
    elif function == "fill_slots":
        reference.fill_kv_cache(spec, *arguments[:6], slot_mapping=arguments[6])
    elif function == "fill_table":
        table, lengths, starts = arguments[6:]
        reference.fill_kv_cache(
            spec, *arguments[:6], block_table=table, seq_lens=lengths, q_start_loc=starts
        )
    elif function == "decode":
        arguments[8].copy_(reference.paged_decode(spec, *arguments[:7], sm_scale=arguments[10]))
    elif function == "attend":
        results = reference.paged_attend(
            spec, *arguments[:7], cu_seqlens_q=arguments[7], sm_scale=arguments[14]
        )
        for out, rows in zip(arguments[11:13], results, strict=True):
            out.copy_(rows)
    else:
        rows = reference.flatten_kv_cache(
            spec, *arguments[:6], rotate_back=function == "flatten_unrotated"
        )
        for out, row in zip(arguments[7:], rows, strict=True):
            out.copy_(row)


@pytest.fixture(params=SPECS, ids=lambda s: s.label)
def spec(request) -> CacheSpec:
    return request.param


@pytest.fixture(params=functions_on(SPECS[0], "llvm"))
def function(request) -> str:
    return request.param


def right_case(function, spec) -> tuple[Case, list]:
    """A case whose outputs hold the right results."""
    case = make_case(workload(function, spec), CPU)
    arguments = case.arguments(LAUNCH)
    case.poison()
    compute(function, spec, arguments)
    return case, arguments


def test_accepts_right_results(function, spec):
    case, _ = right_case(function, spec)
    assert 0 <= case.check() < 1e-2


def test_rejects_what_was_never_written(function, spec):
    case, _ = right_case(function, spec)
    case.poison()
    with pytest.raises(WrongResultError):
        case.check()


def every_output(indices=OUTPUTS):
    return [
        pytest.param(function, index, id=f"{function}-{index}")
        for function in indices
        for index in indices[function]
    ]


def written(function, spec, arguments, index) -> torch.Tensor:
    """Flat positions of an output that the kernel writes: of a cache, those of new rows."""
    case, poisoned = right_case(function, spec)
    case.poison()
    right = arguments[index].flatten()
    return ((right != poisoned[index].flatten()) & ~right.isnan()).nonzero()[:, 0]


@pytest.mark.parametrize(("function", "index"), every_output())
def test_rejects_one_output_that_is_shifted(function, index, spec):
    """Right values in a wrong place."""
    case, arguments = right_case(function, spec)
    arguments[index].copy_(arguments[index].roll(1, dims=-1 if function != "rotate" else 0))
    if arguments[index].shape[-1] == 1:  # the only value of its row: move the rows
        arguments[index].copy_(arguments[index].flatten().roll(1).view_as(arguments[index]))
    with pytest.raises(WrongResultError):
        case.check()


@pytest.mark.parametrize(("function", "index"), every_output())
def test_rejects_an_output_that_is_slightly_off(function, index, spec):
    """One byte of codes, or scales and rows that are one percent too large."""
    case, arguments = right_case(function, spec)
    out = arguments[index]
    if out.dtype == torch.uint8:
        out.view(-1)[written(function, spec, arguments, index)[0]] ^= 0x11
    else:
        out.mul_(1.01)
    with pytest.raises(WrongResultError):
        case.check()


# Of the caches, codes are always finite.
@pytest.mark.parametrize(
    ("function", "index"), every_output({**OUTPUTS, "fill_slots": [4, 5], "fill_table": [4, 5]})
)
def test_rejects_one_value_that_is_not_finite(function, index, spec):
    case, arguments = right_case(function, spec)
    out = arguments[index]
    out.view(-1)[written(function, spec, arguments, index)[-1]] = float("nan")
    with pytest.raises(WrongResultError):
        case.check()


def test_a_code_may_differ_at_a_tie_only():
    """Where a value lies on a boundary two float32 programs may decide differently."""
    spec = SPECS[0]
    case, arguments = right_case("fill_slots", spec)
    v, v_cache, slots = arguments[1], arguments[3], arguments[6]
    v[0] = 0
    reference.fill_kv_cache(spec, *arguments[:6], slot_mapping=slots)
    on_boundary, elsewhere = (v_cache.view(-1, *v_cache.shape[2:])[slot] for slot in slots[:2])
    assert on_boundary.unique().tolist() == [0b01010101]
    on_boundary.fill_(0b10101010)
    case.check()
    elsewhere.view(-1)[0] ^= 0b11
    with pytest.raises(WrongResultError, match="codes of mse2"):
        case.check()


def test_seeds_make_inputs(function, spec):
    """The same seed the same inputs, another seed others."""
    one, same, other = (
        make_case(workload(function, spec), CPU, seed).arguments(LAUNCH)[0] for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_page_tables_are_permutations(spec):
    arguments = make_case(workload("decode", spec), CPU).arguments(LAUNCH)
    table, lengths = arguments[5], arguments[6]
    assert len(table.unique()) == table.numel()
    assert int(table.max()) < 8 and int(table.min()) >= 0
    assert lengths.tolist() == [3 * spec.page_size] * 2


def test_decode_has_room_for_its_splits(spec):
    for launch in (LAUNCH, {**LAUNCH, "ctas_per_sm": 8}):
        arguments = make_case(workload("decode", spec), CPU).arguments(launch)
        workspace, splits = arguments[7], arguments[9]
        assert workspace.numel() == 2 * spec.num_q_heads * splits * (spec.head_dim + 2)
