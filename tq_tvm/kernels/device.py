"""Short names for device code that is built by hand, instruction by instruction.

Every function here is called while a TVMScript function is being parsed and appends to it. Loops of
Python around them are unrolled loops of the kernel.
"""

from __future__ import annotations

import math

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

__all__ = [
    "LOG2E",
    "LOWEST",
    "MASKED",
    "PAIR",
    "SHARED_BYTES",
    "access",
    "arrive_at_cluster",
    "as_bits",
    "as_float",
    "barrier",
    "barrier_of",
    "byte_perm",
    "f32",
    "from_half",
    "held",
    "high_half",
    "i32",
    "let",
    "let_next_launch_begin",
    "local",
    "loop",
    "low_half",
    "mma",
    "pointer",
    "ptx",
    "reduce_lanes",
    "reduce_together",
    "remote_address",
    "shared",
    "shared_address",
    "shared_dynamic",
    "shuffle",
    "shuffle_xor",
    "store",
    "u32",
    "wait_for_cluster",
    "wait_for_launch_before",
    "warp_barrier",
    "when",
    "wide_product",
]

FULL_WARP = 0xFFFFFFFF

SHARED_BYTES = 227 * 1024
"""Most shared memory of a CTA of Hopper or B200."""

LOG2E = math.log2(math.e)

LOWEST = -1e30
"""Below every logit: the bound of a softmax before its first tile, and on CPUs also `MASKED`."""

MASKED = -3e38
"""Logit of a token that is not attended to: its weight is 0 beside any bound, `LOWEST` too."""

PAIR = {"float16": "cvt.rn.f16x2.f32", "bfloat16": "cvt.rn.bf16x2.f32"}
"""Instructions that round two floats to the halves of a word, the second one lower."""


def u32(value: int):
    """A uint32 constant."""
    return T.uint32(value)


def i32(value: int):
    """An int32 constant."""
    return T.int32(value)


def f32(value: float):
    """A float32 constant."""
    return T.float32(value)


def local(shape, dtype: str):
    """Registers, as long as every index is a constant."""
    return I.alloc_buffer((shape,) if isinstance(shape, int) else shape, dtype, scope="local")


def shared(shape, dtype: str):
    """Shared memory of the CTA, which counts towards 48 KiB."""
    return I.alloc_buffer((shape,) if isinstance(shape, int) else shape, dtype, scope="shared")


def shared_dynamic(shape, dtype: str):
    """Shared memory of the CTA beyond 48 KiB, which only ``ptx`` may write."""
    shape = (shape,) if isinstance(shape, int) else shape
    whole = I.alloc_buffer(shape, dtype, scope="shared.dyn")
    # A view: TVM would cut the buffer down to what it thinks is touched, from registers in indices.
    return T.decl_buffer(shape, dtype, data=whole.data, scope="shared.dyn")


def pointer(words, index):
    """Address of an element of shared memory, whose index goes through a register.

    TVM joins the regions of all accesses that it can see through: a minute for a kernel of attend.
    """
    register = local(1, "int32")
    store(register, index)
    return words.ptr_to([register[0]])


def let(value):
    """Name a value."""
    return I.bind(value)


def store(buffer, value, *index) -> None:
    """``buffer[index] = value``; one element where no index is given."""
    I.buffer_store(buffer, value, list(index) or [0])


def ptx(instruction: str, *operands) -> None:
    """One PTX instruction, results first."""
    I.evaluate(T.ptx[instruction](*operands))


def access(operation: str, registers: list, address, kind: str = "u32") -> None:
    """Read or write neighbouring words of memory at once; ``operation`` lacks their ``kind``."""
    kind = kind if len(registers) == 1 else f"v{len(registers)}.{kind}"
    stores = operation.startswith("st")
    ptx(f"{operation}.{kind}", *([address, *registers] if stores else [*registers, address]))


def mma(instruction: str, result, a, b, c) -> None:
    """``result = a b + c`` of a tensor core, registers in lists."""
    ptx(instruction, *result, *a, *b, *c)


def barrier() -> None:
    """``__syncthreads``."""
    I.evaluate(T.tvm_storage_sync("shared"))


def barrier_of(number, threads: int) -> None:
    """A barrier of some warps of the CTA; number 0 is all threads'."""
    ptx("bar.sync", T.cast(number, "uint32"), u32(threads))


def warp_barrier() -> None:
    """``__syncwarp``."""
    I.evaluate(T.cuda.warp_sync())


def shuffle(value, lane):
    """The value of a lane."""
    return T.cuda.__shfl_sync(u32(FULL_WARP), value, lane, 32)


def shuffle_xor(value, mask: int):
    """The value of lane ``lane ^ mask``."""
    return T.cuda.__shfl_xor_sync(u32(FULL_WARP), value, mask, 32)


def held(dtype: str, value, lane):
    """A value of ``lane``, the thread's own, that the compiler keeps in a register.

    Addresses, and all that it can work out in a few instructions, it otherwise does anew at every
    use: 65 of 828 instructions that ``decode`` had for a tile. What comes from a shuffle it cannot,
    unless it knows that all lanes have the same: that it follows through the shuffle.
    """
    register = local(1, dtype)
    store(register, value)
    store(register, shuffle(register[0], lane))
    return register[0]


def wide_product(a, b):
    """Of numbers of 31 bits, in 64: one multiplication, where signs would take three more."""
    product = local(1, "uint64")
    ptx("mul.wide.u32", product[0], T.cast(a, "uint32"), T.cast(b, "uint32"))
    return product[0]


def reduce_lanes(buffer, index: int, combine, masks=(1, 2, 4, 8, 16)) -> None:
    """Combine one register over lanes; every lane gets the result."""
    for mask in masks:
        store(buffer, combine(buffer[index], shuffle_xor(buffer[index], mask)), index)


def reduce_together(buffers, combine, masks=(1, 2, 4, 8, 16)) -> None:
    """Combine registers ``(buffer, index)`` over lanes, one shuffle of each in flight at a time."""
    for mask in masks:
        taken = [let(shuffle_xor(buffer[index], mask)) for buffer, index in buffers]
        for (buffer, index), other in zip(buffers, taken, strict=True):
            store(buffer, combine(buffer[index], other), index)


def byte_perm(a, b, selector: int):
    """Select bytes by a constant; a selector that varies goes to ``prmt``, which does not mask."""
    return T.call_pure_extern("uint32", "__byte_perm", a, b, u32(selector))


def as_float(bits):
    """The float of 32 bits."""
    return T.reinterpret("float32", bits)


def as_bits(value):
    """The bits of a float."""
    return T.reinterpret("uint32", value)


def from_half(dtype: str, bits):
    """The float of a float16 or bfloat16 in the low half of a word whose high half is zero."""
    if dtype == "bfloat16":
        return as_float(T.shift_left(bits, u32(16)))
    return T.cast(T.reinterpret("float16", T.cast(bits, "uint16")), "float32")


def low_half(dtype: str, word):
    """The float of the low half of a word."""
    if dtype == "bfloat16":
        return from_half(dtype, word)
    return from_half(dtype, T.bitwise_and(word, u32(0xFFFF)))


def high_half(dtype: str, word):
    """The float of the high half of a word."""
    if dtype == "bfloat16":
        return as_float(T.bitwise_and(word, u32(0xFFFF0000)))
    return from_half(dtype, T.shift_right(word, u32(16)))


def let_next_launch_begin() -> None:
    """Allow the next launch to begin once every CTA of this one has come here."""
    _overlap("tq_let_next_launch_begin", "launch_dependents")


def wait_for_launch_before() -> None:
    """Wait until the launch before is done and its writes are seen.

    A kernel that calls this is launched while the one before may still run, see
    ``tq_tvm.build.overlap``.
    """
    _overlap("tq_wait_for_launch_before", "wait")


def _overlap(name: str, action: str) -> None:
    """Before compute capability 9.0 launches do not overlap, so there is nothing to do."""
    source = f"""
static __device__ __forceinline__ void {name}() {{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.{action};" ::: "memory");
#endif
}}
"""
    I.evaluate(T.cuda.func_call(name, source_code=source, return_type="void"))


def arrive_at_cluster(*, release: bool) -> None:
    """Every thread of the CTAs of a cluster comes here, and `wait_for_cluster` waits for them.

    With ``release`` whoever waits sees what was written before, also to shared memory.
    """
    order = "release" if release else "relaxed"
    ptx(f"barrier.cluster.arrive.{order}.aligned")


def wait_for_cluster() -> None:
    """Wait for all threads of the cluster to arrive."""
    ptx("barrier.cluster.wait.acquire.aligned")


def shared_address(pointer):
    """The 32-bit address of ``pointer`` to shared memory."""
    return T.cuda.cvta_generic_to_shared(pointer)


def remote_address(pointer, rank):
    """What ``pointer`` to shared memory is in the CTA of a rank: for ``ld.shared::cluster``."""
    address = local(1, "uint32")
    own = shared_address(pointer)
    ptx("mapa.shared::cluster.u32", address[0], own, T.cast(rank, "uint32"))
    return address[0]


class when:
    """``with when(condition):`` is an if."""

    def __init__(self, condition) -> None:
        self._if = I.If(condition)
        self._then = I.Then()

    def __enter__(self) -> None:
        self._if.__enter__()
        self._then.__enter__()

    def __exit__(self, *error) -> None:
        self._then.__exit__(*error)
        self._if.__exit__(*error)


def loop(condition):
    """``with loop(condition):`` is a while; ``condition`` reads registers that its body writes."""
    return I.While(condition)
