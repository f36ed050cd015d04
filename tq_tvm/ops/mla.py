"""``mla``: the torch call `mla_decode`."""

from __future__ import annotations

from typing import Any

import torch

from tq_tvm.artifacts import LoadedFunction, load
from tq_tvm.errors import UnsupportedSpecError
from tq_tvm.ops import _check, _check_caches, _values
from tq_tvm.ops._library import REFUSALS, call_again, destination_op
from tq_tvm.ops.workspace import as_scratch, choose_mla_launch
from tq_tvm.spec import LATENT_DIMS, CacheFormat, CacheSpec
from tq_tvm.splits import mla_floats
from tq_tvm.targets import detect

__all__ = ["mla_decode"]

_OP = "mla_decode"
_NAMES = ("q_latent", "q_rope", *_check.CACHE_NAMES, "block_table", "seq_lens")
_loaded: dict[tuple, tuple[CacheSpec, LoadedFunction]] = {}


def mla_decode(
    q_latent: Any,
    q_rope: Any,
    k_cache: Any,
    v_cache: Any,
    k_meta: Any,
    v_meta: Any,
    block_table: Any,
    seq_lens: Any,
    *,
    sm_scale: float,
    policy: int | str | CacheFormat,
    max_seq_len: int | None = None,
    return_lse: bool = False,
    lse: Any = None,
    layout: str = "bshd",
    k_scale: Any = None,
    out: Any = None,
    workspace: Any = None,
) -> Any:
    """Multi-head latent attention (MLA) of one new token a sequence over a packed latent cache.

    A token is a latent of 512 values, which is its key and its value, and a rope part of 64 that
    belongs to the key; all query heads share both (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    Queries have absorbed the up-projection of keys, and outputs are latents, before that of values.

    The cache is one of ``CacheSpec(512, HQ, 1, format=policy, head_dim_v=64)``, whose K are latents
    and whose V, of the codec ``none``, rope parts: `tq_tvm.fill_kv_cache` writes them as ``k``
    ``[T, 1, 512]`` and ``v`` ``[T, 1, 64]``, and `tq_tvm.PagedKVCache` holds them.

    Parameters
    ----------
    q_latent, q_rope
        ``[B, HQ, 512]`` and ``[B, HQ, 64]``, contiguous, of one dtype: float16, bfloat16 or
        float32.
    k_cache, v_cache
        ``[P, PS, 1, BK]`` of latents, 256 bytes of ``mse4``, and ``[P, PS, 1, 64]`` of rope parts,
        dtype of the queries. The page stride is free, below 2**31 elements.
    k_meta, v_meta
        ``[P, PS, 1, MK]`` and the empty ``[P, PS, 1, 0]``, dtype of the queries.
    block_table
        ``[B, MB]`` int32: pages of each sequence; entries past its last one may be anything.
    seq_lens
        ``[B]`` int32: tokens of each sequence. The output of an empty sequence is zero.
    sm_scale
        Factor of the logits: that of the model's full heads, such as 1/sqrt(128 + 64).
    policy
        Cache format, such as ``"mse4-none-signed-matched"``: 386 bytes a token in bfloat16.
    max_seq_len
        Upper bound of ``seq_lens`` that the host knows; None is MB * PS. It chooses the number of
        splits.
    return_lse
        Return ``(out, lse)``. lse is the natural logarithm of the sum of exponentials of all
        logits, what `tq_tvm.merge_attention_states` takes; -inf of an empty sequence.
    lse
        ``[B, HQ]`` float32, contiguous, where lse is written; None allocates it if it is returned.
    layout
        ``"bshd"``, or ``"bhsd"`` for pages ``[1, PS, ...]``.
    k_scale
        Scale of all latents, in ``fp8``, see `tq_tvm.paged_decode`.
    out
        ``[B, HQ, 512]``, contiguous, dtype of the queries.
    workspace
        Contiguous tensor of any dtype; one that is too small is refused with the size. None
        allocates it with torch. Concurrent calls need one each.

    Returns
    -------
    ``out``, or a new tensor; with ``return_lse`` that and lse.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape, stride, alignment (16 bytes; 4 for metas) or device.
    UnsupportedSpecError
        Not a latent cache, or a device without a kernel of it: of GPUs those of compute capability
        9.0 (H100, H200) have one.
    ArtifactNotFoundError, ArtifactCorruptError
        No library serves the call.

    Examples
    --------
    ::

        spec = CacheSpec(512, 128, 1, format="mse4-none-signed-matched", head_dim_v=64)
        cache = PagedKVCache(spec, num_pages=1024, device="cpu")
        cache.fill(latents[:, None], ropes[:, None], slot_mapping=slots)
        out = mla_decode(
            q_latent, q_rope, *cache.tensors(0), table, lens, sm_scale=192**-0.5,
            policy=spec.format,
        )
    """
    _check.check_layout(_OP, layout)
    policy = _check.as_policy(_OP, policy)
    tensors = _check.as_tensors(
        _OP, _NAMES,
        (q_latent, q_rope, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens),
    )  # fmt: skip
    if k_scale is not None:
        k_scale = _check.as_scale(_OP, "k_scale", k_scale, tensors[2].device)
    result = torch.empty_like(tensors[0]) if out is None else _check.as_tensor(_OP, "out", out)
    sm_scale = _check.as_number(_OP, "sm_scale", sm_scale)
    if max_seq_len is not None:
        max_seq_len = _check.as_integer(_OP, "max_seq_len", max_seq_len)
    if not isinstance(return_lse, bool):
        _check.fail(_OP, "return_lse", "True or False", repr(return_lse), "pass one of both")
    written = None if lse is None else _check.as_tensor(_OP, "lse", lse)
    if written is None and return_lse:
        shape = tensors[0].shape[:2]
        written = torch.empty(shape, dtype=torch.float32, device=tensors[0].device)
    if workspace is not None:
        workspace = _check.as_tensor(_OP, "workspace", workspace)
    arguments: tuple[Any, ...] = (
        *tensors, result, workspace, written, sm_scale, max_seq_len, layout, policy, k_scale
    )  # fmt: skip
    _mla(*arguments)
    returned = result if out is None else out
    if not return_lse:
        return returned
    return returned, written if lse is None else lse


@destination_op("mla", mutates=["out", "workspace", "lse"])
def _mla(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_meta: torch.Tensor,
    v_meta: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    lse: torch.Tensor | None,
    sm_scale: float,
    max_seq_len: int | None,
    layout: str,
    policy: str,
    k_scale: torch.Tensor | None,
) -> None:
    tensors = (q_latent, q_rope, k_cache, v_cache, k_meta, v_meta, block_table, seq_lens)
    checked = (tensors, out, lse, layout, policy, k_scale)
    scales = _check.tensor_scales(_OP, policy, (k_scale, None), q_latent.device)
    caches = _check_caches.kernel_caches((k_cache, v_cache, k_meta, v_meta), scales)
    inputs: tuple[torch.Tensor, ...] = (q_latent, q_rope, *caches, block_table, seq_lens)
    shape, pages = q_latent.shape, k_cache.shape
    key = (shape[1:], pages, q_latent.dtype, q_latent.device, layout, policy)
    found = _loaded.get(key)
    if (
        found is None
        or not q_latent.is_cuda
        or lse is not None
        or block_table.ndim != 2
        or _check.suspect_rows(q_latent, out, compact=True, apart=True)
        or _check.suspect_rows(q_rope, out, compact=True, apart=True)
        or _check_caches.suspect_caches(k_cache, v_cache, k_meta, v_meta)
    ):
        spec, inputs = _check_arguments(*checked)
        if found is None:
            _check_capability(q_latent.device)
            found = _loaded[key] = (spec, load("mla", spec, q_latent.device))
    spec, loaded = found
    batch = shape[0]
    context = block_table.shape[1] * spec.page_size
    if out.numel() == 0:
        return
    if context == 0 or pages[0] == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    if max_seq_len is not None:
        context = max(min(context, max_seq_len), 1)
    variant, parts = choose_mla_launch(loaded, batch, context)
    floats = mla_floats(spec, batch, parts, variant.launch)
    if workspace is None:
        scratch = torch.empty(floats, dtype=torch.float32, device=q_latent.device)
    else:
        todo = "allocate as many, or pass workspace=None"
        scratch = as_scratch(_OP, workspace, floats, q_latent.device, todo, "q_latent")
    wanted = scratch[:0].expand(batch, 0) if lse is None else lse
    rest = (scratch, out, wanted, parts, sm_scale)
    try:
        variant.call(*inputs, *rest)
    except REFUSALS:
        call_again(loaded, variant, (*_check_arguments(*checked)[1], *rest))


def _check_arguments(
    tensors: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    layout: str,
    policy: str,
    k_scale: torch.Tensor | None,
) -> tuple[CacheSpec, tuple[torch.Tensor, ...]]:
    """Check everything but the workspace; return the spec and the kernel's input tensors."""
    q_latent, q_rope, k_cache, _, _, _, table, lens = tensors
    scales = _check.tensor_scales(_OP, policy, (k_scale, None), q_latent.device)
    given = _check.given(_check.SCALE_NAMES, scales)
    others = {} if lse is None else {"lse": lse}
    _check.check_device(
        _OP, dict(zip(_NAMES, tensors, strict=True)) | {"out": out} | given | others
    )
    _check.check_model_dtype(_OP, "q_latent", q_latent)
    if q_latent.ndim != 3:
        _check.check_shape(_OP, "q_latent", q_latent, "[B, HQ, 512]", (None,) * 3)
    batch, heads = q_latent.shape[:2]
    latent_dim, rope_dim = LATENT_DIMS
    spec = _check_caches.cache_spec(
        _OP, "mla", k_cache, LATENT_DIMS, heads, q_latent.dtype, layout, policy
    )
    if not spec.is_latent:
        _check.fail(
            _OP, "policy and k_cache",
            "of one KV head, with the codec none for V and any without residual signs for K",
            f"{spec.format} of {spec.num_kv_heads} KV heads", "fill a latent cache",
        )  # fmt: skip
    _check_caches.check_scales(_OP, given)
    caches = _check_caches.check_caches(_OP, spec, tensors[2:6])
    for name, tensor, dim in (
        ("q_latent", q_latent, latent_dim), ("q_rope", q_rope, rope_dim), ("out", out, latent_dim)
    ):  # fmt: skip
        _check.check_dtype(_OP, name, tensor, q_latent.dtype)
        _check.check_shape(_OP, name, tensor, f"[B, HQ, {dim}]", (batch, heads, dim))
        _check.check_compact(_OP, name, tensor)
        _check.check_alignment(_OP, name, tensor, 16)
    _check.check_apart(_OP, {"q_latent": q_latent, "q_rope": q_rope, "out": out, **others})
    _check.check_table_arguments(_OP, table, lens, batch)
    if lse is not None:
        _check.check_index(_OP, "lse", lse, "[B, HQ]", (batch, heads), torch.float32)
    if q_latent.device.type == "cpu" and batch:
        _values.check_lengths(_OP, lens, table.shape[1] * spec.page_size)
        first = torch.zeros_like(lens)
        _values.check_table(_OP, table, first, lens, spec.page_size, k_cache.shape[0])
    return spec, (q_latent, q_rope, *_check_caches.kernel_caches(caches, scales), table, lens)


def _check_capability(device: torch.device) -> None:
    """Refuse GPUs that the kernel's instructions are not of, before a library is looked for."""
    target = detect(device)
    if target.kind == "cuda" and not target.has_wgmma:
        raise UnsupportedSpecError(
            f"{_OP}: device must be a GPU of compute capability 9.0 (H100, H200) or the CPU, got "
            f"{target.name} ({target.arch}); use another device"
        )
