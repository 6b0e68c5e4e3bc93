"""Run a whole layer in low precision under autocast, as torch's own RNNs do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..torch_state import below_autocast

# Evaluated once, at import: Dynamo of torch 2.11 cannot trace is_autocast_available.
DEVICES = [d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d)]


def cast(device_type: str, *arguments: Any) -> Any:
    """Cast the tensors among the arguments to the autocast dtype, except those in float64."""
    if not torch.is_autocast_enabled(device_type):
        return arguments
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        a.to(dtype)
        if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64
        else a
        for a in arguments
    )


def _register(device_type: str, key: str) -> None:
    """Register the same rule for direct calls of the op, which exported programs make."""
    guard = below_autocast(device_type, key)

    def rule(*args: Any) -> Any:
        args = cast(device_type, *args)
        with guard():
            return ops.activation(*args)

    ops.LIBRARY.impl("activation", rule, key)


_register("cpu", "AutocastCPU")
_register("cuda", "AutocastCUDA")
