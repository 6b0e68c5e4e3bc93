"""Calls that return every layer or only the last step, and states that serve every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_oracle import data_of, expected, pack, state_for
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

import fusedrnn

T, B, I, H = 5, 3, 4, 6
LENGTHS = [3, 5, 1]
WIDE = {"dtype": torch.float64}
MODULES: dict[str, tuple[type, dict[str, Any]]] = {
    "RNN": (fusedrnn.RNN, {}),
    "LeakyRNN": (fusedrnn.LeakyRNN, {"alpha": 0.3}),
    "potential": (
        fusedrnn.LeakyRNN, {"alpha": 0.3, "form": "potential", "nonlinearity": "softplus"}),
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "bidirectional": {"bidirectional": True},
    "deep": {"num_layers": 3, "bidirectional": True},
    "batch_first": {"num_layers": 2, "batch_first": True},
}
INPUTS: dict[str, Callable[..., Any]] = {
    "batched": lambda: torch.randn(T, B, I, **WIDE),
    "one row": lambda: torch.randn(T, 1, I, **WIDE),
    "unbatched": lambda: torch.randn(T, I, **WIDE),
    "packed": lambda: pack(torch.randn(T, B, I, **WIDE), LENGTHS, False),
}
every_module = pytest.mark.parametrize("kind", MODULES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_input = pytest.mark.parametrize("x", INPUTS)


def build(kind: str, **options: Any) -> Any:
    cls, usual = MODULES[kind]
    return cls(I, H, **usual, **options, **WIDE)


def first_layers(module: Any, kind: str, layout: str, count: int) -> Any:
    """Return a module of the first layers, with the same weights."""
    options = {**LAYOUTS[layout], "num_layers": count}
    smaller = build(kind, **options)
    smaller.load_state_dict({name: module.state_dict()[name] for name in smaller.state_dict()})
    return smaller


def reference_of(module: Any, kind: str, x: Any, hx: Tensor | None) -> list[list[Tensor]]:
    options: dict[str, Any] = {"nonlinearity": module.nonlinearity}
    if kind != "RNN":
        options.update(leaks=[0.3] * len(module._all_weights), form=module.form)
    return expected(module, x, hx, **options)


# ---- return_all_layers


@every_input
@every_layout
@every_module
@pytest.mark.slow_emulated
def test_the_output_of_each_layer_is_that_of_a_module_that_ends_there(kind, layout, x, engine):
    module, x = build(kind, **LAYOUTS[layout]), INPUTS[x]()
    hx = state_for(module, x, **WIDE)
    outputs, h_n = module(x, hx, return_all_layers=True)
    assert isinstance(outputs, list)
    assert len(outputs) == module.num_layers
    assert_close(h_n, module(x, hx)[1], rtol=0, atol=0)
    states = len(hx) // module.num_layers
    for count, output in enumerate(outputs, 1):
        want = first_layers(module, kind, layout, count)(x, hx[: count * states])[0]
        assert isinstance(output, type(want))
        assert_close(data_of(output), data_of(want), rtol=0, atol=0)


def test_outputs_of_layers_come_before_dropout():
    module = fusedrnn.RNN(I, H, num_layers=2, dropout=1.0)
    (first, second), h_n = module(torch.randn(T, B, I), return_all_layers=True)
    assert first.abs().min() > 0
    assert_close((first[-1], second[-1]), tuple(h_n))


@every_layout
def test_potentials_of_every_layer(layout):
    module, x = build("potential", **LAYOUTS[layout]), INPUTS["batched"]()
    outputs, _, potentials = module(x, return_all_layers=True, return_potential=True)
    assert len(potentials) == module.num_layers
    assert_close(outputs, [torch.nn.functional.softplus(v) for v in potentials])
    assert_close(potentials[-1], module(x, return_potential=True)[2], rtol=0, atol=0)


# ---- last_only


@every_input
@every_layout
@every_module
@pytest.mark.slow_emulated
def test_last_only_is_the_last_step_of_each_row_and_direction(kind, layout, x, engine):
    module, x = build(kind, **LAYOUTS[layout]), INPUTS[x]()
    hx = state_for(module, x, **WIDE)
    last, h_n = module(x, hx, last_only=True)
    rows = []
    for output, *_ in reference_of(module, kind, x, hx):
        forward, backward = output[-1, :H], output[0, H:]  # backward is empty with one direction
        rows.append(torch.cat([forward, backward]))
    want = rows[0] if data_of(x).dim() == 2 and not isinstance(x, PackedSequence) else rows
    assert_close(last, want if isinstance(want, Tensor) else torch.stack(want))
    assert_close(h_n, module(x, hx)[1], rtol=0, atol=0)


@every_module
def test_last_only_with_every_layer(kind):
    module, x = build(kind, num_layers=2, bidirectional=True), INPUTS["batched"]()
    outputs, _ = module(x, return_all_layers=True)
    lasts, _ = module(x, return_all_layers=True, last_only=True)
    for output, last in zip(outputs, lasts, strict=True):
        assert_close(last, torch.cat([output[-1, :, :H], output[0, :, H:]], -1))


def test_last_only_of_the_potential():
    module, x = build("potential", bidirectional=True), INPUTS["batched"]()
    _, h_n, potential = module(x, last_only=True, return_potential=True)
    assert_close(potential, torch.cat([h_n[0], h_n[1]], -1))


def test_last_only_shares_no_memory_with_h_n():
    module = build("RNN")
    last, h_n = module(INPUTS["batched"](), last_only=True)
    assert last.data_ptr() != h_n.data_ptr()


@every_module
def test_gradients_of_every_layer_and_of_the_last_step(kind, engine):
    module, x = build(kind, num_layers=2, bidirectional=True), INPUTS["batched"]()
    leaves = [x.requires_grad_(), *module.parameters()]

    outputs, _ = module(x, return_all_layers=True)
    last, _ = module(x, last_only=True)
    modules = [first_layers(module, kind, "deep", 1), module]
    wanted = [torch.stack([row[0] for row in reference_of(m, kind, x, None)], 1) for m in modules]
    want_last = torch.cat([wanted[1][-1, :, :H], wanted[1][0, :, H:]], -1)

    def gradients(first: Tensor, second: Tensor, last: Tensor) -> list[Any]:
        to_x = torch.autograd.grad(first.sin().sum(), x, retain_graph=True)
        return [to_x, torch.autograd.grad(second.sin().sum() + last.cos().sum(), leaves)]

    assert_close(gradients(*outputs, last), gradients(*wanted, want_last))


# ---- states for every row


@every_input
@every_layout
@every_module
@pytest.mark.slow_emulated
def test_a_state_for_every_row(kind, layout, x, engine):
    module, x = build(kind, **LAYOUTS[layout]), INPUTS[x]()
    full = state_for(module, x, **WIDE)
    shapes = [torch.randn(H, **WIDE)]
    if full.dim() == 3:
        shapes.append(torch.randn(len(full), 1, H, **WIDE))
    for hx in shapes:
        results = module(x, hx.requires_grad_())
        want = module(x, hx.expand_as(full))
        assert_close(data_of(results[0]), data_of(want[0]), rtol=0, atol=0)
        assert_close(results[1], want[1], rtol=0, atol=0)
        weights = torch.randn_like(results[1])
        gradients = [torch.autograd.grad((r[1] * weights).sum(), hx)[0] for r in (results, want)]
        assert gradients[0].shape == hx.shape
        assert_close(*gradients)


@every_module
@pytest.mark.parametrize("shape", [(H,), (2, 1, H)], ids=str)
def test_second_derivatives_of_a_state_for_every_row(kind, shape):
    module, x = build(kind, bidirectional=True), INPUTS["batched"]()
    hx = torch.randn(shape, **WIDE, requires_grad=True)
    options = {"return_all_layers": True, "last_only": True}
    assert torch.autograd.gradgradcheck(lambda h: module(x, h, **options)[0][0], hx)


ERRORS: dict[str, tuple[Any, Any, str]] = {
    "units": (torch.zeros(T, B, I), torch.zeros(H + 1), "hx should also be 3-D but got 1-D"),
    "units, unbatched": (torch.zeros(T, I), torch.zeros(1), "hx should also be 2-D but got 1-D"),
    "layers": (torch.zeros(T, B, I), torch.zeros(2, 1, H), "Expected hidden size (1, 3, 6)"),
    "rows": (torch.zeros(T, B, I), torch.zeros(1, 2, H), "Expected hidden size (1, 3, 6)"),
    "packed, units": (
        pack(torch.zeros(T, B, I), LENGTHS, True), torch.zeros(1, 1, H + 1),
        "Expected hidden size (1, 3, 6), got [1, 1, 7]"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_a_state_are_those_of_nn_rnn(case):
    x, hx, message = ERRORS[case]
    for cls in (fusedrnn.RNN, fusedrnn.LeakyRNN):
        with pytest.raises(RuntimeError) as info:
            cls(I, H)(x, hx)
        assert message in str(info.value)


# ---- other uses


@every_input
@every_module
def test_compiles_into_one_graph(kind, x):
    torch._dynamo.reset()
    module, x = build(kind, num_layers=2, bidirectional=True), INPUTS[x]()

    def function(x: Any, hx: Tensor) -> Any:
        outputs, h_n = module(x, hx, return_all_layers=True)
        return [data_of(o) for o in outputs], h_n, module(x, hx, last_only=True)

    hx = torch.randn(H, **WIDE)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert_close(compiled(x, hx), function(x, hx))


@every_module
def test_exports(kind):
    module, x = build(kind, num_layers=2, batch_first=True), torch.randn(B, T, I, **WIDE)
    hx = torch.randn(2, 1, H, **WIDE)
    for options in ({"return_all_layers": True}, {"last_only": True}):
        sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        shapes = {"input": sizes, "hx": None, **dict.fromkeys(options)}
        program = torch.export.export(module, (x, hx), options, dynamic_shapes=shapes)
        other = torch.randn(2, 9, I, **WIDE)
        assert_close(program.module()(other, hx, **options), module(other, hx, **options))


@every_module
@pytest.mark.parametrize("options", [{"return_all_layers": True}, {"last_only": True}], ids=str)
def test_vmap(kind, options):
    module = build(kind, num_layers=2, bidirectional=True)
    x, hx = torch.randn(4, T, B, I, **WIDE), torch.randn(4, H, **WIDE)

    def run(x: Tensor, hx: Tensor) -> Any:
        output, h_n = module(x, hx, **options)
        return (*output, h_n) if isinstance(output, list) else (output, h_n)

    want = zip(*(run(*sample) for sample in zip(x, hx)))
    assert_close(torch.vmap(run)(x, hx), tuple(map(torch.stack, want)))
