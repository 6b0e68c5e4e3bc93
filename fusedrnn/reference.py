"""Reference implementation of this package: plain Python loops that import only torch.

Read this file to learn what an RNN is. Every faster path is tested against it, in float64. This
code is slow, and shares nothing with the engine.

Shapes: T time steps, B batch rows, I inputs, H hidden units. Time comes first: ``[T, B, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda z: z,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "retanh": lambda z: torch.relu(torch.tanh(z)),
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
}


def recurrence(
    u: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
    keep: Tensor | None = None,
    alpha: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h[t] = (1 - alpha) * k + alpha * phi(u[t] + k @ w_hh.T)``, ``k = keep[t] * h[t-1]``.

    Without ``keep`` there are no resets; without ``alpha`` it is 1, so ``h[t] = phi(...)``.

    Args:
        u: Input product of each step, ``[T, B, H]``; with ``batch_sizes``, packed, ``[N, H]``.
        h0: State before the first step, ``[B, H]``.
        w_hh: Recurrent weight, ``[H, H]``.
        reverse: Run from the last step to the first.
        batch_sizes: Number of active rows at each step, ``[T]``, non-increasing, as in a
            PackedSequence.
        keep: Bool ``[T, B]`` (packed: ``[N]``); False resets the state to 0 before that step.
        alpha: Leak, a number or a tensor ``[]`` or ``[H]``, in (0, 1].

    Returns:
        Every state, in the shape of ``u``, and the last state of each row, ``[B, H]``.
    """
    phi = NONLINEARITIES[nonlinearity]
    sizes = [u.size(1)] * u.size(0) if batch_sizes is None else batch_sizes.tolist()
    drive = u.unbind(0) if batch_sizes is None else u.split(sizes)
    kept = None if keep is None else (keep.unbind(0) if batch_sizes is None else keep.split(sizes))

    state = h0
    states: list[Tensor] = [h0] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        k = state[: sizes[t]]
        if kept is not None:  # where, not a product: 0 * nan is nan
            k = torch.where(kept[t].unsqueeze(-1), k, torch.zeros_like(k))
        h = phi(drive[t] + k @ w_hh.T)
        if alpha is not None:
            h = (1 - alpha) * k + alpha * h
        states[t] = h
        state = torch.cat([h, state[sizes[t] :]])  # inactive rows keep their state
    return (torch.stack if batch_sizes is None else torch.cat)(states), state


def rnn(
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
    keep: Tensor | None = None,
    alpha: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one layer in one direction: :func:`recurrence` with ``u = x @ w_ih.T + b_ih + b_hh``.

    Without ``w_ih``, ``x`` takes the place of ``x @ w_ih.T``.
    """
    u = x if w_ih is None else x @ w_ih.T
    if b_ih is not None:
        u = u + b_ih
    if b_hh is not None:
        u = u + b_hh
    if h0 is None:
        rows = x.size(1) if batch_sizes is None else int(batch_sizes[0])
        h0 = u.new_zeros(rows, w_hh.size(0))
    return recurrence(
        u,
        h0,
        w_hh,
        nonlinearity=nonlinearity,
        reverse=reverse,
        batch_sizes=batch_sizes,
        keep=keep,
        alpha=alpha,
    )


def seed_cell(inputs: Tensor, hidden: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Compute the cell of the original blog post: ``tanh(l_hidden(hidden + relu(inputs)))``.

    ``inputs`` is ``l_in(embedding)``. Because ``(hidden + v) @ w.T == v @ w.T + hidden @ w.T``, the
    cell is one step of :func:`recurrence` with ``u = relu(inputs) @ w.T + b``.
    """
    return torch.tanh(F.linear(hidden + torch.relu(inputs), w, b))
