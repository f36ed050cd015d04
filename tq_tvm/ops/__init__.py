"""The torch calls: checks, registration with torch.library, and the kernels behind them."""

from tq_tvm import artifacts
from tq_tvm.ops import attend, decode, fill, flatten, mla, rotate, workspace
from tq_tvm.ops.cache import PagedKVCache
from tq_tvm.ops.decode import paged_decode
from tq_tvm.ops.fill import fill_kv_cache
from tq_tvm.ops.flatten import flatten_kv_cache
from tq_tvm.ops.merge import merge_attention_states
from tq_tvm.ops.mla import mla_decode
from tq_tvm.ops.pages import copy_pages, table_from_indptr, table_to_indptr
from tq_tvm.ops.rotate import hadamard_rotate
from tq_tvm.ops.workspace import paged_decode_workspace_size

__all__ = [
    "PagedKVCache",
    "clear_cache",
    "copy_pages",
    "fill_kv_cache",
    "flatten_kv_cache",
    "hadamard_rotate",
    "merge_attention_states",
    "mla_decode",
    "paged_decode",
    "paged_decode_workspace_size",
    "table_from_indptr",
    "table_to_indptr",
]


def clear_cache() -> None:
    """Forget which libraries serve which call, so that the search path is read again."""
    for module in (attend, decode, fill, flatten, mla, rotate):
        module._loaded.clear()
    workspace.choose_launch.cache_clear()
    workspace.choose_attend_launch.cache_clear()
    artifacts.clear_cache()
