"""The mathematics in plain torch, float32: what every kernel is tested against."""

from tq_tvm.reference.attend import attend, merge_attention_states, paged_attend
from tq_tvm.reference.codec import boundary_distance, decode_rows, encode_rows
from tq_tvm.reference.decode import attention, paged_decode
from tq_tvm.reference.fill import Window, fill_kv_cache, token_slots
from tq_tvm.reference.flatten import flatten_kv_cache, sequence_rows
from tq_tvm.reference.mla import paged_mla
from tq_tvm.reference.packing import pack_codes, unpack_codes
from tq_tvm.reference.rotate import hadamard_matrix, hadamard_rotate, rotate_back, rotate_rows

__all__ = [
    "Window",
    "attend",
    "attention",
    "boundary_distance",
    "decode_rows",
    "encode_rows",
    "fill_kv_cache",
    "flatten_kv_cache",
    "hadamard_matrix",
    "hadamard_rotate",
    "merge_attention_states",
    "pack_codes",
    "paged_attend",
    "paged_decode",
    "paged_mla",
    "rotate_back",
    "rotate_rows",
    "sequence_rows",
    "token_slots",
    "unpack_codes",
]
