"""BPTT in two parts on CUDA, whose GEMMs overlap the recurrence: fusedrnn/bptt.py.

Without a GPU, CPU tensors pass for CUDA tensors, and the order of calls is checked (stream_log.py).
With a GPU, the tests detect work that runs too early and memory that is freed too soon.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import Case
from conftest import assert_as_accurate_as_torch
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
from torch import Tensor

import fusedrnn
from fusedrnn import _C, _ops, bptt, reference

AT_ONCE = [("adjoint", "here"), FORK, ("adjoint", "here"), ("products", "side"), JOIN]
AT_ONCE += [("products", "here")]


@pytest.fixture
def log(stream_log: Log, monkeypatch: pytest.MonkeyPatch) -> Log:  # noqa: F811
    monkeypatch.setattr(_ops, "adjoint", stream_log.watch("adjoint", _ops.adjoint))
    monkeypatch.setattr(torch, "mm", stream_log.watch("products", torch.mm))
    monkeypatch.setattr(bptt, "_MIN_STEPS", 2)
    return stream_log


@contextmanager
def cut(steps: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "cut_of_adjoint", lambda *args: steps, raising=False)
        yield


def gradients(case: Case, rnn: Callable[..., Any], *args: Tensor) -> list[Tensor]:
    """Return the gradients of a scalar function of both results, for all arguments."""
    given = [t.detach().requires_grad_() for t in args]
    flags = case.flags()
    if case.alpha:  # a constant, not a parameter
        flags["alpha"] = 0.3
    h, h_n = rnn(**dict(zip(names(case), given)), **flags)
    return list(torch.autograd.grad(h.sin().sum() + h_n.square().sum(), given))


def names(case: Case) -> list[str]:
    biases = ["b_ih", "b_hh"] if case.bias else []
    return ["x", "w_ih", "w_hh", *biases, *(["h0"] if case.h0 else [])]


def tensors(case: Case) -> list[Tensor]:
    arguments = case.arguments()
    return [arguments[name] for name in names(case)]


CASES = [
    Case(T=9, reverse=reverse, reset=reset, h0=h0, bias=bias, alpha=alpha)
    for reverse, reset, (h0, bias, alpha) in itertools.product(
        (False, True), (False, True), ((True, True, False), (False, False, True))
    )
]


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_parts_together(log, case, steps):
    expected = gradients(case, fusedrnn.rnn, *tensors(case))
    assert FORK not in log.calls
    log.calls.clear()
    with cut(steps):
        found = gradients(case, fusedrnn.rnn, *tensors(case))
    assert log.calls == AT_ONCE
    torch.testing.assert_close(found, expected)
    for one, other in itertools.combinations(found, 2):
        assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(log, dtype):
    """The sum of the two parts is rounded twice."""
    case = Case(T=200, B=3, I=5, H=6, dtype=dtype)
    with cut(150):
        found = gradients(case, fusedrnn.rnn, *tensors(case))
    assert FORK in log.calls
    assert_as_accurate_as_torch(
        found, lambda *args: gradients(case, reference.rnn, *args), tensors(case)
    )


@pytest.mark.parametrize("which", range(5), ids=lambda i: names(Case())[i])
def test_only_what_is_wanted(log, which):
    case = Case(T=9)
    args = tensors(case)
    args[which].requires_grad_()

    def gradient() -> Tensor:
        h, _ = fusedrnn.rnn(**dict(zip(names(case), args)))
        return torch.autograd.grad(h.sin().sum(), args[which])[0]

    expected = gradient()
    with cut(5):
        found = gradient()
    assert FORK in log.calls
    torch.testing.assert_close(found, expected)


def test_any_strides(log):
    case = Case(T=9)

    def strided(t: Tensor) -> Tensor:
        return t.movedim(0, -1).contiguous().movedim(-1, 0)

    expected = gradients(case, fusedrnn.rnn, *tensors(case))
    with cut(5):
        found = gradients(case, fusedrnn.rnn, *map(strided, tensors(case)))
    assert FORK in log.calls
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_double_backward(log, alpha):
    case = Case(T=9, reset=True)
    args = [t.requires_grad_() for t in tensors(case)]

    def penalty() -> tuple[Tensor, ...]:
        h, _ = fusedrnn.rnn(*args, **case.flags() | {"alpha": alpha})
        first = torch.autograd.grad(h.sin().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), args)

    expected = penalty()
    with cut(5):
        found = penalty()
    assert FORK in log.calls
    torch.testing.assert_close(found, expected)


def test_nothing_is_taken_on_the_side(log, monkeypatch):
    """GEMMs on the side stream write into memory that was allocated on the current stream."""
    taken: list[tuple[str, int]] = []

    def spied(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = new_empty(self, *args, **kwargs)
        taken.append((log.current.name, result.untyped_storage().data_ptr()))
        return result

    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", spied)
    case = Case(T=9)
    with cut(5):
        found = gradients(case, fusedrnn.rnn, *tensors(case))
    assert {stream for stream, _ in taken} == {"here"}
    written_beside = found[:3]  # of x, w_ih, w_hh; those of the biases come from sums
    assert {t.untyped_storage().data_ptr() for t in written_beside} <= {p for _, p in taken}


def test_an_error_leaves_the_streams_as_they_were(log, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "mm", fail)
    case = Case(T=9)
    with cut(5), pytest.raises(RuntimeError, match="out of memory"):
        gradients(case, fusedrnn.rnn, *tensors(case))
    assert log.current is HERE
    assert log.calls[-1] == JOIN


def test_the_planner_is_asked_with_the_right_numbers(log, monkeypatch):
    asked = []
    monkeypatch.setattr(_C, "cut_of_adjoint", lambda *args: asked.append(args) or 0)
    case = Case(T=9, B=3, I=5, H=6)
    gradients(case, fusedrnn.rnn, *tensors(case))
    gradients(Case(T=9, alpha=True), fusedrnn.rnn, *tensors(Case(T=9)))
    assert asked == [
        ("float64", 9, 3, 6, False, 2 * 5 + 6, None),
        ("float64", 9, 3, 7, True, 2 * 4 + 7, None),
    ]


# Where the sequence is not split


def packed(args: list[Tensor]) -> Any:
    return fusedrnn.rnn(args[0].flatten(0, 1), *args[1:], batch_sizes=torch.tensor([3] * 9))


def with_a_graph(args: list[Tensor]) -> None:
    h, _ = fusedrnn.rnn(*args)
    torch.autograd.grad(h.sin().sum(), args, create_graph=True)


def many_at_once(args: list[Tensor]) -> None:
    h, _ = fusedrnn.rnn(*args)
    torch.autograd.grad(h, args, torch.randn(2, *h.shape).double(), is_grads_batched=True)


def many_of_a_gradient(args: list[Tensor]) -> None:
    """With a leak, a gradient of a gradient also flows through the saved φ(z)."""
    h, _ = fusedrnn.rnn(*args, alpha=0.3)
    (first,) = torch.autograd.grad(h.sin().sum(), args[0], create_graph=True)
    along = torch.randn(2, *first.shape).double()
    torch.autograd.grad(first, args[1:], along, is_grads_batched=True)


def in_autocast(args: list[Tensor]) -> None:
    h, _ = fusedrnn.rnn(*args)
    with torch.autocast("cpu", torch.bfloat16):
        h.sum().backward()


def backward(rnn: Callable[[list[Tensor]], Any]) -> Callable[[list[Tensor]], Any]:
    return lambda args: rnn(args)[0].sum().backward()


ALONE: dict[str, Callable[[list[Tensor]], Any]] = {
    "few steps": backward(lambda args: fusedrnn.rnn(args[0][:1], *args[1:])),
    "packed": backward(packed),
    "u": backward(
        lambda args: fusedrnn.recurrence(args[0].repeat(1, 1, 2)[..., :7], None, args[2])
    ),
    "a leak that is learned": backward(
        lambda args: fusedrnn.rnn(*args, alpha=torch.tensor(0.5).double().requires_grad_())
    ),
    "a graph of it": with_a_graph,
    "many at once": many_at_once,
    "many of a gradient": many_of_a_gradient,
    "autocast": in_autocast,
    "grad": lambda args: torch.func.grad(lambda x: fusedrnn.rnn(x, *args[1:])[0].sum())(args[0]),
    "vmap": lambda args: torch.func.vmap(
        torch.func.grad(lambda x: fusedrnn.rnn(x, *args[1:])[0].sum())
    )(torch.stack(args[:1])),
    "compile": backward(torch.compile(lambda args: fusedrnn.rnn(*args), backend="aot_eager")),
}


@pytest.mark.parametrize("run", ALONE.values(), ids=ALONE)
def test_left_alone(log, run):
    args = [t.requires_grad_() for t in tensors(Case(T=9, h0=False))]
    with cut(5):
        run(args)
    assert FORK not in log.calls


# Results on a GPU


def skip_unless_cut(case: Case, args: list[Tensor]) -> None:
    dtype, device = str(case.dtype).removeprefix("torch."), args[0].device.index
    of = (dtype, case.T, case.B, case.H, False, 2 * case.I + case.H, device)
    if _C.cut_of_adjoint(*of) == 0:
        pytest.skip("the planner cuts nothing on this GPU")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_many_times(dtype):
    """Where the planner itself splits the sequence, every run gives the same bits.

    They are as accurate as without a split.
    """
    case = Case(T=1024, B=16, I=256, H=128, dtype=dtype)
    args = [t.cuda() for t in tensors(case)]
    skip_unless_cut(case, args)
    sizes = (case.H, case.I * case.H, case.T * case.B * case.I, case.T * case.B * case.H)
    first = None
    for _ in range(30):
        found = gradients(case, fusedrnn.rnn, *args)
        churn(*sizes, dtype=dtype)
        first = first or found
        torch.testing.assert_close(found, first, rtol=0, atol=0)
    if dtype == torch.float64:
        assert_like_a_cpu(found, gradients(case, reference.rnn, *tensors(case)))
    with cut(0):
        assert_as_accurate_as_torch(
            found, lambda *args: gradients(case, fusedrnn.rnn, *args), args, floor=16
        )


@on_gpu
def test_captured():
    """A stream that was forked in a capture must have joined when the capture ends."""
    case = Case(T=1024, B=16, I=256, H=128, dtype=torch.float32)
    args = [t.cuda() for t in tensors(case)]
    skip_unless_cut(case, args)

    def run() -> list[Tensor]:
        return gradients(case, fusedrnn.rnn, *args)

    graph, captured = capture(run)
    for _ in range(5):
        args[0].copy_(torch.randn_like(args[0]))
        graph.replay()
        torch.testing.assert_close(captured, run(), rtol=0, atol=0)


@on_gpu
def test_they_are_at_once():
    """The profiler shows that GEMMs overlap the recurrence, in forward and in backward."""
    from torch.profiler import ProfilerActivity, profile

    case = Case(T=2048, B=16, I=512, H=128, dtype=torch.float32)
    args = [t.cuda() for t in tensors(case)]
    skip_unless_cut(case, args)
    gradients(case, fusedrnn.rnn, *args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        gradients(case, fusedrnn.rnn, *args)
        torch.cuda.synchronize()
    kernels = [e for e in found.events() if e.device_type.name == "CUDA"]
    chains = [e.time_range for e in kernels if "fusedrnn" in e.name]
    assert len(chains) == 4
    chains.sort(key=lambda chain: chain.start)
    others = [e.time_range for e in kernels if "fusedrnn" not in e.name]
    for chain in (chains[0], chains[3]):  # the first part of forward, the second of backward
        assert any(e.start < chain.end and chain.start < e.end for e in others)


@on_gpu
def test_packed_under_torch_func():
    """Batch sizes are copied to the device in another way when a transform is active."""
    case = Case(lengths=(5, 3, 3, 1))

    def gradient(*args: Tensor) -> Tensor:
        def loss(w_hh: Tensor) -> Tensor:
            h, _ = fusedrnn.rnn(*args[:2], w_hh, *args[3:], **case.flags())
            return h.sin().sum()

        return torch.func.grad(loss)(args[2])

    def tangent(*args: Tensor) -> Tensor:
        def output(w_hh: Tensor) -> Tensor:
            return fusedrnn.rnn(*args[:2], w_hh, *args[3:], **case.flags())[0]

        return torch.func.jvp(output, (args[2],), (args[2].sin(),))[1]

    args = tensors(case)
    for function in (gradient, tangent):
        found = function(*(t.cuda() for t in args))
        torch.testing.assert_close(found.cpu(), function(*args))
