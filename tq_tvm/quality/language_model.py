"""A small decoder and the text that it learns: Python's standard library of this machine, in bytes.

Rotary positions, grouped queries, RMS norms, gated feed-forward layers: the parts of the models
that the cache is for, in a size that trains in minutes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Decoder", "DecoderConfig", "causal", "read_text", "rotary", "train"]

_HELD_OUT = 20
_LEARNING_RATE = 1.5e-3
_WARM_UP = 100


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; bytes are its tokens."""

    layers: int = 6
    dim: int = 512
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 1408
    vocabulary: int = 256
    rotary_base: float = 10000.0


def read_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the standard library's sources: to learn from, and every twentieth file held out.

    Files are told apart by a hash of their path, so that the two sets stay what they are from one
    run to the next.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sets: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "dist-packages" in name:
            continue
        held_out = hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT == 0
        sets[held_out].append(path.read_bytes())
    learn, test = (
        torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8).long() for files in sets
    )
    return learn, test


def rotary(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Rotate rows ``[..., T, H, D]`` by their positions ``[T]``, halves paired."""
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = positions.float()[:, None] * base**-steps
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.float().chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(x.dtype)


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        queries, rows = (h * config.head_dim for h in (config.num_q_heads, config.num_kv_heads))
        self.config, self.widths = config, (queries, rows, rows)
        self.attention_norm = nn.RMSNorm(config.dim)
        self.qkv = nn.Linear(config.dim, queries + 2 * rows, bias=False)
        self.projection = nn.Linear(queries, config.dim, bias=False)
        self.feed_forward_norm = nn.RMSNorm(config.dim)
        self.gates = nn.Linear(config.dim, 2 * config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.dim, bias=False)

    def rows(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values ``[..., T, H, D]`` of ``x [..., T, dim]``."""
        parts = self.qkv(self.attention_norm(x)).split(self.widths, -1)
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in parts)
        base = self.config.rotary_base
        return rotary(q, positions, base), rotary(k, positions, base), v

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output, from its input and what its heads attended to."""
        x = x + self.projection(attended.flatten(-2))
        gate, up = self.gates(self.feed_forward_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """The model; ``attend(layer, q, k, v)`` is what its layers attend by."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Logits ``[..., T, vocabulary]`` of tokens ``[..., T]``; the embedding is tied."""
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            x = layer.finish(x, attend(index, *layer.rows(x, positions)))
        return F.linear(self.norm(x), self.embedding.weight)


def causal(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of whole sequences ``[B, T, H, D]``."""
    q, k, v = (rows.transpose(1, 2) for rows in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def train(
    config: DecoderConfig,
    text: torch.Tensor,
    *,
    steps: int,
    batch: int,
    context: int,
    device: torch.device,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Decoder:
    """Train a decoder on windows of ``text``, in bfloat16 with weights in float32.

    Parameters
    ----------
    steps, batch, context
        Updates, windows of an update, tokens of a window.
    report
        Is told every hundredth step and its loss, in nats.
    """
    torch.manual_seed(seed)
    model = Decoder(config).to(device)
    text = text.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    positions = torch.arange(context, device=device)
    for step in range(steps):
        warm = min(1.0, (step + 1) / _WARM_UP)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * warm * (0.05 + 0.95 * cosine)
        starts = torch.randint(len(text) - context - 1, (batch, 1), device=device)
        window = text[starts + torch.arange(context + 1, device=device)]
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(window[:, :-1], positions, causal)
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            report(step, loss.item())
    return model
