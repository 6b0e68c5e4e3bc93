"""Run the two directions of a layer concurrently, on CUDA.

A recurrence often occupies only a few of a GPU's SMs, so the reverse direction runs on a side
stream. The side stream first waits for the current stream, and afterwards the current stream waits
for the side stream. For all other code, including the capture of a CUDA graph, it is as if
everything ran on the current stream. Autograd runs each node on the stream of its forward and
synchronises streams where gradients pass between them, so the directions also overlap in backward.

Neither direction waits for the other while it runs, and neither can stall with only some of its
blocks running: in a cooperative grid or a cluster, all threads make progress once one of them does
("Device threads" in
nvidia.github.io/cccl/libcudacxx/extended_api/execution_model.html). If there are not enough SMs for
both, one runs after the other. Each direction computes the same values in the same order as it
would alone, so the results are bitwise equal.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .functional import rnn
from .ops import _C
from .torch_state import eager, saved_tensor_hooks

# Two streams cost about 30 us of CPU time per layer, and as much again in backward (estimated, not
# measured). A step takes 0.3 us or more on an H200.
_MIN_STEPS = 128


class _Streams(threading.local):
    """The side streams of a thread: one per device, and another one per device for captures.

    Threads do not share side streams: otherwise a CUDA graph captured by one thread would contain
    the work that another thread launches meanwhile. Captures have their own because cuBLAS has one
    workspace per stream, which a replayed graph must not share with work that runs meanwhile.
    """

    def __init__(self) -> None:
        self.of: dict[tuple[torch.device, bool], torch.cuda.Stream] = {}


_streams = _Streams()


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return this thread's side stream."""
    key = (device, torch.cuda.is_current_stream_capturing())
    if key not in _streams.of:
        _streams.of[key] = torch.cuda.Stream(device)
    return _streams.of[key]


def pays(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    h0s: Sequence[Tensor | None],
    batch_sizes: Tensor | None,
) -> bool:
    """Return whether the two directions of a layer, on CUDA tensors, should run concurrently.

    They should not when tracing or a transform is active, nor in forward mode, because streams are
    not synchronised for tangents. Nor should they with saved-tensor hooks:
    ``torch.utils.checkpoint`` recomputes all saved tensors on the stream of the first node that
    needs one, and a node on the other stream would not wait for the recomputation.
    """
    return (
        eager(x, *h0s, *weights[0], *weights[1])
        and _C.has_cuda
        and (x if batch_sizes is None else batch_sizes).size(0) >= _MIN_STEPS
        and not saved_tensor_hooks()
    )


def both_directions(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    h0s: Sequence[Tensor | None],
    nonlinearity: str,
    batch_sizes: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run ``rnn`` forward and, on the side stream, in reverse; return outputs and last states.

    The allocator may reuse freed memory at once on the stream on which it was allocated, so
    ``record_stream`` must report every tensor that another stream also uses. These are the results
    of the side stream, and the tensors that autograd saves for the reverse direction, which are
    freed when its node has been queued, not when it has run. Inputs that autograd does not save are
    safe: they are freed in the order of the current stream, which waits for the side stream.

    Autograd records the stream itself for each gradient that passes between nodes on two streams.
    But if a weight were first used on the side stream, its ``.grad`` would be allocated there and
    returned without being recorded. The reverse direction therefore takes views, whose nodes belong
    to the current stream. The views are created before both directions: backward runs the newest
    nodes first, so it does not wait at a view before it has queued both directions.
    """
    run = functools.partial(rnn, nonlinearity=nonlinearity, batch_sizes=batch_sizes)
    here, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    inputs = [x, h0s[1], *weights[1]]
    if torch.is_grad_enabled():
        inputs = [None if t is None else t.view_as(t) for t in inputs]
    x_there, h0_there, *weights_there = inputs
    side.wait_stream(here)
    try:
        with torch.cuda.stream(side):
            reverse = run(x_there, *weights_there, h0=h0_there, reverse=True)  # type: ignore[misc, arg-type]
        forward = run(x, *weights[0], h0=h0s[0])  # type: ignore[misc]
    finally:  # also after an error, which frees memory that the side stream still uses
        here.wait_stream(side)
    if reverse[0].requires_grad:
        for t in inputs:
            if t is not None:
                t.record_stream(side)
    for t in reverse:
        t.record_stream(here)
    return [forward[0], reverse[0]], [forward[1], reverse[1]]
