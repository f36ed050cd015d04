"""Checks of arguments: one function for each kind, none of which waits for the GPU.

Messages follow ``<operation>: <argument> must be <expected>, got <actual>; <what to do>``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import torch

from tq_tvm.errors import ArgumentTypeError, ArgumentValueError, UnsupportedSpecError
from tq_tvm.formats import CODECS, POLICIES
from tq_tvm.spec import (
    FORMATS,
    HEAD_DIMS,
    LAYOUTS,
    CacheFormat,
    CacheSpec,
    Codec,
    QuantPolicy,
    RotateSpec,
    check_target,
    get_format,
)

__all__ = [
    "CACHE_NAMES",
    "SCALE_NAMES",
    "WINDOW_NAMES",
    "Scales",
    "as_integer",
    "as_number",
    "as_policy",
    "as_scale",
    "as_tensor",
    "as_tensors",
    "as_window",
    "cache_spec",
    "canonical",
    "check_alignment",
    "check_apart",
    "check_caches",
    "check_compact",
    "check_device",
    "check_dtype",
    "check_index",
    "check_last_axis",
    "check_layout",
    "check_model_dtype",
    "check_scales",
    "check_shape",
    "check_spec",
    "check_strided",
    "check_table_arguments",
    "check_window",
    "codecs_of",
    "dtype_name",
    "fail",
    "format_of",
    "given",
    "kernel_caches",
    "make_spec",
    "suspect_caches",
    "suspect_rows",
    "tensor_scales",
]

_Spec = TypeVar("_Spec", CacheSpec, RotateSpec)

CACHE_NAMES = ("k_cache", "v_cache", "k_meta", "v_meta")
SCALE_NAMES = ("k_scale", "v_scale")
WINDOW_NAMES = ("k_window", "v_window", "window_slots")

_PAGE_STRIDES = 1 << 31
"""Strides of pages, in elements, are below this: kernels may keep them in 31 bits."""


def fail(op: str, argument: str, expected: str, actual: object, todo: str) -> NoReturn:
    """Raise an `ArgumentValueError` in the one form of messages."""
    raise ArgumentValueError(f"{op}: {argument} must be {expected}, got {actual}; {todo}")


def as_tensor(op: str, name: str, value: Any) -> torch.Tensor:
    """Return a torch tensor as it is, any other object with ``__dlpack__`` as one on its memory."""
    if isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    raise ArgumentTypeError(
        f"{op}: {name} must be a torch tensor or an object with __dlpack__, "
        f"got {type(value).__name__}; convert it first"
    )


def as_tensors(op: str, names: Sequence[str], values: Sequence[Any]) -> Sequence[torch.Tensor]:
    """`as_tensor` of several arguments."""
    for value in values:
        if not isinstance(value, torch.Tensor):
            return [as_tensor(op, n, v) for n, v in zip(names, values, strict=True)]
    return values


def given(names: Sequence[str], tensors: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Optional tensors that are not None, by name."""
    for tensor in tensors:
        if tensor is not None:
            break
    else:
        return {}
    return {n: t for n, t in zip(names, tensors, strict=True) if t is not None}


def as_integer(op: str, name: str, value: Any, least: int = 0) -> int:
    """Return an integer of any type, at least ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(
            f"{op}: {name} must be an integer, got {value!r}; convert it"
        ) from None
    if number < least:
        fail(op, name, f"at least {least}", number, "pass a size")
    return number


def as_number(op: str, name: str, value: Any) -> float:
    """Return a number of any type; text is none."""
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several numbers
        pass
    raise ArgumentTypeError(f"{op}: {name} must be a number, got {value!r}; convert it")


def as_policy(op: str, policy: Any) -> str:
    """Return a name of a cache format that is given by number, name or itself.

    This and `codecs_of` are what torch.compile traces of a format, so they do without caches.
    """
    if type(policy) in (int, QuantPolicy) and policy in POLICIES:
        return POLICIES[QuantPolicy(policy)]
    if isinstance(policy, CacheFormat):
        return policy.slug
    return policy if isinstance(policy, str) else format_of(op, policy).name


def codecs_of(op: str, policy: str) -> tuple[Codec, Codec]:
    """Return the codecs of a format by its name."""
    if policy in FORMATS:
        return FORMATS[policy].key, FORMATS[policy].value
    names = policy.split("-")[:2]
    if len(names) < 2 or names[0] not in CODECS or names[1] not in CODECS:
        format_of(op, policy)
    return CODECS[names[0]], CODECS[names[1]]


def format_of(op: str, policy: Any) -> CacheFormat:
    """Return a cache format by its name."""
    try:
        return get_format(policy)
    except UnsupportedSpecError as error:
        message = str(error).removeprefix("get_format: name ")
        raise UnsupportedSpecError(f"{op}: policy {message}; name a format") from None


def as_scale(op: str, name: str, value: Any, device: torch.device) -> torch.Tensor | None:
    """Return the scale of a whole cache tensor; a number becomes a float32 tensor ``[1]``."""
    if value is None:
        return None
    if hasattr(value, "__dlpack__"):
        return as_tensor(op, name, value)
    return torch.full((1,), as_number(op, name, value), dtype=torch.float32, device=device)


Scales = tuple[torch.Tensor | None, torch.Tensor | None]


def tensor_scales(op: str, policy: str, given: Scales, device: torch.device) -> Scales:
    """The scales of a format's tensors: 1 where a codec has one and none is given."""
    codecs = codecs_of(op, policy)
    k_scale, v_scale = given
    if k_scale is v_scale is None and not (codecs[0].tensor_scale or codecs[1].tensor_scale):
        return given
    scales = []
    for name, codec, scale in zip(SCALE_NAMES, codecs, given, strict=True):
        if scale is not None and not codec.tensor_scale:
            fail(op, name, "None for a format whose rows have scales", "one", "leave it out")
        if scale is None and codec.tensor_scale:
            scale = torch.ones(1, dtype=torch.float32, device=device)
        scales.append(scale)
    return scales[0], scales[1]


def as_window(op: str, window: Any) -> tuple[torch.Tensor | None, ...]:
    """Return the three tensors of a window, or None for each."""
    if window is None:
        return None, None, None
    try:
        k_window, v_window, window_slots = window
    except (TypeError, ValueError):
        actual = f"{len(window)} of them" if hasattr(window, "__len__") else type(window).__name__
        fail(op, "window", "three tensors", actual, "pass k_window, v_window and window_slots")
    return tuple(as_tensors(op, WINDOW_NAMES, (k_window, v_window, window_slots)))


def check_layout(op: str, layout: Any) -> None:
    """Check the name of an axis order."""
    if layout not in LAYOUTS:
        fail(op, "layout", " or ".join(map(repr, LAYOUTS)), repr(layout), "name the axis order")


def check_strided(op: str, name: str, tensor: torch.Tensor) -> None:
    """Check that values lie in memory at strides."""
    if tensor.layout is not torch.strided:
        fail(op, name, "strided", tensor.layout, "convert it with to_dense()")


def check_device(op: str, tensors: dict[str, torch.Tensor]) -> torch.device:
    """Check that all tensors are in the memory of one device, a GPU or the CPU; return it."""
    name, first = next(iter(tensors.items()))
    if first.device.type not in ("cpu", "cuda"):
        fail(op, name, "on an NVIDIA GPU or the CPU", first.device, "move all arguments there")
    for other, tensor in tensors.items():
        if tensor.device != first.device:
            fail(op, other, f"on {first.device} like {name}", tensor.device, "move it there")
        check_strided(op, other, tensor)
        if tensor.is_neg():
            todo = "call resolve_neg() first"
            fail(op, other, "free of torch's negative bit", "a view with it", todo)
    return first.device


def check_dtype(op: str, name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """Check that the dtype is one of ``allowed``."""
    if tensor.dtype not in allowed:
        expected = " or ".join(map(dtype_name, allowed))
        raise ArgumentTypeError(
            f"{op}: {name} must be {expected}, got {dtype_name(tensor.dtype)}; convert it"
        )


def check_model_dtype(op: str, name: str, tensor: torch.Tensor) -> None:
    """Check that kernels are generated for the dtype on the tensor's device."""
    if tensor.device.type == "cpu":
        check_dtype(op, name, tensor, torch.float16, torch.bfloat16, torch.float32)
    else:
        check_dtype(op, name, tensor, torch.float16, torch.bfloat16)


def check_shape(
    op: str, name: str, tensor: torch.Tensor, symbols: str, expected: Sequence[int | None]
) -> None:
    """Check for the shape ``expected``, where None admits any extent; ``symbols`` spells it."""
    shape = tensor.shape
    if len(shape) != len(expected) or any(
        e is not None and e != s for e, s in zip(expected, shape, strict=True)
    ):
        extents = ", ".join("any" if e is None else str(e) for e in expected)
        fail(
            op,
            name,
            f"of shape {symbols} = [{extents}]",
            list(shape),
            "pass a tensor of that shape",
        )


def check_last_axis(op: str, name: str, tensor: torch.Tensor) -> None:
    """Check that values along the last axis are adjacent."""
    if tensor.numel() and tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        fail(
            op,
            name,
            "contiguous along its last axis",
            f"strides {list(tensor.stride())}",
            "pass a tensor of that layout",
        )


def check_compact(op: str, name: str, tensor: torch.Tensor, first: int = 0) -> None:
    """Check that axes from ``first`` on are compact; strides of those before are free."""
    check_last_axis(op, name, tensor)
    if tensor.numel() == 0:
        return
    expected = 1
    for axis in range(tensor.ndim - 1, first - 1, -1):
        if tensor.shape[axis] > 1 and tensor.stride(axis) != expected:
            what = "contiguous" if first == 0 else f"contiguous inside axis {first - 1}"
            fail(
                op,
                name,
                what,
                f"shape {list(tensor.shape)} with strides {list(tensor.stride())}",
                "pass a tensor of that layout",
            )
        expected *= tensor.shape[axis]


def check_alignment(
    op: str, name: str, tensor: torch.Tensor, bytes_: int, free_axes: int = 0
) -> None:
    """Check the address, and the steps along the first ``free_axes`` axes, for alignment."""
    if tensor.numel() == 0:
        return
    todo = f"start it at a multiple of {bytes_} bytes"
    if tensor.data_ptr() % bytes_:
        fail(op, name, f"aligned to {bytes_} bytes", f"address {tensor.data_ptr():#x}", todo)
    for axis in range(free_axes):
        step = tensor.stride(axis) * tensor.element_size()
        if tensor.shape[axis] > 1 and step % bytes_:
            what = f"aligned to {bytes_} bytes at every index of axis {axis}"
            fail(op, name, what, f"a stride of {step} bytes", "pad the stride")


def check_apart(op: str, tensors: dict[str, torch.Tensor]) -> None:
    """Check that rows written into one tensor are in no other one, nor in another row of it.

    The tensors are compact but for the stride of their first axis. Rows of one may lie between
    those of another, as in slices of a fused buffer.
    """
    spans: list[tuple[str, int, int, int, int]] = []
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        row = tensor.numel() // tensor.shape[0] * tensor.element_size()
        step = tensor.stride(0) * tensor.element_size() if tensor.shape[0] > 1 else row
        if step < row:
            fail(op, name, f"of rows {row} bytes apart", f"a stride of {step} bytes", "copy it")
        start = tensor.data_ptr()
        end = start + (tensor.shape[0] - 1) * step + row
        for other, other_start, other_end, other_step, other_row in spans:
            if end <= other_start or other_end <= start:
                continue
            ahead = (start - other_start) % step
            if step != other_step or ahead < other_row or step - ahead < row:
                actual = f"a start {start - other_start} bytes after it"
                fail(op, name, f"apart from {other}", actual, "pass another tensor")
        spans.append((name, start, end, step, row))


def canonical(tensor: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Give axes from ``first`` on that have size 1 the strides of a compact tensor.

    Such an axis may have any stride in torch; a kernel insists on the compact one.
    """
    strides = list(tensor.stride())
    expected = 1
    for axis in range(tensor.ndim - 1, first - 1, -1):
        strides[axis] = expected
        expected *= tensor.shape[axis]
    if strides == list(tensor.stride()):
        return tensor
    return tensor.as_strided(tensor.shape, strides)


def check_spec(op: str, spec: Any) -> None:
    """Check the type of a spec."""
    if not isinstance(spec, CacheSpec):
        raise ArgumentTypeError(
            f"{op}: spec must be a CacheSpec, got {type(spec).__name__}; make one of the sizes"
        )


def make_spec(op: str, kind: type[_Spec], **fields: Any) -> _Spec:
    """Make the spec of a call; one without kernels is an error that names the operation."""
    try:
        return kind(**fields)
    except UnsupportedSpecError as error:
        message = str(error).removeprefix(f"{kind.__name__}: ")
        raise UnsupportedSpecError(f"{op}: {message}; no kernel is generated for that") from error


def cache_spec(
    op: str,
    function: str,
    k_cache: torch.Tensor,
    dims: tuple[int, int],
    num_q_heads: int | None,
    dtype: torch.dtype,
    layout: str,
    policy: str,
    k_window: torch.Tensor | None = None,
) -> CacheSpec:
    """Derive the spec from the key cache and the model's rows, and refuse one without kernels.

    Parameters
    ----------
    function
        The function of a library that is going to be called.
    dims
        D and DV; a DV that no row can have stands for D.
    num_q_heads
        None stands for the number of KV heads, where queries do not matter.
    k_window
        Its second axis is the window.
    """
    check_layout(op, layout)
    fmt = format_of(op, policy)
    if k_cache.ndim != 4:
        axes = "P, PS, HK" if layout == "bshd" else "P, HK, PS"
        symbols = f"[{axes}, {_columns(fmt.key)}]"
        check_shape(op, "k_cache", k_cache, symbols, (None,) * 4)
    if k_window is not None and (k_window.ndim != 4 or k_window.shape[1] == 0):
        check_shape(op, "k_window", k_window, "[S, N, HK, D], N from 1", (None,) * 4)
        fail(op, "k_window", "of shape [S, N, HK, D], N from 1", list(k_window.shape), "enlarge it")
    page_size, heads = k_cache.shape[1:3] if layout == "bshd" else k_cache.shape[1:3][::-1]
    head_dim, head_dim_v = dims
    spec = make_spec(
        op,
        CacheSpec,
        head_dim=head_dim,
        num_q_heads=heads if num_q_heads is None else num_q_heads,
        num_kv_heads=heads,
        page_size=page_size,
        dtype=dtype_name(dtype),
        layout=layout,
        format=fmt.name,
        head_dim_v=head_dim_v if head_dim_v in HEAD_DIMS else None,
        window=0 if k_window is None else k_window.shape[1],
    )
    if k_cache.is_cuda:
        check_target(op, spec, "cuda", function)
    return spec


def _columns(codec: Codec, dim: str = "D") -> str:
    """The last axis of a cache tensor in symbols."""
    names = {2: f"{dim}/4", 3: f"3{dim}/8", 4: f"{dim}/2"}
    return names.get(codec.bits, dim) if codec.packed else dim


def check_caches(
    op: str, spec: CacheSpec, caches: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Check the four cache tensors; return them with `canonical` strides."""
    caches = tuple(caches)
    inner = "PS, HK" if spec.layout == "bshd" else "HK, PS"
    shapes = spec.tensor_shapes(caches[0].shape[0])
    fmt = spec.cache_format
    dim = "D" if spec.head_dim_v is None else "DV"
    symbols = (
        _columns(fmt.key), _columns(fmt.value, dim), len(fmt.key.meta), len(fmt.value.meta)
    )  # fmt: skip
    for name, last, tensor in zip(CACHE_NAMES, symbols, caches, strict=True):
        shape, dtype = shapes[name]
        check_dtype(op, name, tensor, getattr(torch, dtype))
        check_shape(op, name, tensor, f"[P, {inner}, {last}]", shape)
        check_compact(op, name, tensor, first=1)
        # Codes are read 16 bytes at a time, the scales of a row as words.
        aligned = 16 if name.endswith("cache") else max(4, shape[-1] * tensor.element_size())
        check_alignment(op, name, tensor, aligned, free_axes=1)
        if tensor.shape[0] > 1 and tensor.stride(0) >= _PAGE_STRIDES:
            fail(
                op,
                name,
                f"of a page stride below {_PAGE_STRIDES} elements",
                tensor.stride(0),
                "put the pages closer together",
            )
    return tuple(canonical(tensor, first=1) for tensor in caches)


def kernel_caches(
    caches: tuple[torch.Tensor, ...], scales: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, ...]:
    """The four cache arguments of a kernel: a tensor's scale takes the place of its metas."""
    k_cache, v_cache, k_meta, v_meta = caches
    k_scale, v_scale = scales
    return (
        k_cache,
        v_cache,
        k_meta if k_scale is None else k_scale,
        v_meta if v_scale is None else v_scale,
    )


def check_scales(op: str, scales: dict[str, torch.Tensor]) -> None:
    """Check the scales of whole tensors."""
    for name, scale in scales.items():
        check_index(op, name, scale, "[1]", (1,), torch.float32)


def check_window(
    op: str, spec: CacheSpec, window: dict[str, torch.Tensor], batch: int
) -> tuple[torch.Tensor, ...]:
    """Check the tensors of a window; return them as a kernel takes them."""
    if not window:
        return ()
    rings = window["k_window"].shape[0]
    for name, dim, symbol in (
        ("k_window", spec.head_dim, "D"),
        ("v_window", spec.value_dim, "D" if spec.head_dim_v is None else "DV"),
    ):
        tensor = window[name]
        check_dtype(op, name, tensor, getattr(torch, spec.dtype))
        shape = (rings, spec.window, spec.num_kv_heads, dim)
        check_shape(op, name, tensor, f"[S, N, HK, {symbol}]", shape)
        check_compact(op, name, tensor)
        check_alignment(op, name, tensor, 16)
    slots = window["window_slots"]
    check_index(op, "window_slots", slots, "[B]", (batch,), torch.int32)
    return window["k_window"], window["v_window"], slots


def check_index(
    op: str,
    name: str,
    tensor: torch.Tensor,
    symbols: str,
    expected: Sequence[int | None],
    dtype: torch.dtype,
) -> None:
    """Check a compact tensor of integers."""
    check_dtype(op, name, tensor, dtype)
    check_shape(op, name, tensor, symbols, expected)
    check_compact(op, name, tensor)
    check_alignment(op, name, tensor, tensor.element_size())


def check_table_arguments(
    op: str, block_table: torch.Tensor, seq_lens: torch.Tensor, batch: int | None = None
) -> None:
    """Check ``block_table`` [B, MB] and ``seq_lens`` [B]; B is ``batch`` if that is given."""
    check_index(op, "block_table", block_table, "[B, MB]", (batch, None), torch.int32)
    check_index(op, "seq_lens", seq_lens, "[B]", (block_table.shape[0],), torch.int32)


def suspect_caches(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_meta: torch.Tensor, v_meta: torch.Tensor
) -> bool:
    """Whether `check_device` or `check_caches` may refuse what a kernel of a GPU would not.

    Scales have 2 bytes there; the kernel compares dtypes itself.
    """
    try:
        code_steps = k_cache.stride(0) | v_cache.stride(0)
        pair_step, own_step = k_meta.stride(0), v_meta.stride(0)
        return bool(
            (k_cache.data_ptr() | v_cache.data_ptr() | code_steps) & 15
            or (k_meta.data_ptr() | v_meta.data_ptr() | 2 * (pair_step | own_step)) & 3
            or (code_steps | pair_step | own_step) >= _PAGE_STRIDES
            or k_meta.is_neg()
            or v_meta.is_neg()
        )
    except (IndexError, RuntimeError):  # a scalar, a tensor without memory
        return True


def suspect_rows(
    first: torch.Tensor, second: torch.Tensor, *, compact: bool = False, apart: bool = False
) -> bool:
    """Whether the checks of rows of 2-byte values may refuse what a kernel of a GPU would not.

    Parameters
    ----------
    compact
        The kernel compares the strides itself.
    apart
        The rows must not be the same; other overlaps are left to `check_apart`.
    """
    try:
        start, other = first.data_ptr(), second.data_ptr()
        return bool(
            (start | other) & 15
            or (not compact and (first.stride(0) | second.stride(0)) & 7)
            or (apart and start == other)
            or first.is_neg()
            or second.is_neg()
        )
    except (IndexError, RuntimeError):  # a scalar, a tensor without memory
        return True


def suspect_window(window: dict[str, torch.Tensor]) -> bool:
    """Whether `check_window` may refuse what a kernel of a GPU would not; nothing is no window."""
    return bool(window) and suspect_rows(window["k_window"], window["v_window"], compact=True)


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
