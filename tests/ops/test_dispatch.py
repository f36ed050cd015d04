"""Which kernel a GPU's `paged_decode` of one query a sequence asks for, without a GPU."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tq_tvm import CacheSpec, paged_decode

CALLS = importlib.import_module("tq_tvm.ops.decode")


@pytest.fixture
def asked(monkeypatch):
    """Names of what was called: ``attend``, or the kernel of ``_decode``."""
    names = []
    variant = SimpleNamespace(call=lambda *args: names.append("_decode"))

    def checked(tensors, layout, *rest):
        """Tensors of shapes alone have no addresses to check."""
        q, k_cache = tensors[:2]
        heads = k_cache.shape[2 if layout == "bshd" else 1]
        return CacheSpec(q.shape[2], q.shape[1], heads, 64, "bfloat16", layout), tensors

    for name, does in {
        "_loaded": {},
        "_check_arguments": checked,
        "load": lambda *args: None,
        "choose_launch": lambda *args: (variant, 1, 0),
        "attend": lambda *args: names.append("attend"),
    }.items():
        monkeypatch.setattr(CALLS, name, does)
    return names


def call(heads, kv_heads, pages, *, layout="bshd", dim=128, **options):
    """On tensors of a GPU that have shapes alone: k4v2, pages of 64."""
    rows = (9, 64, kv_heads) if layout == "bshd" else (9, kv_heads, 64)

    def new(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    CALLS._loaded.clear()
    with FakeTensorMode():
        codes = [new(*rows, width, dtype=torch.uint8) for width in (dim // 2, dim // 4)]
        metas = [new(*rows, count) for count in (2, 1)]
        table, lengths = new(2, pages, dtype=torch.int32), new(2, dtype=torch.int32)
        paged_decode(
            new(2, heads, dim), *codes, *metas, table, lengths, layout=layout, policy="k4v2",
            **options,
        )  # fmt: skip


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(
    ("heads", "pages", "name"),
    [
        (32, 128, "_decode"),
        (64, 128, "_decode"),
        (72, 128, "attend"),
        (72, 32, "attend"),
        (72, 31, "_decode"),
    ],
)
def test_many_heads_of_long_contexts_are_attended_to(asked, heads, pages, name, layout):
    call(heads, 8, pages, layout=layout)
    assert asked == [name]


def test_a_bound_of_the_lengths_counts(asked):
    call(72, 8, 128, max_seq_len=2047)
    call(72, 8, 128, max_seq_len=2048)
    assert asked == ["_decode", "attend"]


def test_rows_of_512_values_are_decoded(asked):
    """``attend`` makes them in shared memory."""
    call(32, 2, 128, dim=512)
    assert asked == ["_decode"]
