"""Leaky (continuous-time) RNNs as modules: leak, noise and the form of the state.

The layers, layouts and resets are those of ``fusedrnn.RNN``; this file adds alpha, noise and forms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from . import checks, dropout
from .forms import FORMS
from .functional import rnn
from .modules import Layers, _tensors
from .reference import NONLINEARITIES
from .torch_state import step


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"fusedrnn: {name} must be one of {', '.join(choices)}, got {value!r}")


def _number(name: str, value: Any, wanted: str = "a number") -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"fusedrnn: {name} must be {wanted}, got {type(value).__name__}") from None


def _deviation(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"fusedrnn: {name} must be at least 0 and finite, got {value}")
    return number


def _leak(
    alpha: Tensor | float | None,
    tau: Tensor | float | None,
    dt: Tensor | float | None,
    size: int,
    learned: bool,
) -> Tensor | float | None:
    """Check the leak arguments of a constructor and return alpha."""
    name = "alpha"
    if tau is not None or dt is not None:
        if alpha is not None:
            raise ValueError(f"fusedrnn: alpha must be None with tau and dt, got {alpha}")
        if tau is None or dt is None:
            missing, given = ("tau", "dt") if tau is None else ("dt", "tau")
            raise ValueError(f"fusedrnn: {missing} must be given with {given}, got None")
        alpha, name = _positive("dt", dt) / _positive("tau", tau), "dt / tau"
    if alpha is None:
        if learned:
            raise ValueError("fusedrnn: alpha must be in (0, 1) with learn_alpha, got None")
        return None
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().clone()
        if not alpha.is_floating_point():
            raise TypeError(f"fusedrnn: {name} must be floating-point, got {alpha.dtype}")
        if alpha.shape not in ((), (size,)):
            raise ValueError(
                f"fusedrnn: {name} must be a number or a tensor [] or [{size}], "
                f"got {list(alpha.shape)}"
            )
        values = [] if alpha.is_meta else alpha.flatten().tolist()
        bounds = "[0, 1]"
        wrong = [value for value in values if not 0 <= value <= 1]
    else:
        alpha = _number(name, alpha, "a number or a tensor")
        values, bounds = [alpha], "(0, 1]"
        wrong = [] if 0 < alpha <= 1 else [alpha]
    if learned:
        bounds = "(0, 1) with learn_alpha"
        wrong = [value for value in values if not 0 < value < 1]
    if wrong:
        raise ValueError(f"fusedrnn: {name} must be in {bounds}, got {wrong[0]}")
    return alpha


def _positive(name: str, value: Tensor | float) -> Tensor | float:
    if isinstance(value, Tensor):
        positive = value.is_meta or bool((value > 0).all())
        return value if positive else _not_positive(name, value.min().item())
    number = _number(name, value, "a number or a tensor")
    return number if number > 0 else _not_positive(name, number)


def _not_positive(name: str, value: float) -> float:
    raise ValueError(f"fusedrnn: {name} must be above 0, got {value}")


class _Leaky(nn.Module):
    """Leak, noise and form: the common base of :class:`LeakyRNN` and :class:`LeakyRNNCell`."""

    hidden_size: int
    nonlinearity: str
    form: str
    learn_alpha: bool
    noise: float
    state_noise: float
    alpha: Tensor | None
    # Class attributes, because the constructors of torch call reset_parameters before _set_leak.
    _initial_alpha: Tensor | float | None = None
    _logit_names: Sequence[str] = ()

    def _set_options(self, nonlinearity: str, form: str, noise: float, state_noise: float) -> None:
        _check_choice("nonlinearity", nonlinearity, tuple(NONLINEARITIES))
        _check_choice("form", form, FORMS)
        self.nonlinearity = nonlinearity
        self.form = form
        self.noise = _deviation("noise", noise)
        self.state_noise = _deviation("state_noise", state_noise)

    def _set_leak(
        self,
        alpha: Tensor | float | None,
        learned: bool,
        logit_names: Sequence[str],
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Create the buffer ``alpha``, or, if alpha is learned, a parameter for each name."""
        self.learn_alpha = learned
        self._initial_alpha = alpha
        shape = alpha.shape if isinstance(alpha, Tensor) else ()
        fixed = alpha is not None and not learned
        self.register_buffer(
            "alpha", torch.empty(shape, device=device, dtype=dtype) if fixed else None
        )
        if learned:
            self._logit_names = list(logit_names)
            for name in logit_names:
                logit = torch.empty(self.hidden_size, device=device, dtype=dtype)
                self.register_parameter(name, nn.Parameter(logit))
        self._reset_alpha()

    def reset_parameters(self) -> None:
        """Initialise the weights as ``nn.RNN`` does, and alpha from the constructor's argument."""
        bound = self.hidden_size**-0.5 if self.hidden_size > 0 else 0.0
        for name, parameter in self.named_parameters():
            if "alpha_logit" not in name:
                nn.init.uniform_(parameter, -bound, bound)
        self._reset_alpha()

    @torch.no_grad()
    def _reset_alpha(self) -> None:
        if self._initial_alpha is None:
            return
        alpha = torch.as_tensor(self._initial_alpha, dtype=torch.float64)
        if self.alpha is not None:
            self.alpha.copy_(alpha)
        for name in self._logit_names:
            getattr(self, name).copy_(torch.logit(alpha))

    def _alpha_of(self, index: int) -> Tensor | None:
        """Return alpha of one layer and direction."""
        if self.learn_alpha:
            return torch.sigmoid(getattr(self, self._logit_names[index]))
        if "alpha" in self._buffers:  # finding a buffer with getattr costs 0.8 us
            return self._buffers["alpha"]
        return self.alpha  # replaced by a plain tensor

    def _rnn(
        self,
        x: Tensor,
        *weights: Tensor,
        generator: torch.Generator | None = None,
        rates: dropout.Rates | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, ...]:
        """Run one layer in one direction with its noise, of which the drive's is drawn first."""
        w_ih: Tensor | None
        w_ih, w_hh = weights[:2]
        b_ih, b_hh = weights[2:] if len(weights) == 4 else (None, None)
        sizes = (*x.shape[:-1], self.hidden_size)

        def draw(deviation: float) -> Tensor:
            return dropout.draw(torch.randn, sizes, x.device, x.dtype, generator) * deviation

        if self.training and self.noise:
            x = F.linear(x, weights[0], b_ih) + draw(self.noise)
            w_ih = b_ih = None
        if self.training and self.state_noise:
            arguments["state_input"] = draw(self.state_noise)
        arguments["form"] = self.form
        if rates is None:
            return rnn(x, w_ih, w_hh, b_ih, b_hh, **arguments)
        return dropout.rnn(rates, generator, x, w_ih, w_hh, b_ih, b_hh, **arguments)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A state_dict of nn.RNN has no alpha: keep the module's.
        own = {prefix + name for name in ("alpha", *self._logit_names)}
        if own.isdisjoint(state_dict):
            missing_keys[:] = [key for key in missing_keys if key not in own]

    def extra_repr(self) -> str:
        words = [super().extra_repr()]
        if self.nonlinearity != "tanh" and "nonlinearity=" not in words[0]:
            words.append(f"nonlinearity={self.nonlinearity}")
        if self.form != "rate":
            words.append(f"form={self.form}")
        alpha = self._initial_alpha if self.learn_alpha else self.alpha
        if alpha is not None:
            known = not isinstance(alpha, Tensor) or (alpha.dim() == 0 and not alpha.is_meta)
            words.append(f"alpha={float(alpha):.4g}" if known else f"alpha={list(alpha.shape)}")  # type: ignore[union-attr]
        if self.learn_alpha:
            words.append("learn_alpha=True")
        words += [
            f"{n}={getattr(self, n):.4g}" for n in ("noise", "state_noise") if getattr(self, n)
        ]
        return ", ".join(words)


class LeakyRNN(_Leaky, Layers):
    r"""A leaky RNN of one or more layers, with one fused kernel per layer.

    It discretises a continuous-time RNN with time constant tau in steps of dt, where
    :math:`\alpha = dt / \tau`. With the input product
    :math:`u_t = x_t W_{ih}^T + b_{ih} + b_{hh} + \sigma \xi_t`, each layer computes, for every time
    step t, one of

    .. math::
        \text{rate:} \quad & h_t = (1 - \alpha) h_{t-1} + \alpha \phi(u_t + h_{t-1} W_{hh}^T)
            + \sigma_s \zeta_t \\
        \text{potential:} \quad & v_t = (1 - \alpha) v_{t-1} + \alpha (u_t + \phi(v_{t-1}) W_{hh}^T)
            + \sigma_s \zeta_t, \quad h_t = \phi(v_t) \\
        \text{inside:} \quad & h_t = \phi((1 - \alpha) h_{t-1} + \alpha (u_t + h_{t-1} W_{hh}^T)
            + \sigma_s \zeta_t)

    where :math:`x_t` is the input, or the :math:`h_t` of the layer below, and :math:`\xi_t` and
    :math:`\zeta_t` are Gaussian with variance 1, drawn anew for every row, unit, step and layer.
    The state is h, or v in the form ``"potential"``. A step at which ``reset`` is true starts from
    ``reset_to`` instead of the previous state. With the default arguments, this layer computes the
    same as :class:`fusedrnn.RNN`.

    Args:
        input_size: Number of features in the input, I.
        hidden_size: Number of features in the hidden state, H.
        num_layers: Number of stacked layers, L.
        nonlinearity: The function phi: a name that :func:`fusedrnn.rnn` accepts.
        form: ``"rate"``, ``"potential"`` or ``"inside"``.
        alpha: Leak, a number in (0, 1] or a tensor ``[]`` or ``[H]`` with values in [0, 1]; the
            same in every layer. None means 1 (no leak).
        tau, dt: Time constant and step, given together in place of ``alpha``, which is then
            dt / tau; numbers or tensors ``[]`` or ``[H]``.
        learn_alpha: Learn alpha for each unit, layer and direction; ``alpha`` gives its initial
            value, which must be in (0, 1).
        noise: Standard deviation :math:`\sigma` of noise in the drive u. In the form ``"rate"``,
            this noise is inside phi; in the other forms, it is multiplied by alpha.
        state_noise: Standard deviation :math:`\sigma_s` of noise that is added to the state.
        bias: Whether the layers have ``b_ih`` and ``b_hh``.
        batch_first: Whether input and output are ``[B, T, ...]`` instead of ``[T, B, ...]``. Does
            not apply to ``hx`` and ``h_n``, and is ignored for unbatched and packed input.
        dropout: Probability of zeroing an element of the output of every layer but the last, in
            training.
        bidirectional: Whether a second set of weights runs from the last step to the first. The
            number of directions, D, is then 2, otherwise 1.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        checkpoint_every, truncate, grad_clip: As in :class:`fusedrnn.RNN`.
        recurrent_dropout, zoneout, weight_drop: As in :class:`fusedrnn.RNN`. In the form
            ``"potential"``, ``recurrent_dropout`` zeroes :math:`\phi(v)` where it enters ``W_hh``,
            and ``zoneout`` keeps v. With a leak, ``recurrent_dropout`` costs a second pass of the
            engine.

    Inputs:
        input: ``[T, B, I]``, with ``batch_first`` ``[B, T, I]``, unbatched ``[T, I]``, a
            ``PackedSequence``, or a nested tensor of B rows ``[length, I]`` with the layout
            ``torch.jagged``.
        hx: State before the first step, ``[L*D, B, H]``, unbatched ``[L*D, H]``; or
            ``[L*D, 1, H]``, the same for every row; or ``[H]``, the same for every row, layer and
            direction. None means zeros.
        reset, reset_to: As in :class:`fusedrnn.RNN`; ``reset_to`` is v in the form ``"potential"``.
        alpha: Leak of each step, in place of the module's, in every layer: ``[T, B]``,
            ``[T, B, 1]`` or ``[T, B, H]``, with ``batch_first`` ``[B, T, ...]``, unbatched ``[T]``,
            ``[T, 1]`` or ``[T, H]``, packed ``[N]``, ``[N, 1]`` or ``[N, H]`` or a
            ``PackedSequence``; nested with a nested input. Values must be in [0, 1].
        generator: Source of the noise and of the masks of dropout inside the recurrence, a
            ``torch.Generator`` on the device of the input; None means torch's default generator.
        return_potential: Return v as well; only in the form ``"potential"``.
        lengths: As in :class:`fusedrnn.RNN`.
        padding_value, return_all_layers, last_only: As in :class:`fusedrnn.RNN`, for ``output`` and
            ``potential``.

    Outputs:
        output: :math:`h_t` of the last layer for every step, in the shape of the input but with D*H
            features. A packed input gives a packed output, a nested one a nested output.
        h_n: The last state of every layer and direction, ``[L*D, B, H]``, unbatched ``[L*D, H]``:
            v in the form ``"potential"``, otherwise h.
        potential: With ``return_potential``, :math:`v_t` of the last layer, in the shape of
            ``output``.

    Noise is drawn in training only: ``eval()`` turns it off. To evaluate a model with noise, call
    ``train()`` of this module alone. Two runs on one device from the same state of the
    generator give the same bits. Layers draw in order, forward before reverse. Each draws first
    drive noise, then state noise, then the masks of dropout inside the recurrence.
    ``torch.utils.checkpoint`` repeats only the draws of torch's default generator, and
    ``torch.compile`` breaks the graph at draws of any other generator. For noise of the form
    :math:`\sqrt{2 \alpha} \sigma \zeta`, which the Euler-Maruyama method adds to the state, pass
    ``state_noise=(2 * alpha) ** 0.5 * sigma``.

    Parameters are named, shaped and initialised as in :class:`fusedrnn.RNN`, with the same values
    for the same seed. A ``state_dict`` of ``nn.RNN`` can be loaded, which does not change alpha.
    ``alpha`` is a buffer, or None. With ``learn_alpha`` it is None, and each layer k has a
    parameter ``alpha_logit_l{k}`` ``[H]``, whose sigmoid is alpha; the reverse direction has
    another one, with the suffix ``_reverse``.

    Raises in the constructor:
        ValueError: As in :class:`fusedrnn.RNN`, or ``form`` is unknown, ``alpha`` or dt / tau is
            outside its range or has a wrong shape, one of ``tau`` and ``dt`` is given without the
            other or together with ``alpha``, or a standard deviation is negative.
        TypeError: An argument has the wrong type.

    Raises in a call:
        ValueError: As in :class:`fusedrnn.RNN`, or ``return_potential`` is true in a form other
            than ``"potential"``, a value of ``alpha`` is outside [0, 1] (not checked on a GPU), or
            ``alpha`` is given in the form ``"inside"`` with ``zoneout`` or ``recurrent_dropout``.
        RuntimeError: As in :class:`fusedrnn.RNN`, or ``alpha`` does not match ``input``.
        TypeError: As in :class:`fusedrnn.RNN`, or ``alpha`` is not a tensor.

    Example::

        >>> rnn = fusedrnn.LeakyRNN(10, 20, nonlinearity="relu", tau=100.0, dt=20.0, noise=0.05)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *,
        form: str = "rate",
        alpha: Tensor | float | None = None,
        tau: Tensor | float | None = None,
        dt: Tensor | float | None = None,
        learn_alpha: bool = False,
        noise: float = 0.0,
        state_noise: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        checkpoint_every: int | None = None,
        truncate: int | None = None,
        grad_clip: float | None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        weight_drop: float = 0.0,
    ) -> None:
        self._set_options(nonlinearity, form, noise, state_noise)
        self._set_gradient_options(checkpoint_every, truncate, grad_clip)
        leak = _leak(alpha, tau, dt, hidden_size, learn_alpha)
        super().__init__(
            "RNN_RELU" if nonlinearity == "relu" else "RNN_TANH",  # required by nn.RNNBase; unused
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._set_rates(
            recurrent_dropout=recurrent_dropout, zoneout=zoneout, weight_drop=weight_drop
        )
        logit_names = [names[0].replace("weight_ih", "alpha_logit") for names in self._all_weights]
        self._set_leak(leak, learn_alpha, logit_names, device, dtype)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        alpha: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_potential: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        alpha: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_potential: Literal[True],
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | PackedSequence | None = None,
        reset_to: Tensor | None = None,
        alpha: Tensor | PackedSequence | None = None,
        generator: torch.Generator | None = None,
        return_potential: Literal[False] = False,
    ) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | PackedSequence | None = None,
        reset_to: Tensor | None = None,
        alpha: Tensor | PackedSequence | None = None,
        generator: torch.Generator | None = None,
        return_potential: Literal[True],
    ) -> tuple[PackedSequence, Tensor, PackedSequence]: ...

    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | PackedSequence | None = None,
        reset_to: Tensor | None = None,
        alpha: Tensor | PackedSequence | None = None,
        generator: torch.Generator | None = None,
        return_potential: bool = False,
        lengths: Tensor | None = None,
        padding_value: float = 0.0,
        return_all_layers: bool = False,
        last_only: bool = False,
    ) -> tuple[Any, ...]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        reset: Tensor | PackedSequence | None = None,
        reset_to: Tensor | None = None,
        alpha: Tensor | PackedSequence | None = None,
        generator: torch.Generator | None = None,
        return_potential: bool = False,
        lengths: Tensor | None = None,
        padding_value: float = 0.0,
        return_all_layers: bool = False,
        last_only: bool = False,
    ) -> tuple[Any, ...]:
        """Run every layer over the sequence; see the class."""
        if return_potential and self.form != "potential":
            raise ValueError(
                "fusedrnn: return_potential must be False unless form is 'potential', "
                f"got True with form {self.form!r}"
            )
        if lengths is not None or getattr(input, "is_nested", False):
            return self._forward_ragged(
                input, lengths, padding_value, hx, reset=reset, reset_to=reset_to, alpha=alpha,
                generator=generator, return_potential=return_potential,
                return_all_layers=return_all_layers, last_only=last_only,
            )  # fmt: skip
        if padding_value != 0.0:
            raise checks.no_lengths(padding_value)
        series = None if alpha is None else self._alpha_series(input, alpha)
        options = self._reset_options(input, reset, reset_to)
        for i, option in enumerate(options):
            option["alpha"] = self._alpha_of(i) if series is None else series
            option["generator"] = generator
        if return_potential:
            first = 0 if return_all_layers else -2 if self.bidirectional else -1
            for option in options[first:]:
                option["return_potential"] = True
        results = self._forward(input, hx, self.nonlinearity, options, return_all_layers, last_only)
        return self._only_last(results) if last_only else results

    def _sent(self, states: Tensor) -> Tensor:
        return NONLINEARITIES[self.nonlinearity](states) if self.form == "potential" else states

    def _draws(self) -> bool:
        return self.training and (super()._draws() or self.noise > 0 or self.state_noise > 0)

    def _step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._weights_of_step()
        if self.learn_alpha:
            weights += tuple(map(torch.sigmoid, _tensors(self, self._logit_names)))
        elif (alpha := self._alpha_of(0)) is not None:
            weights += (alpha,) * self.num_layers
        if self.form != "potential":
            return step(x, state, weights, self.nonlinearity, self.form)
        return step(x, self._sent(state), weights, self.nonlinearity, self.form, state)

    def _alpha_series(
        self, input: Tensor | PackedSequence, alpha: Tensor | PackedSequence
    ) -> Tensor:
        """Return alpha of each step as ``[T, B, 1 or H]``, or packed ``[N, 1 or H]``."""
        series = self._series(input, alpha, "alpha", (1, self.hidden_size))
        rows = 1 if isinstance(input, PackedSequence) else 2
        return series.unsqueeze(-1) if series.dim() == rows else series


class LeakyRNNCell(_Leaky, nn.RNNCellBase):
    r"""One step of :class:`LeakyRNN`.

    With :math:`u = x W_{ih}^T + b_{ih} + b_{hh} + \sigma \xi`, it computes one of

    .. math::
        \text{rate:} \quad & h' = (1 - \alpha) h + \alpha \phi(u + h W_{hh}^T) + \sigma_s \zeta \\
        \text{potential:} \quad & v' = (1 - \alpha) v + \alpha (u + \phi(v) W_{hh}^T)
            + \sigma_s \zeta \\
        \text{inside:} \quad & h' = \phi((1 - \alpha) h + \alpha (u + h W_{hh}^T)
            + \sigma_s \zeta)

    Args:
        input_size: Number of features in the input, I.
        hidden_size: Number of features in the hidden state, H.
        bias: Whether the cell has ``b_ih`` and ``b_hh``.
        nonlinearity, form, alpha, tau, dt, learn_alpha, noise, state_noise: As in
            :class:`LeakyRNN`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Inputs:
        input: ``[B, I]``, or unbatched ``[I]``.
        hx: State, ``[B, H]``, or unbatched ``[H]``; None means zeros.
        generator: Source of the noise; None means torch's default generator.

    Outputs:
        state: h', or v' in the form ``"potential"``, in which the output is phi(v'); ``[B, H]``, or
        unbatched ``[H]``.

    Raises in the constructor:
        ValueError: As in :class:`LeakyRNN`.
        TypeError: As in :class:`LeakyRNN`.

    Raises in a call:
        ValueError: ``input`` or ``hx`` has a wrong number of dimensions.
        RuntimeError: Sizes, dtypes or devices do not match.

    Parameters are ``weight_ih`` ``[H, I]``, ``weight_hh`` ``[H, H]``, ``bias_ih`` and ``bias_hh``
    ``[H]``, with the same initial values as in ``nn.RNNCell`` for the same seed, and with
    ``learn_alpha`` ``alpha_logit`` ``[H]``. Otherwise ``alpha`` is a buffer.

    Example::

        >>> cell = fusedrnn.LeakyRNNCell(10, 20, form="potential", alpha=0.2)
        >>> v = None
        >>> for x in torch.randn(6, 3, 10):
        ...     v = cell(x, v)
        ...     output = torch.tanh(v)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        form: str = "rate",
        alpha: Tensor | float | None = None,
        tau: Tensor | float | None = None,
        dt: Tensor | float | None = None,
        learn_alpha: bool = False,
        noise: float = 0.0,
        state_noise: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._set_options(nonlinearity, form, noise, state_noise)
        leak = _leak(alpha, tau, dt, hidden_size, learn_alpha)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self._set_leak(leak, learn_alpha, ["alpha_logit"], device, dtype)

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Advance the state by one step; see the class."""
        batched = input.dim() == 2
        if input.dim() not in (1, 2):
            raise ValueError(f"fusedrnn: input must be [B, I] or [I], got {list(input.shape)}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"fusedrnn: input must have {self.input_size} features, got {input.size(-1)}"
            )
        if hx is not None and hx.dim() != input.dim():
            wanted = "[B, H]" if batched else "[H]"
            raise ValueError(f"fusedrnn: hx must be {wanted}, got {list(hx.shape)}")
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else hx.unsqueeze(0)
        state = self._rnn(
            input.unsqueeze(0),
            *_tensors(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
            h0=hx,
            nonlinearity=self.nonlinearity,
            alpha=self._alpha_of(0),
            generator=generator,
        )[1]
        return state if batched else state.squeeze(0)


# Let torch.load read whole models with weights_only=True, as in fusedrnn/modules.py.
torch.serialization.add_safe_globals([LeakyRNN, LeakyRNNCell])
