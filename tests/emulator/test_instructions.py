"""Instructions of one thread against numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulator import TranslationError, compile_source, translate
from emulator.kernels import kernel, register_kernel, source

U64 = np.uint64
MAD = "%0, %1, %2, %3;"


def signed(x):
    return x.view(np.int32).astype(np.int64)


def unsigned(x):
    return x.astype(np.int64)


def bits(x):
    return x.astype(np.uint64).astype(np.uint32) if x.dtype.kind == "u" else x.astype(np.uint32)


def dot(a, b, c):
    return (a.reshape(-1, 4).astype(np.int64) * b.reshape(-1, 4)).sum(1) + c


def prmt(a, b, selector):
    """Byte by byte, on Python integers."""
    result = []
    for x, y, s in zip(a.tolist(), b.tolist(), selector.tolist(), strict=True):
        pool = [*x.to_bytes(4, "little"), *y.to_bytes(4, "little")]
        chosen = []
        for i in range(4):
            nibble = s >> 4 * i & 15
            byte = pool[nibble % 8]
            chosen.append((0xFF if byte >> 7 else 0) if nibble >= 8 else byte)
        result.append(int.from_bytes(bytes(chosen), "little"))
    return np.array(result, dtype=np.uint32)


def lop3(a, b, c, table):
    """Bit by bit, from the truth table."""
    result = np.zeros_like(a)
    for bit in range(32):
        index = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        result |= (np.uint32(table) >> index & 1) << np.uint32(bit)
    return result


def shifted(x, by, left):
    wide = x.astype(object)
    return np.array(
        [(v << s if left else v >> s) & 0xFFFFFFFF for v, s in zip(wide, by.tolist(), strict=True)],
        dtype=np.uint32,
    )


# name: (instruction, number of operands, what it computes)
INTEGER = {
    "prmt": ("prmt.b32 %0, %1, %2, %3;", 3, prmt),
    "lop3_mux": ("lop3.b32 %0, %1, %2, %3, 202;", 3, lambda a, b, c: lop3(a, b, c, 202)),
    "lop3_hex": ("lop3.b32 %0, %1, %2, %3, 0x96;", 3, lambda a, b, c: a ^ b ^ c),
    "and": ("and.b32 %0, %1, %2;", 2, lambda a, b: a & b),
    "or": ("or.b32 %0, %1, %2;", 2, lambda a, b: a | b),
    "xor": ("xor.b32 %0, %1, %2;", 2, lambda a, b: a ^ b),
    "not": ("not.b32 %0, %1;", 1, lambda a: ~a),
    "shl": ("shl.b32 %0, %1, %2;", 2, lambda a, b: shifted(a, b, True)),
    "shr_u": ("shr.u32 %0, %1, %2;", 2, lambda a, b: shifted(a, b, False)),
    "shr_b": ("shr.b32 %0, %1, %2;", 2, lambda a, b: shifted(a, b, False)),
    "shr_s": ("shr.s32 %0, %1, %2;", 2, lambda a, b: shifted(signed(a), b, False)),
    "mul_lo": ("mul.lo.u32 %0, %1, %2;", 2, lambda a, b: a * b),
    "mul_hi_u": (
        "mul.hi.u32 %0, %1, %2;", 2, lambda a, b: (a.astype(U64) * b.astype(U64)) >> U64(32)
    ),
    "mul_hi_s": ("mul.hi.s32 %0, %1, %2;", 2, lambda a, b: (signed(a) * signed(b)) >> 32),
    "mad_lo": (f"mad.lo.u32 {MAD}", 3, lambda a, b, c: a * b + c),
    "mad_lo_s": (f"mad.lo.s32 {MAD}", 3, lambda a, b, c: a * b + c),
    "dp4a_us": (
        f"dp4a.u32.s32 {MAD}", 3,
        lambda a, b, c: dot(a.view(np.uint8), b.view(np.int8), signed(c)),
    ),
    "dp4a_su": (
        f"dp4a.s32.u32 {MAD}", 3,
        lambda a, b, c: dot(a.view(np.int8), b.view(np.uint8), signed(c)),
    ),
}  # fmt: skip
ROUNDING = {
    "pack_f16": ("cvt.rn.f16x2.f32 %0, %1, %2;", torch.float16),
    "pack_bf16": ("cvt.rn.bf16x2.f32 %0, %1, %2;", torch.bfloat16),
}
HALVES = {"add_halves": ("add.rn.f16x2 %0, %1, %2;", np.add)}
WIDENING = {"widen_f16": torch.float16, "widen_bf16": torch.bfloat16}
FLOAT = {
    "ex2": ("ex2.approx.ftz.f32 %0, %1;", 1, np.exp2),
    "lg2": ("lg2.approx.f32 %0, %1;", 1, np.log2),
    "rcp": ("rcp.approx.ftz.f32 %0, %1;", 1, np.reciprocal),
    "rsqrt": ("rsqrt.approx.ftz.f32 %0, %1;", 1, lambda x: 1 / np.sqrt(x)),
    "fma": (f"fma.rn.f32 {MAD}", 3, lambda a, b, c: a * b + c),
    "div": ("div.rn.f32 %0, %1, %2;", 2, np.divide),
    "max_nan": ("max.NaN.f32 %0, %1, %2;", 2, np.maximum),
    "min_nan": ("min.NaN.f32 %0, %1, %2;", 2, np.minimum),
}


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    kernels = [
        register_kernel(name, instruction, "r", "r" * count)
        for name, (instruction, count, _) in INTEGER.items()
    ]
    kernels += [register_kernel(name, text, "r", "ff") for name, (text, _) in ROUNDING.items()]
    kernels += [register_kernel(name, text, "r", "rr") for name, (text, _) in HALVES.items()]
    kernels += [
        register_kernel(name, f"cvt.f32.{name.removeprefix('widen_')} %0, %1;", "f", "r")
        for name in WIDENING
    ]
    kernels += [
        register_kernel(name, instruction, "f", "f" * count)
        for name, (instruction, count, _) in FLOAT.items()
    ]
    for kind, c_type in (("s32", "int"), ("u32", "unsigned")):
        kernels.append(
            kernel(
                f"mul_wide_{kind}",
                "  int64_t d;\n"
                f'  asm volatile("mul.wide.{kind} %0, %1, %2;"\n'
                f'    : "=l"(d) : "r"(({c_type})in[row * 2]), "r"(({c_type})in[row * 2 + 1]));\n'
                "  out[row] = (uint32_t)(d >> 16);",
            )
        )
    guard = "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p xor.b32 %0, %0, %1; }"
    kernels.append(
        kernel(
            "guarded",
            "  uint32_t d = 7;\n"
            f'  asm volatile("{guard}" : "+r"(d) : "r"(in[row * 2]), "r"(in[row * 2 + 1]));\n'
            "  out[row] = d;",
        )
    )
    kernels.append(
        kernel(
            "byte_perm", "  out[row] = __byte_perm(in[row * 3], in[row * 3 + 1], in[row * 3 + 2]);"
        )
    )
    kernels.append(kernel("counts", "  out[row] = __ffs(in[row]) + 100 * __clz(in[row]);"))
    kernels.append(kernel("to_int", "  out[row] = __float2int_rn(((const float*)in)[row]);"))
    return compile_source(source(*kernels), tmp_path_factory.mktemp("instructions"))


def run(module, name, inputs):
    out = torch.full((len(inputs), 1), -1, dtype=torch.int32)
    module[name](torch.from_numpy(np.ascontiguousarray(inputs).view(np.int32)), out)
    return out.numpy().view(np.uint32)[:, 0]


def random_words(rows, columns):
    return np.random.default_rng(3).integers(0, 2**32, (rows, columns), dtype=np.uint32)


@pytest.mark.parametrize("name", INTEGER)
def test_integers(module, name):
    _, count, model = INTEGER[name]
    inputs = random_words(1024, count)
    if name.startswith("sh"):
        inputs[:, 1] = np.arange(1024) % 40  # amounts of 32 and more too
    with np.errstate(over="ignore"):
        want = model(*np.ascontiguousarray(inputs.T))
    np.testing.assert_array_equal(run(module, name, inputs), bits(want))


def test_byte_perm_ignores_the_sign_bit_of_a_selector(module):
    inputs = random_words(1024, 3)
    want = prmt(inputs[:, 0], inputs[:, 1], inputs[:, 2] & 0x7777)
    np.testing.assert_array_equal(run(module, "byte_perm", inputs), want)


@pytest.mark.parametrize(("kind", "read"), [("s32", signed), ("u32", np.uint64)])
def test_product_of_64_bits(module, kind, read):
    inputs = random_words(1024, 2)
    want = (read(inputs[:, 0]) * read(inputs[:, 1]) >> 16).astype(np.uint32)
    np.testing.assert_array_equal(run(module, f"mul_wide_{kind}", inputs), want)


def test_guarded_instruction(module):
    inputs = random_words(64, 2)
    inputs[:, 1] = np.arange(64) % 3
    want = np.where(inputs[:, 1] != 0, inputs[:, 0] ^ 7, 7)
    np.testing.assert_array_equal(run(module, "guarded", inputs), want)


@pytest.mark.parametrize("name", ROUNDING)
def test_rounding_to_halves(module, name):
    """Every exponent, ties, subnormals, overflow and NaN; the first operand is the upper half."""
    _, dtype = ROUNDING[name]
    patterns = random_words(1 << 15, 2)
    patterns[::2] &= 0xFFFFF000  # ties of float16
    patterns[::4] &= 0xFFFF8000  # ties of bfloat16
    small = (0x33000000, 0x38800000)  # about subnormals of float16
    patterns[::3, 0] = np.linspace(*small, len(patterns[::3])).astype(np.uint32)
    want = torch.from_numpy(patterns.view(np.float32)).to(dtype)
    got = run(module, name, patterns)
    halves = torch.from_numpy(np.stack([got >> 16, got & 0xFFFF], 1).astype(np.uint16))
    halves = halves.view(dtype)
    assert torch.equal(halves.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(halves[number].view(torch.int16), want[number].view(torch.int16))


@pytest.mark.parametrize("name", HALVES)
def test_pairs_of_halves(module, name):
    """Ties, subnormals, infinities and NaN."""
    inputs = random_words(1 << 15, 2)
    with np.errstate(all="ignore"):
        want = HALVES[name][1](*(inputs[:, i].copy().view(np.float16) for i in range(2)))
    got = run(module, name, inputs).view(np.float16)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    number = ~np.isnan(want)
    np.testing.assert_array_equal(got[number].view(np.uint16), want[number].view(np.uint16))


@pytest.mark.parametrize("name", WIDENING)
def test_widening_every_half(module, name):
    patterns = np.arange(1 << 16, dtype=np.uint32)[:, None]
    want = torch.from_numpy(patterns[:, 0].astype(np.uint16)).view(WIDENING[name]).float()
    got = torch.from_numpy(run(module, name, patterns).view(np.float32))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("name", FLOAT)
def test_floats(module, name):
    _, count, model = FLOAT[name]
    inputs = np.random.default_rng(5).uniform(0.01, 20, (1024, count)).astype(np.float32)
    want = model(*inputs.T.astype(np.float64))
    np.testing.assert_allclose(run(module, name, inputs).view(np.float32), want, rtol=3e-7)


def test_first_and_last_bit(module):
    values = np.array([0, 1, 8, 1 << 31, 0x00F0] * 8 + [0] * 24, np.uint32)[:, None]
    want = [int(v & -v).bit_length() + 100 * (32 - v.bit_length()) for v in values[:, 0].tolist()]
    assert run(module, "counts", values).tolist() == want


def test_nearest_integer(module):
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9, np.nan] * 4, np.float32)[:, None]
    want = [0, 2, 2, 0, -2, 2**31 - 1, -(2**31), 0] * 4
    assert run(module, "to_int", values).view(np.int32).tolist() == want


@pytest.mark.parametrize(
    "text", ["tcgen05.fence::before_thread_sync;", "add.s32 %0, %1, %2; bra L;"]
)
def test_unknown_instruction_is_named(text):
    asm = f'asm volatile("{text}" : "=r"(d) : "r"(a), "r"(b));'
    with pytest.raises(TranslationError, match=text.split()[0].rstrip(";")):
        translate(asm)
