r"""``rotate`` on NVIDIA GPUs by tensor cores: the threads of ``kernels.rotate``'s equation.

One launch. A Hadamard matrix of a power of two (others: `rotate_lanes`) is a product of 2 x 2
factors, one a bit of the coordinate, in any order. A warp has ``32 * values`` elements of
neighbouring rows, a lane ``values`` of them, as many as fit in registers; where a bit lies decides
what takes its factor:

1. the lane reads pieces of 16 bytes. Tensor cores take the bits across four lanes, bit 0, one of
   the piece and up to two that tell pieces apart (`hadamard_cuda`); additions take the other bits
   of pieces;
2. bits of rows longer than ``4 * values``, which tell the eight groups of four lanes and the warps
   apart, change places with others: float32 values go through shared memory, 16 bytes at a time.
   One bit of the address is the sum of three of the place, so that neither the eight lanes that
   write at once nor those that read meet in a bank. Then these bits take additions, too;
3. values are rounded to the dtype and written, 16 bytes a lane, or fewer where many bits had to
   change places: neighbouring lanes write neighbouring bytes.

Buffers
    Those of ``kernels.rotate``. Shared: float32 ``[32 * values * warps]``, for rows of step 2.

Static: D, dtype. Dynamic: n >= 1.

Tail
    Rows past the end read the last one and write nothing.

Numerics
    Inputs and the matrix, of a power of two and its negative, are exact in the dtype, sums are
    float32; one rounding to dtype.

Cost of one value (bfloat16, as compiled for sm_90a, 32 values a lane for D <= 512, else 64)
    2 bytes read and 2 written; 8 bytes of shared memory, for rows of step 2.

    ================  ===  ===  ===  ===  ====  ====  ====
    D                  64  128  256  512  1024  2048  4096
    instructions      4.7  5.2  6.7  8.3   7.5   9.2   9.5
    ================  ===  ===  ===  ===  ====  ====  ====

    At D = 4096 they are 6 additions, 0.7 products of tensor cores, 0.5 accesses of shared memory
    and 0.5 roundings. A copy leaves an H200 the time for 28; lanes that shuffle
    (``schedules/rows.py``) take 14 at D = 128.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tq_tvm.kernels.device import (
    PAIR,
    access,
    barrier,
    f32,
    i32,
    let,
    local,
    loop,
    ptx,
    shared,
    store,
    warp_barrier,
    when,
)
from tq_tvm.kernels.hadamard_cuda import (
    RowBits,
    butterfly,
    hadamard_words,
    hidden_zeros,
    rotate_rows,
)
from tq_tvm.kernels.rotate_lanes import emit_lanes
from tq_tvm.spec import RotateSpec

__all__ = ["RotateConfig", "Tile", "rotate_cuda"]

_PIECE = 3
"""Bits of an element's place inside a piece of 16 bytes."""
_LANES = 5


@dataclasses.dataclass(frozen=True)
class RotateConfig:
    """The decisions of one kernel; ``schedules/factories.py`` says what each one trades."""

    values: int
    warps: int
    tiles: int
    contracted: int
    registers: int


@dataclasses.dataclass(frozen=True)
class _Places:
    """Which bits of an element's place in a tile a thread's registers, lanes and warps stand for.

    A tile is what a CTA has at once: rows one after another.
    """

    registers: list[int]
    lanes: list[int]
    warps: list[int]

    def of_thread(self, lane, warp):
        """Place of the thread's first element."""
        return _spread(lane, self.lanes) + _spread(warp, self.warps)

    def of_register(self, index: int) -> int:
        """Distance of an element from the first one."""
        return sum((index >> i & 1) << bit for i, bit in enumerate(self.registers))


def _spread(value, bits: list[int]):
    """Bit ``i`` of a value at ``bits[i]``; neighbours move together."""
    total, i = 0, 0
    while i < len(bits):
        count = 1
        while i + count < len(bits) and bits[i + count] == bits[i] + count:
            count += 1
        total = total + ((value >> i & (1 << count) - 1) << bits[i])
        i += count
    return total


class Tile:
    """How the elements of a tile are read, exchanged and written."""

    def __init__(self, spec: RotateSpec, config: RotateConfig) -> None:
        self.dim, self.dtype, self.values = spec.dim, spec.dtype, config.values
        self.row_bits = spec.dim.bit_length() - 1
        width = config.values.bit_length() - 1
        chunk = _LANES + width
        places = range(chunk + config.warps.bit_length() - 1)
        self.elements = 1 << len(places)
        self.rows = self.elements // spec.dim
        groups, warps = [*places[chunk - 3 : chunk]], [*places[chunk:]]
        pieces = [*range(_PIECE + 2, chunk - 3)]
        self.read = _Places([*range(_PIECE), *pieces], [_PIECE, _PIECE + 1, *groups], warps)
        self.exchanged = [bit for bit in (*groups, *warps) if bit < self.row_bits]
        self.across_warps = any(bit in warps for bit in self.exchanged)
        # Of the place, this and bit 5 are added to bit 2 of the address.
        self._mixed = groups[0]
        if not self.exchanged:
            self.vector, self.written = _PIECE, self.read
            return
        self.vector = min(_PIECE, width - len(self.exchanged))
        others = [bit for bit in places[self.vector :] if bit not in self.exchanged]
        spare = width - self.vector - len(self.exchanged)
        self.written = _Places(
            [*range(self.vector), *self.exchanged, *others[_LANES : _LANES + spare]],
            others[:_LANES],
            others[_LANES + spare :],
        )

    def address(self, place):
        """Index in shared memory of the element at a place."""
        return place ^ ((place >> 5 ^ place >> self._mixed) & 1) << 2

    def pointers(self, buffer, first) -> Callable[[int], Any]:
        """Where the elements of a thread, whose first one is at ``first``, are in shared memory."""
        address = let(self.address(first))
        bases = [address, let(address ^ 4)]

        def pointer(place: int):
            # A thread's first element has zeros where its registers have ones, but for bit 2.
            turned = (place >> 2 ^ place >> 5 ^ place >> self._mixed) & 1
            return buffer.ptr_to([bases[turned] + (place & ~4)])

        return pointer


class _Thread:
    """What a thread does with one tile after another; ``row`` is the first row of the tile."""

    def __init__(self, tile: Tile, x, y, base, left, lane, warp) -> None:
        self.tile, self._x, self._y, self._base, self._left = tile, x, y, base, left
        self._read = let(tile.read.of_thread(lane, warp))
        self._written = self._read
        if tile.exchanged:
            self._written = let(tile.written.of_thread(lane, warp))
            self._shared = shared(tile.elements, "float32")
        self.words = local(tile.values // 2, "uint32")
        self.value = local(tile.values, "float32")

    def load(self, row) -> None:
        """Read a tile; rows past the end read the last one."""
        tile, starts = self.tile, {}
        inside = self._read & tile.dim - 1
        for first in range(0, tile.values, 1 << _PIECE):
            place = tile.read.of_register(first)
            later = place >> tile.row_bits
            if later not in starts:
                there = row + (self._read >> tile.row_bits) + later
                element = T.min(there, self._left - 1) * tile.dim + inside
                starts[later] = let(self._base + T.cast(element, "int64"))
            address = self._x.ptr_to([starts[later] + T.int64(place & tile.dim - 1)])
            piece = [self.words[first // 2 + i] for i in range(4)]
            access("ld.global.L1::no_allocate", piece, address)

    def exchange(self) -> None:
        """Let the bits that are exchanged and those of registers change places; add them."""
        tile, value = self.tile, self.value
        at = tile.pointers(self._shared, self._read)
        for first in range(0, tile.values, 4):
            elements = [value[first + i] for i in range(4)]
            access("st.shared", elements, at(tile.read.of_register(first)), "f32")
        self._meet()
        at = tile.pointers(self._shared, self._written)
        count = 1 << min(2, tile.vector)
        for first in range(0, tile.values, count):
            elements = [value[first + i] for i in range(count)]
            access("ld.shared", elements, at(tile.written.of_register(first)), "f32")
        pair = local(2, "float32")
        for i in range(len(tile.exchanged)):
            bit = 1 << tile.vector + i
            for low in range(tile.values):
                if not low & bit:
                    butterfly(value, low, low | bit, pair)

    def release(self) -> None:
        """Let the next tile be written to shared memory."""
        if self.tile.exchanged:
            self._meet()

    def _meet(self) -> None:
        (barrier if self.tile.across_warps else warp_barrier)()

    def write(self, row, scale: float) -> None:
        """Write a tile; ``scale`` is what is not in the matrix."""
        tile = self.tile
        pairs = local(tile.values // 2, "uint32")
        for i in range(tile.values // 2):
            low, high = (self.value[2 * i + j] for j in range(2))
            if scale != 1:
                low, high = low * f32(scale), high * f32(scale)
            ptx(PAIR[tile.dtype], pairs[i], high, low)
        start = let(self._base + T.cast(row * tile.dim + self._written, "int64"))
        count = 1 << tile.vector - 1
        # One condition for all that a lane has of a row.
        rows: dict[int, list[int]] = {}
        for i in range(0, tile.values // 2, count):
            later = tile.written.of_register(2 * i) >> tile.row_bits
            rows.setdefault(later, []).append(i)
        for later, mine in rows.items():
            there = row + (self._written >> tile.row_bits) + later
            with when(there < self._left):
                for i in mine:
                    address = self._y.ptr_to([start + T.int64(tile.written.of_register(2 * i))])
                    access("st.global", [pairs[i + j] for j in range(count)], address)


def _emit(spec: RotateSpec, config: RotateConfig, x, y, n, block, thread) -> None:
    """``tiles`` tiles of a CTA, one after another."""
    tile = Tile(spec, config)
    share = tile.rows * config.tiles
    start = let(T.cast(block, "int64") * share)
    left = let(T.cast(T.min(n - start, T.int64(share)), "int32"))
    lane, warp = let(thread % 32), let(thread // 32)
    work = _Thread(tile, x, y, let(start * spec.dim), left, lane, warp)
    work.load(i32(0))
    # The scale is in the matrix where it is a power of two.
    exact = tile.row_bits % 2 == 0
    scale = spec.dim**-0.5
    zeros = hidden_zeros(left, lane, 8)
    group, part = let(lane // 4), let(lane % 4)
    ones = hadamard_words(spec.dtype, group, part, zeros, scale if exact else 1.0)
    bits = RowBits(min(spec.dim, 4 * tile.values), config.contracted)

    def rotate() -> None:
        for first in range(0, tile.values, bits.dim // 4):
            rotate_rows(bits, spec.dtype, work.words, ones, work.value, first)

    def finish(row) -> None:
        if tile.exchanged:
            work.exchange()
        work.write(row, 1.0 if exact else scale)

    if config.tiles == 1:
        rotate()
        finish(i32(0))
        return
    row = local(1, "int32")
    store(row, i32(0))
    with loop(row[0] < left):
        rotate()
        # While this tile is exchanged and written, the next one comes.
        following = let(row[0] + tile.rows)
        with when(following < left):
            work.load(following)
        finish(row[0])
        work.release()
        store(row, row[0] + tile.rows)


def rotate_cuda(spec: RotateSpec, config: RotateConfig) -> PrimFunc:
    """The TensorIR of ``rotate`` for one configuration."""
    dim, dtype = spec.dim, spec.dtype
    threads = 32 * config.warps
    resident = max(1, 65536 // (threads * config.registers))
    by_bits = dim & (dim - 1) == 0
    rows = (threads * config.values // dim if by_bits else threads) * config.tiles
    emit = _emit if by_bits else emit_lanes

    def flat(buffer):
        return T.decl_buffer((T.int64(1 << 62),), dtype, data=buffer.data, align=16)

    @T.prim_func(s_tir=True)
    def main(x: T.handle, y: T.handle):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        n = T.int64()
        X = T.match_buffer(x, (n, dim), dtype, align=16)
        Y = T.match_buffer(y, (n, dim), dtype, align=16)
        for bx in T.thread_binding((n + (rows - 1)) // rows, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident})
                emit(spec, config, flat(X), flat(Y), n, bx, tx)

    return main
