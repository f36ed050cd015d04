"""PTX instructions, as calls of the functions of ``include/emulator``.

An instruction that is not in the table at the end is an error: what it would have to do is for
whoever adds it to say.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

__all__ = ["instruction_statement"]

_GUARDED = re.compile(r"\{ \.reg \.pred p; setp\.ne\.b32 p, (%\d+), 0; @p ([^;]+); \}")
_NEGATED = re.compile(r"(?<![+\w])-\d")
# A predicate that an instruction takes or gives, of which TVM makes a register of 32 bits.
_TAKEN = re.compile(r"\{ \.reg \.pred (\w+); setp\.ne\.b32 \1, (%\d+), 0; ([^@;]+); \}")
_GIVEN = re.compile(r"\{ \.reg \.pred (\w+); (\S+) \1, ([^;]+); selp\.b32 (%\d+), 1, 0, \1; \}")
_LOOP = re.compile(
    r"\{ \.reg \.pred (\w+); (\w+): (mbarrier\.try_wait\.\S+) \1, ([^;]+); "
    r"@\1 bra\.uni (\w+); bra\.uni \2; \5: \}"
)
_UNTIL = ".until"
"""Ends the name of an instruction that was a loop."""
_REGISTERS = {"cluster_ctarank": "cluster_rank"}
_SPECIAL = re.compile(rf"mov\.u32 (%\d+), %%({'|'.join(_REGISTERS)});")
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_TOKEN = re.compile(r"%\d+|_|0[xX][0-9a-fA-F]+|\d+")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A name such as ``ld.global.nc.v2.u32`` and the C++ of its operands, vectors flattened."""

    name: str
    operands: list[str]

    def call(self, function: str, operands: list[str] | None = None) -> str:
        """The call of a function that names the instruction in its errors."""
        arguments = [f'"{self.name}"', *(self.operands if operands is None else operands)]
        return f"emulated::{function}({', '.join(arguments)})"


def instruction_statement(text: str, values: list[str]) -> str | None:
    """The C++ of one PTX instruction, perhaps under a predicate; None if it is unknown.

    Parameters
    ----------
    text
        Template of the assembly, with ``%0`` for the first operand.
    values
        C++ expressions of the operands.
    """
    text = " ".join(text.split())
    if guarded := _GUARDED.fullmatch(text):
        predicate, text = guarded.groups()
        statement = instruction_statement(text, values)
        return statement and f"if (({_value(predicate, values)}) != 0) {{ {statement} }}"
    if taken := _TAKEN.fullmatch(text):
        predicate, register, text = taken.groups()
        text = re.sub(rf"\b{predicate}\b", register, text)
    if given := _GIVEN.fullmatch(text):
        text = f"{given[2]} {given[4]}, {given[3]}"
    if loop := _LOOP.fullmatch(text):
        text = f"{loop[3]}{_UNTIL} {loop[4]}"
    if special := _SPECIAL.fullmatch(text):
        return f"emulated::set({_value(special[1], values)}, emulated::{_REGISTERS[special[2]]});"
    name, _, rest = text.rstrip("; ").partition(" ")
    if ";" in rest or _NEGATED.search(rest):
        return None
    operands = [c for operand in _OPERANDS.findall(rest) for c in _flatten(operand, values)]
    if "L2::cache_hint" in name:
        operands.pop()
    for pattern, make in _INSTRUCTIONS:
        if match := re.fullmatch(pattern, name):
            statement = make(_Instruction(name, operands), *match.groups())
            return statement and statement + ";"
    return None


def _flatten(operand: str, values: list[str]) -> list[str]:
    inside = operand.strip("{}[]")
    if operand.startswith("[") and "+" in inside:
        base, _, offset = inside.partition("+")
        return [f"emulated::offset({_value(base, values)}, {int(offset)})"]
    return [_value(token, values) for token in _TOKEN.findall(inside)]


def _value(token: str, values: list[str]) -> str:
    token = token.strip()
    return values[int(token[1:])] if token.startswith("%") else token


def _result(expression: str) -> Callable[..., str]:
    """An instruction of one result: ``expression`` of the groups, and of operands {a}, {b}, ..."""

    def make(instruction: _Instruction, *groups: str) -> str:
        target, *operands = instruction.operands
        named = dict(zip("abcd", operands, strict=False))
        return f"emulated::set({target}, {expression.format(*map(_type, groups), **named)})"

    return make


_TYPES = {
    "f16": "emulated::HalfFormat", "bf16": "emulated::Bfloat16Format",
    "f16x2": "emulated::HalfFormat", "bf16x2": "emulated::Bfloat16Format",
    "u8": "uint8_t", "s8": "int8_t", "b8": "uint8_t",
    "u16": "uint16_t", "s16": "int16_t", "b16": "uint16_t",
    "u32": "uint32_t", "s32": "int32_t", "b32": "uint32_t", "f32": "float",
    "u64": "uint64_t", "s64": "int64_t", "b64": "uint64_t", "f64": "double",
}  # fmt: skip


def _type(group: str) -> str:
    return _TYPES.get(group, group)


def _named(function: str) -> Callable[..., str]:
    """A call whose template parameters are the groups."""

    def make(instruction: _Instruction, *groups: str) -> str:
        parameters = ", ".join(map(_type, groups))
        return instruction.call(f"{function}<{parameters}>" if parameters else function)

    return make


def _mma(function: str) -> Callable[..., str]:
    def make(instruction: _Instruction, *groups: str) -> str:
        results, inputs = instruction.operands[:4], instruction.operands[4:]
        parameters = ", ".join(map(_type, groups))
        operands = [*results, *(f"emulated::word({value})" for value in inputs)]
        return instruction.call(f"{function}<{parameters}>", operands)

    return make


def _ldmatrix(instruction: _Instruction, trans: str | None) -> str:
    *registers, address = instruction.operands
    return instruction.call(
        f"ldmatrix<{'true' if trans else 'false'}>", [f"uint32_t({address})", *registers]
    )


def _access(function: str) -> Callable[..., str]:
    """A load, a store or an addition to memory: (space, element type)."""

    def make(instruction: _Instruction, space: str, element: str) -> str:
        operands = list(instruction.operands)
        address = operands.pop(-1 if function == "read" else 0)
        kind = _type(element)
        access = "target" if function == "write" else "pointer"
        pointer = instruction.call(
            f"{space}_{access}", [address, f"{len(operands)} * sizeof({kind})"]
        )
        return instruction.call(f"{function}<{kind}>", [pointer, *operands])

    return make


def _atomic(instruction: _Instruction, space: str, element: str) -> str:
    target, address, value = instruction.operands
    pointer = instruction.call(f"{space}_pointer", [address, f"sizeof({_type(element)})"])
    call = instruction.call(f"add_to<{_type(element)}>", [pointer, value])
    return call if target == "_" else f"emulated::set({target}, {call})"


def _cluster_read(instruction: _Instruction, element: str) -> str:
    *registers, address = instruction.operands
    kind = _type(element)
    size = f"{len(registers)} * sizeof({kind})"
    pointer = instruction.call("cluster_pointer", [address, size])
    return instruction.call(f"read<{kind}>", [pointer, *registers])


def _cluster_write(instruction: _Instruction, element: str) -> str:
    address, *registers = instruction.operands
    kind = _type(element)
    size = f"{len(registers)} * sizeof({kind})"
    pointer = instruction.call("cluster_pointer", [address, size])
    return instruction.call(f"write<{kind}>", [pointer, *registers])


def _store_async(instruction: _Instruction, element: str) -> str:
    address, *registers, mbarrier = instruction.operands
    return instruction.call(f"store_async<{_type(element)}>", [address, mbarrier, *registers])


def _mbarrier(function: str, *, gives: bool = False) -> Callable[..., str]:
    """A call on an mbarrier of a space; its result, if it ``gives`` one, may be dropped."""

    def make(instruction: _Instruction, space: str | None = None) -> str:
        operands = list(instruction.operands)
        target = operands.pop(0) if gives else "_"
        kind = "cluster_pointer" if space == "cluster" else "shared_pointer"
        operands[0] = instruction.call(kind, [operands[0], "8"])
        call = instruction.call(function, operands)
        return call if target == "_" else f"emulated::set({target}, {call})"

    return make


def _phase(instruction: _Instruction, loop: str | None) -> str:
    """A test, or a loop of tests; a hint of time is dropped."""
    operands = list(instruction.operands)
    target = "_" if loop else operands.pop(0)
    instruction = dataclasses.replace(instruction, name=instruction.name.removesuffix(_UNTIL))
    operands = [instruction.call("shared_pointer", [operands[0], "8"]), operands[1]]
    call = instruction.call("wait_for_phase" if loop else "test_phase", operands)
    return call if target == "_" else f"emulated::set({target}, {call})"


def _wgmma(instruction: _Instruction, columns: str, kind: str) -> str | None:
    """Operands: accumulators; a, b; whether to accumulate; scales; which are transposed."""
    count = int(columns) // 2
    sums, rest = instruction.operands[:count], instruction.operands[count:]
    if int(columns) % 8 or not 8 <= int(columns) <= 256 or len(rest) not in (7, 9):
        return None
    in_registers = len(rest) == 9
    *left, right, accumulate, scale_a, scale_b = rest[: 8 if in_registers else 5]
    transposed = rest[8 if in_registers else 5 :]
    if (scale_a, scale_b) != ("1", "1") or not set(transposed) <= {"0", "1"}:
        return None
    if in_registers:
        a = f"emulated::in_registers({', '.join(f'emulated::word({word})' for word in left)})"
    else:
        a = f"emulated::in_shared({left[0]}, {transposed[0]})"
    b = f"emulated::in_shared({right}, {transposed[-1]})"
    registers = ", ".join(f"&({value})" for value in sums)
    return instruction.call(
        f"multiply_async<{_type(kind)}>", [f"{{{registers}}}", a, b, f"({accumulate}) != 0"]
    )


def _redux(instruction: _Instruction, operation: str, element: str) -> str:
    return instruction.call(f"redux<emulated::Redux::k{operation.title()}, {_type(element)}>")


_HINT = r"(?:\.(?:nc|weak|relaxed|cta|gpu|sys|ca|cg|cs|lu|cv|wb|wt|noftz|L[12]::\w+(?:::\w+)?))*"
_SPACE = r"\.(global|shared)(?:::cta)?"
_VECTOR = r"(?:\.v[248])?"
_RELEASE = r"(?:\.(?:release|relaxed)\.(?:cta|cluster))?"
_ACQUIRE = r"(?:\.(?:acquire|relaxed)\.(?:cta|cluster))?"
_MBARRIER = r"\.shared(?:::(cta|cluster))?\.b64"
_INSTRUCTIONS: list[tuple[str, Callable[..., str | None]]] = [
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32", _mma("mma_m16n8k16")),
    (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.(f16|bf16)\.\1\.f32", _mma("mma_m16n8k8")),
    (
        r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.([su]8)\.([su]8)\.s32",
        _mma("mma_m16n8k32"),
    ),
    (r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16", _named("movmatrix")),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(?:::cta)?\.b16", _ldmatrix),
    (r"cvt\.rn\.(f16x2|bf16x2)\.f32", _result("emulated::pack<{0}>({a}, {b})")),
    (r"cvt\.rn\.(f16|bf16)\.f32", _result("{0}::encode({a})")),
    (r"cvt\.rn\.satfinite\.e4m3x2\.f32", _result("emulated::pack_e4m3({a}, {b})")),
    (r"cvt\.rn\.f16x2\.e4m3x2", _result("emulated::unpack_e4m3({a})")),
    (r"cvt\.f32\.(f16|bf16)", _result("{0}::decode({a})")),
    (
        r"prmt\.b32",
        _result("emulated::prmt(emulated::word({a}), emulated::word({b}), emulated::word({c}))"),
    ),
    (
        r"lop3\.b32",
        _result(
            "emulated::lop3(emulated::word({a}), emulated::word({b}), emulated::word({c}), {d})"
        ),
    ),
    (r"mov\.b32", _result("emulated::word({a})")),
    (r"and\.b32", _result("emulated::word({a}) & emulated::word({b})")),
    (r"or\.b32", _result("emulated::word({a}) | emulated::word({b})")),
    (r"xor\.b32", _result("emulated::word({a}) ^ emulated::word({b})")),
    (r"not\.b32", _result("~emulated::word({a})")),
    (r"shl\.b32", _result("emulated::shift_left(emulated::word({a}), emulated::word({b}))")),
    (
        r"shr\.([bus]32)",
        _result("emulated::shift_right({0}(emulated::word({a})), emulated::word({b}))"),
    ),
    (r"mul\.lo\.[us]32", _result("emulated::word({a}) * emulated::word({b})")),
    (
        r"mul\.wide\.s32",
        _result("(int64_t)(int32_t)emulated::word({a}) * (int32_t)emulated::word({b})"),
    ),
    (r"mul\.wide\.u32", _result("(uint64_t)emulated::word({a}) * emulated::word({b})")),
    (r"mul\.hi\.([us]32)", _result("emulated::multiply_high<{0}>({a}, {b})")),
    (
        r"mad\.lo\.[us]32",
        _result("emulated::word({a}) * emulated::word({b}) + emulated::word({c})"),
    ),
    (
        r"dp4a\.([us]32)\.([us]32)",
        _result("emulated::dp4a<{0}, {1}>(emulated::word({a}), emulated::word({b}), {c})"),
    ),
    (r"ex2\.approx(?:\.ftz)?\.f32", _result("exp2f({a})")),
    (r"lg2\.approx(?:\.ftz)?\.f32", _result("log2f({a})")),
    (r"rcp\.approx(?:\.ftz)?\.f32", _result("1.0f / ({a})")),
    (r"rsqrt\.approx(?:\.ftz)?\.f32", _result("rsqrtf({a})")),
    (r"(max|min)\.NaN\.f32", _result("emulated::{0}_or_nan({a}, {b})")),
    (r"div\.rn\.f32", _result("({a}) / ({b})")),
    (r"add\.rz\.f32", _result("emulated::add_towards_zero({a}, {b})")),
    (r"fma\.rn(?:\.ftz)?\.f32", _result("fmaf({a}, {b}, {c})")),
    (
        r"add\.rn\.f16x2",
        _result("emulated::add_halves(emulated::word({a}), emulated::word({b}))"),
    ),
    (r"fma\.rn(?:\.ftz)?\.sat\.f32", _result("emulated::saturate(fmaf({a}, {b}, {c}))")),
    (r"mapa\.shared::cluster\.u32", _result("emulated::map_address({a}, {b})")),
    (r"ld\.shared::cluster" + _VECTOR + r"\.([busf]\d+)", _cluster_read),
    (r"st(?:\.weak)?\.shared::cluster" + _VECTOR + r"\.([busf]\d+)", _cluster_write),
    (
        r"st\.async(?:\.weak)?(?:\.shared::cluster)?\.mbarrier::complete_tx::bytes"
        r"(?:\.v[24])?\.([busf](?:32|64))",
        _store_async,
    ),
    (
        r"barrier\.cluster\.arrive(?:\.release|\.relaxed)?(?:\.aligned)?",
        _named("arrive_at_cluster"),
    ),
    (r"barrier\.cluster\.wait(?:\.acquire)?(?:\.aligned)?", _named("wait_for_cluster")),
    (r"mbarrier\.init" + _MBARRIER, _mbarrier("init_mbarrier")),
    (r"mbarrier\.inval" + _MBARRIER, _mbarrier("invalidate_mbarrier")),
    (r"mbarrier\.arrive" + _RELEASE + _MBARRIER, _mbarrier("arrive_at_mbarrier", gives=True)),
    (
        r"mbarrier\.arrive\.expect_tx" + _RELEASE + _MBARRIER,
        _mbarrier("arrive_and_expect", gives=True),
    ),
    (r"mbarrier\.expect_tx" + _RELEASE + _MBARRIER, _mbarrier("expect_bytes")),
    (r"mbarrier\.complete_tx" + _RELEASE + _MBARRIER, _mbarrier("complete_bytes")),
    (
        rf"mbarrier\.(?:try|test)_wait\.parity{_ACQUIRE}\.shared(?:::cta)?\.b64({_UNTIL})?",
        _phase,
    ),
    (r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(f16|bf16)\.\2", _wgmma),
    (r"wgmma\.fence\.sync\.aligned", _named("fence_registers")),
    (r"wgmma\.commit_group\.sync\.aligned", _named("commit_products")),
    (r"wgmma\.wait_group\.sync\.aligned", _named("wait_for_products")),
    (r"fence\.proxy\.async(?:\.shared::(?:cta|cluster))?", _named("fence_proxy")),
    (r"fence\.proxy\.async\.global", lambda instruction: "(void)0"),
    (r"fence\.mbarrier_init\.release\.cluster", lambda instruction: "(void)0"),
    (r"setmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32", _named("set_registers")),
    (r"redux\.sync\.(add|min|max)\.([us]32)", _redux),
    (r"ld" + _HINT + _SPACE + _HINT + _VECTOR + r"\.([busf]\d+)", _access("read")),
    (r"st" + _HINT + _SPACE + _HINT + _VECTOR + r"\.([busf]\d+)", _access("write")),
    (
        r"red" + _HINT + _SPACE + r"\.add" + _HINT + _VECTOR + r"\.([us]32|f32)",
        _access("add_to"),
    ),
    (r"atom" + _HINT + _SPACE + r"\.add" + _HINT + r"\.([us]32|f32)", _atomic),
    (
        r"cp\.async\.c[ag]\.shared(?:::cta)?\.global" + _HINT,
        _named("copy_async"),
    ),
    (r"cp\.async\.commit_group", _named("commit_copies")),
    (r"cp\.async\.wait_group", _named("wait_for_copies")),
    (r"cp\.async\.wait_all", _named("wait_for_all_copies")),
    (r"prefetch\.global\.L[12]", lambda instruction: "(void)0"),
    (r"griddepcontrol\.(?:wait|launch_dependents)", lambda instruction: "(void)0"),
    (r"bar(?:rier)?(?:\.cta)?\.sync(?:\.aligned)?", _named("synchronize")),
    (r"bar(?:rier)?(?:\.cta)?\.arrive(?:\.aligned)?", _named("arrive_at_barrier")),
]
