"""The functions behind the modules: one layer, one direction, one call of the engine."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from . import _ops, checks, onnx, reference
from .autograd import FusedRNN
from .expanded_weights import ExpandedWeight
from .streams import transformed

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Asked once: Dynamo of torch 2.11 cannot trace the question.
_AUTOCAST = [d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d)]
_DEVICES = ("cpu", "meta", "cuda") if _ops._C.has_cuda else ("cpu", "meta")

# Multiplications of a step up to which torch.rnn_tanh_cell is as fast as the engine or faster,
# forward and with backward: measured with `bench/bench_rnn.py --set cell` on AVX-512.
_SMALL_STEP = 1 << 14
_SMALL_STEP_WITH_GRAD = 3 << 20


@functools.cache
def _warn_slow(reason: str) -> None:
    warnings.warn(f"fusedrnn: {reason}; a plain loop over time runs instead", stacklevel=5)


def _autocast(device_type: str, *tensors: Tensor | None) -> Any:
    """Like torch's own rule for RNNs: everything runs in the low precision."""
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def _register_autocast(device_type: str, key: str) -> None:
    """The same for whoever calls the op itself: an exported program."""
    off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def rule(x: Any, w_ih: Any, b_ih: Any, b_hh: Any, h0: Any, w_hh: Any, *others: Any) -> Any:
        alpha, *walk = others
        cast = _autocast(device_type, x, w_ih, b_ih, b_hh, h0, w_hh, alpha)
        with torch._C._ExcludeDispatchKeyGuard(off):
            return _ops.activation(*cast, *walk)

    _LIBRARY.impl("activation", rule, key)


_LIBRARY = torch.library.Library("fusedrnn", "IMPL")
_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


def _alpha_per_unit(alpha: Tensor | float, like: Tensor) -> Tensor:
    if like.dim() == 0:
        raise RuntimeError("fusedrnn: w_hh must be [H, H], got []")
    size = like.size(0)
    if not isinstance(alpha, Tensor):
        try:
            inside, number = 0 < alpha <= 1, float(alpha)
        except (TypeError, ValueError):  # a string, a complex number, an array of more than one
            raise TypeError(
                f"fusedrnn: alpha must be a number or a tensor, got {type(alpha).__name__}"
            ) from None
        if not inside:
            raise ValueError(f"fusedrnn: alpha must be in (0, 1], got {alpha}")
        if number < 1e-7:
            info = torch.finfo(like.dtype)
            if number <= info.tiny * info.eps / 2:  # half of the least number above 0
                raise ValueError(
                    f"fusedrnn: alpha must be in (0, 1], got {alpha}, which is 0 in {like.dtype}"
                )
        return torch.full((), number, dtype=like.dtype, device=like.device).expand(size)
    if alpha.is_complex():
        raise TypeError(f"fusedrnn: alpha must be real, got {alpha.dtype}")
    if alpha.dim() > 0 and alpha.shape != (size,):
        raise ValueError(
            f"fusedrnn: alpha must be a number or a tensor [] or [{size}], got {list(alpha.shape)}"
        )
    if alpha.dtype != like.dtype:
        alpha = alpha.to(like.dtype)
    return alpha if alpha.dim() > 0 else alpha.expand(size)


def rows_of(batch_sizes: Tensor) -> int | None:
    """B, for compilers: an output whose size only data tell would break a graph at every layer.

    This breaks it once, or not where all must be one graph. None where ``torch.export`` traces
    ``pack_padded_sequence``, which has ``batch_sizes`` of floats there, by a mistake of torch's.
    """
    if batch_sizes.dtype != torch.int64:
        return None
    torch._check(batch_sizes.size(0) > 0, lambda: "Expected sequence length to be larger than 0")
    return batch_sizes[0].item()  # type: ignore[return-value]  # int() would fix its value


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
    r"""Run one layer of an RNN in one direction, as one call of the engine.

    .. math::
        k_t &= keep_t \, h_{t-1} \\
        h_t &= (1 - \alpha) k_t
               + \alpha \, \phi(x_t W_{ih}^T + b_{ih} + k_t W_{hh}^T + b_{hh})

    With T steps, B batch rows, I inputs and H hidden units:

    Args:
        x: Input, ``[T, B, I]`` with any strides; packed, ``[N, I]``.
        w_ih: Input weight, ``[H, I]``; None where ``x`` is ``[T, B, H]`` and drives the units as
            it is (:func:`recurrence`).
        w_hh: Recurrent weight, ``[H, H]``.
        b_ih, b_hh: Biases, ``[H]``, or None.
        h0: State before the first step, ``[B, H]``; None is zeros.
        nonlinearity: The function phi: ``"tanh"``, ``"relu"``, ``"identity"``, ``"sigmoid"``,
            ``"softplus"``, ``"retanh"`` (relu of tanh), ``"hardtanh"``, ``"leaky_relu"`` (slope
            0.01) or ``"elu"``.
        reverse: Walk from the last step to the first; ``h0`` then comes before the last.
        batch_sizes: For packed input, how many rows are alive at each step, ``[T]``, int64 on the
            CPU: that of a ``torch.nn.utils.rnn.PackedSequence``, whose ``data`` is ``x``.
        keep: Bool, ``[T, B]`` or packed ``[N]``: False forgets a row's state before that step (an
            episode starts there). None keeps all.
        alpha: Leak in (0, 1], ``dt / tau`` of a continuous-time RNN: a number, or a tensor ``[]``
            or ``[H]``, which may be learned and reach 0. None is 1. On a GPU, the values of a
            tensor are not checked, since that would wait for the device.

    Returns:
        ``h`` of every step, ``[T, B, H]`` or packed ``[N, H]``, and each row's last one,
        ``[B, H]``, memory of its own.

    All tensors are float32, float64, bfloat16 or float16, alike; the last two are computed in
    float32. Everything but ``keep`` and ``batch_sizes`` has derivatives of every order, in reverse
    and forward mode (``fusedrnn/autograd.py``). Other dtypes and devices run as a plain loop, and a
    warning says so once.

    Raises:
        RuntimeError: Sizes, dtypes or devices do not go together, or T is 0.
        TypeError: An argument is of the wrong type, a tensor is not dense, ``x`` is of integers,
            or ``alpha`` is complex.
        ValueError: An unknown nonlinearity, an ``alpha`` of another shape, or with values out of
            its range.
    """
    try:
        device = x.device.type
    except AttributeError:  # no tensor: a list, or an array of NumPy's
        checks.check_types(
            x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity, reverse, batch_sizes, keep, alpha
        )
        raise
    if torch._C._is_any_autocast_enabled() and device in _AUTOCAST:
        x, w_ih, w_hh, b_ih, b_hh, h0 = _autocast(device, x, w_ih, w_hh, b_ih, b_hh, h0)
    if device not in _DEVICES or x.dtype not in _DTYPES:
        return _loop(x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity, reverse, batch_sizes, keep, alpha)
    # Call the op when tracing or a transform is active; otherwise call the kernel directly, which
    # saves one 4 us dispatch.
    compiling = torch.compiler.is_compiling()
    watched = (
        compiling
        or transformed()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or type(w_hh) is ExpandedWeight
    )
    activation = _ops.activation if watched else FusedRNN.differentiate
    if watched and torch.onnx.is_in_onnx_export():
        activation = onnx.activation if compiling else onnx.traced_activation
    elif compiling and h0 is None and batch_sizes is not None:
        rows = rows_of(batch_sizes)
        h0 = None if rows is None else x.new_zeros(rows, w_hh.size(0))
    try:
        if alpha is not None:
            alpha = _alpha_per_unit(alpha, w_hh)
        h, h_n, _ = activation(
            x, w_ih, b_ih, b_hh, h0, w_hh, alpha, keep, batch_sizes, nonlinearity, reverse
        )
    except (AttributeError, TypeError, RuntimeError):
        # Only after an error, so that calls do not pay for it.
        checks.check_types(
            x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity, reverse, batch_sizes, keep, alpha
        )
        raise
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
    """The bare engine: :func:`rnn` driven by ``u [T, B, H]`` itself, whatever made it.

    ``h[t] = (1 - alpha) k + alpha * phi(u[t] + k @ w_hh.T)`` with ``k = keep[t] * h[t-1]``, from
    ``h0 [B, H]``, or zeros if that is None; see :func:`rnn` for the other arguments, the results
    and the errors.
    """
    return rnn(
        u, None, w_hh, None, None, h0, nonlinearity=nonlinearity, reverse=reverse,
        batch_sizes=batch_sizes, keep=keep, alpha=alpha,
    )  # fmt: skip


def _loop(
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: Tensor | None,
    keep: Tensor | None,
    alpha: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """:func:`rnn` for dtypes and devices that have no kernel."""
    checks.check_types(
        x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity, reverse, batch_sizes, keep, alpha
    )
    if alpha is not None:
        alpha = _alpha_per_unit(alpha, w_hh)
    checks.check_for_loop(x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity, batch_sizes, keep, alpha)
    device = x.device.type
    why = f" ({_ops.build_info()['cuda']})" if device == "cuda" else ""
    _warn_slow(f"no kernel for {x.dtype} tensors on {device}{why}")
    return reference.rnn(
        x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity=nonlinearity, reverse=reverse,
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
    """One step: the state after ``h [B, H]`` with input ``x [B, I]``.

    On a CPU a small step is all overhead, and torch's own op, differentiated in C++, has least of
    it. On a GPU that op is a handful of launches, and ours is one.
    """
    # Compiled code would be bound to the sizes it saw; and vmap has no rule for torch's op.
    if x.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed()):
        small = _SMALL_STEP_WITH_GRAD if torch.is_grad_enabled() else _SMALL_STEP
        if x.size(0) * (w_ih.numel() + w_hh.numel()) < small:
            cell = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
            return cell(x, h, w_ih, w_hh, b_ih, b_hh)
    return rnn(x.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, h, nonlinearity=nonlinearity)[1]
