"""Which variant a problem takes: the nearest in size and, where they have one, in batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tq_tvm import CacheSpec
from tq_tvm.artifacts.load import LoadedFunction, LoadedVariant
from tq_tvm.artifacts.manifest import Manifest
from tq_tvm.targets import get_target

SPEC = CacheSpec(64, 8, 2)


def function_of(*places):
    manifest = Manifest("none", get_target("x86_64"), {}, {}, {}, [])
    variants = (
        LoadedVariant(lambda *_: None, str(place), place[0], False, None, None, {}, {}, place[1])
        for place in sorted(places, key=lambda place: place[0])
    )
    return LoadedFunction("decode", SPEC, tuple(variants), Path(), manifest, 1)


@pytest.mark.parametrize(("size", "found"), [(1, 10), (99, 10), (101, 1000), (10**9, 1000)])
@pytest.mark.parametrize("batch", [None, 1, 64])
def test_without_batches_size_decides(size, found, batch):
    assert function_of((10, None), (1000, None)).nearest(size, batch).size == found


@pytest.mark.parametrize(
    ("batch", "context", "found"),
    [
        (1, 131072, (1, 131072)),
        (256, 512, (256, 512)),
        (512, 256, (256, 512)),
        (2, 65536, (1, 131072)),
        (64, 8192, (64, 8192)),
        (16, 32768, (64, 8192)),
        (64, 128, (1, 8192)),
        (8, 2048, (1, 8192)),
        (1024, 64, (64, 1024)),
    ],
)
def test_of_one_size_batch_decides(batch, context, found):
    """Those of `tq_tvm.tuning.workloads`, but for the shortest."""
    places = [(64, 8192), (1, 131072), (64, 1024), (256, 512), (1, 8192)]
    function = function_of(*((b * c, b) for b, c in places))
    nearest = function.nearest(batch * context, batch)
    assert (nearest.batch, nearest.size // nearest.batch) == found


def test_without_a_batch_size_decides():
    function = function_of((100, 1), (10_000, 64))
    assert function.nearest(200).size == 100
