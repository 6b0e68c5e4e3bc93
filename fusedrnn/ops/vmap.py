"""Batching rules of the ops for vmap: any argument may have one more dimension, of size V.

Rows of the batch are independent in a recurrence, so V problems of B rows that share ``W_hh`` and
``alpha`` are one problem of B V rows. V becomes the fastest-varying dimension of the batch,

    x [..., B, V, I]  ->  [..., B V, I],    sample v's row b is row b V + v,

which works for packed sequences, too: step t then has ``batch_sizes[t] V`` rows, which is still
non-increasing. The rows of one sample are equally spaced over all steps, so the GEMMs over all rows
in the derivatives, including per-sample gradients, are one bmm of views.

An ensemble has V matrices ``W_hh``. It takes V calls of the engine, each at full speed.

An ``alpha`` per step and row is folded like a series.

The rules apply below the derivatives of the ops, so a derivative is batched by batching the ops
that compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops

Results = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


def _fold(tensor: Tensor | None, dim: int | None, size: int, place: int = -2) -> Tensor | None:
    """Fold V into the batch: ``[..., B, *]`` with V at ``dim`` becomes ``[..., B V, *]``.

    If ``dim`` is None, all samples get the same values. V is moved to position ``place``, right
    after B and counted from the end.
    """
    if tensor is None:
        return None
    if dim is not None:
        tensor = tensor.movedim(dim, place)
    else:
        tensor = tensor.unsqueeze(place)
        shape = list(tensor.shape)
        shape[place] = size
        tensor = tensor.expand(shape)
    return tensor.flatten(place - 1, place)


def _unfold(results: tuple[Tensor, ...], size: int) -> Results:
    """Unfold ``[..., B V, H]`` to ``[..., B, V, H]``. A result that was not wanted is ``[0]``."""
    wanted = [result.dim() > 1 for result in results]
    return (
        tuple(t.unflatten(-2, (-1, size)) if w else t for t, w in zip(results, wanted)),
        tuple(t.dim() - 1 if w else None for t, w in zip(results, wanted)),
    )


def _each(op: Callable[..., Any], size: int, in_dims: Any, args: Any) -> Results:
    """Call the op once for each member of an ensemble."""
    members = zip(*(a.unbind(d) if d is not None else [a] * size for a, d in zip(args, in_dims)))
    results = zip(*(op(*member) for member in members))
    stacked = tuple(map(torch.stack, results))
    return stacked, (0,) * len(stacked)


def _none(rule: Callable[..., Results], info: Any, in_dims: Any, args: Any) -> Results:
    """Handle an empty vmap: run one sample of zeros to get the shapes, then drop it."""
    one = [
        a if d is None else a.new_zeros((*a.shape[:d], 1, *a.shape[d + 1 :]))
        for a, d in zip(args, in_dims)
    ]
    results, dims = rule(info._replace(batch_size=1), in_dims, *one)
    return tuple(t if d is None else t.narrow(d, 0, 0) for t, d in zip(results, dims)), dims


def _drive(args: Any, in_dims: Any) -> Tensor:
    """Compute ``u = x @ w_ih.T + b_ih + b_hh`` as ``[..., B, V, H]``.

    The dimension V has size 1 if no argument is batched.
    """

    def moved(tensor: Tensor, dim: int | None, place: int) -> Tensor:
        return tensor.unsqueeze(place) if dim is None else tensor.movedim(dim, place)

    x, w_ih, *biases = args
    u = moved(x, in_dims[0], -2)
    if w_ih is not None:
        u = torch.einsum("...vi,vhi->...vh", u, moved(w_ih, in_dims[1], 0))
    for bias, dim in zip(biases, in_dims[2:]):
        u = u if bias is None else u + moved(bias, dim, 0)
    return u


def _fold_input(args: Any, in_dims: Any, size: int) -> list[Tensor | None]:
    """Fold the arguments of ``activation`` before ``W_hh``."""
    x, w_ih, b_ih, b_hh, *states = args
    states = _fold_each(states, in_dims[4:], size)
    if in_dims[0] is not None and in_dims[1:4] == (None, None, None):
        return [_fold(x, in_dims[0], size), w_ih, b_ih, b_hh, *states]
    # Either V products, computed as one bmm, or one product for all samples, computed once.
    u = _drive(args[:4], in_dims[:4])
    return [u.expand(*u.shape[:-2], size, -1).flatten(-3, -2), None, None, None, *states]


def _fold_each(args: Any, in_dims: Any, size: int) -> list[Tensor | None]:
    """Fold series and states."""
    return [_fold(tensor, dim, size) for tensor, dim in zip(args, in_dims)]


def _register(name: str, before: int, flags: int, fold: Callable[..., Any]) -> None:
    """Register the batching rule of an op.

    ``fold`` folds V into the arguments before ``W_hh``, of which there are ``before``; the last
    ``flags`` arguments are not tensors.
    """
    op = getattr(ops, name)

    def rule(info: Any, in_dims: Any, *args: Any) -> Results:
        size = info.batch_size
        w_hh, alpha, *series, reset, batch_sizes = args[before:-flags]
        w_hh_dim, alpha_dim, *series_dims, reset_dim, batch_sizes_dim = in_dims[before:-flags]
        if batch_sizes_dim is not None:
            raise RuntimeError(
                "fusedrnn: vmap over batch_sizes is not supported: every sample must have the same "
                "batch_sizes"
            )
        if size == 0:
            return _none(rule, info, in_dims, args)
        varies = alpha is not None and alpha.dim() - (alpha_dim is not None) > 1
        if w_hh_dim is not None or (alpha_dim is not None and not varies):
            return _each(op, size, in_dims, args)
        rows = fold(args[:before], in_dims[:before], size)
        if varies:
            alpha = _fold(alpha, alpha_dim, size)
        series = _fold_each(series, series_dims, size)
        reset = _fold(reset, reset_dim, size, -1)
        batch_sizes = None if batch_sizes is None else batch_sizes * size
        results = op(*rows, w_hh, alpha, *series, reset, batch_sizes, *args[-flags:])
        return _unfold(results, size)

    torch.library.register_vmap(op.name(), rule)


_register("activation", 6, 4, _fold_input)
_register("tangent", 6, 4, _fold_each)
_register("adjoint", 5, 6, _fold_each)
