"""Autocast: the layer runs in low precision, as torch's own rule for RNNs requires."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case
from pairs import pair
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import reference
from fusedrnn.ops import autocast

T, B, I, H = 12, 4, 6, 16
LOW = [torch.bfloat16, torch.float16]


def gradients(module: nn.Module, x: torch.Tensor, dtype: torch.dtype | None) -> Any:
    x = x.to(torch.float64 if dtype is None else torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output, h_n = module(x)
        loss = output.sin().sum() + h_n.float().sum()
    return torch.autograd.grad(loss, [x, *module.parameters()])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradients_are_as_accurate_as_those_of_torch(dtype):
    ours, theirs = pair(I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    truth = gradients(copy.deepcopy(theirs).double(), x, None)
    for our, their, true in zip(gradients(ours, x, dtype), gradients(theirs, x, dtype), truth):
        assert our.dtype == torch.float32
        ours_is, theirs_is = ((g - true).abs().max() for g in (our, their))
        assert ours_is <= 2 * theirs_is + torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_floating_argument_is_cast(dtype):
    case = Case(T=T, B=B, I=I, H=H, reset=True, alpha=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        h, h_n = fusedrnn.rnn(**case.arguments(), **case.flags())
    assert h.dtype == h_n.dtype == dtype
    low = {k: v.to(dtype) for k, v in case.arguments().items()}
    torch.testing.assert_close(h, fusedrnn.rnn(**low, **case.flags())[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_op_itself_casts(dtype):
    case = Case(T=T, B=B, I=I, H=H, reset=True, alpha=True, dtype=torch.float32)
    found = case.arguments(requires_grad=True)
    names = ("x", "w_ih", "b_ih", "b_hh", "h0", "v0", "w_hh", "alpha", "q")
    layout = (case.flags()["reset"], None, "tanh", "rate", False, None)
    with torch.autocast("cpu", dtype):
        h, h_n, saved = torch.ops.fusedrnn.activation(*(found.get(name) for name in names), *layout)
    assert h.dtype == h_n.dtype == saved.dtype == dtype
    slopes = torch.autograd.grad(h.float().sum(), list(found.values()))
    assert {slope.dtype for slope in slopes} == {torch.float32}


def test_float64_is_not_cast():
    case = Case()
    with torch.autocast("cpu", torch.bfloat16):
        h, _ = fusedrnn.rnn(**case.arguments())
    torch.testing.assert_close(h, reference.rnn(**case.arguments())[0])


def test_autocast_can_be_disabled_inside_autocast():
    ours, _ = pair(I, H)
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        within, _ = ours(x)
    assert torch.equal(within, ours(x)[0])


def test_packed_input_is_cast():
    ours, _ = pair(I, H)
    data, batch_sizes = torch.randn(7, I), torch.tensor([3, 2, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = ours(PackedSequence(data, batch_sizes))
    assert output.data.dtype == torch.bfloat16


def test_transforms_differentiate_the_cast_layer():
    """Under autocast, transforms differentiate the cast layer."""
    ours, _ = pair(I, H)
    x = torch.randn(5, T, B, I)
    weights = {k: w.detach() for k, w in ours.named_parameters()}

    def loss(weights: Any, x: torch.Tensor) -> torch.Tensor:
        output, _ = functional_call(ours, weights, (x,))
        assert output.dtype == torch.bfloat16
        return output.float().sin().sum()

    with torch.autocast("cpu", torch.bfloat16):
        each = [grad(loss)(weights, one) for one in x]
        together = vmap(grad(loss), (None, 0))(weights, x)
        tangent = jvp(lambda w: loss(w, x[0]), (weights,), (weights,))[1]
        second = jvp(grad(lambda w: loss(w, x[0])), (weights,), (weights,))[1]
    assert tangent.dtype == torch.float32
    along = sum((each[0][k] * w).sum() for k, w in weights.items())
    torch.testing.assert_close(tangent, along, rtol=0.05, atol=0.1)
    for name, found in together.items():
        expected = torch.stack([g[name] for g in each])
        assert found.dtype == second[name].dtype == torch.float32
        # products of bfloat16 numbers, summed in another order
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=2**-6 * scale)


def test_double_backward_inside_autocast():
    ours, _ = pair(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (slope,) = torch.autograd.grad(ours(x)[0].float().sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert all(w.grad.dtype == torch.float32 for w in (x, *ours.parameters()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_under_the_same_autocast(reentrant):
    """Backward recomputes the forward pass under the same autocast."""
    ours, _ = pair(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    results = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=reentrant)):
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = run(x)
        output.float().sin().sum().backward()
        results.append([x.grad, *(w.grad for w in ours.parameters())])
        x.grad = None
        ours.zero_grad()
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_cells_compute_in_low_precision():
    cell = fusedrnn.RNNCell(I, 700)
    x = torch.randn(B, I)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert cell(x).dtype == torch.bfloat16  # the engine
        assert fusedrnn.RNNCell(I, H)(x).dtype == torch.bfloat16  # torch's own op


def test_exported_programs_follow_autocast():
    """Such a program calls the op directly, here with low-precision x and float32 weights."""
    model = nn.Sequential(nn.Linear(I, I), fusedrnn.RNN(I, H, num_layers=2, bidirectional=True))
    x = torch.randn(T, B, I)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = exported(x), model(x)
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def autocast_for_cuda():
    """Set the state of ``autocast("cuda", torch.float16)``, which has no effect without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.usefixtures("autocast_for_cuda")
def test_the_rule_for_cuda_is_the_same():
    """Fake tensors need no GPU. CPU tensors are not cast."""
    with FakeTensorMode():
        for device, dtype in (("cuda", torch.float16), ("cpu", torch.float32)):
            x, w = torch.empty(T, B, H, device=device), torch.empty(H, H, device=device)
            layout = (None, None, None, None, "tanh", "rate", False, None)
            h, h_n, _ = torch.ops.fusedrnn.activation(x, *[None] * 5, w, *layout)
            assert (h.dtype, h_n.dtype, h.device.type) == (dtype, dtype, device)
    x, reset, wide = torch.randn(2), torch.ones(2).bool(), torch.randn(2).double()
    cast = autocast.cast("cuda", x, None, reset, wide)
    assert [c if c is None else c.dtype for c in cast] == [
        torch.float16, None, torch.bool, torch.float64,
    ]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_on_cuda_gives_float32_gradients(dtype):
    ours, _ = pair(I, H, num_layers=2)
    ours, x = ours.cuda(), torch.randn(T, B, I, device="cuda")
    with torch.autocast("cuda", dtype):
        output, h_n = ours(x)
    assert output.dtype == h_n.dtype == dtype
    output.float().sum().backward()
    assert {w.grad.dtype for w in ours.parameters()} == {torch.float32}
