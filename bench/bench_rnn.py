#!/usr/bin/env python3
"""Time fusedrnn against nn.RNN, Python loops, JAX and ONNX Runtime. See bench/README.md.

Every peer is first checked against a float64 loop; a peer that is wrong is not timed. The peers
then take turns in one process, A B C A B C ..., and a ratio is the median of the per-round ratios
to nn.RNN, so that other load on the machine affects all peers alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from floor import floor
from measure import Judge, kept_bytes, peak_growth, take_cold_turns, take_turns
from peers import (
    BACKWARD,
    CELL_PEERS,
    LAYER_PEERS,
    MODES,
    CompiledLoop,
    Peer,
    Problem,
    Shape,
    TorchPeer,
)
from report import Neighbours, Report, Result, available_cores, environment, plot, render

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# For a checkout that is built but not installed; an installed fusedrnn takes precedence.
sys.path.append(str(Path(__file__).resolve().parent.parent))

SIZES = (16, 32, 64, 128, 256, 512, 1024)
# Sets of shapes. `wide` has shapes from public code (the comment names the use) and corner cases.
SETS: dict[str, list[Shape]] = {
    "main": [
        Shape(256, 1, 64, 64),
        Shape(100, 16, 10, 50),
        Shape(256, 4, 128, 128),
        Shape(256, 16, 128, 256),
        Shape(100, 32, 256, 512),
        Shape(50, 64, 1024, 1024),
    ],
    "wide": [
        Shape(1000, 1, 1, 16),  # one neuron population, online
        Shape(10, 1, 57, 128),  # character tutorial
        Shape(256, 1, 64, 64),
        Shape(1000, 1, 64, 1024),  # reservoir computing
        Shape(8, 1, 2048, 16),
        Shape(64, 2, 16, 1024),
        Shape(100, 3, 7, 33),  # B, I and H are odd
        Shape(256, 4, 128, 128),
        Shape(128, 8, 128, 256),  # reinforcement learning, one minibatch
        Shape(20, 8, 2048, 64),
        Shape(100, 16, 10, 50),  # neuroscience tasks
        Shape(8, 16, 64, 64),  # reinforcement learning, workers
        Shape(256, 16, 128, 256),
        Shape(300, 20, 800, 800),  # speech
        Shape(24, 32, 3, 25),  # time series
        Shape(48, 32, 8, 200),  # time series
        Shape(35, 32, 28, 256),  # textbook
        Shape(100, 32, 4, 512),  # low-rank networks
        Shape(100, 64, 85, 256),  # many cognitive tasks at once
        Shape(50, 64, 1024, 1024),
        Shape(256, 100, 100, 100),  # private training
        Shape(200, 128, 3, 16),  # latent dynamics
        Shape(128, 256, 32, 512),  # reinforcement learning
        Shape(8, 512, 256, 256),  # eight characters predict the next
        Shape(8, 1024, 16, 16),
        Shape(32, 1024, 64, 256),  # simulated robots
    ],
    "grid": [Shape(50, B, H, H) for B in (1, 4, 16, 64, 256) for H in SIZES],
    "long": [Shape(T, 16, 128, 256) for T in (16, 64, 256, 1024, 4096)],  # for --memory
    "cell": [
        Shape(1, B, H, H)
        for H in (16, 64, 256, 1024)
        for B in (1, 16, 256)
    ],
}  # fmt: skip
# The time box per shape and mode.
SECONDS = {"main": 6.0, "wide": 4.0, "grid": 1.5, "long": 1.0, "cell": 1.5}


def prepared(
    kinds: Iterable[type[Peer]], problem: Problem, mode: str, report: Report
) -> list[Peer]:
    ready = []
    for kind in kinds:
        reason = kind.declines(problem, mode)
        if problem.batch_sizes is not None and not kind.packs:
            reason = "it does not support packed batches"
        if reason:
            report.skipped.setdefault(f"{kind.name}, {mode}", reason)
            continue
        peer = kind()
        peer.prepare(problem)
        ready.append(peer)
    return ready


def measure(
    kinds: Sequence[type[Peer]],
    exact: Problem,
    mode: str,
    report: Report,
    options: argparse.Namespace,
) -> list[Result]:
    """Check every peer on one problem, then time the correct ones."""
    dtype = DTYPES[options.dtype]
    problem = exact.to(dtype)
    ready = prepared(kinds, problem, mode, report)
    judge = Judge(exact, torch.finfo(dtype).eps, mode, ready[0])
    flops = exact.flops(mode)
    results = {p.name: Result(mode, exact.shape, p.name, judge.check(p), flops) for p in ready}
    right = [peer for peer in ready if results[peer.name].check.passed]

    calls = {peer.name: peer.call(mode) for peer in right}
    times = take_turns(calls, options.seconds)
    cold = take_cold_turns(calls, options.seconds) if options.cold else {}
    least = floor(problem, mode) if options.floor else None
    for peer in right:
        result = results[peer.name]
        result.times = times[peer.name]
        result.cold = cold.get(peer.name, [])
        result.floor = least
        if mode == BACKWARD and isinstance(peer, TorchPeer):
            if not isinstance(peer, CompiledLoop):  # hooks do not see what it saves
                result.kept_bytes = kept_bytes(peer)
            if options.memory:
                result.peak_bytes = peak_growth_in_child(type(peer), exact.shape, options)
    return list(results.values())


def peak_growth_in_child(peer: type[Peer], shape: Shape, options: argparse.Namespace) -> int | None:
    command = [
        sys.executable, __file__, "--peak-of", peer.name, "--shapes", str(shape),
        "--threads", str(options.threads), "--dtype", options.dtype,
        "--grad-input" if options.grad_input else "--no-grad-input",
        *(["--packed"] if options.packed else []),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(run.stdout) if run.returncode == 0 else None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--set", choices=SETS, default="main", help="a named set of shapes (default: main)")
    add("--shapes", nargs="+", metavar="T,B,I,H", help="these shapes instead of the set's")
    add("--peers", help="only these, by comma; or 'all', torch.compile included")
    add("--modes", default=",".join(MODES), help=f"by comma (default: {','.join(MODES)})")
    add(
        "--threads", type=int, default=available_cores(), help="of each peer (default: %(default)s)"
    )
    add("--dtype", choices=DTYPES, default="float32")
    add(
        "--grad-input",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether x requires a gradient, too (default: yes)",
    )
    add("--packed", action="store_true", help="packed sequences, with as many rows as the shape")
    add("--cold", action="store_true", help="time calls after the caches were overwritten, too")
    add("--floor", action="store_true", help="add the share of a floor that each call reaches")
    add("--seconds", type=float, help="time box of a shape and mode (default: the set's)")
    add("--memory", action="store_true", help="peak memory of torch's peers, a process each")
    add("--markdown", action="store_true", help="tables in Markdown")
    add("--json", metavar="FILE", help="write everything there")
    add("--plot", metavar="FILE", help="draw the ratios (needs matplotlib)")
    add("--peak-of", metavar="PEER", help=argparse.SUPPRESS)  # for the child process of --memory
    options = parser.parse_args(arguments)

    kinds = CELL_PEERS if options.set == "cell" else LAYER_PEERS
    known = {kind.name: kind for kind in kinds}
    if options.peers is None:
        # torch.compile runs only on request: compiling takes longer than all the rest.
        chosen = [name for name in known if name != CompiledLoop.name]
    else:
        chosen = list(known) if options.peers == "all" else options.peers.split(",")
        chosen = list(dict.fromkeys([kinds[0].name, *chosen]))  # ratios need the baseline
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown peers {unknown}; known: {', '.join(known)}")
    options.kinds = [known[name] for name in known if name in chosen]
    options.modes = options.modes.split(",")
    if unknown := [mode for mode in options.modes if mode not in MODES]:
        parser.error(f"unknown modes {unknown}; known: {', '.join(MODES)}")
    try:
        shapes = [Shape.parse(text) for text in options.shapes or ()]
    except ValueError:
        parser.error("--shapes takes four positive sizes each, such as 256,1,64,64")
    if options.set == "cell" and any(shape.T != 1 for shape in shapes):
        parser.error("--set cell runs a single step: its shapes have T = 1")
    if options.set == "cell" and options.packed:
        parser.error("--packed has no meaning for cells")
    options.shapes = shapes or SETS[options.set]
    options.seconds = options.seconds or SECONDS[options.set]
    if options.threads < 1 or options.seconds <= 0:
        parser.error("--threads and --seconds must be positive")
    return options


def problem_for(shape: Shape, options: argparse.Namespace) -> Problem:
    return Problem.random(
        shape,
        DTYPES[options.dtype],
        cell=options.set == "cell",
        grad_input=options.grad_input,
        threads=options.threads,
        packed=options.packed,
    )


def run(options: argparse.Namespace) -> Report:
    """Run every shape in every mode, with a line of progress for each on stderr."""
    kinds = options.kinds
    all_kinds = CELL_PEERS if options.set == "cell" else LAYER_PEERS
    setting = environment(options.threads, options.dtype, options.seconds)
    setting |= {"grad_input": options.grad_input, "packed": options.packed}
    report = Report(setting, all_kinds[0].name, all_kinds[1].name)
    report.skipped = {kind.name: why for kind in kinds if (why := kind.missing())}
    installed = [kind for kind in kinds if kind.name not in report.skipped]
    neighbours = Neighbours() if Path("/proc/stat").exists() else None
    for shape in options.shapes:
        exact = problem_for(shape, options)
        for mode in options.modes:
            start = time.perf_counter()
            report.results += measure(installed, exact, mode, report, options)
            seconds = time.perf_counter() - start
            print(f"({shape}) {mode}: {seconds:.1f} s", file=sys.stderr, flush=True)
    if neighbours is not None:
        setting["cores_busy_with_other_processes"] = neighbours.cores()
    return report


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        (kind,) = [kind for kind in LAYER_PEERS + CELL_PEERS if kind.name == options.peak_of]
        options.set = "cell" if kind in CELL_PEERS else options.set
        problem = problem_for(options.shapes[0], options).to(DTYPES[options.dtype])
        print(peak_growth(kind(), problem))
        return 0

    report = run(options)
    print(render(report, options.markdown))
    if options.json:
        Path(options.json).write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if options.plot:
        plot(report, options.plot)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
