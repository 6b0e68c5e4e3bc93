"""Instructions that read and write memory, asynchronous copies and mbarriers included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .ptx import SIZES, Instruction, UnsupportedError
from .rules import (
    CACHING,
    SCOPES,
    SPACES,
    boolean,
    cpp,
    is_half,
    is_pair,
    neutral_type,
    rule,
    type_of,
    unsigned,
)

if TYPE_CHECKING:
    from .translate import FunctionTranslator


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
            acquire = boolean(i.has("acquire"))
            value = f"load_strong<{bits}>(self, from + {k * size}, {acquire}, {f.site})"
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
    acquires, releases = i.has("acquire", "acq_rel"), i.has("release", "acq_rel")
    own, bits = cpp(type_), unsigned(type_)
    f.emit(f"{{ char* const at = {where};")
    results = f.vector(result) if result != "_" else ("_",) * count
    for k, value in enumerate(f.vector(operands[1])):
        release = boolean(releases and k == 0)
        acquire = boolean(acquires and k == count - 1)
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
            f"at + {k * size}, {acquire}, {release}, {f.site}, "
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


@rule("prefetch", "global L1 L2")
def prefetch(f: FunctionTranslator, i: Instruction) -> None:
    f.emit(f"prefetch({f.pointer(i.operands[0], f.space(), 1)});")


@rule("discard applypriority", f"{SPACES} L2 {CACHING}")
@rule("griddepcontrol", "launch_dependents wait")
@rule("setmaxnreg", "inc dec sync aligned")
def nothing(f: FunctionTranslator, i: Instruction) -> None:
    """Emit nothing: these instructions change speed, not results."""


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
            name, phase = "mbarrier_test", f"({f.read(operands[2], 'u32')} & 1)"
        else:
            name, phase = "mbarrier_test_state", f.read(operands[2], "b64")
        wanted = f"{name}(self, {f.site}, {at}, {phase}, {acquire})"
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
