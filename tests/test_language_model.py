"""The language model that formats are measured with: it decodes as it attends at once."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from torch.nn import functional as F

from tq_tvm import CacheSpec
from tq_tvm.quality.language_model import DecoderConfig, causal, read_text, train
from tq_tvm.quality.perplexity import held_out_windows, keys_of, negative_log_likelihoods

CONFIG = DecoderConfig(layers=2, dim=64, num_q_heads=4, num_kv_heads=2, feed_forward=128)
CONTEXT = 70  # more than a page


@pytest.fixture(scope="module")
def trained():
    """A model that has learnt that bytes repeat, and windows of what it knows."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 256, (16, 5), generator=generator)
    text = words[torch.randint(0, 16, (2000,), generator=generator)].flatten()
    device = torch.device("cpu")
    model = train(CONFIG, text, steps=50, batch=8, context=CONTEXT, device=device)
    return model.eval(), held_out_windows(text, 3, CONTEXT)


@pytest.fixture
def libraries(library):
    """CPU libraries of formats."""
    if importlib.util.find_spec("tvm") is None:
        pytest.skip("the compiler (extra 'tune') is not installed")
    spec = CacheSpec(CONFIG.head_dim, CONFIG.num_q_heads, CONFIG.num_kv_heads)

    def ensure(*formats):
        for name in formats:
            library(dataclasses.replace(spec, format=name), torch.device("cpu"))

    return ensure


def test_decoding_from_an_exact_cache_is_attention_at_once(trained, libraries):
    libraries("none")
    model, windows = trained
    with torch.inference_mode():
        logits = model(windows[:, :-1], torch.arange(CONTEXT), causal)
    want = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    got = negative_log_likelihoods(model, windows, "none")
    assert want.mean() < 5.2, "better than 5.5 nats of a uniform byte: it has learnt"
    assert (got - want).abs().mean() < 0.01
    assert (got - want).abs().max() < 0.3


def test_fewer_bits_cost_more(trained, libraries):
    libraries("none", "tq44", "tq22")
    model, windows = trained
    exact, four, two = (
        negative_log_likelihoods(model, windows, f) for f in ("none", "tq44", "tq22")
    )
    error = [(found - exact).square().mean().item() for found in (four, two)]
    assert 0 < error[0] < error[1] / 2


def test_keys_are_those_of_the_layers(trained):
    model, windows = trained
    rows = keys_of(model, windows, 50)
    assert rows.shape == (50, CONFIG.head_dim)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, keys_of(model, windows, 50))
    assert len(rows.unique(dim=0)) == 50


def test_text_is_split_by_file():
    learn, test = read_text()
    assert 0.02 < len(test) / (len(learn) + len(test)) < 0.1
    assert int(learn.max()) < 256
