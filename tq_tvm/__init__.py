"""TurboQuant KV cache kernels: TVM generates them, torch calls them.

Importing the package never imports the compiler.
"""

from tq_tvm._version import __version__
from tq_tvm.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ArtifactCorruptError,
    ArtifactNotFoundError,
    BuildError,
    TQError,
    TuningLogError,
    UnsupportedSpecError,
)
from tq_tvm.ops import (
    PagedKVCache,
    copy_pages,
    fill_kv_cache,
    flatten_kv_cache,
    hadamard_rotate,
    merge_attention_states,
    mla_decode,
    paged_decode,
    paged_decode_workspace_size,
    table_from_indptr,
    table_to_indptr,
)
from tq_tvm.spec import CacheFormat, CacheSpec, QuantPolicy

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "ArtifactCorruptError",
    "ArtifactNotFoundError",
    "BuildError",
    "CacheFormat",
    "CacheSpec",
    "PagedKVCache",
    "QuantPolicy",
    "TQError",
    "TuningLogError",
    "UnsupportedSpecError",
    "__version__",
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
