"""Whether anything but plain eager autograd is active."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._ops import _C


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
