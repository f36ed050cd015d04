"""Products of a warpgroup against numpy, from operands that numpy lays out as the PTX ISA says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulator import TranslationError, compile_source, translate
from emulator.kernels import kernel, source

M, DEPTH, THREADS = 64, 64, 128
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row of a block, by the mode of a descriptor."""

HELPERS = """
__forceinline__ __device__ void fence_registers() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__forceinline__ __device__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__forceinline__ __device__ void wait_0() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
__forceinline__ __device__ void wait_1() {
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}
__forceinline__ __device__ void fence_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__forceinline__ __device__ void store(const void* to, uint32_t value) {
  uint32_t address = __cvta_generic_to_shared(to);
  asm volatile("st.shared.b32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}
__forceinline__ __device__ uint64_t descriptor(
    const void* start, int offset, int leading, int stride, int mode) {
  uint64_t address = __cvta_generic_to_shared(start) + offset;
  return address >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(mode) << 62;
}
"""


def helper(name, n, kind, *, registers, transposed=(0, 0)):
    """The instruction in a function, as TVM writes it."""
    count = n // 2
    left = [("uint32_t", f"a{i}", "r") for i in range(4)] if registers else [("uint64_t", "a", "l")]
    inputs = [*left, ("uint64_t", "b", "l"), ("uint32_t", "scale", "r")]
    sums = ", ".join(f"%{i}" for i in range(count))
    places = [f"%{count + i}" for i in range(len(inputs))]
    a = f"{{{', '.join(places[:4])}}}" if registers else places[0]
    flags = ", ".join(map(str, transposed[1:] if registers else transposed))
    text = (
        f"{{ .reg .pred ps0; setp.ne.b32 ps0, {places[-1]}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{sums}}}, {a}, {places[-2]}, "
        f"ps0, 1, 1, {flags}; }}"
    )
    parameters = [f"float& d{i}" for i in range(count)] + [f"{t} {v}" for t, v, _ in inputs]
    outputs = ", ".join(f'"+f"(d{i})' for i in range(count))
    operands = ", ".join(f'"{letter}"({value})' for _, value, letter in inputs)
    return (
        f"__forceinline__ __device__ void {name}({', '.join(parameters)}) {{\n"
        f'  asm volatile("{text}" : {outputs} : {operands});\n}}\n'
    )


class Layout:
    """Where an operand of ``rows`` rows or columns lies, and what a descriptor says of it."""

    def __init__(self, rows, mode, transposed):
        self.rows, self.mode, self.transposed = rows, mode, transposed
        self.width = WIDTHS[mode]
        per_row = self.width // 2
        self.bytes = rows * DEPTH * 2
        if mode == 0:
            # Matrices of 8 by 8, neighbours along the rows or columns of the product.
            self.leading, self.stride = 16 * rows, 128
            self.steps = [2 * 16 * rows * step for step in range(4)]
        elif transposed:
            self.leading, self.stride = DEPTH * self.width, 8 * self.width
            self.steps = [16 * self.width * step for step in range(4)]
        else:
            self.leading, self.stride = 16, 8 * self.width
            starts = [divmod(16 * step, per_row) for step in range(4)]
            self.steps = [block * rows * self.width + 2 * rest for block, rest in starts]

    def place(self, row, k):
        """The byte of an element, chunk by chunk."""
        line, element = (k, row) if self.transposed else (row, k)
        if self.mode == 0:
            matrix = 16 * self.rows * (k // 8) + 128 * (row // 8)
            return matrix + 16 * (line % 8) + 2 * (element % 8)
        lines = DEPTH if self.transposed else self.rows
        block, rest = divmod(element, self.width // 2)
        chunk = rest // 8
        turn = {1: line % 8, 2: line // 2 % 4, 3: line // 4 % 2}[self.mode]
        return block * lines * self.width + line * self.width + 16 * (chunk ^ turn) + 2 * (rest % 8)

    def image(self, matrix):
        """Bytes of a matrix [rows, DEPTH] of 16-bit words."""
        image = np.zeros(self.bytes // 2, np.uint16)
        for row in range(self.rows):
            for k in range(DEPTH):
                image[self.place(row, k) // 2] = matrix[row, k]
        return image

    def descriptor(self, offset, step):
        place = offset + self.steps[step]
        return f"descriptor(memory, {place}, {self.leading}, {self.stride}, {self.mode})"


LOAD = """
  extern __shared__ __align__(1024) unsigned char memory[];
  for (int i = 0; i < {words}; i += 128) store(memory + 4 * (i + row), in[i + row]);
  fence_writes();
  __syncthreads();
  float d[{count}];
  for (int i = 0; i < {count}; ++i) d[i] = 100.0f;
"""
PUT = "  for (int i = 0; i < {count}; ++i) memcpy(&out[row * outputs + i], &d[i], 4);\n"
ALL_MODES = (1, 2, 3, 0)
# name: (n, kind, layout of a or None, layout of b)
CASES = {}
for _n in (64, 256):
    for _mode in ALL_MODES:
        for _transposed in (False, True):
            _b = Layout(_n, _mode, _transposed)
            CASES[f"n{_n}_b{_mode}{_transposed}_registers"] = (_n, "bf16", None, _b)
            _a = Layout(M, 1 if _mode == 2 else _mode, _transposed != (_mode == 2))
            CASES[f"n{_n}_b{_mode}{_transposed}_shared"] = (_n, "bf16", _a, _b)
CASES["n8"] = (8, "f16", Layout(M, 2, False), Layout(8, 1, False))
CASES["n24"] = (24, "f16", None, Layout(24, 2, False))


def flags(a, b):
    return (int(a is not None and a.transposed), int(b.transposed))


def helper_name(n, kind, a, b):
    return f"multiply_{n}_{kind}_{'r' if a is None else 's'}{flags(a, b)[0]}{flags(a, b)[1]}"


def product(name, n, kind, a, b):
    """A kernel that sums over DEPTH, from what `words` makes."""
    count, b_at = n // 2, 0 if a is None else a.bytes
    words = (b_at + b.bytes) // 4
    body = LOAD.format(words=words, count=count) + "  fence_registers();\n"
    sums = ", ".join(f"d[{i}]" for i in range(count))
    for step in range(DEPTH // 16):
        first = words + 4 * 128 * step
        left = (
            ", ".join(f"in[{first} + 4 * row + {i}]" for i in range(4))
            if a is None
            else a.descriptor(0, step)
        )
        right = b.descriptor(b_at, step)
        body += f"  {helper_name(n, kind, a, b)}({sums}, {left}, {right}, {int(step > 0)});\n"
    body += "  commit();\n  wait_0();\n" + PUT.format(count=count)
    return kernel(name, body, threads=THREADS, shared=words * 4)


def a_fragments(left):
    """Registers of A, [step, thread, 4]: figure of the fragment of A of wgmma.m64nNk16."""
    fragments = np.zeros((DEPTH // 16, THREADS, 8), np.uint16)
    for step in range(DEPTH // 16):
        for thread in range(THREADS):
            for i in range(8):
                row = 16 * (thread // 32) + thread % 32 // 4 + (8 if i in (2, 3, 6, 7) else 0)
                column = thread % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)
                fragments[step, thread, i] = left[row, 16 * step + column]
    return fragments


def d_matrix(registers, n):
    """D, [64, n], of registers [thread, n / 2]: figure of the fragment of D."""
    matrix = np.zeros((M, n), np.float32)
    for thread in range(THREADS):
        for i in range(n // 2):
            row = 16 * (thread // 32) + thread % 32 // 4 + (8 if i & 2 else 0)
            matrix[row, i // 4 * 8 + thread % 4 * 2 + (i & 1)] = registers[thread, i]
    return matrix


def operands(n, kind, seed=1):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(M, DEPTH, generator=generator).to(DTYPES[kind])
    right = torch.randn(n, DEPTH, generator=generator).to(DTYPES[kind])
    return left, right


def words_of(halves):
    return halves.view(torch.int16).numpy().view(np.uint16)


def inputs_of(left, right, a, b):
    parts = [] if a is None else [a.image(words_of(left))]
    parts.append(b.image(words_of(right)))
    if a is None:
        parts.append(a_fragments(words_of(left)).reshape(-1))
    words = np.concatenate(parts).view(np.int32)
    rest = -len(words) % THREADS
    return torch.from_numpy(np.append(words, np.zeros(rest, np.int32))).view(THREADS, -1)


def run(module, name, given, outputs, *, descending=False):
    out = torch.zeros(len(given), outputs, dtype=torch.int32)
    module[name](given, out, descending=descending)
    return out.view(torch.float32).numpy()


# Kernels that differ from a right one, of 64 columns: what comes in place of the products.
RIGHT = Layout(64, 1, False)
LEFT = Layout(M, 1, False)
PARTS = {
    "d": ", ".join(f"d[{i}]" for i in range(32)),
    "e": ", ".join(f"e[{i}]" for i in range(32)),
    "shifted": ", ".join(f"d[{(i + 1) % 32}]" for i in range(32)),
    "a": LEFT.descriptor(0, 0),
    "a1": LEFT.descriptor(0, 1),
    "b": RIGHT.descriptor(LEFT.bytes, 0),
    "b1": RIGHT.descriptor(LEFT.bytes, 1),
    "f": "multiply_64_bf16_s00",
}
FIRST = "  fence_registers();\n  {f}({d}, {a}, {b}, 0);\n  commit();\n"
SHORT = {
    "early": FIRST + "  float early = d[3];\n  wait_0();\n  d[3] = early;\n",
    "overwritten": FIRST
    + "  store(memory + 4 * row, 0x7FC07FC0);\n  fence_writes();\n  wait_0();\n",
    "two_groups": FIRST
    + """
  float e[32];
  {f}({e}, {a}, {b}, 0);
  {f}({e}, {a1}, {b1}, 1);
  commit();
  wait_1();
  for (int i = 16; i < 32; ++i) d[i] = e[i - 16];
  wait_0();
  for (int i = 0; i < 16; ++i) d[i] = e[i];
""",
    "chained_groups": FIRST + "  {f}({d}, {a1}, {b1}, 1);\n  commit();\n  wait_0();\n",
    "warps_apart": FIRST
    + """
  if (row < 32) wait_0();
  __syncthreads();
  if (row >= 32) wait_0();
""",
    "no_fence": "  {f}({d}, {a}, {b}, 0);\n  commit();\n  wait_0();\n",
    "no_fence_after_a_wait": FIRST + "  wait_0();\n  {f}({d}, {a}, {b}, 0);\n",
    "no_wait": FIRST,
    "no_commit": "  fence_registers();\n  {f}({d}, {a}, {b}, 0);\n  wait_0();\n",
    "one_warp": "  if (row < 32) {{\n" + FIRST + "  wait_0();\n  }}\n",
    "half_a_warp": "  if (lane < 16) {{\n" + FIRST + "  }}\n  __syncwarp();\n",
    "written": FIRST + "  d[2] = 1.0f;\n  wait_0();\n",
    "written_between": FIRST + "  d[2] = 1.0f;\n  {f}({d}, {a}, {b}, 1);\n",
    "some_accumulators": FIRST + "  {f}({shifted}, {a}, {b}, 1);\n",
    "unfenced": "  if (row == 5) store(memory + 4 * row, 0);\n  __syncthreads();\n" + FIRST
    + "  wait_0();\n",
    "fenced_by_another": "  if (row == 5) store(memory + 4 * row, 0);\n"
    "  if (row != 5) fence_writes();\n  __syncthreads();\n" + FIRST + "  wait_0();\n",
    "two_descriptors": "  fence_registers();\n  {f}({d}, row < 32 ? {a} : {a1}, {b}, 0);\n"
    "  commit();\n  wait_0();\n",
    "base_offset": "  fence_registers();\n  {f}({d}, {a} | 1ull << 49, {b}, 0);\n"
    "  commit();\n  wait_0();\n",
    "not_a_block": "  fence_registers();\n  {f}({d}, {a} + 8, {b}, 0);\n  commit();\n  wait_0();\n",
    "outside": "  fence_registers();\n  {f}({d}, {a}, {b} + 448, 0);\n  commit();\n  wait_0();\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    forms = {helper_name(*case): case for case in CASES.values()}
    parts = [
        helper(name, n, kind, registers=a is None, transposed=flags(a, b))
        for name, (n, kind, a, b) in forms.items()
    ]
    parts += [product(name, *case) for name, case in CASES.items()]
    load = LOAD.format(words=(LEFT.bytes + RIGHT.bytes) // 4, count=32)
    parts += [
        kernel(
            name, load + text.format(**PARTS) + PUT.format(count=32), threads=THREADS,
            shared=LEFT.bytes + RIGHT.bytes,
        )
        for name, text in SHORT.items()
    ]  # fmt: skip
    return compile_source(source(HELPERS, *parts), tmp_path_factory.mktemp("warpgroups"))


@pytest.mark.parametrize("name", CASES)
def test_products(module, name):
    n, kind, a, b = CASES[name]
    left, right = operands(n, kind)
    got = d_matrix(run(module, name, inputs_of(left, right, a, b), n // 2), n)
    np.testing.assert_allclose(got, left.double() @ right.double().T, rtol=1e-6, atol=2e-5)


def short(module, name, **options):
    """The result of a kernel of `SHORT`, and its products of 16 columns of a and b."""
    left, right = operands(64, "bf16")
    got = run(module, name, inputs_of(left, right, LEFT, RIGHT), 32, **options)
    steps = [left[:, k : k + 16].double() @ right[:, k : k + 16].double().T for k in (0, 16)]
    return got, [step.numpy() for step in steps]


@pytest.mark.parametrize("descending", [False, True])
def test_accumulators_hold_poison_until_they_are_waited_for(module, descending):
    got, (want, _) = short(module, "early", descending=descending)
    assert np.isnan(got[:, 3]).all()
    got[:, 3] = 0
    assert not np.isnan(d_matrix(got, 64)).any()
    assert abs(d_matrix(got, 64) - want).max() > 0.1, "column 3 of the registers was dropped"


@pytest.mark.parametrize("descending", [False, True])
def test_operands_are_read_late(module, descending):
    """Not a number takes the place of rows 0 to 3, all of which lie in the first 512 bytes."""
    got, _ = short(module, "overwritten", descending=descending)
    wrong = np.isnan(d_matrix(got, 64)).all(1)
    assert wrong[:4].all()
    assert not wrong[4:].any()


def test_groups_complete_in_order(module):
    got, (first, second) = short(module, "two_groups")
    assert np.isnan(got[:, 16:]).all(), "the second group was not waited for"
    want = first + second
    registers = np.zeros((THREADS, 32), np.float32)
    registers[:, :16] = got[:, :16]
    np.testing.assert_allclose(d_matrix(registers, 64)[:, :32], want[:, :32], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["chained_groups", "warps_apart"])
def test_right_kernels(module, name):
    got, (first, second) = short(module, name)
    want = first + second if name == "chained_groups" else first
    np.testing.assert_allclose(d_matrix(got, 64), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_fence", "registers must be fenced at first and after a wait"),
        ("no_fence_after_a_wait", "registers must be fenced at first and after a wait"),
        ("no_wait", r"a kernel must wait for its products, got one of line \d+"),
        ("no_commit", "a kernel must wait for its products"),
        ("one_warp", "lane 0 waits at wgmma.wait_group.sync.aligned"),
        ("half_a_warp", "its lanes must arrive at the same operation"),
        ("written", "an accumulator must not be written before its product is waited for"),
        ("written_between", "an accumulator must not be written before its product is waited for"),
        ("some_accumulators", "accumulators must be those of a product under way or others"),
        ("unfenced", "fence.proxy.async what it has stored, got an unfenced store of thread 5"),
        ("fenced_by_another", "got an unfenced store of thread 5"),
        ("two_descriptors", "descriptors and scale must be the same in all threads"),
        ("base_offset", "base offset and unused bits must be 0"),
        ("not_a_block", "start must be in the first row of a block of 1024 bytes"),
        ("outside", "chunks must lie inside of the shared array"),
    ],
)
def test_wrong_kernels_are_told(module, name, message):
    with pytest.raises(RuntimeError, match=message):
        short(module, name)


@pytest.mark.parametrize(
    "text",
    [
        "m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %8, %9, -1, 1, 0, 0;",
        "m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %8, %9, 1, 1, 2, 0;",
        "m64n16k16.f32.bf16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %8, %9, 1, 1, 0, 0;",
        "m64n12k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5}, %6, %6, %7, 1, 1, 0, 0;",
    ],
)
def test_other_forms_are_refused(text):
    operands = ", ".join(f'"+f"(d{i})' for i in range(8)) + ', "l"(a), "r"(p)'
    with pytest.raises(TranslationError, match=r"wgmma\.mma_async"):
        translate(f'asm volatile("wgmma.mma_async.sync.aligned.{text}" : {operands});')
