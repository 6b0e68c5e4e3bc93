"""Both directions of a layer run concurrently on CUDA: fusedrnn/directions.py.

Without a GPU, the order of calls is checked (stream_log.py). With a GPU, the tests detect work that
runs too early and memory that is freed too soon.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import pair
from stream_log import (
    FORK,
    HERE,
    JOIN,
    Log,
    assert_like_a_cpu,
    capture,
    churn,
    on_gpu,
    stream_log,  # noqa: F401
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import _C, directions

T, B, I, H = directions._MIN_STEPS, 3, 4, 5


AT_ONCE = [FORK, ("rnn reverse", "side"), ("rnn", "here"), JOIN]
SIZES = (H, B * H, T * B * I, T * B * H, 2 * T * B * H)  # of the tensors that a layer allocates


@pytest.fixture
def log(stream_log: Log, monkeypatch: pytest.MonkeyPatch) -> Log:  # noqa: F811
    for module in (directions, fusedrnn.modules):
        monkeypatch.setattr(module, "rnn", stream_log.watch("rnn", module.rnn))
    return stream_log


def bidirectional(device: str = "cpu", **layout: Any) -> tuple[fusedrnn.RNN, nn.RNN]:
    """Return our module on the device, and torch's on the CPU."""
    ours, theirs = pair(I, H, bidirectional=True, dtype=torch.float64, **layout)
    return ours.to(device), theirs


def inputs(steps: int = T) -> Tensor:
    return torch.randn(steps, B, I, dtype=torch.float64)


def results(module: nn.Module, x: Tensor, hx: Tensor | None = None) -> list[Tensor]:
    """Return both results, and a gradient for each input and weight."""
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]
    if hx is not None:
        wanted.append(hx.requires_grad_())
    output, h_n = module(x) if hx is None else module(x, hx)
    return [output, h_n, *torch.autograd.grad(output.sin().sum() + h_n.sum(), wanted)]


# Calls and their order


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hx", [True, False])
def test_each_direction_runs_on_its_stream(log, monkeypatch, bias, hx):
    for name in ("cat", "stack"):
        monkeypatch.setattr(torch, name, log.watch(name, getattr(torch, name)))
    ours, theirs = bidirectional(num_layers=2, bias=bias)
    x, h0 = inputs(), torch.randn(4, B, H, dtype=torch.float64) if hx else None
    found = results(ours, x, h0)
    layer = [*AT_ONCE, ("cat", "here")]
    assert log.calls == [*layer, *layer, ("stack", "here")]
    torch.testing.assert_close(found, results(theirs, x, h0))


def test_a_packed_sequence(log):
    ours, theirs = bidirectional()
    batch_sizes = torch.tensor([B] * 20 + [1] * (T - 20))
    packed = PackedSequence(inputs().flatten(0, 1)[: int(batch_sizes.sum())], batch_sizes)
    torch.testing.assert_close(ours(packed)[0].data, theirs(packed)[0].data)
    assert log.calls[:4] == AT_ONCE


def test_tensors_that_cross_streams_are_recorded(log):
    ours, _ = bidirectional()
    x, hx = inputs(), torch.randn(2, B, H, dtype=torch.float64)
    made: list[Tensor] = []

    def spied(*args: Any, **kwargs: Any) -> Any:
        made.extend(result := rnn(*args, **kwargs))
        return result

    def storages(*tensors: Tensor) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in tensors}

    rnn, directions.rnn = directions.rnn, spied  # the fixture restores it
    with torch.no_grad():
        ours(x, hx)
    assert log.recorded == {"side": set(), "here": storages(*made[:2])}  # reverse runs first
    made.clear()
    ours(x, hx)
    reverse = [w for name, w in ours.named_parameters() if name.endswith("reverse")]
    assert log.recorded["side"] == storages(x, hx, *reverse)
    assert log.recorded["here"] >= storages(*made[:2])


def test_the_order_of_backward(log):
    """Both directions run before the views, at which the current stream waits for the side stream.

    This holds even if the inputs are leaves, as they are here.
    """
    ours, _ = bidirectional()
    output, _ = ours(inputs().requires_grad_())
    (forward, _), (reverse, _) = output.grad_fn.next_functions
    crossings = [node for node, _ in reverse.next_functions if node is not None]
    assert [node.name() for node in crossings] == ["ViewBackward0"] * 5
    order: list[str] = []
    for node in (forward, reverse, *crossings):
        node.register_hook(lambda *_, node=node: order.append(node.name()))
    output.sum().backward()
    assert order == [forward.name(), reverse.name(), *["ViewBackward0"] * 5]


@pytest.mark.parametrize("direction", ["_reverse", ""])
def test_an_error_leaves_the_streams_as_they_were(log, direction):
    ours, _ = bidirectional()
    setattr(ours, f"weight_hh_l0{direction}", nn.Parameter(torch.zeros(1, 1, dtype=torch.float64)))
    with pytest.raises(RuntimeError, match="fusedrnn"):
        ours(inputs())
    assert log.current is HERE
    assert log.calls[0] == FORK
    assert log.calls[-1] == JOIN


def test_a_stream_for_each_thread(log):
    ours, _ = bidirectional(num_layers=2)

    def run() -> None:
        for _ in range(2):
            ours(inputs())

    run()
    assert len(log.sides) == 1
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(log.sides) == 2


# Where both directions run on the current stream


def in_forward_mode(ours: fusedrnn.RNN, x: Tensor) -> None:
    with forward_ad.dual_level():
        ours(forward_ad.make_dual(x, x))


def in_a_jvp_of_weights(ours: fusedrnn.RNN, x: Tensor) -> None:
    weights = dict(ours.named_parameters())
    torch.func.jvp(lambda w: torch.func.functional_call(ours, w, x)[0], (weights,), (weights,))


def in_saved_tensors_hooks(ours: fusedrnn.RNN, x: Tensor) -> None:
    with graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        ours(x)


def in_a_checkpoint(ours: fusedrnn.RNN, x: Tensor) -> None:
    """Run forward in a checkpoint, which runs it again before backward."""
    checkpoint(lambda x: ours(x)[0], x, use_reentrant=False).sum().backward()


def of_a_subclass(ours: fusedrnn.RNN, x: Tensor) -> None:
    class Mine(Tensor):
        pass

    ours(x.as_subclass(Mine))


ALONE: dict[str, Callable[[fusedrnn.RNN, Tensor], Any]] = {
    "few steps": lambda ours, x: ours(x[1:]),
    "vmap": lambda ours, x: torch.vmap(lambda x: ours(x)[0], 2, 2)(x.unsqueeze(2)),
    "grad": lambda ours, x: torch.func.grad(lambda x: ours(x)[0].sum())(x),
    "jvp of weights": in_a_jvp_of_weights,
    "forward mode": in_forward_mode,
    "saved tensors hooks": in_saved_tensors_hooks,
    "checkpoint": in_a_checkpoint,
    "jit.trace": lambda ours, x: torch.jit.trace(ours, x, check_trace=False),
    "make_fx": lambda ours, x: make_fx(lambda x: ours(x)[0], tracing_mode="real")(x),
    "compile": lambda ours, x: torch.compile(ours, backend="eager", fullgraph=True)(x),
    "export": lambda ours, x: torch.export.export(ours, (x,)),
    "a subclass": of_a_subclass,
}


@pytest.mark.parametrize("run", ALONE.values(), ids=ALONE)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_directions_run_in_turn_under_transforms_and_tracing(log, run):
    ours, _ = bidirectional()
    run(ours, inputs())
    assert not log.sides
    assert FORK not in log.calls


def test_directions_run_in_turn_in_compiled_code(log):
    """In compiled code, the directions never run concurrently, even with long CUDA tensors."""

    def chosen(x: Tensor, w: Tensor) -> tuple[Tensor, bool]:
        return x, directions.pays(x, [[w], [w]], [None, None], None)

    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    assert compiled(inputs(), torch.zeros(1))[1] is False


def test_directions_run_in_turn_with_fake_tensors(log):
    """Fake tensors can be on CUDA even without a GPU."""
    with FakeTensorMode():
        x = torch.empty(T, B, I, device="cuda")
        assert not directions.pays(x, [[x], [x]], [None, None], None)
    assert not directions.pays(x, [[x], [x]], [None, None], None)
    x = inputs()
    assert directions.pays(x, [[x], [x]], [None, None], None)


def test_directions_run_in_turn_without_the_engine(log, monkeypatch):
    """Without the engine, a layer is a loop over time, which is bound by kernel launches."""
    monkeypatch.setattr(_C, "has_cuda", False)
    ours, _ = bidirectional()
    ours(inputs())
    assert not log.sides


def test_directions_run_in_turn_on_a_cpu(monkeypatch):
    monkeypatch.setattr(directions, "both_directions", None)
    ours, theirs = bidirectional()
    x = inputs()
    torch.testing.assert_close(results(ours, x), results(theirs, x))


# Results on a GPU


@on_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_repeated_runs_match_the_cpu_and_each_other(packed):
    ours, theirs = bidirectional("cuda", num_layers=3)
    batch_sizes = torch.tensor([B] * 20 + [1] * (T - 20))

    def run(module: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        given = PackedSequence(x[: int(batch_sizes.sum())], batch_sizes) if packed else x
        output, h_n = module(given)
        output = output.data if packed else output
        if x.is_cuda:
            churn(*SIZES)
        (output.sin().sum() + h_n.sum()).backward()
        del output, given
        if x.is_cuda:
            churn(*SIZES)
        found = [x.grad, h_n, *(w.grad.clone() for w in module.parameters())]
        module.zero_grad(set_to_none=True)
        return found

    x = inputs().flatten(0, 1) if packed else inputs()
    expected = run(theirs, x)
    first = None
    for _ in range(50):
        found = run(ours, x.cuda())
        first = first or found
        torch.testing.assert_close(found, first, rtol=0, atol=0)  # the same bits
        assert_like_a_cpu(found, expected)


@on_gpu
def test_double_backward():
    ours, theirs = bidirectional("cuda", num_layers=2)

    def run(module: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        output, h_n = module(x)
        wanted = [x, *module.parameters()]
        first = torch.autograd.grad(output.sin().sum() + h_n.sum(), wanted, create_graph=True)
        del output, h_n
        penalty = sum(g.square().sum() for g in first)
        del first
        return list(torch.autograd.grad(penalty, wanted))

    x = inputs()
    expected = run(theirs, x)
    for _ in range(10):
        assert_like_a_cpu(run(ours, x.cuda()), expected)
        churn(*SIZES)


@on_gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    ours, theirs = bidirectional("cuda", num_layers=2)
    x = inputs()

    def through(x: Tensor) -> Any:
        return checkpoint(ours, x, use_reentrant=reentrant)

    x_there = x.cuda().requires_grad_()
    output, h_n = through(x_there)
    (output.sin().sum() + h_n.sum()).backward()
    found = [output, h_n, x_there.grad, *(w.grad for w in ours.parameters())]
    assert_like_a_cpu(found, results(theirs, x))


@on_gpu
def test_threads_and_streams():
    """Two threads share a stream, and two have a stream each."""
    ours, theirs = bidirectional("cuda")
    x = inputs()
    expected = results(theirs, x)
    failures = []

    def run(stream: torch.cuda.Stream) -> None:
        try:
            with torch.cuda.stream(stream):
                for _ in range(20):
                    assert_like_a_cpu(results(ours, x.cuda()), expected)
        except Exception as error:  # reported by the main thread
            failures.append(error)

    shared = torch.cuda.current_stream()
    threads = [
        threading.Thread(target=run, args=(stream,))
        for stream in (shared, shared, torch.cuda.Stream(), torch.cuda.Stream())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@on_gpu
@pytest.mark.parametrize("training", [False, True])
def test_both_directions_are_captured(training):
    """A stream that was forked in a capture must have joined when the capture ends."""
    ours, _ = bidirectional("cuda", num_layers=2)
    x = inputs().cuda().requires_grad_(training)

    def run() -> list[Tensor]:
        output, h_n = ours(x)
        if not training:
            return [output, h_n]
        wanted = [x, *ours.parameters()]
        return [output, *torch.autograd.grad(output.sin().sum() + h_n.sum(), wanted)]

    with torch.set_grad_enabled(training):
        recorded, captured = capture(run)
        for _ in range(5):
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
            churn(*SIZES)
            recorded.replay()
            torch.testing.assert_close(captured, run())


@on_gpu
def test_graphed_callables():
    """Forward runs in one graph, and backward in another."""
    ours, theirs = bidirectional("cuda", num_layers=2)
    sample = inputs().cuda().requires_grad_()
    graphed = torch.cuda.make_graphed_callables(ours, (sample,))
    for _ in range(3):
        x = inputs()
        assert_like_a_cpu(results(graphed, x.cuda()), results(theirs, x))


@on_gpu
def test_they_are_at_once():
    """The profiler shows that the two recurrences overlap, in forward and in backward."""
    from torch.profiler import ProfilerActivity, profile

    ours, _ = bidirectional("cuda")
    x = torch.randn(4096, B, I, dtype=torch.float64, device="cuda")
    results(ours, x)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(2):  # the profiler delays the first launches
            results(ours, x)
            torch.cuda.synchronize()
    kernels = [e.time_range for e in found.events() if e.device_type.name == "CUDA"]
    chains = sorted(kernels, key=lambda kernel: kernel.elapsed_us())[-8:]
    chains.sort(key=lambda kernel: kernel.start)
    for first, second in (chains[4:6], chains[6:]):  # forward, backward
        assert second.start < first.end
