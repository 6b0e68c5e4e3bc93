"""A parser of the PTX that nvcc writes: modules, functions, statements, operands.

What the instructions do is defined in arithmetic.py, memory.py and threads.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Width of each PTX type, in bytes.
SIZES = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}


class UnsupportedError(Exception):
    """Something in the PTX that this emulator does not support."""


@dataclass(frozen=True)
class Location:
    file: str
    line: int


@dataclass
class Data:
    """A variable in some state space, or a parameter."""

    name: str
    type: str
    bytes: int
    align: int
    initial: str | None = None
    external: bool = False


@dataclass
class Instruction:
    predicate: str  # "", "%p1" or "!%p1"
    opcode: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[str, ...]
    text: str
    location: Location
    scope: int

    def has(self, *modifiers: str) -> bool:
        return any(m in self.modifiers for m in modifiers)

    def choice(self, *modifiers: str) -> str:
        """Return the first of these modifiers that the instruction has."""
        for m in modifiers:
            if m in self.modifiers:
                return m
        raise UnsupportedError(f"one of {', '.join(modifiers)} expected")


@dataclass
class Label:
    name: str
    scope: int


@dataclass
class Function:
    """A kernel (`.entry`) or a device function (`.func`)."""

    name: str
    is_kernel: bool
    parameters: list[Data]
    result: Data | None
    directives: dict[str, tuple[int, ...]]  # maxntid, minnctapersm, reqnctapercluster
    statements: list[Instruction | Label] = field(default_factory=list)
    registers: dict[tuple[int, str], str] = field(default_factory=dict)  # (scope, name): type
    shared: list[Data] = field(default_factory=list)
    local: dict[tuple[int, str], Data] = field(default_factory=dict)
    scope_parents: list[int] = field(default_factory=lambda: [-1])

    def scopes(self, scope: int) -> Iterator[int]:
        """Yield the scope and the enclosing ones, from the inside out."""
        while scope >= 0:
            yield scope
            scope = self.scope_parents[scope]


@dataclass
class Module:
    target: int  # 90 for sm_90
    functions: list[Function]
    shared: list[Data]
    variables: list[Data]  # .global and .const


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas that are outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    if last := text[start:].strip():
        parts.append(last)
    return tuple(parts)


_DATA = re.compile(
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\b\s*(?:\.(?:global|shared|const|local)\b\s*)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$%]+)\s*(?:\[(?P<count>\d*)\])?\s*(?:=\s*(?P<initial>.*))?$",
    re.S,
)
_INSTRUCTION = re.compile(
    r"(?:@(?P<predicate>!?%?[\w$]+)\s+)?(?P<name>[a-z][\w.:]*)\s*(?P<rest>.*)", re.S
)
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?")
_TOKEN = re.compile(
    r"\s*(?:(?P<location>\.loc\s[^\n]*)"
    r"|(?P<open>\{)|(?P<close>\})"
    r"|(?P<label>[\w$%]+):(?!:)"
    r"|(?P<statement>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)"
)
_FUNCTION = re.compile(
    r"\.entry\s+(?P<kernel>[\w$]+)\s*|\.func\s*(?:\((?P<result>[^)]*)\)\s*)?(?P<function>[\w$]+)\s*"
)


def parse_data(text: str) -> Data:
    text = re.sub(r"^\.param\s+", "", text.strip())
    match = _DATA.match(text)
    if not match or match["type"] not in SIZES:
        raise UnsupportedError(text)
    size = SIZES[match["type"]]
    count = int(match["count"] or 0) if match["count"] is not None else 1
    align = int(match["align"] or size)
    initial = match["initial"]
    return Data(match["name"], match["type"], size * count, align, initial)


class _Parser:
    def __init__(self, text: str, foreign: tuple[str, ...]):
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        self.text = re.sub(r"//[^\n]*", "", text)
        self.foreign = foreign
        self.files = {
            int(number): name
            for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', self.text, re.M)
        }

    def location(self, line: str, before: Location) -> Location:
        """Return the innermost line in the project's own files, not in the toolkit's headers."""
        match = _LOCATION.match(line)
        if not match:
            raise UnsupportedError(line)
        for file, number in ((match[1], match[2]), (match[3], match[4])):
            if file and not self.files.get(int(file), "").startswith(self.foreign):
                return Location(self.files.get(int(file), "ptx"), int(number))
        return before

    def body(self, function: Function, start: int) -> int:
        """Parse a function's statements; `start` is after its opening brace."""
        scope, at = 0, start
        location = Location(self.files.get(1, "ptx"), 1)
        while True:
            token = _TOKEN.match(self.text, at)
            if not token:
                raise UnsupportedError(self.text[at : at + 100])
            at = token.end()
            kind = token.lastgroup
            if kind == "location":
                location = self.location(token["location"], location)
            elif kind == "open":
                function.scope_parents.append(scope)
                scope = len(function.scope_parents) - 1
            elif kind == "close":
                if scope == 0:
                    return at
                scope = function.scope_parents[scope]
            elif kind == "label":
                function.statements.append(Label(token["label"], scope))
            else:
                self.statement(function, " ".join(token["statement"].split()), scope, location)

    def statement(self, function: Function, text: str, scope: int, location: Location) -> None:
        if not text:
            return
        if text.startswith(".reg"):
            match = re.match(r"\.reg\s*\.(\w+)\s+(.*)", text)
            if not match or match[1] not in SIZES:
                raise UnsupportedError(text)
            for name in match[2].split(","):
                if many := re.match(r"\s*(%?[\w$]+)<(\d+)>", name):
                    for i in range(int(many[2])):
                        function.registers[scope, f"{many[1]}{i}"] = match[1]
                else:
                    function.registers[scope, name.strip()] = match[1]
        elif text.startswith(".shared"):
            function.shared.append(parse_data(text[len(".shared") :]))
        elif text.startswith((".local", ".param")):
            data = parse_data(text[len(".local") :])
            function.local[scope, data.name] = data
        elif not text.startswith((".pragma", ".branchtargets")):
            function.statements.append(self.instruction(text, scope, location))

    @staticmethod
    def instruction(text: str, scope: int, location: Location) -> Instruction:
        match = _INSTRUCTION.match(text)
        if not match:
            raise UnsupportedError(text)
        opcode, *parts = match["name"].split(".")
        return Instruction(
            predicate=match["predicate"] or "",
            opcode=opcode,
            modifiers=tuple(p for p in parts if p not in SIZES),
            types=tuple(p for p in parts if p in SIZES),
            operands=split_operands(match["rest"]),
            text=text,
            location=location,
            scope=scope,
        )

    def module(self) -> Module:
        target = re.search(r"^\s*\.target\s+sm_(\d+)", self.text, re.M)
        module = Module(int(target[1]) if target else 0, [], [], [])
        at = 0
        while True:
            head = _FUNCTION.search(self.text, at)
            for statement in self.text[at : head.start() if head else len(self.text)].split(";"):
                self.declaration(module, statement)
            if not head:
                return module
            at = self.function(module, head)

    def function(self, module: Module, head: re.Match[str]) -> int:
        at, parameters = head.end(), []
        if self.text[at : at + 1] == "(":
            close = self.text.index(")", at)
            parameters = [parse_data(p) for p in split_operands(self.text[at + 1 : close])]
            at = close + 1
        end = re.compile(r"[;{]").search(self.text, at)
        if not end:
            raise UnsupportedError(head.group())
        directives = {
            name: tuple(int(n) for n in numbers.split(","))
            for name, numbers in re.findall(
                r"\.(\w+)[ \t]+(\d+(?:\s*,\s*\d+)*)", self.text[at : end.start()]
            )
        }
        if end.group() == ";":
            return end.end()  # only a declaration
        name = head["kernel"] or head["function"]
        result = parse_data(head["result"]) if head["result"] else None
        function = Function(name, bool(head["kernel"]), parameters, result, directives)
        module.functions.append(function)
        return self.body(function, end.end())

    def declaration(self, module: Module, text: str) -> None:
        match = re.search(
            r"(?P<external>\.extern\s+)?\.(?P<space>shared|global|const)\s+(?P<rest>.*)", text, re.S
        )
        if not match:
            return
        data = parse_data(match["rest"])
        data.external = bool(match["external"])
        (module.shared if match["space"] == "shared" else module.variables).append(data)


def parse(text: str, foreign: tuple[str, ...] = ("/usr/",)) -> Module:
    """Parse a PTX file; lines of files under `foreign` are not reported as locations."""
    return _Parser(text, foreign).module()
