"""Instructions that compute, compare, select and convert."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .ptx import SIZES, Instruction, UnsupportedError
from .rules import (
    ROUNDING,
    boolean,
    cpp,
    is_float,
    is_half,
    is_pair,
    neutral_type,
    rule,
    type_of,
    unsigned,
)

if TYPE_CHECKING:
    from .translate import FunctionTranslator


# --- Arithmetic ---


def compute(f: FunctionTranslator, i: Instruction, formula: str, wide: bool = False) -> None:
    """Emit `formula` of {0}, {1} ..., element by element, in the type's own arithmetic.

    Halves are computed in f32, or in f64 if `wide`, for formulas that f32 would round twice.
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
    """Return 'z', 'm' or 'p' if the result is not rounded to nearest."""
    for m in ("rz", "rm", "rp"):
        if i.has(m):
            return m[1]
    return None


def arithmetic(
    f: FunctionTranslator, i: Instruction, formula: str, directed: str, sign: str
) -> None:
    """Emit +, -, * or fma in any rounding; `directed` is the f32 formula, `sign` is for f64."""
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
    """Emit add.cc, addc, sub.cc or subc; the carry is one variable of the function."""
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
