"""``rotate``: the torch call `hadamard_rotate`."""

from __future__ import annotations

from typing import Any

import torch

from tq_tvm.artifacts import LoadedFunction, load
from tq_tvm.ops import _check
from tq_tvm.ops._library import REFUSALS, call_again, destination_op
from tq_tvm.served import check_target
from tq_tvm.spec import RotateSpec

__all__ = ["hadamard_rotate"]

_OP = "hadamard_rotate"
_loaded: dict[tuple, LoadedFunction] = {}


def hadamard_rotate(x: Any, *, out: Any = None) -> Any:
    """Rotate rows: ``out = x H / sqrt(D)``, H a symmetric Hadamard matrix. It is its own inverse.

    H is the Walsh-Hadamard matrix of a power of two, see `tq_tvm.formats.hadamard_factors` for the
    others. Formats of signed rotation multiply by `tq_tvm.formats.rotation_signs` before it.

    Parameters
    ----------
    x
        ``[..., D]``, contiguous, float16 or bfloat16 (on the CPU also float32), D a power of two
        from 64 to 4096, or 80, 96, 112, 192 or 576. A torch tensor, or any object with
        ``__dlpack__``.
    out
        Where the result goes: shape, dtype and device of ``x``. It may be ``x`` itself, not a
        tensor that overlaps it otherwise.

    Returns
    -------
    ``out``, or a new tensor.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape, stride, alignment (16 bytes) or device.
    UnsupportedSpecError
        No kernel is generated for this D.
    ArtifactNotFoundError, ArtifactCorruptError
        No library serves the call.

    Notes
    -----
    One launch on torch's current stream; for rows ``[N, D]`` the host makes no views. It can be
    captured in a CUDA graph after one call outside of it; with ``out`` nothing is allocated. There
    is no gradient.

    Any library of D and the dtype serves: of caches, which have D up to 512, or of the rotation
    alone, as ``tq-tvm build --spec rotate_d1024_bf16`` builds it.

    Examples
    --------
    >>> x = torch.randn(4, 8, 128)
    >>> torch.allclose(hadamard_rotate(hadamard_rotate(x)), x, atol=1e-5)
    True
    """
    source = _check.as_tensor(_OP, "x", x)
    result = torch.empty_like(source) if out is None else _check.as_tensor(_OP, "out", out)
    _rotate(source, result)
    return result if out is None else out


@destination_op("rotate", mutates=["out"])
def _rotate(x: torch.Tensor, out: torch.Tensor) -> None:
    shape = x.shape
    key = (shape[-1:], x.dtype, x.device)
    loaded = _loaded.get(key)
    # The kernel takes rows, and views of them cost an eighth of the call.
    as_rows = len(shape) == 2
    if (
        loaded is None
        or not x.is_cuda
        or shape != out.shape
        or not (as_rows or (x.is_contiguous() and out.is_contiguous()))
        or _check.suspect_rows(x, out, compact=True)
    ):
        _check_arguments(x, out)
    size = x.numel()
    if size == 0:
        return
    if loaded is None:
        spec = RotateSpec(shape[-1], _check.dtype_name(x.dtype))
        loaded = _loaded[key] = load("rotate", spec, x.device)
    variant = loaded.nearest(size)
    try:
        if as_rows:
            variant.call(x, out)
        else:
            variant.call(x.view(-1, shape[-1]), out.view(-1, shape[-1]))
    except REFUSALS:
        call_again(loaded, variant, _check_arguments(x, out))


def _check_arguments(x: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    tensors = {"x": x, "out": out}
    _check.check_device(_OP, tensors)
    _check.check_model_dtype(_OP, "x", x)
    if x.ndim == 0:
        _check.fail(_OP, "x", "of shape [..., D]", "a scalar", "pass rows")
    dim = x.shape[-1]
    spec = _check.make_spec(_OP, RotateSpec, dim=dim, dtype=_check.dtype_name(x.dtype))
    check_target(_OP, spec, "cuda" if x.is_cuda else "llvm")
    _check.check_dtype(_OP, "out", out, x.dtype)
    _check.check_shape(_OP, "out", out, "that of x", x.shape)
    for name, tensor in tensors.items():
        _check.check_compact(_OP, name, tensor)
        _check.check_alignment(_OP, name, tensor, 16)
    if x.numel() and 0 < abs(x.data_ptr() - out.data_ptr()) < x.nbytes:
        actual = f"a start {out.data_ptr() - x.data_ptr()} bytes after it"
        _check.fail(_OP, "out", "x itself or apart from it", actual, "pass another tensor")
    return tuple(_check.canonical(tensor.view(-1, dim)) for tensor in tensors.values())
