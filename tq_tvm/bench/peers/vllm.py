"""vLLM: its Triton decode of ``turboquant_4bit_nc``, 4 bits of K and of V, filled by its store."""

from __future__ import annotations

import torch

from tq_tvm import reference
from tq_tvm.bench.baseline import Peer
from tq_tvm.bench.peers.inputs import DecodeInputs

__all__ = ["four_bit"]

_PRESET = "turboquant_4bit_nc"
_SPLITS = 32
"""What its attention backend takes by default, whatever the lengths."""

_STORE_TOKENS = 1 << 16
"""A store's tokens: it works on several float32 copies of them."""

_TOLERANCE = 0.25
"""Of the unquantised result: 4-bit K and V each leave a tenth of a Gaussian row as error."""


def four_bit(inputs: DecodeInputs) -> Peer:
    """Attention over pages that vLLM's own kernel has quantised."""
    import vllm
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.triton_utils import triton
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    spec, q, device = inputs.spec, inputs.q, inputs.q.device
    heads, dim = spec.num_q_heads, spec.head_dim
    config = TurboQuantConfig.from_cache_dtype(_PRESET, dim)
    centroids = get_centroids(dim, config.centroid_bits).to(device)
    levels = centroids.sort().values
    rotation = reference.hadamard_matrix(dim, device)
    packing = {
        "mse_bits": config.key_mse_bits,
        "key_packed_size": config.key_packed_size,
        "value_quant_bits": config.effective_value_quant_bits,
        "key_fp8": config.key_fp8,
    }
    pages = torch.zeros(
        (inputs.cache.num_pages, spec.page_size, spec.num_kv_heads, config.slot_size_aligned),
        dtype=torch.uint8,
        device=device,
    )
    k_rows, v_rows = (side.flatten(0, 1) for side in inputs.pages)
    slots = torch.arange(len(k_rows), dtype=torch.int32, device=device)
    for part in slots.split(_STORE_TOKENS):
        chosen = slice(int(part[0]), int(part[-1]) + 1)
        triton_turboquant_store(
            k_rows[chosen],
            v_rows[chosen],
            pages,
            part,
            rotation,
            (levels[:-1] + levels[1:]) / 2,
            **packing,
        )
    buffers = {
        "mid_o_buf": torch.empty((len(q), heads, _SPLITS, dim + 1), device=device),
        "output_buf": torch.empty_like(q),
        "lse_buf": torch.empty((len(q), heads), device=device),
    }

    def call() -> torch.Tensor:
        return triton_turboquant_decode_attention(
            query=q,
            kv_cache=pages,
            block_table=inputs.block_table,
            seq_lens=inputs.seq_lens,
            Pi=rotation,
            centroids=centroids,
            scale=dim**-0.5,
            norm_correction=config.norm_correction,
            PiT=rotation,
            max_num_kv_splits=_SPLITS,
            **packing,
            **buffers,
        )

    return Peer(
        call=call,
        bytes=inputs.traffic(config.slot_size_aligned),
        versions={"vllm": vllm.__version__, "triton": triton.__version__},
        rows=inputs.sample,
        wanted=[inputs.dense_attention(q.dtype)],
        tolerance=_TOLERANCE,
    )
