"""The recipes in examples/recipes.py and docs/recipes.md compute the published equations."""

from __future__ import annotations

import re
from typing import Any

import pytest
import recipes
import torch
from paths import ROOT
from recipes import RECIPES, Recipe
from torch import Tensor, nn

import fusedrnn

# T, B, I, H
SIZES = [(20, 3, 4, 31), (1, 1, 1, 1), (1, 1, 3, 31), (33, 5, 2, 64)]
EXACT = {"rtol": 1e-9, "atol": 1e-10}

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@each_recipe
def test_values_and_gradients_are_those_of_the_loop(recipe: Recipe, sizes: tuple[int, ...]) -> None:
    arguments = recipe.make(*sizes, torch.float64)
    tensors = [t.requires_grad_() for t in arguments.values() if recipes.is_float(t)]
    weights: list[Tensor] = []
    found: list[Any] = []
    for compute in (recipe.loop, recipe.call):
        results = compute(**arguments)
        weights = weights or [torch.randn_like(t) for t in results]
        total = sum((t * w).sum() for t, w in zip(results, weights))
        found.append((results, torch.autograd.grad(total, tensors)))
    torch.testing.assert_close(found[1], found[0], **EXACT)


@each_recipe
def test_every_argument_matters(recipe: Recipe) -> None:
    """The test above would not notice an argument that both the loop and the call ignore."""
    arguments = recipe.make(20, 3, 4, 31, torch.float64)
    tensors = [t.requires_grad_() for t in arguments.values() if recipes.is_float(t)]
    output, _ = recipe.loop(**arguments)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(output.sum(), tensors))


@each_recipe
def test_states_stay_finite_on_the_sizes_of_the_benchmark(recipe: Recipe) -> None:
    output, _ = recipe.call(**recipe.make(500, 2, 8, 512, torch.float32))
    assert output.isfinite().all()
    assert output.abs().max() < 1000


def blocks(name: str) -> list[str]:
    """Return the Python blocks of a section of docs/recipes.md."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    return re.findall(r"```python\n(.*?)```", sections[name], re.DOTALL)


@each_recipe
def test_the_call_in_the_docs_computes_the_equation(recipe: Recipe) -> None:
    arguments = recipe.make(20, 3, 4, 31, torch.float64)
    names = {"torch": torch, "fusedrnn": fusedrnn, **arguments}
    exec(blocks(recipe.name)[0], names)
    found = names["output"], names["last"]
    torch.testing.assert_close(found, recipe.loop(**arguments), **EXACT)


@pytest.mark.parametrize("name", ["mRNNTorch", "nn-brain EI_RNN"])
def test_the_module_with_parametrizations_computes_the_equation(name: str) -> None:
    """The noise is 0 here, because a module draws its own."""
    (recipe,) = [recipe for recipe in RECIPES if recipe.name == name]
    arguments = {**recipe.make(20, 3, 4, 31, torch.float64), "sigma": 0.0}
    rnn = fusedrnn.LeakyRNN(
        4, 31, nonlinearity="relu", form="potential", alpha=arguments["alpha"], dtype=torch.float64
    )
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(arguments["w_ih"])
        rnn.weight_hh_l0.copy_(arguments["w_ei"])
        rnn.bias_ih_l0.copy_(arguments["b"])
        rnn.bias_hh_l0.zero_()
    for constraint in (
        fusedrnn.parametrizations.Dale(arguments["signs"]),
        fusedrnn.parametrizations.Masked(arguments["mask"]),
    ):
        nn.utils.parametrize.register_parametrization(rnn, "weight_hh_l0", constraint)
    output, last = rnn(arguments["x"], arguments["v0"].unsqueeze(0))
    torch.testing.assert_close((output, last[0]), recipe.loop(**arguments), **EXACT)


def test_the_state_noise_of_the_module_is_that_of_the_recipe() -> None:
    (recipe,) = [recipe for recipe in RECIPES if recipe.name == "state noise"]
    arguments = recipe.make(20, 3, 4, 31, torch.float64)
    alpha, sigma = arguments["alpha"], arguments["sigma"]
    rnn = fusedrnn.LeakyRNN(
        4, 31, alpha=alpha, state_noise=(2 * alpha) ** 0.5 * sigma, dtype=torch.float64
    )
    arguments.update(w_ih=rnn.weight_ih_l0, w_hh=rnn.weight_hh_l0)
    arguments["b"] = rnn.bias_ih_l0 + rnn.bias_hh_l0
    torch.manual_seed(1)
    output, last = rnn(arguments["x"], arguments["h0"].unsqueeze(0))
    torch.manual_seed(1)
    arguments["xi"] = torch.randn(20, 3, 31, dtype=torch.float64)
    torch.testing.assert_close((output, last[0]), recipe.loop(**arguments), **EXACT)


def test_the_wrong_form_is_another_model() -> None:
    """As docs/recipes.md warns, alpha in the form rate does not compute a potential model."""
    (recipe,) = [recipe for recipe in RECIPES if recipe.name == "trainRNNbrain h"]
    a = recipe.make(20, 3, 4, 31, torch.float64)
    output, _ = fusedrnn.rnn(a["x"], a["w_ih"], a["w_hh"], a["b"], None, a["v0"], alpha=a["alpha"])
    assert (output - recipe.loop(**a)[0]).abs().max() > 0.1


def test_the_script_prints_every_equation(capsys: pytest.CaptureFixture[str]) -> None:
    recipes.main()
    text = capsys.readouterr().out
    for recipe in RECIPES:
        assert f"{recipe.name}: {recipe.equation}" in text
