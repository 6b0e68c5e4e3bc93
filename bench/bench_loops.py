#!/usr/bin/env python3
"""Time the recipes of docs/recipes.md against the loops that they replace. See bench/README.md.

With --stream, time single steps of a stream instead.

The results of every call are first checked against its loop in float64; a call that is wrong is not
timed. Loop and call then take turns in one process, A B A B ..., and a speed-up is the median of
the per-round ratios, so that other load on the machine affects both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import FLOOR, SLACK, Check, distances, take_turns, timer_for
from report import Neighbours, Quartiles, available_cores, environment, layout, number
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# For a checkout that is built but not installed; an installed fusedrnn takes precedence.
sys.path += [str(ROOT), str(ROOT / "examples")]

from recipes import RECIPES, Recipe, is_float  # noqa: E402

import fusedrnn  # noqa: E402

I = 8
DTYPE = torch.float32
DATA = ("x", "xi", "dts")  # arguments that are not learned: no gradients
FORWARD, BACKWARD = MODES = ("forward", "forward+backward")


class Size(NamedTuple):
    T: int
    B: int
    H: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


SIZES = [Size(50, 64, 100), Size(200, 32, 256), Size(500, 8, 512), Size(100, 128, 64)]
SIZES += [Size(100, 1, 1000)]
TINY = [Size(3, 2, 5), Size(1, 1, 1)]


@dataclass
class Result:
    recipe: str
    size: Size
    mode: str
    check: Check
    loop: list[float]  # seconds per call, by round; [] if the call is wrong
    call: list[float]

    @property
    def speed_up(self) -> Quartiles:
        return Quartiles.of([a / b for a, b in zip(self.loop, self.call)])

    @property
    def us_per_step(self) -> float:
        return 1e6 * statistics.median(self.call) / self.size.T

    def as_json(self) -> dict[str, Any]:
        row = {**vars(self), "size": self.size._asdict(), "check": asdict(self.check)}
        if self.call:
            row |= {"speed_up": asdict(self.speed_up), "us_per_step": self.us_per_step}
        return row


def program(
    compute: Callable[..., tuple[Tensor, Tensor]], arguments: dict[str, Any], mode: str
) -> Callable[[], list[Tensor]]:
    """Return a call that computes the output and, in the mode BACKWARD, the gradients."""
    learned = [v for k, v in arguments.items() if is_float(v) and k not in DATA]
    if mode == FORWARD:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return list(compute(**arguments))

        return forward

    for tensor in learned:
        tensor.requires_grad_()
    with torch.no_grad():
        shape = compute(**arguments)[0].shape
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(shape, generator=generator).to(learned[0].dtype)

    def forward_backward() -> list[Tensor]:
        output, _ = compute(**arguments)
        return [output.detach(), *torch.autograd.grad(output, learned, grad)]

    return forward_backward


def to_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().double() if is_float(v) else v for k, v in arguments.items()}


def checked(recipe: Recipe, arguments: dict[str, Any], mode: str) -> Check:
    """Return the check of the result whose error is largest relative to its bound."""
    truth = program(recipe.loop, to_float64(arguments), mode)()
    errors = distances(program(recipe.call, arguments, mode)(), truth)
    others = distances(program(recipe.loop, arguments, mode)(), truth)
    floor = FLOOR * torch.finfo(DTYPE).eps
    checks = [Check(error, SLACK * other + floor) for error, other in zip(errors, others)]
    return max(checks, key=lambda check: (not check.passed, check.error / check.bound))


def measure(recipe: Recipe, size: Size, mode: str, seconds: float) -> Result:
    torch.manual_seed(0)
    arguments = recipe.make(size.T, size.B, I, size.H, DTYPE)
    check = checked(recipe, arguments, mode)
    result = Result(recipe.name, size, mode, check, [], [])
    if check.passed:
        calls = {name: program(getattr(recipe, name), arguments, mode) for name in ("loop", "call")}
        times = take_turns(calls, seconds, timer_for(torch.device("cpu")))
        result.loop, result.call = times["loop"], times["call"]
    return result


def table(results: Sequence[Result], markdown: bool) -> str:
    """Return a row for each recipe and size."""
    header = ["recipe", "T,B,H"]
    header += [f"{mode} {what}" for what in ("×", "µs/step") for mode in MODES]
    rows = []
    for recipe, size in dict.fromkeys((r.recipe, r.size) for r in results):
        by_mode = {r.mode: r for r in results if (r.recipe, r.size) == (recipe, size)}
        cells = [by_mode[mode] if by_mode[mode].call else None for mode in MODES]
        ratios = [f"{r.speed_up.median:.2f}" if r else "WRONG" for r in cells]
        rows.append(
            [recipe, str(size), *ratios, *(number(r.us_per_step) if r else "-" for r in cells)]
        )
    width = max(len(row[0]) for row in rows)
    return layout(header, [[row[0].ljust(width), *row[1:]] for row in rows], markdown)


def means(results: Sequence[Result]) -> list[str]:
    lines = []
    for mode in MODES:
        ratios = [r.speed_up.median for r in results if r.mode == mode and r.call]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            lines.append(
                f"{mode}: geometric mean {mean:.2f}, smallest {min(ratios):.2f}, "
                f"largest {max(ratios):.2f}"
            )
    return lines


def stream(hidden: int, layers: int, seconds: float) -> dict[str, float]:
    """Return the us of one step of B = 1, I = 1 by each way to step through a stream."""
    torch.manual_seed(0)
    rnn = fusedrnn.RNN(1, hidden, layers)
    base = torch.nn.RNN(1, hidden, layers)
    base.load_state_dict(rnn.state_dict())
    cells = [torch.nn.RNNCell(1 if i == 0 else hidden, hidden) for i in range(layers)]
    for i, cell in enumerate(cells):
        weights = zip(cell.parameters(), (getattr(rnn, name) for name in rnn._all_weights[i]))
        for parameter, weight in weights:
            parameter.data = weight.data
    leaky = fusedrnn.LeakyRNN(1, hidden, layers, alpha=0.2)
    potential = fusedrnn.LeakyRNN(1, hidden, layers, alpha=0.2, form="potential")
    for module in (rnn, leaky, potential, base, *cells):
        module.eval()

    def step_cells(x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        new = []
        for cell, state in zip(cells, states):
            x = cell(x, state)
            new.append(x)
        return x, new

    with torch.inference_mode():
        x, state = torch.randn(1, 1), torch.randn(layers, 1, hidden).tanh()
        sequence, states = x.unsqueeze(0), state.unbind(0)
        want = base(sequence, state)[0][0]
        for y in (rnn.step(x, state)[0], step_cells(x, states)[0]):
            torch.testing.assert_close(y, want)
        times = take_turns(
            {
                "RNN.step": lambda: rnn.step(x, state),
                "LeakyRNN.step": lambda: leaky.step(x, state),
                "potential": lambda: potential.step(x, state),
                "nn.RNN": lambda: base(sequence, state),
                "nn.RNNCell": lambda: step_cells(x, states),
            },
            seconds,
            timer_for(torch.device("cpu")),
        )
    return {name: 1e6 * statistics.median(rounds) for name, rounds in times.items()}


def stream_table(tiny: bool, seconds: float, markdown: bool) -> str:
    rows, names = [], []
    for layers in (1, 3):
        for hidden in (8,) if tiny else (8, 16, 32, 64):
            times = stream(hidden, layers, seconds)
            names = list(times)
            rows.append([str(layers), str(hidden), *(f"{us:.1f}" for us in times.values())])
    return layout(["layers", "H", *names], rows, markdown)


LOOPS = (
    "×: times as fast as the loop, median of per-round ratios; µs/step: of the call. Both include "
    "the input product; forward is under no_grad; backward has the gradients of all weights."
)
STREAM = (
    "µs of one step with B = 1, under inference_mode: RNN.step and LeakyRNN.step of this package "
    '(potential: the form "potential"), a call of nn.RNN with one step, and a call of nn.RNNCell '
    "for each layer."
)


def describe(setting: dict[str, Any], features: int, explanation: str) -> list[str]:
    busy = setting["cores_busy_with_other_processes"]
    lines = [
        f"{setting['cpu']}, {setting['cores']} cores, torch uses {setting['instruction_set']}",
        f"{setting['os']}; " + ", ".join(f"{k} {v}" for k, v in setting["versions"].items()),
        f"{setting['threads']} threads each, {setting['dtype']}, I = {features}",
        f"{setting['date']}, commit {setting['commit']}: {setting['command']}",
        f"One process, in turns. {explanation}",
    ]
    if busy is not None and busy > 0.05:
        lines.append(f"NOT ALONE: other processes kept {busy:g} cores busy meanwhile")
    return lines


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipes", nargs="+", metavar="NAME", help="only these (default: all)")
    add("--stream", action="store_true", help="time single steps of a stream instead")
    add("--tiny", action="store_true", help="tiny sizes and times, to try the program")
    add(
        "--threads",
        type=int,
        default=available_cores(),
        help="of loop and call (default: %(default)s)",
    )
    add("--seconds", type=float, default=1.0, help="of each recipe, size and mode (default: 1)")
    add("--markdown", action="store_true", help="the table in Markdown")
    add("--json", metavar="FILE", help="write everything there")
    options = parser.parse_args(arguments)
    known = {recipe.name: recipe for recipe in RECIPES}
    names = options.recipes or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown recipes {unknown}; known: {', '.join(known)}")
    options.recipes = [known[name] for name in names]
    options.sizes = TINY if options.tiny else SIZES
    if options.tiny:
        options.seconds = 0.01
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    return options


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    setting = environment(options.threads, str(DTYPE).removeprefix("torch."), options.seconds)
    neighbours = Neighbours() if Path("/proc/stat").exists() else None
    if options.stream:
        table_of_steps = stream_table(options.tiny, options.seconds, options.markdown)
        if neighbours is not None:
            setting["cores_busy_with_other_processes"] = neighbours.cores()
        print("\n".join([*describe(setting, 1, STREAM), "", table_of_steps]))
        return 0
    results: list[Result] = []
    for recipe in options.recipes:
        start = time.perf_counter()
        results += [
            measure(recipe, size, mode, options.seconds) for size in options.sizes for mode in MODES
        ]
        print(f"{recipe.name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    if neighbours is not None:
        setting["cores_busy_with_other_processes"] = neighbours.cores()
    wrong = [r for r in results if not r.check.passed]
    lines = [
        f"WRONG, not timed: {r.recipe} at ({r.size}), {r.mode}: error {r.check.error:.2g}, "
        f"bound {r.check.bound:.2g}"
        for r in wrong
    ]
    print(
        "\n".join(
            [
                *describe(setting, I, LOOPS),
                "",
                table(results, options.markdown),
                "",
                *means(results),
            ]
        )
    )
    print("\n".join(lines), end="\n" if lines else "")
    if options.json:
        data = {"environment": setting, "results": [r.as_json() for r in results]}
        Path(options.json).write_text(json.dumps(data, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
