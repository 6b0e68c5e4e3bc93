"""fusedrnn.parametrizations on the weights of the modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import fusedrnn
from fusedrnn import reference
from fusedrnn.parametrizations import Dale, LowRank, Masked, spectral_radius_

T, B, I, H = 5, 3, 4, 6
WIDE = {"dtype": torch.float64}
SIGNS = torch.tensor([1, 1, 1, 1, -1, -1])
MASK = torch.arange(H * H).reshape(H, H) % 3 != 0

PARAMETRIZATIONS: dict[str, Callable[[], nn.Module]] = {
    "Dale": lambda: Dale(SIGNS),
    "Masked": lambda: Masked(MASK),
    "LowRank": lambda: LowRank(2),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: fusedrnn.RNN(I, H, **WIDE),
    "LeakyRNN": lambda: fusedrnn.LeakyRNN(I, H, form="potential", alpha=0.3, **WIDE),
}


def register(module: nn.Module, *parametrizations: nn.Module) -> Any:
    for parametrization in parametrizations:
        parametrize.register_parametrization(module, "weight_hh_l0", parametrization)
    return module.parametrizations.weight_hh_l0


# ---- weights


def test_dale_gives_every_column_its_sign_and_keeps_magnitudes():
    rnn = fusedrnn.RNN(I, H)
    before = rnn.weight_hh_l0.detach().clone()
    register(rnn, Dale(SIGNS))
    assert_close(rnn.weight_hh_l0, before.abs() * SIGNS)
    assert (rnn.weight_hh_l0.sign() == SIGNS).all()
    allowed = torch.rand(H, H) * SIGNS
    rnn.weight_hh_l0 = allowed
    assert torch.equal(rnn.weight_hh_l0, allowed)


@pytest.mark.parametrize(
    "mask", [MASK, MASK.float(), MASK.long()], ids=lambda mask: str(mask.dtype)
)
def test_masked_removes_connections(mask):
    rnn = fusedrnn.RNN(I, H)
    before = rnn.weight_hh_l0.detach().clone()
    original = register(rnn, Masked(mask)).original
    assert_close(rnn.weight_hh_l0, before.where(MASK, 0))
    rnn(torch.randn(T, B, I))[0].sum().backward()
    assert torch.equal(original.grad != 0, MASK)


def test_low_rank_starts_at_the_nearest_weight():
    rnn = fusedrnn.RNN(I, H, **WIDE)
    u, s, vh = torch.linalg.svd(rnn.weight_hh_l0.detach())
    both = register(rnn, LowRank(2))
    assert_close(rnn.weight_hh_l0, u[:, :2] @ s[:2].diag() @ vh[:2])
    m, n = both.original0, both.original1
    assert m.shape == n.shape == (H, 2)
    assert_close(rnn.weight_hh_l0, m @ n.T / H)
    exact = torch.randn(H, 2, **WIDE) @ torch.randn(2, H, **WIDE)
    rnn.weight_hh_l0 = exact
    assert_close(rnn.weight_hh_l0, exact)
    assert len(list(rnn.parameters())) == 5


def test_low_rank_of_an_input_weight_divides_by_the_number_of_inputs():
    rnn = fusedrnn.RNN(I, H, **WIDE)
    parametrize.register_parametrization(rnn, "weight_ih_l0", LowRank(3))
    both = rnn.parametrizations.weight_ih_l0
    assert_close(rnn.weight_ih_l0, both.original0 @ both.original1.T / I)


def test_parametrizations_can_be_combined():
    rnn = fusedrnn.RNN(I, H)
    register(rnn, LowRank(2), Dale(SIGNS), Masked(MASK))
    weight = rnn.weight_hh_l0
    assert torch.equal(weight != 0, MASK)
    assert (weight * SIGNS >= 0).all()


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("kind", MODULES)
def test_a_module_computes_and_learns_with_the_constrained_weight(kind, name):
    module, x = MODULES[kind](), torch.randn(T, B, I, **WIDE)
    register(module, PARAMETRIZATIONS[name]())
    options = {"form": "potential", "alpha": 0.3} if kind == "LeakyRNN" else {}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        weights = [getattr(module, n) for n in module._flat_weights_names]
        want, _ = reference.rnn(x, *weights, **options)
        output, _ = module(x)
        assert_close(output, want)
        parameters = list(module.parameters())
        assert_close(
            torch.autograd.grad(output.square().sum(), parameters, retain_graph=True),
            torch.autograd.grad(want.square().sum(), parameters),
        )
        optimizer.zero_grad()
        output.square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_copies_state_dicts_and_removal(name):
    rnn, x = fusedrnn.RNN(I, H), torch.randn(T, B, I)
    register(rnn, PARAMETRIZATIONS[name]())
    assert_close(copy.deepcopy(rnn)(x), rnn(x))
    other = fusedrnn.RNN(I, H)
    register(other, PARAMETRIZATIONS[name]())
    other.load_state_dict(rnn.state_dict())
    assert_close(other(x), rnn(x))
    before = rnn(x)
    parametrize.remove_parametrizations(rnn, "weight_hh_l0")
    assert type(rnn) is fusedrnn.RNN
    assert_close(rnn(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_weights_follow_the_dtype(name, dtype):
    rnn = fusedrnn.RNN(I, H, dtype=dtype)
    register(rnn, PARAMETRIZATIONS[name]())
    assert rnn.weight_hh_l0.dtype == dtype
    rnn.float()
    assert rnn.weight_hh_l0.dtype == torch.float32
    rnn(torch.randn(T, B, I))


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    rnn, x = fusedrnn.RNN(I, H), torch.randn(T, B, I)
    register(rnn, PARAMETRIZATIONS[name]())
    compiled = torch.compile(lambda x: rnn(x), backend="eager", fullgraph=True)
    assert_close(compiled(x), rnn(x))


def test_repr():
    assert repr(Dale(SIGNS)) == "Dale(6)"
    assert repr(Masked(MASK)) == "Masked(6, 6)"
    assert repr(LowRank(2)) == "LowRank(2)"


# ---- initialisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rho", [0.9, 1, 1.5, 0])
def test_spectral_radius(rho, dtype):
    rnn = fusedrnn.LeakyRNN(I, 50, alpha=0.5, dtype=dtype)
    assert spectral_radius_(rnn.weight_hh_l0, rho) is rnn.weight_hh_l0
    radius = torch.linalg.eigvals(rnn.weight_hh_l0.detach().double()).abs().max()
    assert radius.item() == pytest.approx(rho, rel=1e-5)
    assert rnn.weight_hh_l0.requires_grad


def test_spectral_radius_is_reproducible():
    first, again, other = (
        spectral_radius_(torch.empty(9, 9), 0.9, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    spectral_radius_(torch.empty(9, 9), 0.9, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_spectral_radius_on_meta():
    assert spectral_radius_(torch.empty(4, 4, device="meta"), 0.9).is_meta


# ---- errors

ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "signs a list": (lambda: Dale([1, -1]), TypeError, "signs must be a tensor, got list"),
    "signs of two dimensions": (
        lambda: Dale(torch.ones(1, H)), ValueError, "signs must be 1-D, got [1, 6]"),
    "signs zero": (
        lambda: Dale(torch.tensor([1, 0])), ValueError, "signs must be +1 or -1, got 0"),
    "signs of another size": (
        lambda: register(fusedrnn.RNN(I, H), Dale(SIGNS[1:])), ValueError,
        "signs must have 6 elements like a row of the weight, got 5"),
    "mask a number": (lambda: Masked(1), TypeError, "mask must be a tensor, got int"),
    "mask of other values": (
        lambda: Masked(torch.tensor([[0.0, 0.5]])), ValueError, "mask must be 0 or 1, got 0.5"),
    "mask of another size": (
        lambda: register(fusedrnn.RNN(I, H), Masked(MASK[1:])), ValueError,
        "mask must be [6, 6] like the weight, got [5, 6]"),
    "rank a float": (lambda: LowRank(2.0), TypeError, "rank must be an int, got float"),
    "rank zero": (lambda: LowRank(0), ValueError, "rank must be at least 1, got 0"),
    "rank too large": (
        lambda: register(fusedrnn.RNN(I, H), LowRank(7)), ValueError,
        "rank must be at most 6 for a weight [6, 6], got 7"),
    "weight a list": (
        lambda: spectral_radius_([[1.0]], 1), TypeError, "weight must be a tensor, got list"),
    "weight not square": (
        lambda: spectral_radius_(torch.ones(2, 3), 1), ValueError,
        "weight must be [N, N], got [2, 3]"),
    "rho negative": (
        lambda: spectral_radius_(torch.ones(2, 2), -1), ValueError,
        "rho must be at least 0 and finite, got -1"),
    "rho not a number": (
        lambda: spectral_radius_(torch.ones(2, 2), float("nan")), ValueError,
        "rho must be at least 0 and finite, got nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    function, error, message = ERRORS[case]
    with pytest.raises(error) as info:
        function()
    assert str(info.value).splitlines()[-1].endswith(f"fusedrnn: {message}")


def test_the_arguments_are_copied():
    signs, mask = SIGNS.clone(), MASK.clone()
    dale, masked = Dale(signs), Masked(mask)
    signs.zero_(), mask.zero_()
    weight: Tensor = torch.ones(H, H)
    assert_close(dale(weight)[0], SIGNS.float())
    assert_close(masked(weight), MASK.float())
