"""`merge_attention_states`: attention over two sets of tokens from that over each."""

from __future__ import annotations

from typing import Any

import torch

from tq_tvm.ops import _check

__all__ = ["merge_attention_states"]

_OP = "merge_attention_states"
_NAMES = ("out_a", "lse_a", "out_b", "lse_b")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def merge_attention_states(
    out_a: Any, lse_a: Any, out_b: Any, lse_b: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the same queries over the union of two disjoint sets of tokens.

    With weights w = exp(lse - log(exp(lse_a) + exp(lse_b))) the output is w_a out_a + w_b out_b:
    a shared prefix and the rest (cascade), or tokens of two devices (context parallelism). Merging
    more than two is calling it again, in any order.

    Parameters
    ----------
    out_a, out_b
        ``[..., DV]``, both float16, bfloat16 or float32: what `paged_decode` returns.
    lse_a, lse_b
        ``[...]`` float32: natural logarithms of the sums of exponentials, as ``return_lse`` gives
        them. (FlashInfer's are of base 2: multiply them by log(2).) Where one is -inf that side had
        no tokens, and its output must be finite; where both are, the result is 0 and -inf.

    Returns
    -------
    The output, of the dtype of ``out_a``, and its lse, float32. Sums are float32.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        A wrong dtype, shape or device.

    Notes
    -----
    Some element-wise torch operations on the current stream: it can be captured in a CUDA graph,
    traced by ``torch.compile`` and differentiated. A sink takes part once: pass ``sinks`` to one of
    the two calls alone.

    Examples
    --------
    >>> one = torch.ones(1, 2), torch.zeros(1)
    >>> out, lse = merge_attention_states(*one, 3 * one[0], one[1])
    >>> out.tolist(), lse.exp().tolist()
    ([[2.0, 2.0]], [2.0])
    """
    out_a, lse_a, out_b, lse_b = _check.as_tensors(_OP, _NAMES, (out_a, lse_a, out_b, lse_b))
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if tensor.device != out_a.device:
            expected = f"on {out_a.device} like out_a"
            _check.fail(_OP, name, expected, tensor.device, "move it there")
    _check.check_dtype(_OP, "out_a", out_a, *_FLOATS)
    _check.check_dtype(_OP, "out_b", out_b, out_a.dtype)
    if out_a.ndim == 0:
        _check.fail(_OP, "out_a", "of shape [..., DV]", [], "pass rows of values")
    _check.check_shape(_OP, "out_b", out_b, "[..., DV] like out_a", out_a.shape)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _check.check_dtype(_OP, name, lse, torch.float32)
        _check.check_shape(_OP, name, lse, "[...] of out_a", out_a.shape[:-1])
    top = torch.maximum(lse_a, lse_b)
    # Any finite number will do where both are -inf.
    base = torch.where(top == -torch.inf, 0, top)
    weight_a, weight_b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = weight_a + weight_b
    inverse = torch.where(total > 0, 1 / total, total)
    out = torch.addcmul(
        (weight_a * inverse).unsqueeze(-1) * out_a, (weight_b * inverse).unsqueeze(-1), out_b
    )
    return out.to(out_a.dtype), base + torch.log(total)
