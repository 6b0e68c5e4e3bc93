"""Report which kernel will run, and why.

No decision is reimplemented here: the module runs once, the calls of the engine's ops are
intercepted before they start, and the planner is called with the arguments of each.
"""

from __future__ import annotations

from dataclasses import dataclass
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

# For each csrc/cpu/kernels_*.cpp: bytes of a vector, rows and vectors of a register tile.
_TILES = {"avx512": (64, 6, 4), "avx2": (32, 6, 2), "baseline": (16, 4, 2)}


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
        call = _Call(x, H=w_hh.size(0), reverse=reverse, leaky=alpha is not None)
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
        device=device,
    )


def _plan_cpu(call: _Call, adjoint: bool) -> dict[str, Any]:
    isa = _C.build_info()["isa_chosen"]
    vector_bytes, tile_rows, tile_vectors = _TILES[isa]
    size = 8 if call.x.dtype == torch.float64 else 4  # bfloat16 and float16 are widened
    I = 0 if adjoint else call.I
    if adjoint:  # as in csrc/cpu/engine.cpp
        rows_to_pack = 0 if call.x.element_size() != size else 48
    else:
        rows_to_pack = 24 if call.H * (call.H + I) * size > 1 << 20 else 12
    plan = _C.plan_cpu(
        T=call.T,
        B=call.B,
        I=I,
        H=call.H,
        number_size=size,
        lanes=vector_bytes // size,
        tile_rows=tile_rows,
        tile_vectors=tile_vectors,
        threads=torch.get_num_threads(),
        rows_to_pack=rows_to_pack,
    )
    batch_groups, hidden_groups = plan["batch_groups"], plan["hidden_groups"]
    threads = batch_groups * hidden_groups
    words = [f"{isa} kernel, {threads} thread{'s' * (threads > 1)}"]
    if batch_groups > 1:
        words.append(f"the batch split among {batch_groups} groups, which need no synchronisation")
    if hidden_groups > 1:
        words.append(f"the units split among {hidden_groups} threads, which synchronise every step")
    words.append("weights packed first" if plan["pack"] else "weights read in place: few rows")
    if I:
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
    """Describe which kernel ``module(x)`` will run, and why.

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
    directions = 2 if getattr(module, "bidirectional", False) else 1
    lines = [f"{module}, {data.dtype} on {data.device}"]
    for number, call in enumerate(calls):
        where = f"layer {number // directions}" + (", reverse" if call.reverse else "")
        if call.instead:
            lines.append(f"{where}: {call.instead}")
            continue
        packed = ", packed" if call.packed else ""
        lines.append(f"{where}: T {call.T}, B {call.B}{packed}, I {call.I}, H {call.H}")
        lines.append(f"  forward:  {_plan(call, False)['words']}")
        if training:
            lines.append(f"  backward: {_plan(call, True)['words']}")
            lines.append("            then a GEMM over all steps for each gradient")
    return "\n".join(lines)
