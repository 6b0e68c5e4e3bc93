"""Cost of a step of the CUDA engine, computed from the machine code for an H100.

The cost is the instructions of each warp by part, the issue slots of each scheduler, and an
estimate of the latency of the recurrence.

    python tests/cuda/step_cost.py           writes tests/cuda/step_cost.txt (make cuda-step-cost)
    python tests/cuda/step_cost.py f32 1 64 64 --lines      one problem; instructions by source line

The planner and the launcher determine the kernel and its parameters. `sass.py` executes its first
block for some steps and counts instructions; the states that the block stores are checked. The cost
of a step is the difference between two lengths of the sequence. The table is in the repository, so
that test_cuda_build.py notices changes.

Counts are exact for the path that is run: dense, descending = false, tanh, with biases and h_n,
without h0, resets and alpha. Cycles come from a model, whose latencies are in `sass.LATENCY`. The
model ignores instruction fetches, register bank conflicts, replays, and delays by other blocks, and
assumes that inputs are in L2. The step and grid regimes are not simulated.

To compare with a GPU, take the same difference with ncu, which counts instructions and cycles:

    ncu --kernel-name regex:'persistent|plain' --metrics smsp__inst_executed.max,\\
    smsp__inst_executed.sum,smsp__cycles_active.max,sm__cycles_elapsed.max python run.py

Per step, `smsp__inst_executed.max` is "slots" in the table (of the busiest scheduler), and
`sm__cycles_elapsed.max` is "cycles"; `smsp__inst_executed.sum` counts all warps of all blocks. With
`--set source --import-source yes`, ncu prints executed instructions by address, to be compared with
`--lines`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resources  # also puts tests/support on the path
import sass
from gpus import H100
from resources import ROOT, toolkit

TABLE = Path(__file__).with_suffix(".txt")
LAUNCHER = Path(__file__).with_suffix(".cu")
SHAPES = ((1, 64, 64), (16, 128, 256), (32, 256, 512), (16, 1024, 1024))
DTYPES = ("f32", "bf16")
CLOCK = H100["clock"]  # GHz
SCHEDULERS = 4

# Functions of csrc/cuda by purpose. An instruction counts for the innermost listed function that it
# was inlined from; instructions of other functions count as control.
PARTS = {
    "inputs": "load_inputs load_x inputs load reset_of far_ahead prefetch_into_l2 copy_async gather"
    " fetched",
    "product": "multiply add load_states mma load_matrices to_tf32",
    "partial sums": "add_parts lanes_summed finish",
    "epilogue": "compute store activation adjoint with_nonlinearity",
    "exchange": "send send_to_all send_to_peer expect expect_bytes synchronise wait_for_arrivals"
    " copies_done read_count count_arrival",
    "control": "step",
}
PART_OF = {name: part for part, names in PARTS.items() for name in names.split()}
# Comments in csrc/cuda that start a part, as a function would. They must not be reworded there.
BEGINS = {"// Sums over the 8 lanes.": "lanes_summed"}


def nvdisasm() -> str | None:
    beside = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    return shutil.which("nvdisasm", path=f"{beside}:{toolkit()}/bin:{os.environ['PATH']}")


@functools.cache
def functions(file: str) -> list[str]:
    """Return, for each line of a file of csrc, the function that contains it."""
    found, name = [""], ""
    for path in (ROOT / "csrc" / "cuda" / file, ROOT / "csrc" / file):
        for line in path.read_text().splitlines() if path.exists() else ():
            definition = re.search(
                r"(?:__(?:device|global)__|FUSEDRNN_INLINE).*?\b(?!__)(\w+)\(", line
            )
            name = definition[1] if definition else name
            name = next((to for text, to in BEGINS.items() if text in line), name)
            found.append(name)
    return found


def part_of(instruction: sass.Instruction) -> str:
    for file, line in instruction.lines:
        known = functions(file)
        if line < len(known) and known[line] in PART_OF:
            return PART_OF[known[line]]
    return "control"


@functools.cache
def launcher() -> Path:
    """Build the planner and launcher of the engine as a program (step_cost.cu)."""
    engine = [ROOT / "csrc" / "cuda" / name for name in ("engine.cu", "plan.cpp")]
    newest = max(path.stat().st_mtime for path in (LAUNCHER, *engine, *resources.HEADERS))
    program = ROOT / "build" / "step_cost"
    if not program.exists() or program.stat().st_mtime < newest:
        program.parent.mkdir(exist_ok=True)
        command = [f"{toolkit()}/bin/nvcc", "-std=c++17", "-arch=sm_90", LAUNCHER, "-o", program]
        subprocess.run(command, check=True)
    return program


@dataclass
class Problem:
    """A forward pass with the launch parameters of the engine, and random values in its tensors."""

    dtype: str
    T: int
    B: int
    I: int
    H: int

    def __post_init__(self) -> None:
        *device, clusters = H100.values()
        numbers = map(str, (self.T, self.B, self.I, self.H, *device, *clusters))
        plan, self.words, params = subprocess.check_output(
            [launcher(), self.dtype, *numbers], text=True
        ).splitlines()
        self.params, self.plan = bytes.fromhex(params), json.loads(plan)
        T, B, I, H = self.T, self.B, self.I, self.H
        random = np.random.default_rng(0)
        self.tensors = {9: sass.Memory(9 << 40, 4096)}  # counters
        self.shapes = {1: (H, H), 2: (H, I), 3: (H,), 4: (H,), 5: (T, B, I), 6: (T, B, H)}
        self.shapes |= {7: (T, B, H), 8: (B, H)}
        for n, shape in self.shapes.items():
            scale = shape[-1] ** -0.5 if n < 3 else 0 if n > 6 else 1
            numbers = (random.standard_normal(shape) * scale).astype(np.float32).ravel()
            tensor = sass.Memory(n << 40, numbers.size * (4 if self.dtype == "f32" else 2))
            if self.dtype == "f32":
                tensor.words[: numbers.size] = numbers.view(np.uint32)
            else:
                tensor.halves[: numbers.size] = sass.bf16(numbers)
            self.tensors[n] = tensor

    def numbers(self, n: int) -> np.ndarray:
        shape, tensor = self.shapes[n], self.tensors[n]
        words = tensor.words if self.dtype == "f32" else tensor.halves.astype(np.uint32) << 16
        return words[: np.prod(shape)].view(np.float32).reshape(shape).astype(float)

    @property
    def kernel(self) -> str:
        p, half = self.plan, self.dtype == "bf16"
        tile = f"Mma<__nv_bfloat16, {p['tile_units']}>"
        if not half:
            tile = f"Fma<float, {p['tile_units']}, {p['tile_rows']}>"
        if p["plain"]:
            return f"plain<{tile}, activation, {str(p['regime'] == 'cluster').lower()}>"
        return f"persistent<{tile}, activation>"

    def block(self) -> sass.Block:
        cubin, _ = resources.compiled(ROOT / "csrc" / "cuda" / f"kernels_{self.dtype}.cu", "90")
        p, disassembler = self.plan, nvdisasm()
        assert disassembler, "needs nvdisasm: pip install nvidia-cuda-nvdisasm"
        return sass.Block(
            program(disassembler, cubin, self.kernel), self.params, threads=p["threads"],
            cluster=p["blocks"] if p["regime"] == "cluster" else 1, shared=p["shared"],
            tensors=self.tensors, counters=9, blocks=p["blocks"],
        )  # fmt: skip

    def check(self) -> None:
        """Compare the states that block 0 stored with a plain loop over its rows and units.

        The units of all other blocks count as 0.
        """
        p = self.plan
        rows, units = slice(p["rows"]), slice(p["units"])
        w_ih, x = (self.numbers(n) for n in (2, 5))
        z = x @ w_ih.T if p["fused"] else self.numbers(6)
        z = z[:, rows, units] + (self.numbers(3) + self.numbers(4))[units]
        w_hh, h = self.numbers(1)[units, units], self.numbers(7)[:, rows, units]
        for t in range(self.T):
            expected = np.tanh(z[t] + (h[t - 1] @ w_hh.T if t else 0))
            np.testing.assert_allclose(h[t], expected, atol=1e-5 if self.dtype == "f32" else 5e-3)


@functools.cache
def program(disassembler: str, cubin: Path, kernel: str) -> sass.Program:
    text = sass.disassembled(disassembler, cubin)
    names = resources.demangled(text)
    return sass.Program(next(text[name] for name in text if names[name] == kernel))


@dataclass
class Cost:
    """The average cost of a step."""

    problem: Problem
    code: dict[int, sass.Instruction]
    warps: list[dict[int, float]]  # for each warp, the number of times it issues each instruction
    cycles: float  # with all warps together
    chain: float  # if warps never compete for a scheduler or unit

    def slots(self) -> list[float]:
        """Return the issue slots of each scheduler."""
        return [
            sum(sum(warp.values()) for warp in self.warps[i::SCHEDULERS]) for i in range(SCHEDULERS)
        ]

    def parts(self, warp: int) -> Counter[str]:
        found: Counter[str] = Counter()
        for pc, times in self.warps[warp].items():
            found[part_of(self.code[pc])] += times  # type: ignore[assignment]
        return found


def cost(dtype: str, B: int, I: int, H: int) -> Cost:
    short, long = Problem(dtype, 10, B, I, H), Problem(dtype, 12, B, I, H)
    steps = long.T - short.T
    ends, blocks = [], []
    for problem in (short, long):
        block = problem.block()
        ends.append(block.run())
        blocks.append(block)
        problem.check()
    warps = []
    for before, after in zip(blocks[0].warps, blocks[1].warps):
        difference = after.issued.copy()
        difference.subtract(before.issued)
        warps.append({pc: n / steps for pc, n in difference.items() if n})
    cycles, chain = ((b - a) / steps for a, b in zip(*ends))
    return Cost(long, blocks[1].program.code, warps, cycles, chain)


# ---- the table ----


def described(cost: Cost) -> str:
    p = cost.problem
    B, I, H = p.B, p.I, p.H
    per_us = 1000 * CLOCK
    slots = max(cost.slots())
    lines = [
        f"({B}, {I}, {H}) {p.dtype}: {p.kernel}, {p.plan['regime']}, "
        f"{p.plan['blocks']} x {p.plan['rows']} rows x {p.plan['units']} units",
        f"  {slots:.0f} slots, chain of {cost.chain:.0f} cycles, together {cost.cycles:.0f} cycles:"
        f" {slots / per_us:.2f}, {cost.chain / per_us:.2f}, {cost.cycles / per_us:.2f} us;"
        f" the planner predicts {p.plan['microseconds']:.2f} us",
        "  " + "".join(f"{name:>13}" for name in ("warps", *PARTS, "all")),
    ]
    rows: dict[str, list[int]] = {}
    for i in range(len(cost.warps)):
        parts = cost.parts(i)
        counts = [*(parts[part] for part in PARTS), sum(parts.values())]
        rows.setdefault("".join(f"{n:13.0f}" for n in counts), []).append(i)
    lines += [f"  {','.join(map(str, warps)):>13}{counts}" for counts, warps in rows.items()]
    return "\n".join(lines) + "\n"


def header() -> str:
    return (
        f"# By python tests/cuda/step_cost.py with nvcc {resources.release()}: warp "
        f"instructions a step of block 0, forward,\n# on an H100 at {CLOCK} GHz\n"
    )


def by_line(cost: Cost) -> str:
    """Format the instructions per step of all warps, by part and source line."""
    found: Counter[tuple[str, str]] = Counter()
    for warp in cost.warps:
        for pc, times in warp.items():
            instruction = cost.code[pc]
            chain = " < ".join(f"{file}:{line}" for file, line in instruction.lines)
            found[part_of(instruction), chain] += times  # type: ignore[assignment]
    return "\n".join(f"{n:8.1f}  {part:13} {where}" for (part, where), n in found.most_common())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("problem", nargs="*", help="dtype B I H; all of the table if not given")
    parser.add_argument("--lines", action="store_true", help="also by source line")
    arguments = parser.parse_args()
    if arguments.problem:
        dtype, *sizes = arguments.problem
        found = cost(dtype, *map(int, sizes))
        print(described(found) + (by_line(found) if arguments.lines else ""))
        return
    blocks = [described(cost(dtype, *shape)) for shape in SHAPES for dtype in DTYPES]
    TABLE.write_text("\n".join([header(), *blocks]))
    print(TABLE)


if __name__ == "__main__":
    sys.exit(main())
