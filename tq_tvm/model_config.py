"""The cache specs of a model, read from its Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.spec import LATENT_DIMS, CacheFormat, CacheSpec, get_format

__all__ = ["specs_of_model"]

_OP = "specs_of_model"
_DTYPES = {"float16", "bfloat16", "float32"}

_OTHER_LAYERS = (
    # Gemma 4: layers that attend to all tokens; the plain fields are those of a sliding window.
    {"num_key_value_heads": "num_global_key_value_heads", "head_dim": "global_head_dim"},
    # MiMo V2: layers of a sliding window.
    {
        "num_attention_heads": "swa_num_attention_heads",
        "num_key_value_heads": "swa_num_key_value_heads",
        "head_dim": "swa_head_dim",
        "v_head_dim": "swa_v_head_dim",
    },
)
"""Fields that say what a model's other layers have in place of the plain ones."""


def specs_of_model(
    config: Path | str | Mapping[str, Any],
    *,
    format: str = "k4v2",
    page_size: int = 64,
    layout: str = "bshd",
    tensor_parallel: int = 1,
) -> tuple[CacheSpec, ...]:
    """Derive the specs that a model's layers need on one rank: mostly one.

    Read are ``num_attention_heads``, ``num_key_value_heads`` (else as many), ``head_dim`` (else
    ``hidden_size / num_attention_heads``), ``v_head_dim`` (else the same) and ``dtype`` or
    ``torch_dtype`` (else bfloat16); of a model of several modalities those of its ``text_config``.
    Where layers with and without a sliding window differ in these, as those of Gemma 4
    (``global_head_dim``) and MiMo V2 (``swa_head_dim``) do, each kind has a spec.

    Parameters
    ----------
    config
        A ``config.json``, or what it holds.
    format, page_size, layout
        As `CacheSpec` takes them.
    tensor_parallel
        Ranks that share the heads. Where there are more than KV heads, each rank has one.

    Raises
    ------
    UnsupportedSpecError
        The file is no such config, its heads cannot be shared, or there are no kernels of its sizes
        or, of a latent cache, of the format.

    Notes
    -----
    With ``kv_lora_rank`` (MLA) it is that of a latent cache, see `tq_tvm.mla_decode`: the key
    codec of ``format`` for latents, ``none`` for rope parts. Every rank has all latents.

    Examples
    --------
    >>> llama = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    >>> [spec.label for spec in specs_of_model(llama, format="tq42", tensor_parallel=2)]
    ['tq42_d128_hq16_hk4_p64_bf16_bshd']
    """
    fields = _text(_read(config))
    kinds = [fields]
    if not _has(fields, "kv_lora_rank"):
        for names in _OTHER_LAYERS:
            others = {name: fields[n] for name, n in names.items() if _has(fields, n)}
            kinds.append({**fields, **others})
    specs = [_spec(kind, format, page_size, layout, tensor_parallel) for kind in kinds]
    return tuple(dict.fromkeys(specs))


def _spec(
    fields: Mapping[str, Any], format: str, page_size: int, layout: str, tensor_parallel: int
) -> CacheSpec:
    """The spec of layers of one kind."""
    heads = _size(fields, "num_attention_heads")
    kv_heads = (
        _size(fields, "num_key_value_heads") if _has(fields, "num_key_value_heads") else heads
    )
    value_dim = _size(fields, "v_head_dim") if _has(fields, "v_head_dim") else None
    if _has(fields, "kv_lora_rank"):
        kv_heads = 1
        head_dim, value_dim = (_size(fields, n) for n in ("kv_lora_rank", "qk_rope_head_dim"))
        if (head_dim, value_dim) != LATENT_DIMS:
            expected = " and ".join(map(str, LATENT_DIMS))
            _refuse("kv_lora_rank and qk_rope_head_dim", expected, f"{head_dim} and {value_dim}")
        format = _latent_format(format)
    elif _has(fields, "head_dim"):
        head_dim = _size(fields, "head_dim")
    else:
        width = _size(fields, "hidden_size")
        if width % heads:
            _refuse("hidden_size", f"a multiple of {heads} heads where there is no head_dim", width)
        head_dim = width // heads
    if heads % kv_heads:
        _refuse("num_attention_heads", f"a multiple of {kv_heads} KV heads", heads)
    ranks = tensor_parallel
    shared = ranks > 0 and heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
    if not shared:
        _refuse("tensor_parallel", f"what divides {heads} heads and {kv_heads} KV heads", ranks)
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")
    dtype = dtype.removeprefix("torch.")
    if dtype not in _DTYPES:
        _refuse("dtype", f"one of {', '.join(sorted(_DTYPES))}", dtype)
    return CacheSpec(
        head_dim=head_dim,
        num_q_heads=heads // ranks,
        num_kv_heads=max(kv_heads // ranks, 1),
        page_size=page_size,
        dtype=dtype,
        layout=layout,
        format=format,
        head_dim_v=value_dim,
    )


def _latent_format(format: str) -> str:
    """The key codec of a format, and rope parts as they are."""
    fmt = get_format(format)
    if fmt.key.residual_sign:
        _refuse("format", "one whose keys have no residual signs, such as tq42", fmt.name)
    rule = fmt.scale_rule if fmt.key.family == "lloyd_max" else None
    return CacheFormat(fmt.key, get_format("none").value, fmt.rotation, rule).name


def _read(config: Path | str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    try:
        fields = json.loads(Path(config).read_text())
    except (OSError, ValueError) as error:
        _refuse("config", "a readable config.json", f"{config}: {error}")
    if not isinstance(fields, dict):
        _refuse("config", "an object of fields", type(fields).__name__)
    return fields


def _text(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = fields.get("text_config")
    return inner if isinstance(inner, dict) and _has(inner, "num_attention_heads") else fields


def _has(fields: Mapping[str, Any], name: str) -> bool:
    return fields.get(name) is not None


def _size(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 1:
        _refuse(name, "a positive integer", value)
    return value


def _refuse(field: str, expected: str, actual: object) -> NoReturn:
    raise UnsupportedSpecError(
        f"{_OP}: {field} must be {expected}, got {actual}; name the spec itself with --spec"
    )
