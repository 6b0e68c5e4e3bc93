"""The functions behind the modules: one call of the engine per layer and direction."""

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
# Evaluated once, at import: Dynamo of torch 2.11 cannot trace is_autocast_available.
_AUTOCAST = [d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d)]
_DEVICES = ("cpu", "meta", "cuda") if _ops._C.has_cuda else ("cpu", "meta")

# Below this many multiplications per step, torch.rnn_tanh_cell is at least as fast as the engine:
# forward alone, and with backward. Measured with `bench/bench_rnn.py --set cell` on AVX-512.
_SMALL_STEP = 1 << 14
_SMALL_STEP_WITH_GRAD = 3 << 20


@functools.cache
def _warn_slow(reason: str) -> None:
    warnings.warn(f"fusedrnn: {reason}; a plain loop over time runs instead", stacklevel=5)


def _autocast(device_type: str, *tensors: Tensor | None) -> Any:
    """Cast to the autocast dtype, as torch does for its own RNNs: all runs in low precision."""
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
    """Register the same rule for direct calls of the op, as an exported program makes them."""
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
            if number <= info.tiny * info.eps / 2:  # half of the smallest number above 0
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
    """Read B when compiling: a data-dependent output size would break the graph at every layer.

    This call breaks it once, or not at all where a single graph is required. Return None while
    ``torch.export`` traces ``pack_padded_sequence``: by a bug in torch, ``batch_sizes`` is floating
    point there.
    """
    if batch_sizes.dtype != torch.int64:
        return None
    torch._check(batch_sizes.size(0) > 0, lambda: "Expected sequence length to be larger than 0")
    return batch_sizes[0].item()  # type: ignore[return-value]  # int() would make it a constant


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
    r"""Run one layer of an RNN in one direction, with one call of the engine.

    .. math::
        k_t &= keep_t \, h_{t-1} \\
        h_t &= (1 - \alpha) k_t
               + \alpha \, \phi(x_t W_{ih}^T + b_{ih} + k_t W_{hh}^T + b_{hh})

    With T steps, B batch rows, I inputs and H hidden units:

    Args:
        x: Input, ``[T, B, I]`` with any strides; packed, ``[N, I]``.
        w_ih: Input weight, ``[H, I]``; None if ``x`` is ``[T, B, H]`` and takes the place of
            ``x @ w_ih.T`` (:func:`recurrence`).
        w_hh: Recurrent weight, ``[H, H]``.
        b_ih, b_hh: Biases, ``[H]``, or None.
        h0: State before the first step, ``[B, H]``; None means zeros.
        nonlinearity: The function phi: ``"tanh"``, ``"relu"``, ``"identity"``, ``"sigmoid"``,
            ``"softplus"``, ``"retanh"`` (relu of tanh), ``"hardtanh"``, ``"leaky_relu"`` (slope
            0.01) or ``"elu"``.
        reverse: Run from the last step to the first; ``h0`` is then the state from which the last
            step starts.
        batch_sizes: For packed input, the number of active rows at each step, ``[T]``, int64 on the
            CPU: that of a ``torch.nn.utils.rnn.PackedSequence``, whose ``data`` is ``x``.
        keep: Bool, ``[T, B]`` or packed ``[N]``: False resets a row's state to 0 before that step
            (where an episode starts). None means no resets.
        alpha: Leak in (0, 1], ``dt / tau`` of a continuous-time RNN: a number, or a tensor ``[]``
            or ``[H]``, which may be learned and reach 0. None means 1. On a GPU, the values of a
            tensor are not checked, since that would wait for the device.

    Returns:
        The state ``h`` of every step, ``[T, B, H]`` or packed ``[N, H]``, and the last state of
        each row, ``[B, H]``, which shares no memory with the former.

    All tensors but ``keep`` and ``batch_sizes`` must have the same dtype, to which ``alpha`` is
    converted: float32, float64, bfloat16 or float16. The last two are computed in float32. All but
    ``keep`` and ``batch_sizes`` have derivatives of every order, in reverse and forward mode
    (``fusedrnn/autograd.py``). Other dtypes and devices run as a plain loop, with one warning.

    Raises:
        RuntimeError: Sizes, dtypes or devices do not match, or T is 0.
        TypeError: An argument has the wrong type, a tensor is not dense, ``x`` has an integer
            dtype, or ``alpha`` is complex.
        ValueError: The nonlinearity is unknown, or ``alpha`` has a wrong shape or values outside
            its range.
    """
    try:
        device = x.device.type
    except AttributeError:  # not a tensor: a list or a NumPy array
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
        # Check types only after an error, so that valid calls do not pay for it.
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
    """Run the recurrence alone: :func:`rnn` with ``u [T, B, H]`` in place of the input product.

    ``h[t] = (1 - alpha) k + alpha * phi(u[t] + k @ w_hh.T)`` with ``k = keep[t] * h[t-1]``, from
    ``h0 [B, H]``, or from zeros if it is None. For the other arguments, the results and the errors
    see :func:`rnn`.
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
    """Run :func:`rnn` as a plain loop, for dtypes and devices that have no kernel."""
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
    """Compute the state after one step from ``h [B, H]`` with input ``x [B, I]``.

    On a CPU, a small step is dominated by overhead, and torch's own op, differentiated in C++, has
    the least. On a GPU that op is a handful of launches, and the engine needs one.
    """
    # Not when compiling, which would specialise on the sizes it saw; not under a transform, because
    # vmap has no rule for torch's op.
    if x.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed()):
        small = _SMALL_STEP_WITH_GRAD if torch.is_grad_enabled() else _SMALL_STEP
        if x.size(0) * (w_ih.numel() + w_hh.numel()) < small:
            cell = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
            return cell(x, h, w_ih, w_hh, b_ih, b_hh)
    return rnn(x.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, h, nonlinearity=nonlinearity)[1]
