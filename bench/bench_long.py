"""Measure memory and time of long sequences, with or without checkpoint_every and last_only.

Each line of the table is measured in its own process, by a short call and then the measured one.
"peak MiB" is the growth of the resident set during the measured call, which includes everything but
the input. The states of a layer take 4 T B H bytes. Times are CPU times, which other processes of
the machine affect less than elapsed time; with one thread and nothing else running, both are equal.

    python bench/bench_long.py --cases 8 > bench/results/long.txt    # two minutes
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

# Batch, layers, last_only, checkpoint_every, and whether gradients are computed.
CASES = (
    (1, 1, True, None, True),
    (1, 1, True, 1000, True),
    (1, 3, True, None, True),
    (1, 3, True, 1000, True),
    (8, 1, True, None, True),
    (8, 1, True, 1000, True),
    (1, 1, False, None, False),
    (1, 1, True, None, False),
    (1, 1, False, None, True),
    (1, 1, False, 1000, True),
    (1, 1, True, 10_000, True),
    (1, 1, True, 100, True),
)


def measure(
    T: int,
    batch: int,
    layers: int,
    last_only: bool,
    every: int | None,
    gradients: bool,
    hidden: int,
    threads: int,
) -> None:
    """Run one line in this process and print it as JSON."""
    torch.set_num_threads(threads)

    def peak() -> float:  # MiB
        return resident("VmHWM") / 2**20

    rnn = fusedrnn.RNN(8, hidden, layers, checkpoint_every=every)
    x = torch.randn(T, batch, 8)

    def run(x: torch.Tensor) -> None:
        with torch.set_grad_enabled(gradients):
            output, _ = rnn(x, last_only=last_only)
        if gradients:
            output.sum().backward()

    run(x[: min(T, 2000)])
    before, start = peak(), time.process_time()
    run(x)
    print(json.dumps([time.process_time() - start, peak() - before]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first ones")
    parser.add_argument("--steps", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(*json.loads(args.child))
        return
    print(f"torch {torch.__version__}, threads: {args.threads}, float32")
    print(f"I = 8, H = {args.hidden}; load average at the start {os.getloadavg()[0]:.1f}\n")
    options = ("T", "B", "layers", "last_only", "every", "gradients")
    names = (*options, "states MiB", "peak MiB", "CPU s", "us/step")
    print("".join(name.rjust(11) for name in names))
    for T in args.steps:
        for case in CASES[: args.cases]:
            line = json.dumps([T, *case, args.hidden, args.threads])
            command = [sys.executable, __file__, "--child", line]
            child = subprocess.run(command, check=True, capture_output=True)
            seconds, peak = json.loads(child.stdout)
            states = case[0] * case[1] * T * args.hidden * 4 / 2**20
            numbers = f"{states:.1f} {peak:.1f} {seconds:.2f} {seconds / T * 1e6:.2f}".split()
            print("".join(str(word).rjust(11) for word in (T, *case, *numbers)), flush=True)


if __name__ == "__main__":
    main()
