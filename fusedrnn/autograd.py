"""Derivatives of the engine's ops: hand-written backpropagation through time and all others.

The engine has three ops (formulas in ``csrc/epilogues.h``). ``k[t] = keep[t] * h[t-1]`` is the
state that step t starts from, and ``p = alpha * phi'(z)`` is its gate:

    activation  z[t] = u[t] + k[t] @ W.T
                h[t] = (1 - alpha) k[t] + alpha phi(z[t])
    tangent     m[t] = w[t] + k[t] @ W.T                      (here k[t] = keep[t] * s[t-1])
                s[t] = q[t] + p[t] m[t] + (1 - alpha) k[t]
    adjoint     a[t] = g[t] + keep[t+1] ((1 - alpha) a[t+1] + delta[t+1] @ W)
                delta[t] = d[t] + p[t] a[t]

``tangent`` is the directional derivative of ``activation``; ``adjoint`` is the transpose of
``tangent``. Both are linear in their driving inputs, so their own derivatives need only these two
ops again. Three ops therefore give derivatives of every order in both modes. Everything that is not
a recurrence is a GEMM over all rows or elementwise: plain torch code, which is differentiable
already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn import functional as F

from . import _ops, bptt, vmap  # noqa: F401  (vmap registers the batching rules)
from ._C import forward_mode, saving_z
from .streams import transformed

Gradients = tuple[Tensor | None, ...]
Walk = tuple[Tensor | None, Tensor | None, bool]  # keep, batch_sizes, reverse


def _where_positive(h: Tensor, yes: Tensor, no: float) -> Tensor:
    return torch.where(h <= 0, torch.full_like(h, no), yes)


# phi'(z) as a function of the tensor that the forward pass saved, as in csrc/epilogues.h, and the
# derivative of that function. Used only for derivatives of second and higher order.
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


def _slope_of_saved(saved: Tensor, nonlinearity: str) -> Tensor | float:
    """Return the derivative with respect to z of the tensor that the forward pass saved."""
    return 1.0 if nonlinearity in saving_z else _SLOPES[nonlinearity][0](saved)


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
    with torch._C._AutoDispatchBelowAutograd():
        if not transformed():
            return op(*args)
        # torch disables gradients in a Function's forward. That must affect its own level only, so
        # restore the caller's modes for the next level.
        with (
            torch.set_grad_enabled(_modes.gradients),
            forward_ad._set_fwd_grad_enabled(_modes.tangents),
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
        with forward_ad._set_fwd_grad_enabled(True):
            # The same as forward_ad.unpack_dual, which cannot be used because compiled code does
            # not set its current level. The level is always 0.
            primals = [t if t is None else torch._VF._unpack_dual(t, level=0)[0] for t in saved]  # type: ignore[attr-defined]
            return function(ctx, primals, *tangents)

    return staticmethod(jvp)


class _Op(_SingleLevelFunction):
    """An autograd.Function registered as the Autograd kernel of an op.

    Every call of the op therefore reaches the derivative: from eager code, a compiler or a
    transform of torch.func. Transforms are handled above the Autograd key, one level at a time, so
    the base class is the single-level Function that torch.func itself uses. (Its ``apply`` is also
    10 us faster, because it does not bind the arguments to a signature.)
    """

    op: Callable[..., Any]

    # Compiled autograd requires this of every Function, but only torch.autograd.Function has it.
    _compiled_autograd_key = staticmethod(lambda ctx: (ctx._autograd_function_id,))

    @classmethod
    def differentiate(cls, *args: Any) -> Any:
        if transformed():  # called from one of its levels: differentiate at that level
            _modes.gradients = torch.is_grad_enabled()
            _modes.tangents = forward_ad._is_fwd_grad_enabled()
            with enable_single_level_autograd_function():
                return cls.apply(*args)  # type: ignore[attr-defined]
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
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
    op = torch.ops.fusedrnn.activation.default

    @staticmethod
    def forward(*args: Any) -> Any:
        return _run(_ops.activation, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w_ih, _, _, h0, w_hh, alpha, keep, batch_sizes, nonlinearity, reverse = inputs
        h, _, saved = output
        saves = alpha is not None or nonlinearity in saving_z
        _save(ctx, (x, w_ih, h0, w_hh, alpha, keep, batch_sizes, h, saved if saves else None))
        ctx.nonlinearity, ctx.reverse = nonlinearity, reverse
        ctx.set_materialize_grads(False)

    @staticmethod
    @_with_remedy
    def backward(  # type: ignore[override]
        ctx: Any, g: Tensor | None, g_n: Tensor | None, g_saved: Tensor | None
    ) -> Gradients:
        x, w_ih, h0, w_hh, alpha, keep, batch_sizes, h, saved = ctx.saved_tensors
        d = None
        if g_saved is not None and saved is not None:
            d = _slope_of_saved(saved, ctx.nonlinearity) * g_saved
        if g is None and g_n is None and d is None:
            return (None,) * 11
        gradients = bptt.bptt(
            g, d, g_n, x, w_ih, h0, w_hh, alpha, keep, batch_sizes, h, saved, ctx.nonlinearity,
            ctx.reverse, ctx.needs_input_grad[:7],
        )  # fmt: skip
        return *gradients, None, None, None, None

    @_jvp
    def jvp(ctx: Any, primals: Any, *tangents: Any) -> Any:
        x, w_ih, h0, w_hh, alpha, keep, batch_sizes, h, saved = primals
        x_t, w_ih_t, b_ih_t, b_hh_t, h0_t, w_hh_t, alpha_t, *_ = tangents
        walk = (keep, batch_sizes, ctx.reverse)
        q = None
        if w_ih is None:
            w = x_t
        else:
            w = _add(
                None if x_t is None else x_t @ w_ih.mT, None if w_ih_t is None else x @ w_ih_t.mT
            )
        for bias_t in (b_ih_t, b_hh_t):
            w = _add(w, None if bias_t is None else bias_t.expand_as(h))
        if w_hh_t is not None:
            w = _add(w, _ops.previous(h, h0, *walk) @ w_hh_t.mT)
        if alpha_t is not None:
            q = alpha_t * (_value(saved, ctx.nonlinearity) - _ops.previous(h, h0, *walk))
        s, s_n, m = _ops.tangent(
            w, q, h0_t, h if saved is None else saved, w_hh, alpha, keep, batch_sizes,
            ctx.nonlinearity, ctx.reverse, saved is not None,
        )  # fmt: skip
        if saved is None:
            return s, s_n, h.new_zeros(0)
        return s, s_n, _slope_of_saved(saved, ctx.nonlinearity) * m


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _gate_tangent(
    saved: Tensor, alpha: Tensor | None, saved_t: Tensor | None, alpha_t: Tensor | None, name: str
) -> Tensor | None:
    """Compute the tangent of the gate ``p = alpha * slope(saved)``."""
    slope, curvature = _SLOPES[name]
    p_t = None
    if saved_t is not None:
        p_t = curvature(saved) * saved_t
        p_t = p_t if alpha is None else alpha * p_t
    return _add(p_t, None if alpha_t is None else alpha_t * slope(saved))


class _Linear(_Op):
    """Base class of tangent and adjoint.

    The two are transposes of each other, so the gradients of their coefficients ``saved``, ``W_hh``
    and ``alpha`` are the same function of the results of both recurrences.
    """

    @staticmethod
    def coefficient_gradients(
        ctx: Any, walk: Walk, delta: Tensor, a: Tensor, s: Tensor, s0: Tensor | None, m: Tensor
    ) -> Gradients:
        saved, _, alpha = ctx.saved_tensors[:3]
        _, _, _, to_saved, to_w_hh, to_alpha, *_ = ctx.needs_input_grad
        dsaved = dw_hh = dalpha = None
        slope, curvature = _SLOPES[ctx.nonlinearity]
        if to_saved:
            dsaved = a * m * curvature(saved)
            dsaved = dsaved if alpha is None else alpha * dsaved
        if to_w_hh:
            dw_hh = _ops.recurrent_product(delta, s, s0, *walk)
        if to_alpha:
            dalpha = _sum_rows(a * (m * slope(saved) - _ops.previous(s, s0, *walk)))
        return dsaved, dw_hh, dalpha


class FusedRNNTangent(_Linear):
    op = torch.ops.fusedrnn.tangent.default

    @staticmethod
    def forward(*args: Any) -> Any:
        return _run(_ops.tangent, *args[:-1], True)  # its derivative needs m

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, s0, saved, w_hh, alpha, keep, batch_sizes, nonlinearity, reverse, _ = inputs
        s, _, m = output
        _save(ctx, (saved, w_hh, alpha, keep, batch_sizes, s0, s, m))
        ctx.nonlinearity, ctx.reverse = nonlinearity, reverse
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_n: Tensor | None, d: Tensor | None) -> Gradients:  # type: ignore[override]
        if g is None and g_n is None and d is None:
            return (None,) * 11
        saved, w_hh, alpha, keep, batch_sizes, s0, s, m = ctx.saved_tensors
        to_w, to_q, to_s0, *_ = ctx.needs_input_grad
        walk = (keep, batch_sizes, ctx.reverse)
        delta, ds0, a = _ops.adjoint(
            g, d, g_n, saved, w_hh, alpha, keep, batch_sizes, ctx.nonlinearity, ctx.reverse,
            to_s0, True,
        )  # fmt: skip
        coefficients = _Linear.coefficient_gradients(ctx, walk, delta, a, s, s0, m)
        return (
            delta if to_w else None, a if to_q else None, ds0 if to_s0 else None, *coefficients,
            *(None,) * 5,
        )  # fmt: skip

    @_jvp
    def jvp(ctx: Any, primals: Any, *tangents: Any) -> Any:
        saved, w_hh, alpha, keep, batch_sizes, s0, s, m = primals
        w, q, s0_t, saved_t, w_hh_t, alpha_t, *_ = tangents
        walk = (keep, batch_sizes, ctx.reverse)
        if w_hh_t is not None:
            w = _add(w, _ops.previous(s, s0, *walk) @ w_hh_t.mT)
        p_t = _gate_tangent(saved, alpha, saved_t, alpha_t, ctx.nonlinearity)
        if p_t is not None:
            q = _add(q, p_t * m)
        if alpha_t is not None:
            q = _add(q, -alpha_t * _ops.previous(s, s0, *walk))
        return _ops.tangent(
            w, q, s0_t, saved, w_hh, alpha, keep, batch_sizes, ctx.nonlinearity, ctx.reverse, True
        )


class FusedRNNAdjoint(_Linear):
    op = torch.ops.fusedrnn.adjoint.default

    @staticmethod
    def forward(*args: Any) -> Any:
        return _run(_ops.adjoint, *args[:-1], True)  # its derivative needs a

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, _, saved, w_hh, alpha, keep, batch_sizes, nonlinearity, reverse, to_h0, _ = inputs
        delta, dh0, a = output
        _save(ctx, (saved, w_hh, alpha, keep, batch_sizes, delta, a))
        ctx.nonlinearity, ctx.reverse, ctx.to_h0 = nonlinearity, reverse, to_h0
        ctx.batch = dh0.size(0)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, w: Tensor | None, s0: Tensor | None, q: Tensor | None) -> Gradients:  # type: ignore[override]
        if not ctx.to_h0:
            s0 = None
        if w is None and s0 is None and q is None:
            return (None,) * 12
        saved, w_hh, alpha, keep, batch_sizes, delta, a = ctx.saved_tensors
        to_g, to_d, to_g_n, *_ = ctx.needs_input_grad
        walk = (keep, batch_sizes, ctx.reverse)
        s, s_n, m = _ops.tangent(
            w, q, s0, saved, w_hh, alpha, keep, batch_sizes, ctx.nonlinearity, ctx.reverse, True
        )
        coefficients = _Linear.coefficient_gradients(ctx, walk, delta, a, s, s0, m)
        return (
            s if to_g else None, m if to_d else None, s_n if to_g_n else None, *coefficients,
            *(None,) * 6,
        )  # fmt: skip

    @_jvp
    def jvp(ctx: Any, primals: Any, *tangents: Any) -> Any:
        saved, w_hh, alpha, keep, batch_sizes, delta, a = primals
        g, d, g_n, saved_t, w_hh_t, alpha_t, *_ = tangents
        walk = (keep, batch_sizes, ctx.reverse)
        # The terms that step t + 1 adds to a[t] also depend on W_hh and alpha directly.
        handed = _add(
            None if w_hh_t is None else delta @ w_hh_t, None if alpha_t is None else -alpha_t * a
        )
        if handed is not None:
            g = _add(g, _ops.following(handed, *walk))
        p_t = _gate_tangent(saved, alpha, saved_t, alpha_t, ctx.nonlinearity)
        if p_t is not None:
            d = _add(d, p_t * a)
        delta_t, dh0_t, a_t = _ops.adjoint(
            g, d, g_n, saved, w_hh, alpha, keep, batch_sizes, ctx.nonlinearity, ctx.reverse,
            ctx.to_h0, True,
        )  # fmt: skip
        if handed is not None and ctx.to_h0:
            dh0_t = dh0_t + _ops.following_first(handed, *walk, ctx.batch)
        return delta_t, dh0_t, a_t


_LIBRARY = torch.library.Library("fusedrnn", "IMPL")
for _name, _function in (
    ("activation", FusedRNN),
    ("tangent", FusedRNNTangent),
    ("adjoint", FusedRNNAdjoint),
):
    _LIBRARY.impl(_name, _function.differentiate, "Autograd")
