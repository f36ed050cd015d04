"""Into how many parts attention cuts its work, and the workspace that they need."""

from __future__ import annotations

import functools

import torch

from tq_tvm.artifacts import LoadedFunction, LoadedVariant, load
from tq_tvm.errors import ArtifactCorruptError
from tq_tvm.ops import _check
from tq_tvm.served import attends_to_one, check_target, functions_on, gpus_decode
from tq_tvm.spec import CacheSpec
from tq_tvm.splits import (
    attend_launch_keys,
    attend_parts,
    launch_keys,
    mla_launch_keys,
    mla_parts,
    most_attend_floats,
    num_parts,
    prefill_launch_keys,
    prefill_parts,
    prefills,
    workspace_floats,
)
from tq_tvm.targets import as_device

__all__ = [
    "as_scratch",
    "choose_attend_launch",
    "choose_launch",
    "choose_mla_launch",
    "choose_prefill",
    "count_parts",
    "paged_decode_workspace_size",
]

_OP = "paged_decode_workspace_size"


def paged_decode_workspace_size(
    spec: CacheSpec,
    batch: int,
    max_context: int,
    device: torch.device | str,
    *,
    max_tokens: int | None = None,
) -> int:
    """Bytes of workspace that serve every `paged_decode` of a size.

    Parameters
    ----------
    spec
        The cache's spec, with the number of query heads.
    batch
        Largest B.
    max_context
        Largest context in tokens: MB * PS of the widest block table, or the largest
        ``max_seq_len`` where that is always passed.
    device
        Where `paged_decode` will run; its library says into how many parts work is cut.
    max_tokens
        Largest T of calls with several query tokens a sequence, or with any other feature (of
        those with one token a sequence, B). None: there are no such calls.

    Returns
    -------
    Bytes, enough for each smaller batch, context and T too.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Not a spec, a size that is no integer or negative, or a device that torch does not have.
    UnsupportedSpecError
        The device has no kernel of the spec.
    ArtifactNotFoundError, ArtifactCorruptError
        No library serves the spec on this device.
    """
    _check.check_spec(_OP, spec)
    device = as_device(_OP, device)
    kind = "cuda" if device.type == "cuda" else "llvm"
    fmt = spec.cache_format
    decodes = kind == "llvm" or gpus_decode(fmt.key, fmt.value, spec.head_dim, spec.value_dim)
    check_target(_OP, spec, kind, "decode" if decodes else "attend")
    batch = _check.as_integer(_OP, "batch", batch)
    max_context = _check.as_integer(_OP, "max_context", max_context)
    if max_tokens is not None:
        max_tokens = _check.as_integer(_OP, "max_tokens", max_tokens)
    if not decodes:
        # Each sequence has a token of ``attend``.
        return 4 * _attend_floats(spec, max(batch, max_tokens or 0), max_context, device)
    most = _decode_floats("decode", spec, batch, max_context, device)
    if kind == "cuda" and attends_to_one(spec, max_context):
        most = max(most, _attend_floats(spec, batch, max_context, device))
    if max_tokens is not None:
        most = max(most, _attend_floats(spec, max_tokens, max_context, device))
        if "decode_featured" in functions_on(spec, kind):
            sizes = (max_tokens, max_context, device)
            most = max(most, _decode_floats("decode_featured", spec, *sizes))
    return 4 * most


def _decode_floats(
    function: str, spec: CacheSpec, batch: int, max_context: int, device: torch.device
) -> int:
    """Floats for every call of ``decode`` or ``decode_featured``."""
    loaded = load(function, spec, device)
    # A smaller batch gets more parts, and may get another variant.
    floats = (
        workspace_floats(
            spec, b, count_parts(loaded, variant, spec, b, max_context), variant.launch
        )
        for variant in loaded.variants
        for b in range(1, batch + 1)
    )
    return max(floats, default=0)


def _attend_floats(spec: CacheSpec, max_tokens: int, max_context: int, device: torch.device) -> int:
    """Floats for every call of ``attend``."""
    check_target(_OP, spec, "cuda" if device.type == "cuda" else "llvm", "attend")
    loaded = load("attend", spec, device)
    for variant in loaded.variants:
        _check_launch(loaded, variant, attend_launch_keys(variant.launch))
    return max(
        most_attend_floats(spec, max_tokens, max_context, variant.launch, loaded.processors)
        for variant in loaded.variants
    )


@functools.lru_cache(maxsize=4096)
def choose_launch(
    loaded: LoadedFunction, batch: int, context: int
) -> tuple[LoadedVariant, int, int]:
    """Choose the variant for a problem, the number of parts, and floats of workspace."""
    spec = _cache_spec(loaded)
    size = max(batch * spec.num_kv_heads * context * spec.head_dim, 1)
    variant = loaded.nearest(size, batch)
    parts = count_parts(loaded, variant, spec, batch, context)
    return variant, parts, workspace_floats(spec, batch, parts, variant.launch)


def count_parts(
    loaded: LoadedFunction, variant: LoadedVariant, spec: CacheSpec, batch: int, context: int
) -> int:
    """`num_parts` of a variant on the device that it is loaded for."""
    _check_launch(loaded, variant, launch_keys(variant.launch))
    return num_parts(spec, batch, context, variant.launch, loaded.processors)


@functools.lru_cache(maxsize=4096)
def choose_attend_launch(
    loaded: LoadedFunction,
    tokens: int,
    batch: int,
    context: int,
    longest: int | None,
) -> tuple[LoadedVariant, int]:
    """Choose the variant of ``attend`` for a problem, and the number of parts."""
    spec = _cache_spec(loaded)
    if all("rows" in variant.launch for variant in loaded.variants):
        queries = -(-tokens // batch) if longest is None else longest
        loaded = loaded.of_rows(queries * spec.group_size)
    variant = loaded.nearest(max(tokens * spec.num_kv_heads * context * spec.head_dim, 1))
    _check_launch(loaded, variant, attend_launch_keys(variant.launch))
    parts = attend_parts(spec, tokens, batch, context, variant.launch, loaded.processors, longest)
    return variant, parts


@functools.lru_cache(maxsize=4096)
def choose_mla_launch(
    loaded: LoadedFunction, batch: int, context: int
) -> tuple[LoadedVariant, int]:
    """Choose the variant of ``mla`` for a problem, and the number of parts."""
    spec = _cache_spec(loaded)
    variant = loaded.nearest(max(batch * context * spec.head_dim, 1))
    _check_launch(loaded, variant, mla_launch_keys(variant.launch))
    return variant, mla_parts(spec, batch, context, variant.launch, loaded.processors)


@functools.lru_cache(maxsize=4096)
def choose_prefill(
    loaded: LoadedFunction, tokens: int, batch: int, context: int, longest: int
) -> tuple[LoadedVariant, int] | None:
    """Choose the variant of ``prefill`` for a problem, and the number of parts.

    None where ``attend`` serves it better, see `prefills`.
    """
    spec = _cache_spec(loaded)
    if all("rows" in variant.launch for variant in loaded.variants):
        loaded = loaded.of_rows(longest * spec.group_size)
    variant = loaded.nearest(max(tokens * spec.num_kv_heads * context * spec.head_dim, 1))
    _check_launch(loaded, variant, prefill_launch_keys(variant.launch))
    if not prefills(spec, tokens, context, longest, variant.launch, loaded.processors):
        return None
    return variant, prefill_parts(spec, tokens, context, variant.launch, loaded.processors)


def _cache_spec(loaded: LoadedFunction) -> CacheSpec:
    assert isinstance(loaded.spec, CacheSpec)
    return loaded.spec


def _check_launch(loaded: LoadedFunction, variant: LoadedVariant, keys: tuple[str, ...]) -> None:
    """Refuse a manifest that does not say what the number of parts depends on."""
    missing = [name for name in keys if variant.launch.get(name, 0) < 1]
    if missing:
        raise ArtifactCorruptError(
            f"load: launch of {variant.symbol} in {loaded.directory} must have positive "
            f"{', '.join(missing)}, got {dict(variant.launch)}; "
            f"run `{loaded.manifest.build_command}` to build it again"
        )


def as_scratch(
    op: str, workspace: torch.Tensor, floats: int, device: torch.device, todo: str, query: str = "q"
) -> torch.Tensor:
    """View the workspace as the kernel's float32 vector, which may be longer than it needs.

    ``todo`` is the advice where it is too small, ``query`` the argument whose device it shares.
    """
    size = workspace.nbytes
    if (
        workspace.ndim == 1
        and workspace.device == device
        and workspace.is_contiguous()
        and size >= 4 * floats
        and not (size & 3 or workspace.data_ptr() & 15)
    ):
        return workspace if workspace.dtype == torch.float32 else workspace.view(torch.float32)
    if workspace.device != device:
        _check.fail(op, "workspace", f"on {device} like {query}", workspace.device, "move it there")
    _check.check_strided(op, "workspace", workspace)
    _check.check_compact(op, "workspace", workspace)
    _check.check_alignment(op, "workspace", workspace, 16)
    if size < 4 * floats:
        _check.fail(op, "workspace", f"at least {4 * floats} bytes", f"{size} bytes", todo)
    return workspace.view(-1).view(torch.uint8)[: 4 * floats].view(torch.float32)
