"""PTX to C++: one C++ function per kernel, one variable per register, one `goto` per branch.

arithmetic.py, memory.py and threads.py translate the instructions; the generated C++ calls
runtime/device_code.h.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Importing the modules of instructions registers their handlers.
from . import arithmetic, memory, ptx, rules, threads  # noqa: F401
from .ptx import Data, Function, Instruction, Label, UnsupportedError
from .rules import CPP, FLOATS, WIDTH, identifier

SPECIAL_REGISTERS = {
    "%laneid": "self.lane",
    "%warpid": "self.warp",
    "%nwarpid": "u32((grid.threads.count() + 31) / 32)",
    "%smid": "u32(block.index.x)",
    "%nsmid": "u32(grid.blocks.count())",
    "%gridid": "u64(0)",
    # This does not measure time, but it increases, so that a loop that waits for some time ends.
    "%clock": "u32(next_tick())",
    "%clock64": "next_tick()",
    "%globaltimer": "next_tick()",
    "%lanemask_eq": "(1u << self.lane)",
    "%lanemask_lt": "((1u << self.lane) - 1)",
    "%lanemask_le": "((2u << self.lane) - 1)",
    "%lanemask_gt": "(~((2u << self.lane) - 1))",
    "%lanemask_ge": "(~((1u << self.lane) - 1))",
    "%cluster_ctarank": "block.cluster_rank",
    "%cluster_nctarank": "u32(grid.cluster.count())",
    "%is_explicit_cluster": "(grid.cluster.count() > 1)",
    "%total_smem_size": "shared_bytes",
    "%dynamic_smem_size": "u32(shared_bytes - grid.dynamic_shared)",
    # Where cooperative groups look for the grid's workspace: high word, low word.
    "%envreg1": "u32(grid.cooperative ? u64(&grid.workspace) >> 32 : 0)",
    "%envreg2": "u32(grid.cooperative ? u64(&grid.workspace) : 0)",
    "WARP_SZ": "32u",
}
for _axis in "xyz":
    SPECIAL_REGISTERS |= {
        f"%tid.{_axis}": f"self.index.{_axis}",
        f"%ntid.{_axis}": f"grid.threads.{_axis}",
        f"%ctaid.{_axis}": f"block.index.{_axis}",
        f"%nctaid.{_axis}": f"grid.blocks.{_axis}",
        f"%cluster_nctaid.{_axis}": f"grid.cluster.{_axis}",
        f"%cluster_ctaid.{_axis}": f"(block.index.{_axis} % grid.cluster.{_axis})",
        f"%clusterid.{_axis}": f"(block.index.{_axis} / grid.cluster.{_axis})",
        f"%nclusterid.{_axis}": f"(grid.blocks.{_axis} / grid.cluster.{_axis})",
    }


@dataclass(frozen=True)
class Resources:
    """A kernel's resources, as ptxas reports them."""

    registers: int = 0
    local_bytes: int = 0


def align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def operand_types(i: Instruction) -> Iterator[tuple[str, str]]:
    """Yield operands with the type of their use, if it shows the type of what a register holds."""
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


class FunctionTranslator:
    """Turns the statements of one function into C++; instruction handlers call its methods."""

    def __init__(self, module: ModuleTranslator, function: Function):
        self.module = module
        self.function = function
        self.line: list[str] = []  # C++ of the PTX that came from one line of the .cu file
        self.body: list[str] = []
        self.now: Instruction
        self.site = ""
        self.used: dict[str, str] = {}  # C++ name of a register: its C++ type
        self.needs_carry = False
        self.arrays: dict[str, Data] = {}  # C++ name: local memory
        self.parameters: dict[str, str] = {}
        self.shared_bytes = 0
        self.shared: dict[str, int] = {}
        self.float_registers: set[str] = set()
        self.known: dict[tuple[str, int], tuple[str, str] | None] = {}  # what `register` found

    # --- names ---

    def register(self, name: str, scope: int) -> tuple[str, str] | None:
        """Return the C++ name and type of a register that is visible in a scope."""
        if (name, scope) in self.known:
            return self.known[name, scope]
        found = None
        for s in self.function.scopes(scope):
            if type_ := self.function.registers.get((s, name)):
                cpp = f"r{s or ''}_{identifier(name.lstrip('%'))}"
                kind = CPP[type_]
                if cpp in self.float_registers:
                    kind = {"u32": "f32", "u64": "f64"}.get(kind, kind)
                found = (cpp, kind)
                break
        self.known[name, scope] = found
        return found

    def array(self, name: str) -> str | None:
        """Return the C++ name of a variable in local memory, or of a parameter of a call."""
        for s in self.function.scopes(self.now.scope):
            if data := self.function.local.get((s, name)):
                cpp = f"m{s}_{identifier(name)}"
                self.arrays[cpp] = data
                return cpp
        return None

    def symbol(self, name: str) -> str | None:
        """Return the address of a variable or parameter."""
        if name in self.parameters:
            return f"u64({self.parameters[name]})"
        if array := self.array(name):
            return f"u64({array})"
        if name in self.shared:
            return f"{self.shared[name]}u"
        if name in self.module.shared:
            offset = self.module.shared[name]
            return "u32(grid.dynamic_shared)" if offset is None else f"{offset}u"
        if name in self.module.variables:
            return f"u64({self.module.use_variable(name)})"
        return None

    # --- operands ---

    def read(self, operand: str, type_: str) -> str:
        """Return a C++ expression for an operand, in the C++ type of the PTX type."""
        want = CPP[type_]
        if operand.startswith("!"):
            return f"(!{self.read(operand[1:], type_)})"
        if register := self.register(operand, self.now.scope):
            name, kind = register
            self.used[name] = kind
            return self.cast(name, kind, want)
        if literal := self.literal(operand, want):
            return literal
        if operand in SPECIAL_REGISTERS:
            value = SPECIAL_REGISTERS[operand]
            return value if want == "u32" else f"{want}({value})"
        if operand.startswith("-") and self.register(operand[1:], self.now.scope):
            return f"(-{self.read(operand[1:], type_)})"
        base, _, offset = operand.partition("+")
        if (address := self.symbol(base.strip())) is not None:
            return f"{want}({address} + {int(offset or '0', 0)})"
        raise UnsupportedError(f"operand {operand}")

    @staticmethod
    def literal(text: str, want: str) -> str | None:
        if match := re.fullmatch(r"(-?)0([fFdD])([0-9A-Fa-f]+)", text):
            digits = match[3]
            own = "f32" if match[2] in "fF" else "f64"
            word = f"0x{digits}{'u' if own == 'f32' else 'ull'}"
            if want == own or want in FLOATS:
                value = f"{match[1]}bits<{own}>({word})"
                return value if want == own else f"{want}({value})"
            return f"{want}({word})"
        if match := re.fullmatch(r"(-?)(0[xX][0-9A-Fa-f]+|0[bB][01]+|\d+)U?", text):
            digits = match[2]
            octal = re.fullmatch(r"0\d+", digits)
            number = int(digits, 8) if octal else int(digits, 0)
            number = -number if match[1] else number
            if want == "bool":
                return "true" if number else "false"
            if want in FLOATS:  # an integer in place of a float is its bits
                return f"bits<{want}>({'u32' if want == 'f32' else 'u64'}({number}))"
            if want == "u32":
                return f"{number & 0xFFFFFFFF}u"
            if want == "s32" and -(2**31) < number < 2**31:
                return str(number) if number >= 0 else f"({number})"
            if want == "u128":
                return f"u128({number & (2**64 - 1)}ull)"
            return f"{want}({number & (2**64 - 1)}ull)"
        return None

    @staticmethod
    def cast(value: str, have: str, want: str) -> str:
        """Return the same bits in another C++ type; a narrower type takes the low ones."""
        if have == want:
            return value
        if WIDTH[have] == WIDTH[want] and (have in FLOATS or want in FLOATS):
            return f"bits<{want}>({value})"
        if have in FLOATS:
            unsigned = "u32" if have == "f32" else "u64"
            return f"{want}(bits<{unsigned}>({value}))"
        if want in FLOATS:
            unsigned = "u32" if want == "f32" else "u64"
            return f"bits<{want}>({unsigned}({value}))"
        return f"{want}({value})"

    def write(self, operand: str, value: str, type_: str) -> None:
        """Emit an assignment, sign- or zero-extended to a register wider than the type."""
        if operand == "_":
            self.emit(f"(void)({value});")
            return
        register = self.register(operand, self.now.scope)
        if not register:
            raise UnsupportedError(f"destination {operand}")
        name, kind = register
        have = CPP[type_]
        self.used[name] = kind
        if have == kind:
            self.emit(f"{name} = {value};")
        elif WIDTH[kind] > WIDTH[have] and have.startswith("s"):
            self.emit(f"{name} = {self.cast(f's64({have}({value}))', 's64', kind)};")
        else:
            self.emit(f"{name} = {self.cast(f'{have}({value})', have, kind)};")

    def vector(self, operand: str) -> tuple[str, ...]:
        """Return the elements of `{a, b}`, or the one operand."""
        if operand.startswith("{"):
            return ptx.split_operands(operand[1:-1])
        return (operand,)

    def address(self, operand: str) -> tuple[str, int, str | None]:
        """Return `[a + 8]` as an expression, an offset, and the name of the symbol if it is one."""
        match = re.fullmatch(r"\[\s*([^\]+]+?)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not match:
            raise UnsupportedError(f"address {operand}")
        base, offset = match[1], int(match[2] or "0", 0)
        if register := self.register(base, self.now.scope):
            name, kind = register
            self.used[name] = kind
            unsigned = {4: "u32", 8: "u64"}[WIDTH[kind]]
            return self.cast(name, kind, unsigned), offset, None
        if (symbol := self.symbol(base)) is not None:
            return symbol, offset, base
        if literal := self.literal(base, "u64"):
            return literal, offset, None
        raise UnsupportedError(f"address {operand}")

    def pointer(self, operand: str, space: str, size: int) -> str:
        """Return a `char*` to `size` bytes, checked as far as the state space allows."""
        base, offset, symbol = self.address(operand)
        at = base if not offset else f"({base} + {offset})"
        if space == "shared::cta":
            return f"shared_at(self, shared, shared_bytes, u32({at}), {size}, {self.site})"
        if space == "shared::cluster":
            return f"cluster_shared(self, {self.site}, u32({at}), {size})"
        if space in ("param", "local") or symbol:
            return f"(char*)u64({at})"
        return f"global_at(self, u64({at}), {size}, {self.site})"

    def space(self) -> str:
        """Return the state space of the instruction's memory operand."""
        for m in self.now.modifiers:
            if m in ("shared", "shared::cta"):
                return "shared::cta"
            if m in ("shared::cluster", "global", "local", "const"):
                return m
            if m in ("param", "param::entry", "param::func"):
                return "param"
        return "generic"

    # --- statements ---

    def emit(self, code: str) -> None:
        self.line.append(code)

    def end_line(self) -> None:
        if self.line:
            self.body.append(" ".join(self.line))
            self.line = []

    def infer_floats(self) -> None:
        """Find the 32- and 64-bit registers that hold floating-point numbers.

        nvcc declares them all .b32 and .b64. With C++ integers, each use would move the value
        between integer and vector registers, which takes longer to compile and to run.
        """
        votes: Counter[str] = Counter()
        for statement in self.function.statements:
            if isinstance(statement, Label):
                continue
            for operand, type_ in operand_types(statement):
                for name in re.findall(r"%?[\w$]+", operand):
                    if register := self.register(name, statement.scope):
                        wide = register[1] in ("u32", "u64")
                        if wide and type_ in ("f32", "f64"):
                            votes[register[0]] += 1
                        elif wide and type_ not in ("b32", "b64"):
                            votes[register[0]] -= 1
        self.float_registers = {name for name, count in votes.items() if count > 0}
        self.known.clear()

    def label(self, name: str, scope: int) -> str:
        for s in self.function.scopes(scope):
            if (s, name) in self.labels:
                return f"label{s}_{identifier(name)}"
        raise UnsupportedError(f"label {name}")

    def translate(self) -> None:
        function = self.function
        self.shared_bytes = self.module.shared_bytes if function.is_kernel else 0
        for data in function.shared:
            self.shared_bytes = align(self.shared_bytes, data.align)
            self.shared[data.name] = self.shared_bytes
            self.shared_bytes += data.bytes
        self.layout = []
        offset = 0
        for i, data in enumerate(function.parameters):
            offset = align(offset, data.align)
            self.layout.append((offset, data.bytes))
            self.parameters[data.name] = (
                f"(parameters + {offset})" if function.is_kernel else f"arguments[{i}]"
            )
            offset += data.bytes
        self.parameter_bytes = offset
        if function.result:
            self.parameters[function.result.name] = "result"
        self.labels = {(s.scope, s.name) for s in function.statements if isinstance(s, Label)}
        self.infer_floats()

        location = None
        for statement in function.statements:
            if isinstance(statement, Label):
                self.emit(f"label{statement.scope}_{identifier(statement.name)}:;")
                continue
            self.now = statement
            if statement.location != location:
                location = statement.location
                self.end_line()
                self.site = self.module.site(location)
                self.body.append(f"#line {max(location.line, 1)} {json.dumps(location.file)}")
            try:
                if statement.predicate:
                    self.emit(f"if ({self.read(statement.predicate, 'pred')}) {{")
                rules.apply(self, statement)
                if statement.predicate:
                    self.emit("}")
            except UnsupportedError as error:
                self.module.unsupported.append(
                    f"{statement.location.file}:{statement.location.line}: {statement.text}"
                    f" ({error}; in {function.name})"
                )
        self.end_line()

    def code(self) -> str:
        """Return the C++ function. All variables come first: a goto must not jump over one."""
        lines = [self.module.prototype(self.function), "{"]
        lines.append("[[maybe_unused]] Block& block = *self.block;")
        lines.append("[[maybe_unused]] Grid& grid = *block.grid;")
        lines.append("[[maybe_unused]] char* const shared = block.shared;")
        lines.append("[[maybe_unused]] const u32 shared_bytes = block.shared_bytes;")
        if self.function.is_kernel:
            lines.append("[[maybe_unused]] const char* const parameters = grid.parameters;")
        if self.needs_carry:
            lines.append("bool carry = false;")
        # Registers also start as NaN. The compiler drops this where a register is written first.
        poison = {"bool": "false", "f32": "bits<f32>(~0u)", "f64": "bits<f64>(~0ull)"}
        for name, kind in self.used.items():
            lines.append(f"{kind} {name} = {poison.get(kind, f'{kind}(~0ull)')};")
        for name, data in self.arrays.items():
            lines.append(f"alignas({max(16, data.align)}) char {name}[{max(data.bytes, 1)}];")
            lines.append(f"__builtin_memset({name}, 0xFF, sizeof {name});")
        return "\n".join([*lines, *self.body, "}", '#line 1 "generated"'])


class ModuleTranslator:
    def __init__(self, module: ptx.Module, source: str, resources: Mapping[str, Resources]):
        self.module = module
        self.source = source
        self.resources = resources
        self.unsupported: list[str] = []
        self.functions = {f.name: f for f in module.functions if not f.is_kernel}
        self.variables = {v.name: v for v in module.variables}
        self.used_variables: dict[str, str] = {}
        self.sites: dict[ptx.Location, int] = {}
        self.shared: dict[str, int | None] = {}
        self.shared_bytes = 0
        for data in module.shared:
            if data.external:  # extern __shared__: after everything else
                self.shared[data.name] = None
                continue
            self.shared_bytes = align(self.shared_bytes, data.align)
            self.shared[data.name] = self.shared_bytes
            self.shared_bytes += data.bytes

    def site(self, location: ptx.Location) -> str:
        return f"sites[{self.sites.setdefault(location, len(self.sites))}]"

    def use_variable(self, name: str) -> str:
        return self.used_variables.setdefault(name, f"variable_{identifier(name)}")

    def prototype(self, function: Function) -> str:
        if function.is_kernel:
            return f"static void kernel_{identifier(function.name)}(Thread& self)"
        return (
            f"static void function_{identifier(function.name)}"
            "(Thread& self, char* result, char** arguments)"
        )

    def variable(self, data: Data) -> str:
        name = self.use_variable(data.name)
        declaration = f"alignas({data.align}) static {CPP[data.type]} {name}"
        declaration += f"[{max(data.bytes // ptx.SIZES[data.type], 1)}]"
        if data.initial is None:
            return declaration + ";"
        initial = data.initial.strip()
        initial = initial if initial.startswith("{") else "{" + initial + "}"
        initial = re.sub(r"0[fF]([0-9A-Fa-f]{8})", r"bits<f32>(0x\1u)", initial)
        initial = re.sub(r"0[dD]([0-9A-Fa-f]{16})", r"bits<f64>(0x\1ull)", initial)
        rest = re.sub(r"0[xX][0-9A-Fa-f]+U?|bits<f\d\d>|ull|u", "", initial)
        if re.search(r"[A-Za-z_$]", rest):
            self.unsupported.append(f"{self.source}: {data.name} = {data.initial}")
        return f"{declaration} = {initial};"

    def translate(self) -> str:
        translators = [FunctionTranslator(self, f) for f in self.module.functions]
        for translator in translators:
            translator.translate()
            if not translator.function.is_kernel and translator.shared_bytes:
                self.unsupported.append(f"static shared memory in {translator.function.name}")
        for data in self.module.variables:
            # The host may access variables that no kernel uses.
            if not data.initial or not re.search(r"[A-Za-z_$]{3}", data.initial):
                self.use_variable(data.name)
        variables = [self.variable(self.variables[name]) for name in list(self.used_variables)]
        if self.unsupported:
            raise UnsupportedError(
                f"{self.source}: not supported by the emulator:\n  " + "\n  ".join(self.unsupported)
            )
        kernels = [t for t in translators if t.function.is_kernel]
        parts = ['#include "device_code.h"', "using namespace emulator;", "namespace {"]
        sites = ", ".join(f"{{{json.dumps(s.file)}, {s.line}}}" for s in self.sites)
        parts.append(f"[[maybe_unused]] const Site sites[] = {{{sites or '{nullptr, 0}'}}};")
        parts += variables
        parts += [self.prototype(t.function) + ";" for t in translators]
        parts += [t.code() for t in translators]
        parts += [self.parameters_of(k) for k in kernels]
        parts.append(self.table("Kernel", "kernels", map(self.kernel_entry, kernels)))
        entries = (f"{{{json.dumps(n)}, {c}, sizeof {c}}}" for n, c in self.used_variables.items())
        parts.append(self.table("Variable", "variables", entries))
        parts.append(
            f"const Module module = {{{json.dumps(self.source)}, {self.module.target}, "
            f"kernels, {len(kernels)}, variables, {len(self.used_variables)}}};"
        )
        parts += ["const RegisterModule registered(module);", "}  // namespace", ""]
        return "\n".join(parts)

    @staticmethod
    def table(type_: str, name: str, entries: Iterable[str]) -> str:
        return f"const {type_} {name}[] = {{{', '.join(entries) or '{}'}}};"

    @staticmethod
    def parameters_of(translator: FunctionTranslator) -> str:
        layout = ", ".join(f"{{{offset}, {size}}}" for offset, size in translator.layout)
        name = f"parameters_{identifier(translator.function.name)}"
        return f"const Parameter {name}[] = {{{layout or '{0, 0}'}}};"

    def kernel_entry(self, translator: FunctionTranslator) -> str:
        function = translator.function
        name = identifier(function.name)
        largest_block = math.prod(function.directives.get("maxntid", (0,)))
        cluster = (*function.directives.get("reqnctapercluster", (0, 0, 0)), 1, 1)[:3]
        taken = self.resources.get(function.name, Resources())
        fields = [
            json.dumps(function.name),
            f"kernel_{name}",
            f"parameters_{name}",
            len(function.parameters),
            translator.parameter_bytes,
            translator.shared_bytes,
            largest_block,
            function.directives.get("minnctapersm", (0,))[0],
            f"{{{cluster[0]}, {cluster[1]}, {cluster[2]}}}",
            taken.registers,
            taken.local_bytes,
        ]
        return "{" + ", ".join(map(str, fields)) + "}"


def translate(
    text: str,
    source: str | Path,
    resources: Mapping[str, Resources] | None = None,
    foreign: tuple[str, ...] = ("/usr/",),
) -> str:
    """Translate a PTX file to C++; raise UnsupportedError naming every unsupported instruction."""
    return ModuleTranslator(ptx.parse(text, foreign), str(source), resources or {}).translate()
