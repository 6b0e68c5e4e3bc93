"""Run long sequences in blocks of steps, for ``checkpoint_every``, ``truncate`` and ``last_only``.

Each block starts from the state in which the block before it ended. Gradients pass from block to
block through these states, except through those that ``truncate`` detaches. With
``checkpoint_every``, autograd keeps only these states, and backward runs each block again (Chen et
al., "Training Deep Nets with Sublinear Memory Cost", 2016).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .ops import autocast
from .torch_state import (
    any_requires_grad,
    batched_gradient,
    compiling,
    exporting,
    forward_mode,
    gradients_of,
    jit_tracing,
    transformed,
)

# The number of steps of a block, if the caller reads only the last state and needs no gradient. A
# call costs about 20 us, which is little compared with this many steps.
_STEPS = 2048


def is_long(x: Tensor, batch_sizes: Tensor | None) -> bool:
    """Return whether a call without gradients should run in blocks if it returns no series."""
    return not compiling() and (x if batch_sizes is None else batch_sizes).size(0) >= 2 * _STEPS


class Blocks:
    """How a call is divided into blocks; false if the call needs no blocks.

    ``last_only`` is true if the caller reads no series, so that only those between layers are
    needed. ``draws`` is true if the call draws random numbers. ``inputs`` are nested lists and
    dicts of everything that the call may differentiate.
    """

    def __init__(
        self, every: int | None, truncate: int | None, last_only: bool, draws: bool, inputs: Any
    ) -> None:
        gradients = torch.is_grad_enabled()
        if compiling():
            in_one_piece = exporting()
            tangents = not in_one_piece  # unknown, so assume that there are some
        else:
            gradients = gradients and any_requires_grad(*_leaves(inputs))
            tangents = forward_mode() or transformed()
            in_one_piece = tangents or jit_tracing()
        self.truncate = truncate if gradients or tangents else None
        self.every = every if (gradients or last_only) and not in_one_piece else None
        self.shortest = 1
        if last_only and every is None and not (gradients or in_one_piece or draws or compiling()):
            # The last block has at least as many steps as the others: a call with few rows rounds
            # differently.
            self.every = self.shortest = _STEPS
        self.recomputes = self.every is not None and gradients
        self.last_only = last_only
        self.draws = draws

    def __bool__(self) -> bool:
        return self.every is not None or self.truncate is not None

    def run(
        self,
        layers: Callable[..., tuple[Any, ...]],
        weights: list[Any],
        x: Tensor,
        state: Tensor | None,
        batch_sizes: Tensor | None,
        options: list[dict[str, Any]] | None,
        *,
        reverse: bool = False,
        last_only: bool,
    ) -> tuple[Any, ...]:
        """Run ``layers(weights, x, state, batch_sizes, options)`` block by block.

        Args:
            layers: Returns ``output``, the last state, and the potential if the options request it.
            weights: Tensors or lists of tensors.
            x: Input, ``[T, B, I]`` or packed ``[N, I]``.
            state: State before the first step, ``[B, H]`` or ``[L, B, H]``, or None.
            options: Arguments of :func:`fusedrnn.rnn` for each layer.
            reverse: Run the blocks from the last one to the first.
            last_only: Return empty series, with 0 steps.

        Returns:
            What ``layers`` returns for the whole sequence.
        """
        call = _Call(self, layers, x, batch_sizes, options, reverse, last_only)
        inputs = [weights, x, state, options]
        if not self.recomputes or compiling() or len(call.counts) == 1:
            (output, *potential), last = call.run(inputs)
        else:
            *series, last = _Recomputed.apply(call, _structure(inputs), *_leaves(inputs))
            output, *potential = _filled(call.results, series)
        return output, last, *potential


class _Call:
    """A call in blocks: everything but its tensors, which are nested lists named ``inputs``."""

    results: Any  # the structure of the series of a block

    def __init__(
        self,
        blocks: Blocks,
        layers: Callable[..., tuple[Any, ...]],
        x: Tensor,
        batch_sizes: Tensor | None,
        options: list[dict[str, Any]] | None,
        reverse: bool,
        last_only: bool,
    ) -> None:
        if batch_sizes is not None and compiling():
            raise NotImplementedError(
                "fusedrnn: checkpoint_every and truncate must be None for packed or ragged input "
                "in compiled code; pass a padded input without lengths, or do not compile the layer"
            )
        self.layers, self.reverse, self.last_only = layers, reverse, last_only
        self.checkpoints = blocks.recomputes and compiling()
        steps = x.size(0) if batch_sizes is None else batch_sizes.size(0)
        starts = {0}
        if blocks.every is not None:
            starts.update(range(0, steps - blocks.shortest + 1, blocks.every))
        if blocks.truncate is not None:
            starts.update(range(0, steps, blocks.truncate))
        borders = [*sorted(starts), steps]
        self.truncated = [
            start > 0 and blocks.truncate is not None and start % blocks.truncate == 0
            for start in borders
        ]
        times = list(itertools.pairwise(borders))
        if reverse:
            times = [(steps - stop, steps - start) for start, stop in times]
        # For each block: its rows at its first step, its rows at all steps, and its batch_sizes.
        self.rows: list[int] | None = None
        self.counts = [b - a for a, b in times]
        self.batch_sizes: list[Tensor | None] = [None] * len(times)
        if batch_sizes is not None:
            sizes = batch_sizes.tolist()
            self.rows = [sizes[a] for a, _ in times]
            self.counts = [sum(sizes[a:b]) for a, b in times]
            self.batch_sizes = [batch_sizes[a:b] for a, b in times]
        self.series = [
            [name for name, value in option.items() if is_series(name, value, x)]
            for option in options or []
        ]
        self.draws = blocks.draws
        self.generators: list[torch.Generator] = []
        self.autocast: Any = nullcontext
        if compiling():
            return
        device = x.device
        if self.draws:
            self.generators.append(torch.default_generator)
            if device.type == "cuda":
                self.generators.append(torch.cuda.default_generators[x.get_device()])
            generator = options[0].get("generator") if options else None
            if generator is not None:
                self.generators.append(generator)
        if device.type in autocast.DEVICES:
            self.autocast = functools.partial(
                torch.autocast, device.type, torch.get_autocast_dtype(device.type),
                torch.is_autocast_enabled(device.type), torch.is_autocast_cache_enabled(),
            )  # fmt: skip

    def parts(self, series: Tensor | None) -> Sequence[Any]:
        """Return the part of each block."""
        if series is None:
            return [None] * len(self.counts)
        # Not slices: the gradient of each slice would have the size of the whole series.
        parts = series.split(self.counts[::-1] if self.reverse else self.counts)
        return parts[::-1] if self.reverse else parts

    def split(self, inputs: Any) -> list[Any]:
        """Return the inputs of each block; only the first one has the state."""
        weights, x, state, options = inputs
        xs = self.parts(x)
        parts = [
            {name: self.parts(option[name]) for name in names}
            for names, option in zip(self.series, options or [])
        ]

        def options_of(i: int) -> Any:
            return options and [
                {**self._for_rows(i, option), **{name: part[i] for name, part in own.items()}}
                for option, own in zip(options, parts)
            ]

        return [
            [weights, part, state if i == 0 else None, options_of(i)] for i, part in enumerate(xs)
        ]

    def _for_rows(self, i: int, option: dict[str, Any]) -> dict[str, Any]:
        """Reduce ``reset_to [B, H]`` to the rows of a block of a packed sequence."""
        target = option.get("reset_to")
        if self.rows is None or target is None or target.dim() == 1:
            return option
        return {**option, "reset_to": target[: self.rows[i]]}

    def block(self, i: int, state: Tensor | None, inputs: Any) -> tuple[list[Any], Tensor]:
        """Run a block from the state of all rows; return its series, and the new state.

        Rows of a packed sequence that are not in the block keep their state.
        """
        weights, x, _, options = inputs
        start = state
        if state is not None and self.rows is not None:
            start = state[..., : self.rows[i], :]
        if start is not None and self.truncated[i]:
            if self.rows is None:
                start = start.detach()
            else:  # rows that begin in this block have the given state, which is not detached
                begun = min(self.rows[i - 1 : i + 1])
                start = torch.cat([start[..., :begun, :].detach(), start[..., begun:, :]], -2)
        run: Any = self.layers
        if self.checkpoints and i + 1 < len(self.counts):
            run = functools.partial(
                checkpoint, run, use_reentrant=False, preserve_rng_state=self.draws
            )
        output, new, *potential = run(weights, x, start, self.batch_sizes[i], options)
        series = [output, *potential]
        if self.last_only:
            series = each(_nothing, series)
        if self.rows is not None and (others := max(self.rows) - self.rows[i]) > 0:
            if state is None:
                rest = new.new_zeros(*new.shape[:-2], others, new.size(-1))
            else:
                rest = state[..., self.rows[i] :, :].to(new.dtype)
            new = torch.cat([new, rest], -2)
        return series, new

    def run(self, inputs: Any) -> tuple[list[Any], Any]:
        """Run all blocks as :meth:`block` runs one; autograd records each of them."""
        state, results = inputs[2], []
        for i, block in enumerate(self.split(inputs)):
            series, state = self.block(i, state, block)
            if i == 0 or not self.last_only:
                results.append(series)
        joined = [_joined(series[::-1] if self.reverse else series) for series in zip(*results)]
        return joined, state


class _Recomputed(torch.autograd.Function):
    """All blocks of a call as one node, which keeps only the state before each block.

    Everything that lives longer than a block is allocated before the second block, and in one
    piece. Each block can then use the memory that the block before it has freed: small tensors that
    are kept between large ones that are freed would fragment the heap, which grew by the size of
    all states (glibc 2.36).
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, structure: Any, *leaves: Any) -> Any:
        inputs = _filled(structure, leaves)
        count, state = len(call.counts), inputs[2]
        states: Any = None
        draws: list[Tensor] = [
            g.get_state().new_empty(count, g.get_state().numel()) for g in call.generators
        ]
        for i, block in enumerate(call.split(inputs)):
            for kept, generator in zip(draws, call.generators):
                kept[i] = generator.get_state()
            if i > 0:
                states[i - 1] = state
            series, state = call.block(i, state, block)
            parts = _leaves(series)
            if i == 0:
                call.results = _structure(series)
                states = state.new_empty(count - 1, *state.shape)
                if call.last_only:
                    results = parts
                else:
                    rows = sum(call.counts)
                    results = [part.new_empty(rows, *part.shape[1:]) for part in parts]
                    places = [call.parts(result) for result in results]
            if not call.last_only:
                for place, part in zip(places, parts):
                    place[i].copy_(part)
        tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]
        ctx.save_for_backward(states, *draws, *tensors)
        ctx.call, ctx.structure = call, structure
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.set_materialize_grads(False)
        return *results, state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        call = ctx.call
        states, *tensors = ctx.saved_tensors
        draws = [tensors.pop(0) for _ in call.generators]
        leaves = [other if t is None else t for t, other in zip(tensors, ctx.others)]
        wanted = ctx.needs_input_grad[2:]
        *g_series, g = gradients

        def rerun(i: int) -> AbstractContextManager[Any]:
            contexts = ExitStack()
            contexts.enter_context(torch.enable_grad())
            contexts.enter_context(call.autocast())
            for generator, kept in zip(call.generators, draws):
                # A copy: torch 2.13 crashes if the state is a view.
                contexts.enter_context(_State(generator, kept[i].clone()))
            return contexts

        batched = any(g is not None and batched_gradient(g) for g in gradients)
        if torch.is_grad_enabled() or batched or transformed() or forward_mode():
            # The gradients are differentiated again or have more dimensions, so adding in place is
            # not possible. The views separate the inputs: one may depend on another one.
            with rerun(0):
                views = [t.view_as(t) if w else t for t, w in zip(leaves, wanted)]
                series, last = call.run(_filled(ctx.structure, views))
            inputs = [view for view, w in zip(views, wanted) if w]
            found = iter(_gradients([series, last], gradients, inputs))
            return None, None, *(next(found) if w else None for w in wanted)

        # Add in place; a series has a part in each block.
        totals = [torch.zeros_like(t) if w else None for t, w in zip(leaves, wanted)]
        detached = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
        blocks = call.split(_filled(ctx.structure, detached))
        places = call.split(_filled(ctx.structure, totals))
        given = [call.parts(None if call.last_only else series) for series in g_series]
        for i in reversed(range(len(blocks))):
            outputs = [*(parts[i] for parts in given), g]
            if all(output is None for output in outputs):
                continue  # later steps have a gradient, but it is truncated
            pairs = list(zip(_leaves(blocks[i]), _leaves(places[i])))
            inputs = [leaf.requires_grad_() for leaf, place in pairs if place is not None]
            state = blocks[i][2]
            if i > 0:
                state = states[i - 1].detach().requires_grad_()
                inputs.append(state)
            with rerun(i):
                results = call.block(i, state, blocks[i])
            found = _gradients(list(results), outputs, inputs)
            g = found[-1]
            for place, gradient in zip((p for _, p in pairs if p is not None), found):
                if gradient is not None:
                    place += gradient
        return None, None, *totals


def _gradients(results: Any, gradients: Iterable[Tensor | None], inputs: list[Tensor]) -> Any:
    """Return the gradients of the inputs, given those of the results."""
    pairs = [
        (r, g) for r, g in zip(_leaves(results), gradients) if g is not None and r.requires_grad
    ]
    if not pairs:  # the state is truncated, and nothing else requires a gradient
        return [None] * len(inputs)
    outputs, given = zip(*pairs)
    return gradients_of(outputs, tuple(inputs), given)


def is_series(name: str, value: Any, x: Tensor) -> bool:
    """Return whether an option of :func:`fusedrnn.rnn` has a value for each step."""
    if name == "reset_to" and value is not None:
        return value.dim() == x.dim() and value.shape[:-1] == x.shape[:-1]
    if name == "alpha" and isinstance(value, Tensor):
        return value.dim() > 1
    return name in ("reset", "state_input")


def each(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``function`` to everything in nested lists and dicts, such as series of all layers."""
    if isinstance(tree, list):
        return [each(function, value) for value in tree]
    if isinstance(tree, dict):
        return {key: each(function, value) for key, value in tree.items()}
    return function(tree)


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    each(found.append, tree)
    return found


def _structure(tree: Any) -> Any:
    return each(lambda _: None, tree)


def _filled(structure: Any, leaves: Iterable[Any]) -> Any:
    """Return the tree with this structure and these leaves."""
    remaining = iter(leaves)
    return each(lambda _: next(remaining), structure)


def _nothing(series: Tensor) -> Tensor:
    return series.new_empty(0, *series.shape[1:])  # not a view, which would keep the memory


def _joined(series: Any) -> Any:
    """Concatenate the series of all blocks, or those of each layer."""
    if isinstance(series[0], list):
        return [_joined(layer) for layer in zip(*series)]
    return torch.cat(series) if len(series) > 1 else series[0]


class _State:
    """A context in which a generator has the given state."""

    def __init__(self, generator: torch.Generator, state: Tensor) -> None:
        self.generator = generator
        self.state = state

    def __enter__(self) -> None:
        self.later = self.generator.get_state()
        self.generator.set_state(self.state)

    def __exit__(self, *_: Any) -> None:
        self.generator.set_state(self.later)
