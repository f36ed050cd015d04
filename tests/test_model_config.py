"""The specs of a model from its ``config.json``, and a set of libraries built from it."""

from __future__ import annotations

import importlib.util
import json

import pytest
from click.testing import CliRunner

from tq_tvm import UnsupportedSpecError
from tq_tvm.cli import main
from tq_tvm.model_config import specs_of_model

LLAMA = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = {
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}
QWEN = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "dtype": "float16",
}
GEMMA = {
    "text_config": {
        "hidden_size": 5376,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "dtype": "bfloat16",
    }
}
MIMO = {
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 192,
    "v_head_dim": 128,
    "swa_num_attention_heads": 64,
    "swa_num_key_value_heads": 8,
    "swa_head_dim": 192,
    "swa_v_head_dim": 128,
}


@pytest.mark.parametrize(
    ("config", "options", "label"),
    [
        (LLAMA, {}, "k4v2_d128_hq32_hk8_p64_bf16_bshd"),
        (LLAMA, {"format": "tq42", "tensor_parallel": 4}, "tq42_d128_hq8_hk2_p64_bf16_bshd"),
        (LLAMA, {"tensor_parallel": 16}, "k4v2_d128_hq2_hk1_p64_bf16_bshd"),
        (QWEN, {"page_size": 16, "layout": "bhsd"}, "k4v2_d128_hq32_hk4_p16_f16_bhsd"),
        ({"text_config": QWEN, "hidden_size": 1}, {}, "k4v2_d128_hq32_hk4_p64_f16_bshd"),
        (
            DEEPSEEK,
            {"format": "tq42", "tensor_parallel": 8},
            "mse4-none-signed-matched_d512v64_hq16_hk1_p64_bf16_bshd",
        ),
        (DEEPSEEK, {"format": "fp8"}, "fp8-none_d512v64_hq128_hk1_p64_bf16_bshd"),
        ({"hidden_size": 768, "num_attention_heads": 12}, {}, "k4v2_d64_hq12_hk12_p64_bf16_bshd"),
    ],
)
def test_specs_of_models(tmp_path, config, options, label):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    for given in (path, config):
        assert [spec.label for spec in specs_of_model(given, **options)] == [label]


@pytest.mark.parametrize(
    ("config", "options", "labels"),
    [
        (
            GEMMA,
            {},
            ["k4v2_d256_hq32_hk16_p64_bf16_bshd", "k4v2_d512_hq32_hk4_p64_bf16_bshd"],
        ),
        (
            {**GEMMA["text_config"], "num_global_key_value_heads": None},
            {"tensor_parallel": 2},
            ["k4v2_d256_hq16_hk8_p64_bf16_bshd", "k4v2_d512_hq16_hk8_p64_bf16_bshd"],
        ),
        (
            MIMO,
            {"format": "tq42", "tensor_parallel": 8},
            ["tq42_d192v128_hq8_hk1_p64_bf16_bshd"],
        ),
        (
            MIMO,
            {"format": "tq42", "tensor_parallel": 4},
            ["tq42_d192v128_hq16_hk1_p64_bf16_bshd", "tq42_d192v128_hq16_hk2_p64_bf16_bshd"],
        ),
        ({**LLAMA, "v_head_dim": 64}, {}, ["k4v2_d128v64_hq32_hk8_p64_bf16_bshd"]),
    ],
)
def test_layers_of_several_kinds(config, options, labels):
    assert [spec.label for spec in specs_of_model(config, **options)] == labels


@pytest.mark.parametrize(
    ("changes", "options", "part"),
    [
        ({"kv_lora_rank": 512}, {}, "qk_rope_head_dim must be a positive integer"),
        ({"kv_lora_rank": 256, "qk_rope_head_dim": 64}, {}, "must be 512 and 64, got 256 and 64"),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, {}, "format must be one whose keys"),
        ({"num_attention_heads": None}, {}, "num_attention_heads must be a positive integer"),
        ({"num_key_value_heads": 5}, {}, "num_attention_heads must be a multiple of 5"),
        ({"hidden_size": 4100}, {}, "hidden_size must be a multiple of 32"),
        ({"torch_dtype": "float64"}, {}, "dtype must be one of"),
        ({}, {"tensor_parallel": 3}, "tensor_parallel must be what divides 32 heads"),
        ({}, {"tensor_parallel": 0}, "tensor_parallel must be what divides 32 heads"),
        ({"head_dim": 100}, {}, "head_dim must be one of"),
    ],
)
def test_models_that_have_no_spec(changes, options, part):
    with pytest.raises(UnsupportedSpecError, match=part):
        specs_of_model({**LLAMA, **changes}, **options)


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_files_that_are_no_config(tmp_path, text):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UnsupportedSpecError, match="specs_of_model: config must be"):
        specs_of_model(path)


@pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="the compiler is missing")
def test_a_set_is_built_in_one_command(tmp_path):
    """Of every format; the default of --spec is not built beside a model, a given one is."""
    config = {**LLAMA, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    path, out = tmp_path / "config.json", tmp_path / "libraries"
    path.write_text(json.dumps(config))
    command = ["build", "--target", "x86_64", "--out", str(out), "--model-config", str(path)]
    formats = ["--format", "tq22", "--format", "8", "--spec", "rotate_d64_bf16"]
    result = CliRunner().invoke(main, [*command, *formats])
    assert result.exit_code == 0, result.output
    names = ["rotate_d64_bf16", "tq22_d64_hq4_hk2_p64_bf16_bshd", "int8_d64_hq4_hk2_p64_bf16_bshd"]
    found = [d.name for d in (out / "x86_64").iterdir() if (d / "manifest.json").exists()]
    assert sorted(found) == sorted(names)
