"""The functions behind the modules: one layer, one direction, one call of the engine."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from . import _ops, reference
from . import autograd as _autograd  # noqa: F401  (gives the ops their derivatives)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "meta")


@functools.cache
def _warn_slow(reason: str) -> None:
    warnings.warn(f"fusedrnn: {reason}; a plain loop over time runs instead", stacklevel=4)


def _has_kernel(x: Tensor) -> bool:
    if x.device.type not in _DEVICES:
        _warn_slow(f"no kernel for {x.device.type} tensors")
    elif x.dtype not in _DTYPES:
        _warn_slow(f"no kernel for {x.dtype}")
    else:
        return True
    return False


def _autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Like torch's own rule for RNNs: everything runs in the low precision."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _alpha_per_unit(alpha: Tensor | float | None, like: Tensor) -> Tensor | None:
    if alpha is None:
        return None
    if not isinstance(alpha, Tensor):
        alpha = torch.full((), float(alpha), dtype=like.dtype, device=like.device)
    return alpha.to(like.dtype).expand(like.size(0))


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
    if torch.is_autocast_enabled(x.device.type):
        x, w_ih, w_hh, b_ih, b_hh, h0 = _autocast(x.device.type, x, w_ih, w_hh, b_ih, b_hh, h0)
    if not _has_kernel(x):
        return reference.rnn(
            x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity=nonlinearity, reverse=reverse,
            batch_sizes=batch_sizes, keep=keep, alpha=alpha,
        )  # fmt: skip
    h, h_n, _ = _ops.activation(
        x, w_ih, b_ih, b_hh, h0, w_hh, _alpha_per_unit(alpha, w_hh), keep, batch_sizes,
        nonlinearity, reverse,
    )  # fmt: skip
    return h, h_n


def recurrence(
    u: Tensor,
    h0: Tensor | None,
    w_hh: Tensor,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
    keep: Tensor | None = None,
    alpha: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    return rnn(
        u, None, w_hh, None, None, h0, nonlinearity=nonlinearity, reverse=reverse,
        batch_sizes=batch_sizes, keep=keep, alpha=alpha,
    )  # fmt: skip


def rnn_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    nonlinearity: str = "tanh",
) -> Tensor:
    return rnn(x.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, h, nonlinearity=nonlinearity)[1]
