"""Run long sequences in blocks of steps, for the options ``checkpoint_every`` and ``truncate``.

Each block starts from the state in which the block before it ended. Gradients pass from block to
block through these states, except through those that ``truncate`` detaches. With
``checkpoint_every``, autograd keeps only these states, and ``torch.utils.checkpoint`` runs a block
again when backward reaches it (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .torch_state import compiling, exporting, forward_mode, transformed


class Blocks:
    """How a call is divided into blocks; false if the call needs no blocks.

    ``last_only`` is true if the caller reads no series, so that only those between layers are
    needed. ``draws`` is true if the call draws random numbers.
    """

    def __init__(
        self, every: int | None, truncate: int | None, last_only: bool, draws: bool
    ) -> None:
        gradients = torch.is_grad_enabled()
        if compiling():
            in_one_piece = exporting()
            tangents = not in_one_piece  # unknown, so assume that there are some
        else:
            in_one_piece = transformed()  # torch.func does not support checkpoints
            tangents = forward_mode() or in_one_piece
        self.truncate = truncate if gradients or tangents else None
        self.every = every if (gradients or last_only) and not in_one_piece else None
        self.recomputes = self.every is not None and gradients
        self.last_only = last_only
        self.draws = draws

    def __bool__(self) -> bool:
        return self.every is not None or self.truncate is not None

    def run(
        self,
        layers: Callable[..., tuple[Any, ...]],
        x: Tensor,
        state: Tensor | None,
        batch_sizes: Tensor | None,
        options: list[dict[str, Any]] | None,
        *,
        reverse: bool = False,
        last_only: bool,
    ) -> tuple[Any, ...]:
        """Run ``layers(x, state, batch_sizes, options)`` block by block.

        Args:
            layers: Returns ``output``, the last state, and the potential if the options request it.
            x: Input, ``[T, B, I]`` or packed ``[N, I]``.
            state: State before the first step, ``[B, H]`` or ``[L, B, H]``, or None.
            options: Arguments of :func:`fusedrnn.rnn` for each layer.
            reverse: Run the blocks from the last one to the first.
            last_only: Return empty series, with 0 steps.

        Returns:
            What ``layers`` returns for the whole sequence.
        """
        if batch_sizes is not None and compiling():
            raise NotImplementedError(
                "fusedrnn: checkpoint_every and truncate must be None for packed or ragged input "
                "in compiled code; pass a padded input without lengths, or do not compile the layer"
            )
        steps = x.size(0) if batch_sizes is None else batch_sizes.size(0)
        starts = {0}.union(*(range(0, steps, n) for n in (self.every, self.truncate) if n))
        borders = [*sorted(starts), steps]
        times = list(itertools.pairwise(borders))
        if reverse:
            times = [(steps - stop, steps - start) for start, stop in times]
        # The number of rows at each step, followed by 0 for the end of the sequence.
        rows = None if batch_sizes is None else [*batch_sizes.tolist(), 0]
        counts = [b - a if rows is None else sum(rows[a:b]) for a, b in times]

        def split(series: Tensor) -> tuple[Tensor, ...]:
            # Not slices: the gradient of each slice would have the size of the whole series.
            parts = series.split(counts[::-1] if reverse else counts)
            return parts[::-1] if reverse else parts

        xs = split(x)
        parts = [
            {
                name: split(value)
                for name, value in option.items()
                if name == "reset" or (name == "alpha" and value is not None and value.dim() > 1)
            }
            for option in options or []
        ]
        first, results, ended = state, [], []
        for i, (start, stop) in enumerate(times):
            if state is not None and i > 0 and self.truncate and borders[i] % self.truncate == 0:
                state = state.detach()
            if rows is not None and reverse:
                state = _with_new_rows(state if i > 0 else None, first, rows[stop], rows[start])
            block_options = options and [
                {
                    **_for_rows(option, rows[start] if rows else None),
                    **{n: s[i] for n, s in part.items()},
                }
                for option, part in zip(options, parts)
            ]
            block_sizes = None if batch_sizes is None else batch_sizes[start:stop]
            # Do not checkpoint the block that runs last: backward begins with it, so it would be
            # recomputed at once.
            again = self.recomputes and borders[i + 1] < steps
            run = functools.partial(self._run_again, layers) if again else layers
            output, state, *potential = run(xs[i], state, block_sizes, block_options)
            all_series = [output, *potential]
            results.append([each(_nothing, s) for s in all_series] if last_only else all_series)
            if rows is not None and not reverse:
                ended.append(state[..., rows[stop] :, :])
                state = state[..., : rows[stop], :]
        if ended:
            state = torch.cat(ended[::-1], -2)
        output, *potential = (
            _joined(series[::-1] if reverse else series) for series in zip(*results)
        )
        return output, state, *potential

    def _run_again(self, layers: Callable[..., Any], *args: Any) -> Any:
        """Run a block without keeping its series; backward runs it again."""
        options: Any = args[-1]
        generator = options[0].get("generator") if options and self.draws else None
        more: Any = {} if generator is None else {"context_fn": lambda: _same_draws(generator)}
        return checkpoint(layers, *args, use_reentrant=False, preserve_rng_state=self.draws, **more)


def _with_new_rows(
    state: Tensor | None, first: Tensor | None, before: int, now: int
) -> Tensor | None:
    """Append the states of the packed rows that begin in this block of the reverse direction."""
    if state is None:
        return None if first is None else first[..., :now, :]
    if first is None:
        begin = state.new_zeros(*state.shape[:-2], now - before, state.size(-1))
    else:
        begin = first[..., before:now, :]
    return torch.cat([state, begin.to(state.dtype)], -2)


def _for_rows(option: dict[str, Any], rows: int | None) -> dict[str, Any]:
    """Reduce ``reset_to`` to the rows of a block of a packed sequence."""
    target = option.get("reset_to")
    if rows is None or target is None or target.dim() == 1:
        return option
    return {**option, "reset_to": target[:rows]}


def each(function: Callable[[Any], Any], series: Any) -> Any:
    """Apply ``function`` to a series, or to that of each layer."""
    return [function(s) for s in series] if isinstance(series, list) else function(series)


def _nothing(series: Tensor) -> Tensor:
    return series.new_empty(0, *series.shape[1:])  # not a view, which would keep the memory


def _joined(series: Any) -> Any:
    """Concatenate the series of all blocks, or those of each layer."""
    if isinstance(series[0], list):
        return [_joined(layer) for layer in zip(*series)]
    return torch.cat(series) if len(series) > 1 else series[0]


class _State:
    """A context in which a generator has the state that it had when this object was created."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.state = generator.get_state()

    def __enter__(self) -> None:
        self.later = self.generator.get_state()
        self.generator.set_state(self.state)

    def __exit__(self, *_: Any) -> None:
        self.generator.set_state(self.later)


def _same_draws(generator: torch.Generator) -> Any:
    """Return contexts for ``torch.utils.checkpoint`` in which a block draws the same values twice.

    The first is that of the block, the second that of its repetition in backward.
    """
    return nullcontext(), _State(generator)
