"""Report which kernel will run, why, and what a step costs.

The module runs once with the engine's ops intercepted, and the planner is called with the arguments
of each op. No decision is reimplemented here. On a CPU, the cost is measured; on a GPU, it is the
planner's prediction.
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
    """One call, for one layer and direction; ``instead`` says what runs if the engine does not."""

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
        """Return the planner's inputs; consecutive calls with equal inputs are described once."""
        return self.T, self.B, self.I, self.H, self.packed, self.leaky, self.instead


class _Recorder(TorchFunctionMode):
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
        x, w_ih, _, _, _, _, w_hh, alpha, _, _, batch_sizes, _, form, reverse, _ = args
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
        # Copy, because replace works in place; copy.copy refuses parametrized modules.
        original, module = module, type(module).__new__(type(module))
        module.__dict__ = original.__dict__.copy()
        module = modules.replace(module)
    if not isinstance(module, (modules.Layers, modules.RNNCell, LeakyRNNCell)):
        raise TypeError(
            f"fusedrnn: module must be an RNN or an RNN cell, got {type(module).__name__}"
        )
    data = x.data if isinstance(x, PackedSequence) else x
    recorder = _Recorder()

    def loop(reason: str) -> None:
        recorder.calls.append(_Call(data, instead=f"a plain loop over time: {reason}"))

    devices = [data.device] if data.is_cuda else []
    with (
        torch.random.fork_rng(devices),  # dropout between layers draws random numbers
        mock.patch.object(functional, "_warn_slow", loop),
        recorder,
    ):
        # Call forward directly: hooks must not see uninitialised results.
        module.forward(x)  # type: ignore[arg-type]
    return recorder.calls


def _plan(call: _Call, adjoint: bool) -> dict[str, Any]:
    """Return the plan of one pass as a dictionary; ``words`` describes it."""
    if call.x.is_cuda:
        return _plan_cuda(call, adjoint, call.x.device.index)
    if call.x.device.type == "cpu":
        return _plan_cpu(call, adjoint)
    return {"words": f"no kernel: tensors on {call.x.device} hold no data"}


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
        words.append(f"batch split among {batch_groups} groups, without synchronisation")
    if hidden_groups > 1:
        words.append(
            f"hidden units split among {hidden_groups} threads, which synchronise every step"
        )
    if plan["gemms"]:
        words.append("gradient GEMMs included, one chunk of steps at a time")
    words.append("weights packed first" if plan["pack"] else "weights not packed: few rows")
    if call.I and not adjoint:
        ahead = f"{plan['chunk']} steps at a time, ahead of the recurrence"
        words.append(
            f"input products computed {ahead if plan['project_ahead'] else 'in each step'}"
        )
    if call.x.element_size() < 4:
        words.append("computed in float32")
    return {**plan, "words": "; ".join(words)}


def plans(module: nn.Module, x: Tensor | PackedSequence) -> list[dict[str, Any]]:
    """Return the plans for the forward and backward pass of each layer and direction.

    Each element is ``{"forward": plan, "backward": plan}``, or ``{"instead": reason}`` if the
    engine does not run. A plan has the fields of ``_C.plan_cpu`` or ``_C.plan_cuda``, and
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

    Consecutive equal layers are described once. On a CPU, the forward pass of each distinct layer
    is timed for at least 0.1 s. On a GPU, the cost is the planner's prediction.

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
    for where, call in _distinct(calls, len(calls) // layers, bidirectional):
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
                lines.append("            then one torch GEMM for each weight gradient")
        lines += [f"  {line}" for line in _cost(call, plan)]
    return "\n".join(lines)


def _distinct(
    calls: Sequence[_Call], of_a_layer: int, bidirectional: bool
) -> Iterator[tuple[str, _Call]]:
    """Yield one call of each run of equal consecutive calls, with the name of its layers."""
    for _, group in groupby(enumerate(calls), lambda pair: pair[1].problem):
        numbers, equal = zip(*group)
        first, last = numbers[0] // of_a_layer, numbers[-1] // of_a_layer
        name = f"layer {first}" if first == last else f"each of layers {first} to {last}"
        yield name + ", in each direction" * bidirectional, equal[0]


# What a step waits for in each regime of the CUDA engine.
_WAITS = {
    "block": "the chain of product, sum and nonlinearity within one SM",
    "cluster": "the chain of product, sum and nonlinearity, and the exchange of states",
    "grid": "the chain of product, sum and nonlinearity, and a barrier of all blocks in every step",
    "step": "one launch and the weights, read from L2 or memory in every step",
}


def _cost(call: _Call, plan: dict[str, Any]) -> list[str]:
    """Return lines with the cost of a forward step and its likely bound."""
    multiplications = call.B * call.H * (call.I + call.H)
    step = f"a step:   {multiplications:,} multiplications"
    if "regime" in plan:
        microseconds = plan["microseconds"] + plan["input_microseconds"]
        waits = _WAITS[plan["regime"]]
        return [f"{step}; predicted, not measured: {_short(microseconds)} µs, mostly for {waits}"]
    if "hidden_groups" not in plan:  # meta tensors: nothing to measure
        return []
    size = 8 if call.x.dtype == torch.float64 else 4
    weights = size * call.H * (call.I + call.H)
    part = weights // plan["hidden_groups"]
    share = " per thread" * (plan["hidden_groups"] > 1)
    cache = next((name for name, holds in _caches() if part <= holds), None)
    place = f"fit in {cache}" if cache else "too large for any cache"
    microseconds = _measured(call)
    rate = multiplications / microseconds / _gemm_rate(call.x.dtype, torch.get_num_threads())
    if rate >= 0.5:
        bound = "arithmetic"
    elif cache and not cache.startswith("L3"):
        bound = "latency: each step waits for the one before"
    else:
        bound = "reading the weights in every step"
    return [
        f"weights:  {_short(part / 1024)} KB{share}, {place}",
        f"{step}; measured now: {_short(microseconds)} µs, {rate:.0%} of the rate of a large GEMM; "
        f"likely bound by {bound}",
    ]


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _caches() -> list[tuple[str, int]]:
    """Return the data caches of the first core, smallest first, as Linux reports them."""
    found = []
    for path in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (
            (path / name).read_text().strip() for name in ("type", "level", "size")
        )
        if kind != "Instruction":
            found.append((f"L{level} ({size}B)", int(size.rstrip("K")) * 1024))
    return found


def _best(run: Callable[[], Any]) -> float:
    """Time ``run`` for at least 0.1 s and return the shortest time, in microseconds."""
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
    zeros = torch.zeros_like(x)  # above the first layer, x is uninitialised
    return _best(lambda: ops.activation(zeros, *others)) / call.T


@functools.cache
def _gemm_rate(dtype: torch.dtype, threads: int) -> float:
    """Return the multiplications per microsecond of a large GEMM with ``threads`` threads."""
    n = 512
    wide = dtype if dtype == torch.float64 else torch.float32  # low precision is widened
    a = torch.ones(n, n, dtype=wide)
    return n**3 / _best(lambda: a @ a)
