"""Force each regime of the CUDA engine in turn, to show the planner's options and how well its
model predicts them. See csrc/cuda/plan.h.

    python bench/gpu_regimes.py [--emulated] REGIME    run one layer, for a profiler (gpu_check.py)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_peers import ALONE, tf32
from measure import distances, is_fatal, take_turns, timer_for
from peers import FORWARD, Problem, Shape

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

# One headline shape for each regime, with T = 64.
PROFILED = {
    "step": Shape(64, 64, 1024, 1024),
    "block": Shape(64, 1, 64, 64),
    "cluster": Shape(64, 64, 1024, 1024),
    "grid": Shape(64, 128, 2048, 2048),
}
REGIMES = ("step", "block", "cluster", "grid")  # kRegimeNames of csrc/cuda/plan.h


def time_regimes(
    shape: Shape,
    precision: str,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    announce: Callable[..., None],
    without: Mapping[str, str],
) -> dict[str, Any]:
    """Measure each regime, forward and backward.

    The result has, by regime and direction, the seconds per call, the plan, and the distance of the
    results from those of the regime that the planner chooses. The forward includes the input GEMM;
    the backward is the recurrence alone.
    """
    from fusedrnn import ops
    from fusedrnn.ops import _C

    if not _C.has_cuda:
        return {}
    problem = Problem.random(
        shape, dtype, cell=False, grad_input=False, threads=1, device=device
    ).to(dtype)
    rest = (None, None, "tanh", "rate", False, None)  # reset, batch_sizes

    def forward() -> Any:
        w_ih, w_hh, b_ih, b_hh = problem.weights
        x = problem.x
        return ops.activation(x, w_ih, b_ih, b_hh, None, None, w_hh, None, None, *rest)[:1]

    def backward(h: torch.Tensor) -> Any:
        w_hh = problem.weights[1]
        grad = problem.grad
        return ops.adjoint(grad, None, None, None, h, w_hh, None, *rest, False, False)[:1]

    def measured(call: Callable[[], Any], truth: list[torch.Tensor]) -> dict[str, Any]:
        (error,) = distances(call(), truth)
        times = take_turns({"": call}, seconds / 8, timer_for(device), pause=0)
        return {"seconds": times[""], "error": error}

    found: dict[str, Any] = {regime: {} for regime in REGIMES}
    with torch.no_grad(), tf32(precision == "tf32"):
        ways: dict[str, Callable[[], Any]] = {
            FORWARD: forward,
            ALONE: functools.partial(backward, *forward()),
        }
        truths = {way: [t.double() for t in call()] for way, call in ways.items()}
        for regime in REGIMES:
            name = f"regime {regime}"
            for way, call in ways.items():
                announce(name, way)
                if name in without:
                    found[regime][way] = {"failed": without[name]}
                    continue
                plan = _C.plan_cuda(
                    adjoint=way == ALONE,
                    dtype=str(dtype).removeprefix("torch."),
                    T=shape.T,
                    B=shape.B,
                    I=0 if way == ALONE else shape.I,
                    H=shape.H,
                    tf32=torch.backends.cuda.matmul.allow_tf32,
                    regime=regime,
                    device=device.index or 0,
                )
                if plan["regime"] != regime:
                    found[regime][way] = {"failed": f"it cannot; {plan['regime']} would run"}
                    continue
                _C.use_regime(regime)
                try:
                    found[regime][way] = {"plan": plan, **measured(call, truths[way])}
                except RuntimeError as error:
                    if is_fatal(error, device):
                        raise
                    found[regime][way] = {"plan": plan, "failed": str(error)}
                finally:
                    _C.use_regime(None)
    return found


def profiled(regime: str, emulated: bool) -> None:
    """Run the forward pass of a layer in bfloat16 twice; the first does all one-time setup."""
    from fusedrnn import ops
    from fusedrnn.ops import _C

    shape = Shape(3, 2, 3, 8) if emulated else PROFILED[regime]
    problem = Problem.random(
        shape, torch.bfloat16, cell=False, grad_input=False, threads=1,
        device=torch.device("cpu" if emulated else "cuda"),
    ).to(torch.bfloat16)  # fmt: skip
    w_ih, w_hh, b_ih, b_hh = problem.weights
    if not emulated:
        _C.use_regime(regime)
    with torch.no_grad():
        for _ in range(2):
            h, *_ = ops.activation(
                problem.x, w_ih, b_ih, b_hh, None, None, w_hh, *[None] * 4, "tanh", "rate", False,
                None,
            )  # fmt: skip
    finite = bool(h.isfinite().all())
    print("profiled", regime, " ".join(f"{name}={size}" for name, size in shape._asdict().items()))
    if not finite:
        raise SystemExit("the result is not finite")


if __name__ == "__main__":
    profiled(sys.argv[-1], "--emulated" in sys.argv)
