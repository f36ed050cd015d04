"""``reference.packing``: which value sits in which bits of which byte."""

from __future__ import annotations

import pytest
import torch

from tq_tvm import reference
from tq_tvm.spec import HEAD_DIMS


def codes(bits, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_round_trip(head_dim, bits):
    values = codes(bits, 3, 5, head_dim)
    packed = reference.pack_codes(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 5, head_dim * bits // 8)
    assert torch.equal(reference.unpack_codes(packed, bits), values)


@pytest.mark.parametrize("bits", [2, 4])
def test_every_byte_survives_unpacking(bits):
    packed = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(reference.pack_codes(reference.unpack_codes(packed, bits), bits), packed)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bit_positions(head_dim):
    """nibble[j] | nibble[j + D/2] << 4, and the four quarters of a row of 2-bit codes."""
    half, quarter = head_dim // 2, head_dim // 4
    four, two = codes(4, head_dim).tolist(), codes(2, head_dim, seed=1).tolist()
    assert reference.pack_codes(torch.tensor(four), 4).tolist() == [
        four[j] + 16 * four[j + half] for j in range(half)
    ]
    assert reference.pack_codes(torch.tensor(two), 2).tolist() == [
        sum(4**i * two[j + i * quarter] for i in range(4)) for j in range(quarter)
    ]
