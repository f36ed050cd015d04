"""FlashInfer: paged decode over dense pages, in the model's dtype and in fp8 (e4m3)."""

from __future__ import annotations

import torch

from tq_tvm.bench.baseline import Peer
from tq_tvm.bench.peers.inputs import DecodeInputs

__all__ = ["fp8", "model_dtype"]

_WORKSPACE_BYTES = 512 << 20
"""For the partial results of many sequences and heads; the 128 MiB of its examples may not do."""

_TENSOR_CORE_GROUP = 4
"""GQA groups of this size on run on tensor cores, which it advises for large groups."""

_TOLERANCE = 0.05


def model_dtype(inputs: DecodeInputs) -> Peer:
    """Pages in the dtype of the queries."""
    return _peer(inputs, inputs.q.dtype)


def fp8(inputs: DecodeInputs) -> Peer:
    """Pages in float8_e4m3fn, queries in the model's dtype."""
    return _peer(inputs, torch.float8_e4m3fn)


def _peer(inputs: DecodeInputs, dtype: torch.dtype) -> Peer:
    import flashinfer

    spec, q = inputs.spec, inputs.q
    k_pages, v_pages = (side.to(dtype) for side in inputs.pages)
    used = (inputs.seq_lens + spec.page_size - 1) // spec.page_size
    starts = torch.zeros(len(used) + 1, dtype=torch.int32, device=q.device)
    starts[1:] = used.cumsum(0)
    column = torch.arange(inputs.block_table.shape[1], device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device),
        "NHD",
        use_tensor_cores=spec.group_size >= _TENSOR_CORE_GROUP,
    )
    wrapper.plan(
        starts,
        inputs.block_table[column < used[:, None]],
        (inputs.seq_lens - 1) % spec.page_size + 1,
        spec.num_q_heads,
        spec.num_kv_heads,
        spec.head_dim,
        spec.page_size,
        q_data_type=q.dtype,
        kv_data_type=dtype,
    )
    out = torch.empty_like(q)
    return Peer(
        call=lambda: wrapper.run(q, (k_pages, v_pages), out=out),
        bytes=inputs.traffic(2 * spec.head_dim * dtype.itemsize),
        versions={"flashinfer": flashinfer.__version__},
        rows=inputs.sample,
        wanted=[inputs.dense_attention(dtype)],
        tolerance=_TOLERANCE,
    )
