"""Report which kernel will run, why, and what a step costs.

No decision is reimplemented here: the module runs once, the calls of the engine's ops are
intercepted before they start, and the planner is called with the arguments of each. On a CPU, the
cost is measured; on a GPU, it is the planner's prediction.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from . import functional, modules, ops
from .leaky import LeakyRNNCell
from .ops import _C

_CELLS = (torch.rnn_tanh_cell, torch.rnn_relu_cell)


@dataclass
class _Call:
    """The call for one layer and direction, of the engine or of what `instead` describes."""

    x: Tensor
    T: int = 1
    B: int = 1
    I: int = 0
    H: int = 0
    reverse: bool = False
    packed: bool = False
    leaky: bool = False
    instead: str | None = None
    args: tuple[Any, ...] = ()  # of the op

    @property
    def problem(self) -> tuple[Any, ...]:
        """What the planner is asked; calls with the same problem are described once."""
        return self.T, self.B, self.I, self.H, self.packed, self.leaky, self.instead


class _Catcher(TorchFunctionMode):
    """Record the calls of the engine and of torch's cells, and return uninitialised tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is ops.activation:
            return self.activation(*args)
        if func in _CELLS:
            x, h = args[:2]
            self.calls.append(
                _Call(x, instead="torch's own cell: overhead dominates a step this small")
            )
            return torch.empty_like(h)
        return func(*args, **(kwargs or {}))

    def activation(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, w_ih, _, _, _, _, w_hh, alpha, _, _, batch_sizes, _, form, reverse = args
        call = _Call(x, H=w_hh.size(0), reverse=reverse, leaky=alpha is not None, args=args)
        if batch_sizes is None:
            call.T, call.B = x.shape[:2]
        else:
            call.T, call.B, call.packed = len(batch_sizes), int(batch_sizes[0]), True
        call.I = 0 if w_ih is None else x.size(-1)
        self.calls.append(call)
        h = x.new_empty((*x.shape[:-1], call.H))
        saves = call.leaky or form == "potential"
        return h, x.new_empty((call.B, call.H)), x.new_empty(h.shape if saves else 0)


def _calls(module: Any, x: Tensor | PackedSequence) -> list[_Call]:
    """Return the calls that ``module(x)`` makes, in order."""
    if isinstance(module, (nn.RNN, nn.RNNCell)) and not isinstance(module, modules.RNNCell):
        # A shallow copy; copy.copy refuses parametrized modules.
        original, module = module, type(module).__new__(type(module))
        module.__dict__ = original.__dict__.copy()
        module = modules.replace(module)
    if not isinstance(module, (modules.Layers, modules.RNNCell, LeakyRNNCell)):
        raise TypeError(f"explain: expected an RNN or an RNNCell, got {type(module).__name__}")
    data = x.data if isinstance(x, PackedSequence) else x
    catcher = _Catcher()

    def loop(reason: str) -> None:
        catcher.calls.append(_Call(data, instead=f"a plain loop over time: {reason}"))

    devices = [data.device] if data.is_cuda else []
    with (
        torch.random.fork_rng(devices),  # dropout between layers draws random numbers
        mock.patch.object(functional, "_warn_slow", loop),
        catcher,
    ):
        # Not module(x): hooks would see uninitialised results.
        module.forward(x)  # type: ignore[arg-type]
    return catcher.calls


def _plan(call: _Call, adjoint: bool) -> dict[str, Any]:
    """Return the plan for one recurrence of a call as a dictionary, described in ``words``."""
    if call.x.is_cuda:
        return _plan_cuda(call, adjoint, call.x.device.index)
    if call.x.device.type == "cpu":
        return _plan_cpu(call, adjoint)
    return {"words": f"nothing: tensors on {call.x.device} have no values"}


def _plan_cuda(call: _Call, adjoint: bool, device: int | dict[str, Any]) -> dict[str, Any]:
    return _C.plan_cuda(
        adjoint=adjoint,
        dtype=str(call.x.dtype).removeprefix("torch."),
        T=call.T,
        B=call.B,
        I=0 if adjoint else call.I,
        H=call.H,
        leaky=call.leaky,
        tf32=torch.backends.cuda.matmul.allow_tf32,
        device=device,
    )


def _plan_cpu(call: _Call, adjoint: bool) -> dict[str, Any]:
    plan = _C.plan_cpu(
        adjoint=adjoint,
        dtype=str(call.x.dtype).removeprefix("torch."),
        T=call.T,
        B=call.B,
        I=call.I,
        H=call.H,
        threads=_C.cpu_threads(),
    )
    batch_groups, hidden_groups = plan["batch_groups"], plan["hidden_groups"]
    threads = plan["threads"]
    words = [f"{plan['isa']} kernel, {threads} thread{'s' * (threads > 1)}"]
    if (most := _C.cpu_threads()) < torch.get_num_threads():
        words.append(
            f"at most {most} of torch's {torch.get_num_threads()}: one for each usable core"
        )
    if batch_groups > 1:
        words.append(f"the batch split among {batch_groups} groups, which need no synchronisation")
    if hidden_groups > 1:
        words.append(f"the units split among {hidden_groups} threads, which synchronise every step")
    if plan["gemms"]:
        words.append("with the GEMMs of the gradients, a chunk of steps at a time")
    words.append("weights packed first" if plan["pack"] else "weights read in place: few rows")
    if call.I and not adjoint:
        ahead = f"for {plan['chunk']} steps ahead" if plan["project_ahead"] else "in each step"
        words.append(f"the input multiplied {ahead}")
    if call.x.element_size() < 4:
        words.append("computed in float32")
    return {**plan, "words": "; ".join(words)}


def plans(module: nn.Module, x: Tensor | PackedSequence) -> list[dict[str, Any]]:
    """Return the plans for the forward and backward pass of each layer and direction.

    Each element is ``{"forward": plan, "backward": plan}``, or ``{"instead": reason}`` where the
    engine does not run. A plan has the fields of ``csrc/cpu/plan.h`` or ``csrc/cuda/plan.h``, and
    ``words``.
    """
    return [
        {"instead": call.instead}
        if call.instead
        else {"forward": _plan(call, False), "backward": _plan(call, True)}
        for call in _calls(module, x)
    ]


def explain(module: nn.Module, x: Tensor | PackedSequence) -> str:
    """Describe which kernel ``module(x)`` will run, why, and what a step costs.

    Equal layers are described once. On a CPU, the forward pass of each different layer is run
    several times to measure a step, which takes at least 0.1 s each. On a GPU, the cost is the
    planner's prediction.

    Args:
        module: An RNN or a cell of this package. A ``torch.nn.RNN`` or ``torch.nn.RNNCell`` is
            treated as if :func:`fusedrnn.replace` had converted it.
        x: Its input. The values do not matter. The device, the dtype and the sizes do, and so does
            the context: autocast, ``no_grad``, the number of threads.

    Returns:
        A few lines of text, whose format may change.

    Example::

        >>> print(fusedrnn.explain(fusedrnn.RNN(10, 20), torch.randn(100, 3, 10)))
        RNN(10, 20), torch.float32 on cpu
        layer 0: T 100, B 3, I 10, H 20
          forward: ...
    """
    calls = _calls(module, x)
    data = x.data if isinstance(x, PackedSequence) else x
    training = torch.is_grad_enabled() and (
        data.requires_grad or any(p.requires_grad for p in module.parameters())
    )
    lines = [f"{module}, {data.dtype} on {data.device}"]
    layers = getattr(module, "num_layers", 1)
    bidirectional = bool(getattr(module, "bidirectional", False))
    for where, call in _different(calls, len(calls) // layers, bidirectional):
        if call.instead:
            lines.append(f"{where}: {call.instead}")
            continue
        packed = ", packed" if call.packed else ""
        lines.append(f"{where}: T {call.T}, B {call.B}{packed}, I {call.I}, H {call.H}")
        plan = _plan(call, False)
        lines.append(f"  forward:  {plan['words']}")
        if training:
            backward = _plan(call, True)
            lines.append(f"  backward: {backward['words']}")
            if not backward.get("gemms"):
                lines.append("            then one GEMM of torch's for each gradient of a weight")
        lines += [f"  {line}" for line in _cost(call, plan)]
    return "\n".join(lines)


def _different(
    calls: Sequence[_Call], of_a_layer: int, bidirectional: bool
) -> Iterator[tuple[str, _Call]]:
    """Yield neighbouring calls with the same problem once, with the names of their layers."""
    for _, group in groupby(enumerate(calls), lambda pair: pair[1].problem):
        numbers, equal = zip(*group)
        first, last = numbers[0] // of_a_layer, numbers[-1] // of_a_layer
        name = f"layer {first}" if first == last else f"each of layers {first} to {last}"
        yield name + ", in each direction" * bidirectional, equal[0]


# What a step waits for in each regime of the CUDA engine.
_WAITS = {
    "block": "the chain of product, sum and nonlinearity within one SM",
    "cluster": "that chain and the exchange of the states between the blocks of a cluster",
    "grid": "that chain and a barrier of all blocks after every step",
    "step": "one launch and the weights, read from L2 or memory in every step",
}


def _cost(call: _Call, plan: dict[str, Any]) -> list[str]:
    """Return what a step of the forward pass costs, and what bounds it."""
    multiplications = call.B * call.H * (call.I + call.H)
    step = f"a step:   {multiplications:,} multiplications"
    if "regime" in plan:
        microseconds = plan["microseconds"] + plan["input_microseconds"]
        waits = _WAITS[plan["regime"]]
        return [f"{step}; predicted, not measured: {_short(microseconds)} µs, mostly for {waits}"]
    if "hidden_groups" not in plan:  # no kernel: there are only sizes
        return []
    size = 8 if call.x.dtype == torch.float64 else 4
    weights = size * call.H * (call.I + call.H)
    part = weights // plan["hidden_groups"]
    share = "of each thread " * (plan["hidden_groups"] > 1)
    cache = next((name for name, holds in _caches() if part <= holds), None)
    place = f"fit in {cache}" if cache else "fit in no cache, and are read from memory"
    microseconds = _measured(call)
    rate = multiplications / microseconds / _gemm_rate(call.x.dtype, torch.get_num_threads())
    if rate >= 0.5:
        bound = "arithmetic"
    elif cache and not cache.startswith("L3"):
        bound = "latency: each step waits for the one before"
    else:
        bound = "reading the weights in every step"
    return [
        f"weights:  {_short(part / 1024)} KB {share}{place}",
        f"{step}; measured now: {_short(microseconds)} µs, {rate:.0%} of the rate of a large GEMM; "
        f"likely bound by {bound}",
    ]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _caches() -> list[tuple[str, int]]:
    """Return the data caches of the first core, by size, as Linux describes them."""
    found = []
    for path in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (
            (path / name).read_text().strip() for name in ("type", "level", "size")
        )
        if kind != "Instruction":
            found.append((f"L{level} ({size}B)", int(size.rstrip("K")) * 1024))
    return found


def _best(run: Callable[[], Any]) -> float:
    """Return the shortest of several times of a call, in microseconds; it takes 0.1 s or more."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < 0.1:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    return min(times)


@torch.no_grad()
def _measured(call: _Call) -> float:
    """Return the time of a step, in microseconds."""
    x, *others = call.args
    zeros = torch.zeros_like(x)  # above the first layer, x was never computed
    return _best(lambda: ops.activation(zeros, *others)) / call.T


@functools.cache
def _gemm_rate(dtype: torch.dtype, threads: int) -> float:
    """Return the multiplications per microsecond of a large GEMM with ``threads`` threads."""
    n = 512
    wide = dtype if dtype == torch.float64 else torch.float32  # low precision is widened
    a = torch.ones(n, n, dtype=wide)
    return n**3 / _best(lambda: a @ a)
