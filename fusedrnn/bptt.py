"""Backpropagation through time, whose GEMMs overlap the recurrence on CUDA.

BPTT is a recurrence that computes ``delta`` for each step, followed by GEMMs of all deltas with the
states and inputs, which give the gradients. The recurrence often fills few of a GPU's SMs, and the
GEMMs of finished steps do not depend on the remaining steps. So where the planner predicts a gain
(``where_to_cut`` in ``csrc/cuda/plan.cpp``), the sequence is split in two, and the GEMMs of the
first part run on a side stream while the recurrence of the second part runs.

All memory that both streams use is allocated on the current stream, and freed there after it has
waited for the side stream, so no ``record_stream`` is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _ops, streams
from ._ops import _C

# With fewer steps, the planner is not called.
_MIN_STEPS = 128


def _where_to_cut(
    g: Tensor | None,
    d: Tensor | None,
    g_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    alpha: Tensor | None,
    batch_sizes: Tensor | None,
    h: Tensor,
    form: str,
    wanted: tuple[bool, ...],
) -> int:
    """Return after how many steps of the recurrence to split; 0 means no split."""
    to_x, to_w_ih, _, _, _, _, to_w_hh, to_alpha, to_q = wanted
    if (
        not h.is_cuda
        or streams.watched(g, d, g_n, x, w_ih, w_hh)
        or torch.is_grad_enabled()  # higher derivatives need differentiable ops
        or torch._C._is_any_autocast_enabled()
        or batch_sizes is not None
        or w_ih is None  # delta is then the gradient of x and must be one tensor
        or form != "rate"
        or (alpha is not None and alpha.dim() > 1)
        or to_alpha
        or to_q
        or h.size(0) < _MIN_STEPS
        or any(t is not None and torch._C._dispatch_keys(t).has("Batched") for t in (g, d, g_n))
    ):
        return 0
    steps, batch, size = h.shape
    products = (to_x + to_w_ih) * x.size(-1) + to_w_hh * size
    dtype = str(h.dtype).removeprefix("torch.")
    leaky = alpha is not None
    return _C.cut_of_adjoint(dtype, steps, batch, size, leaky, products, h.device.index)


def bptt(
    g: Tensor | None,
    d: Tensor | None,
    f: Tensor | None,
    g_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    v0: Tensor | None,
    w_hh: Tensor,
    alpha: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    h: Tensor,
    saved: Tensor | None,
    nonlinearity: str,
    form: str,
    reverse: bool,
    wanted: tuple[bool, ...],
) -> Any:
    """Compute the ``wanted`` gradients of ``activation``.

    Args:
        g, g_n: Gradients of its results ``h`` and ``last``.
        d, f: With the form "rate", the part of dL/dz that comes through its third result,
            ``saved``; with the others, the gradient of ``saved``.
        wanted: Which of the gradients of x, w_ih, b_ih, b_hh, h0, v0, w_hh, alpha and q to compute.

    Returns:
        These nine gradients.
    """
    cut = _where_to_cut(g, d, g_n, x, w_ih, w_hh, alpha, batch_sizes, h, form, wanted)
    if not cut or w_ih is None:
        return _ops.bptt(
            g, d, f, g_n, x, w_ih, b_ih, b_hh, h0, v0, w_hh, alpha, reset, batch_sizes, h, saved,
            nonlinearity, form, reverse, wanted,
        )  # fmt: skip

    steps, _, size = h.shape
    to_x, to_w_ih, to_b_ih, to_b_hh, to_h0, _, to_w_hh, *_ = wanted
    dx = x.new_empty(x.shape) if to_x else None
    dw_ih = w_ih.new_empty(w_ih.shape) if to_w_ih else None
    dw_hh = w_hh.new_empty(w_hh.shape) if to_w_hh else None
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    sums = h.new_empty((2, size), dtype=wide) if to_b_ih or to_b_hh else None
    # Backward runs in the opposite order to forward: unless ``reverse``, its early part is the end
    # of the sequence.
    early, late = slice(steps - cut, steps), slice(0, steps - cut)
    if reverse:
        early, late = slice(0, cut), slice(cut, steps)

    def walk(part: slice, g_n: Tensor | None, to_first: bool) -> tuple[Tensor, Tensor]:
        def of(series: Tensor | None) -> Tensor | None:
            return None if series is None else series[part]

        with torch._C._AutoDispatchBelowAutograd():
            delta, dh, *_ = _ops.adjoint(
                of(g), of(d), None, g_n, of(h if saved is None else saved), w_hh, alpha, of(reset),
                None, nonlinearity, form, reverse, to_first, False,
            )  # fmt: skip
        return delta, dh

    def add_product(
        to: Tensor, deltas: Tensor, states: Tensor, resets: Tensor | None, onto: int
    ) -> None:
        if resets is not None:
            states = torch.where(resets.unsqueeze(-1), 0, states)
        to.addmm_(deltas.flatten(0, -2).t(), states.flatten(0, -2), beta=onto)

    def multiply(part: slice, delta: Tensor, onto: int) -> None:
        """Run the GEMMs of one part; add to the results of the other part if ``onto`` is 1."""
        rows = delta.flatten(0, 1)
        if dx is not None:
            torch.mm(rows, w_ih, out=dx[part].flatten(0, 1))
        if dw_ih is not None:
            dw_ih.addmm_(rows.t(), x[part].flatten(0, 1), beta=onto)
        if sums is not None:
            torch.sum(rows, 0, dtype=wide, out=sums[onto])
        if dw_hh is None:
            return
        # Each step starts from the state of the previous one. The first step, which is in the late
        # part, starts from h0.
        before = 1 if reverse else -1
        begin, end = max(part.start, -before), min(part.stop, steps - before)
        resets = None if reset is None else reset[begin:end]
        deltas = delta[begin - part.start : end - part.start]
        add_product(dw_hh, deltas, h[begin + before : end + before], resets, onto)
        if onto and h0 is not None:
            first = -1 if reverse else 0
            add_product(dw_hh, delta[first], h0, None if reset is None else reset[first], 1)

    here, there = torch.cuda.current_stream(h.device), streams.beside(h.device)
    delta, dh = walk(early, g_n, True)
    there.wait_stream(here)
    try:
        late_delta, dh0 = walk(late, dh, to_h0)
        with torch.cuda.stream(there):
            multiply(early, delta, 0)
    finally:  # also after an error, since that frees memory in use on the side stream
        here.wait_stream(there)
    multiply(late, late_delta, 1)

    db = None if sums is None else sums.sum(0).to(h.dtype)
    # Return separate tensors, because callers may scale gradients in place.
    db_hh = db.clone() if db is not None and to_b_ih and to_b_hh else db
    return (
        dx, dw_ih, db if to_b_ih else None, db_hh if to_b_hh else None, dh0 if to_h0 else None,
        None, dw_hh, None, None,
    )  # fmt: skip
