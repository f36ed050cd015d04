"""A small ragged batch through every operation: what ``compute-sanitizer`` runs."""

from unittest import mock

import torch

from tq_tvm import CacheSpec, PagedKVCache, hadamard_rotate, mla_decode
from tq_tvm.ops import workspace

_LENGTHS = (0, 1, 63, 200)
_FORMATS = ("k4v2", "tq42", "tq33", "int8", "fp8", "none")
_WINDOWS = {"k4v2": 64, "int8": 40}
_LATENTS = "mse4-none-signed-matched"


def main() -> None:
    """Fill, flatten, attend and rotate on the GPU, in formats that have other code."""
    plain = [(name, 0) for name in _FORMATS]
    for name, window in (*plain, *_WINDOWS.items()):
        _run(CacheSpec(128, num_q_heads=32, num_kv_heads=8, format=name, window=window))
    # Rows that tensor cores do not rotate.
    _run(CacheSpec(96, num_q_heads=32, num_kv_heads=8))
    _run(CacheSpec(192, num_q_heads=4, num_kv_heads=1, format="tq43", head_dim_v=128))
    # Two warps have a row's halves.
    _run(CacheSpec(512, num_q_heads=8, num_kv_heads=2, format="tq42"))
    if torch.cuda.get_device_capability() == (9, 0):
        # One block of query heads, whose warpgroups take turns, and two.
        for heads in (16, 128):
            _run_latents(CacheSpec(512, heads, 1, format=_LATENTS, head_dim_v=64))


def _run(spec: CacheSpec) -> None:
    batch, total = len(_LENGTHS), sum(_LENGTHS)
    width = -(-max(_LENGTHS) // spec.page_size)
    cache = PagedKVCache(spec, batch * width, "cuda", sequences=batch if spec.window else 0)
    rings = {"window_slots": torch.randperm(batch, device="cuda").int()} if spec.window else {}
    table = torch.randperm(batch * width, device="cuda").int().view(batch, width)
    lens = torch.tensor(_LENGTHS, dtype=torch.int32, device="cuda")
    starts = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).int()
    k, v = (
        torch.randn(total, spec.num_kv_heads, dim, device="cuda").bfloat16()
        for dim in (spec.head_dim, spec.value_dim)
    )
    cache.fill(k, v, block_table=table, seq_lens=lens, q_start_loc=starts, **rings)
    for rotate_back in (False, True):
        cache.flatten(table, lens, out_tokens=total, rotate_back=rotate_back)
    q = torch.randn(batch, spec.num_q_heads, spec.head_dim, device="cuda").bfloat16()
    slopes = torch.linspace(0, 1, spec.num_q_heads, device="cuda")
    features = {"soft_cap": 30.0, "sinks": slopes, "alibi_slopes": slopes}
    outs = [
        cache.decode(q, table, lens, **rings),
        cache.decode(q, table, lens, window_left=40, **rings),
        cache.decode(q, table, lens, return_lse=True, **features, **rings)[0],
    ]
    # All that a sequence has is new, and then its last token: prefill, for which it is too little
    # to be chosen, and attend.
    for new, chunk in ((lens, True), (lens.clamp_max(1), False)):
        query_starts = torch.cat([new.new_zeros(1), new.cumsum(0)]).int()
        tokens = int(new.sum())
        q = torch.randn(tokens, spec.num_q_heads, spec.head_dim, device="cuda").bfloat16()
        with mock.patch.object(workspace, "prefills", lambda *sizes, chunk=chunk: chunk):
            outs += cache.decode(
                q, table, lens, cu_seqlens_q=query_starts, max_seqlen_q=int(new.max()),
                window_left=40, kept_tokens=3, return_lse=True, **features, **rings,
            )[:1]  # fmt: skip
    hadamard_rotate(k)
    torch.cuda.synchronize()
    print(f"{spec.label} finite:", all(bool(out.isfinite().all()) for out in outs))


def _run_latents(spec: CacheSpec) -> None:
    batch, total = len(_LENGTHS), sum(_LENGTHS)
    width = -(-max(_LENGTHS) // spec.page_size)
    cache = PagedKVCache(spec, batch * width, "cuda")
    table = torch.randperm(batch * width, device="cuda").int().view(batch, width)
    lens = torch.tensor(_LENGTHS, dtype=torch.int32, device="cuda")
    starts = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).int()
    dims = (spec.head_dim, spec.value_dim)
    k, v = (torch.randn(total, 1, dim, device="cuda").bfloat16() for dim in dims)
    cache.fill(k, v, block_table=table, seq_lens=lens, q_start_loc=starts)
    cache.flatten(table, lens, out_tokens=total, rotate_back=True)
    queries = [torch.randn(batch, spec.num_q_heads, dim, device="cuda").bfloat16() for dim in dims]
    out = mla_decode(
        *queries, *cache.tensors(), table, lens, sm_scale=192**-0.5, policy=spec.format
    )
    torch.cuda.synchronize()
    print(f"{spec.label} finite:", bool(out.isfinite().all()))


if __name__ == "__main__":
    main()
