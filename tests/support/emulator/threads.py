"""Control flow, and operations of several threads: barriers, warp operations, matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .ptx import Instruction, UnsupportedError
from .rules import (
    SPACES,
    array,
    boolean,
    identifier,
    is_float,
    is_half,
    results,
    rule,
    type_of,
)

if TYPE_CHECKING:
    from .translate import FunctionTranslator


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
    """Emit nothing: these instructions affect only debuggers and profilers."""


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
    arrays = [f.array(a) or "" for a in arguments]
    returned = f.array(result) if result else "nullptr"
    if not all(arrays) or not returned:
        raise UnsupportedError("arguments of a call")
    if name == "__assertfail":
        f.emit(f'fail(self, {f.site}, "assertion failed");')
    elif name == "vprintf":
        f.emit(f"device_printf(load<const char*>({arrays[0]}), load<const char*>({arrays[1]}));")
        f.emit(f"store<u32>({returned}, 0);")
    elif name in f.module.functions:
        target = f"function_{identifier(name)}"
        f.emit(f"{{ char* values[] = {{{', '.join(arrays) or 'nullptr'}}};")
        f.emit(f"{target}(self, {returned}, values); }}")
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
        # With f16 operands, the instruction names only the types of D and C.
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
        f.emit("{ f32 result[8];")
        f.emit(f"wmma_load_f32(self, {f.site}, result, {tile}, {stride}, {column_major});")
        results(f, registers, "f32")
    elif i.modifiers[1] in "ab" and is_half(types[-1]):
        f.emit(
            f"{{ u32 result[8]; wmma_load_16bit(self, {f.site}, {len(registers)}, result, {tile}, "
            f"{stride}, {column_major});"
        )
        results(f, registers, "b32")
    else:
        raise UnsupportedError("this type of wmma")
