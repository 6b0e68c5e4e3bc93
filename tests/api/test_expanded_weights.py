"""Per-sample gradients by ``call_for_per_sample_grads``, torch's older API, equal nn.RNN's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import pair
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

T, B, I, H = 6, 3, 4, 5


def grad_samples(module: nn.Module, reduction: str, x: Any, *hx: torch.Tensor) -> Any:
    torch.manual_seed(1)
    output, h_n = call_for_per_sample_grads(module, batch_size=B, loss_reduction=reduction)(x, *hx)
    data = output if isinstance(output, torch.Tensor) else output.data
    (data.sin().sum() + h_n.square().sum()).backward()
    return {name: weight.grad_sample for name, weight in module.named_parameters()}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "layout",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "nonlinearity": "relu"}],
    ids=str,
)
def test_per_sample_gradients_equal_nn_rnns(layout, packed, reduction):
    ours, theirs = pair(I, H, dtype=torch.float64, batch_first=True, **layout)
    directions = 2 if "bidirectional" in layout else 1
    hx = torch.randn(directions * layout.get("num_layers", 1), B, H, dtype=torch.float64)
    x: Any = torch.randn(B, T, I, dtype=torch.float64)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([6, 4, 1]), batch_first=True)
    torch.testing.assert_close(
        grad_samples(ours, reduction, x, hx), grad_samples(theirs, reduction, x, hx)
    )


def test_dropout_is_active():
    """nn.RNN's own per-sample gradients ignore dropout."""
    ours, _ = pair(I, H, dtype=torch.float64, batch_first=True, num_layers=2, dropout=0.5)
    x = torch.randn(B, T, I, dtype=torch.float64)
    samples = grad_samples(ours, "sum", x)
    torch.manual_seed(1)
    output, h_n = ours(x)
    (output.sin().sum() + h_n.square().sum()).backward()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(samples[name].sum(0), weight.grad)


def test_layers_before_the_rnn_get_per_sample_gradients():
    """A linear layer before the RNN gets per-sample gradients, too."""
    model = nn.Sequential(nn.Linear(I, I), fusedrnn.RNN(I, H, batch_first=True)).double()
    x = torch.randn(B, T, I, dtype=torch.float64)
    output, _ = call_for_per_sample_grads(model)(x)
    output.sin().sum().backward()
    for row in range(B):
        each = torch.autograd.grad(model(x[row : row + 1])[0].sin().sum(), list(model.parameters()))
        found = [weight.grad_sample[row] for weight in model.parameters()]
        torch.testing.assert_close(found, list(each))


def test_another_batch_size_is_refused():
    ours, _ = pair(I, H, dtype=torch.float64, batch_first=True)
    x = torch.randn(B, T, I, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="batch_size must be 3, the number of rows, got 7"):
        call_for_per_sample_grads(ours, batch_size=7)(x)
