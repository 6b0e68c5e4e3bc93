"""The Jacobian of a step, and fixed points."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fusedrnn
from fusedrnn import reference

B, I, H = 5, 3, 6
WIDE = {"dtype": torch.float64}
FORMS = ["rate", "potential", "inside"]
ALPHAS: dict[str, dict[str, Any]] = {
    "no leak": {},
    "a number": {"alpha": 0.3},
    "of each unit": {"alpha": torch.linspace(0, 1, H)},
    "learned": {"alpha": 0.3, "learn_alpha": True},
}


def leaky(**options: Any) -> fusedrnn.LeakyRNNCell:
    return fusedrnn.LeakyRNNCell(I, H, **options, **WIDE)


def by_autograd(cell: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(cell, argnums=1))(x, h)


# ---- jacobian


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nonlinearity", reference.NONLINEARITIES)
def test_jacobian_of_a_leaky_cell_is_that_of_autograd(nonlinearity, form, alpha):
    cell = leaky(nonlinearity=nonlinearity, form=form, **ALPHAS[alpha])
    x, h = torch.randn(B, I, **WIDE), torch.randn(B, H, **WIDE)
    assert_close(fusedrnn.jacobian(cell, x, h), by_autograd(cell, x, h))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("cls", [fusedrnn.RNNCell, nn.RNNCell])
def test_jacobian_of_a_cell_is_that_of_autograd(cls, nonlinearity, bias):
    cell = cls(I, H, bias=bias, nonlinearity=nonlinearity, **WIDE)
    x, h = torch.randn(B, I, **WIDE), torch.randn(B, H, **WIDE)
    want = torch.stack([torch.func.jacrev(cell, argnums=1)(*row) for row in zip(x, h)])
    assert_close(fusedrnn.jacobian(cell, x, h), want)


@pytest.mark.parametrize("form", FORMS)
def test_jacobian_of_a_layer_is_that_of_its_cell(form):
    layer = fusedrnn.LeakyRNN(I, H, form=form, alpha=0.3, **WIDE)
    plain = fusedrnn.RNN(I, H, nonlinearity="relu", **WIDE)
    cells = leaky(form=form, alpha=0.3), fusedrnn.RNNCell(I, H, nonlinearity="relu", **WIDE)
    for module, cell in zip((layer, plain), cells):
        state = {n.removesuffix("_l0"): t for n, t in module.state_dict().items()}
        cell.load_state_dict(state)
        x, h = torch.randn(B, I, **WIDE), torch.randn(B, H, **WIDE)
        assert_close(fusedrnn.jacobian(module, x, h), fusedrnn.jacobian(cell, x, h))


def test_jacobian_broadcasts_unbatched_arguments():
    for form in FORMS:
        cell = leaky(form=form, alpha=0.3)
        x, h = torch.randn(B, I, **WIDE), torch.randn(B, H, **WIDE)
        for x_of_call, h_of_call in ((x, h), (x[0], h), (x, h[0]), (x[0], h[0])):
            rows = max(x_of_call.dim(), h_of_call.dim()) - 1
            want = fusedrnn.jacobian(
                cell, x_of_call.expand(B, I).clone(), h_of_call.expand(B, H).clone()
            )
            found = fusedrnn.jacobian(cell, x_of_call, h_of_call)
            assert_close(found, want if rows else want[0])


def test_jacobian_is_differentiable():
    cell = leaky(form="inside", alpha=0.3, learn_alpha=True)
    x, h = torch.randn(2, I, **WIDE), torch.randn(2, H, **WIDE, requires_grad=True)
    names = [name for name, _ in cell.named_parameters()]

    def run(h: Tensor, *weights: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(cell, dict(zip(names, weights))):
            return fusedrnn.jacobian(cell, x, h)

    assert torch.autograd.gradcheck(run, (h, *cell.parameters()))


def test_jacobian_supports_compile_and_vmap():
    torch._dynamo.reset()
    cell = leaky(form="potential", alpha=0.3)
    x, h = torch.randn(B, I, **WIDE), torch.randn(B, H, **WIDE)
    want = fusedrnn.jacobian(cell, x, h)
    compiled = torch.compile(fusedrnn.jacobian, backend="aot_eager", fullgraph=True)
    assert_close(compiled(cell, x, h), want)
    assert_close(torch.vmap(lambda x, h: fusedrnn.jacobian(cell, x, h))(x, h), want)


# ---- fixed points


def bistable(**options: Any) -> fusedrnn.LeakyRNNCell:
    cell = fusedrnn.LeakyRNNCell(1, 1, bias=False, **options, **WIDE)
    cell.weight_hh.data.fill_(2.0)
    return cell


@pytest.mark.parametrize("alpha", [{}, {"alpha": 0.2}], ids=["no leak", "leak"])
@pytest.mark.parametrize("form", ["rate", "potential"])
def test_a_bistable_unit_has_three_fixed_points(form, alpha):
    """h = tanh(2 h), or v = 2 tanh(v), has two attractors and, between them, a repeller at 0."""
    cell = bistable(form=form, **alpha)
    starts = torch.linspace(-2, 2, 41, **WIDE).unsqueeze(1)
    found = fusedrnn.fixed_points(cell, torch.zeros(1, **WIDE), starts)
    assert len(found) == 3
    assert int(found.counts.sum()) == found.starts == 41
    root = 0.9575040240772687  # of h = tanh(2 h)
    order = found.points.flatten().argsort()
    want = torch.tensor([-root, 0, root], **WIDE) * (2 if form == "potential" else 1)
    assert_close(found.points.flatten()[order], want, atol=1e-8, rtol=0)
    assert found.stable[order].tolist() == [True, False, True]
    assert found.unstable[order].tolist() == [0, 1, 0]
    leak = alpha.get("alpha", 1.0)
    slopes = 2 * (1 - torch.tensor([root, 0, root], **WIDE) ** 2)
    assert_close(found.eigenvalues.real.flatten()[order], 1 - leak + leak * slopes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nonlinearity", reference.NONLINEARITIES)
def test_the_points_found_are_fixed_and_distinct(nonlinearity, form):
    cell = leaky(nonlinearity=nonlinearity, form=form, alpha=0.5)
    cell.weight_hh.data *= 2
    x, starts = torch.randn(I, **WIDE), torch.randn(50, H, **WIDE)
    found = fusedrnn.fixed_points(cell, x, starts)
    after = cell(x.expand(len(found), I), found.points)
    assert_close(after, found.points, atol=2e-9, rtol=0)
    assert (found.residuals <= 1e-9).all()
    want = torch.linalg.eigvals(fusedrnn.jacobian(cell, x, found.points)).abs().amax(-1)
    assert_close(found.eigenvalues.abs()[:, 0], want)
    differences = (found.points[:, None] - found.points).abs().amax(-1)
    assert (differences + torch.eye(len(found)) > 1e-4).all()


def test_a_linear_cell_has_one_fixed_point():
    cell = leaky(nonlinearity="identity", alpha=0.5)
    x, starts = torch.randn(I, **WIDE), 100 * torch.randn(20, H, **WIDE)
    found = fusedrnn.fixed_points(cell, x, starts)
    u = x @ cell.weight_ih.T + cell.bias_ih + cell.bias_hh
    want = torch.linalg.solve(torch.eye(H, **WIDE) - cell.weight_hh, u)
    assert_close(found.points, want.detach()[None], atol=1e-7, rtol=0)
    assert found.counts.tolist() == [20]


def test_a_line_of_fixed_points():
    """If W projects onto a line, the Jacobian minus I is singular everywhere on that line."""
    line = torch.randn(H, **WIDE)
    cell = fusedrnn.LeakyRNNCell(I, H, nonlinearity="identity", bias=False, **WIDE)
    cell.weight_hh.data = torch.outer(line, line) / line.dot(line)
    starts = torch.randn(10, H, **WIDE)
    found = fusedrnn.fixed_points(cell, torch.zeros(I, **WIDE), starts)
    assert len(found) == 10
    assert_close(found.points @ cell.weight_hh.T, found.points, atol=1e-8, rtol=0)
    assert_close(found.eigenvalues[:, 0].abs(), torch.ones(10, **WIDE))


def test_the_memories_of_a_hopfield_network():
    patterns = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, -1] * 4, [1, 1, -1, -1] * 2]).double()
    cell = fusedrnn.RNNCell(1, 8, bias=False, **WIDE)
    cell.weight_hh.data = 3 * patterns.T @ patterns / 8
    starts = torch.cat([patterns, -patterns]) + 0.3 * torch.randn(6, 8, **WIDE)
    found = fusedrnn.fixed_points(cell, torch.zeros(1, **WIDE), starts)
    memories = {tuple(p) for p in torch.cat([patterns, -patterns]).tolist()}
    attractors = {tuple(p) for p in found.points[found.stable].sign().tolist()}
    assert memories <= attractors


def test_results_are_in_the_dtype_of_the_weights():
    cell = fusedrnn.RNNCell(I, H)
    found = fusedrnn.fixed_points(cell, torch.zeros(I), torch.randn(5, H))
    assert found.points.dtype == found.residuals.dtype == torch.float32
    assert_close(cell(torch.zeros(len(found), I), found.points), found.points)


def test_slow_points_are_kept_with_a_larger_tolerance():
    """Iterating tanh approaches its only fixed point, 0, ever more slowly."""
    cell = bistable()
    cell.weight_hh.data.fill_(1.001)
    options = {"tolerance": 1e-2, "distance": 1e-9}
    starts = torch.linspace(-0.1, 0.1, 9, **WIDE).unsqueeze(1)
    slow = fusedrnn.fixed_points(cell, torch.zeros(1, **WIDE), starts, **options)
    assert_close(slow.points.flatten().sort().values, starts.flatten())  # no iteration is needed


def test_a_cell_without_fixed_points_gives_an_empty_result():
    cell = bistable(nonlinearity="identity")
    cell.weight_hh.data.fill_(1.0)
    cell.weight_ih.data.fill_(1.0)
    found = fusedrnn.fixed_points(cell, torch.ones(1, **WIDE), torch.zeros(4, 1, **WIDE))
    assert (len(found), found.points.shape, found.eigenvalues.shape) == (0, (0, 1), (0, 1))
    assert repr(found) == "FixedPoints: 0 from 0 of 4 starts"


def test_repr():
    starts = torch.tensor([[-1.0], [0.0], [1.0], [1.1]], **WIDE)
    lines = repr(fusedrnn.fixed_points(bistable(), torch.zeros(1, **WIDE), starts)).splitlines()
    assert lines[0] == "FixedPoints: 3 from 4 of 4 starts"
    assert lines[1] == "starts  residual  largest eigenvalue  unstable directions"
    assert lines[2].split()[0] == "2"
    assert sorted(line.split()[2] for line in lines[2:]) == ["0.166372", "0.166372", "2.000000"]


CELL, X, HX = fusedrnn.RNNCell(I, H), torch.zeros(I), torch.zeros(B, H)
ERRORS: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "cell": (
        nn.GRUCell(I, H), X, HX, TypeError,
        "cell must be RNNCell, LeakyRNNCell, RNN or LeakyRNN, got GRUCell"),
    "layers": (
        fusedrnn.RNN(I, H, 2), X, HX, ValueError,
        "cell must be one layer in one direction, got num_layers=2, 1 direction(s)"),
    "directions": (
        fusedrnn.LeakyRNN(I, H, bidirectional=True), X, HX, ValueError,
        "cell must be one layer in one direction, got num_layers=1, 2 direction(s)"),
    "x a list": (CELL, [0.0] * I, HX, TypeError, "x must be a tensor, got list"),
    "x size": (CELL, X[1:], HX, ValueError, "x must be [3] or [B, 3], got [2]"),
    "x dtype": (
        CELL, X.double(), HX, RuntimeError,
        "x must be torch.float32 on cpu like the weights, got torch.float64 on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    cell, x, h, error, message = ERRORS[case]
    for function in (fusedrnn.jacobian, fusedrnn.fixed_points):
        with pytest.raises(error) as info:
            function(cell, x, h)
        assert str(info.value) == f"fusedrnn: {message}"


def test_errors_of_the_state():
    with pytest.raises(ValueError, match=r"h must be \[6\] or \[B, 6\], got \[5, 5\]"):
        fusedrnn.jacobian(CELL, X, HX[:, 1:])
    with pytest.raises(ValueError, match=r"starts must be \[6\] or \[B, 6\], got \[1, 5, 6\]"):
        fusedrnn.fixed_points(CELL, X, HX[None])
    with pytest.raises(ValueError, match=r"x must be \[3\], got \[5, 3\]"):
        fusedrnn.fixed_points(CELL, X.expand(B, I), HX)


@pytest.mark.parametrize("name", ["tolerance", "distance", "iterations"])
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"fusedrnn: {name} must be above 0, got 0"):
        fusedrnn.fixed_points(CELL, X, HX, **{name: 0})
