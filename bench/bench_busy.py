#!/usr/bin/env python3
"""Time forward passes while other processes keep the cores busy, or with more threads than cores.

Each condition runs in its own process, because a thread stays on the cores that were allowed when
it was created. In the process, three calls take turns: fusedrnn with one thread, fusedrnn with
several threads, and nn.RNN with as many. Values are medians.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from peers import Shape
from report import available_cores, cpu_model, git_commit, layout, number, versions

# For a checkout that is built but not installed; an installed fusedrnn takes precedence.
sys.path.append(str(Path(__file__).resolve().parent.parent))

SHAPES = [Shape(1000, 1, 128, 512), Shape(256, 4, 128, 128), Shape(256, 16, 128, 256)]
PROCESSES = multiprocessing.get_context("spawn")


class Condition(NamedTuple):
    name: str
    threads: int
    cores: int
    busy: int  # other processes that compute all the time


def conditions(cores: int) -> list[Condition]:
    return [
        Condition("idle machine", cores, cores, 0),
        Condition("two threads per core", 2 * cores, cores, 0),
        Condition("on one core", cores, 1, 0),
        Condition(f"beside {cores} busy processes", cores, cores, cores),
        Condition("beside them, two threads per core", 2 * cores, cores, cores),
    ]


def compute_all_the_time(parent: int) -> None:
    while os.getppid() == parent:  # also ends if the parent is killed
        for _ in range(1_000_000):
            pass


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [
        PROCESSES.Process(target=compute_all_the_time, args=(os.getpid(),), daemon=True)
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def stay_on(cores: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


@torch.no_grad()
def milliseconds(shape: Shape, threads: int, seconds: float) -> list[float]:
    """Return the medians of one thread, of `threads` threads, and of nn.RNN with `threads`."""
    import fusedrnn

    x = torch.randn(shape.T, shape.B, shape.I)
    ours = fusedrnn.RNN(shape.I, shape.H)
    theirs = torch.nn.RNN(shape.I, shape.H)
    turns = [(ours, 1), (ours, threads), (theirs, threads)]
    times: list[list[float]] = [[] for _ in turns]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for (module, count), found in zip(turns, times):
            torch.set_num_threads(count)
            module(x)
            start = time.perf_counter()
            module(x)
            found.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="for each row of the table")
    parser.add_argument("--shapes", nargs="+", metavar="T,B,I,H", help="instead of the usual three")
    options = parser.parse_args()
    shapes = SHAPES
    if options.shapes:
        shapes = [Shape(*map(int, text.split(","))) for text in options.shapes]
    found_versions = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"{cpu_model()}, {available_cores()} cores; {found_versions}; commit {git_commit()}")
    print("ms for one forward pass in float32, without gradients\n")
    rows = []
    for condition in conditions(available_cores()):
        with (
            busy_processes(condition.busy),
            ProcessPoolExecutor(
                1, PROCESSES, initializer=stay_on, initargs=(condition.cores,)
            ) as pool,
        ):
            for shape in shapes:
                found = pool.submit(milliseconds, shape, condition.threads, options.seconds)
                sizes = ", ".join(map(str, shape))
                numbers = [number(value) for value in found.result()]
                rows.append([condition.name, sizes, str(condition.threads), *numbers])
    header = ["condition", "T, B, I, H", "threads", "1 thread", "fusedrnn", "nn.RNN"]
    print(layout(header, rows, markdown=False))


if __name__ == "__main__":
    main()
