"""Print what the CPU planner would do on machines with more cores. Nothing is timed.

For each shape and number of threads, print how the work is divided (groups of the batch x groups of
the units) and the speed-up over one thread that the planner's cost model predicts. The model's
figures were fitted on two cores; those for more come from published latencies between cores
(``csrc/cpu/plan.h``). On a machine with many cores, ``bench_rnn.py --threads`` shows how well they
hold.

    python bench/many_cores.py
"""

from __future__ import annotations

import argparse

from fusedrnn.ops import _C

SHAPES = (
    (256, 1, 64, 64),
    (256, 1, 64, 512),
    (256, 1, 64, 1024),
    (100, 1, 2048, 2048),
    (100, 16, 10, 50),
    (256, 4, 128, 128),
    (256, 16, 128, 256),
    (100, 32, 256, 512),
    (50, 64, 1024, 1024),
    (50, 512, 64, 128),
)
THREADS = (1, 2, 4, 8, 16, 32, 64)


def row(shape: tuple[int, int, int, int], isa: str, adjoint: bool) -> str:
    T, B, I, H = shape
    cells = []
    alone = 0.0
    for threads in THREADS:
        plan = _C.plan_cpu(adjoint=adjoint, T=T, B=B, I=I, H=H, threads=threads, isa=isa)
        alone = alone or plan["cycles"]
        groups = f"{plan['batch_groups']}x{plan['hidden_groups']}"
        cells.append(f"{alone / plan['cycles']:5.1f} {groups:<6}")
    name = ", ".join(str(n) for n in shape)
    return f"{name:<21}" + "".join(cells).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--isa", default="avx512", choices=_C.build_info()["isa_compiled"])
    isa = parser.parse_args().isa
    print(f"Predicted speed-up over one thread, and the groups; float32, {isa}\n")
    for title, adjoint in (("forward", False), ("backward", True)):
        print(
            f"{title + ': T, B, I, H':<23}" + "".join(f"{n:>3} threads " for n in THREADS).rstrip()
        )
        for shape in SHAPES:
            print(row(shape, isa, adjoint))
        print()


if __name__ == "__main__":
    main()
