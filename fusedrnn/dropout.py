"""Apply dropout inside the recurrence by combining calls of the engine.

The engine itself has no dropout: everything here is differentiable torch code around
:func:`fusedrnn.rnn`.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import forms, functional, ops
from .forms import _for_every_row
from .ops import autocast
from .reference import NONLINEARITIES
from .torch_state import any_autocast


class Rates(NamedTuple):
    """The dropout probabilities of a call.

    In evaluation, only ``zoneout`` may be above 0; its mask is then replaced by the mask's mean.
    """

    recurrent_dropout: float
    zoneout: float
    weight_drop: float
    training: bool


def check_rate(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"fusedrnn: {name} must be a number, got {type(value).__name__}")
    if not 0 <= float(value) < 1:
        raise ValueError(f"fusedrnn: {name} must be in [0, 1), got {value}")


def draw(
    distribution: Callable[..., Tensor],
    sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw from ``torch.rand`` or ``torch.randn``."""
    # Torch cannot trace data-dependent sizes if the argument ``generator`` is passed, even as None.
    source = {} if generator is None else {"generator": generator}
    return distribution(sizes, device=device, dtype=dtype, **source)


def draw_mask(
    sizes: Sequence[int], rate: float, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw a mask whose elements are 0 with the probability ``rate``, otherwise 1.

    It is drawn in float32, so that a seed gives the same mask in every dtype.
    """
    drawn = draw(torch.rand, sizes, like.device, torch.float32, generator)
    return (drawn >= rate).to(like.real.dtype)


def rnn(
    rates: Rates,
    generator: torch.Generator | None,
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str,
    form: str = "rate",
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
    alpha: Tensor | None = None,
    state_input: Tensor | None = None,
    return_potential: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, ...]:
    r"""Run :func:`fusedrnn.rnn` with dropout inside the recurrence.

    Let p be a rate, k the state that a step starts from, and k' the state that it computes before
    zoneout.

    - ``weight_drop`` zeroes elements of ``W_hh``, once per call (DropConnect; Merity et al. 2018).
      The other elements are divided by 1 - p.
    - ``recurrent_dropout`` zeroes the outputs of units where they enter ``W_hh``, with one mask m
      for each row and unit (Gal and Ghahramani 2016): ``(m * k) @ W_hh.T / (1 - p)`` replaces
      ``k @ W_hh.T`` (with phi(k) for k in the form "potential").
    - ``zoneout`` leaves units in their state, with a mask z for each step, row and unit (Krueger
      et al. 2017): the new state is ``z k + (1 - z) k'``. In evaluation, z is its mean, p.

    Masks are drawn in the order of this list. ``reset_to`` is ``[H]`` or ``[B, H]``. The other
    arguments, and the results, are those of :func:`fusedrnn.rnn`.

    Zoneout is computed as a leak: ``alpha`` is multiplied by 1 - z. The form "inside", whose leak
    is inside phi, is first rewritten as the form "rate" with the matrix
    ``diag(alpha) W_hh + diag(1 - alpha)``.

    Recurrent dropout is computed in two passes. Dropped units do not act on other units, so the
    first pass runs the recurrence of the units that are kept: with ``alpha = 0`` where m is 0,
    dropped units stay at 0. One GEMM then computes the pre-activations of all units from these
    states. The second pass, without ``W_hh``, computes the states of all units from their
    pre-activations. Without a leak, these states are phi of the pre-activations, and torch computes
    them instead.
    """
    if any_autocast() and x.device.type in autocast.DEVICES:
        x, w_ih, w_hh, b_ih, b_hh, h0, reset_to, state_input = autocast.cast(
            x.device.type, x, w_ih, w_hh, b_ih, b_hh, h0, reset_to, state_input
        )
    size, rows = w_hh.size(0), x.shape[:-1]
    if alpha is not None:
        alpha = forms.checked_alpha(alpha, x, w_hh, batch_sizes)
    if rates.weight_drop:
        dropped = draw_mask(w_hh.shape, rates.weight_drop, w_hh, generator)
        w_hh = w_hh * (dropped / (1 - rates.weight_drop))
    mask = None
    if rates.recurrent_dropout:
        if grad_clip is not None:  # two passes would clip two parts of each gradient
            raise ValueError(
                "fusedrnn: grad_clip must be None with recurrent_dropout in training, got "
                f"{grad_clip}"
            )
        batch = forms._batch(x, h0, batch_sizes)
        mask = draw_mask((batch, size), rates.recurrent_dropout, w_hh, generator)

    own = None  # the part of the matrix through which units act on themselves
    if form == "inside" and (mask is not None or rates.zoneout):
        form = "rate"
        x = forms.drive(x, w_ih, b_ih, b_hh)
        w_ih = b_ih = b_hh = None
        if alpha is not None:
            if alpha.dim() > 1:
                raise ValueError(
                    "fusedrnn: alpha must be the same at every step in the form 'inside' with "
                    f"zoneout or recurrent_dropout, got {list(alpha.shape)}"
                )
            x, w_hh, own = alpha * x, alpha.unsqueeze(1) * w_hh, torch.diag(1 - alpha)
            alpha = None
        if state_input is not None:
            x, state_input = x + state_input, None

    if rates.zoneout:
        if rates.training:
            moves: Any = draw_mask((*rows, size), rates.zoneout, w_hh, generator)
        else:
            moves = 1 - rates.zoneout
        alpha = moves if alpha is None else moves * alpha
        state_input = None if state_input is None else moves * state_input

    run = functools.partial(
        functional.rnn, nonlinearity=nonlinearity, form=form, reverse=reverse,
        batch_sizes=batch_sizes, reset=reset, grad_clip=grad_clip,
    )  # fmt: skip
    if mask is None:
        matrix = w_hh if own is None else w_hh + own
        return run(
            x, w_ih, matrix, b_ih, b_hh, h0, reset_to=reset_to, alpha=alpha,
            state_input=state_input, return_potential=return_potential,
        )  # fmt: skip

    # First pass: the recurrence of the units that are not dropped.
    potential = form == "potential"
    phi = NONLINEARITIES[nonlinearity]
    sent = phi if potential else NONLINEARITIES["identity"]
    if h0 is None:
        h0 = x.new_zeros(batch, size)
    u = forms.drive(x, w_ih, b_ih, b_hh)
    w_hh = w_hh / (1 - rates.recurrent_dropout)
    if potential and nonlinearity in forms._NOT_ZERO_AT_ZERO:  # a unit at 0 adds phi(0)
        excess = ((1 - mask) * phi(mask.new_zeros(()))) @ w_hh.mT
        u = u - _for_every_row(excess, u, batch_sizes)
    kept = _for_every_row(mask, u, batch_sizes)
    start, target = h0 * mask, None if reset_to is None else reset_to * mask
    chain = run(
        u, None, w_hh if own is None else w_hh + own, None, None, start, reset_to=target,
        alpha=(kept if alpha is None else kept * alpha).expand(*rows, size),
        state_input=None if state_input is None else kept * state_input,
    )[0]  # fmt: skip

    # Second pass: all units.
    before = ops.previous(chain, sent(start), None, batch_sizes, reverse)
    if reset is not None:
        target = mask.new_zeros(size) if target is None else target
        target = _for_every_row(sent(target), u, batch_sizes)
        before = torch.where(reset.unsqueeze(-1), target, before)
    z = u + before @ w_hh.mT
    if alpha is not None or own is not None:
        return run(
            z, None, torch.zeros_like(w_hh) if own is None else own, None, None, h0,
            reset_to=reset_to, alpha=alpha, state_input=state_input,
            return_potential=return_potential,
        )  # fmt: skip
    state = z if potential else phi(z)
    state = state if state_input is None else state + state_input
    h = phi(state) if potential else state
    last = ops.following_first(state, None, batch_sizes, not reverse, batch)
    return (h, last, state) if return_potential else (h, last)
