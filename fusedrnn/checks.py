"""Check what the ops cannot: argument types, and all arguments of the plain loop.

The ops check their arguments in ``csrc/checks.h``. But an argument that is not a dense tensor never
reaches them, and the dispatcher's error does not name the argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .forms import FORMS, check_reset_to
from .reference import NONLINEARITIES
from .torch_state import compiling, eager, mapped, torch_check, without_torch_function


def check_types(
    x: Any,
    w_ih: Any,
    w_hh: Any,
    b_ih: Any,
    b_hh: Any,
    h0: Any,
    nonlinearity: Any,
    form: Any,
    reverse: Any,
    batch_sizes: Any,
    reset: Any,
    reset_to: Any,
    alpha: Any,
    state_input: Any,
) -> None:
    """Raise a TypeError for the first argument of the wrong type."""

    def check(right: bool, name: str, wanted: str, got: object) -> None:
        if not right:
            raise TypeError(f"fusedrnn: {name} must be {wanted}, got {got}") from None

    tensors = {
        "x": x, "w_hh": w_hh, "w_ih": w_ih, "b_ih": b_ih, "b_hh": b_hh, "h0": h0,
        "batch_sizes": batch_sizes, "reset": reset, "reset_to": reset_to,
        "state_input": state_input,
    }  # fmt: skip
    if isinstance(alpha, Tensor):
        tensors["alpha"] = alpha
    with without_torch_function():  # ExpandedWeight refuses attribute access
        for name, tensor in tensors.items():
            if tensor is None and name not in ("x", "w_hh"):
                continue
            got = "None" if tensor is None else type(tensor).__name__
            check(isinstance(tensor, Tensor), name, "a tensor", got)
            check(not tensor.is_nested, name, "a dense tensor", "a nested one")
            check(tensor.layout == torch.strided, name, "a dense tensor", tensor.layout)
    names = ", ".join(NONLINEARITIES)
    check(isinstance(nonlinearity, str), "nonlinearity", f"one of {names}", nonlinearity)
    check(isinstance(form, str), "form", f"one of {', '.join(FORMS)}", form)
    check(isinstance(reverse, int), "reverse", "a bool", type(reverse).__name__)


def check_for_loop(
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    nonlinearity: str,
    form: str,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reset_to: Tensor | None,
    alpha: Tensor | None,
    state_input: Tensor | None,
) -> None:
    """Raise the errors that the op would raise, for arguments of the right types."""
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"fusedrnn: x must be floating-point or complex, got {x.dtype}")
    if nonlinearity not in NONLINEARITIES:
        names = ", ".join(NONLINEARITIES)
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from {names}.")
    if form not in FORMS:
        raise ValueError(f"Unknown form '{form}'. Select from {', '.join(FORMS)}.")

    wanted = "[T, B, size]" if batch_sizes is None else "[N, size]"
    if x.dim() != wanted.count(",") + 1:
        raise RuntimeError(f"fusedrnn: x must be {wanted}, got {list(x.shape)}")
    if w_hh.dim() != 2:
        raise RuntimeError(f"fusedrnn: w_hh must be [H, H], got {list(w_hh.shape)}")
    if batch_sizes is None:
        steps, batch = x.shape[:2]
    else:
        if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
            raise RuntimeError(
                "fusedrnn: batch_sizes must be a dense 1-D int64 CPU tensor, got "
                f"{list(batch_sizes.shape)} of {batch_sizes.dtype} on {batch_sizes.device}"
            )
        sizes = batch_sizes.tolist()
        steps, batch = len(sizes), max(sizes, default=0)
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if batch_sizes is not None:
        if sizes != sorted(sizes, reverse=True) or not all(size > 0 for size in sizes):
            raise RuntimeError(
                f"fusedrnn: batch_sizes must be positive and non-increasing, got {sizes}"
            )
        if sum(sizes) != x.size(0):
            raise RuntimeError(
                f"fusedrnn: batch_sizes sum to {sum(sizes)}, but packed x has {x.size(0)} rows"
            )

    size = w_hh.size(0)
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "w_hh": (w_hh, (size, size)),
        "x": (x, (*x.shape[:-1], x.size(-1) if w_ih is not None else size)),
        "w_ih": (w_ih, (size, x.size(-1))),
        "b_ih": (b_ih, (size,)),
        "b_hh": (b_hh, (size,)),
        "h0": (h0, (batch, size)),
        "reset": (reset, x.shape[:-1]),
        "alpha": (alpha, (size,) if alpha is None or alpha.dim() == 1 else (*x.shape[:-1], size)),
        "state_input": (state_input, (*x.shape[:-1], size)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise RuntimeError(
                f"fusedrnn: {name} must have sizes {list(shape)}, got {list(tensor.shape)}"
            )
        dtype = torch.bool if name == "reset" else x.dtype
        if tensor.dtype != dtype:
            raise RuntimeError(f"fusedrnn: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise RuntimeError(f"fusedrnn: {name} must be on {x.device}, got {tensor.device}")
    if reset_to is not None:
        check_reset_to(reset, reset_to, x, w_hh, h0, batch_sizes)
    if alpha is not None and alpha.is_cpu and eager(alpha):
        for value in alpha.real.flatten().tolist():
            if not 0 <= value <= 1:
                raise ValueError(f"fusedrnn: alpha must be in [0, 1], got {value}")


def steps(name: str, value: Any) -> int | None:
    """Check a constructor argument that must be a number of steps or None, and return it."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"fusedrnn: {name} must be an int or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"fusedrnn: {name} must be at least 1, got {value}")
    return value


def grad_clip(value: Any) -> float | None:
    """Check the argument ``grad_clip``, and return it."""
    if value is None:
        return None
    if not isinstance(value, (int, float)):
        raise TypeError(f"fusedrnn: grad_clip must be a number or None, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"fusedrnn: grad_clip must be positive or None, got {value}")
    return value


def no_lengths(padding_value: Any) -> ValueError:
    return ValueError(f"fusedrnn: padding_value must be 0.0 without lengths, got {padding_value}")


def check_ragged(
    input: Any, lengths: Any, batch_first: bool, padding_value: Any, name: str = "input"
) -> None:
    """Check a padded input and its ``lengths``, except their values, or a jagged input."""
    if lengths is None:
        if padding_value != 0.0:
            raise no_lengths(padding_value)
        if input.layout != torch.jagged:
            raise TypeError(
                f"fusedrnn: input must have the layout torch.jagged if nested, got {input.layout}"
            )
        if input.dim() != 3 or input.size(2) != input.values().size(-1):
            raise ValueError(
                f"fusedrnn: input must be [B, lengths, I] if nested, got {_shape(input)}"
            )
        return
    if not isinstance(lengths, Tensor):
        raise TypeError(f"fusedrnn: lengths must be a tensor, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"fusedrnn: lengths must be integers, got {lengths.dtype}")
    if mapped(lengths):
        raise NotImplementedError(
            f"fusedrnn: lengths must be the same for all samples of a vmap; map over {name} alone"
        )
    if not isinstance(input, Tensor) or input.is_nested or input.dim() != 3:
        got = _shape(input) if isinstance(input, Tensor) else type(input).__name__
        wanted = "[B, T, I]" if batch_first else "[T, B, I]"
        raise ValueError(f"fusedrnn: {name} must be {wanted} with lengths, got {got}")
    batch = input.size(0 if batch_first else 1)
    if lengths.shape != (batch,):
        raise ValueError(f"fusedrnn: lengths must be [{batch}], got {list(lengths.shape)}")
    if not isinstance(padding_value, (int, float)):
        raise TypeError(
            f"fusedrnn: padding_value must be a number, got {type(padding_value).__name__}"
        )


def _shape(input: Tensor) -> str:
    return "a nested tensor" if input.is_nested else str(list(input.shape))


def longest(lengths: Tensor, steps: int | None) -> int:
    """Check that ``lengths``, which are in descending order, are in [0, T]; return the largest."""
    if lengths.size(0) == 0:
        return 0
    most, least = lengths[0].item(), lengths[-1].item()
    if compiling():
        torch_check(most >= 0, lambda: "fusedrnn: lengths must not be negative")
        if steps is not None:
            torch_check(most <= steps, lambda: "fusedrnn: lengths must be at most T")
    elif steps is not None and not 0 <= least <= most <= steps:
        raise ValueError(
            f"fusedrnn: lengths must be in [0, {steps}], got {least if least < 0 else most}"
        )
    return most  # type: ignore[return-value]  # int() would make it a constant when compiling
