"""Higher derivatives of modules, in the ways that users write them, against ``torch.nn.RNN``.

On CUDA ``torch.nn.RNN`` supports none of them, because cuDNN has no double backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import fusedrnn

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"nonlinearity": "relu"},
]


class Model(nn.Module):
    """An RNN with a linear layer on its last state: a critic, or a regression."""

    def __init__(self, rnn: type[nn.Module], **layout: Any) -> None:
        super().__init__()
        self.rnn = rnn(3, 5, **layout)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[1][-1]).squeeze(-1)


def models(layout: dict[str, Any]) -> tuple[Model, Model]:
    ours, theirs = Model(fusedrnn.RNN, **layout).double(), Model(nn.RNN, **layout).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def assert_same(f: Callable[[Model], Any], layout: dict[str, Any]) -> None:
    found, expected = (f(model) for model in models(layout))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradient_penalty(layout):
    """WGAN-GP: the gradient of the critic at its input should have norm 1."""
    real, fake = torch.randn(2, 6, 6, 3, dtype=torch.float64)

    def step(critic: Model) -> Any:
        share = torch.linspace(0, 1, 6, dtype=torch.float64).unsqueeze(-1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(2, dim=-1) - 1).square().mean()
        loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
        loss.backward()
        return loss.detach(), gradients(critic)

    assert_same(step, layout)


def random_like(weights: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn_like(w) for w in weights]


def loss_of(model: Model) -> Tensor:
    torch.manual_seed(2)
    x, y = torch.randn(6, 6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    return (model(x) - y).square().mean()


def double_backward(model: Model) -> Any:
    weights = list(model.parameters())
    first = torch.autograd.grad(loss_of(model), weights, create_graph=True)
    along = sum((g * v).sum() for g, v in zip(first, random_like(weights)))
    return torch.autograd.grad(along, weights)


def forward_over_reverse(model: Model) -> Any:
    weights = {name: w.detach() for name, w in model.named_parameters()}
    direction = dict(zip(weights, random_like(list(weights.values()))))

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return loss_of(self.model)

    def loss(weights: Any) -> Tensor:
        named = {f"model.{name}": w for name, w in weights.items()}
        return functional_call(Loss(), named, ())

    return tuple(jvp(grad(loss), (weights,), (direction,))[1].values())


def dual_numbers(model: Model) -> Any:
    """Forward over reverse with torch.autograd alone: backward propagates the tangents."""
    weights = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    with forward_ad.dual_level():
        dual = {
            name: forward_ad.make_dual(w, v)
            for name, w, v in zip(names, weights, random_like(weights))
        }
        torch.manual_seed(2)
        x, y = torch.randn(6, 6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        loss = (functional_call(model, dual, (x,)) - y).square().mean()
        first = torch.autograd.grad(loss, list(dual.values()))
        return tuple(forward_ad.unpack_dual(g).tangent for g in first)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("product", [double_backward, forward_over_reverse, dual_numbers])
def test_hessian_vector_product(product, layout):
    ours, theirs = models(layout)
    torch.testing.assert_close(product(ours), double_backward(theirs))


TASKS = torch.linspace(0.5, 2, 4, dtype=torch.float64)


def task_loss(model: Model, weights: dict[str, Tensor], scale: Tensor, x: Tensor) -> Tensor:
    prediction = functional_call(model, weights, (x,))
    return (prediction - scale * x.sum((0, 2))).square().mean()


def adapted(model: Model, weights: dict[str, Tensor], scale: Tensor, x: Tensor) -> dict:
    """Take two inner steps of gradient descent, through which the outer gradient flows."""
    for _ in range(2):
        loss = task_loss(model, weights, scale, x)
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {k: w - 0.1 * s for (k, w), s in zip(weights.items(), slopes)}
    return weights


@pytest.mark.parametrize("layout", [{}, {"num_layers": 2}, {"nonlinearity": "relu"}], ids=str)
def test_maml(layout):
    support, query = torch.randn(2, 6, 5, 3, dtype=torch.float64)

    def outer(model: Model) -> Any:
        weights = dict(model.named_parameters())
        loss = sum(
            task_loss(model, adapted(model, weights, scale, support), scale, query)
            for scale in TASKS
        )
        loss.backward()  # type: ignore[union-attr]
        return gradients(model)

    assert_same(outer, layout)


def test_maml_with_vmap_over_the_tasks():
    """MAML with torch.func: vmap over the tasks, each of which adapts its own weights."""
    ours, theirs = models({})
    support, query = torch.randn(2, 6, 5, 3, dtype=torch.float64)

    def loss_after(weights: dict[str, Tensor], scale: Tensor) -> Tensor:
        for _ in range(2):
            slopes = grad(lambda w: task_loss(ours, w, scale, support))(weights)
            weights = {k: w - 0.1 * slopes[k] for k, w in weights.items()}
        return task_loss(ours, weights, scale, query)

    weights = {k: w.detach() for k, w in ours.named_parameters()}
    found = grad(lambda w: vmap(loss_after, (None, 0))(w, TASKS).sum())(weights)
    start = dict(theirs.named_parameters())
    loss = sum(
        task_loss(theirs, adapted(theirs, start, scale, support), scale, query) for scale in TASKS
    )
    loss.backward()
    torch.testing.assert_close(found, gradients(theirs))


@pytest.mark.parametrize(
    ("strategy", "vectorize"),
    [("reverse-mode", False), ("reverse-mode", True), ("forward-mode", True)],
)
def test_functional_jacobian_and_hessian(strategy, vectorize):
    ours, theirs = models({})
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    options: Any = {"vectorize": vectorize, "strategy": strategy}
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(ours, x, **options),
        torch.autograd.functional.jacobian(theirs, x),
    )
    outer: Any = {"vectorize": vectorize, "outer_jacobian_strategy": strategy}
    torch.testing.assert_close(
        torch.autograd.functional.hessian(lambda x: ours(x).sum(), x, **outer),
        torch.autograd.functional.hessian(lambda x: theirs(x).sum(), x),
    )


def test_cotangents_may_be_batched():
    ours, theirs = models({})
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(5, 2, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(model(x), [x, *model.parameters()], v, is_grads_batched=True)
        for model in (ours, theirs)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_nested_grad_of_every_order(order):
    """The function maps a scalar to a scalar, and grad is nested."""

    def nth(model: Model) -> Tensor:
        x = torch.randn(3, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def f(s: Tensor) -> Tensor:
            return model(s * x).sum()

        for _ in range(order):
            f = grad(f)
        return f(torch.tensor(0.5, dtype=torch.float64))

    assert_same(nth, {})
