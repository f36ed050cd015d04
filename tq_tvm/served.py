"""Which functions there are of a spec: kernels are generated of fewer for GPUs than for CPUs."""

from __future__ import annotations

from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.formats import Codec
from tq_tvm.spec import FUNCTIONS, CacheSpec, RotateSpec, Spec

__all__ = [
    "GPU_DECODE_DIMS",
    "attends_to_one",
    "check_target",
    "functions_on",
    "gpus_decode",
]

GPU_DECODE_DIMS = (64, 128, 256, 512)

_LONG = 2048
"""Tokens of a context from which on `attends_to_one` can be."""

LATENT_FUNCTIONS = ("rotate", "fill_slots", "fill_table", "flatten", "flatten_unrotated", "mla")
"""Functions that GPUs have of a latent cache."""

GPU_FUNCTIONS = ("decode_featured", "prefill")
"""Functions that a CPU's ``attend`` has in it."""


def functions_on(spec: Spec, kind: str) -> tuple[str, ...]:
    """Functions of a spec that kernels are generated of for a target kind.

    Parameters
    ----------
    kind
        ``"cuda"`` or ``"llvm"``; a CPU has all but `GPU_FUNCTIONS`. A library for the target has
        just these, see `tq_tvm.targets.TargetInfo.functions`.

    Examples
    --------
    >>> from tq_tvm import CacheSpec
    >>> functions_on(CacheSpec(128, 32, 8, window=16), "cuda")[-2:]
    ('decode_featured', 'attend')
    >>> functions_on(CacheSpec(128, 32, 8, dtype="float32"), "cuda")
    ()
    """
    if kind != "cuda":
        # CPUs attend to chunks, and with features, as to a few tokens.
        return tuple(name for name in spec.functions if name not in GPU_FUNCTIONS)
    if spec.dtype == "float32":
        return ()
    if isinstance(spec, RotateSpec):
        return spec.functions
    fmt = spec.cache_format
    if spec.is_latent:
        return LATENT_FUNCTIONS
    # Long chunks over a window, of V that warps share, or of longer K are ``attend``'s, too.
    chunks = not spec.window and spec.value_dim <= 256 and spec.head_dim <= 512
    served = tuple(name for name in spec.functions if name != "prefill" or chunks)
    decodes = gpus_decode(fmt.key, fmt.value, spec.head_dim, spec.value_dim)
    return tuple(name for name in served if decodes or FUNCTIONS[name] != "decode")


def gpus_decode(key: Codec, value: Codec, head_dim: int, value_dim: int) -> bool:
    """Whether GPUs have ``decode`` of two codecs; where they have not, ``attend`` does its work."""
    tables = key.family == value.family == "lloyd_max"
    dims = head_dim == value_dim and head_dim in GPU_DECODE_DIMS
    return dims and tables and (value.bits != 3 or head_dim >= 128)


def attends_to_one(spec: CacheSpec, context: int) -> bool:
    """Whether GPUs give ``attend`` what ``decode`` has a kernel for: one query a sequence.

    ``context`` is the most tokens of a sequence, in a window if there is one. ``decode`` reads and
    decodes K and V for 8 query heads of a group at a time, of 4 where head_dim is 256; ``attend``
    for 16 at a time, but it begins and ends later. An H100, k4v2, 8 KV heads: ``decode`` takes 338
    us at 64 x 8192 with 16 query heads for each, ``attend`` 248; 92, 52, 23, 69 and 188 at
    1 x 131072, 16 x 4096, 8 x 2048, 64 x 1024 and 256 x 512, where ``attend`` of as many rows, 4
    query tokens of 4 heads, takes 70, 43, 22, 65 and 213.
    """
    return spec.group_size > 8 and spec.head_dim <= 256 and context >= _LONG and not spec.window


def check_target(op: str, spec: Spec, kind: str, function: str | None = None) -> None:
    """Refuse what no kernel is generated for on a target kind, ``"cuda"`` or ``"llvm"``.

    Parameters
    ----------
    op
        What asks, for the message.
    function
        The function that it needs, see `functions_on`; None where any will do.

    Raises
    ------
    UnsupportedSpecError
        The message says what there is.
    """
    served = functions_on(spec, kind)
    if function in served or (function is None and served):
        return
    if function == "mla" and function not in spec.functions:
        raise UnsupportedSpecError(
            f"{op}: spec must be a latent cache's (head_dim 512 of one KV head in a codec without "
            f"residual signs, head_dim_v 64 in the codec none, no window), got {spec.label}; "
            "use another call"
        )
    decoded = ", ".join(map(str, GPU_DECODE_DIMS))
    wanted = spec.label if function is None else f"{spec.label} for {FUNCTIONS[function]}"
    raise UnsupportedSpecError(
        f"{op}: spec must be one that GPUs have kernels of (for decode of Lloyd-Max codecs and one "
        f"head_dim of {decoded}, but not of mse3 for V at head_dim 64; for prefill of head_dim 512 "
        f"for K and 256 for V at most, without a window; for attention to a latent cache mla "
        f"alone; float16 or bfloat16), got {wanted}; use the CPU or another spec"
    )
