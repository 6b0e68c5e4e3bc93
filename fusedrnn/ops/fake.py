"""Fake kernels and FLOP formulas of the ops, which need the sizes of tensors but not the data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..torch_state import exporting_onnx, is_fake
from . import onnx, saving_z


def _batch(states: Tensor | None, series: Tensor, batch_sizes: Tensor | None) -> int | torch.SymInt:
    """Return B. For a packed sequence without ``states``, it is known from ``batch_sizes`` only."""
    if states is not None:
        return states.size(0)
    if batch_sizes is None:
        return series.size(1)
    if not is_fake(batch_sizes) and batch_sizes.device.type == "cpu":
        return int(batch_sizes[0])  # a real tensor, although the others are on meta
    return torch.library.get_ctx().new_dynamic_size()


def _check_devices(x: Tensor, batch_sizes: Tensor | None, *others: Tensor | None) -> None:
    """Check that all tensors are on the right devices.

    The real kernels check more, but the fake kernel runs instead if any tensor is on meta.
    """
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(f"fusedrnn: all tensors must be on {x.device}, got {other.device}")
    if batch_sizes is None:
        return
    if batch_sizes.dtype != torch.int64:
        if not is_fake(batch_sizes):  # float under torch.export: see `activation`
            raise RuntimeError(f"fusedrnn: batch_sizes must be int64, got {batch_sizes.dtype}")
    elif batch_sizes.device.type not in ("cpu", "meta" if x.is_meta else "cpu"):
        raise RuntimeError(f"fusedrnn: batch_sizes must be on cpu, got {batch_sizes.device}")


@torch.library.register_fake("fusedrnn::activation")
def _(  # type: ignore[no-untyped-def]
    x, w_ih, b_ih, b_hh, h0, v0, w_hh, alpha, q, reset, batch_sizes, nonlinearity, form, reverse,
    grad_clip,
):  # fmt: skip
    if exporting_onnx():  # the exporter would only report an unknown op
        onnx.check(alpha, q, reset, batch_sizes, nonlinearity, form)
        raise NotImplementedError(
            "fusedrnn: torch.onnx.export cannot translate a program that torch.export made; "
            "call its run_decompositions(fusedrnn.onnx.decompositions()) first"
        )
    _check_devices(x, batch_sizes, w_ih, b_ih, b_hh, h0, v0, w_hh, alpha, q, reset)
    size = w_hh.size(0)
    rows: Any = x.shape[:-1]
    if batch_sizes is not None and batch_sizes.dtype != torch.int64:
        # torch.export traces pack_padded_sequence. By a bug in torch, its fake kernel returns
        # floating-point batch_sizes and data with T rows. From here on the number of rows is N.
        rows = (torch.library.get_ctx().new_dynamic_size(),)
    h = x.new_empty((*rows, size))
    last = x.new_empty((_batch(h0, x, batch_sizes), size))
    h_is_phi = form != "rate" or (alpha is None and q is None)
    saves = nonlinearity in saving_z or form == "potential" or not h_is_phi
    return h, last, torch.empty_like(h) if saves else x.new_empty(0)


@torch.library.register_fake("fusedrnn::tangent")
def _(  # type: ignore[no-untyped-def]
    w, q, r, s0, v0, saved, w_hh, alpha, reset, batch_sizes, nonlinearity, form, reverse, full
):
    _check_devices(saved, batch_sizes, w, q, r, s0, v0, w_hh, alpha, reset)
    last = saved.new_empty((_batch(s0, saved, batch_sizes), saved.size(-1)))
    m, s = full, full and form != "rate"
    return (
        saved.new_empty(saved.shape),
        last,
        *(saved.new_empty(saved.shape if wanted else 0) for wanted in (m, s)),
    )


@torch.library.register_fake("fusedrnn::adjoint")
def _(  # type: ignore[no-untyped-def]
    g, d, f, g_n, saved, w_hh, alpha, reset, batch_sizes, nonlinearity, form, reverse, grad_clip,
    to_h0, full,
):  # fmt: skip
    _check_devices(saved, batch_sizes, g, d, f, g_n, w_hh, alpha, reset)
    states = (_batch(g_n, saved, batch_sizes), saved.size(-1)) if to_h0 else (0,)
    a, y = full, full and form != "rate"
    return (
        saved.new_empty(saved.shape),
        saved.new_empty(states),
        saved.new_empty(states if form == "potential" else 0),
        *(saved.new_empty(saved.shape if wanted else 0) for wanted in (a, y)),
    )


# FLOP formulas for torch.utils.flop_counter, which passes shapes instead of tensors.


@register_flop_formula(torch.ops.fusedrnn.activation)
def _(x, w_ih, b_ih, b_hh, h0, v0, w_hh, *_, **__):  # type: ignore[no-untyped-def]
    size, inputs = w_hh[0], 0 if w_ih is None else w_ih[1]
    return 2 * math.prod(x[:-1]) * size * (inputs + size)


@register_flop_formula(torch.ops.fusedrnn.tangent)
def _(w, q, r, s0, v0, saved, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * math.prod(saved) * saved[-1]


@register_flop_formula(torch.ops.fusedrnn.adjoint)
def _(g, d, f, g_n, saved, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * math.prod(saved) * saved[-1]
