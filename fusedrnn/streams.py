"""CUDA streams beside the current one, and when to leave them alone."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from ._ops import _C


class _Streams(threading.local):
    """A stream for each device: the thread's own, or a CUDA graph that one thread captures would
    have what another does in the meantime. And one for captures: what a graph replays and what runs
    meanwhile must not share the workspace that cuBLAS has for each stream."""

    def __init__(self) -> None:
        self.of: dict[tuple[torch.device, bool], torch.cuda.Stream] = {}


_streams = _Streams()


def beside(device: torch.device) -> torch.cuda.Stream:
    """This thread's second stream."""
    key = (device, torch.cuda.is_current_stream_capturing())
    if key not in _streams.of:
        _streams.of[key] = torch.cuda.Stream(device)
    return _streams.of[key]


def transformed() -> bool:
    """Whether a transform of torch.func is at work, at whatever level."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def watched(*tensors: Tensor | None) -> bool:
    """Whether others than eager autograd look on: a compiler, a tracer, a transform of torch.func,
    forward mode, modes such as fake tensors, subclasses of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or transformed()
        or _C.forward_mode()
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx
        or any(t is not None and type(t) not in (Tensor, nn.Parameter) for t in tensors)
    )
