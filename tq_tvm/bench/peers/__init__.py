"""Other programs' kernels on the bench's sequences: one module a program, each imported if it can.

None of them is a dependency. A function of these modules imports its program, brings the inputs
into that program's form and returns a `tq_tvm.bench.baseline.Peer`; what it raises is the reason
why the program is absent from a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from tq_tvm.bench.baseline import Baseline, Peer, checked
from tq_tvm.bench.peers import fast_hadamard, flash_mla, flashinfer, lmdeploy, vllm
from tq_tvm.bench.peers.inputs import DecodeInputs, LatentInputs

__all__ = [
    "DECODE",
    "MLA",
    "ROTATE",
    "DecodeInputs",
    "LatentInputs",
    "decode_peers",
    "mla_peers",
    "rotate_peers",
]

DECODE: dict[str, Callable[[DecodeInputs], Peer]] = {
    "FlashInfer": flashinfer.model_dtype,
    "FlashInfer fp8": flashinfer.fp8,
    "lmdeploy K4V2": lmdeploy.k4v2,
    "vLLM 4bit_nc": vllm.four_bit,
}
MLA: dict[str, Callable[[LatentInputs], Peer]] = {"FlashMLA": flash_mla.dense}
ROTATE: dict[str, Callable[[torch.Tensor], Peer]] = {
    "fast_hadamard_transform": fast_hadamard.rotate,
}


def decode_peers(inputs: DecodeInputs) -> dict[str, Callable[[], Baseline]]:
    """What makes and checks each peer of ``decode``, by its name."""
    return {name: functools.partial(_make, function, inputs) for name, function in DECODE.items()}


def mla_peers(inputs: LatentInputs) -> dict[str, Callable[[], Baseline]]:
    """What makes and checks each peer of ``mla``, by its name."""
    return {name: functools.partial(_make, function, inputs) for name, function in MLA.items()}


def rotate_peers(x: torch.Tensor) -> dict[str, Callable[[], Baseline]]:
    """What makes and checks each peer of ``rotate`` on ``x`` ``[rows, D]``, by its name."""
    return {name: functools.partial(_make, function, x) for name, function in ROTATE.items()}


def _make(function: Callable[..., Peer], inputs: object) -> Baseline:
    return checked(function(inputs))
