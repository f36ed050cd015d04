"""Products of a warpgroup, ``wgmma.m64nNk16`` of Hopper: operands in shared memory, and issue.

A warpgroup is four neighbouring warps. Its product is asynchronous: after `commit` its accumulators
belong to the tensor cores until `wait`, and so do the operands in shared memory, which threads have
to write before a `fence_writes` and a barrier.

Operands are rows of 16-bit values in blocks of ``64`` or ``32`` values, whose 16-byte chunks are
exchanged so that eight rows are in different banks: chunk c of row r is where chunk ``c ^ (r % 8)``
would be, in rows of 32 values chunk ``c ^ (r / 2 % 4)`` (PTX ISA, 9.7.15.5.1: 128-byte and 64-byte
swizzling). A block begins at a multiple of 1024 bytes.
"""

from __future__ import annotations

import itertools

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.device import let, ptx, shared_address, u32

__all__ = [
    "Operand",
    "commit",
    "fence_writes",
    "multiply",
    "multiply_registers",
    "settle",
    "start_products",
    "swizzled",
    "wait",
]

_TYPES = {"float16": "f16", "bfloat16": "bf16"}
_SWIZZLES = {64: 1, 32: 2}
"""Of a block's width in values: the mode of a matrix descriptor."""

_SETTLE = """
static __device__ __forceinline__ void tq_settle_{kind}({kind}* value) {{
  asm volatile("" : "+{letter}"(*value) :: "memory");
}}
"""
_LETTERS = {"float32": ("float", "f"), "uint32": ("unsigned", "r")}


def swizzled(width: int, row, chunk):
    """Where a chunk of 16 bytes is in its row of a block of ``width`` values."""
    turn = T.bitwise_and(row, 7) if width == 64 else T.bitwise_and(T.shift_right(row, 1), 3)
    return T.bitwise_xor(chunk, turn)


class Operand:
    """Descriptors of a matrix in shared memory, which begins at the address ``pointer``.

    Parameters
    ----------
    width
        Values of a row of a block, 64 or 32.
    leading
        Bytes from a block to the next one, where the rows of a block are the product's sums (the
        operand is transposed); 0 where its columns are.
    """

    def __init__(self, pointer, width: int, leading: int = 0) -> None:
        # An address has the CTA's rank in its cluster above, where the descriptor has other fields.
        start = T.shift_right(T.bitwise_and(shared_address(pointer), u32(0x3FFFF)), u32(4))
        # Groups of eight rows are neighbours.
        self._low = let(T.bitwise_or(start, u32((leading >> 4 or 1) << 16)))
        self._high = (8 * 2 * width >> 4) | _SWIZZLES[width] << 30

    def moved(self, offset) -> Operand:
        """The same so many bytes later, a multiple of 16."""
        other = object.__new__(Operand)
        other._high = self._high
        other._low = let(self._low + T.cast(T.shift_right(offset, 4), "uint32"))
        return other

    def at(self, offset: int):
        """The descriptor ``offset`` bytes later: the start, which has the lowest bits, is moved."""
        low = self._low + u32(offset >> 4)
        high = T.shift_left(T.cast(u32(self._high), "uint64"), T.uint64(32))
        return T.bitwise_or(T.cast(low, "uint64"), high)


def start_products() -> None:
    """Registers that were written may be read by products from here on."""
    ptx("wgmma.fence.sync.aligned")


def multiply(dtype: str, result, a, b, *, first: bool) -> None:
    """``result (+)= a b^T`` of 16 columns; both are descriptors of rows, 64 of ``a``."""
    registers = _registers(result)
    ptx(_name(dtype, registers), *registers, a, b, T.ptx.pred(0 if first else 1), 1, 1, 0, 0)


def multiply_registers(
    dtype: str, result, a: list, b, *, first: bool = False, transposed: bool = True
) -> None:
    """``result (+)= a b``: ``a`` in four registers, 64 rows of 16; ``b`` is a descriptor.

    ``transposed`` says that it is of 16 rows; otherwise of 16 columns: the product is ``a b^T``.
    """
    registers = _registers(result)
    flags = T.ptx.pred(0 if first else 1), 1, 1, int(transposed)
    ptx(_name(dtype, registers), *registers, *a, b, *flags)


def _places(buffer):
    """Every index of a buffer of registers, whose dimensions are constants."""
    return itertools.product(*(range(int(size)) for size in buffer.shape))


def _registers(result) -> list:
    return [result[place] for place in _places(result)]


def _name(dtype: str, registers: list) -> str:
    kind = _TYPES[dtype]
    return f"wgmma.mma_async.sync.aligned.m64n{len(registers) * 2}k16.f32.{kind}.{kind}"


def commit() -> None:
    """What was issued is a group."""
    ptx("wgmma.commit_group.sync.aligned")


def wait(pending: int) -> None:
    """Wait for all groups but the last ``pending``."""
    ptx("wgmma.wait_group.sync.aligned", pending)


def settle(*registers) -> None:
    """Tell the compiler that accumulators, or operands in registers, change up to here."""
    for buffer in registers:
        kind, letter = _LETTERS[str(buffer.dtype)]
        source = _SETTLE.format(kind=kind, letter=letter)
        for place in _places(buffer):
            I.evaluate(
                T.cuda.func_call(f"tq_settle_{kind}", buffer.ptr_to(place), source_code=source)
            )


def fence_writes() -> None:
    """The thread's writes to shared memory are seen by products that a barrier lets begin."""
    ptx("fence.proxy.async.shared::cta")
