"""Side streams on CUDA, and the conditions under which they must not be used."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from ._ops import _C


class _Streams(threading.local):
    """The side streams of a thread: one per device, and another one per device for captures.

    Threads do not share side streams: otherwise a CUDA graph captured by one thread would contain
    the work that another thread launches meanwhile. Captures have their own because cuBLAS has one
    workspace per stream, which a replayed graph must not share with work that runs meanwhile.
    """

    def __init__(self) -> None:
        self.of: dict[tuple[torch.device, bool], torch.cuda.Stream] = {}


_streams = _Streams()


def beside(device: torch.device) -> torch.cuda.Stream:
    """Return this thread's side stream."""
    key = (device, torch.cuda.is_current_stream_capturing())
    if key not in _streams.of:
        _streams.of[key] = torch.cuda.Stream(device)
    return _streams.of[key]


def transformed() -> bool:
    """Return whether a transform of torch.func is active, at any level."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def watched(*tensors: Tensor | None) -> bool:
    """Return whether anything but plain eager autograd is active.

    That is a compiler, a tracer, a transform of torch.func, forward mode, a dispatch mode such as
    fake tensors, or a subclass of Tensor.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or transformed()
        or _C.forward_mode()
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx
        or any(t is not None and type(t) not in (Tensor, nn.Parameter) for t in tensors)
    )
