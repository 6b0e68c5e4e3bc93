"""The expected results of stacked layers: the reference, once for each row, layer and direction.

Every row runs alone, without batch, padding or packing, and the reverse direction is a forward run
over the reversed steps. The modules' code for layouts is therefore not used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fusedrnn import reference


def data_of(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def pack(values: Tensor, lengths: list[int], enforce_sorted: bool) -> PackedSequence:
    """Pack ``[T, B, ...]``, with the lengths sorted if the packing requires it."""
    lengths = sorted(lengths, reverse=True) if enforce_sorted else lengths
    return pack_padded_sequence(values, torch.tensor(lengths), enforce_sorted=enforce_sorted)


def batch_of(module: nn.RNNBase, x: Any) -> int:
    if isinstance(x, PackedSequence):
        return int(x.batch_sizes[0])
    return 1 if x.dim() == 2 else x.size(0 if module.batch_first else 1)


def state_for(module: nn.RNNBase, x: Any, **kwargs: Any) -> Tensor:
    """Return a random state for every layer and direction, in the layout of ``hx``."""
    states = module.num_layers * (2 if module.bidirectional else 1)
    unbatched = not isinstance(x, PackedSequence) and x.dim() == 2
    rows = () if unbatched else (batch_of(module, x),)
    return torch.randn(states, *rows, module.hidden_size, **kwargs)


def by_row(module: nn.RNNBase, x: Any, series: Any) -> list[Any]:
    """Split a series in the layout of ``x`` into one tensor ``[length, ...]`` for each row."""
    if series is None:
        return [None] * batch_of(module, x)
    if isinstance(series, Tensor) and series.is_nested:
        return list(series.unbind())
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x._replace(data=data_of(series)))
        return [padded[:length, row] for row, length in enumerate(lengths)]
    if x.dim() == 2:
        return [series]
    return list(series.unbind(0 if module.batch_first else 1))


def state_of(states: Tensor | None, index: int, row: int) -> Tensor | None:
    """Return the state of one layer and direction in one row, from all of them or from one."""
    if states is None or states.dim() == 1:
        return states
    return states[index] if states.dim() == 2 else states[index, row]


def expected(
    module: nn.RNNBase,
    x: Any,
    hx: Tensor | None = None,
    *,
    reset: Any = None,
    reset_to: Tensor | None = None,
    alpha: Any = None,
    leaks: list[Any] | None = None,
    nonlinearity: str = "tanh",
    form: str = "rate",
    lengths: Sequence[int] | None = None,
) -> list[list[Tensor]]:
    """Return ``[output, h_n]`` for each row, and in the form "potential" the potential as well.

    ``leaks`` is alpha for each layer and direction, ``alpha`` for each step. ``lengths``, all above
    0, are the lengths of the rows of a padded input.
    """
    directions = 2 if module.bidirectional else 1
    found = []
    columns = (by_row(module, x, series) for series in (data_of(x), reset, alpha))
    for row, column in enumerate(zip(*columns, strict=True)):
        steps_of_row = slice(None if lengths is None else lengths[row])
        series, begins, leak = (s if s is None else s[steps_of_row] for s in column)
        last: list[Tensor] = []
        for layer in range(module.num_layers):
            parts: list[list[Tensor]] = []
            for direction in range(directions):
                index = layer * directions + direction
                weights = [getattr(module, name) for name in module._all_weights[index]]
                steps, mask = series, begins
                step_alpha = leaks[index] if leaks else None
                if leak is not None:
                    step_alpha = leak.reshape(len(leak), 1, -1)
                if direction == 1:
                    steps = steps.flip(0)
                    if leak is not None:
                        step_alpha = step_alpha.flip(0)
                    if mask is not None:  # an episode that begins at t ends at t when run backwards
                        mask = torch.cat([mask.new_zeros(1), mask[1:].flip(0)])
                h0 = state_of(hx, index, row)
                output, h_n, *potential = reference.rnn(
                    steps[:, None],
                    *weights,
                    h0=None if h0 is None else h0[None],
                    reset=None if mask is None else mask[:, None],
                    reset_to=state_of(reset_to, index, row),
                    alpha=step_alpha,
                    nonlinearity=nonlinearity,
                    form=form,
                    return_potential=form == "potential",
                )
                results = [result[:, 0] for result in (output, *potential)]
                parts.append([r.flip(0) for r in results] if direction == 1 else results)
                last.append(h_n[0])
            series, *potentials = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        found.append([series, torch.stack(last), *potentials])
    return found


def assert_matches(module: nn.RNNBase, x: Any, results: Any, want: list[list[Tensor]]) -> None:
    """Compare the results of a module with those of :func:`expected`."""
    output, h_n, *potential = results
    for series, row in zip(by_row(module, x, output), want, strict=True):
        assert_close(series, row[0])
    states = h_n.unsqueeze(1) if h_n.dim() == 2 else h_n
    assert_close(states, torch.stack([row[1] for row in want], 1))
    for series, row in zip(by_row(module, x, potential[0]) if potential else [], want):
        assert_close(series, row[2])


def assert_checkpointing_repeats_draws(module: nn.Module, x: Tensor) -> None:
    """Assert that gradients through ``torch.utils.checkpoint`` are those of a call without it."""
    gradients = []
    for run in (
        module,
        lambda x: checkpoint(module, x, use_reentrant=False),
    ):
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(run(x)[0].sum(), module.parameters()))
    assert_close(*gradients)
