"""The two directions of a layer at once, on CUDA.

A recurrence often fills few of a GPU's SMs. So the reverse direction runs on a stream of its own,
which waits for the current stream first, and the current stream waits for it afterwards: to
everyone else, a capture as a CUDA graph included, all of it ran on the current stream. Autograd
runs a node on the stream of its forward, and has streams wait where gradients pass between them,
so the directions are at once in backward, too.

Neither direction waits for the other while it runs, and neither can be left half started: of a
cooperative grid, and of a cluster, all threads make progress once one does ("Device threads" in
nvidia.github.io/cccl/libcudacxx/extended_api/execution_model.html). Where the SMs do not suffice
for both, one comes after the other. Both compute what they would alone, in the same order, and so
the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import streams
from ._ops import _C
from .functional import rnn

# Two streams cost some 30 us of a CPU's time for a layer, and as much in backward: reckoned, not
# measured. A step takes a GPU 0.13 us at best, and mostly 0.3 to 0.6 us.
_MIN_STEPS = 128


def pays(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    h0s: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
) -> bool:
    """Whether the two directions of a layer, on CUDA tensors, should run at once.

    Not where somebody watches, nor with tangents, which pass between streams unseen; nor where
    hooks keep what backward needs: ``torch.utils.checkpoint`` computes it all anew on the stream of
    the node that asks first, and a node on the other stream would not wait for it.
    """
    return (
        not streams.watched(x, *h0s, *weights[0], *weights[1])
        and _C.has_cuda
        and (x if batch_sizes is None else batch_sizes).size(0) >= _MIN_STEPS
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def both_directions(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    h0s: Sequence[Tensor | None],
    nonlinearity: str,
    batch_sizes: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs and the last states of ``rnn`` run forward, and in reverse beside it.

    Memory that is freed goes at once to whoever asks next on the stream that it was made on, so the
    allocator has to know what is used on another one, too. That is what leaves the side stream, and
    what autograd keeps for the reverse direction: freed when its node is queued, not when it has
    run. What else enters is safe, as its owner comes after the current stream, and that after the
    side stream.

    Autograd does the same for each gradient that passes between nodes of two streams; but a weight
    first used on the side stream would have its ``.grad`` made there, and handed out untold. Hence
    the views: their nodes are the current stream's. They are older than those of both directions,
    so that backward, which takes the youngest first, does not wait at one with a direction to go.
    """
    run = functools.partial(rnn, nonlinearity=nonlinearity, batch_sizes=batch_sizes)
    here, side = torch.cuda.current_stream(x.device), streams.beside(x.device)
    inputs = [x, h0s[1], *weights[1]]
    if torch.is_grad_enabled():
        inputs = [None if t is None else t.view_as(t) for t in inputs]
    x_there, h0_there, *weights_there = inputs
    side.wait_stream(here)
    try:
        with torch.cuda.stream(side):
            reverse = run(x_there, *weights_there, h0=h0_there, reverse=True)  # type: ignore[misc, arg-type]
        forward = run(x, *weights[0], h0=h0s[0])  # type: ignore[misc]
    finally:  # after an error as well: memory is freed then
        here.wait_stream(side)
    if reverse[0].requires_grad:
        for t in inputs:
            if t is not None:
                t.record_stream(side)
    for t in reverse:
        t.record_stream(here)
    return [forward[0], reverse[0]], [forward[1], reverse[1]]
