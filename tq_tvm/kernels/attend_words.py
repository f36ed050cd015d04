"""K or V of a tile of ``attend`` and ``prefill`` on GPUs at head_dims but 64, 128 and 256.

What `attend_sides` has for others: rows are copied as wide as they are aligned, and threads decode
words of a row (`word_codes`), of which it may have any number; so may there be of threads, where
three warps share a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.attend_sides import Seen, Side, Step, TileMemory, TileShape, as_register
from tq_tvm.kernels.dense_rows import dense_word
from tq_tvm.kernels.device import access, let, local, ptx, store, u32, when
from tq_tvm.kernels.word_codes import WordCodes, code_fields, code_words, third_bits

__all__ = ["WordSide"]


class WordSide(Side):
    """One side, of any codec."""

    def __init__(
        self, shape: TileShape, memory: TileMemory, number: int, cache, meta, head, thread
    ) -> None:
        super().__init__(shape, memory, number, cache, meta, head, thread)
        self._scale = None
        if self.codec.tensor_scale:
            self._scale = local(1, "float32")
            store(self._scale, meta.buffer[0])
        # Words of a row of codes in shared memory.
        self._row_words = -(-self._elements // 4)

    def _copy(self, source, first, seen: Seen, packed) -> None:
        shape, words = self._shape, self._memory.words
        chunks = self._elements * self._width // self._chunk
        pieces = shape.tile * chunks
        begin = self._memory.codes[self._number] + packed
        with I.serial(0, -(-pieces // shape.threads)) as turn:
            piece = as_register(turn * shape.threads + self._thread)
            with when(piece < pieces):
                row = as_register(T.truncdiv(piece, chunks))
                chunk = as_register(T.truncmod(piece, chunks))
                at = source(row) + T.cast(chunk * (self._chunk // self._width), "int64")
                start = self._codes.ptr_to([at])
                if self._chunk == 2:
                    short = local(1, "uint16")
                    ptx("ld.global.nc.u16", short[0], start)
                    to = as_register(4 * (begin + row * self._row_words) + chunk * 2)
                    ptx("st.shared.u16", self._bytes().ptr_to([to]), short[0])
                    return
                if self.codec.packed:
                    to = begin + row * self._row_words + chunk * (self._chunk // 4)
                else:
                    to = begin + dense_word(self.dim, row, chunk * 4)
                cached = "cg" if self._chunk == 16 else "ca"
                operands = [words.ptr_to([as_register(to)]), start, self._chunk]
                if not self.codec.meta:
                    size = local(1, "uint32")
                    wanted = seen.includes(first + row)
                    store(size, T.Select(wanted, u32(self._chunk), u32(0)))
                    operands.append(size[0])
                ptx(f"cp.async.{cached}.shared.global", *operands)

    def _bytes(self):
        """Shared memory as bytes; words are the unit of the buffer."""
        data = self._memory.words.data
        return T.decl_buffer((1 << 20,), "uint8", data=data, scope="shared.dyn")

    def _place_rows(self) -> None:
        """Nothing: threads find their words as they decode them."""

    def _place_copies(self, cache) -> None:
        """Nothing: they find the pieces that they copy, too."""
        self._copied_at = None

    def steps(self, packed, moved) -> Iterator[Step]:
        """As of `Side`, in one step."""
        yield lambda: None, lambda: self._decode(packed, moved)

    def _decode(self, packed, moved) -> None:
        shape, words, dim, codec = self._shape, self._memory.words, self.dim, self.codec
        count, fields = code_words(dim, codec), code_fields(codec)
        most = max(1, shape.threads // shape.tile)
        lanes = max(n for n in range(1, most + 1) if count % n == 0)
        abreast = min(shape.threads // lanes, shape.tile)
        codes = as_register(self._memory.codes[self._number] + packed)
        metas = as_register(self._memory.metas[self._number] + packed)
        dense, view = self._memory.dense[self._number] + moved, self._bytes()
        own, part = T.truncdiv(self._thread, lanes), T.truncmod(self._thread, lanes)
        with I.serial(0, -(-shape.tile // abreast)) as turn:
            row = as_register(turn * abreast + own)
            with when(T.And(own < abreast, row < shape.tile)):
                meta, word = local(1, "uint32"), local(1, "uint32")
                if codec.meta:
                    ptx("ld.shared.u32", meta[0], words.ptr_to([as_register(metas + row)]))
                scale = None if self._scale is None else self._scale[0]
                found = WordCodes(dim, shape.spec.dtype, codec, meta[0], scale)
                start = as_register(codes + row * self._row_words)

                def read(at, size: int, start=start):
                    """Bytes of the second plane."""
                    bits = local(1, "uint32")
                    place = view.ptr_to([as_register(4 * start + at)])
                    if size == 4:
                        ptx("ld.shared.u32", bits[0], place)
                    else:
                        short = local(1, "uint16")
                        ptx("ld.shared.u16", short[0], place)
                        store(bits, T.cast(short[0], "uint32"))
                    return bits[0]

                with I.serial(0, count // lanes) as i:
                    index = as_register(part * (count // lanes) + i)
                    ptx("ld.shared.u32", word[0], words.ptr_to([as_register(start + index)]))
                    third = None
                    if len(codec.plane_bits) > 1:
                        third = third_bits(dim, read, index)
                    for field, pair in enumerate(found.pairs(word[0], third)):
                        at = index * 2 + field * (dim // fields // 2)
                        to = as_register(dense + dense_word(dim, row, let(at)))
                        access("st.shared", pair, words.ptr_to([to]))
