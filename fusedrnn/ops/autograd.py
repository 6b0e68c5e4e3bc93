"""Derivatives of the engine's ops: backpropagation through time, forward mode and higher orders.

The engine has three ops. ``activation`` is the forward pass in one of three forms, ``tangent`` its
directional derivative, ``adjoint`` the transpose of ``tangent``. ``tangent`` and ``adjoint`` are
the same linear recurrences for all forms (``csrc/epilogues.h``). Except in phi', a prime marks the
value at the step that the op computed just before, or zeros if a reset separates the two steps:

    tangent    m = w + e' @ W.T      s = q + (1 - alpha) k + P m          e = r + R s
    adjoint    y = g + delta' @ W    a = f + (1 - alpha) a' + R y         delta = d + P a

    form       P                R            k
    rate       alpha phi'(z)    1            s'       (s = e, so r and f are not used)
    potential  alpha            phi'(v)      s'
    inside     alpha            phi'         e'       ((1 - alpha) a' is added to y, not to a)

``tangent`` and ``adjoint`` are linear in their driving inputs, so their own derivatives need only
these two ops again. Three ops therefore give derivatives of every order in both modes. Everything
that is not a recurrence is a GEMM over all rows or elementwise: plain torch code, which is already
differentiable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..forms import drive
from ..reference import NONLINEARITIES
from ..torch_state import (
    SingleLevelFunction,
    any_requires_grad,
    below_autograd,
    forward_mode,
    single_level_functions,
    tangents_enabled,
    transformed,
    unpack_dual,
    with_tangents,
)

Gradients = tuple[Tensor | None, ...]


def _where_positive(h: Tensor, yes: Tensor, no: float) -> Tensor:
    return torch.where(h <= 0, torch.full_like(h, no), yes)


# phi'(z) as a function of the tensor that the forward pass saved, as in csrc/epilogues.h, and the
# derivative of that function. Used for derivatives of second and higher order, and by trace.py.
_SLOPES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tanh": (lambda h: 1 - h * h, lambda h: -2 * h),
    "relu": (lambda h: _where_positive(h, torch.ones_like(h), 0), torch.zeros_like),
    "identity": (torch.ones_like, torch.zeros_like),
    "sigmoid": (lambda h: h * (1 - h), lambda h: 1 - 2 * h),
    "softplus": (torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z)),
    "retanh": (
        lambda h: _where_positive(h, 1 - h * h, 0),
        lambda h: _where_positive(h, -2 * h, 0),
    ),
    "hardtanh": (lambda h: (~(h.abs() >= 1)).to(h.dtype), torch.zeros_like),
    "leaky_relu": (
        lambda h: torch.where(h > 0, torch.ones_like(h), torch.full_like(h, 0.01)),
        torch.zeros_like,
    ),
    "elu": (
        lambda z: torch.exp(z.clamp(max=0)),
        lambda z: torch.where(z <= 0, torch.exp(z.clamp(max=0)), torch.zeros_like(z)),
    ),
}


def _value(saved: Tensor, nonlinearity: str) -> Tensor:
    """Compute phi(z) from the tensor that the forward pass saved."""
    if nonlinearity == "softplus":
        return F.softplus(saved, threshold=40)  # above 40, softplus(z) == z, in float64 too
    return F.elu(saved) if nonlinearity == "elu" else saved


def slope(z: Tensor, nonlinearity: str) -> Tensor:
    """Return phi'(z)."""
    saved = z if nonlinearity in ops.saving_z else NONLINEARITIES[nonlinearity](z)
    return _SLOPES[nonlinearity][0](saved)


def _slope_of_saved(saved: Tensor, nonlinearity: str) -> Tensor | float:
    """Return the derivative with respect to z of the tensor that the forward pass saved."""
    return 1.0 if nonlinearity in ops.saving_z else _SLOPES[nonlinearity][0](saved)


def slope_source(h: Tensor, saved: Tensor | None, nonlinearity: str, form: str) -> Tensor:
    """Return the tensor from which phi' is computed: ``h``, or what the forward pass saved."""
    return saved if saved is not None and (form == "rate" or nonlinearity in ops.saving_z) else h


def _sum_rows(series: Tensor) -> Tensor:
    return series.sum(tuple(range(series.dim() - 1)))


def _save(ctx: Any, saved: Gradients) -> None:
    ctx.save_for_backward(*saved)
    if forward_mode() or transformed():
        ctx.save_for_forward(*saved)


class _Modes(threading.local):
    """Whether the caller of a Function under torch.func has gradients and tangents enabled."""

    gradients = True
    tangents = True


_modes = _Modes()


def _run(op: Callable[..., Any], *args: Any) -> Any:
    """Call the op below the Autograd key: its kernel, or the next level of torch.func."""
    with below_autograd():
        if not transformed():
            return op(*args)
        # torch disables gradients in a Function's forward. That must affect its own level only, so
        # restore the caller's modes for the next level.
        with (
            torch.set_grad_enabled(_modes.gradients),
            with_tangents(_modes.tangents),
        ):
            return op(*args)


def _jvp(function: Callable[..., Any]) -> Any:
    """Make ``function(ctx, saved, *tangents)`` the jvp of a Function.

    torch disables forward mode during a jvp for every level of torch.func, although only the
    tangents of the current level must be ignored. Therefore enable it again and strip the current
    level's tangents from the saved tensors.
    """

    def jvp(ctx: Any, *tangents: Any) -> Any:
        saved = ctx.saved_tensors
        if not transformed():
            return function(ctx, saved, *tangents)
        with with_tangents(True):
            primals = [t if t is None else unpack_dual(t, level=0)[0] for t in saved]
            return function(ctx, primals, *tangents)

    return staticmethod(jvp)


class _Op(SingleLevelFunction):
    """An autograd.Function registered as the Autograd kernel of an op.

    Every call of the op therefore reaches the derivative: from eager code, a compiler or a
    transform of torch.func. Transforms are handled above the Autograd key, one level at a time, so
    the base class is the single-level Function that torch.func itself uses. (Its ``apply`` is also
    10 us faster, because it does not bind the arguments to a signature.)
    """

    op: Callable[..., Any]

    @classmethod
    def differentiate(cls, *args: Any) -> Any:
        if transformed():  # called at one level of torch.func: differentiate there
            _modes.gradients = torch.is_grad_enabled()
            _modes.tangents = tangents_enabled()
            with single_level_functions():
                return cls.apply(*args)  # type: ignore[attr-defined]
        wanted = torch.is_grad_enabled() and any_requires_grad(*args)
        if wanted or forward_mode():  # no_grad does not disable forward mode
            return cls.apply(*args)  # type: ignore[attr-defined]
        return _run(cls.op, *args)


def _with_remedy(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Append the remedy to torch's error for an ``output`` that was modified in place."""

    def explained(ctx: Any, *gradients: Tensor | None) -> Gradients:
        try:
            return backward(ctx, *gradients)
        except RuntimeError as error:
            if "which is output 0 of FusedRNN," not in str(error):
                raise
            raise RuntimeError(
                f"{error}\nfusedrnn: output must not be modified in place before backward, which "
                "reads it; write `output = output * 2` instead of `output *= 2`, or modify "
                "output.clone()"
            ) from error

    return explained


class FusedRNN(_Op):
    op = ops.activation

    @staticmethod
    def forward(*args: Any) -> Any:
        return _run(ops.activation, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, nonlinearity, form, reverse, grad_clip = inputs
        h, _, saved = output
        if saved.dim() == 1:  # empty
            saved = None
        tensors[8] = None  # no derivative depends on q, and few on the biases
        if form == "rate" or tensors[7] is None:
            tensors[2] = tensors[3] = None
        _save(ctx, (*tensors, h, saved))
        ctx.options, ctx.grad_clip = (nonlinearity, form, reverse), grad_clip
        ctx.set_materialize_grads(False)

    @staticmethod
    @_with_remedy
    def backward(  # type: ignore[override]
        ctx: Any, g: Tensor | None, g_n: Tensor | None, g_saved: Tensor | None
    ) -> Gradients:
        *inputs, _, reset, batch_sizes, h, saved = ctx.saved_tensors
        nonlinearity, form, _ = ctx.options
        d = f = None
        if g_saved is not None and saved is not None:
            if form == "rate":
                d = _slope_of_saved(saved, nonlinearity) * g_saved
            else:
                f = g_saved
        if g is None and g_n is None and d is None and f is None:
            return (None,) * 15
        gradients = ops.bptt(
            g, d, f, g_n, *inputs, reset, batch_sizes, h, saved, *ctx.options, ctx.grad_clip,
            ctx.needs_input_grad[:9],
        )  # type: ignore[call-arg]  # fmt: skip
        return *gradients, *(None,) * 6

    @_jvp
    def jvp(ctx: Any, primals: Any, *tangents: Any) -> Any:
        x, w_ih, b_ih, b_hh, h0, v0, w_hh, alpha, _, reset, batch_sizes, h, saved = primals
        x_t, w_ih_t, b_ih_t, b_hh_t, h0_t, v0_t, w_hh_t, alpha_t, q, *_ = tangents
        nonlinearity, form, reverse = ctx.options
        layout = (reset, batch_sizes, reverse)
        if w_ih is None:
            w = x_t
        else:
            w = _add(
                None if x_t is None else x_t @ w_ih.mT, None if w_ih_t is None else x @ w_ih_t.mT
            )
        for bias_t in (b_ih_t, b_hh_t):
            w = _add(w, None if bias_t is None else bias_t.expand_as(h))
        if w_hh_t is not None:
            w = _add(w, ops.previous(h, h0, *layout) @ w_hh_t.mT)
        if alpha_t is not None:
            before = ops.previous(h, h0, *layout)
            if form == "rate":
                leaked = _value(saved, nonlinearity)
            else:
                leaked = drive(x, w_ih, b_ih, b_hh) + before @ w_hh.mT
                if form == "potential":
                    before = ops.previous(saved, v0, *layout)
            q = _add(q, alpha_t * (leaked - before))
        slope_of = slope_source(h, saved, nonlinearity, form)
        e, last, m, s = ops.tangent(
            w, q, None, h0_t, v0_t, slope_of, w_hh, alpha, reset, batch_sizes, *ctx.options,
            saved is not None,
        )  # fmt: skip
        if saved is None:
            return e, last, h.new_zeros(0)
        return e, last, _slope_of_saved(saved, nonlinearity) * m if form == "rate" else s


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Linear(_Op):
    """Base class of tangent and adjoint.

    The two are transposes of each other, so the gradients of their coefficients ``saved``, ``W_hh``
    and ``alpha`` are the same function of the results of both recurrences.
    """

    @staticmethod
    def coefficient_gradients(
        ctx: Any,
        wanted: tuple[bool, bool, bool],
        deltas: tuple[Tensor, Tensor, Tensor],  # delta, a, y
        states: tuple[Tensor, Tensor, Tensor],  # e, m, s
        firsts: tuple[Tensor | None, Tensor | None],  # s0, v0
    ) -> Gradients:
        saved, _, alpha, reset, batch_sizes = ctx.saved_tensors[:5]
        (delta, a, y), (e, m, s), (s0, v0) = deltas, states, firsts
        nonlinearity, form, reverse = ctx.options
        layout = (reset, batch_sizes, reverse)
        dsaved = dw_hh = dalpha = None
        to_saved, to_w_hh, to_alpha = wanted
        slope, curvature = _SLOPES[nonlinearity]
        if to_saved:
            dsaved = curvature(saved) * (a * m if form == "rate" else y * s)
            if form == "rate" and alpha is not None:
                dsaved = alpha * dsaved
        if to_w_hh:
            dw_hh = ops.recurrent_product(delta, e, s0, *layout)
        if to_alpha:
            before = ops.previous(*((s, v0) if form == "potential" else (e, s0)), *layout)
            dalpha = a * ((m * slope(saved) if form == "rate" else m) - before)
            if alpha.dim() == 1:
                dalpha = _sum_rows(dalpha)
        return dsaved, dw_hh, dalpha


def _gate_tangent(
    ctx: Any, saved: Tensor, alpha: Tensor | None, saved_t: Tensor | None, alpha_t: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the tangents of the gates P and R."""
    nonlinearity, form, _ = ctx.options
    slope, curvature = _SLOPES[nonlinearity]
    slope_t = None if saved_t is None else curvature(saved) * saved_t
    if form != "rate":
        return alpha_t, slope_t
    if alpha is not None and slope_t is not None:
        slope_t = alpha * slope_t
    return _add(slope_t, None if alpha_t is None else alpha_t * slope(saved)), None


class FusedRNNTangent(_Linear):
    op = ops.tangent

    @staticmethod
    def forward(*args: Any) -> Any:
        return _run(ops.tangent, *args[:-1], True)  # its derivative needs m and s

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, _, s0, v0, *coefficients, nonlinearity, form, reverse, _ = inputs
        e, _, m, s = output
        _save(ctx, (*coefficients, s0, v0, e, m, s))
        ctx.options = nonlinearity, form, reverse
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, g: Tensor | None, g_n: Tensor | None, d: Tensor | None, f: Tensor | None
    ) -> Gradients:
        *coefficients, s0, v0, e, m, s = ctx.saved_tensors
        _, form, _ = ctx.options
        if form == "rate":
            f = None  # the gradient of the empty s
        if g is None and g_n is None and d is None and f is None:
            return (None,) * 14
        to_w, to_q, to_r, to_s0, to_v0, *to_coefficients = ctx.needs_input_grad[:8]
        delta, ds0, dv0, a, y = ops.adjoint(
            g, d, f, g_n, *coefficients, *ctx.options, None, to_s0 or to_v0, True
        )
        gradients = _Linear.coefficient_gradients(
            ctx, to_coefficients, (delta, a, y), (e, m, s), (s0, v0)
        )
        return (
            delta if to_w else None, a if to_q else None, y if to_r else None,
            ds0 if to_s0 else None, dv0 if to_v0 else None, *gradients, *(None,) * 6,
        )  # fmt: skip

    @_jvp
    def jvp(ctx: Any, primals: Any, *tangents: Any) -> Any:
        *coefficients, s0, v0, e, m, s = primals
        saved, _, alpha, *layout = coefficients
        w, q, r, s0_t, v0_t, saved_t, w_hh_t, alpha_t, *_ = tangents
        _, form, reverse = ctx.options
        layout.append(reverse)
        if w_hh_t is not None:
            w = _add(w, ops.previous(e, s0, *layout) @ w_hh_t.mT)
        p_t, r_t = _gate_tangent(ctx, saved, alpha, saved_t, alpha_t)
        if p_t is not None:
            q = _add(q, p_t * m)
        if r_t is not None:
            r = _add(r, r_t * s)
        if alpha_t is not None:
            before = ops.previous(*((s, v0) if form == "potential" else (e, s0)), *layout)
            q = _add(q, -alpha_t * before)
        return ops.tangent(w, q, r, s0_t, v0_t, *coefficients, *ctx.options, True)


def _check_not_clipped(ctx: Any) -> None:
    if ctx.grad_clip is not None:
        raise NotImplementedError(
            "fusedrnn: grad_clip must be None for second derivatives, because clipped gradients "
            f"are not those of a function; got {ctx.grad_clip}"
        )


class FusedRNNAdjoint(_Linear):
    op = ops.adjoint

    @staticmethod
    def forward(*args: Any) -> Any:
        return _run(ops.adjoint, *args[:-1], True)  # its derivative needs a and y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, _, _, *coefficients, nonlinearity, form, reverse, grad_clip, to_h0, _ = inputs
        delta, dh0, _, a, y = output
        ctx.grad_clip = grad_clip
        _save(ctx, (*coefficients, delta, a, y))
        ctx.options, ctx.to_h0 = (nonlinearity, form, reverse), to_h0
        ctx.batch = dh0.size(0)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any,
        w: Tensor | None,
        s0: Tensor | None,
        v0: Tensor | None,
        q: Tensor | None,
        r: Tensor | None,
    ) -> Gradients:
        _check_not_clipped(ctx)
        *coefficients, delta, a, y = ctx.saved_tensors
        _, form, _ = ctx.options
        if not ctx.to_h0:
            s0 = v0 = None
        if form == "rate":
            r = None  # the gradient of the empty y
        if form != "potential":
            v0 = None  # the gradient of the empty dv0
        if w is None and s0 is None and v0 is None and q is None and r is None:
            return (None,) * 15
        to_g, to_d, to_f, to_g_n, *to_coefficients = ctx.needs_input_grad[:7]
        e, last, m, s = ops.tangent(w, q, r, s0, v0, *coefficients, *ctx.options, True)
        gradients = _Linear.coefficient_gradients(
            ctx, to_coefficients, (delta, a, y), (e, m, s), (s0, v0)
        )
        return (
            e if to_g else None, m if to_d else None, s if to_f else None,
            last if to_g_n else None, *gradients, *(None,) * 8,
        )  # fmt: skip

    @_jvp
    def jvp(ctx: Any, primals: Any, *tangents: Any) -> Any:
        _check_not_clipped(ctx)
        *coefficients, delta, a, y = primals
        saved, _, alpha, *layout = coefficients
        g, d, f, g_n, saved_t, w_hh_t, alpha_t, *_ = tangents
        _, form, reverse = ctx.options
        layout.append(reverse)
        # What a step receives from the step before also depends on W_hh and alpha directly.
        product = None if w_hh_t is None else delta @ w_hh_t  # to y, or to a with the form rate
        carry = None if alpha_t is None else -alpha_t * a  # to a, or to y with the form inside
        if form != "potential":
            product, carry = _add(product, carry), None
        if product is not None:
            g = _add(g, ops.following(product, *layout))
        if carry is not None:
            f = _add(f, ops.following(carry, *layout))
        p_t, r_t = _gate_tangent(ctx, saved, alpha, saved_t, alpha_t)
        if p_t is not None:
            d = _add(d, p_t * a)
        if r_t is not None:
            f = _add(f, r_t * y)
        delta_t, dh0_t, dv0_t, a_t, y_t = ops.adjoint(
            g, d, f, g_n, *coefficients, *ctx.options, None, ctx.to_h0, True
        )
        if ctx.to_h0:
            if product is not None:
                dh0_t = dh0_t + ops.following_first(product, *layout, ctx.batch)
            if carry is not None:
                dv0_t = dv0_t + ops.following_first(carry, *layout, ctx.batch)
        return delta_t, dh0_t, dv0_t, a_t, y_t


class ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clipped elementwise to ``[-limit, limit]``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(state: Tensor, limit: float) -> Tensor:
        return state.view_as(state)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.clamp(-ctx.limit, ctx.limit), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


for _name, _function in (
    ("activation", FusedRNN),
    ("tangent", FusedRNNTangent),
    ("adjoint", FusedRNNAdjoint),
):
    ops.LIBRARY.impl(_name, _function.differentiate, "Autograd")
