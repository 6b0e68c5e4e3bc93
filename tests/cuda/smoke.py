"""Check all passes of each CUDA regime and dtype against the reference, on small problems.

    python tests/cuda/smoke.py [--emulated] [--wide] [REGIME DTYPE]

bench/gpu_check.py runs one regime and dtype per process, and all of them under compute-sanitizer.
--wide leaves out the 16-bit dtypes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))  # as a script

from cases import Case
from engines import REGIMES, TILES
from test_cuda_kernels import GPU, HAS_GPU, Trial, Way

DTYPES = ("float32", "float64", "bfloat16", "float16", "tf32")
PAIRS = [(r, d) for r in REGIMES for d in DTYPES]
CASES = [
    Case(T=4, B=9, I=12, H=70),
    Case(T=6, B=1, I=5, H=40),  # plain.cuh
    Case(lengths=(4, 3, 3, 1), I=5, H=33, reset=True, alpha=True, reverse=True),
]
LAYER = Case(T=20, B=16, I=128, H=256)  # too large for an emulator, and for compute-sanitizer


def trial(regime: str, dtype: str, case: Case, device: str) -> Trial | None:
    """Return a trial with the planner's tile, or None if the device cannot run this regime."""
    first = next(tile for tile, shape in enumerate(TILES) if shape.dtype == dtype)
    _, plan = Way(regime, first).plan(device, case, None, False, any_tile=True)
    if plan["regime"] != regime:
        return None
    tile, split = (first, 1) if regime == "step" else (plan["tile"], plan["split"])
    return Trial(Way(regime, tile, split), case, device=device)


def smoke(regime: str, dtype: str, cases: list[Case], emulated: bool) -> None:
    device = GPU if not emulated else "h100" if regime == "cluster" else "tiny"
    for case in cases:
        found = trial(regime, dtype, case, device)
        if found:
            found.check()
        print(f"{found or (regime, dtype, case)}: {'right' if found else 'no plan'}", flush=True)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)  # because many processes run at once
    emulated, wide = "--emulated" in words, "--wide" in words
    if not emulated and not HAS_GPU:
        raise SystemExit("no GPU that torch and this build of fusedrnn can use")
    pair = [word for word in words if not word.startswith("--")]
    cases = CASES if emulated or not pair else [*CASES, LAYER]
    for regime, dtype in [tuple(pair)] if pair else PAIRS:
        if not (wide and dtype.endswith("16")):
            smoke(regime, dtype, cases, emulated)


if __name__ == "__main__":
    main(sys.argv[1:])
