"""PTX instructions, as calls of the functions of ``include/emulator``."""

from __future__ import annotations

import re

__all__ = ["instruction_call"]

_TOKEN = re.compile(r"%(\d+)|\b(0[xX][0-9a-fA-F]+|\d+)\b")
_FORMATS = {"f16": "emulated::HalfFormat", "bf16": "emulated::Bfloat16Format"}
_INTEGERS = {"s8": "int8_t", "u8": "uint8_t"}
_ELEMENTS = {
    "u8": "uint8_t", "s8": "int8_t", "b8": "uint8_t",
    "u16": "uint16_t", "s16": "int16_t", "b16": "uint16_t",
    "u32": "uint32_t", "s32": "int32_t", "b32": "uint32_t", "f32": "float",
    "u64": "uint64_t", "s64": "int64_t", "b64": "uint64_t", "f64": "double",
}  # fmt: skip


def instruction_call(text: str, operands: list[str]) -> str | None:
    """The C++ of ``text``, one instruction with its operands; None if it is unknown."""
    name, _, rest = text.strip().rstrip(";").strip().partition(" ")
    if ";" in rest:
        return None
    values = [operands[int(n)] if n else literal for n, literal in _TOKEN.findall(rest)]
    for pattern, make in _INSTRUCTIONS:
        if match := re.fullmatch(pattern, name):
            return make(name, match.groups(), values)
    return None


def _call(function: str, name: str, values: list[str]) -> str:
    return f'emulated::{function}("{name}", {", ".join(values)})'


def _assign(expression: str):
    """An instruction of one result, with its operands as {0}, {1}, ..."""
    return lambda name, groups, values: f"{values[0]} = {expression.format(*values[1:])}"


def _mma_float(name, groups, values):
    return _call(f"mma_m16n8k16<{_FORMATS[groups[0]]}>", name, values)


def _mma_integer(name, groups, values):
    a, b = (_INTEGERS[kind] for kind in groups)
    return _call(f"mma_m16n8k32<{a}, {b}>", name, values)


def _load(name, groups, values):
    space, element = groups
    *registers, address = values
    return _access("read", space, element, name, address, registers)


def _store(name, groups, values):
    space, element = groups
    address, *registers = values
    return _access("write", space, element, name, address, registers)


def _access(function, space, element, name, address, registers):
    kind = _ELEMENTS[element]
    size = f"{len(registers)} * sizeof({kind})"
    pointer = f'emulated::{space}_pointer("{name}", {address}, {size})'
    return f'emulated::{function}<{kind}>("{name}", {pointer}, {", ".join(registers)})'


_HINTS = r"(?:\.nc|\.weak|\.ca|\.cg|\.cs|\.lu|\.cv|\.wb|\.wt|\.(?:L1|L2)::\w+(?:::\w+)?|\.v[248])*"
_INSTRUCTIONS = [
    (
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32",
        _mma_float,
    ),
    (r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.([su]8)\.([su]8)\.s32", _mma_integer),
    (
        r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16",
        lambda name, groups, values: _call("movmatrix", name, values),
    ),
    (r"cvt\.rn\.f16x2\.f32", _assign("emulated::pack<emulated::HalfFormat>({0}, {1})")),
    (r"cvt\.rn\.bf16x2\.f32", _assign("emulated::pack<emulated::Bfloat16Format>({0}, {1})")),
    (r"prmt\.b32", _assign("emulated::prmt({0}, {1}, {2})")),
    (r"and\.b32", _assign("({0}) & ({1})")),
    (r"or\.b32", _assign("({0}) | ({1})")),
    (r"xor\.b32", _assign("({0}) ^ ({1})")),
    (r"mul\.hi\.u32", _assign("uint32_t(uint64_t(uint32_t({0})) * uint32_t({1}) >> 32)")),
    (r"ld\.(global|shared)" + _HINTS + r"\.([busf]\d+)", _load),
    (r"st\.(global|shared)" + _HINTS + r"\.([busf]\d+)", _store),
]
