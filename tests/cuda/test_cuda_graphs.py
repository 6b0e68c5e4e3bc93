"""CUDA graphs: a captured call, replayed on new values, gives the same results as eager code.

A capture fails if the CPU waits for the GPU, so these tests also show that it never does.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engines import REGIMES, Engine
from stream_log import capture, warm_up
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from fusedrnn import _C

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

T, B, I, H = 12, 4, 16, 32
LAYOUTS: list[dict[str, Any]] = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]


def layer(**layout: Any) -> fusedrnn.RNN:
    return fusedrnn.RNN(I, H, device="cuda", **layout)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*(shape or (T, B, I)), device="cuda")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_captured_inference(layout, packed):
    rnn = layer(**layout)
    batch_sizes = torch.tensor([B] * 6 + [2] * 4 + [1] * 2)
    x = numbers(int(batch_sizes.sum()), I) if packed else numbers()

    def run() -> Any:
        output, h_n = rnn(PackedSequence(x, batch_sizes) if packed else x)
        return (output.data if packed else output), h_n

    with torch.no_grad():
        graph, captured = capture(run)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(captured, run())


# The kind of launch depends on the regime: cooperative, in clusters, or before the previous kernel
# has ended.
@pytest.mark.parametrize("regime", [None, *REGIMES])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.skipif(not _C.has_cuda, reason="built without CUDA")
def test_each_regime_is_captured(regime, packed):
    batch_sizes = torch.tensor([B] * 6 + [2] * 4 + [1] * 2) if packed else None
    rows = (int(batch_sizes.sum()),) if packed else (T, B)
    x, w_ih, w_hh = numbers(*rows, I), numbers(H, I) / I**0.5, numbers(H, H) / H**0.5
    wanted = [t.requires_grad_() for t in (x, w_ih, w_hh)]

    def run() -> Any:
        h, h_n = fusedrnn.rnn(*wanted, batch_sizes=batch_sizes)
        return h, *torch.autograd.grad(h.sin().sum() + h_n.sum(), wanted)

    with Engine("cuda", "gpu", regime).installed():
        graph, captured = capture(run)
        for _ in range(3):
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
            # overwrite freed host memory, in case a copy in the graph reads it again
            torch.full((64,), -1, dtype=torch.int64, device="cpu").pin_memory()
            graph.replay()
            torch.testing.assert_close(captured, run())


@pytest.mark.parametrize("options", [{}, {"reset": True, "alpha": True}], ids=str)
def test_captured_gradients(options):
    """Forward and backward in one graph, with and without the options of the function."""
    reset = torch.rand(T, B, device="cuda") <= 0.2 if "reset" in options else None
    alpha = torch.rand(H, device="cuda") if "alpha" in options else None
    u, w_hh, h0 = numbers(T, B, H), numbers(H, H) / H**0.5, numbers(B, H)
    wanted = [t.requires_grad_() for t in (u, w_hh, h0, alpha) if t is not None]

    def run() -> Any:
        h, h_n = fusedrnn.recurrence(u, h0, w_hh, reset=reset, alpha=alpha)
        return torch.autograd.grad(h.sin().sum() + h_n.sum(), wanted)

    graph, captured = capture(run)
    for _ in range(3):
        with torch.no_grad():
            u.copy_(torch.randn_like(u))
        graph.replay()
        torch.testing.assert_close(captured, run())


def test_captured_training_step():
    rnn, x, y = layer(num_layers=2), numbers(), numbers(T, B, H)
    eager = copy.deepcopy(rnn)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)

    def step(module: nn.Module) -> Tensor:
        loss = (module(x)[0] - y).square().mean()
        loss.backward()
        return loss

    warm_up(lambda: step(rnn))
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step(rnn)
        optimizer.step()
    rnn.load_state_dict(eager.state_dict())  # copies into the memory that the graph uses
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        graph.replay()
        eager.zero_grad()
        torch.testing.assert_close(loss, step(eager))
        with torch.no_grad():
            for weight in eager.parameters():
                weight -= 0.1 * weight.grad
    torch.testing.assert_close(list(rnn.parameters()), list(eager.parameters()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_make_graphed_callables(layout):
    rnn = layer(**layout)
    eager = copy.deepcopy(rnn)
    graphed = torch.cuda.make_graphed_callables(rnn, (numbers().requires_grad_(),))
    for _ in range(3):
        x = numbers()
        results = []
        for module in (graphed, eager):
            inputs = x.clone().requires_grad_()
            output, h_n = module(inputs)
            (output.sin().sum() + h_n.sum()).backward()
            weights = list((rnn if module is graphed else eager).parameters())
            gradients = [inputs.grad, *(w.grad.clone() for w in weights)]
            results.append([output.detach().clone(), h_n.detach().clone(), *gradients])
            for weight in weights:
                weight.grad = None
        torch.testing.assert_close(*results)


def test_dropout_differs_between_replays():
    rnn, x = layer(num_layers=2, dropout=0.5), numbers()
    with torch.no_grad():
        graph, (captured, _) = capture(lambda: rnn(x))
        graph.replay()
        first = captured.clone()
        graph.replay()
    assert not torch.equal(first, captured)


@pytest.mark.slow
def test_compiled_with_reduced_overhead():
    """With the CUDA graphs that torch.compile makes."""
    torch._dynamo.reset()
    rnn = layer(num_layers=2)
    compiled = torch.compile(rnn, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = numbers()
        torch.compiler.cudagraph_mark_step_begin()
        output, h_n = compiled(x)
        torch.testing.assert_close((output.clone(), h_n.clone()), rnn(x))
