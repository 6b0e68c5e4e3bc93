"""Record what an RNN computes at every step, and the gradients there.

The module runs once, and the calls of the engine's op are recorded. Autograd computes the gradient
of the loss with respect to the results of each call, and from it the engine's adjoint computes the
gradients at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from . import ops
from .forms import drive
from .functional import rnn as run_layer
from .leaky import LeakyRNNCell
from .modules import Layers, RNNCell
from .ops.autograd import _SLOPES, slope_source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Loss = Callable[[Any], Tensor]

# The fields of LayerTrace that have a value for every step.
_SERIES = (
    "from_input", "from_state", "z", "state", "h", "slope", "grad_state", "grad_h", "delta",
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class LayerTrace:
    r"""What one layer computed in one direction.

    With the output :math:`h_{t-1}` of the step before, or of the initial state, the pre-activation
    of step t is

    .. math::
        z_t = (x_t W_{ih}^T + b_{ih}) + (h_{t-1} W_{hh}^T + b_{hh})

    In a plain RNN, the state and the output are both :math:`h_t = \phi(z_t)`. With a leak, they
    follow from z and the state before as in :func:`fusedrnn.rnn`.

    A series is a tensor with a value for every step. Time comes first, whatever the layout of the
    input: ``[T, B, H]`` (an unbatched input has B = 1, a cell T = 1); packed ``[N, H]``, the rows
    of ``PackedSequence.data``; after :meth:`Trace.row`, ``[T, H]``. Series of the reverse direction
    are in the order of the input, too: in that direction, step t starts from the state of step
    t + 1.

    Attributes:
        layer: Number of the layer, from 0.
        reverse: Whether it runs from the last step to the first.
        nonlinearity, form: As in :func:`fusedrnn.rnn`.
        w_hh: Recurrent weight, ``[H, H]``.
        alpha: Leak of each unit, ``[H]``, or None without a leak.
        batch_sizes: As in ``PackedSequence`` if the series are packed, otherwise None.
        from_input: Contribution of the input, :math:`x_t W_{ih}^T + b_{ih}`, series. It includes
            the drive noise of a :class:`fusedrnn.LeakyRNN` in training. Above the first layer,
            :math:`x_t` is the output of the layer below, after dropout.
        from_state: Contribution of the recurrence, :math:`h_{t-1} W_{hh}^T + b_{hh}`, series.
        z: Pre-activation, the sum of both, series.
        state: State after each step, series: h, or v in the form "potential".
        h: Output of each step, series; :math:`\phi(v)` in the form "potential".
        slope: Derivative :math:`\phi'` at the argument of :math:`\phi`, series. The argument is z
            in the form "rate", v in "potential", and everything inside :math:`\phi` in "inside".
        grad_state: :math:`\partial L / \partial \text{state}_t`, series, or None without a loss. It
            includes the paths through later steps.
        grad_h: :math:`\partial L / \partial h_t`, series, or None. In the form "potential", it does
            not include the path from v through the leak, which bypasses h.
        delta: :math:`\delta_t = \partial L / \partial z_t`, series, or None; for a plain RNN
            :math:`\phi'(z_t) \, \partial L / \partial h_t`.
    """

    layer: int
    reverse: bool
    nonlinearity: str
    form: str
    w_hh: Tensor
    alpha: Tensor | None
    batch_sizes: Tensor | None
    from_input: Tensor
    from_state: Tensor
    z: Tensor
    state: Tensor
    h: Tensor
    slope: Tensor
    grad_state: Tensor | None = None
    grad_h: Tensor | None = None
    delta: Tensor | None = None

    @property
    def series(self) -> dict[str, Tensor]:
        """The tensors with a value for every step, by name."""
        found = {name: getattr(self, name) for name in _SERIES}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def name(self) -> str:
        """The layer and, if it is the reverse one, its direction, in words."""
        return f"layer {self.layer}" + ", reverse" * self.reverse

    @property
    def step_matrix(self) -> Tensor:
        r"""The Jacobian of a step if every slope were 1, ``[H, H]``.

        It is :math:`W_{hh}`, or :math:`diag(1 - \alpha) + diag(\alpha) W_{hh}` with a leak. Its
        eigenvalues show how fast the state and the gradient can grow or vanish.
        """
        if self.alpha is None:
            return self.w_hh
        return torch.diag(1 - self.alpha) + self.alpha.unsqueeze(1) * self.w_hh

    @property
    def spectral_radius(self) -> float:
        """The largest magnitude of an eigenvalue of :attr:`step_matrix`."""
        return float(torch.linalg.eigvals(_wide(self.step_matrix)).abs().max())

    @property
    def recurrent_share(self) -> Tensor:
        """The share of the recurrence in the pre-activations of each step, in [0, 1].

        A series without the dimension H. It is ``|from_state| / (|from_input| + |from_state|)``,
        where ``| |`` sums the magnitudes over the units, and 0 if both sums are 0.
        """
        ours, other = (_wide(t).abs().sum(-1) for t in (self.from_state, self.from_input))
        return ours / (ours + other).clamp_min(torch.finfo(ours.dtype).tiny)

    def __repr__(self) -> str:
        sizes = ", ".join(map(str, self.h.shape))
        names = ", ".join(self.series)
        return f"LayerTrace({self.name}, {self.nonlinearity}, {self.form}: {names} [{sizes}])"


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True, eq=False, repr=False)
class Trace(Sequence[LayerTrace]):
    """What an RNN computed in one call: a sequence of :class:`LayerTrace`.

    It has one for each layer and direction, in the order of ``h_n``: layer 0 forward, layer 0
    reverse, layer 1 forward, and so on.

    Attributes:
        module: The ``repr`` of the module.
        layers: The traces of the layers and directions.
        output: The first result of the module, or the state of a cell, detached. :meth:`row` does
            not change it.
        loss: The value of the loss, or None.
        sorted_indices: As in ``PackedSequence`` if the input is packed, otherwise None.
    """

    module: str
    layers: tuple[LayerTrace, ...]
    output: Tensor | PackedSequence
    loss: float | None = None
    sorted_indices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, index: int) -> LayerTrace: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[LayerTrace, ...]: ...

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    @property
    def batch(self) -> int | None:
        """The number of sequences, B; None after :meth:`row`."""
        layer = self.layers[0]
        if layer.batch_sizes is not None:
            return int(layer.batch_sizes[0])
        return layer.h.size(1) if layer.h.dim() == 3 else None

    def row(self, b: int) -> Trace:
        """Return the trace of one sequence of the batch, whose series are ``[T, H]``.

        The sequences of a packed batch are numbered in the order in which the caller packed them,
        and each has its own T.

        Raises:
            IndexError: There is no sequence ``b``.
        """
        batch, batch_sizes = self.batch, self.layers[0].batch_sizes
        if batch is None or not -batch <= b < batch:
            wanted = "left out after row()" if batch is None else f"in [{-batch}, {batch})"
            raise IndexError(f"fusedrnn: b must be {wanted}, got {b}")
        if batch_sizes is None:
            place: Any = (slice(None), b)
        else:
            b %= batch
            if self.sorted_indices is not None:
                b = self.sorted_indices.tolist().index(b)
            place = (batch_sizes.cumsum(0) - batch_sizes + b)[batch_sizes > b]

        def of_row(layer: LayerTrace) -> LayerTrace:
            picked: dict[str, Any] = {name: t[place] for name, t in layer.series.items()}
            return replace(layer, batch_sizes=None, **picked)

        layers = tuple(map(of_row, self.layers))
        return replace(self, layers=layers, sorted_indices=None)

    def plot(self, layer: int = 0, row: int = 0, dark: bool = False) -> Figure:
        """Plot one layer and direction for one sequence, with matplotlib.

        Args:
            layer: Index into the trace.
            row: Number of the sequence; ignored after :meth:`row`.
            dark: Draw light on dark.

        Returns:
            A figure that ``matplotlib.pyplot`` can show. Each of its plots is also a function of
            ``fusedrnn.plots``.
        """
        from . import plots

        trace = self if self.batch is None else self.row(row)
        return plots.overview(trace[layer], dark=dark)

    def __repr__(self) -> str:
        h, batch_sizes = self.layers[0].h, self.layers[0].batch_sizes
        sizes = dict(zip("TBH" if h.dim() == 3 else "TH", h.shape))
        if batch_sizes is not None:
            sizes = {"N": h.size(0), "T": len(batch_sizes), "B": int(batch_sizes[0])}
        words = ", ".join(f"{name} {size}" for name, size in sizes.items() if name != "H")
        loss = "" if self.loss is None else f", loss {self.loss:.4g}"
        lines = [f"Trace of {self.module}, {h.dtype}, {words}{loss}"]
        heads = ["", "mean |h|", "mean slope", "recurrent share"]
        if self.layers[0].delta is not None:
            heads += ["gradient at the first step", "at the last"]
        rows = [heads, *map(_table_row, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["  ".join(map(str.rjust, row, widths)) for row in rows]
        return "\n".join(lines)


def _table_row(layer: LayerTrace) -> list[str]:
    """Return the row of a layer in the table of ``repr``."""
    means = (_wide(t).mean().item() for t in (layer.h.abs(), layer.slope))
    numbers = [layer.name, *(f"{mean:.3f}" for mean in means)]
    numbers.append(f"{layer.recurrent_share.mean().item():.0%}")
    if layer.grad_state is not None:
        rows = [1] if layer.batch_sizes is None else layer.batch_sizes.tolist()
        ends = layer.grad_state[: rows[0]], layer.grad_state[-rows[-1] :]
        numbers += [f"{_wide(end).norm().item():.2e}" for end in ends]
    return numbers


class _Recorder(TorchFunctionMode):
    """Record the arguments and results of the engine's op, and use it in place of torch's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.rnn_tanh_cell, torch.rnn_relu_cell):
            x, h, w_ih, w_hh, b_ih, b_hh = args
            name = "tanh" if func is torch.rnn_tanh_cell else "relu"
            with self:
                return run_layer(x.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, h, nonlinearity=name)[1]
        results = func(*args, **(kwargs or {}))
        if func is ops.activation:
            if torch.is_grad_enabled():  # frozen weights must not prevent gradients of the results
                for result in results[:2]:
                    if not result.requires_grad:
                        result.requires_grad_()
            self.calls.append((args, results))
        return results


def _data(value: Any) -> Any:
    return value.data if isinstance(value, PackedSequence) else value


def _recorded(call: Any, gradients: Sequence[Tensor], layer: int) -> LayerTrace:
    """Build the trace of one call of the op from the gradients of its results h and last."""
    args, results = call
    *tensors, nonlinearity, form, reverse, _ = args
    detached: Any = (t if t is None else t.detach() for t in tensors)
    x, w_ih, b_ih, b_hh, h0, _, w_hh, alpha, _, _, batch_sizes = detached
    h, _, saved = (result.detach() for result in results)
    if saved.dim() == 1:  # empty
        saved = None
    source = slope_source(h, saved, nonlinearity, form)
    from_input = drive(x, w_ih, b_ih)
    before = ops.previous(h, h0, None, batch_sizes, reverse)
    from_state = drive(before, w_hh, b_hh)
    found = LayerTrace(
        layer,
        reverse,
        nonlinearity,
        form,
        w_hh.clone(),  # training may change it in place
        None if alpha is None else alpha.clone(),
        batch_sizes,
        from_input=from_input,
        from_state=from_state,
        z=from_input + from_state,
        state=saved if form == "potential" else h,
        h=h,
        slope=_SLOPES[nonlinearity][0](source),
    )
    if not gradients:
        return found
    g, g_n = gradients
    delta, _, _, a, y = ops.adjoint(
        g, None, None, g_n, source, w_hh, alpha, None, batch_sizes, nonlinearity, form, reverse,
        None, False, True,
    )  # fmt: skip
    grad_h = a if form == "rate" else y
    return replace(
        found, delta=delta, grad_h=grad_h, grad_state=a if form == "potential" else grad_h
    )


def trace(
    rnn: nn.Module,
    x: Tensor | PackedSequence,
    hx: Tensor | None = None,
    *,
    loss: Loss | None = None,
    output_grad: Tensor | PackedSequence | None = None,
) -> Trace:
    """Run ``rnn(x, hx)`` and return every quantity of every layer, direction and step.

    The trace has the two contributions to each pre-activation, their sum, the state, the output and
    the slope of the nonlinearity. With ``loss`` or ``output_grad``, it also has the gradients with
    respect to each state and each pre-activation, from backpropagation through time (Rumelhart,
    Hinton and Williams, 1986; Werbos, 1990). :class:`LayerTrace` lists them with equations and
    shapes.

    States, outputs and gradients are those of the engine and its adjoint. The contributions are
    computed by torch from the engine's states, so they differ by rounding from the sums inside the
    engine.

    The module is called once, as the caller would call it: hooks run, and in training, dropout and
    noise are drawn once from the same generators and are part of what the trace shows. Call
    ``rnn.eval()`` first for a trace without them. No ``.grad`` is changed, and nothing in the
    trace requires a gradient.

    Args:
        rnn: An RNN or a cell of this package.
        x: Its input, in any layout that it accepts.
        hx: Its state before the first step; None means zeros.
        loss: A function of the output (of a cell, of the new state) that returns a scalar tensor.
        output_grad: In place of ``loss``, the gradient of a loss with respect to the output, in
            the shape of the output; for a packed output a ``PackedSequence`` or its ``data``.

    Raises:
        TypeError: ``rnn`` is not an RNN or a cell of this package, ``loss`` is not callable or does
            not return a tensor, or ``output_grad`` is not a tensor.
        ValueError: Both ``loss`` and ``output_grad`` are given, the loss is not a scalar or does
            not depend on the output, one of them is given and ``rnn`` has ``checkpoint_every``,
            ``truncate`` or ``grad_clip``, or ``rnn`` has ``recurrent_dropout`` or ``zoneout`` and
            is in training.
        RuntimeError: ``output_grad`` does not match the output, or the engine has no kernel for
            the dtype or the device.

    Example::

        >>> rnn = fusedrnn.RNN(10, 20)
        >>> found = fusedrnn.trace(rnn, torch.randn(5, 3, 10), loss=lambda h: h[-1].square().sum())
        >>> found[0].delta.shape
        torch.Size([5, 3, 20])
        >>> figure = found.plot()  # needs matplotlib
    """
    if not isinstance(rnn, (Layers, RNNCell, LeakyRNNCell)):
        raise TypeError(
            f"fusedrnn: rnn must be an RNN or a cell of fusedrnn, got {type(rnn).__name__}; "
            "fusedrnn.replace converts the modules of torch"
        )
    if rnn.training and isinstance(rnn, Layers):
        rnn._check_no_rates("for a trace in training", ("recurrent_dropout", "zoneout"))
    if loss is not None and output_grad is not None:
        raise ValueError("fusedrnn: output_grad must be None if loss is given, got both")
    if loss is not None and not callable(loss):
        raise TypeError(
            f"fusedrnn: loss must be a function of the output, got {type(loss).__name__}"
        )
    wanted = loss is not None or output_grad is not None
    for name in ("checkpoint_every", "truncate", "grad_clip"):
        option = getattr(rnn, name, None)
        if wanted and option is not None:
            raise ValueError(f"fusedrnn: {name} must be None to trace gradients, got {option}")
    recorder = _Recorder()
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        with recorder:
            results = rnn(x, hx)
        output = results[0] if isinstance(results, tuple) else results
        if not recorder.calls or _data(x).is_meta:
            raise RuntimeError(
                "fusedrnn: x must have a dtype and a device for which the engine has a kernel, got "
                f"{_data(x).dtype} on {_data(x).device}"
            )
        directions = 2 if getattr(rnn, "bidirectional", False) else 1
        # On CUDA, the reverse direction is called first if the two run concurrently.
        numbered = sorted(
            enumerate(recorder.calls), key=lambda pair: (pair[0] // directions, pair[1][0][-2])
        )
        calls = [call for _, call in numbered]
        value: float | None = None
        gradients: list[Tensor] = []
        if wanted:
            states = [result for _, results in calls for result in results[:2]]
            value, gradients = _gradients(output, states, loss, output_grad)
    with torch.no_grad():
        layers = tuple(
            _recorded(call, gradients[2 * i : 2 * i + 2], i // directions)
            for i, call in enumerate(calls)
        )
    if isinstance(x, PackedSequence):
        output = output._replace(data=output.data.detach())
        return Trace(repr(rnn), layers, output, value, x.sorted_indices)
    return Trace(repr(rnn), layers, output.detach(), value)


def _gradients(
    output: Any, states: list[Tensor], loss: Loss | None, output_grad: Any
) -> tuple[float | None, list[Tensor]]:
    """Return the loss and its gradients for ``states``, without paths through later steps."""
    data = _data(output)
    if loss is None:
        given = _data(output_grad)
        if not isinstance(given, Tensor):
            raise TypeError(
                f"fusedrnn: output_grad must be a tensor, got {type(output_grad).__name__}"
            )
        if (given.shape, given.dtype, given.device) != (data.shape, data.dtype, data.device):
            raise RuntimeError(
                f"fusedrnn: output_grad must be {list(data.shape)} of {data.dtype} on "
                f"{data.device} like the output, got {list(given.shape)} of {given.dtype} on "
                f"{given.device}"
            )
        value, number = data, None
    else:
        value, given = loss(output), None
        if not isinstance(value, Tensor):
            raise TypeError(f"fusedrnn: loss must return a tensor, got {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"fusedrnn: loss must return a scalar, got {list(value.shape)}")
        number = value.item()
    found: Sequence[Tensor | None] = [None]
    if value.requires_grad:
        found = torch.autograd.grad(value, (data, *states), given, allow_unused=True)
    if found[0] is None:
        raise ValueError("fusedrnn: loss must depend on the output, got one that does not")
    return number, [
        torch.zeros_like(state) if gradient is None else gradient
        for gradient, state in zip(found[1:], states)
    ]
