"""CUDA source as TVM exports it, rewritten into C++ that runs on the headers of ``include``.

Nothing is rewritten but what g++ cannot read: inline assembly becomes calls of functions of the
same meaning, shared arrays become static ones that the emulator knows of, and helpers learn the
line that they are called from. Lines keep their numbers.
"""

from __future__ import annotations

import re

from emulator.instructions import instruction_statement

__all__ = ["TranslationError", "translate"]


class TranslationError(ValueError):
    """The source holds something that the emulator does not know."""


_ASM = re.compile(r"\b(?:asm|__asm__)\s*(?:volatile|__volatile__)?\s*\(")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_HELPER = re.compile(r"(__forceinline__ __device__ \w[\w ]* \w+\()([^()]*)\) *\{", re.MULTILINE)
_SHARED = re.compile(r"__shared__\s+(alignas\(\d+\)\s+)?([\w ]+?)\s+(\w+)\[(\d+)\];")
_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:(?:alignas|__align__)\((\d+)\)\s+)?([\w ]+?)\s+(\w+)\[\];"
)


def translate(source: str) -> str:
    """C++ for the emulator from exported CUDA source."""
    source = _HELPER.sub(_with_call_site, source)
    source = _DYNAMIC.sub(_dynamic_array, source)
    source = _SHARED.sub(_static_array, source)
    return _replace_assembly(source)


def _with_call_site(match: re.Match) -> str:
    start, parameters = match.groups()
    line = "int line_of_call = __builtin_LINE()"
    joined = f"{parameters}, {line}" if parameters.strip() else line
    return f"{start}{joined}) {{ emulated::CallSite call_site(line_of_call);"


def _dynamic_array(match: re.Match) -> str:
    """Behind the static arrays of its kernel."""
    alignment, kind, name = match.groups()
    begin = max(match.string.rfind("__global__", 0, match.start()), 0)
    end = match.string.find("__global__", match.end())
    kernel = match.string[begin : end if end >= 0 else None]
    arrays = []
    for aligned, element, _, count in _SHARED.findall(kernel):
        aligned = re.sub(r"\D", "", aligned) or f"alignof({element})"
        arrays.append(f"{{{aligned}, {count} * sizeof({element})}}")
    place = f"{{{', '.join(arrays)}}}, {alignment or f'alignof({kind})'}"
    return f"{kind}* {name} = reinterpret_cast<{kind}*>(emulated::dynamic_shared_behind({place}));"


def _static_array(match: re.Match) -> str:
    alignment, kind, name, size = match.groups()
    return (
        f"{alignment or ''}static {kind} {name}[{size}]; static emulated::SharedRegistration "
        f'{name}_registration(__func__, "{name}", {name}, sizeof({name}));'
    )


def _replace_assembly(source: str) -> str:
    parts, position = [], 0
    while match := _ASM.search(source, position):
        if source[source.rfind("\n", 0, match.start()) + 1 :].lstrip().startswith(("#", "//")):
            parts.append(source[position : match.end()])
            position = match.end()
            continue
        end = _closing(source, match.end())
        body = source[match.end() : end]
        parts.append(source[position : match.start()])
        parts.append(_statement(body) + "\n" * body.count("\n"))
        position = source.index(";", end) + 1
    return "".join([*parts, source[position:]])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one before ``start``."""
    depth, position = 1, start
    while position < len(text):
        if text[position] == '"':
            position = _STRING.match(text, position).end()
            continue
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
        position += 1
    raise TranslationError("translate: asm must end, got the end of the source; export it again")


def _statement(body: str) -> str:
    template, *sections = _split(body, ":")
    text = re.sub(r"\\[nt]", " ", "".join(_STRING.findall(template))).strip()
    operands = [
        _STRING.sub("", operand, count=1).strip()[1:-1]
        for section in sections[:2]
        for operand in _split(section, ",")
        if operand.strip()
    ]
    if not text:
        return ";"
    call = instruction_statement(text, operands)
    if call is None:
        raise TranslationError(
            f"translate: instruction must be one of tests/emulator/instructions.py, got {text!r}; "
            "add it there and to include/emulator"
        )
    return call


def _split(text: str, separator: str) -> list[str]:
    """Split outside of strings and parentheses."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        character = text[position]
        if character == '"':
            position = _STRING.match(text, position).end()
            continue
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == separator and depth == 0:
            parts.append(text[start:position])
            start = position + 1
        position += 1
    return [*parts, text[start:]]
