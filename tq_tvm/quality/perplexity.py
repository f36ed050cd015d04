"""Perplexity of a language model whose cache is in some format, decoding token by token."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tq_tvm.ops import PagedKVCache
from tq_tvm.quality.language_model import Decoder, causal
from tq_tvm.spec import CacheFormat, CacheSpec, get_format

__all__ = ["held_out_windows", "keys_of", "negative_log_likelihoods"]


def held_out_windows(text: torch.Tensor, count: int, context: int) -> torch.Tensor:
    """``count`` windows ``[count, context + 1]`` at equal distances in ``text``."""
    step = (len(text) - context - 1) // count
    starts = torch.arange(count) * step
    return text[starts[:, None] + torch.arange(context + 1)]


@torch.inference_mode()
def keys_of(model: Decoder, windows: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """``count`` keys ``[count, D]`` of any layer, head and position, as a cache would get them."""
    device = next(model.parameters()).device
    kept: list[torch.Tensor] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kept.append(k.flatten(0, -2).cpu())
        return causal(layer, q, k, v)

    tokens = windows[:, :-1].to(device)
    model(tokens, torch.arange(tokens.shape[1], device=device), attend)
    rows = torch.cat(kept)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return rows[chosen].to(torch.bfloat16)


@torch.inference_mode()
def negative_log_likelihoods(
    model: Decoder, windows: torch.Tensor, format: CacheFormat | str | int
) -> torch.Tensor:
    """Nats of every next token ``[sequences, context]``, all rows read from the packed cache.

    Each step appends one token of every sequence to the cache of each layer, and attends over it
    by the package's own kernels; nothing is kept unquantised.

    Parameters
    ----------
    model
        On the device whose kernels are to run.
    windows
        ``[S, context + 1]``, tokens.
    format
        Of every layer's cache.
    """
    config, device = model.config, next(model.parameters()).device
    windows = windows.to(device)
    sequences, context = windows.shape[0], windows.shape[1] - 1
    spec = CacheSpec(
        head_dim=config.head_dim,
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        format=get_format(format).name,
    )
    pages = -(-context // spec.page_size)
    cache = PagedKVCache(
        spec, sequences * pages, device, formats=[get_format(format)] * config.layers
    )
    table = torch.arange(sequences * pages, device=device, dtype=torch.int32).view(sequences, -1)
    first = table[:, 0].long() * spec.page_size
    losses = torch.empty(sequences, context)
    for step in range(context):
        slots = first + step
        lens = torch.full((sequences,), step + 1, dtype=torch.int32, device=device)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (rows[:, 0].to(torch.bfloat16).contiguous() for rows in (q, k, v))
            cache.fill(k, v, layer=layer, slot_mapping=slots)  # noqa: B023
            out = cache.decode(q, table, lens, layer=layer, max_seq_len=context)  # noqa: B023
            return out[:, None].float()

        position = torch.tensor([step], device=device)
        logits = model(windows[:, step : step + 1], position, attend)[:, 0]
        losses[:, step] = F.cross_entropy(logits, windows[:, step + 1], reduction="none").cpu()
    return losses
