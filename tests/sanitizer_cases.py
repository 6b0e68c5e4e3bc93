"""Small problems for compute-sanitizer, which is slow: each regime, number type and pass.

python tests/sanitizer_cases.py [emulated]    bench/gpu_check.py runs it under each tool
"""

from __future__ import annotations

import sys

import torch
from cases import Case
from engines import EMULATED, ON_GPU, Engine

import fusedrnn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [
    Case(T=4, B=9, I=12, H=70),
    Case(lengths=(4, 3, 3, 1), I=5, H=33, keep=True, alpha=True, reverse=True),
]


def run(case: Case) -> None:
    """Forward, and backward of backward: all three passes."""
    tensors = list(case.arguments(requires_grad=True).values())
    h, h_n = fusedrnn.rnn(**dict(zip(case.arguments(), tensors)), **case.flags())
    gradients = torch.autograd.grad(h.sum() + h_n.sum(), tensors, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)
    if not all(t.isfinite().all() for t in again):
        raise AssertionError(f"{case}: results are not finite")


def main(engines: list[Engine]) -> None:
    for engine in engines:
        with engine.installed():
            for case in CASES:
                for dtype in DTYPES:
                    run(case.with_(dtype=dtype))
            torch.backends.cuda.matmul.allow_tf32 = True
            run(CASES[0].with_(dtype=torch.float32))
            torch.backends.cuda.matmul.allow_tf32 = False
        print(f"{engine}: {len(CASES) * len(DTYPES) + 1} problems", flush=True)


if __name__ == "__main__":
    main(EMULATED if sys.argv[1:] == ["emulated"] else ON_GPU)
