"""Into how many parts ``decode`` cuts its work, and the workspace that they need."""

from __future__ import annotations

import functools

import torch

from tq_tvm.artifacts import LoadedFunction, LoadedVariant, load
from tq_tvm.errors import ArtifactCorruptError
from tq_tvm.ops import _check
from tq_tvm.spec import CacheSpec, check_target
from tq_tvm.splits import launch_keys, num_parts, workspace_floats
from tq_tvm.targets import as_device

__all__ = ["choose_launch", "count_parts", "paged_decode_workspace_size"]

_OP = "paged_decode_workspace_size"


def paged_decode_workspace_size(
    spec: CacheSpec, batch: int, max_context: int, device: torch.device | str
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

    Returns
    -------
    Bytes, enough for each smaller batch and context too.

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
    check_target(_OP, spec, "cuda" if device.type == "cuda" else "llvm", "decode")
    batch = _check.as_integer(_OP, "batch", batch)
    max_context = _check.as_integer(_OP, "max_context", max_context)
    loaded = load("decode", spec, device)
    # A smaller batch gets more parts, and may get another variant.
    floats = (
        workspace_floats(
            spec, b, count_parts(loaded, variant, spec, b, max_context), variant.launch
        )
        for variant in loaded.variants
        for b in range(1, batch + 1)
    )
    return 4 * max(floats, default=0)


@functools.lru_cache(maxsize=4096)
def choose_launch(
    loaded: LoadedFunction, spec: CacheSpec, batch: int, context: int
) -> tuple[LoadedVariant, int]:
    """Choose the variant for a problem, and the number of parts."""
    variant = loaded.nearest(max(batch * spec.num_kv_heads * context * spec.head_dim, 1))
    return variant, count_parts(loaded, variant, spec, batch, context)


def count_parts(
    loaded: LoadedFunction, variant: LoadedVariant, spec: CacheSpec, batch: int, context: int
) -> int:
    """`num_parts` of a variant on the device that it is loaded for."""
    missing = [name for name in launch_keys(variant.launch) if variant.launch.get(name, 0) < 1]
    if missing:
        raise ArtifactCorruptError(
            f"load: launch of {variant.symbol} in {loaded.directory} must have positive "
            f"{', '.join(missing)}, got {dict(variant.launch)}; "
            f"run `{loaded.manifest.build_command}` to build it again"
        )
    return num_parts(spec, batch, context, variant.launch, loaded.processors)
