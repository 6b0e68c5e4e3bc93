"""What each PTX instruction does, as C++.

A handler is registered with every modifier that it takes into account (or that changes nothing
here). An instruction with any other modifier is refused: better no answer than a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .ptx import SIZES, Instruction, UnsupportedError

if TYPE_CHECKING:
    from .translate import FunctionTranslator

Handler = Callable[["FunctionTranslator", Instruction], None]


@dataclass(frozen=True)
class Rule:
    translate: Handler
    modifiers: frozenset[str]


RULES: dict[str, Rule] = {}

ROUNDING = "rn rz rm rp"
# What only says how memory is to be cached changes nothing here.
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


def translate_instruction(f: FunctionTranslator, i: Instruction) -> None:
    known = RULES.get(i.opcode)
    if not known:
        raise UnsupportedError("unknown instruction")
    if unknown := [m for m in i.modifiers if m not in known.modifiers]:
        raise UnsupportedError(f"unknown modifier .{' .'.join(unknown)}")
    known.translate(f, i)


def operand_types(i: Instruction) -> Iterator[tuple[str, str]]:
    """Operands with the type they are used as, as far as that says what a register holds."""
    if not i.types:
        return
    first, last = i.types[0], i.types[-1]
    if i.opcode in ("cvt", "set"):
        yield i.operands[0], first
        for operand in i.operands[1:]:
            yield operand, last
    elif i.opcode == "setp":
        for operand in i.operands[1:3]:
            yield operand, last
    elif i.opcode in ("mma", "wmma"):
        for operand, type_ in zip(i.operands, i.types):
            yield operand, type_ if type_ in ("f32", "f64") else "u32"
    elif i.opcode in ("ld", "ldu"):
        yield i.operands[0], last
    elif i.opcode in ("st", "mov", "selp"):
        for operand in i.operands if i.opcode == "mov" else i.operands[:2]:
            if not operand.startswith("["):
                yield operand, last
    elif i.opcode in ("add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt", "rsqrt") or (
        i.opcode in ("ex2", "lg2", "sin", "cos", "tanh", "abs", "neg", "min", "max", "copysign")
    ):
        for operand in i.operands:
            yield operand, last
    elif i.opcode in ("and", "or", "xor", "not", "shl", "shr", "lop3", "prmt", "shf", "bfe", "bfi"):
        for operand in i.operands:
            yield operand, "u32"


def type_of(i: Instruction) -> str:
    if not i.types:
        raise UnsupportedError("no type")
    return i.types[-1]


def cpp(type_: str) -> str:
    from .translate import CPP

    return CPP[type_]


def is_float(type_: str) -> bool:
    return type_ in ("f32", "f64")


def is_half(type_: str) -> bool:
    return type_ in ("f16", "bf16")


def is_pair(type_: str) -> bool:
    return type_ in ("f16x2", "bf16x2")


def boolean(value: bool) -> str:
    return "true" if value else "false"


# --- Arithmetic ---


def compute(f: FunctionTranslator, i: Instruction, formula: str, wide: bool = False) -> None:
    """`formula` in {0}, {1} ..., element by element, in the type's own arithmetic.

    Halves are computed in f32, or in f64 if `wide` (where f32 would round twice).
    """
    type_ = type_of(i)
    if is_pair(type_):
        half = boolean(type_ == "bf16x2")
        operands = [f.read(o, type_) for o in i.operands[1:]]
        elements = []
        for shift in (0, 16):
            values = [f"from_half<{half}>(u16({o} >> {shift}))" for o in operands]
            elements.append(_half(i, half, formula, values, wide))
        f.write(i.operands[0], f"pack({', '.join(elements)})", type_)
    elif is_half(type_):
        half = boolean(type_ == "bf16")
        values = [f"from_half<{half}>({f.read(o, type_)})" for o in i.operands[1:]]
        f.write(i.operands[0], _half(i, half, formula, values, wide), type_)
    else:
        operands = [f.read(o, type_) for o in i.operands[1:]]
        if i.has("ftz") and type_ == "f32":
            operands = [f"flush({o})" for o in operands]
        value = formula.format(*operands, T=cpp(type_))
        f.write(i.operands[0], finish(i, value, type_), type_)


def _half(i: Instruction, half: str, formula: str, values: list[str], wide: bool) -> str:
    kind = "f64" if wide else "f32"
    value = formula.format(*(f"{kind}({v})" for v in values), T=kind)
    if i.has("relu"):
        value = f"maximum_nan({kind}({value}), {kind}(0))"
    if i.has("sat"):
        value = f"saturate({kind}({value}))"
    return f"to_half<{half}>({kind}({value}))"


def finish(i: Instruction, value: str, type_: str) -> str:
    if i.has("sat"):
        if not is_float(type_):
            raise UnsupportedError("saturation of integers")
        value = f"saturate({cpp(type_)}({value}))"
    if i.has("ftz") and type_ == "f32":
        value = f"flush({value})"
    return value


def direction(i: Instruction) -> str | None:
    """'z', 'm' or 'p' if the result is not rounded to nearest."""
    for m in ("rz", "rm", "rp"):
        if i.has(m):
            return m[1]
    return None


def arithmetic(
    f: FunctionTranslator, i: Instruction, formula: str, directed: str, sign: str
) -> None:
    """+, -, * or fma, in any rounding. `directed` is the f32 formula, `sign` names the f64 one."""
    mode, type_ = direction(i), type_of(i)
    if not mode:
        compute(f, i, formula, wide=True)
    elif type_ == "f32":
        compute(f, i, directed.format("{0}", "{1}", "{2}", mode=mode))
    elif type_ == "f64":
        operands = ["{0}", "{1}", "{2}" if len(i.operands) > 3 else "0"]
        compute(f, i, f"directed_f64('{mode}', '{sign}', {', '.join(operands)})")
    else:
        raise UnsupportedError("directed rounding of this type")


def carrying(f: FunctionTranslator, i: Instruction, sign: str) -> None:
    """add.cc, addc, sub.cc, subc: the carry is one variable of the function."""
    f.needs_carry = True
    type_ = type_of(i)
    own, wide = cpp(type_), {4: "u64", 8: "u128"}[SIZES[type_]]
    unsigned = own.replace("s", "u")
    a, b = (f"{wide}({unsigned}({f.read(o, type_)}))" for o in i.operands[1:3])
    carry = f" {sign} {wide}(carry)" if i.opcode.endswith("c") else ""
    f.emit(f"{{ const {wide} wide = {a} {sign} {b}{carry};")
    if i.has("cc"):
        f.emit(f"carry = wide >> {8 * SIZES[type_]} & 1;")
    f.write(i.operands[0], f"{own}(wide)", type_)
    f.emit("}")


@rule("add addc", f"{ROUNDING} ftz sat cc")
def add(f: FunctionTranslator, i: Instruction) -> None:
    if i.has("cc") or i.opcode == "addc":
        carrying(f, i, "+")
    elif i.has("sat") and type_of(i) == "s32":
        value = (
            f"saturated<s32>(s64({f.read(i.operands[1], 's32')}) + {f.read(i.operands[2], 's32')})"
        )
        f.write(i.operands[0], value, "s32")
    else:
        arithmetic(f, i, "({0} + {1})", "add_directed<'{mode}'>({0}, {1})", "+")


@rule("sub subc", f"{ROUNDING} ftz sat cc")
def sub(f: FunctionTranslator, i: Instruction) -> None:
    if i.has("cc") or i.opcode == "subc":
        carrying(f, i, "-")
    elif i.has("sat") and type_of(i) == "s32":
        value = (
            f"saturated<s32>(s64({f.read(i.operands[1], 's32')}) - {f.read(i.operands[2], 's32')})"
        )
        f.write(i.operands[0], value, "s32")
    else:
        arithmetic(f, i, "({0} - {1})", "add_directed<'{mode}'>({0}, -{1})", "-")


WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


@rule("mul mul24", f"{ROUNDING} ftz sat lo hi wide")
def mul(f: FunctionTranslator, i: Instruction) -> None:
    type_ = type_of(i)
    if i.opcode == "mul24":
        raise UnsupportedError("24-bit multiplication")
    if i.has("wide"):
        wide = WIDER[type_]
        a, b = (f"{wide}({f.read(o, type_)})" for o in i.operands[1:3])
        f.write(i.operands[0], f"({a} * {b})", wide)
    elif i.has("hi"):
        compute(f, i, "multiply_high({0}, {1})")
    else:
        arithmetic(f, i, "({0} * {1})", "multiply_directed<'{mode}'>({0}, {1})", "*")


@rule("mad madc", f"{ROUNDING} ftz sat lo hi wide cc")
def mad(f: FunctionTranslator, i: Instruction) -> None:
    type_ = type_of(i)
    if is_float(type_):
        fma(f, i)
        return
    if i.has("sat"):
        raise UnsupportedError("saturation")
    wide = i.has("wide")
    result = WIDER[type_] if wide else type_
    own = cpp(result)
    a, b = f.read(i.operands[1], type_), f.read(i.operands[2], type_)
    c = f.read(i.operands[3], result)
    if i.has("hi"):
        product = f"multiply_high({a}, {b})"
    elif wide:
        product = f"({own}({a}) * {own}({b}))"
    else:
        product = f"{own}({a} * {b})"
    if not i.has("cc") and i.opcode == "mad":
        f.write(i.operands[0], f"{own}({product} + {c})", result)
        return
    f.needs_carry = True
    unsigned = own.replace("s", "u")
    bigger = {4: "u64", 8: "u128"}[SIZES[result]]
    carry = " + carry" if i.opcode == "madc" else ""
    f.emit(f"{{ const {bigger} wide = {bigger}({unsigned}({product})) + {unsigned}({c}){carry};")
    if i.has("cc"):
        f.emit(f"carry = wide >> {8 * SIZES[result]} & 1;")
    f.write(i.operands[0], f"{own}(wide)", result)
    f.emit("}")


@rule("fma", f"{ROUNDING} ftz sat relu")
def fma(f: FunctionTranslator, i: Instruction) -> None:
    if i.has("relu") and not (is_half(type_of(i)) or is_pair(type_of(i))):
        raise UnsupportedError("relu of this type")
    arithmetic(f, i, "fused({0}, {1}, {2})", "fused_directed<'{mode}'>({0}, {1}, {2})", "f")


@rule("div", f"{ROUNDING} approx full ftz")
def div(f: FunctionTranslator, i: Instruction) -> None:
    mode, type_ = direction(i), type_of(i)
    if not is_float(type_):
        compute(f, i, "divide({0}, {1})")
    elif i.has("approx"):
        compute(f, i, "divide_approx({0}, {1})")
    elif not mode:
        compute(f, i, "({0} / {1})")
    elif type_ == "f32":
        compute(f, i, f"directed_divide('{mode}', {{0}}, {{1}})")
    else:
        compute(f, i, f"directed_f64('{mode}', '/', {{0}}, {{1}}, 0)")


@rule("rem")
def rem(f: FunctionTranslator, i: Instruction) -> None:
    compute(f, i, "remainder({0}, {1})")


@rule("rcp", f"{ROUNDING} approx ftz")
def rcp(f: FunctionTranslator, i: Instruction) -> None:
    mode, type_ = direction(i), type_of(i)
    if not mode:
        compute(f, i, "({T}(1) / {0})")
    elif type_ == "f32":
        compute(f, i, f"directed_divide('{mode}', 1, {{0}})")
    else:
        compute(f, i, f"directed_f64('{mode}', '/', 1, {{0}}, 0)")


@rule("sqrt", f"{ROUNDING} approx ftz")
def sqrt(f: FunctionTranslator, i: Instruction) -> None:
    mode, type_ = direction(i), type_of(i)
    if not mode:
        compute(f, i, "__builtin_sqrtf({0})" if type_ == "f32" else "__builtin_sqrt({0})")
    elif type_ == "f32":
        compute(f, i, f"directed_sqrt('{mode}', {{0}})")
    else:
        compute(f, i, f"directed_f64('{mode}', 's', {{0}}, 0, 0)")


def function(opcode: str, modifiers: str, formula: str) -> None:
    @rule(opcode, modifiers)
    def apply(f: FunctionTranslator, i: Instruction) -> None:
        compute(f, i, formula)


function("rsqrt", "approx ftz", "{T}(1 / __builtin_sqrt(f64({0})))")
function("ex2", "approx ftz", "{T}(__builtin_exp2f({0}))")
function("lg2", "approx ftz", "{T}(__builtin_log2f({0}))")
function("sin", "approx ftz", "{T}(__builtin_sinf({0}))")
function("cos", "approx ftz", "{T}(__builtin_cosf({0}))")
function("tanh", "approx", "tanh_approx({0})")


@rule("abs", "ftz")
def absolute(f: FunctionTranslator, i: Instruction) -> None:
    type_ = type_of(i)
    if type_ == "f32":
        compute(f, i, "__builtin_fabsf({0})")
    elif type_[0] == "s":
        compute(f, i, "({0} < 0 ? {T}(-{0}) : {0})")
    elif is_half(type_) or is_pair(type_):
        mask = "0x7FFF7FFFu" if is_pair(type_) else "0x7FFF"
        f.write(i.operands[0], f"{cpp(type_)}({f.read(i.operands[1], type_)} & {mask})", type_)
    else:
        compute(f, i, "__builtin_fabs({0})")


@rule("neg", "ftz")
def neg(f: FunctionTranslator, i: Instruction) -> None:
    type_ = type_of(i)
    if is_half(type_) or is_pair(type_):
        mask = "0x80008000u" if is_pair(type_) else "0x8000"
        f.write(i.operands[0], f"{cpp(type_)}({f.read(i.operands[1], type_)} ^ {mask})", type_)
    else:
        compute(f, i, "{T}(-{0})")


@rule("copysign")
def copysign(f: FunctionTranslator, i: Instruction) -> None:
    compute(f, i, "{T}(__builtin_copysign({1}, {0}))")


def extremum(f: FunctionTranslator, i: Instruction, name: str) -> None:
    name += "_nan" * i.has("NaN")
    if i.has("relu") and not (is_half(type_of(i)) or is_pair(type_of(i))):
        raise UnsupportedError("relu of this type")
    formula = f"{name}({{T}}({{0}}), {{T}}({{1}}))"
    if len(i.operands) == 4:
        formula = f"{name}({formula}, {{T}}({{2}}))"
    compute(f, i, formula)


@rule("min", "ftz NaN relu")
def minimum(f: FunctionTranslator, i: Instruction) -> None:
    extremum(f, i, "minimum")


@rule("max", "ftz NaN relu")
def maximum(f: FunctionTranslator, i: Instruction) -> None:
    extremum(f, i, "maximum")


# --- Bits ---


function("and", "", "{T}({0} & {1})")
function("or", "", "{T}({0} | {1})")
function("xor", "", "{T}({0} ^ {1})")
function("cnot", "", "{T}({0} == 0)")
function("brev", "", "reverse_bits({0})")


@rule("not")
def bitwise_not(f: FunctionTranslator, i: Instruction) -> None:
    compute(f, i, "(!{0})" if type_of(i) == "pred" else "{T}(~{0})")


def shift(f: FunctionTranslator, i: Instruction, sign: str, name: str) -> None:
    type_ = type_of(i)
    value, count = f.read(i.operands[1], type_), f.read(i.operands[2], "u32")
    known = re.fullmatch(r"(\d+)u", count)
    if known and int(known[1]) < 8 * SIZES[type_]:
        f.write(i.operands[0], f"{cpp(type_)}({value} {sign} {count})", type_)
    else:
        f.write(i.operands[0], f"{name}({value}, {count})", type_)


@rule("shl")
def shl(f: FunctionTranslator, i: Instruction) -> None:
    shift(f, i, "<<", "shift_left")


@rule("shr")
def shr(f: FunctionTranslator, i: Instruction) -> None:
    shift(f, i, ">>", "shift_right")


@rule("shf", "l r wrap clamp")
def shf(f: FunctionTranslator, i: Instruction) -> None:
    low, high, count = (f.read(o, "u32") for o in i.operands[1:4])
    count = f"({count} & 31)" if i.has("wrap") else f"minimum({count}, 32u)"
    name = "funnel_left" if i.has("l") else "funnel_right"
    f.write(i.operands[0], f"{name}({low}, {high}, {count})", "b32")


def unsigned(type_: str) -> str:
    return f"u{8 * SIZES[type_]}"


@rule("bfe")
def bfe(f: FunctionTranslator, i: Instruction) -> None:
    type_ = type_of(i)
    value = f.read(i.operands[1], type_)
    position, length = (f.read(o, "u32") for o in i.operands[2:4])
    name = f"extract_bits<{cpp(type_)}, {unsigned(type_)}>"
    f.write(i.operands[0], f"{name}({value}, {position}, {length})", type_)


@rule("bfi")
def bfi(f: FunctionTranslator, i: Instruction) -> None:
    type_ = type_of(i)
    a, b = (f.read(o, type_) for o in i.operands[1:3])
    position, length = (f.read(o, "u32") for o in i.operands[3:5])
    f.write(i.operands[0], f"insert_bits({a}, {b}, {position}, {length})", type_)


@rule("bfind", "shiftamt")
def bfind(f: FunctionTranslator, i: Instruction) -> None:
    type_ = type_of(i)
    name = f"find_leading<{cpp(type_)}, {unsigned(type_)}>"
    value = f"{name}({f.read(i.operands[1], type_)}, {boolean(i.has('shiftamt'))})"
    f.write(i.operands[0], value, "u32")


@rule("clz")
def clz(f: FunctionTranslator, i: Instruction) -> None:
    type_ = type_of(i)
    suffix = "" if SIZES[type_] == 4 else "ll"
    x = f.read(i.operands[1], type_)
    f.write(i.operands[0], f"({x} ? u32(__builtin_clz{suffix}({x})) : {8 * SIZES[type_]}u)", "u32")


@rule("popc")
def popc(f: FunctionTranslator, i: Instruction) -> None:
    f.write(i.operands[0], f"u32(__builtin_popcountll({f.read(i.operands[1], type_of(i))}))", "u32")


@rule("prmt")
def prmt(f: FunctionTranslator, i: Instruction) -> None:
    operands = ", ".join(f.read(o, "u32") for o in i.operands[1:4])
    f.write(i.operands[0], f"permute_bytes({operands})", "b32")


@rule("lop3")
def lop3(f: FunctionTranslator, i: Instruction) -> None:
    operands = ", ".join(f.read(o, "u32") for o in i.operands[1:5])
    f.write(i.operands[0], f"logic3({operands})", "b32")


@rule("dp4a")
def dp4a(f: FunctionTranslator, i: Instruction) -> None:
    a, b, c = (f.read(o, "u32") for o in i.operands[1:4])
    signs = [boolean(t == "s32") for t in i.types]
    f.write(i.operands[0], f"u32(dot_bytes({a}, {signs[0]}, {b}, {signs[1]}, s32({c})))", "b32")


# --- Comparison and selection ---

COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
COMPARE = " ".join([*COMPARISONS, *UNORDERED, "num", "nan", "and", "or", "xor", "ftz"])


def comparison(f: FunctionTranslator, i: Instruction, type_: str) -> str:
    name = i.choice(*COMPARISONS, *UNORDERED, "num", "nan")
    x, y = f.read(i.operands[1], type_), f.read(i.operands[2], type_)
    if is_half(type_):
        half = boolean(type_ == "bf16")
        x, y = f"from_half<{half}>({x})", f"from_half<{half}>({y})"
    elif not is_float(type_):
        return f"({x} {COMPARISONS[name]} {y})"
    if i.has("ftz") and type_ == "f32":
        x, y = f"flush({x})", f"flush({y})"
    if name == "num":
        return f"(!is_nan({x}) && !is_nan({y}))"
    if name == "nan":
        return f"(is_nan({x}) || is_nan({y}))"
    if name in UNORDERED:
        opposite = {"eq": "<>", "ne": "==", "lt": ">=", "le": ">", "gt": "<=", "ge": "<"}
        ordered = UNORDERED[name]
        if ordered == "eq":
            return f"(!({x} < {y}) && !({x} > {y}))"
        return f"(!({x} {opposite[ordered]} {y}))"
    if name == "ne":
        return f"({x} < {y} || {x} > {y})"
    return f"({x} {COMPARISONS[name]} {y})"


def combined(f: FunctionTranslator, i: Instruction, value: str) -> str:
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        if i.has(name):
            return f"bool({value} {sign} {f.read(i.operands[3], 'pred')})"
    return value


@rule("setp", COMPARE)
def setp(f: FunctionTranslator, i: Instruction) -> None:
    if is_pair(type_of(i)):
        raise UnsupportedError("comparison of pairs")
    value = comparison(f, i, type_of(i))
    first, _, second = i.operands[0].partition("|")
    if not second:
        f.write(first, combined(f, i, value), "pred")
        return
    f.emit(f"{{ const bool yes = {combined(f, i, value)}, no = {combined(f, i, f'!{value}')};")
    f.write(first, "yes", "pred")
    f.write(second, "no", "pred")
    f.emit("}")


@rule("set", COMPARE)
def set_(f: FunctionTranslator, i: Instruction) -> None:
    result = i.types[0]
    value = combined(f, i, comparison(f, i, i.types[-1]))
    if result == "f32":
        f.write(i.operands[0], f"({value} ? 1.f : 0.f)", result)
    elif is_half(result):
        one = "0x3F80" if result == "bf16" else "0x3C00"
        f.write(i.operands[0], f"u16({value} ? {one} : 0)", result)
    elif is_pair(result):
        raise UnsupportedError("comparison of pairs")
    else:
        f.write(i.operands[0], f"{cpp(result)}({value} ? -1 : 0)", result)


@rule("selp")
def selp(f: FunctionTranslator, i: Instruction) -> None:
    type_ = neutral_type(f, i, i.operands[0])
    a, b = f.read(i.operands[1], type_), f.read(i.operands[2], type_)
    f.write(i.operands[0], f"({f.read(i.operands[3], 'pred')} ? {a} : {b})", type_)


@rule("slct", "ftz")
def slct(f: FunctionTranslator, i: Instruction) -> None:
    result, condition = i.types
    a, b = f.read(i.operands[1], result), f.read(i.operands[2], result)
    f.write(i.operands[0], f"({f.read(i.operands[3], condition)} >= 0 ? {a} : {b})", result)


@rule("testp", "finite infinite number notanumber normal subnormal")
def testp(f: FunctionTranslator, i: Instruction) -> None:
    x = f.read(i.operands[1], type_of(i))
    tests = {
        "finite": f"__builtin_isfinite({x})",
        "infinite": f"__builtin_isinf({x})",
        "number": f"!is_nan({x})",
        "notanumber": f"is_nan({x})",
        "normal": f"__builtin_isnormal({x})",
        "subnormal": f"(__builtin_isfinite({x}) && !__builtin_isnormal({x}) && {x} != 0)",
    }
    f.write(i.operands[0], f"bool({tests[i.choice(*tests)]})", "pred")


# --- Moving and converting ---


def neutral_type(f: FunctionTranslator, i: Instruction, register: str) -> str:
    """For instructions that only pass bits on: the floating type, if that is what is passed."""
    type_ = type_of(i)
    found = f.register(register, i.scope)
    if found and found[1] in ("f32", "f64") and SIZES[type_] == SIZES[found[1]]:
        return found[1]
    return type_


@rule("mov")
def mov(f: FunctionTranslator, i: Instruction) -> None:
    type_ = type_of(i)
    to, source = i.operands
    if to.startswith("{"):
        parts = f.vector(to)
        width = SIZES[type_] // len(parts)
        piece = f"b{8 * width}"
        f.emit(f"{{ const {cpp(type_)} whole = {f.read(source, type_)};")
        for k, part in enumerate(parts):
            if part != "_":
                f.write(part, f"{cpp(piece)}(whole >> {8 * width * k})", piece)
        f.emit("}")
    elif source.startswith("{"):
        parts = f.vector(source)
        width = SIZES[type_] // len(parts)
        whole = {2: "u16", 4: "u32", 8: "u64", 16: "u128"}[SIZES[type_]]
        pieces = (
            f"{whole}({f.read(p, f'b{8 * width}')}) << {8 * width * k}" for k, p in enumerate(parts)
        )
        f.write(to, f"{whole}({' | '.join(f'({p})' for p in pieces)})", f"b{8 * SIZES[type_]}")
    else:
        type_ = neutral_type(f, i, to)
        f.write(to, f.read(source, type_), type_)


@rule("cvta", "to global shared shared::cta shared::cluster local const param param::entry")
def cvta(f: FunctionTranslator, i: Instruction) -> None:
    to, source = i.operands
    if not i.has("shared", "shared::cta", "shared::cluster"):
        f.write(to, f.read(source, "u64"), "u64")
    elif i.has("to"):
        f.write(to, f"u64(shared_address_of(self, {f.site}, {f.read(source, 'u64')}))", "u64")
    elif i.has("shared::cluster"):
        f.write(to, f"u64(cluster_shared(self, {f.site}, u32({f.read(source, 'u64')}), 0))", "u64")
    else:
        f.write(to, f"u64(shared + {f.read(source, 'u64')})", "u64")


@rule("cvt", f"{ROUNDING} rna rni rzi rmi rpi ftz sat relu satfinite pack")
def cvt(f: FunctionTranslator, i: Instruction) -> None:
    to, source = i.types[0], i.types[-1]
    if len(i.types) != 2 or i.has("satfinite", "pack"):
        raise UnsupportedError("conversion")
    half = boolean(to.startswith("bf16"))
    if is_pair(to) and source == "f32":
        if direction(i):
            raise UnsupportedError("directed rounding to 16 bits")
        high, low = (f.read(o, "f32") for o in i.operands[1:3])
        if i.has("relu"):
            high, low = (f"maximum_nan({x}, 0.f)" for x in (high, low))
        f.write(i.operands[0], f"pack(to_half<{half}>({low}), to_half<{half}>({high}))", to)
        return
    x = f.read(i.operands[1], source)
    if to == "tf32":
        if not i.has("rna"):
            raise UnsupportedError("rounding to tf32 other than .rna")
        f.write(i.operands[0], f"to_tf32({x})", to)
        return
    if is_pair(to) or is_pair(source):
        raise UnsupportedError("conversion of pairs")
    if is_half(source):
        x, source = f"from_half<{boolean(source == 'bf16')}>({x})", "f32"
    if i.has("ftz") and source == "f32":
        x = f"flush({x})"
    if is_float(source):
        value = from_float(i, x, source, to)
    elif is_float(to) or is_half(to):
        value = from_integer(i, x, source, to)
    elif i.has("sat"):
        if source == "u64":
            raise UnsupportedError("saturation from u64")
        value = f"saturated<{cpp(to)}>(s64({x}))"
    else:
        value = f"{cpp(to)}({x})"
    if is_float(to):
        value = finish(i, value, to)
    f.write(i.operands[0], value, to)


def from_float(i: Instruction, x: str, source: str, to: str) -> str:
    mode = next((m[1] for m in ("rni", "rzi", "rmi", "rpi") if i.has(m)), None)
    if not (is_float(to) or is_half(to)):
        return f"to_integer<{cpp(to)}, '{mode or 'z'}'>({x})"
    if mode:
        x = f"round_to_integer<'{mode}'>({x})"
    if i.has("relu"):
        x = f"maximum_nan({x}, {source}(0))"
    if to == source:
        return x
    if is_half(to):
        if direction(i):
            raise UnsupportedError("directed rounding to 16 bits")
        if i.has("sat"):
            x = f"saturate({x})"
        return f"to_half<{boolean(to == 'bf16')}>({x})"
    if to == "f32" and direction(i):
        return f"round_to_f32<'{direction(i)}'>({x}, 0)"
    return f"{to}({x})"


def from_integer(i: Instruction, x: str, source: str, to: str) -> str:
    mode = direction(i)
    if is_half(to):
        if mode:
            raise UnsupportedError("directed rounding to 16 bits")
        return f"to_half<{boolean(to == 'bf16')}>(f64({x}))"
    if mode:
        name = "directed_from_integer" if to == "f32" else "directed_f64_from_integer"
        signed = source[0] == "s"
        return f"{name}('{mode}', {boolean(signed)}, u64({'s64' if signed else 'u64'}({x})))"
    return f"{to}({x})"


# --- Memory ---


def vector_length(i: Instruction) -> int:
    return 8 if i.has("v8") else 4 if i.has("v4") else 2 if i.has("v2") else 1


ORDER = "weak volatile relaxed acquire release"


@rule("ld ldu", f"{ORDER} {SCOPES} {SPACES} {CACHING} v2 v4 v8")
def ld(f: FunctionTranslator, i: Instruction) -> None:
    type_, count = type_of(i), vector_length(i)
    size = SIZES[type_]
    parts = f.vector(i.operands[0])
    where = f.pointer(i.operands[1], f.space(), size * count)
    strong = i.has("volatile", "relaxed", "acquire")
    types = [neutral_type(f, i, p) for p in parts]
    if count == 1 and not strong:
        f.write(parts[0], f"load<{cpp(types[0])}>({where})", types[0])
        return
    f.emit(f"{{ const char* const from = {where};")
    for k, t in enumerate(types):
        if strong:
            bits = unsigned(t)
            value = f"load_strong<{bits}>(self, from + {k * size}, {boolean(i.has('acquire'))}, {f.site})"
            value = f.cast(value, bits, cpp(t))
        else:
            value = f"load<{cpp(t)}>(from + {k * size})"
        f.emit(f"const {cpp(t)} element{k} = {value};")
    for k, (part, t) in enumerate(zip(parts, types)):
        if part != "_":
            f.write(part, f"element{k}", t)
    f.emit("}")


@rule("st", f"{ORDER} {SCOPES} {SPACES} {CACHING} v2 v4 v8 async mbarrier::complete_tx::bytes")
def st(f: FunctionTranslator, i: Instruction) -> None:
    type_, count = type_of(i), vector_length(i)
    size = SIZES[type_]
    parts = f.vector(i.operands[1])
    if i.has("async"):
        st_async(f, i, parts, type_)
        return
    where = f.pointer(i.operands[0], f.space(), size * count)
    strong = i.has("volatile", "relaxed", "release")
    f.emit(f"{{ char* const to = {where};")
    for k, part in enumerate(parts):
        t = neutral_type(f, i, part)
        value = f.read(part, t)
        if strong:
            value = f.cast(value, cpp(t), unsigned(t))
            release = boolean(i.has("release") and k == 0)
            f.emit(f"store_strong<{unsigned(t)}>(self, to + {k * size}, {value}, {release});")
        else:
            f.emit(f"store<{cpp(t)}>(to + {k * size}, {value});")
    f.emit("}")


def st_async(f: FunctionTranslator, i: Instruction, parts: tuple[str, ...], type_: str) -> None:
    if not i.has("mbarrier::complete_tx::bytes"):
        raise UnsupportedError("st.async without an mbarrier")
    size = SIZES[type_] * len(parts)
    values = ", ".join(f.read(p, f"b{8 * SIZES[type_]}") for p in parts)
    to = f.pointer(i.operands[0], "shared::cluster", size)
    barrier = f.pointer(i.operands[2], "shared::cluster", 8)
    f.emit(f"{{ const {unsigned(type_)} values[] = {{{values}}};")
    f.emit(f"store_async(self, {f.site}, {to}, values, {size}, {barrier}); }}")


ATOMICS = {
    "add": "old + value",
    "exch": "value",
    "cas": "old == expected ? value : old",
    "min": "minimum(old, value)",
    "max": "maximum(old, value)",
    "and": "old & value",
    "or": "old | value",
    "xor": "old ^ value",
    "inc": "old >= value ? 0 : old + 1",
    "dec": "old == 0 || old > value ? value : old - 1",
}


@rule(
    "atom red",
    f"{' '.join(ATOMICS)} {SCOPES} relaxed acquire release acq_rel noftz "
    "shared shared::cta shared::cluster global L2::cache_hint v2 v4 v8",
)
def atom(f: FunctionTranslator, i: Instruction) -> None:
    type_, name = type_of(i), i.choice(*ATOMICS)
    result, operands = ("_", i.operands) if i.opcode == "red" else (i.operands[0], i.operands[1:])
    count, size = vector_length(i), SIZES[type_]
    where = f.pointer(operands[0], f.space(), size * count)
    acquire, release = i.has("acquire", "acq_rel"), i.has("release", "acq_rel")
    own, bits = cpp(type_), unsigned(type_)
    f.emit(f"{{ char* const at = {where};")
    results = f.vector(result) if result != "_" else ("_",) * count
    for k, value in enumerate(f.vector(operands[1])):
        first, last = k == 0, k == count - 1
        if name == "cas":
            f.emit(f"const {own} expected = {f.read(operands[1], type_)};")
            value = operands[2]
        if is_half(type_) or is_pair(type_):
            update = half_update(type_, name)
        else:
            update = ATOMICS[name]
        f.emit(f"const {own} value{k} = {f.read(value, type_)};")
        f.emit(
            f"[[maybe_unused]] const {bits} before{k} = read_modify_write<{bits}>(self, "
            f"at + {k * size}, {boolean(acquire and last)}, {boolean(release and first)}, {f.site}, "
            f"[=]({bits} raw) {{ const {own} old = {f.cast('raw', bits, own)}, value = value{k};"
            f" (void)old; return {f.cast(f'{own}({update})', own, bits)}; }});"
        )
        if results[k] != "_":
            f.write(results[k], f.cast(f"before{k}", bits, own), type_)
    f.emit("}")


def half_update(type_: str, name: str) -> str:
    formulas = {"add": "{0} + {1}", "min": "minimum({0}, {1})", "max": "maximum({0}, {1})"}
    if name not in formulas:
        raise UnsupportedError("atomic operation on 16-bit floats")
    half = boolean(type_.startswith("bf16"))
    shifts = (0, 16) if is_pair(type_) else (0,)
    parts = []
    for shift_ in shifts:
        operands = (f"from_half<{half}>(u16({x} >> {shift_}))" for x in ("old", "value"))
        parts.append(f"to_half<{half}>({formulas[name].format(*operands)})")
    return f"pack({parts[0]}, {parts[1]})" if is_pair(type_) else parts[0]


@rule(
    "fence membar",
    f"sc acq_rel acquire release {SCOPES} {SPACES} gl proxy async async::global "
    "async::shared::cta async::shared::cluster mbarrier_init",
)
def fence(f: FunctionTranslator, i: Instruction) -> None:
    f.emit("fence(self);")


@rule("prefetch prefetchu", f"{SPACES} L1 L2 {CACHING}")
@rule("discard applypriority", f"{SPACES} L2 {CACHING}")
@rule("griddepcontrol", "launch_dependents wait")
@rule("setmaxnreg", "inc dec sync aligned")
def nothing(f: FunctionTranslator, i: Instruction) -> None:
    """Changes speed, not results."""


@rule(
    "createpolicy", "fractional L2::evict_last L2::evict_normal L2::evict_first L2::evict_unchanged"
)
def createpolicy(f: FunctionTranslator, i: Instruction) -> None:
    f.write(i.operands[0], "u64(0)", "b64")


@rule("isspacep", "shared shared::cta shared::cluster global")
def isspacep(f: FunctionTranslator, i: Instruction) -> None:
    pointer = f.read(i.operands[1], "u64")
    if i.has("global"):
        f.write(i.operands[0], f"!is_shared(self, {pointer}, true)", "pred")
    else:
        f.write(
            i.operands[0],
            f"is_shared(self, {pointer}, {boolean(i.has('shared::cluster'))})",
            "pred",
        )


@rule("mapa", "shared::cluster")
def mapa(f: FunctionTranslator, i: Instruction) -> None:
    rank = f.read(i.operands[2], "u32")
    type_ = type_of(i)
    if i.has("shared::cluster"):
        address = f"u32({f.read(i.operands[1], type_)})"
        f.write(
            i.operands[0], f"{cpp(type_)}(map_to_rank(self, {f.site}, {address}, {rank}))", type_
        )
    else:
        pointer = f.read(i.operands[1], "u64")
        f.write(i.operands[0], f"map_generic_to_rank(self, {f.site}, {pointer}, {rank})", "u64")


@rule("getctarank", "shared::cluster")
def getctarank(f: FunctionTranslator, i: Instruction) -> None:
    address = f.read(i.operands[1], type_of(i))
    if not i.has("shared::cluster"):
        address = f"shared_address_of(self, {f.site}, {address})"
    f.write(i.operands[0], f"rank_of_shared(u32({address}), self)", "u32")


# --- Control ---


@rule("bra", "uni")
def bra(f: FunctionTranslator, i: Instruction) -> None:
    f.emit(f"goto {f.label(i.operands[0], i.scope)};")


@rule("ret exit", "uni")
def ret(f: FunctionTranslator, i: Instruction) -> None:
    if i.opcode == "exit" and not f.function.is_kernel:
        raise UnsupportedError("exit in a device function")
    f.emit("return;")


@rule("trap")
def trap(f: FunctionTranslator, i: Instruction) -> None:
    f.emit(f'fail(self, {f.site}, "trap");')


@rule("brkpt pmevent")
def breakpoint_(f: FunctionTranslator, i: Instruction) -> None:
    """Only debuggers and profilers notice."""


@rule("nanosleep")
def nanosleep(f: FunctionTranslator, i: Instruction) -> None:
    f.emit(f"yield(self, {f.site});")


@rule("call", "uni")
def call(f: FunctionTranslator, i: Instruction) -> None:
    operands = list(i.operands)
    result = None
    if operands[0].startswith("("):
        result = operands.pop(0)[1:-1].strip()
    name = operands.pop(0)
    arguments = []
    if operands and operands[0].startswith("("):
        arguments = [a.strip() for a in operands[0][1:-1].split(",") if a.strip()]
    arrays = [f.array(a) for a in arguments]
    if name == "__assertfail":
        f.emit(f'fail(self, {f.site}, "assertion failed");')
    elif name == "vprintf":
        f.emit(f"device_printf(load<const char*>({arrays[0]}), load<const char*>({arrays[1]}));")
        f.emit(f"store<u32>({f.array(result)}, 0);")
    elif name in f.module.functions:
        target = f"function_{re.sub(r'[^A-Za-z0-9_]', lambda c: f'_{ord(c.group()):x}_', name)}"
        f.emit(f"{{ char* values[] = {{{', '.join(map(str, arrays)) or 'nullptr'}}};")
        f.emit(f"{target}(self, {f.array(result) if result else 'nullptr'}, values); }}")
    else:
        raise UnsupportedError(f"call of {name}")


# --- Barriers and warps ---


@rule(
    "bar barrier",
    "sync arrive red popc and or cta aligned warp cluster wait release acquire relaxed",
)
def barrier(f: FunctionTranslator, i: Instruction) -> None:
    if i.has("warp"):
        f.emit(f"warp_barrier(self, {f.site}, {f.read(i.operands[0], 'u32')});")
    elif i.has("cluster"):
        if i.has("arrive"):
            f.emit(f"cluster_barrier_arrive(self, {f.site}, {boolean(not i.has('relaxed'))});")
        else:
            f.emit(f"cluster_barrier_wait(self, {f.site}, {boolean(not i.has('relaxed'))});")
    elif i.has("red"):
        kind = {"popc": "popc", "and": "all", "or": "any"}[i.choice("popc", "and", "or")]
        rest = i.operands[1:]
        count = f.read(rest[1], "u32") if len(rest) == 3 else "0"
        value = (
            f"block_barrier_reduce(self, {f.site}, Reduce::{kind}, {f.read(rest[0], 'u32')}, "
            f"{count}, {f.read(rest[-1], 'pred')})"
        )
        if kind == "popc":
            f.write(i.operands[0], value, "u32")
        else:
            f.write(i.operands[0], f"({value} != 0)", "pred")
    else:
        name = "block_barrier_arrive" if i.has("arrive") else "block_barrier"
        count = f.read(i.operands[1], "u32") if len(i.operands) > 1 else "0"
        f.emit(f"{name}(self, {f.site}, {f.read(i.operands[0], 'u32')}, {count});")


@rule("shfl", "sync up down bfly idx")
def shfl(f: FunctionTranslator, i: Instruction) -> None:
    if not i.has("sync"):
        raise UnsupportedError("shfl without .sync")
    mode = {"up": "u", "down": "d", "bfly": "b", "idx": "i"}[i.choice("up", "down", "bfly", "idx")]
    value, lane, clamp, mask = (f.read(o, "u32") for o in i.operands[1:5])
    result, _, in_range = i.operands[0].partition("|")
    f.emit("{ bool in_range;")
    f.emit(
        f"const u32 moved = warp_shuffle(self, {f.site}, '{mode}', {value}, {lane}, {clamp}, "
        f"{mask}, &in_range);"
    )
    f.write(result, "moved", "b32")
    if in_range:
        f.write(in_range, "in_range", "pred")
    f.emit("}")


@rule("vote", "sync all any uni ballot")
def vote(f: FunctionTranslator, i: Instruction) -> None:
    if not i.has("sync"):
        raise UnsupportedError("vote without .sync")
    predicate, mask = f.read(i.operands[1], "pred"), f.read(i.operands[2], "u32")
    ballot = f"warp_ballot(self, {f.site}, {mask}, {{}})"
    if i.has("ballot"):
        f.write(i.operands[0], ballot.format(predicate), "b32")
    elif i.has("any"):
        f.write(i.operands[0], f"({ballot.format(predicate)} != 0)", "pred")
    elif i.has("all"):
        f.write(i.operands[0], f"({ballot.format(f'!{predicate}')} == 0)", "pred")
    else:
        raise UnsupportedError("vote.uni")


@rule("match", "any all sync")
def match(f: FunctionTranslator, i: Instruction) -> None:
    result, _, equal = i.operands[0].partition("|")
    value, mask = f.read(i.operands[1], type_of(i)), f.read(i.operands[2], "u32")
    f.emit("{ bool equal;")
    f.emit(
        f"const u32 lanes = warp_match(self, {f.site}, {boolean(i.has('all'))}, {value}, {mask}, "
        "&equal);"
    )
    f.write(result, "lanes", "b32")
    if equal:
        f.write(equal, "equal", "pred")
    f.emit("}")


@rule("activemask")
def activemask(f: FunctionTranslator, i: Instruction) -> None:
    f.write(i.operands[0], "active_mask(self)", "b32")


@rule("redux", "sync add min max and or xor")
def redux(f: FunctionTranslator, i: Instruction) -> None:
    type_ = type_of(i)
    if is_float(type_):
        raise UnsupportedError("redux of floats")
    name = i.choice("add", "min", "max", "and", "or", "xor")
    name = f"bit_{name}" if name in ("and", "or", "xor") else name
    name = f"s{name}" if name in ("min", "max") and type_ == "s32" else name
    value, mask = f.read(i.operands[1], "u32"), f.read(i.operands[2], "u32")
    f.write(i.operands[0], f"warp_reduce(self, {f.site}, Combine::{name}, {value}, {mask})", "u32")


@rule("elect", "sync")
def elect(f: FunctionTranslator, i: Instruction) -> None:
    result, _, chosen = i.operands[0].partition("|")
    mask = f.read(i.operands[1], "u32")
    f.emit(f"{{ const u32 leader = __builtin_ctz({mask}); warp_barrier(self, {f.site}, {mask});")
    if result != "_":
        f.write(result, "leader", "b32")
    f.write(chosen, "(self.lane == leader)", "pred")
    f.emit("}")


# --- Matrices ---


def results(f: FunctionTranslator, registers: tuple[str, ...], type_: str) -> None:
    for k, register in enumerate(registers):
        f.write(register, f"result[{k}]", type_)
    f.emit("}")


def array(f: FunctionTranslator, name: str, registers: tuple[str, ...], type_: str) -> None:
    values = ", ".join(f.read(r, type_) for r in registers)
    f.emit(f"const {cpp(type_)} {name}[] = {{{values}}};")


@rule("mma", "sync aligned row col m16n8k4 m16n8k8 m16n8k16 m8n8k4")
def mma(f: FunctionTranslator, i: Instruction) -> None:
    d, a, b, c = (f.vector(o) for o in i.operands)
    shape = i.choice("m16n8k4", "m16n8k8", "m16n8k16", "m8n8k4")
    k = int(shape.partition("k")[2])
    if i.types == ("f64", "f64", "f64", "f64") and shape == "m8n8k4":
        f.emit("{ f64 result[2];")
        array(f, "c", c, "f64")
        f.emit(f"mma_f64(self, {f.site}, result, {f.read(a[0], 'f64')}, {f.read(b[0], 'f64')}, c);")
        results(f, d, "f64")
        return
    if i.types[0] != "f32" or i.types[3] != "f32" or shape == "m8n8k4" or i.types[1] != i.types[2]:
        raise UnsupportedError("this shape or type of mma")
    f.emit("{ f32 result[4];")
    array(f, "a", a, "b32")
    array(f, "b", b, "b32")
    array(f, "c", c, "f32")
    if is_half(i.types[1]) and k in (8, 16):
        f.emit(f"mma_16bit(self, {f.site}, Half::{i.types[1]}, {k}, result, a, b, c);")
    elif i.types[1] == "tf32" and k in (4, 8):
        f.emit(f"mma_tf32(self, {f.site}, {k}, result, a, b, c);")
    else:
        raise UnsupportedError("this shape or type of mma")
    results(f, d, "f32")


@rule("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def ldmatrix(f: FunctionTranslator, i: Instruction) -> None:
    registers = f.vector(i.operands[0])
    count = len(registers)
    # Only the addresses of lanes below 8 * count are used; the others may be anything.
    base, offset, _ = f.address(i.operands[1])
    row = f"self.lane < {8 * count} ? {f.pointer(i.operands[1], 'shared::cta', 16)} : nullptr"
    f.emit(f"{{ u32 result[{count}]; const char* const row = {row};")
    f.emit(f"load_matrices(self, {f.site}, {count}, {boolean(i.has('trans'))}, result, row);")
    results(f, registers, "b32")


@rule("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def stmatrix(f: FunctionTranslator, i: Instruction) -> None:
    registers = f.vector(i.operands[1])
    count = len(registers)
    row = f"self.lane < {8 * count} ? {f.pointer(i.operands[0], 'shared::cta', 16)} : nullptr"
    f.emit(f"{{ char* const row = {row};")
    array(f, "value", registers, "b32")
    f.emit(f"store_matrices(self, {f.site}, {count}, {boolean(i.has('trans'))}, value, row); }}")


@rule("wmma", f"load store mma a b c d sync aligned row col m16n16k16 {SPACES}")
def wmma(f: FunctionTranslator, i: Instruction) -> None:
    if not i.has("m16n16k16"):
        raise UnsupportedError("this shape of wmma")
    types, kind = i.types, i.modifiers[0]
    if kind == "mma":
        d, a, b, c = (f.vector(o) for o in i.operands)
        # f16 operands are not named in the instruction, which has the types of D and C then.
        half = "bf16" if "bf16" in types else "f16"
        if len(d) != 8 or types[0] != "f32" or types[-1] != "f32":
            raise UnsupportedError("this type of wmma")
        f.emit("{ f32 result[8];")
        array(f, "a", a[:4], "b32")
        array(f, "b", b[:4], "b32")
        array(f, "c", c, "f32")
        f.emit(f"wmma_mma(self, {f.site}, Half::{half}, result, a, b, c);")
        results(f, d, "f32")
        return
    stride = f.read(i.operands[2], "u32") if len(i.operands) > 2 else "16"
    column_major = boolean(i.has("col"))
    if kind == "store":
        if types[-1] != "f32":
            raise UnsupportedError("this type of wmma")
        f.emit("{")
        array(f, "value", f.vector(i.operands[1]), "f32")
        tile = f.pointer(i.operands[0], f.space(), 4)
        f.emit(f"wmma_store_f32(self, {f.site}, value, {tile}, {stride}, {column_major}); }}")
        return
    registers = f.vector(i.operands[0])
    tile = f.pointer(i.operands[1], f.space(), 4)
    if i.modifiers[1] == "c" and types[-1] == "f32":
        f.emit(
            f"{{ f32 result[8]; wmma_load_f32(self, {f.site}, result, {tile}, {stride}, {column_major});"
        )
        results(f, registers, "f32")
    elif i.modifiers[1] in "ab" and is_half(types[-1]):
        f.emit(
            f"{{ u32 result[8]; wmma_load_16bit(self, {f.site}, {len(registers)}, result, {tile}, "
            f"{stride}, {column_major});"
        )
        results(f, registers, "b32")
    else:
        raise UnsupportedError("this type of wmma")


# --- Asynchronous copies ---


@rule(
    "cp",
    "async bulk commit_group wait_group wait_all mbarrier arrive noinc read bulk_group "
    f"mbarrier::complete_tx::bytes {SPACES} {CACHING}",
)
def cp(f: FunctionTranslator, i: Instruction) -> None:
    bulk = i.has("bulk")
    if i.has("commit_group"):
        f.emit("bulk_commit(self);" if bulk else "copy_async_commit(self);")
    elif i.has("wait_group"):
        count = f.read(i.operands[0], "u32")
        f.emit(
            f"bulk_wait(self, {f.site}, {count});" if bulk else f"copy_async_wait(self, {count});"
        )
    elif i.has("wait_all"):
        f.emit("copy_async_wait_all(self);")
    elif i.has("mbarrier"):
        barrier_ = f.pointer(i.operands[0], mbarrier_space(i), 8)
        f.emit(f"copy_async_arrive(self, {f.site}, {barrier_}, {boolean(i.has('noinc'))});")
    elif bulk:
        cp_bulk(f, i)
    else:
        size = f.read(i.operands[2], "u32")
        to = f.pointer(i.operands[0], "shared::cta", int(size.rstrip("u")))
        source = f.pointer(i.operands[1], "global", 1)
        source_size = size
        if len(i.operands) > 3 and not i.has("L2::cache_hint"):
            found = f.register(i.operands[3], i.scope)
            if found and found[1] == "bool":
                source_size = f"({f.read(i.operands[3], 'pred')} ? 0 : {size})"
            else:
                source_size = f.read(i.operands[3], "u32")
        f.emit(f"copy_async(self, {f.site}, {to}, {source}, {size}, {source_size});")


def cp_bulk(f: FunctionTranslator, i: Instruction) -> None:
    spaces = [m for m in i.modifiers if m in SPACES.split()]
    size = f.read(i.operands[2], "u32")
    if spaces in (
        ["shared::cluster", "global"],
        ["shared::cta", "global"],
        ["shared::cluster", "shared::cta"],
    ):
        if not i.has("mbarrier::complete_tx::bytes"):
            raise UnsupportedError("bulk copy without an mbarrier")
        to = f"cluster_shared(self, {f.site}, u32({address(f, i.operands[0])}), {size})"
        if spaces[1] == "global":
            source = f"(const char*)u64({address(f, i.operands[1])})"
        else:
            source = f"cluster_shared(self, {f.site}, u32({address(f, i.operands[1])}), {size})"
        barrier_ = f.pointer(i.operands[3], "shared::cluster", 8)
        f.emit(f"bulk_copy_to_shared(self, {f.site}, {to}, {source}, {size}, {barrier_});")
    elif spaces == ["global", "shared::cta"]:
        source = f"cluster_shared(self, {f.site}, u32({address(f, i.operands[1])}), {size})"
        to = f"(char*)u64({address(f, i.operands[0])})"
        f.emit(f"bulk_copy_to_global(self, {f.site}, {to}, {source}, {size});")
    else:
        raise UnsupportedError("bulk copy between these spaces")


def address(f: FunctionTranslator, operand: str) -> str:
    base, offset, _ = f.address(operand)
    return f"({base} + {offset})"


# --- mbarrier ---


def mbarrier_space(i: Instruction) -> str:
    return (
        "shared::cluster"
        if i.has("shared::cluster")
        else ("shared::cta" if i.has("shared", "shared::cta") else "generic")
    )


@rule(
    "mbarrier",
    "init inval arrive arrive_drop expect_tx complete_tx test_wait try_wait parity pending_count "
    f"noComplete shared shared::cta shared::cluster {SCOPES} release acquire relaxed",
)
def mbarrier(f: FunctionTranslator, i: Instruction) -> None:
    kind = i.modifiers[0]
    operands = i.operands
    where = mbarrier_space(i)
    if kind == "pending_count":
        f.write(operands[0], f"mbarrier_pending({f.read(operands[1], 'b64')})", "u32")
        return
    if kind in ("arrive", "arrive_drop"):
        result = "_"
        if not operands[0].startswith("["):
            result, operands = operands[0], operands[1:]
        at = f.pointer(operands[0], where, 8)
        f.emit(f"{{ char* const at = {at};")
        count = "1"
        if i.has("expect_tx"):
            f.emit(f"mbarrier_expect(self, {f.site}, at, {f.read(operands[1], 'u32')});")
        elif len(operands) > 1:
            count = f.read(operands[1], "u32")
        f.emit(
            f"[[maybe_unused]] const u64 token = mbarrier_arrive(self, {f.site}, at, {count}, "
            f"{boolean(kind == 'arrive_drop')}, {boolean(not i.has('relaxed'))});"
        )
        if result != "_":
            f.write(result, "token", "b64")
        f.emit("}")
        return
    if kind in ("test_wait", "try_wait"):
        at = f.pointer(operands[1], where, 8)
        acquire = boolean(not i.has("relaxed"))
        if i.has("parity"):
            wanted = f"mbarrier_test(self, {f.site}, {at}, ({f.read(operands[2], 'u32')} & 1), {acquire})"
        else:
            wanted = f"mbarrier_test_state(self, {f.site}, {at}, {f.read(operands[2], 'b64')}, {acquire})"
        f.write(operands[0], wanted, "pred")
        return
    at = f.pointer(operands[0], where, 8)
    if kind == "init":
        f.emit(f"mbarrier_init(self, {f.site}, {at}, {f.read(operands[1], 'u32')});")
    elif kind == "inval":
        f.emit(f"mbarrier_invalidate(self, {f.site}, {at});")
    elif kind == "expect_tx":
        f.emit(f"mbarrier_expect(self, {f.site}, {at}, {f.read(operands[1], 'u32')});")
    elif kind == "complete_tx":
        f.emit(f"mbarrier_complete(self, {f.site}, {at}, {f.read(operands[1], 'u32')});")
    else:
        raise UnsupportedError("mbarrier operation")
