"""Valid inputs for a workload, and the check of its outputs against the reference.

Page tables are permutations, lengths fill them, outputs start as NaN or 0xCD so that a value that
was never written cannot pass for a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from tq_tvm import reference
from tq_tvm.errors import TQError
from tq_tvm.spec import CacheSpec
from tq_tvm.splits import (
    attend_floats,
    attend_parts,
    mla_floats,
    mla_parts,
    num_parts,
    prefill_parts,
    workspace_floats,
)
from tq_tvm.targets import processors
from tq_tvm.tuning.workloads import Workload

__all__ = ["Case", "WrongResultError", "make_case"]

_TIE = 1e-4
"""Distance from a decision, in standard deviations, below which two float32 programs may differ."""

_CHECKED_SEQUENCES = 2
_CHECKED_TOKENS = 1024
_CHECKED_QUERIES = 64
_SENTINEL = 0xCD

_Caches = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class WrongResultError(TQError, AssertionError):
    """A kernel computed something else than the reference."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of a workload in ABI order, given a kernel's launch numbers, and their check."""

    arguments: Callable[[dict[str, int]], list]
    poison: Callable[[], None]
    check: Callable[[], float]


def _tolerance(dtype: torch.dtype) -> float:
    """Relative error (Frobenius) that rounding of inputs, scales and outputs can explain."""
    return {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]


def _relative(name: str, got: torch.Tensor, want: torch.Tensor) -> float:
    error = ((got.float() - want).norm() / want.norm()).item()
    if not error <= _tolerance(got.dtype):
        raise WrongResultError(
            f"{name}: relative error must be at most {_tolerance(got.dtype)}, got {error}"
        )
    return error


def _random_caches(spec: CacheSpec, pages: int, device: torch.device) -> _Caches:
    """Random codes with scales as Gaussian rows have them."""
    fmt = spec.cache_format
    codes, scales = [], []
    shapes = list(spec.tensor_shapes(pages).values())
    for side, codec in enumerate((fmt.key, fmt.value)):
        shape, dtype = shapes[side]
        if codec.family == "lloyd_max" or codec.family == "affine":
            codes.append(torch.randint(0, 256, shape, dtype=torch.uint8, device=device))
        else:
            rows = torch.randn(shape, device=device)
            fp8 = codec.family == "fp8"
            codes.append(
                rows.to(torch.float8_e4m3fn).view(torch.uint8)
                if fp8
                else rows.to(getattr(torch, dtype))
            )
        shape, dtype = shapes[side + 2]
        levels = (1 << codec.bits) - 1
        root = codec.head_dim_of(shapes[side][0][-1]) ** 0.5
        typical = {"scale": root, "residual": 0.18 / root, "zero": levels / 2}
        if codec.family == "affine":
            typical["scale"] = 6 / levels
        meta = torch.rand(shape, device=device) * 0.2 + 0.9
        meta *= torch.tensor([typical[name] for name in codec.meta], device=device)
        scales.append(meta.to(getattr(torch, dtype)))
    return (*codes, *scales)  # type: ignore[return-value]


def _arguments(spec: CacheSpec, caches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Caches as kernels take them: a tensor's scale, here 1, in the place of its metas."""
    fmt = spec.cache_format
    ones = torch.ones(1, device=caches[0].device)
    metas = zip((fmt.key, fmt.value), caches[2:], strict=True)
    return [*caches[:2], *(ones if codec.tensor_scale else meta for codec, meta in metas)]


def _window(spec: CacheSpec, batch: int, device: torch.device) -> list[torch.Tensor]:
    """Random rows of a window, a ring for each sequence; nothing without a window."""
    if not spec.window:
        return []
    dims = (spec.head_dim, spec.value_dim)
    dtype = getattr(torch, spec.dtype)
    return [
        *(
            torch.randn(batch, spec.window, spec.num_kv_heads, dim, device=device).to(dtype)
            for dim in dims
        ),
        torch.randperm(batch, device=device).int(),
    ]


def _table(workload: Workload, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A permuted block table and full lengths."""
    shape = workload.shape
    pages = torch.randperm(shape["pages"], device=device).int()
    table = pages[: shape["batch"] * shape["table_width"]].view(shape["batch"], -1).contiguous()
    context = shape["table_width"] * workload.cache_spec.page_size
    return table, torch.full((shape["batch"],), context, dtype=torch.int32, device=device)


def make_case(workload: Workload, device: torch.device, seed: int = 0) -> Case:
    """Inputs of a workload on a device."""
    torch.manual_seed(seed)
    makers = {
        "rotate": _rotate,
        "fill": _fill,
        "flatten": _flatten,
        "decode": _decode,
        "attend": _attend,
        "prefill": _attend,
        "mla": _mla,
    }
    return makers[workload.kernel](workload, device)


def _rotate(workload: Workload, device: torch.device) -> Case:
    spec = workload.spec.rotation
    dtype = getattr(torch, spec.dtype)
    x = torch.randn(workload.shape["n"], spec.dim, device=device).to(dtype)
    y = torch.empty_like(x)

    def check() -> float:
        rows = slice(None, None, max(1, len(x) // _CHECKED_TOKENS))
        return _relative("rotate", y[rows], reference.hadamard_rotate(x[rows]))

    def poison() -> None:
        y.fill_(float("nan"))

    return Case(lambda launch: [x, y], poison, check)


def _fill(workload: Workload, device: torch.device) -> Case:
    spec, tokens = workload.cache_spec, workload.shape["tokens"]
    dtype = getattr(torch, spec.dtype)
    k, v = (
        torch.randn(tokens, spec.num_kv_heads, dim, device=device).to(dtype)
        for dim in (spec.head_dim, spec.value_dim)
    )
    caches = [
        torch.empty(shape, dtype=getattr(torch, name), device=device)
        for shape, name in spec.tensor_shapes(workload.shape["pages"]).values()
    ]
    if workload.function == "fill_slots":
        capacity = workload.shape["pages"] * spec.page_size
        slots = torch.randperm(capacity, device=device)[:tokens]
        where = [slots]
    else:
        table, lengths = _table(workload, device)
        starts = torch.arange(len(lengths) + 1, device=device).int() * lengths[0].item()
        starts = starts.int()
        slots = reference.token_slots(table, lengths, starts, spec.page_size)
        where = [table, lengths, starts, *_window(spec, len(lengths), device)]

    def poison() -> None:
        for cache in caches:
            cache.fill_(_SENTINEL if cache.dtype == torch.uint8 else float("nan"))

    def check() -> float:
        chosen = torch.arange(0, tokens, max(1, tokens // _CHECKED_TOKENS), device=device)
        at, offset = slots[chosen] // spec.page_size, slots[chosen] % spec.page_size
        worst = 0.0
        fmt = spec.cache_format
        for rows, codec, cache, meta in (
            (k, fmt.key, caches[0], caches[2]),
            (v, fmt.value, caches[1], caches[3]),
        ):
            if spec.layout == "bhsd":
                cache, meta = cache.transpose(1, 2), meta.transpose(1, 2)
            rotated = reference.rotate_rows(rows[chosen], fmt.rotation)
            packed, scales = reference.encode_rows(
                rotated, codec, fmt.scale_rule, dtype=cache.dtype
            )
            if not codec.packed:
                worst = max(worst, _relative("fill", cache[at, offset], packed.float()))
                continue
            got = reference.unpack_codes(cache[at, offset], *codec.plane_bits)
            differ = got != reference.unpack_codes(packed, *codec.plane_bits)
            ties = reference.boundary_distance(rotated, codec) <= _TIE
            if codec.tensor_scale and fmt.rotation != "none":
                # Sums of another order round to the neighbouring code.
                ties |= (got.int() - reference.unpack_codes(packed, 8).int()).abs() <= 1
            if bool((differ & ~ties).any()):
                raise WrongResultError(f"fill: codes of {codec.name} must equal the reference's")
            if codec.meta:
                worst = max(worst, _relative("fill scales", meta[at, offset], scales))
        return worst

    return Case(lambda launch: [k, v, *_arguments(spec, caches), *where], poison, check)


def _flatten(workload: Workload, device: torch.device) -> Case:
    spec, tokens = workload.cache_spec, workload.shape["tokens"]
    dtype = getattr(torch, spec.dtype)
    caches = _random_caches(spec, workload.shape["pages"], device)
    table, lengths = _table(workload, device)
    starts = (lengths.cumsum(0) - lengths).int()
    out = [
        torch.empty(tokens, spec.num_kv_heads, dim, dtype=dtype, device=device)
        for dim in (spec.head_dim, spec.value_dim)
    ]

    def poison() -> None:
        for tensor in out:
            tensor.fill_(float("nan"))

    def check() -> float:
        worst = 0.0
        for b in {0, len(lengths) - 1}:
            begin, count = int(starts[b]), int(lengths[b])
            want = reference.sequence_rows(spec, *caches, table[b], count)
            for got, rows in zip(out, want, strict=True):
                if workload.function == "flatten_unrotated":
                    rows = reference.rotate_back(rows, spec.cache_format.rotation)
                worst = max(worst, _relative("flatten", got[begin : begin + count], rows))
        return worst

    arguments = [*_arguments(spec, caches), table, lengths, starts, *out]
    return Case(lambda launch: arguments, poison, check)


def _decode(workload: Workload, device: torch.device) -> Case:
    spec, batch = workload.cache_spec, workload.shape["batch"]
    dtype = getattr(torch, spec.dtype)
    caches = _random_caches(spec, workload.shape["pages"], device)
    table, lengths = _table(workload, device)
    q = torch.randn(batch, spec.num_q_heads, spec.head_dim, device=device).to(dtype)
    out = torch.empty(batch, spec.num_q_heads, spec.value_dim, dtype=dtype, device=device)
    window = _window(spec, batch, device)
    scale = spec.head_dim**-0.5
    context = int(lengths[0])

    def arguments(launch: dict[str, int]) -> list:
        parts = num_parts(spec, batch, context, launch, processors(device))
        floats = workspace_floats(spec, batch, parts, launch)
        workspace = torch.full((floats,), float("nan"), device=device)
        inputs = [q, *_arguments(spec, caches), table, lengths, *window]
        return [*inputs, workspace, out, parts, scale]

    def check() -> float:
        chosen = sorted({0, batch - 1})[:_CHECKED_SEQUENCES]
        want = reference.paged_decode(
            spec, q[chosen], *caches, table[chosen], lengths[chosen], sm_scale=scale,
            window=(window[0], window[1], window[2][chosen]) if window else None,
        )  # fmt: skip
        return _relative("decode", out[chosen], want)

    def poison() -> None:
        out.fill_(float("nan"))

    return Case(arguments, poison, check)


def _mla(workload: Workload, device: torch.device) -> Case:
    spec, batch = workload.cache_spec, workload.shape["batch"]
    dtype = getattr(torch, spec.dtype)
    caches = _random_caches(spec, workload.shape["pages"], device)
    table, lengths = _table(workload, device)
    q_latent, q_rope = (
        torch.randn(batch, spec.num_q_heads, dim, device=device).to(dtype)
        for dim in (spec.head_dim, spec.value_dim)
    )
    out = torch.empty_like(q_latent)
    lse = torch.empty(batch, spec.num_q_heads, device=device)
    scale = (spec.head_dim + spec.value_dim) ** -0.5
    context = int(lengths[0])

    def arguments(launch: dict[str, int]) -> list:
        parts = mla_parts(spec, batch, context, launch, processors(device))
        floats = mla_floats(spec, batch, parts, launch)
        workspace = torch.full((floats,), float("nan"), device=device)
        inputs = [q_latent, q_rope, *_arguments(spec, caches), table, lengths]
        return [*inputs, workspace, out, lse, parts, scale]

    def check() -> float:
        chosen = sorted({0, batch - 1})[:_CHECKED_SEQUENCES]
        want, want_lse = reference.paged_mla(
            spec, q_latent[chosen], q_rope[chosen], *caches, table[chosen], lengths[chosen],
            sm_scale=scale,
        )  # fmt: skip
        worst = _relative("mla", out[chosen], want)
        return max(worst, _lse_error("mla", lse[chosen], want_lse, dtype))

    def poison() -> None:
        out.fill_(float("nan"))
        lse.fill_(float("nan"))

    return Case(arguments, poison, check)


def _lse_error(name: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference: an error of lse is one of all weights."""
    off = (got - want).abs().max().item()
    if not off <= _tolerance(dtype):
        raise WrongResultError(
            f"{name}: error of lse must be at most {_tolerance(dtype)}, got {off}"
        )
    return off


def _attend(workload: Workload, device: torch.device) -> Case:
    """As many new tokens of each sequence; no feature is asked for but lse."""
    spec, batch, tokens = workload.cache_spec, workload.shape["batch"], workload.shape["tokens"]
    dtype = getattr(torch, spec.dtype)
    caches = _random_caches(spec, workload.shape["pages"], device)
    table, lengths = _table(workload, device)
    q = torch.randn(tokens, spec.num_q_heads, spec.head_dim, device=device).to(dtype)
    new = tokens // batch
    starts = (torch.arange(batch + 1, device=device) * new).int()
    out = torch.empty(tokens, spec.num_q_heads, spec.value_dim, dtype=dtype, device=device)
    lse = torch.empty(tokens, spec.num_q_heads, device=device)
    none = torch.empty(0, device=device)
    window = _window(spec, batch, device)
    scale = spec.head_dim**-0.5
    context = int(lengths[0])

    def arguments(launch: dict[str, int]) -> list:
        inputs = [q, *_arguments(spec, caches), table, lengths, starts, none, none, *window]
        numbers = [scale, 0.0, -1, 0]
        if workload.function == "prefill":
            parts = prefill_parts(spec, tokens, context, launch, processors(device))
            return [*inputs, out, lse, parts, *numbers]
        parts = attend_parts(spec, tokens, batch, context, launch, processors(device), new)
        floats = attend_floats(spec, tokens, parts, launch)
        workspace = torch.full((floats,), float("nan"), device=device)
        return [*inputs, workspace, out, lse, parts, *numbers]

    def check() -> float:
        worst = 0.0
        for b in sorted({0, batch - 1})[:_CHECKED_SEQUENCES]:
            # The newest tokens of a chunk: all logits of a long one would not fit.
            last = min(new, _CHECKED_QUERIES)
            own = slice((b + 1) * new - last, (b + 1) * new)
            want, want_lse = reference.paged_attend(
                spec, q[own], *caches, table[b : b + 1], lengths[b : b + 1], sm_scale=scale,
                cu_seqlens_q=starts.new_tensor([0, last]),
                window=(window[0], window[1], window[2][b : b + 1]) if window else None,
            )  # fmt: skip
            worst = max(worst, _relative(workload.function, out[own], want))
            _lse_error(workload.function, lse[own], want_lse, dtype)
        return worst

    def poison() -> None:
        out.fill_(float("nan"))
        lse.fill_(float("nan"))

    return Case(arguments, poison, check)
