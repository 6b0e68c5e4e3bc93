"""Measure memory and time of forward+backward on a long sequence, with or without checkpoint_every.

Each line of the table is measured in its own process, by a short call and then the measured one.
"peak MiB" is the growth of the resident set during the measured call, which includes everything but
the input. The states of a layer take 4 T B H bytes.

    python bench/bench_long.py --cases 5 > bench/results/long.txt    # a minute
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import torch
from measure import resident

import fusedrnn

# Layers, last_only, checkpoint_every, and whether malloc returns freed blocks to the system.
CASES = (
    (1, True, None, False),
    (1, True, 1000, False),
    (1, True, 1000, True),
    (3, True, None, False),
    (3, True, 1000, True),
    (1, False, None, False),
    (1, False, 1000, True),
    (1, True, 10_000, True),
    (1, True, 100, True),
)


def measure(
    T: int, layers: int, every: int | None, last_only: bool, hidden: int, threads: int
) -> None:
    """Run one line in this process and print it as JSON."""
    torch.set_num_threads(threads)

    def peak() -> float:  # MiB
        return resident("VmHWM") / 2**20

    rnn = fusedrnn.RNN(8, hidden, layers, checkpoint_every=every)
    x = torch.randn(T, 1, 8)

    def run(x: torch.Tensor) -> None:
        output, _ = rnn(x, last_only=last_only)
        output.sum().backward()

    run(x[: min(T, 2000)])
    before, start = peak(), time.perf_counter()
    run(x)
    print(json.dumps([time.perf_counter() - start, peak() - before]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first ones")
    parser.add_argument("--steps", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(**json.loads(args.child))
        return
    print(f"torch {torch.__version__}, threads: {args.threads}, float32")
    print(f"B = 1, I = 8, H = {args.hidden}; load average at the start {os.getloadavg()[0]:.1f}")
    print("mmap: with MALLOC_MMAP_THRESHOLD_=65536\n")
    names = ("T", "layers", "last_only", "every", "mmap", "states MiB", "peak MiB", "s", "us/step")
    print("".join(name.rjust(11) for name in names))
    for T in args.steps:
        for layers, last_only, every, mmap in CASES[: args.cases]:
            case = {
                "T": T, "layers": layers, "every": every, "last_only": last_only,
                "hidden": args.hidden, "threads": args.threads,
            }  # fmt: skip
            command = [sys.executable, __file__, "--child", json.dumps(case)]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"} if mmap else None
            child = subprocess.run(command, env=environment, check=True, capture_output=True)
            seconds, peak = json.loads(child.stdout)
            states = layers * T * args.hidden * 4 / 2**20
            numbers = f"{states:.1f} {peak:.1f} {seconds:.2f} {seconds / T * 1e6:.2f}".split()
            words = (T, layers, last_only, every, mmap, *numbers)
            print("".join(str(word).rjust(11) for word in words), flush=True)


if __name__ == "__main__":
    main()
