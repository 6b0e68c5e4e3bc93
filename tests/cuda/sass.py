"""Execute one thread block of a kernel from its machine code (sm_90), and time it.

`Program` parses the output of nvdisasm, and `Block` runs it. Values, branches and memory are
computed exactly, so a warp executes the instructions that a GPU would issue. Other blocks of the
cluster are not run; they are assumed to do the same as this block at the same time.

The time comes from a model. A warp issues in order. An instruction waits for the stall count of the
previous one and for the scoreboards in its control bits, which are ready after the latencies of
`LATENCY`. There are two clocks: with the first, warps share four schedulers and the units of an SM;
with the second, each warp has an SM to itself, so that only the chain of dependencies counts.
"""

from __future__ import annotations

import functools
import heapq
import operator
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Cycles from issue to use. Those marked * were measured on an H200 (bench/results/gpu-h200); for
# those marked ?, no measurement on Hopper is known.
LATENCY = {
    "LDS": 23, "LDS.64": 27, "LDS.128": 33, "LDSM": 33,  # the wide ones: ?
    "LDG": 288, "LDGSTS": 288,  # * out of L2
    "LDC": 30, "S2R": 30,  # ?
    "SHFL": 26, "MUFU": 18, "I2F": 18, "F2I": 18,
    "HMMA": 24, "IMAD": 12,  # *; IMAD.WIDE, if it sets a scoreboard
    "read": 12,  # ? until a source register may be overwritten
    "branch": 8,  # ? a taken branch, beyond its stall count
    "barrier": 13, "barrier, a warp": 2,  # *
    "hop": 288,  # * from st.async until the peer's mbarrier has counted it
    "SYNCS": 20,  # ? try_wait for a phase that has completed
    "flag": 1140,  # from red.release until another SM reads it: 651 ns
    "other": 20,
}  # fmt: skip
# Cycles for which an instruction of a warp keeps a unit of a scheduler or of the SM busy.
INTERVAL = {"HMMA": 6.26, "MUFU": 8.5, "I2F": 8.5, "F2I": 8.5}
PACKET = 2.35  # * cycles of an SM to send 32 bytes, or one lane's 16, to another SM

SHARED = 0x400  # where dynamic shared memory begins
PARAMS = 0x210  # where parameters begin in constant memory
CONSTANTS = 0x70 << 40  # generic address of constant memory
STACK = 0x800000, 1024  # beyond shared memory: low 32 bits of a stack's address; its size
MASK = 0xFFFFFFFF
U32, I32, F32, U64 = np.uint32, np.int32, np.float32, np.uint64
Array = np.ndarray[Any, Any]
Run = Callable[["Warp", Array], Any]


class Instruction:
    def __init__(self, pc: int, text: str, control: int, lines: list[tuple[str, int]]):
        self.pc, self.lines = pc, lines  # lines: file and number, innermost first
        self.text = re.sub(r"\(\*.*\*\)", "", text).replace(".reuse", "").strip()
        match = re.match(r"(?:@(!?)(U?P\w+) )?\s*([\w.]+)\s*(.*)", self.text)
        assert match, text
        self.guard = predicate((match[1] or "") + match[2]) if match[2] else None
        self.name, *self.flags = match[3].split(".")
        self.operands = [part.strip() for part in match[4].split(",")] if match[4] else []
        self.stall = max(1, control & 15)
        self.writes, self.reads = control >> 5 & 7, control >> 8 & 7
        self.waits = [i for i in range(6) if control >> 11 + i & 1]
        wide = [f for f in ("64", "128") if self.name == "LDS" and f in self.flags]
        self.latency = LATENCY.get(".".join([self.name, *wide]), LATENCY["other"])
        self.run: Run = self.nothing

    @staticmethod
    def nothing(warp: Warp, mask: Array) -> None:
        pass


@functools.cache
def disassembled(nvdisasm: str, cubin: Path) -> dict[str, str]:
    """Return the output of nvdisasm for each kernel of a cubin."""
    text = subprocess.check_output([nvdisasm, "-hex", "-gi", "-c", cubin], text=True)
    parts = re.split(r"^\t\.section\t\.text\.(\w+),", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


class Program:
    """The code of one kernel."""

    def __init__(self, text: str):
        self.code: dict[int, Instruction] = {}
        self.labels: dict[str, int] = {}
        lines: list[tuple[str, int]] = []
        fresh, labels, last = True, [], ("", "", "")
        for line in text.splitlines():
            if source := re.match(r'\s*//## File "([^"]*)", line (\d+)', line):
                lines = [*(() if fresh else lines), (Path(source[1]).name, int(source[2]))]
                fresh = False
            elif label := re.match(r"([.$\w]+):$", line):
                labels.append(label[1])
            elif code := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* (0x\w+) \*/", line):
                last, fresh = code.groups(), True  # type: ignore[assignment]
                self.labels.update(dict.fromkeys(labels, int(code[1], 16)))
                labels = []
            elif word := re.match(r"\s+/\* (0x\w+) \*/", line):
                control = (int(word[1], 16) << 64 | int(last[2], 16)) >> 105
                pc = int(last[0], 16)
                self.code[pc] = Instruction(pc, last[1], control, lines)
        for instruction in self.code.values():
            if instruction.name not in NOTHING:
                instruction.run = self.made_when_run(instruction)

    def made_when_run(self, instruction: Instruction) -> Run:
        """Decode an instruction only when it runs.

        Most of a kernel is for other problems, whose instructions need no entry in MAKERS.
        """

        def run(w: Warp, m: Array) -> Any:
            instruction.run = MAKERS.get(instruction.name, unknown)(instruction, self)
            return instruction.run(w, m)

        return run


class Memory:
    def __init__(self, base: int, size: int):
        self.base = base
        self.bytes = np.zeros(-(-size // 16) * 16, np.uint8)
        self.halves, self.words = self.bytes.view(np.uint16), self.bytes.view(U32)

    def read(self, at: Array, size: int) -> list[Array]:
        at = (at - U64(self.base)).astype(np.int64)
        if size < 4:
            return [(self.bytes[at] if size == 1 else self.halves[at >> 1]).astype(U32)]
        return [self.words[(at >> 2) + i] for i in range(size // 4)]

    def write(self, at: Array, size: int, values: list[Array]) -> None:
        at = (at - U64(self.base)).astype(np.int64)
        if size < 4:
            (self.bytes if size == 1 else self.halves)[at // size] = values[0]
        for i in range(size // 4):
            self.words[(at >> 2) + i] = values[i]


Clock = tuple[float, float]  # with all warps together, and with each warp alone


def later(a: Clock, b: Clock) -> Clock:
    return max(a[0], b[0]), max(a[1], b[1])


class MBarrier:
    def __init__(self, count: int):
        self.count = self.pending = count
        self.bytes = 0
        self.latest: Clock = (0, 0)
        self.ended: list[Clock] = []  # when each phase ended
        self.waiting: list[Warp] = []

    def event(self, time: Clock, arrivals: int, size: int) -> None:
        self.pending -= arrivals
        self.bytes += size
        self.latest = later(self.latest, time)
        if self.pending == 0 and self.bytes == 0:
            self.ended.append(self.latest)
            self.pending = self.count
            for warp in self.waiting:
                warp.wake()
            self.waiting = []


class Group:
    """Lanes of a warp with the same program counter."""

    def __init__(self, pc: int, mask: Array):
        self.pc, self.mask = pc, mask
        self.waits_at: str | None = None  # a convergence barrier


class Warp:
    def __init__(self, block: Block, index: int):
        self.block, self.index = block, index
        self.R = np.zeros((256, 32), U32)  # 255 is RZ
        self.P = np.zeros((8, 32), bool)
        self.P[7] = True
        self.U = [0] * 64  # 63 is URZ
        self.UP = [False] * 7 + [True]
        self.groups = [Group(0, np.ones(32, bool))]
        self.group = self.groups[0]  # the group that issues
        self.convergence: dict[str, Array] = {}
        self.time: Clock = (0, 0)  # the earliest next issue
        self.now: Clock = (0, 0)  # of the instruction that is being issued
        self.ready: list[Clock] = [(0, 0)] * 6
        self.copied: Clock = (0, 0)
        self.extra: Clock = (0, 0)  # added to the latency
        self.issued: Counter[int] = Counter()

    def active(self) -> Array:
        return np.logical_or.reduce([group.mask for group in self.groups])

    def wake(self) -> None:
        heapq.heappush(self.block.queue, (self.time[0], self.index))

    def local(self, mask: Array) -> Array:
        """Return the offsets from stack addresses to places in the block's stack memory."""
        return ((self.index * 32 + np.arange(32)) * STACK[1] - STACK[0])[mask]

    def synchronise(self, name: str, mask: Array) -> None:
        """Wait at a convergence barrier for all lanes of `mask`."""
        self.group.waits_at = name
        there = [group for group in self.groups if group.waits_at == name]
        if np.array_equal(np.logical_or.reduce([group.mask for group in there]), mask):
            self.groups = [group for group in self.groups if group.waits_at != name]
            self.groups.insert(0, Group(self.group.pc, mask))

    def exit(self, mask: Array) -> None:
        self.group.mask = self.group.mask & ~mask
        if not self.group.mask.any():
            self.groups.remove(self.group)
        for name in self.convergence:
            self.convergence[name] = self.convergence[name] & ~mask

    def branch(self, mask: Array, target: int) -> None:
        if mask.all() or np.array_equal(mask, self.group.mask):
            self.group.pc = target
            self.extra = (LATENCY["branch"],) * 2
        else:
            self.group.mask = self.group.mask & ~mask
            self.groups.append(Group(target, mask))


class Block:
    """Block 0 of its launch and cluster.

    Parameters are in constant memory, as the launcher writes them. `tensors` has each tensor by its
    number: tensor n has the address n << 40.
    """

    def __init__(
        self, program: Program, params: bytes, *, threads: int, cluster: int, shared: int,
        tensors: dict[int, Memory], counters: int, blocks: int,
    ):  # fmt: skip
        self.program = program
        constants = self.constants = Memory(CONSTANTS, PARAMS + len(params))
        constants.bytes[PARAMS : PARAMS + len(params)] = np.frombuffer(params, np.uint8)
        constants.words[0x28 // 4] = sum(STACK)
        constants.words[0x140 // 4] = cluster > 1
        constants.words[0x198 // 4 : 0x1A0 // 4] = np.array([CONSTANTS + PARAMS], U64).view(U32)
        self.shared = Memory(0, SHARED + shared)
        self.stacks = Memory(0, threads * STACK[1])
        self.tensors = {**tensors, CONSTANTS >> 40: constants}
        self.counters, self.blocks = counters, blocks  # `blocks` of them count
        self.counted: dict[int, list[Clock]] = defaultdict(list)
        self.warps = [Warp(self, i) for i in range(threads // 32)]
        self.mbarriers: dict[int, MBarrier] = {}
        self.parked: dict[int, list[Warp]] = defaultdict(list)
        self.free: dict[Any, float] = defaultdict(float)  # when schedulers and units are free
        self.queue = [(0.0, warp.index) for warp in self.warps]
        self.wavefronts: dict[bytes, int] = {}

    def run(self) -> Clock:
        """Run all warps, and return the time at which the last one ends."""
        code, end = self.program.code, (0.0, 0.0)
        with np.errstate(all="ignore"):
            while self.queue:
                time, index = heapq.heappop(self.queue)
                warp = self.warps[index]
                group = warp.group = next(g for g in warp.groups if not g.waits_at)
                instruction = code[group.pc]
                start = later(warp.time, (max(time, self.free[index % 4]), 0))
                for i in instruction.waits:
                    start = later(start, warp.ready[i])
                if start[0] > time and self.queue and self.queue[0][0] < start[0]:
                    heapq.heappush(self.queue, (start[0], index))
                elif self.issue(warp, group, instruction, start):
                    if warp.groups:
                        warp.wake()
                    else:
                        end = later(end, start)
        if stuck := [warp.index for warp in self.warps if warp.groups]:
            raise RuntimeError(f"warps {stuck} wait for ever")
        return end

    def issue(self, warp: Warp, group: Group, instruction: Instruction, start: Clock) -> bool:
        """Issue one instruction; return False if the warp must be woken before it can continue."""
        mask = group.mask & instruction.guard(warp) if instruction.guard else group.mask
        if instruction.name == "SYNCS" and "PHASECHK" in instruction.flags:
            barrier, parity = awaited(instruction, warp, mask)
            if len(barrier.ended) % 2 == parity:
                warp.time = start
                barrier.waiting.append(warp)
                return False
        self.free[warp.index % 4] = start[0] + 1
        warp.issued[instruction.pc] += 1
        group.pc += 16
        warp.now, warp.extra = start, (0, 0)
        if interval := INTERVAL.get(instruction.name):
            self.use((instruction.name, warp.index % 4), warp, interval)
        runs = not instruction.guard or mask.any()
        parked = runs and instruction.run(warp, mask) is True
        warp.time = start[0] + instruction.stall, start[1] + instruction.stall
        if instruction.name in ("BRA", "BRX", "CALL", "RET"):
            warp.time = warp.time[0] + warp.extra[0], warp.time[1] + warp.extra[1]
        if instruction.writes < 6:
            latency = instruction.latency
            done = start[0] + warp.extra[0] + latency, start[1] + warp.extra[1] + latency
            warp.ready[instruction.writes] = later(warp.ready[instruction.writes], done)
        if instruction.reads < 6:
            done = start[0] + warp.extra[0] + LATENCY["read"], start[1] + LATENCY["read"]
            warp.ready[instruction.reads] = later(warp.ready[instruction.reads], done)
        if instruction.name == "DEPBAR":
            warp.time = later(warp.time, warp.copied)
        if parked:
            self.gather(instruction, warp)
        return not parked

    def use(self, unit: Any, warp: Warp, interval: float) -> None:
        """Wait while any warp keeps the unit busy; on the second clock, only this warp counts."""
        begin, alone = max(warp.now[0], self.free[unit]), (unit, warp.index, "alone")
        begin_alone = max(warp.now[1], self.free[alone])
        self.free[unit], self.free[alone] = begin + interval, begin_alone + interval
        warp.extra = begin - warp.now[0], begin_alone - warp.now[1]

    def gather(self, instruction: Instruction, warp: Warp) -> None:
        """Execute BAR.SYNC: park the warp, and wake all warps once the last one arrives."""
        name = int(value(instruction.operands[0])(warp)[0])
        count = len([w for w in self.warps if w.groups])
        if len(instruction.operands) > 1:  # a number of threads; one register may hold both
            threads = int(value(instruction.operands[1])(warp)[0])
            if instruction.operands[0] == instruction.operands[1]:
                name, threads = name & 0xFFFF, threads >> 16
            count = threads // 32
        there = self.parked[name]
        there.append(warp)
        if len(there) == count:
            time = (0.0, 0.0)
            for other in there:
                time = later(time, other.time)
            cost = LATENCY["barrier"] + LATENCY["barrier, a warp"] * count
            for other in there:
                other.time = time[0] + cost, time[1] + cost
                other.wake()
            self.parked[name] = []

    def wavefronts_of(self, at: Array, size: int) -> int:
        """Count the passes of 128 bytes through the banks.

        8 bytes per lane take at least two passes and 16 take four, or half as many if several lanes
        load the same bytes.
        """
        key = (at - at[0]).tobytes() + bytes([size])
        if key not in self.wavefronts:
            words = {}
            for parts in (1, 2, 4):
                total, clean = 0, True
                for lanes in np.array_split(at, parts):
                    distinct = np.unique(
                        (lanes[:, None] // 4 + np.arange(max(1, size // 4))).ravel()
                    )
                    worst = (
                        int(np.bincount(distinct.astype(np.int64) % 32).max()) if len(lanes) else 0
                    )
                    total, clean = total + worst, clean and worst <= 1
                words[parts] = total, clean
            options = {8: (1, 2), 16: (2, 4)}.get(size, (1,))
            best = next((p for p in options if words[p][1]), options[-1])
            self.wavefronts[key] = words[best][0]
        return self.wavefronts[key]


# ---- operands ----


def predicate(text: str) -> Callable[[Warp], Any]:
    inverted, name = text.startswith("!"), text.lstrip("!")
    i = 7 if name.endswith("PT") else int(name.lstrip("UP"))
    if name.startswith("U"):
        return lambda w: w.UP[i] != inverted
    return (lambda w: ~w.P[i]) if inverted else (lambda w: w.P[i])


def register(text: str) -> int:
    """Return the number of a register: 255 for RZ, 63 for URZ."""
    name = text.strip("-~|!").partition(".")[0]
    return (255 if name == "RZ" else 63) if name.endswith("RZ") else int(name.lstrip("UR"))


def value(text: str, kind: Any = U32) -> Callable[[Warp], Array]:
    """Return a reader of a 32-bit operand, as integers or float32."""
    negative, inverted, absolute = text.startswith("-"), text.startswith("~"), "|" in text
    name = text.strip("-~|")
    if not re.match(r"U?R(\d|Z)", name):
        if kind is F32:
            number = np.full(32, float(text), F32)
            return lambda w: number
        immediate = np.full(32, int(text.lstrip("~"), 16) & MASK, U32)
        return lambda w: ~immediate if inverted else immediate
    i, uniform = register(name), name.startswith("U")
    keep = U32(0x7FFFFFFF if absolute else MASK)
    sign = U32(0x80000000 if negative else 0)

    def get(w: Warp) -> Array:
        word = np.full(32, w.U[i], U32) if uniform else w.R[i]
        if kind is F32:
            return (word & keep ^ sign if absolute or negative else word).view(F32)
        return U32(0) - word if negative else ~word if inverted else word

    return get


def wide(text: str) -> Callable[[Warp], Array]:
    """Return a reader of a 64-bit operand, in two registers."""
    i, uniform = register(text), text.startswith("U")
    if i == (63 if uniform else 255):
        return lambda w: np.zeros(32, U64)
    if uniform:
        return lambda w: np.full(32, w.U[i] | w.U[i + 1] << 32, U64)
    return lambda w: w.R[i].astype(U64) | w.R[i + 1].astype(U64) << U64(32)


def put(w: Warp, i: int, result: Any, mask: Array) -> None:
    if i != 255:
        np.copyto(w.R[i], result, where=mask)


def is_predicate(text: str) -> bool:
    return re.match(r"!?U?P(\d|T|R)", text) is not None


def target(text: str) -> Callable[[Warp, Any, Array], None]:
    """Return a writer of a predicate, a register, or a 64-bit pair: per lane, or uniform."""
    uniform = text.startswith("U")
    if is_predicate(text):
        p = 7 if text.endswith("PT") else int(text.lstrip("UP"))

        def put_predicate(w: Warp, result: Any, mask: Array) -> None:
            if p != 7 and uniform:
                w.UP[p] = bool(np.ravel(result)[0])
            elif p != 7:
                np.copyto(w.P[p], result, where=mask)

        return put_predicate
    i = register(text)

    def put_register(w: Warp, result: Any, mask: Array) -> None:
        words = [result.view(U32)]
        if result.dtype == U64:
            words = [result.astype(U32), (result >> U64(32)).astype(U32)]
        for n, word in enumerate(words):
            if uniform and i != 63:
                w.U[i + n] = int(word[0])
            elif not uniform and i != 255:
                np.copyto(w.R[i + n], word, where=mask)

    return put_register


def address(text: str) -> Callable[[Warp], Array]:
    """Return a reader of [R1+0x8], [R2.64+UR4] or desc[UR4][R2.64], with 64 bits per lane."""
    inner = text[text.rindex("[") + 1 : -1]
    terms: list[Callable[[Warp], Array]] = []
    offset = 0
    for term in inner.replace("+-", "+ -").split("+"):
        if "0x" in term:
            offset += int(term.strip(), 16)
        elif term.endswith(".64"):
            terms.append(wide(term[:-3]))
        else:
            get = value(term)
            terms.append(lambda w, get=get: get(w).astype(U64))  # type: ignore[misc]
    constant = U64(offset & 0xFFFFFFFFFFFFFFFF)

    def at(w: Warp) -> Array:
        total = np.full(32, constant, U64)
        for term in terms:
            total = total + term(w)
        return total if ".64" in inner else total & U64(MASK)

    return at


# ---- instructions: each maker decodes one and returns a function that executes it ----


def unknown(ins: Instruction, _: Any = None) -> Run:
    def fail(w: Warp, m: Array) -> None:
        raise NotImplementedError(f"{ins.pc:#06x}: {ins.text}")

    return fail


def alu(kinds: str, function: Callable[..., Any]) -> Callable[[Instruction, Program], Run]:
    """Make an instruction that stores `function(flags, *sources)` in its destinations.

    `kinds` has a letter for each source: u and f for 32 bits, w for 64 bits, a for an `addend`, p
    for a predicate, n and h for constants. Predicates after these sources are carries.
    """
    source: dict[str, Callable[[str], Callable[[Warp], Any]]] = {
        "u": value, "f": lambda text: value(text, F32), "w": wide, "a": addend, "p": predicate,
        "n": lambda text: lambda w: int(text, 16), "h": lambda text: lambda w: float(text),
    }  # fmt: skip

    def make(ins: Instruction, _: Program) -> Run:
        operands, first = ins.operands, 1
        if is_predicate(operands[0]):
            first = 2
        else:
            while is_predicate(operands[first]):
                first += 1
        put_all = [target(text) for text in operands[:first]]
        gets = [source[kind](text) for kind, text in zip(kinds + "pp", operands[first:])]

        def run(w: Warp, m: Array) -> None:
            results = function(ins.flags, *(get(w) for get in gets))
            for put_one, result in zip(put_all, results if type(results) is tuple else (results,)):
                put_one(w, result, m)

        return run

    return make


def imad(ins: Instruction, program: Program) -> Run:
    """Multiply and add; WIDE gives 64 bits, HI their upper half. Also used for sums and moves."""

    def wide_product(flags: list[str], a: Any, b: Any, c: Any) -> Any:
        kind = U64 if "U32" in flags else np.int64
        a, b = (x if "U32" in flags else x.view(I32) for x in (a, b))
        total = (a.astype(kind) * b.astype(kind)).view(U64) + c
        return (total >> U64(32)).astype(U32) if "HI" in flags else total

    if "WIDE" in ins.flags or "HI" in ins.flags:
        return alu("uuw", wide_product)(ins, program)
    return alu("uuu", lambda f, a, b, c, carry=False: a * b + c + U32(1) * carry)(ins, program)


def addend(text: str) -> Callable[[Warp], Array]:
    """Return a reader of an addend, which has 33 bits because -x carries if x is 0."""
    get = value(text.lstrip("-") if "R" in text else text)
    if re.match(r"-U?R", text):
        return lambda w: U64(1 << 32) - get(w).astype(U64)
    return lambda w: get(w).astype(U64)


def add(flags: list[str], a: Any, b: Any, c: Any, *carries: Any) -> Any:
    total = a + b + c
    for carry in carries:
        total = total + U64(1) * carry
    return total.astype(U32), total >> U64(32) > 0, total >> U64(32) > 1


def lea(ins: Instruction, program: Program) -> Run:
    """Compute (a << n) + b, with HI for the upper half of the shifted 64 bits (a is the lower)."""
    upper, signed = "HI" in ins.flags, "SX32" in ins.flags

    def shifted(flags: list[str], a: Any, b: Any, *rest: Any) -> Any:
        *c, n = rest[: 2 if upper and not signed else 1]
        x = a.view(I32).astype(np.int64).view(U64) if signed else a.astype(U64)
        x = (x | c[0].astype(U64) << U64(32) if c else x) << U64(n)
        total = (x >> U64(32) if upper else x) & U64(MASK)
        for carry in rest[len(c) + 1 :]:
            total = total + U64(1) * carry
        total = total + b
        return total.astype(U32), total > U64(MASK)

    return alu("uuun" if upper and not signed else "uun", shifted)(ins, program)


def shift(flags: list[str], a: Any, n: Any, c: Any) -> Any:
    """Shift 64 bits, and return the upper or lower half."""
    x, n = a.astype(U64) | c.astype(U64) << U64(32), np.minimum(n, U32(63)).astype(U64)
    if "S32" in flags or "S64" in flags:
        x = (
            x.view(np.int64) << n.view(np.int64)
            if flags[0] == "L"
            else x.view(np.int64) >> n.view(np.int64)
        )
        x = x.view(U64)
    else:
        x = x << n if flags[0] == "L" else x >> n
    return (x >> U64(32) if "HI" in flags else x).astype(U32)


def truth(table: int, a: Any, b: Any, c: Any) -> Any:
    result = a ^ a
    for i in range(8):
        if table >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def lop3(ins: Instruction, program: Program) -> Run:
    def logic(flags: list[str], a: Any, b: Any, c: Any, table: int, _: Any) -> Any:
        result = truth(table, a, b, c)
        return (result != 0, result) if is_predicate(ins.operands[0]) else result

    return alu("uuunp", logic)(ins, program)


def plop3(flags: list[str], a: Any, b: Any, c: Any, first: int, second: int) -> Any:
    a, b, c = (np.asarray(x) for x in (a, b, c))
    return truth(first, a, b, c), truth(second, a, b, c)


COMPARE = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge,
    "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


def compare(flags: list[str], a: Any, b: Any, other: Any, lower: Any = None) -> Any:
    """Compare; EX compares upper halves of 64 bits, given the result `lower` for lower halves."""
    how = flags[0]
    if a.dtype == U32 and "U32" not in flags:
        a, b = a.view(I32), b.view(I32)
    if lower is None:
        result = COMPARE[how[:2]](a, b)
        if how[2:] == "U":
            result = result | np.isnan(a) | np.isnan(b)
    elif how == "NE":
        result = (a != b) | lower
    else:
        strictly = {"L": operator.lt, "G": operator.gt}.get(how[0])
        result = (a == b) & lower | (strictly(a, b) if strictly else False)
    combine = operator.or_ if "OR" in flags else operator.and_
    return combine(result, other), combine(~result, other)


def least_or_most(flags: list[str], a: Any, b: Any, least: Any) -> Any:
    if "U32" not in flags:
        a, b = a.view(I32), b.view(I32)
    return np.where(least, np.minimum(a, b), np.maximum(a, b)).view(U32)


def permute(flags: list[str], a: Any, selector: Any, c: Any) -> Any:
    both = a.astype(U64) | c.astype(U64) << U64(32)
    result = np.zeros(32, U32)
    for i in range(4):
        which = selector >> U32(4 * i)
        byte = (both >> ((which & U32(7)) * U32(8)).astype(U64)).astype(U32) & U32(0xFF)
        sign = np.where(byte & U32(0x80), U32(0xFF), U32(0))
        result |= np.where(which & U32(8), sign, byte).astype(U32) << U32(8 * i)
    return result


def fused(flags: list[str], a: Any, b: Any, c: Any) -> Any:
    return (a.astype(np.float64) * b + c).astype(F32)


def mufu(flags: list[str], a: Any) -> Any:
    if flags[0] == "TANH":
        return np.tanh(a)
    return {"EX2": np.exp2, "RCP": lambda x: F32(1) / x}[flags[0]](a).astype(F32)


def to_float(flags: list[str], a: Any) -> Any:
    exact = (a if "U32" in flags else a.view(I32)).astype(np.float64)
    near = exact.astype(F32)
    return np.where("RP" in flags and near < exact, np.nextafter(near, F32(np.inf)), near)


def bf16(a: Any) -> Any:
    bits = a.view(U32)
    return (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)


def pack(flags: list[str], a: Any, b: Any) -> Any:
    assert "BF16" in flags
    return bf16(a) << U32(16) | bf16(b)


def halves(flags: list[str], a: Any, b: Any, *numbers: Any) -> Any:
    """Load two 16-bit constants, the upper one first (HFMA2.MMA R, -RZ, RZ, x, y)."""
    return np.full(32, np.array(numbers[::-1], np.float16).view(U32)[0], U32)


def load_constant(ins: Instruction, _: Program) -> Run:
    put_one, wide = target(ins.operands[0]), "64" in ins.flags
    at = re.fullmatch(r"c\[0x0\]\[(?:(\w+)\+?)??(0x\w+)?\]", ins.operands[1])
    if not at or at[1]:
        return unknown(ins)
    place = int(at[2], 16)

    def run(w: Warp, m: Array) -> None:
        memory = w.block.constants
        found: Any = memory.bytes[place] if "U8" in ins.flags else memory.words[place // 4]
        if wide:
            found = int(found) | int(memory.words[place // 4 + 1]) << 32
        put_one(w, np.full(32, found, U64 if wide else U32), m)

    return run


def special(ins: Instruction, _: Program) -> Run:
    put_one, what = target(ins.operands[0]), ins.operands[1]
    kind = U64 if ins.name == "CS2R" and "32" not in ins.flags else U32

    def run(w: Warp, m: Array) -> None:
        thread = what == "SR_TID.X"
        put_one(w, (np.arange(32) + w.index * 32 if thread else np.zeros(32)).astype(kind), m)

    if what not in ("SR_TID.X", "SR_CTAID.X", "SR_CgaCtaId", "SR_SWINHI", "SRZ"):
        return unknown(ins)
    return run


def to_uniform(ins: Instruction, _: Program) -> Run:
    """Read the first lane of R (R2UR [P,] U, R); set P in lanes whose values differ."""
    *differ, to, source = ins.operands
    d, a = register(to), value(source)

    def run(w: Warp, m: Array) -> None:
        w.U[d] = int(a(w)[m][0])
        for p in differ:
            target(p)(w, a(w) != w.U[d], m)

    return run


def predicates_to_register(ins: Instruction, _: Program) -> Run:
    d, a, bits = register(ins.operands[0]), value(ins.operands[2]), int(ins.operands[3], 16)

    def run(w: Warp, m: Array) -> None:
        result = a(w) & U32(~bits & MASK)
        for i in range(7):
            if bits >> i & 1:
                result = result | w.P[i].astype(U32) << U32(i)
        put(w, d, result, m)

    return run


def register_to_predicates(ins: Instruction, _: Program) -> Run:
    a, bits = value(ins.operands[1]), int(ins.operands[2], 16)

    def run(w: Warp, m: Array) -> None:
        for i in range(7):
            if bits >> i & 1:
                np.copyto(w.P[i], (a(w) >> U32(i) & U32(1)) != 0, where=m)

    return run


def vote(ins: Instruction, _: Program) -> Run:
    put_one, p = target(ins.operands[0]), predicate(ins.operands[1])
    decide = {"ALL": np.all, "ANY": np.any}[ins.flags[0]]
    return lambda w, m: put_one(w, decide((p(w) & m)[m]), m)


def shuffle(ins: Instruction, _: Program) -> Run:
    d, (a, b) = register(ins.operands[1]), map(value, ins.operands[2:4])
    lanes = np.arange(32)
    kind = ins.flags[0]
    assert ins.operands[0] == "PT", ins.text

    def run(w: Warp, m: Array) -> None:
        by = b(w).astype(np.int64)
        at = {"BFLY": lanes ^ by, "IDX": by, "DOWN": lanes + by, "UP": lanes - by}[kind]
        put(w, d, a(w)[np.where((at >= 0) & (at < 32), at, lanes)], m)

    return run


def size_of(ins: Instruction) -> int:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "64": 8, "128": 16}
    return next((sizes[f] for f in ins.flags if f in sizes), 4)


def place(w: Warp, at: Array, mask: Array) -> tuple[Memory, Array]:
    """Return the memory that contains all of these generic or global addresses."""
    at = at[mask]
    number = int(at[0] >> U64(40))
    if number:
        return w.block.tensors[number], at
    if STACK[0] <= int(at[0]) < sum(STACK):
        return w.block.stacks, (at.astype(np.int64) + w.local(mask)).astype(U64)
    return w.block.shared, at & U64(0xFFFFFF)


def load(ins: Instruction, _: Program) -> Run:
    d, at, size = register(ins.operands[0]), address(ins.operands[1]), size_of(ins)

    def run(w: Warp, m: Array) -> None:
        memory, where = place(w, at(w), m)
        values = memory.read(where, size)
        if memory is w.block.shared:
            w.block.use("shared memory", w, w.block.wavefronts_of(where, size))
        if memory is w.block.tensors.get(w.block.counters):
            values = [np.zeros(len(where), U32)]
            for i, one in enumerate(where):
                times = w.block.counted[int(one)]
                seen = [time for time in times if time[0] <= w.now[0] + ins.latency]
                values[0][i] = len(seen) * w.block.blocks
        for i, loaded in enumerate(values):
            if d != 255:
                w.R[d + i][m] = loaded

    return run


def store(ins: Instruction, _: Program) -> Run:
    at, d, size = address(ins.operands[0]), register(ins.operands[1]), size_of(ins)

    def run(w: Warp, m: Array) -> None:
        memory, where = place(w, at(w), m)
        if memory is w.block.shared:
            w.block.use("shared memory", w, w.block.wavefronts_of(where, size))
        zero = np.zeros(len(where), U32)
        words = range(max(1, size // 4))
        memory.write(where, size, [w.R[d + i][m] if d != 255 else zero for i in words])

    return run


def copy(ins: Instruction, _: Program) -> Run:
    to, source, size = address(ins.operands[0]), address(ins.operands[1]), size_of(ins)
    exists = predicate(ins.operands[2]) if len(ins.operands) > 2 else None

    def run(w: Warp, m: Array) -> None:
        memory, where = place(w, source(w), m)
        values = memory.read(where, size)
        if exists is not None:
            values = [np.where(np.asarray(exists(w))[m], v, U32(0)) for v in values]
        w.block.shared.write(to(w)[m] & U64(0xFFFFFF), size, values)
        there = w.now[0] + ins.latency, w.now[1] + ins.latency
        w.copied = later(w.copied, there)

    return run


def load_matrices(ins: Instruction, _: Program) -> Run:
    assert ins.flags == ["16", "M88", "4"], ins.text
    d, at = register(ins.operands[0]), address(ins.operands[1])

    def run(w: Warp, m: Array) -> None:
        rows = at(w) & U64(0xFFFFFF)
        lanes = np.arange(32)
        for i in range(4):
            starts = rows[i * 8 + lanes // 4] + (lanes % 4 * 4).astype(U64)
            w.R[d + i] = w.block.shared.read(starts, 4)[0]
            w.block.use("shared memory", w, w.block.wavefronts_of(starts, 4))

    return run


def unpack(words: Array) -> tuple[Array, Array]:
    """Return the two bf16 of each word, the lower one first."""
    return (words << U32(16)).view(F32), (words & U32(0xFFFF0000)).view(F32)


def multiply(ins: Instruction, _: Program) -> Run:
    """Compute D [16, 8] = A [16, 16] B [16, 8] + C; a lane has rows lane / 4 and lane / 4 + 8."""
    assert ins.flags == ["16816", "F32", "BF16"], ins.text
    d, a, b, c = map(register, ins.operands)
    lanes = np.arange(32)
    row, pair = lanes // 4, lanes % 4 * 2

    def run(w: Warp, m: Array) -> None:
        A, B, C = np.zeros((16, 16), F32), np.zeros((16, 8), F32), np.zeros((16, 8), F32)
        for i in range(4):
            for n, half in enumerate(unpack(w.R[a + i])):
                A[row + i % 2 * 8, pair + i // 2 * 8 + n] = half
        for i in range(2):
            for n, half in enumerate(unpack(w.R[b + i])):
                B[pair + i * 8 + n, row] = half
        for i in range(4):
            C[row + i // 2 * 8, pair + i % 2] = w.R[c + i if c != 255 else c].view(F32)
        D = A @ B + C
        for i in range(4):
            w.R[d + i] = D[row + i // 2 * 8, pair + i % 2].view(U32)

    return run


# ---- synchronisation ----


def shared_at(text: str) -> Callable[[Warp, Array], int]:
    get = address(text)
    return lambda w, m: int(get(w)[m][0]) & 0xFFFFFF


def awaited(ins: Instruction, w: Warp, mask: Array) -> tuple[MBarrier, int]:
    barrier = w.block.mbarriers[shared_at(ins.operands[1])(w, mask)]
    return barrier, int(value(ins.operands[2])(w)[mask][0]) >> 31


def syncs(ins: Instruction, _: Program) -> Run:
    at = shared_at(ins.operands[1])
    if "EXCH" in ins.flags:  # what mbarrier.init stores
        word = register(ins.operands[2])

        def init(w: Warp, m: Array) -> None:
            w.block.mbarriers[at(w, m)] = MBarrier(0x100000 - (w.U[word] >> 1))

        return init
    if "PHASECHK" in ins.flags:

        def wait(w: Warp, m: Array) -> None:
            ended = awaited(ins, w, m)[0].ended[-1]
            w.extra = max(0, ended[0] - w.now[0]), max(0, ended[1] - w.now[1])
            target(ins.operands[0])(w, True, m)

        return wait
    expects = "A1T0" not in ins.flags
    size = value(ins.operands[2]) if expects else None

    def arrive(w: Warp, m: Array) -> None:
        bytes_ = int(size(w)[m].sum()) if size else 0
        w.block.mbarriers[at(w, m)].event(w.now, int(m.sum()), bytes_)

    return arrive


def arrive_after_copies(ins: Instruction, _: Program) -> Run:
    at = shared_at(ins.operands[0])
    return lambda w, m: w.block.mbarriers[at(w, m)].event(later(w.now, w.copied), int(m.sum()), 0)


def send(ins: Instruction, _: Program) -> Run:
    """Execute st.async; what this block sends stands for what its peers send to it."""
    first, d, size = register(ins.operands[0].strip("[]")), register(ins.operands[1]), size_of(ins)

    def run(w: Warp, m: Array) -> None:
        block, lanes = w.block, int(m.sum())
        packets = lanes if size == 16 else len(np.unique(w.R[first][m] >> U32(5)))
        block.use("other SMs", w, packets * PACKET)
        to, barrier = w.R[first][m], int(w.R[first + 1][m][0]) & 0xFFFFFF
        own = m.copy()
        own[m] = to >> U32(24) == 0
        if own.any():
            where = w.R[first][own].astype(U64)
            block.shared.write(where, size, [w.R[d + i][own] for i in range(size // 4)])
        hop = LATENCY["hop"]
        there = w.now[0] + w.extra[0] + hop, w.now[1] + w.extra[1] + hop
        block.mbarriers[barrier].event(there, 0, -lanes * size)

    return run


def count(ins: Instruction, _: Program) -> Run:
    """Execute red.release on a counter; all blocks are assumed to count at the same time."""
    at = address(ins.operands[0])

    def run(w: Warp, m: Array) -> None:
        flag = LATENCY["flag"]
        w.block.counted[int(at(w)[m][0])].append((w.now[0] + flag, w.now[1] + flag))

    return run


def branch(ins: Instruction, program: Program) -> Run:
    target = program.labels[ins.operands[-1].strip("`()")]
    if ins.flags == ["DIV"]:  # if lanes have diverged

        def if_apart(w: Warp, m: Array) -> None:
            if not w.group.mask.all():
                w.branch(m, target)

        return if_apart
    conditions = [predicate(text) for text in ins.operands[:-1]]

    def run(w: Warp, m: Array) -> None:
        for condition in conditions:
            m = m & condition(w)
        if m.any():
            w.branch(w.group.mask if "ANY" in ins.flags else m, target)

    return run


def back(ins: Instruction, _: Program) -> Run:
    to = value(ins.operands[0].split(" ")[0])
    return lambda w, m: w.branch(m, int(to(w)[m][0]))


def begin_convergence(ins: Instruction, _: Program) -> Run:
    def run(w: Warp, m: Array) -> None:
        w.convergence[ins.operands[0]] = w.group.mask

    return run


def end_convergence(ins: Instruction, _: Program) -> Run:
    return lambda w, m: w.synchronise(ins.operands[0], w.convergence[ins.operands[0]])


def converge(ins: Instruction, _: Program) -> Run:
    return lambda w, m: w.synchronise("all", w.active())


NOTHING = {
    "NOP", "YIELD", "CCTL", "ERRBAR", "CGAERRBAR", "MEMBAR", "FENCE", "LDGDEPBAR", "DEPBAR",
    "UCGABAR_ARV", "UCGABAR_WAIT",
}  # fmt: skip
MAKERS: dict[str, Callable[[Instruction, Program], Run]] = {
    "IMAD": imad, "IADD3": alu("aaa", add), "LEA": lea, "SHF": alu("uuu", shift), "LOP3": lop3,
    "PLOP3": alu("pppnn", plop3), "ISETP": alu("uup", compare), "FSETP": alu("ffp", compare),
    "MOV": alu("u", lambda f, a: a), "SEL": alu("uup", lambda f, a, b, p: np.where(p, a, b)),
    "FSEL": alu("ffp", lambda f, a, b, p: np.where(p, a, b)), "PRMT": alu("uuu", permute),
    "VIADD": alu("uu", lambda f, a, b: a + b), "VIMNMX": alu("uup", least_or_most),
    "VIADDMNMX": alu("uuup", lambda f, a, b, c, p: least_or_most(f, a + b, c, p)),
    "IABS": alu("u", lambda f, a: np.abs(a.view(I32))), "FADD": alu("ff", lambda f, a, b: a + b),
    "FMUL": alu("ff", lambda f, a, b: a * b), "FFMA": alu("fff", fused), "MUFU": alu("f", mufu),
    "I2F": alu("u", to_float), "F2I": alu("f", lambda f, a: a.astype(U32)),
    "F2FP": alu("ff", pack), "HFMA2": alu("uuhh", halves),
    "USETMAXREG": lambda i, p: lambda w, m: target(i.operands[0])(w, np.ones(32, bool), m)
    if is_predicate(i.operands[0]) else None,
    "LDC": load_constant, "S2R": special, "S2UR": special, "CS2R": special, "R2UR": to_uniform,
    "P2R": predicates_to_register, "R2P": register_to_predicates, "VOTE": vote, "SHFL": shuffle,
    "LDG": load, "LD": load, "LDS": load, "LDL": load, "STG": store, "STS": store, "STL": store,
    "LDGSTS": copy, "LDSM": load_matrices, "HMMA": multiply,
    "SYNCS": syncs, "ARRIVES": arrive_after_copies, "STAS": send, "REDG": count,
    "BRA": branch, "CALL": branch, "RET": back, "BSSY": begin_convergence,
    "BSYNC": end_convergence, "WARPSYNC": converge, "BAR": lambda i, p: lambda w, m: True,
    "EXIT": lambda i, p: lambda w, m: w.exit(m),
}  # fmt: skip
for name in ("IMAD", "IADD3", "LEA", "SHF", "LOP3", "PLOP3", "ISETP", "MOV", "SEL", "LDC"):
    MAKERS[f"U{name}"] = MAKERS[name]  # the uniform variants, which run once per warp
MAKERS["VOTEU"] = vote
