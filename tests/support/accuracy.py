"""The accuracy rule: our error against float64 is at most twice torch's in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def as_tensors(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def assert_as_accurate_as_torch(
    ours: Tensor | Sequence[Tensor],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    args: Sequence[Any],
    slack: float = 2.0,
    floor: float = 4.0,
) -> None:
    """Assert that our error is at most `slack` times torch's own error in the same dtype.

    `reference(*args)` gives torch's result in the dtype of `args`, and the true result once every
    floating-point tensor in `args` is cast to float64. Because torch may happen to be exact, an
    error of `floor` times eps times the largest value is always allowed in addition.
    """
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    theirs, truths = as_tensors(reference(*args)), as_tensors(reference(*wide))
    found = as_tensors(ours)
    assert len(found) == len(truths), f"{len(found)} results instead of {len(truths)}"
    for i, (our, their, truth) in enumerate(zip(found, theirs, truths)):
        assert our.shape == truth.shape, f"result {i}: {our.shape} instead of {truth.shape}"
        assert our.dtype == their.dtype, f"result {i}: {our.dtype} instead of {their.dtype}"
        excess = inaccuracy(our, their, truth, slack, floor)
        assert not excess, f"result {i}: {excess}"


def inaccuracy(our: Tensor, their: Tensor, truth: Tensor, slack: float, floor: float) -> str:
    """Return how a result breaks the rule of :func:`assert_as_accurate_as_torch`, or ""."""
    if truth.numel() == 0:
        return ""
    our_error = (our.detach().double() - truth.detach()).abs().max().item()
    torch_error = (their.detach().double() - truth.detach()).abs().max().item()
    granted = floor * torch.finfo(our.dtype).eps * max(truth.detach().abs().max().item(), 1e-30)
    if our_error <= slack * torch_error + granted:
        return ""
    return f"error {our_error:.3g} > {slack} * {torch_error:.3g} + {granted:.3g}"
