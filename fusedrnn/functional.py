"""The functions behind the modules: one call of the engine per layer and direction."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from . import checks, forms, ops, reference
from .blocks import Blocks, is_series
from .ops import autocast, expanded_weights, fake, onnx, vmap  # noqa: F401  (each registers rules)
from .ops.autograd import ClipGradient, FusedRNN
from .ragged import Ragged
from .torch_state import (
    any_autocast,
    compiling,
    exporting_onnx,
    must_dispatch,
    torch_check,
    transformed,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "meta", "cuda") if ops._C.has_cuda else ("cpu", "meta")

# Below this many multiplications per step, torch.rnn_tanh_cell is at least as fast as the engine.
# The first limit is for forward alone, the second for forward and backward. Measured with
# `bench/bench_rnn.py --set cell` on AVX-512.
_SMALL_STEP = 1 << 14
_SMALL_STEP_WITH_GRAD = 3 << 20


@functools.cache
def _warn_slow(reason: str) -> None:
    warnings.warn(f"fusedrnn: {reason}; a plain loop over time runs instead", stacklevel=5)


def rows_of(batch_sizes: Tensor) -> int | None:
    """Read B when compiling: a data-dependent output size would break the graph at every layer.

    This call breaks the graph only once, or not at all if the caller requires a single graph.
    Return None while ``torch.export`` traces ``pack_padded_sequence``: because of a bug in torch,
    ``batch_sizes`` is floating point there.
    """
    if batch_sizes.dtype != torch.int64:
        return None
    torch_check(batch_sizes.size(0) > 0, lambda: "Expected sequence length to be larger than 0")
    return batch_sizes[0].item()  # type: ignore[return-value]  # int() would make it a constant


class _Options(TypedDict, total=False):
    nonlinearity: str
    form: str
    reverse: bool
    batch_sizes: Tensor | None
    reset: Tensor | None
    reset_to: Tensor | None
    alpha: Tensor | float | None
    state_input: Tensor | None
    lengths: Tensor | None
    padding_value: float
    grad_clip: float | None
    truncate: int | None


@overload
def rnn(
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    return_potential: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def rnn(
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    return_potential: bool,
    **options: Unpack[_Options],
) -> tuple[Tensor, ...]: ...


def rnn(
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
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
    lengths: Tensor | None = None,
    padding_value: float = 0.0,
    grad_clip: float | None = None,
    truncate: int | None = None,
) -> tuple[Tensor, ...]:
    r"""Run one layer of an RNN in one direction, with one call of the engine.

    With the input product :math:`u_t = x_t W_{ih}^T + b_{ih} + b_{hh}`, the state :math:`k_t` from
    which step t starts, and an additional input :math:`q_t` of the state (``state_input``), step t
    computes one of

    .. math::
        \text{rate} \quad & h_t = (1 - \alpha) k_t + \alpha \, \phi(u_t + k_t W_{hh}^T) + q_t \\
        \text{potential} \quad & v_t = (1 - \alpha) k_t + \alpha (u_t + \phi(k_t) W_{hh}^T) + q_t,
            \quad h_t = \phi(v_t) \\
        \text{inside} \quad & h_t = \phi((1 - \alpha) k_t + \alpha (u_t + k_t W_{hh}^T) + q_t)

    The state is :math:`h`, or :math:`v` in the form "potential" (a current or voltage; :math:`h` is
    then the firing rate). Without ``alpha``, "rate" and "inside" are the plain RNN
    :math:`h_t = \phi(u_t + h_{t-1} W_{hh}^T)`.

    In the shapes below, T is the number of steps, B of batch rows, I of inputs and H of hidden
    units. Packed tensors have N rows, the sum of ``batch_sizes``.

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
        form: ``"rate"``, ``"potential"`` or ``"inside"``, as above.
        reverse: Run from the last step to the first; ``h0`` is then the state from which the last
            step starts.
        batch_sizes: For packed input, the number of active rows at each step, ``[T]``, int64 on the
            CPU: the ``batch_sizes`` of a ``torch.nn.utils.rnn.PackedSequence`` whose ``data`` is
            ``x``.
        reset: Bool, ``[T, B]`` or packed ``[N]``: True at the first step of an episode, which then
            starts from ``reset_to`` instead of the previous state. None means no resets.
        reset_to: The state after a reset: ``[H]``, ``[B, H]`` or ``[T, B, H]`` (packed
            ``[N, H]``). None means zeros.
        alpha: Leak in (0, 1], ``dt / tau`` of a continuous-time RNN: a number, or a tensor ``[]``
            or ``[H]``, which may be learned and reach 0; or a leak for each step and row,
            ``[T, B]``, ``[T, B, 1]`` or ``[T, B, H]`` (packed ``[N]``, ``[N, 1]`` or ``[N, H]``; a
            tensor ``[H]`` is always per unit). None means 1. On a GPU, the values of a tensor are
            not checked, because the check would wait for the device.
        state_input: :math:`q_t` of the equations, such as noise, in the shape of the output.
        return_potential: In the form "potential", return v of every step as a third result.
        lengths: Number of steps of each row of a padded ``x``, ``[B]``, integers in any order, 0
            allowed. The padding is not read, and the last state of a row is that after its own last
            step. A tensor on the CPU avoids waiting for the GPU. If all lengths are 0, T may be 0;
            the last state is then ``h0``.
        padding_value: Value of the results in the padding; only with ``lengths``.
        grad_clip: In backward, each step sends a gradient to the state that it starts from. Every
            element of it is clipped to [-grad_clip, grad_clip], before the gradient that the
            output of that step receives from the loss is added. The gradient of ``h0`` is clipped,
            that of ``reset_to`` is not. None means no clipping. Clipped gradients have no
            derivatives; tangents of forward mode are not clipped.
        truncate: Truncated backpropagation through time: no gradient passes from step k, 2k, ... to
            the step before it, as in :class:`fusedrnn.RNN`. None means not to truncate.

    Returns:
        ``h`` of every step, ``[T, B, H]`` or packed ``[N, H]``; the last state of each row,
        ``[B, H]``, which shares no memory with ``h``; with ``return_potential``, ``v`` of every
        step.

    All tensors but ``reset``, ``batch_sizes`` and ``lengths`` must have the same dtype: float32,
    float64, bfloat16 or float16; ``alpha`` is converted to it. Computations in bfloat16 and float16
    use float32 internally. The result is differentiable with respect to the same tensors, to every
    order, in reverse and forward mode (``fusedrnn/ops/autograd.py``). For other dtypes and devices,
    a plain loop runs, with one warning.

    Raises:
        RuntimeError: Sizes, dtypes or devices do not match, or T is 0.
        TypeError: An argument has the wrong type, a tensor is not dense, ``x`` has an integer
            dtype, or ``alpha`` is complex.
        ValueError: The nonlinearity or the form is unknown, ``alpha`` has a wrong shape or values
            outside its range, ``reset_to`` has a wrong shape or comes without ``reset``,
            ``return_potential`` comes with another form, ``lengths`` has a wrong shape, a value
            outside [0, T], or comes with ``batch_sizes``, ``padding_value`` comes without
            ``lengths``, or ``grad_clip`` is not positive.
        NotImplementedError: ``lengths`` differs between the samples of ``torch.vmap``, or a second
            derivative is computed with ``grad_clip``.
    """
    if lengths is not None:
        return _padded(
            lengths, padding_value, x, w_ih, w_hh, b_ih, b_hh, h0=h0, nonlinearity=nonlinearity,
            form=form, reverse=reverse, batch_sizes=batch_sizes, reset=reset, reset_to=reset_to,
            alpha=alpha, state_input=state_input, return_potential=return_potential,
            grad_clip=grad_clip, truncate=truncate,
        )  # fmt: skip
    if padding_value != 0.0:
        raise checks.no_lengths(padding_value)
    if truncate is not None:
        return _truncated(
            truncate, x, [w_ih, w_hh, b_ih, b_hh], h0, batch_sizes, reverse,
            nonlinearity=nonlinearity, form=form, reset=reset, reset_to=reset_to, alpha=alpha,
            state_input=state_input, return_potential=return_potential, grad_clip=grad_clip,
        )  # fmt: skip
    try:
        device = x.device.type
    except AttributeError:  # not a tensor: a list or a NumPy array
        checks.check_types(
            x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity, form, reverse, batch_sizes, reset,
            reset_to, alpha, state_input,
        )  # fmt: skip
        raise
    if return_potential and form != "potential":
        raise ValueError(
            f"fusedrnn: return_potential needs the form 'potential', got form={form!r}"
        )
    if any_autocast() and device in autocast.DEVICES:
        x, w_ih, w_hh, b_ih, b_hh, h0, reset_to, state_input = autocast.cast(
            device, x, w_ih, w_hh, b_ih, b_hh, h0, reset_to, state_input
        )
    if device not in _DEVICES or x.dtype not in _DTYPES:
        return _loop(
            x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity, form, reverse, batch_sizes, reset,
            reset_to, alpha, state_input, return_potential, grad_clip,
        )  # fmt: skip
    # Call the op when tracing, a transform or a function mode is active; otherwise call the kernel
    # directly, which saves one 4 us dispatch.
    dispatch = must_dispatch(w_hh)
    activation = ops.activation if dispatch else FusedRNN.differentiate
    if dispatch and exporting_onnx():
        activation = onnx.activation if compiling() else onnx.traced_activation
    elif dispatch and compiling() and h0 is None and batch_sizes is not None:
        rows = rows_of(batch_sizes)
        h0 = None if rows is None else x.new_zeros(rows, w_hh.size(0))
    v0 = None
    try:
        if grad_clip is not None:
            checks.grad_clip(grad_clip)
            if h0 is not None:
                h0 = ClipGradient.apply(h0, grad_clip)  # type: ignore[no-untyped-call]
        if alpha is not None:
            alpha = forms.checked_alpha(alpha, x, w_hh, batch_sizes)
        if form == "inside" and alpha is None and state_input is None:
            form = "rate"  # the same, with less work
        if form == "potential" or reset_to is not None:
            x, w_ih, b_ih, b_hh, h0, v0, state_input = forms.translate(
                x, w_ih, b_ih, b_hh, h0, w_hh, alpha, state_input, reset, reset_to, batch_sizes,
                nonlinearity, form,
            )  # fmt: skip
        h, last, saved = activation(
            x, w_ih, b_ih, b_hh, h0, v0, w_hh, alpha, state_input, reset, batch_sizes,
            nonlinearity, form, reverse, grad_clip,
        )  # fmt: skip
    except (AttributeError, TypeError, RuntimeError):
        # Check types only after an error, so that valid calls do not pay for it.
        checks.check_types(
            x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity, form, reverse, batch_sizes, reset,
            reset_to, alpha, state_input,
        )  # fmt: skip
        raise
    if grad_clip is not None:
        # The op would also clip the gradient of its result `last`, which no step sends.
        series = saved if form == "potential" else h
        last = ops.following_first(series, None, batch_sizes, not reverse, last.size(0)).clone()
    return (h, last, saved) if return_potential else (h, last)


@overload
def recurrence(
    u: Tensor,
    h0: Tensor | None,
    w_hh: Tensor,
    *,
    return_potential: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def recurrence(
    u: Tensor,
    h0: Tensor | None,
    w_hh: Tensor,
    *,
    return_potential: bool,
    **options: Unpack[_Options],
) -> tuple[Tensor, ...]: ...


def recurrence(u: Tensor, h0: Tensor | None, w_hh: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Run the recurrence alone: :func:`rnn` with ``u [T, B, H]`` in place of the input product.

    In the form "rate", it computes ``h[t] = (1 - alpha) * k + alpha * phi(u[t] + k @ w_hh.T)``. The
    first step starts from ``k = h0``, ``[B, H]``, or from zeros if ``h0`` is None. For the options,
    the results and the errors see :func:`rnn`.
    """
    return rnn(u, None, w_hh, None, None, h0, **options)


def _padded(
    lengths: Tensor,
    padding_value: float,
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    *biases: Tensor | None,
    h0: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Run :func:`rnn` on a padded input: pack all series, and unpack the results."""
    if options["batch_sizes"] is not None:
        raise ValueError("fusedrnn: batch_sizes must be None with lengths, got a tensor")
    ragged = Ragged(x, lengths, False, padding_value, "x")

    def non_empty_rows(name: str, states: Tensor) -> Tensor:
        """Return the rows that are not empty, in the order in which they are packed."""
        if not isinstance(states, Tensor):
            raise TypeError(f"fusedrnn: {name} must be a tensor, got {type(states).__name__}")
        if states.dim() != 2 or states.size(0) != ragged.batch:
            raise RuntimeError(
                f"fusedrnn: {name} must be [{ragged.batch}, H], got {list(states.shape)}"
            )
        return states.index_select(0, ragged.order)

    # Tensors of fewer dimensions are the same at every step. The call below checks the rest.
    for name, least in (("reset", 2), ("reset_to", 3), ("alpha", 2), ("state_input", 2)):
        series = options[name]
        if not isinstance(series, Tensor):
            continue
        if series.dim() >= least:
            if series.shape[:2] != x.shape[:2]:
                wanted = ", ".join(map(str, x.shape[:2]))
                raise RuntimeError(
                    f"fusedrnn: {name} must be [{wanted}, ...] with lengths, got "
                    f"{list(series.shape)}"
                )
            series = ragged.pack(series).data
            if name == "alpha" and series.dim() == 1:  # [N] could be taken for [H]
                series = series.unsqueeze(-1)
        elif name == "reset_to" and series.dim() == 2:
            series = non_empty_rows(name, series)
        options[name] = series
    packed = ragged.pack(x)
    before = x.new_zeros(ragged.batch, w_hh.size(0)) if h0 is None else h0
    if not compiling() and ragged.count == 0:  # no step to run
        h = x.new_full((*x.shape[:2], w_hh.size(0)), padding_value)
        return (h, before.clone(), *[h.clone()] * options["return_potential"])
    options["batch_sizes"] = packed.batch_sizes
    run: Any = rnn
    h, last, *potential = run(
        packed.data, w_ih, w_hh, *biases, non_empty_rows("h0", before), **options
    )
    h, *potential = (ragged.unpack(packed._replace(data=t)) for t in (h, *potential))
    return (h, before.to(last.dtype).index_copy(0, ragged.order, last), *potential)


def _truncated(
    truncate: int,
    x: Tensor,
    weights: list[Any],
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Run :func:`rnn` in blocks of ``truncate`` steps."""
    checks.steps("truncate", truncate)

    def run(weights: Any, x: Any, h0: Any, batch_sizes: Any, options: Any) -> tuple[Tensor, ...]:
        one: Any = rnn
        return one(x, *weights, h0, batch_sizes=batch_sizes, reverse=reverse, **options[0])

    w_ih, w_hh, b_ih, b_hh = weights
    alpha = options["alpha"]
    checks.check_types(
        x, w_ih, w_hh, b_ih, b_hh, h0, options["nonlinearity"], options["form"], reverse,
        batch_sizes, options["reset"], options["reset_to"], alpha, options["state_input"],
    )  # fmt: skip
    if isinstance(alpha, Tensor) and alpha.shape != w_hh.shape[:1] and alpha.shape == x.shape[:1]:
        options["alpha"] = alpha.unsqueeze(-1)  # packed [N]
    blocks = Blocks(None, truncate, False, False, [x, weights, h0, options])
    arguments = (weights, x, h0, batch_sizes, [options])
    fits = batch_sizes is None or (batch_sizes.dim() == 1 and batch_sizes.sum() == x.size(0))
    for name, value in options.items():
        if value is not None and is_series(name, value, x):
            fits = fits and value.shape[: x.dim() - 1] == x.shape[:-1]
    if not (blocks and fits):  # if a size is wrong, the engine raises its error
        return run(*arguments)
    return blocks.run(run, *arguments, reverse=reverse, last_only=False)


def _loop(
    x: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    nonlinearity: str,
    form: str,
    reverse: bool,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reset_to: Tensor | None,
    alpha: Tensor | float | None,
    state_input: Tensor | None,
    return_potential: bool,
    grad_clip: float | None,
) -> tuple[Tensor, ...]:
    """Run :func:`rnn` as a plain loop, for dtypes and devices that have no kernel."""
    checks.check_types(
        x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity, form, reverse, batch_sizes, reset, reset_to,
        alpha, state_input,
    )  # fmt: skip
    if alpha is not None:
        alpha = forms.checked_alpha(alpha, x, w_hh, batch_sizes)
    checks.check_for_loop(
        x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity, form, batch_sizes, reset, reset_to, alpha,
        state_input,
    )  # fmt: skip
    device = x.device.type
    why = f" ({ops.build_info()['cuda']})" if device == "cuda" else ""
    _warn_slow(f"no kernel for {x.dtype} tensors on {device}{why}")
    return reference.rnn(
        x, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity=nonlinearity, form=form, reverse=reverse,
        batch_sizes=batch_sizes, reset=reset, reset_to=reset_to, alpha=alpha,
        state_input=state_input, return_potential=return_potential,
        grad_clip=checks.grad_clip(grad_clip),
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

    On a CPU, overhead dominates a small step, and torch's own op, which is differentiated in C++,
    has the least overhead. On a GPU, that op launches several kernels but the engine only one.
    """
    # Do not use torch's op when compiling, which would specialise on these sizes, or under a
    # transform, because vmap has no rule for it.
    if x.device.type == "cpu" and not (compiling() or transformed()):
        small = _SMALL_STEP_WITH_GRAD if torch.is_grad_enabled() else _SMALL_STEP
        if x.size(0) * (w_ih.numel() + w_hh.numel()) < small:
            cell = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
            return cell(x, h, w_ih, w_hh, b_ih, b_hh)
    return rnn(x.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, h, nonlinearity=nonlinearity)[1]
