"""Translate the options of the state (form, ``reset_to``) into inputs of the engine.

The engine can reset only to 0. With the form "potential", it takes both the potential ``v0`` before
the first step and ``h0 = phi(v0)``. Everything here is differentiable torch code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import NONLINEARITIES
from .torch_state import equal_sizes

FORMS = ("rate", "potential", "inside")
# phi(0) is not 0, so in the form "potential", units at 0 add phi(0) W_hh.T to the next step.
_NOT_ZERO_AT_ZERO = ("sigmoid", "softplus")


def drive(x: Tensor, w_ih: Tensor | None, *biases: Tensor | None) -> Tensor:
    """Return ``u = x @ w_ih.T`` plus the biases; without ``w_ih``, x is the product already."""
    u = x if w_ih is None else x @ w_ih.mT
    for bias in biases:
        u = u if bias is None else u + bias
    return u


def checked_alpha(
    alpha: Tensor | float, x: Tensor, w_hh: Tensor, batch_sizes: Tensor | None
) -> Tensor:
    """Check alpha and return it in the dtype of ``w_hh``: ``[H]``, ``[T, B, H]`` or ``[N, H]``."""
    if w_hh.dim() == 0:
        raise RuntimeError("fusedrnn: w_hh must be [H, H], got []")
    size = w_hh.size(0)
    if not isinstance(alpha, Tensor):
        try:
            in_range, number = 0 < alpha <= 1, float(alpha)
        except (TypeError, ValueError):  # a string, a complex number, an array of several elements
            raise TypeError(
                f"fusedrnn: alpha must be a number or a tensor, got {type(alpha).__name__}"
            ) from None
        if not in_range:
            raise ValueError(f"fusedrnn: alpha must be in (0, 1], got {alpha}")
        if number < 1e-7:
            info = torch.finfo(w_hh.dtype)
            if number <= info.tiny * info.eps / 2:  # half of the smallest subnormal
                raise ValueError(
                    f"fusedrnn: alpha must be in (0, 1], got {alpha}, which rounds to 0 in "
                    f"{w_hh.dtype}"
                )
        return torch.full((), number, dtype=w_hh.dtype, device=w_hh.device).expand(size)
    if alpha.is_complex():
        raise TypeError(f"fusedrnn: alpha must be real, got {alpha.dtype}")
    if alpha.dtype != w_hh.dtype:
        alpha = alpha.to(w_hh.dtype)
    if alpha.dim() == 0 or alpha.shape == (size,):
        return alpha.expand(size)
    rows = x.shape[:-1]
    if alpha.shape == rows:
        alpha = alpha.unsqueeze(-1)
    if alpha.shape not in ((*rows, 1), (*rows, size)):
        names = "[T, B], [T, B, 1] or [T, B, H]" if batch_sizes is None else "[N], [N, 1] or [N, H]"
        raise ValueError(
            f"fusedrnn: alpha must be a number or a tensor [], [H], {names} with H = {size} and "
            f"{', '.join(f'{n} = {v}' for n, v in zip('TB' if len(rows) == 2 else 'N', rows))}, "
            f"got {list(alpha.shape)}"
        )
    return alpha.expand(*rows, size)


def check_reset_to(
    reset: Tensor | None,
    reset_to: Tensor,
    x: Tensor,
    w_hh: Tensor,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
) -> Tensor:
    """Check ``reset`` and ``reset_to``, which the op does not receive. Return ``reset``."""
    if reset is None:
        raise ValueError("fusedrnn: reset must be given with reset_to, got None")
    rows, size = x.shape[:-1], w_hh.size(0)
    if reset.dtype != torch.bool:
        raise RuntimeError(f"fusedrnn: reset must be bool, got {reset.dtype}")
    if reset.shape != rows:
        raise RuntimeError(f"fusedrnn: reset must have sizes {list(rows)}, got {list(reset.shape)}")
    if reset_to.dtype != x.dtype or reset_to.device != x.device:
        raise RuntimeError(
            f"fusedrnn: reset_to must be {x.dtype} on {x.device}, got "
            f"{reset_to.dtype} on {reset_to.device}"
        )
    batch = _batch(x, h0, batch_sizes)
    if reset_to.shape not in ((size,), (batch, size), (*rows, size)):
        name = "[T, B, H]" if batch_sizes is None else "[N, H]"
        raise ValueError(
            f"fusedrnn: reset_to must be [H], [B, H] or {name} ([{size}], "
            f"[{batch}, {size}] or {[*rows, size]}), got {list(reset_to.shape)}"
        )
    return reset


def _batch(x: Tensor, h0: Tensor | None, batch_sizes: Tensor | None) -> int:
    if h0 is not None:
        return h0.size(0)
    return x.size(1) if batch_sizes is None else int(batch_sizes[0])


def _for_every_row(states: Tensor, x: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """Repeat ``states [B, H]`` for every row of x, unless it broadcasts or has as many rows."""
    rows = x.size(0)
    if batch_sizes is None or states.dim() == 1 or equal_sizes(states.size(0), rows):
        return states
    sizes = batch_sizes.to(x.device)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes, output_size=rows)
    return states.index_select(0, torch.arange(rows, device=x.device) - starts)


def translate(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    w_hh: Tensor,
    alpha: Tensor | None,
    q: Tensor | None,
    reset: Tensor | None,
    reset_to: Tensor | None,
    batch_sizes: Tensor | None,
    nonlinearity: str,
    form: str,
) -> Any:
    """Return x, w_ih, b_ih, b_hh, h0, v0 and q for the op ``activation``.

    A step that starts from ``reset_to`` instead of 0 has two more terms, which do not depend on
    other steps: ``output_of(reset_to) @ W_hh.T`` in ``u`` and ``(1 - alpha) reset_to`` in ``q``.
    ``output_of`` is phi with the form "potential", else the identity.
    """
    v0 = None
    output_of = NONLINEARITIES[nonlinearity if form == "potential" else "identity"]
    if form == "potential":
        if nonlinearity in _NOT_ZERO_AT_ZERO:
            if h0 is None:
                h0 = x.new_zeros(_batch(x, h0, batch_sizes), w_hh.size(0))
            if reset is not None and reset_to is None:
                reset_to = x.new_zeros(w_hh.size(0))
        if h0 is not None:
            v0, h0 = h0, output_of(h0)
    if reset_to is not None:
        resets = check_reset_to(reset, reset_to, x, w_hh, h0, batch_sizes).unsqueeze(-1)
        if reset_to.dim() == x.dim() and all(map(equal_sizes, reset_to.shape[:-1], x.shape[:-1])):
            reset_to = torch.where(resets, reset_to, 0)  # a NaN at another step would spread
        product = _for_every_row(output_of(reset_to) @ w_hh.mT, x, batch_sizes)
        x = drive(x, w_ih, b_ih, b_hh) + torch.where(resets, product, 0)
        w_ih = b_ih = b_hh = None
        if alpha is not None:
            leaked = (1 - alpha) * _for_every_row(reset_to, x, batch_sizes)
            leaked = torch.where(resets, leaked, 0)
            q = leaked if q is None else q + leaked
    return x, w_ih, b_ih, b_hh, h0, v0, q
