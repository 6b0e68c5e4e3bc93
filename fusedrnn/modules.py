"""Drop-in replacements for ``torch.nn.RNN`` and ``torch.nn.RNNCell``.

Parameters, state, constructor checks and their messages are inherited from torch; only the
computation from input to output is new. ``RNN`` derives from ``nn.RNNBase``, by way of ``Layers``,
and not from ``nn.RNN`` because ``torch.compile`` refuses every subclass of the latter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, Literal, NoReturn, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from . import checks, directions, dropout, ops
from .blocks import Blocks, each, is_long
from .functional import rnn, rnn_cell, rows_of
from .ragged import Ragged
from .torch_state import compiling, equal_sizes, step

_NONLINEARITIES = {"RNN_TANH": "tanh", "RNN_RELU": "relu"}  # by nn.RNN's attribute ``mode``
_RATES = ("recurrent_dropout", "zoneout", "weight_drop")
_OPTIONS = ("checkpoint_every", "truncate", "grad_clip", *_RATES)  # that nn.RNN does not have


def _tensors(module: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """Return the named attributes of ``module``, most of them parameters.

    Finding a parameter with ``getattr`` costs 0.4 us, so look in ``_parameters`` first. A
    parametrized weight, or one that was replaced by a plain tensor, is found by ``getattr`` alone.
    """
    parameters = module._parameters
    return [parameters[n] if n in parameters else getattr(module, n) for n in names]  # type: ignore[misc]


class Layers(nn.RNNBase):
    """Stacked layers with the parameters and layouts of ``nn.RNN``: the base of :class:`RNN`.

    A subclass defines ``forward``, which calls :meth:`_forward`.
    """

    # Class attributes, because modules that torch created, or an earlier version saved, lack them.
    checkpoint_every: int | None = None
    truncate: int | None = None
    grad_clip: float | None = None
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    weight_drop: float = 0.0

    def _set_gradient_options(
        self, checkpoint_every: int | None, truncate: int | None, grad_clip: float | None
    ) -> None:
        """Check the options, and set those that are not None."""
        options = {"checkpoint_every": checkpoint_every, "truncate": truncate}
        for name, steps in options.items():
            if checks.steps(name, steps) is not None:
                setattr(self, name, steps)
        if checks.grad_clip(grad_clip) is not None:
            self.grad_clip = grad_clip

    def _set_rates(self, **rates: float) -> None:
        """Check the rates of dropout inside the recurrence, and set those that are not 0."""
        for name, rate in rates.items():
            dropout.check_rate(name, rate)
            if rate:
                setattr(self, name, rate)

    def _rates(self) -> dict[str, Any]:
        """Return the argument ``rates`` of :meth:`_rnn` in a dict, empty if nothing is dropped."""
        training = self.training
        rates = dropout.Rates(
            self.recurrent_dropout if training else 0.0,
            self.zoneout,
            self.weight_drop if training else 0.0,
            training,
        )
        return {"rates": rates} if any(rates[:3]) else {}

    def _check_no_rates(self, where: str, names: Sequence[str]) -> None:
        """Raise an error if one of these rates is not 0, for code that does not support it."""
        for name in names:
            if rate := getattr(self, name):
                raise ValueError(f"fusedrnn: {name} must be 0 {where}, got {rate}")

    def extra_repr(self) -> str:
        words = [f"{name}={value}" for name in _OPTIONS if (value := getattr(self, name))]
        return ", ".join([super().extra_repr(), *words])

    @property  # type: ignore[override]
    def _flat_weights(self) -> tuple[Tensor | None, ...]:
        # nn.RNNBase stores a list here, which it must keep up to date. A tuple computed on demand
        # is also correct when functional_call, a parametrization or weight drop swaps the weights.
        return tuple(getattr(self, name, None) for name in self._flat_weights_names)

    @_flat_weights.setter
    def _flat_weights(self, value: Sequence[Tensor | None]) -> None:
        # nn.RNNBase assigns the weights that the module already has, which is allowed. A
        # parametrized weight is not compared: it is a new tensor on each access.
        names = self._flat_weights_names
        stored = {**vars(self), **self._parameters}
        if len(value) != len(names) or any(
            stored.get(name, new) is not new for name, new in zip(names, value)
        ):
            raise AttributeError(
                "fusedrnn: _flat_weights must be the weights of the module, got others; assign "
                "each weight itself, such as weight_hh_l0"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        super(nn.RNNBase, self).__setattr__(name, value)  # nn.RNNBase's also updates its list

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels read the weights wherever they are in memory."""

    def init_state(self, batch: int | None = None) -> Tensor:
        """Return the initial state of a stream for :meth:`step`: zeros ``[L, B, H]``.

        Without ``batch``, the state is unbatched, ``[L, H]``.
        """
        if self.bidirectional:
            raise _no_stream()
        rows = () if batch is None else (batch,)
        weight = _tensors(self, self._all_weights[0])[0]
        return weight.new_zeros(self.num_layers, *rows, self.hidden_size)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Advance every layer by one time step, for samples that arrive one by one.

        For an input with time first, the results are ``output[0]`` and ``state`` of ``output, state
        = self(x[None], state)``, but if gradients are disabled, a step takes a fraction of the
        time: on a CPU, a small step is one op for all layers, which allocates only the results.
        Forward hooks do not run.

        For blocks of samples, call the module itself with the state: ``output, state = self(block,
        state)``. On a CPU, in float32 and float64, the outputs are bitwise those of the whole
        sequence if each block has more than 24 rows (steps times B) and the form is not
        ``"potential"``. Otherwise they agree up to rounding: for fewer rows, the engine sums in
        another order; in low precision, the state is rounded between blocks; in the form
        ``"potential"``, the phi of the engine differs by rounding from torch's, which the first
        step of each block uses.

        Args:
            x: Input of the step, ``[B, I]``, or unbatched ``[I]``.
            state: State of every layer, ``[L, B, H]``, or unbatched ``[L, H]``, from
                :meth:`init_state` or from the previous step.

        Returns:
            The output of the last layer, ``[B, H]`` or ``[H]``, and the new state, which shares
            no memory with the old one.

        Raises:
            ValueError: The module is bidirectional, ``x`` has a wrong number of dimensions, or,
                in training, the module has ``recurrent_dropout`` or ``weight_drop``, whose masks
                last for a whole call.
            RuntimeError: Sizes, dtypes or devices do not match.

        Example::

            >>> rnn = fusedrnn.RNN(1, 32, num_layers=2)
            >>> state = rnn.init_state(batch=1)
            >>> with torch.inference_mode():
            ...     for x in torch.randn(100, 1, 1):
            ...         y, state = rnn.step(x, state)
        """
        if self.bidirectional:
            raise _no_stream()
        # _step raises an error for wrong arguments and for tensors that have no kernel. The call of
        # forward below then raises the module's own error, or runs a plain loop.
        if not (torch.is_grad_enabled() or self.zoneout or self._draws() or compiling()):
            try:
                return self._step(x, state)
            except (RuntimeError, TypeError, ValueError):
                pass
        if self.training:
            self._check_no_rates("for a step in training", ("recurrent_dropout", "weight_drop"))
        if x.dim() not in (1, 2):
            raise ValueError(f"fusedrnn: x must be [B, I] or [I], got {list(x.shape)}")
        time = 1 if self.batch_first and x.dim() == 2 else 0
        output, state = self.forward(x.unsqueeze(time), state)
        return output.squeeze(time), state

    def _step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Call the op ``step``; see :meth:`step`."""
        raise NotImplementedError

    def _weights_of_step(self) -> tuple[Tensor, ...]:
        """Return the weights of every layer, one after another.

        Every step looks them up, because a cache would have to notice when one is replaced.
        """
        names = self._flat_weights_names
        try:
            return itemgetter(*names)(self._parameters)  # 0.4 us less than _tensors
        except KeyError:
            return tuple(_tensors(self, names))

    def _draws(self) -> bool:
        """Return whether a step draws random numbers."""
        return self.training and (
            self.dropout > 0 or self.recurrent_dropout > 0 or self.weight_drop > 0
        )

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None,
        nonlinearity: str,
        options: list[dict[str, Any]] | None = None,
        all_layers: bool = False,
        last_only: bool = False,
    ) -> tuple[Any, ...]:
        """Run every layer over an input of any layout.

        Args:
            options: More arguments of :func:`fusedrnn.rnn`, for each layer and direction.
            all_layers: Return lists with a tensor for each layer, except for ``h_n``.
            last_only: The caller reads ``h_n`` alone; any other result may be incomplete.

        Returns:
            ``output``, ``h_n``, and the potential if the last layer's options request it.
        """
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                sizes = hx.size()
                if len(sizes) == 1 or equal_sizes(sizes[1], 1):
                    hx = self._for_every_row(hx, _batch_of(input))
                hx = self.permute_hidden(hx, sorted_indices)
            elif compiling():
                target = options[0].get("reset_to") if options else None
                if target is not None and target.dim() == 2:
                    rows = target.size(0)
                else:
                    rows = _batch_of(input)
                if rows is not None:
                    hx = data.new_zeros(len(self._all_weights), rows, self.hidden_size)
            results = self._run_layers(
                data, hx, batch_sizes, nonlinearity, options, all_layers, last_only
            )
            results = _map_series(
                lambda series: PackedSequence(
                    series, batch_sizes, sorted_indices, unsorted_indices
                ),
                results,
            )
            return results[0], self.permute_hidden(results[1], unsorted_indices), *results[2:]

        dim = input.dim()
        if dim not in (2, 3):
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {dim}D tensor instead")
        batched = dim == 3
        if hx is not None:
            if hx.dim() == 1 or (batched and hx.dim() == 3 and hx.shape[1] == 1):
                rows = input.shape[0 if self.batch_first else 1] if batched else None
                hx = self._for_every_row(hx, rows)
            if hx.dim() != dim:
                raise RuntimeError(
                    f"For {'batched' if batched else 'unbatched'} {dim}-D input, "
                    f"hx should also be {dim}-D but got {hx.dim()}-D tensor"
                )
        if not batched:
            hx = None if hx is None else hx.unsqueeze(1)
            x = input.unsqueeze(1)
            results = self._run_layers(x, hx, None, nonlinearity, options, all_layers, last_only)
            results = _map_series(lambda series: series.squeeze(1), results)
            return results[0], results[1].squeeze(1), *results[2:]
        if self.batch_first:
            x = input.transpose(0, 1)
            results = self._run_layers(x, hx, None, nonlinearity, options, all_layers, last_only)
            return _map_series(lambda series: series.transpose(0, 1), results)
        return self._run_layers(input, hx, None, nonlinearity, options, all_layers, last_only)

    def _forward_ragged(
        self,
        input: Any,
        lengths: Tensor | None,
        padding_value: float,
        hx: Tensor | None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Run ``forward`` with the input packed; ``options`` are the other arguments of forward."""
        ragged = Ragged(input, lengths, self.batch_first, padding_value)
        for name, widths in (("reset", ()), ("alpha", (1, self.hidden_size))):
            series = options.get(name)
            if series is None:
                continue
            if lengths is None:
                ragged.check(series, name, widths)
            else:
                self._series(input, series, name, widths)  # checks it
            options[name] = ragged.pack(series)
        sizes = (len(self._all_weights), ragged.batch, self.hidden_size)
        reset_to = options["reset_to"]
        if isinstance(reset_to, Tensor) and reset_to.dim() == 3:
            if reset_to.shape != sizes:
                wanted = _either([sizes[2:], sizes[::2], sizes])
                raise RuntimeError(
                    f"fusedrnn: reset_to must have sizes {wanted}, got {list(reset_to.shape)}"
                )
            options["reset_to"] = reset_to.index_select(1, ragged.order)
        packed = ragged.pack(input)
        if hx is None:
            states = packed.data.new_zeros(sizes)
        else:
            states = self._for_every_row(hx, ragged.batch)
            self.check_hidden_size(states, sizes)
        if not compiling() and ragged.count == 0:  # no step to run
            directions = 2 if self.bidirectional else 1
            empty = packed._replace(data=packed.data.new_empty(0, directions * self.hidden_size))
            output = [empty] * self.num_layers if options["return_all_layers"] else empty
            results = (output, states, *[output] * options.get("return_potential", False))
        else:
            output, h_n, *potential = self.forward(
                packed, states.index_select(1, ragged.order), **options
            )
            states = states.to(h_n.dtype).index_copy(1, ragged.order, h_n)
            results = (output, states, *potential)
        if options["last_only"]:
            return self._only_last(results)
        return _map_series(ragged.unpack, results)

    def _for_every_row(self, hx: Tensor, batch: int | None) -> Tensor:
        """Expand ``hx`` of one row, ``[L*D, 1, H]`` or ``[H]``, over the batch.

        ``batch`` is None for an unbatched input. An ``hx`` of other sizes is returned unchanged;
        the checks of nn.RNN reject wrong ones.
        """
        states, size = len(self._all_weights), self.hidden_size
        if hx.shape == (size,):
            return hx.expand(states, size) if batch is None else hx.expand(states, batch, size)
        if batch is not None and hx.shape == (states, 1, size) and batch != 1:
            return hx.expand(states, batch, size)
        return hx

    def _only_last(self, results: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace each series in the results of :meth:`_forward` by its last step."""
        output, h_n, *potential = results
        directions = 2 if self.bidirectional else 1

        def last(states: Tensor) -> Any:
            layers = [
                torch.cat(states[i : i + directions].unbind(0), -1)
                for i in range(0, len(self._all_weights), directions)
            ]
            return layers if isinstance(output, list) else layers[-1]

        return last(self._sent(h_n)), h_n, *(last(h_n) for _ in potential)

    def _sent(self, states: Tensor) -> Tensor:
        """Return the outputs of units in these states."""
        return states

    def _run_layers(
        self,
        x: Tensor,
        hx: Tensor | None,
        batch_sizes: Tensor | None,
        nonlinearity: str,
        options: list[dict[str, Any]] | None,
        all_layers: bool,
        last_only: bool,
    ) -> tuple[Any, ...]:
        """Run every layer over ``x [T, B, I]``, or packed ``[N, I]``; see :meth:`_forward`.

        ``hx`` and ``h_n`` are ``[L*D, B, H]``.
        """
        names = self._all_weights
        blocks: Any = self.checkpoint_every or self.truncate
        blocks = blocks or (last_only and is_long(x, batch_sizes))
        if (
            options is None
            and not blocks
            and self.grad_clip is None
            and len(names) == 1
            and self.num_layers == 1
            and not self.bidirectional
        ):
            # The code below gives the same results, but takes 0.7 us longer.
            one_layer = _tensors(self, names[0])
            self._check(x, hx, batch_sizes, one_layer[0])
            h0 = None if hx is None else hx[0]
            output, h = rnn(  # type: ignore[call-overload]  # of two or four weights
                x, *one_layer, h0=h0, nonlinearity=nonlinearity, batch_sizes=batch_sizes
            )
            return [output] if all_layers else output, h.unsqueeze(0)

        weights = [_tensors(self, layer_names) for layer_names in names]
        self._check(x, hx, batch_sizes, weights[0][0])
        num_directions = 2 if self.bidirectional else 1
        if len(weights) != self.num_layers * num_directions:  # the caller changed these attributes
            raise RuntimeError(
                f"Expected weights of {self.num_layers} layers in {num_directions} direction(s), "
                f"got {len(weights)}"
            )
        if blocks:
            draws = self._draws() or (self.training and self.zoneout > 0)
            inputs = [x, hx, weights, options]
            blocks = Blocks(self.checkpoint_every, self.truncate, last_only, draws, inputs)
        if blocks and self.training:  # their masks last for the whole sequence
            self._check_no_rates(
                "in training with checkpoint_every or truncate",
                ("recurrent_dropout", "weight_drop"),
            )
        run = functools.partial(self._run_stack, nonlinearity, all_layers)
        if blocks and not self.bidirectional:
            return blocks.run(run, weights, x, hx, batch_sizes, options, last_only=last_only)
        return run(weights, x, hx, batch_sizes, options, blocks)

    def _run_stack(
        self,
        nonlinearity: str,
        all_layers: bool,
        weights: list[list[Tensor]],
        x: Tensor,
        hx: Tensor | None,
        batch_sizes: Tensor | None,
        options: list[dict[str, Any]] | None,
        blocks: Blocks | None = None,
    ) -> tuple[Any, ...]:
        """Run every layer, with each direction divided into ``blocks``; see :meth:`_run_layers`."""
        num_directions = 2 if self.bidirectional else 1
        h0s = [None] * len(weights) if hx is None else hx.unbind(0)
        plain = options is None and not blocks and self.grad_clip is None
        on_gpu = num_directions == 2 and x.is_cuda and plain
        h_n: list[Tensor] = []
        layers: list[Tensor] = []
        potentials: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout and self.training:
                x = torch.dropout(x, self.dropout, True)
            outputs: list[Tensor] = []
            potential: list[Tensor] = []
            i = layer * num_directions
            if on_gpu and directions.pays(x, weights[i : i + 2], h0s[i : i + 2], batch_sizes):
                outputs, h_of_both = directions.both_directions(
                    x, weights[i : i + 2], h0s[i : i + 2], nonlinearity, batch_sizes
                )
                h_n += h_of_both
            else:
                for direction in range(num_directions):
                    place = i + direction
                    reverse = direction == 1
                    run = functools.partial(self._run_direction, nonlinearity, reverse)
                    one: Any = options and [options[place]]
                    arguments: Any = (weights[place], x, h0s[place], batch_sizes, one)
                    if blocks:
                        last_only = blocks.last_only and layer == self.num_layers - 1
                        results = blocks.run(run, *arguments, reverse=reverse, last_only=last_only)
                    else:
                        results = run(*arguments)
                    outputs.append(results[0])
                    h_n.append(results[1])
                    if len(results) == 3:
                        potential.append(results[2])
            x = outputs[0] if num_directions == 1 else torch.cat(outputs, -1)
            if all_layers:
                layers.append(x)
            if potential:
                potentials.append(potential[0] if num_directions == 1 else torch.cat(potential, -1))
        output = layers if all_layers else x
        if potentials:
            return output, torch.stack(h_n), potentials if all_layers else potentials[-1]
        return output, torch.stack(h_n)

    def _run_direction(
        self,
        nonlinearity: str,
        reverse: bool,
        weights: list[Tensor],
        x: Tensor,
        h0: Tensor | None,
        batch_sizes: Tensor | None,
        options: list[dict[str, Any]] | None,
    ) -> tuple[Tensor, ...]:
        """Run one layer in one direction, with the options of :meth:`_forward`."""
        return self._rnn(
            x,
            *weights,
            h0=h0,
            nonlinearity=nonlinearity,
            reverse=reverse,
            batch_sizes=batch_sizes,
            grad_clip=self.grad_clip,
            **(options[0] if options else {}),
        )

    def _rnn(
        self, x: Tensor, *weights: Tensor, rates: dropout.Rates | None = None, **arguments: Any
    ) -> tuple[Tensor, ...]:
        """Call :func:`fusedrnn.rnn`; :class:`fusedrnn.LeakyRNN` adds its form and noise."""
        if rates is None:
            return rnn(x, *weights, **arguments)
        return dropout.rnn(rates, None, x, *weights, **arguments)

    def _check(
        self, x: Tensor, hx: Tensor | None, batch_sizes: Tensor | None, weight: Tensor
    ) -> None:
        """Raise the errors of nn.RNN, in its order.

        This is one function because each function call costs 0.1 us.
        """
        dim = 3 if batch_sizes is None else 2
        if x.dtype != weight.dtype or x.size(-1) != self.input_size or x.dim() != dim:
            self.check_input(x, batch_sizes)  # accepts another dtype under autocast
        if hx is not None:
            if batch_sizes is None:
                batch = x.size(1)
            elif compiling():  # depends on data: the op checks it
                batch = hx.size(1)
            else:
                batch = int(batch_sizes[0])
            self.check_hidden_size(hx, (len(self._all_weights), batch, self.hidden_size))
            _check_device(x, hx, "hidden")
        _check_device(x, weight, "parameter")
        if x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _reset_options(
        self, input: Tensor | PackedSequence, reset: Any, reset_to: Tensor | None
    ) -> list[dict[str, Any]]:
        """Return the options of :meth:`_forward` for resets and dropout."""
        rates = self._rates()
        if reset is None:
            if reset_to is not None:
                raise ValueError("fusedrnn: reset must be a tensor if reset_to is given, got None")
            return [{**rates} for _ in self._all_weights]
        reset = self._series(input, reset, "reset")
        if reset.dtype != torch.bool:
            raise RuntimeError(f"fusedrnn: reset must be torch.bool, got {reset.dtype}")
        masks = [reset]
        if self.bidirectional:
            batch_sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
            masks.append(_last_steps(reset, batch_sizes))
        targets: Sequence[Tensor | None] = [None] * len(self._all_weights)
        if reset_to is not None:
            targets = self._reset_targets(input, reset_to)
        return [
            {"reset": masks[i % len(masks)], "reset_to": target, **rates}
            for i, target in enumerate(targets)
        ]

    def _reset_targets(
        self, input: Tensor | PackedSequence, reset_to: Tensor
    ) -> Sequence[Tensor | None]:
        """Return the state after a reset, ``[H]`` or ``[B, H]``, for each layer and direction."""
        if not isinstance(reset_to, Tensor):
            raise TypeError(f"fusedrnn: reset_to must be a tensor, got {type(reset_to).__name__}")
        states, size = len(self._all_weights), self.hidden_size
        shapes: list[tuple[int, ...]] = [(size,), (states, size)]
        if isinstance(input, PackedSequence):
            # When compiling, B depends on data, and the op checks it.
            given = compiling() and reset_to.dim() == 3
            batch = reset_to.size(1) if given else int(input.batch_sizes[0])
            shapes.append((states, batch, size))
        elif input.dim() == 3:
            shapes.append((states, input.size(0 if self.batch_first else 1), size))
        if reset_to.shape not in shapes:
            raise RuntimeError(
                f"fusedrnn: reset_to must have sizes {_either(shapes)}, got {list(reset_to.shape)}"
            )
        if reset_to.dim() == 1:
            return [reset_to] * states
        if reset_to.dim() == 3 and isinstance(input, PackedSequence):
            reset_to = self.permute_hidden(reset_to, input.sorted_indices)
        return reset_to.unbind(0)

    def _series(
        self, input: Tensor | PackedSequence, series: Any, name: str, widths: Sequence[int] = ()
    ) -> Tensor:
        """Check an argument with a value for each step, and return it with time first, or packed.

        Its sizes must be those of ``input`` without the features, or with one of ``widths``
        features.
        """
        if isinstance(input, PackedSequence):
            data = input.data
            if isinstance(series, PackedSequence):
                _check_same_packing(input, series, name)
                series = series.data
        else:
            data = input
        if not isinstance(series, Tensor):
            raise TypeError(f"fusedrnn: {name} must be a tensor, got {type(series).__name__}")
        rows = tuple(data.shape[:-1])
        shapes = [rows, *((*rows, width) for width in widths)]
        packed = isinstance(input, PackedSequence)
        # When compiling, N depends on data, and the op checks it.
        if not (packed and compiling()) and series.shape not in shapes:
            raise RuntimeError(
                f"fusedrnn: {name} must have sizes {_either(shapes)}, got {list(series.shape)}"
            )
        if packed:
            return series
        if data.dim() == 2:
            return series.unsqueeze(1)
        return series.transpose(0, 1) if self.batch_first else series


def _no_stream() -> ValueError:
    return ValueError(
        "fusedrnn: bidirectional must be False for a stream, got True: the reverse direction "
        "starts at the end"
    )


def _batch_of(packed: PackedSequence) -> int | None:
    """Return B, or None while ``torch.export`` traces ``pack_padded_sequence``."""
    if not compiling():
        return int(packed.batch_sizes[0])
    if packed.sorted_indices is not None:
        return packed.sorted_indices.size(0)
    return rows_of(packed.batch_sizes)


def _map_series(function: Callable[[Any], Any], results: tuple[Any, ...]) -> tuple[Any, ...]:
    """Apply ``function`` to the series among the results of a layer: all but ``h_n``."""
    output, h_n, *potential = results
    return each(function, output), h_n, *(each(function, series) for series in potential)


def _either(shapes: Sequence[tuple[int, ...]]) -> str:
    """Return the shapes as words: ``[5, 3], [5, 3, 1] or [5, 3, 6]``."""
    *first, last = [str(list(shape)) for shape in dict.fromkeys(shapes)]
    return f"{', '.join(first)} or {last}" if first else last


def _check_same_packing(input: PackedSequence, series: PackedSequence, name: str) -> None:
    if compiling():
        return  # the values depend on data
    for field in ("batch_sizes", "sorted_indices"):
        wanted, got = getattr(input, field), getattr(series, field)
        if wanted is got:
            continue
        if wanted is None or got is None or not torch.equal(wanted, got):
            raise RuntimeError(
                f"fusedrnn: {name} must be packed like the input, got {field} {_values(got)} "
                f"instead of {_values(wanted)}"
            )


def _values(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.tolist()


def _last_steps(reset: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """Return whether each step is the last one of its episode: whether the next step is a reset.

    The reverse direction reaches step t - 1 from step t, so an episode that begins at t resets
    the state before step t - 1.
    """
    return ops.following(reset.unsqueeze(-1), None, batch_sizes, False).squeeze(-1)


class RNN(Layers):
    r"""An Elman RNN of one or more layers: ``torch.nn.RNN`` with one fused kernel per layer.

    Each layer computes, for every time step t,

    .. math::
        h_t = \tanh(x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh})

    where :math:`x_t` is the input, or the :math:`h_t` of the layer below; with
    ``nonlinearity="relu"``, ReLU replaces tanh. A step at which ``reset`` is true starts from
    ``reset_to`` instead of :math:`h_{t-1}`.

    Args:
        input_size: Number of features in the input, I.
        hidden_size: Number of features in the hidden state, H.
        num_layers: Number of stacked layers, L.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: Whether the layers have ``b_ih`` and ``b_hh``.
        batch_first: Whether input and output are ``[B, T, ...]`` instead of ``[T, B, ...]``. Does
            not apply to ``hx`` and ``h_n``, and is ignored for unbatched and packed input.
        dropout: Probability of zeroing an element of the output of every layer but the last, in
            training.
        bidirectional: Whether a second set of weights runs from the last step to the first. The
            number of directions, D, is then 2, otherwise 1. On CUDA, both directions run
            concurrently, on two streams, if there are 128 steps or more, no resets and no dropout
            inside the recurrence.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        checkpoint_every: Keep only every k-th state for backward, which computes the others again.
            This takes the memory of about T/k + k states, plus what the caller keeps. It pays off
            with ``last_only``, or with several layers in one direction, because the outputs of
            layers are then not kept either. With ``bidirectional``, the outputs between layers are
            kept. A backward pass that is differentiated again keeps all states. None means to keep
            all states.
        truncate: Truncated backpropagation through time: no gradient passes from step k, 2k, ...
            to the step before it. Steps are counted from 0 in the order in which the direction runs
            (for packed and ragged input in reverse, from the end of the longest row). The gradients
            are those of a loop over chunks of k steps that detaches the state after each chunk; the
            output is the same as without ``truncate``. None means not to truncate.
        grad_clip: Limit c > 0 of the gradient of the state in every step of backward: every element
            of the gradient that step t sends to :math:`h_{t-1}` is clipped to [-c, c], before the
            gradient that ``output`` receives from the loss at step t-1 is added. The gradient of
            ``hx`` is clipped, too. None means not to clip.
        recurrent_dropout: Probability p, in training, that the output of a unit is zeroed where it
            enters ``W_hh``: with one mask m for each row and unit of a layer and direction,
            :math:`(m \odot h_{t-1}) W_{hh}^T / (1 - p)` replaces :math:`h_{t-1} W_{hh}^T` (Gal and
            Ghahramani, 2016). The output of the layer is not masked.
        zoneout: Probability p, in training, that a unit keeps its state: with a mask z for each
            step, row and unit, the new state is :math:`z \odot k + (1 - z) \odot h_t`, where k is
            the state that the step starts from (Krueger et al., 2017). In evaluation, z is p.
        weight_drop: Probability p, in training, that an element of ``W_hh`` is zeroed; the others
            are divided by 1 - p (DropConnect; Merity et al., 2018).

    Inputs:
        input: ``[T, B, I]``, with ``batch_first`` ``[B, T, I]``, unbatched ``[T, I]``, a
            ``PackedSequence``, or a nested tensor of B rows ``[length, I]`` with the layout
            ``torch.jagged``.
        hx: State before the first step, ``[L*D, B, H]``, unbatched ``[L*D, H]``; or
            ``[L*D, 1, H]``, the same for every row; or ``[H]``, the same for every row, layer and
            direction. None means zeros.
        reset: True at the first step of each episode: bool ``[T, B]``, with ``batch_first``
            ``[B, T]``, unbatched ``[T]``; with a packed input ``[N]``, the rows of its ``data``, or
            a ``PackedSequence`` with the same layout; nested with a nested input. Every layer is
            reset at the same steps. The reverse direction runs from later episodes to earlier ones,
            so its state is reset before it computes the last step of any episode but the final one.
            None means no resets.
        reset_to: State after a reset, ``[H]``, or for each layer and direction ``[L*D, H]`` or
            ``[L*D, B, H]`` (not unbatched); may be learned. None means zeros.
        lengths: Number of steps of each row of a padded input, ``[B]``, integers in any order, 0
            allowed. The padding is not read, and each row ends at its own last step, as with a
            packed input. A tensor on the CPU avoids waiting for the GPU. If all lengths are 0, T
            may be 0; ``h_n`` is then ``hx``.
        padding_value: Value of ``output`` in the padding; only with ``lengths``.
        return_all_layers: Return a list in place of ``output``, with the output of each layer,
            before the dropout that follows it.
        last_only: In place of ``output``, return only the last step of each row, ``[B, D*H]``,
            unbatched ``[D*H]``: the layer's part of ``h_n``, with both directions side by side. The
            last step of the reverse direction is the first one in time, so each direction has read
            the whole row. If no gradient is needed, the whole output of the last layer is never
            stored.

    Outputs:
        output: Every state of the last layer, in the shape of the input but with D*H features. A
            packed input gives a packed output, a nested one a nested output.
        h_n: The last state of every layer and direction, ``[L*D, B, H]``, unbatched ``[L*D, H]``.
            A row of length 0 keeps the state ``hx``.

    With ``checkpoint_every`` or ``truncate``, the layers run in blocks of k steps (with both, the
    borders of both apply). Each block costs a few hundred microseconds of overhead, so k should be
    at least a few hundred. Under the conditions of :meth:`step`, the output is bitwise that without
    blocks; otherwise it agrees up to rounding. Both hold for ``last_only`` as well: 4096 steps or
    more run in blocks of 2048 if no gradient is needed and no random number is drawn. Random
    numbers are drawn block by block, and backward draws the same ones again, also from a
    ``generator``. Do not switch between ``train()`` and ``eval()`` between forward and backward.
    ``torch.compile`` unrolls the blocks, and compiles again for another T. ``torch.func``, forward
    mode, ``torch.jit.trace`` and ``torch.export`` keep all states, whatever ``checkpoint_every``
    is. To export a module with ``truncate`` for any T, export it under
    ``torch.no_grad()``.

    Each layer k has the parameters ``weight_ih_l{k}`` ``[H, I]`` (above the first layer
    ``[H, D*H]``), ``weight_hh_l{k}`` ``[H, H]``, ``bias_ih_l{k}`` and ``bias_hh_l{k}`` ``[H]``; the
    reverse direction has others, with the suffix ``_reverse``. All are initialised from
    :math:`U(-1/\sqrt{H}, 1/\sqrt{H})`, with the same values as in ``nn.RNN`` for the same seed.

    Dropout inside the recurrence costs nothing when it is off. The masks of ``recurrent_dropout``
    and ``weight_drop`` last for a whole call, and are the same for all steps and episodes. All
    masks are drawn from torch's default generator, in training only: layers in order, forward
    before reverse, and for each of them ``weight_drop``, then ``recurrent_dropout``, then
    ``zoneout``. ``weight_drop`` costs one copy of ``W_hh``. ``zoneout`` costs a tensor in the shape
    of the output, and the leak of the engine. ``recurrent_dropout`` costs another GEMM and two such
    tensors, and together with ``zoneout`` a second pass of the engine.

    Raises in the constructor:
        ValueError: A size or a number of steps is not positive, the nonlinearity is unknown,
            ``dropout`` is outside [0, 1], a rate of dropout inside the recurrence is outside
            [0, 1), or ``proj_size`` is given.
        TypeError: A size or a number of steps is not an int, a rate is not a number, ``bias`` or
            ``batch_first`` is not a bool, or an argument is unknown or missing.

    Raises in a call:
        ValueError: ``input`` is neither 2-D nor 3-D, its dtype is not that of the weights,
            ``recurrent_dropout`` or ``weight_drop`` is on in training with ``checkpoint_every`` or
            ``truncate``, or ``recurrent_dropout`` with ``grad_clip``, ``reset_to`` is given without
            ``reset`` or ``padding_value`` without ``lengths``, a length is not in [0, T], or
            ``lengths`` comes with an input that is not padded.
        RuntimeError: ``hx``, ``reset`` or ``reset_to`` does not match ``input``, ``reset`` is not
            bool, ``input`` does not have ``input_size`` features, there is no time step, or tensors
            are on different devices.
        TypeError: ``reset``, ``reset_to`` or ``lengths`` is not a tensor, or is a tensor of a wrong
            kind.
        NotImplementedError: ``lengths`` differs between the samples of ``torch.vmap``, packed or
            ragged input is compiled with ``checkpoint_every`` or ``truncate``, or a second
            derivative is computed with ``grad_clip``.

    Differences from ``nn.RNN``:
        - ``isinstance(module, nn.RNN)`` is false; ``isinstance(module, nn.RNNBase)`` is true. Apply
          tools that recognise modules by torch's classes before :func:`replace` or after
          :func:`restore`.
        - The constructor has an explicit signature, so ``torch.nn.utils.skip_init`` works.
        - ``_flat_weights`` is a tuple of the weights as they are when it is read. Assigning other
          tensors to it, or to an element, raises an error: assign ``weight_hh_l0`` and so on.
          ``flatten_parameters`` does nothing on any device: no kernel needs the weights in one
          block of memory.
        - ``forward`` also takes nested input, ``reset``, ``reset_to``, ``lengths``,
          ``padding_value``, ``return_all_layers`` and ``last_only``, and an ``hx`` that is the same
          for every row.
        - ``output`` itself is saved for backward; modifying it in place before backward raises an
          error there.
        - ``torch.jit.script`` cannot compile it; ``torch.compile`` and ``torch.export`` can.
        - ``torch.fx.symbolic_trace`` cannot trace it, because only classes of ``torch.nn`` are
          leaves by default. A tracer can declare it a leaf::

              >>> class Tracer(torch.fx.Tracer):
              ...     def is_leaf_module(self, m, name):
              ...         return isinstance(m, fusedrnn.RNN) or super().is_leaf_module(m, name)
              >>> traced = torch.fx.GraphModule(model, Tracer().trace(model))

    Example::

        >>> rnn = fusedrnn.RNN(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        checkpoint_every: int | None = None,
        truncate: int | None = None,
        grad_clip: float | None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        weight_drop: float = 0.0,
        **unknown: NoReturn,  # nn.RNNBase rejects them with nn.RNN's message
    ) -> None:
        if "proj_size" in unknown:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity  # before super(): read by reset_parameters of subclasses
        self._set_gradient_options(checkpoint_every, truncate, grad_clip)
        super().__init__(
            "RNN_TANH" if nonlinearity == "tanh" else "RNN_RELU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **unknown,
        )
        self._set_rates(
            recurrent_dropout=recurrent_dropout, zoneout=zoneout, weight_drop=weight_drop
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        padding_value: float = 0.0,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to: Tensor | None = None,
        *,
        last_only: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        padding_value: float = 0.0,
        return_all_layers: bool,
        last_only: bool = False,
    ) -> tuple[Any, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to: Tensor | None = None,
        lengths: Tensor | None = None,
        padding_value: float = 0.0,
        return_all_layers: bool = False,
        last_only: bool = False,
    ) -> tuple[Any, Tensor]:
        """Run every layer over the sequence; see the class."""
        # Not keyword-only: torch's TorchScript exporter passes every argument by position.
        if lengths is not None or getattr(input, "is_nested", False):
            return self._forward_ragged(  # type: ignore[return-value]
                input, lengths, padding_value, hx, reset=reset, reset_to=reset_to,
                return_all_layers=return_all_layers, last_only=last_only,
            )  # fmt: skip
        if padding_value != 0.0:
            raise checks.no_lengths(padding_value)
        options = None
        dropping = self.training and (self.recurrent_dropout or self.weight_drop)
        if reset is not None or reset_to is not None or self.zoneout or dropping:
            options = self._reset_options(input, reset, reset_to)
        nonlinearity = _NONLINEARITIES[self.mode]
        results = self._forward(input, hx, nonlinearity, options, return_all_layers, last_only)
        return self._only_last(results) if last_only else results  # type: ignore[return-value]

    def _step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if self.mode == "RNN_TANH":  # the default: passing a string costs 0.3 us
            return step(x, state, self._weights_of_step())
        return step(x, state, self._weights_of_step(), _NONLINEARITIES[self.mode])


def _check_device(x: Tensor, other: Tensor, name: str) -> None:
    if x.device != other.device:
        raise RuntimeError(
            f"Input and {name} tensors are not at the same device, "
            f"found input tensor at {x.device} and {name} tensor at {other.device}"
        )


class RNNCell(nn.RNNCell):
    r"""One step of an Elman RNN: ``torch.nn.RNNCell`` with one fused kernel.

    .. math::
        h' = \tanh(x W_{ih}^T + b_{ih} + h W_{hh}^T + b_{hh})

    With ``nonlinearity="relu"``, ReLU replaces tanh.

    Args:
        input_size: Number of features in the input, I.
        hidden_size: Number of features in the hidden state, H.
        bias: Whether the cell has ``b_ih`` and ``b_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``; checked by each call, as in nn.RNNCell.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Inputs:
        input: ``[B, I]``, or unbatched ``[I]``.
        hx: State before the step, h, ``[B, H]``, or unbatched ``[H]``; None means zeros.

    Outputs:
        h': State after the step, ``[B, H]``, or unbatched ``[H]``.

    Raises in a call:
        ValueError: ``input`` or ``hx`` is neither 1-D nor 2-D.
        RuntimeError: Sizes do not match, or the nonlinearity is unknown.

    Parameters are ``weight_ih`` ``[H, I]``, ``weight_hh`` ``[H, H]``, ``bias_ih`` and ``bias_hh``
    ``[H]``, with the same initial values as in nn.RNNCell for the same seed.

    Example::

        >>> cell = fusedrnn.RNNCell(10, 20)
        >>> h = None
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Advance the state by one step; see the class."""
        dim = input.dim()
        if dim not in (1, 2):
            raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {dim}D instead")
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        w_ih, w_hh, b_ih, b_hh = _tensors(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        x = input if dim == 2 else input.unsqueeze(0)
        rows, features = x.shape
        if features != w_ih.size(1):
            raise RuntimeError(
                f"input has inconsistent input_size: got {features} expected {w_ih.size(1)}"
            )
        if hx is None:
            h = x.new_zeros(rows, self.hidden_size)
        else:
            h = hx if dim == 2 else hx.unsqueeze(0)
            if h.size(0) != rows:
                raise RuntimeError(
                    f"Input batch size {rows} doesn't match hidden0 batch size {h.size(0)}"
                )
            if h.size(1) != w_hh.size(1):
                raise RuntimeError(
                    f"hidden0 has inconsistent hidden_size: got {h.size(1)}, "
                    f"expected {w_hh.size(1)}"
                )
        h = rnn_cell(x, h, w_ih, w_hh, b_ih, b_hh, self.nonlinearity)
        return h if dim == 2 else h.squeeze(0)


_OURS: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: RNN, nn.RNNCell: RNNCell}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}

# This lets torch.load read whole models with its default, weights_only=True. Loading calls __new__,
# __init__ and __setstate__ of these classes with whatever the file contains; none of them executes
# code from it.
torch.serialization.add_safe_globals([RNN, RNNCell])

_Module = TypeVar("_Module", bound=nn.Module)


def replace(model: _Module) -> _Module:
    """Convert every ``nn.RNN`` and ``nn.RNNCell`` in ``model`` to this package's class, in place.

    Nothing is copied: only the class of each module changes. Its identity, its parameters (and an
    optimizer that holds them), buffers, hooks, parametrizations and training mode stay the same.
    Other modules are not changed. That includes subclasses of ``nn.RNN``, whose code may rely on
    their base class.

    Args:
        model: Any module; may itself be an ``nn.RNN`` or ``nn.RNNCell``.

    Returns:
        ``model``.

    Example::

        >>> model = fusedrnn.replace(torch.nn.Sequential(torch.nn.RNN(10, 20)))
    """
    return _change_classes(model, _OURS)


def restore(model: _Module) -> _Module:
    """Convert each ``fusedrnn.RNN`` and ``fusedrnn.RNNCell`` in ``model`` to torch's, in place.

    This is the inverse of :func:`replace`, with the same rules. It also accepts a model that was
    built with this package's modules. Use it to save a whole model for an environment without
    fusedrnn, and before tools that recognise only torch's classes, such as ``torch.jit.script``.

    Args:
        model: Any module; may itself be a ``fusedrnn.RNN`` or ``fusedrnn.RNNCell``.

    Returns:
        ``model``.

    Raises:
        ValueError: A module has dropout inside the recurrence, or truncates or clips gradients,
            which ``nn.RNN`` cannot do. ``model`` is then left unchanged. (``checkpoint_every`` is
            dropped, because it changes no result.)

    Example::

        >>> scripted = torch.jit.script(fusedrnn.restore(model))
    """
    if isinstance(model, nn.Module):
        for module in model.modules():
            ours = parametrize.type_before_parametrizations(module) is RNN
            if ours and isinstance(module, RNN):
                module._check_no_rates("to restore a module", _RATES)
                for name in ("truncate", "grad_clip"):
                    if (value := getattr(module, name)) is not None:
                        raise ValueError(
                            f"fusedrnn: {name} must be None to restore a module, got {value}"
                        )
    return _change_classes(model, _TORCHS)


def _change_classes(model: _Module, classes: dict[type[nn.Module], type[nn.Module]]) -> _Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fusedrnn: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        cls = classes.get(parametrize.type_before_parametrizations(module))
        if cls is None:
            continue
        if parametrize.is_parametrized(module):
            cls = _rebase(type(module), cls)
        module.__class__ = cls
        module.__dict__.pop("_flat_weights", None)  # a list in nn.RNN, a property in RNN
        if isinstance(module, nn.RNNBase) and not isinstance(module, RNN):
            for name in _OPTIONS:
                module.__dict__.pop(name, None)
            with torch.no_grad():  # otherwise a parametrized weight in the list keeps its graph
                module._init_flat_weights()
    return model


def _rebase(parametrized: type, base: type) -> type:
    """Rebuild the class that ``torch.nn.utils.parametrize`` made for a module, on another base."""
    own = {k: v for k, v in vars(parametrized).items() if k not in ("__dict__", "__weakref__")}
    return type(parametrized.__name__, (base,), own)
