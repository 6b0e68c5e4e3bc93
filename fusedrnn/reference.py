"""Reference implementation of this package: plain Python loops that import only torch.

Read this file to learn what an RNN is. Every faster path is tested against it, in float64. This
code is slow, and shares nothing with the engine.

Shapes: T time steps, B batch rows, I inputs, H hidden units. Time comes first: ``[T, B, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    form: str = "rate",
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to: Tensor | None = None,
    alpha: Tensor | float | None = None,
    state_input: Tensor | None = None,
    return_potential: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, ...]:
    """Run one of three forms of the recurrence, whose step t starts from the state ``k``:

    - ``"rate"``: ``h[t] = (1 - alpha) * k + alpha * phi(u[t] + k @ w_hh.T)``
    - ``"potential"``: ``v[t] = (1 - alpha) * k + alpha * (u[t] + phi(k) @ w_hh.T)``, and
      ``h[t] = phi(v[t])``; the state is v
    - ``"inside"``: ``h[t] = phi((1 - alpha) * k + alpha * (u[t] + k @ w_hh.T))``

    ``k`` is the state after step t-1, or ``reset_to`` if ``reset[t]`` is true. If ``alpha`` is
    None, there is no leak: alpha is 1.

    Args:
        u: Input product of each step, ``[T, B, H]``; with ``batch_sizes``, packed, ``[N, H]``.
        h0: State before the first step, ``[B, H]``.
        w_hh: Recurrent weight, ``[H, H]``.
        reverse: Run from the last step to the first.
        batch_sizes: Number of active rows at each step, ``[T]``, non-increasing, as in a
            PackedSequence.
        reset: Bool ``[T, B]`` (packed: ``[N]``).
        reset_to: ``[H]``, ``[B, H]`` or ``[T, B, H]`` (packed: ``[N, H]``); None means zeros.
        alpha: Leak in [0, 1]: a number or a tensor ``[]``, ``[H]``, ``[T, B, 1]`` or ``[T, B, H]``
            (packed: ``[N, 1]`` or ``[N, H]``).
        state_input: In the shape of ``u``; added to the right-hand side, in the form "inside"
            before phi.
        return_potential: Return v, too; only with the form "potential".
        grad_clip: Clip the gradient of ``k`` to [-grad_clip, grad_clip], elementwise; but not that
            of ``reset_to``.

    Returns:
        ``h`` of every step, in the shape of ``u``; the last state of each row, ``[B, H]``; with
        ``return_potential``, ``v`` of every step.
    """
    phi = NONLINEARITIES[nonlinearity]
    sizes = [u.size(1)] * u.size(0) if batch_sizes is None else batch_sizes.tolist()

    def steps(series: Tensor) -> tuple[Tensor, ...]:
        return series.unbind(0) if batch_sizes is None else series.split(sizes)

    drive = steps(u)
    resets = None if reset is None else steps(reset.unsqueeze(-1))
    added = None if state_input is None else steps(state_input)
    if isinstance(alpha, Tensor) and alpha.dim() == u.dim():
        leaks: Sequence[Tensor | float | None] = steps(alpha)
    else:
        leaks = [alpha] * len(sizes)
    if reset_to is None:
        reset_to = torch.zeros_like(h0)
    if reset_to.dim() == 1 or (reset_to.dim() == 2 and reset_to.size(0) == h0.size(0)):
        starts: Sequence[Tensor] = [reset_to.expand_as(h0)[:n] for n in sizes]
    else:
        starts = steps(reset_to)

    state = h0
    outputs: list[Tensor] = [h0] * len(sizes)
    states: list[Tensor] = [h0] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        k, leak = state[: sizes[t]], leaks[t]
        if grad_clip is not None and k.requires_grad:
            k = k.clone()  # whose gradient comes from this step alone
            k.register_hook(lambda gradient: gradient.clamp(-grad_clip, grad_clip))
        if resets is not None:  # not by a product, because 0 * nan is nan
            k = torch.where(resets[t], starts[t], k)
        s = drive[t] + (phi(k) if form == "potential" else k) @ w_hh.T
        if form == "rate":
            s = phi(s)
        if leak is not None:
            s = (1 - leak) * k + leak * s
        if added is not None:
            s = s + added[t]
        if form == "inside":
            s = phi(s)
        states[t] = s
        outputs[t] = phi(s) if form == "potential" else s
        state = torch.cat([s, state[sizes[t] :]])  # inactive rows keep their state
    join = torch.stack if batch_sizes is None else torch.cat
    results = (join(outputs), state)
    return (*results, join(states)) if return_potential else results


def rnn(
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    """Run one layer in one direction: :func:`recurrence` with ``u = x @ w_ih.T + b_ih + b_hh``.

    If ``w_ih`` is None, ``x`` takes the place of ``x @ w_ih.T``. If ``h0`` is None, it is zeros.
    """
    u = x if w_ih is None else x @ w_ih.T
    if b_ih is not None:
        u = u + b_ih
    if b_hh is not None:
        u = u + b_hh
    if h0 is None:
        rows = x.size(1) if batch_sizes is None else int(batch_sizes[0])
        h0 = u.new_zeros(rows, w_hh.size(0))
    return recurrence(u, h0, w_hh, batch_sizes=batch_sizes, **others)


def seed_cell(inputs: Tensor, hidden: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Compute the cell of the original blog post: ``tanh(l_hidden(hidden + relu(inputs)))``.

    ``inputs`` is ``l_in(embedding)``. Because ``(hidden + v) @ w.T == v @ w.T + hidden @ w.T``, the
    cell is one step of :func:`recurrence` with ``u = relu(inputs) @ w.T + b``.
    """
    return torch.tanh(F.linear(hidden + torch.relu(inputs), w, b))
