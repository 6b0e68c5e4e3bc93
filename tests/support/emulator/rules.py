"""The registry of instruction handlers, and helpers of arithmetic.py, memory.py and threads.py.

A handler is registered with every modifier that it handles or that has no effect here. An
instruction with any other modifier is refused, because ignoring it could give wrong results.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .ptx import SIZES, Instruction, UnsupportedError

if TYPE_CHECKING:
    from .translate import FunctionTranslator

# The C++ type for values of each PTX type. Halves are kept as their 16 bits.
CPP = {
    "pred": "bool",
    "b8": "u8",
    "u8": "u8",
    "s8": "s8",
    "b16": "u16",
    "u16": "u16",
    "s16": "s16",
    "f16": "u16",
    "bf16": "u16",
    "b32": "u32",
    "u32": "u32",
    "s32": "s32",
    "f32": "f32",
    "f16x2": "u32",
    "bf16x2": "u32",
    "tf32": "u32",
    "b64": "u64",
    "u64": "u64",
    "s64": "s64",
    "f64": "f64",
    "b128": "u128",
}
WIDTH = {"bool": 1, "u8": 1, "s8": 1, "u16": 2, "s16": 2, "u32": 4, "s32": 4, "f32": 4} | {
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "u128": 16,
}
FLOATS = {"f32", "f64"}

Handler = Callable[["FunctionTranslator", Instruction], None]


@functools.cache
def identifier(name: str) -> str:
    """Return a PTX name as a C++ identifier."""
    return re.sub(r"\W", lambda c: f"_{ord(c.group()):x}_", name)


@dataclass(frozen=True)
class Rule:
    translate: Handler
    modifiers: frozenset[str]


RULES: dict[str, Rule] = {}

ROUNDING = "rn rz rm rp"
# Cache hints, which have no effect here.
CACHING = (
    "ca cg cs cv wb wt lu nc uni L1::evict_normal L1::evict_unchanged L1::evict_first "
    "L1::evict_last L1::no_allocate L2::evict_normal L2::evict_first L2::evict_last "
    "L2::cache_hint L2::64B L2::128B L2::256B"
)
SCOPES = "cta cluster gpu sys"
SPACES = "shared shared::cta shared::cluster global local param param::entry param::func const"


def rule(opcodes: str, modifiers: str = "") -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for opcode in opcodes.split():
            RULES[opcode] = Rule(handler, frozenset(modifiers.split()))
        return handler

    return register


def apply(f: FunctionTranslator, i: Instruction) -> None:
    known = RULES.get(i.opcode)
    if not known:
        raise UnsupportedError("unknown instruction")
    if unknown := [m for m in i.modifiers if m not in known.modifiers]:
        raise UnsupportedError(f"unknown modifier .{' .'.join(unknown)}")
    known.translate(f, i)


def type_of(i: Instruction) -> str:
    if not i.types:
        raise UnsupportedError("no type")
    return i.types[-1]


def cpp(type_: str) -> str:
    return CPP[type_]


def is_float(type_: str) -> bool:
    return type_ in ("f32", "f64")


def is_half(type_: str) -> bool:
    return type_ in ("f16", "bf16")


def is_pair(type_: str) -> bool:
    return type_ in ("f16x2", "bf16x2")


def boolean(value: bool) -> str:
    return "true" if value else "false"


def unsigned(type_: str) -> str:
    return f"u{8 * SIZES[type_]}"


def neutral_type(f: FunctionTranslator, i: Instruction, register: str) -> str:
    """Return the type for an instruction that only moves bits: floating if the register is."""
    type_ = type_of(i)
    found = f.register(register, i.scope)
    if found and found[1] in ("f32", "f64") and SIZES[type_] == SIZES[found[1]]:
        return found[1]
    return type_


def results(f: FunctionTranslator, registers: tuple[str, ...], type_: str) -> None:
    for k, register in enumerate(registers):
        f.write(register, f"result[{k}]", type_)
    f.emit("}")


def array(f: FunctionTranslator, name: str, registers: tuple[str, ...], type_: str) -> None:
    values = ", ".join(f.read(r, type_) for r in registers)
    f.emit(f"const {cpp(type_)} {name}[] = {{{values}}};")
