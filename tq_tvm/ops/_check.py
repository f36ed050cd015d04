"""Checks of arguments: one function for each kind, none of which waits for the GPU.

Messages follow ``<operation>: <argument> must be <expected>, got <actual>; <what to do>``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from tq_tvm.errors import ArgumentTypeError, ArgumentValueError, UnsupportedSpecError
from tq_tvm.formats import CODECS, POLICIES
from tq_tvm.spec import (
    FORMATS,
    LAYOUTS,
    CacheFormat,
    CacheSpec,
    Codec,
    QuantPolicy,
    RotateSpec,
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
    "canonical",
    "check_alignment",
    "check_apart",
    "check_compact",
    "check_device",
    "check_dtype",
    "check_index",
    "check_last_axis",
    "check_layout",
    "check_model_dtype",
    "check_shape",
    "check_spec",
    "check_strided",
    "check_table_arguments",
    "codecs_of",
    "dtype_name",
    "fail",
    "format_of",
    "given",
    "make_spec",
    "suspect_rows",
    "tensor_scales",
]

_Spec = TypeVar("_Spec", CacheSpec, RotateSpec)

CACHE_NAMES = ("k_cache", "v_cache", "k_meta", "v_meta")
SCALE_NAMES = ("k_scale", "v_scale")
WINDOW_NAMES = ("k_window", "v_window", "window_slots")


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
        if not isinstance(value, Tensor):
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
        return POLICIES[policy]
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


def suspect_rows(
    first: torch.Tensor, second: torch.Tensor, *, compact: bool = False, apart: bool = False
) -> bool:
    """Whether the checks of rows of 2-byte values may refuse what a kernel of a GPU would not.

    Parameters
    ----------
    compact
        The rows are compact, which the kernel checks itself, and do not overlap.
    apart
        They are not the same either.
    """
    try:
        start, other = first.data_ptr(), second.data_ptr()
        if (start | other) & 15 or first.is_neg() or second.is_neg():
            return True
        if not compact:
            steps = first.stride()[0] | second.stride()[0]
            return steps & 7 != 0 or (apart and start == other)
        if start == other:
            return apart
        return -second.nbytes < start - other < first.nbytes
    except (IndexError, RuntimeError):  # a scalar, a tensor without memory
        return True


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
