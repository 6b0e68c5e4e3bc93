"""fusedrnn.trace against a plain loop with the gradients of autograd, step by step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_oracle import by_row, data_of, expected, pack, state_for, state_of
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn import reference

T, B, I, H = 5, 3, 4, 6
LENGTHS = [3, 5, 1]  # unsorted
WIDE = {"dtype": torch.float64}

INPUTS: dict[str, Callable[[], Any]] = {
    "batched": lambda: torch.randn(T, B, I, **WIDE),
    "unbatched": lambda: torch.randn(T, I, **WIDE),
    "packed": lambda: pack(torch.randn(T, B, I, **WIDE), LENGTHS, False),
    "packed, sorted": lambda: pack(torch.randn(T, B, I, **WIDE), LENGTHS, True),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"num_layers": 2, "batch_first": True},
    "no bias": {"bias": False, "bidirectional": True},
}
KINDS: dict[str, dict[str, Any] | None] = {  # None: fusedrnn.RNN
    "RNN": None,
    "no leak": {},
    "rate": {"alpha": 0.3},
    "potential": {"alpha": 0.3, "form": "potential"},
    "inside": {"alpha": 0.3, "form": "inside"},
    "learned alpha": {"alpha": 0.3, "learn_alpha": True, "form": "potential"},
}

# ---- a plain loop that keeps everything

Steps = list[dict[str, Tensor]]


def steps_of(
    x: Any,
    weights: list[Tensor],
    state: Tensor,
    alpha: Any,
    form: str,
    nonlinearity: str,
    reverse: bool,
) -> Steps:
    """Run one layer and direction over one row, and return the quantities of each step."""
    phi = reference.NONLINEARITIES[nonlinearity]
    w_ih, w_hh, b_ih, b_hh = weights if len(weights) == 4 else (*weights, 0, 0)
    found: Steps = [{} for _ in x]
    sent = phi(state) if form == "potential" else state
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        from_input, from_state = w_ih @ x[t] + b_ih, w_hh @ sent + b_hh
        z = from_input + from_state
        if form == "rate":
            argument = z
            h = state = (1 - alpha) * state + alpha * phi(z)
        else:
            argument = (1 - alpha) * state + alpha * z
            h = phi(argument).clone()  # identity returns its argument
            state = argument if form == "potential" else h
        sent = h
        leaf = argument.detach().requires_grad_()
        (slope,) = torch.autograd.grad(phi(leaf).sum(), leaf)
        found[t] = {
            "from_input": from_input, "from_state": from_state, "z": z, "state": state, "h": h,
            "slope": slope,
        }  # fmt: skip
    return found


def traced_by_hand(
    module: nn.RNNBase, x: Any, hx: Tensor | None, form: str, nonlinearity: str
) -> list[list[Steps]]:
    """Return the steps of every layer and direction of every row, in the caller's order."""
    directions = 2 if module.bidirectional else 1
    rows = []
    for row, series in enumerate(by_row(module, x, data_of(x))):
        layers: list[Steps] = []
        for index, names in enumerate(module._all_weights):
            h0 = state_of(hx, index, row)
            if h0 is None:
                h0 = torch.zeros(H, **WIDE)
            alpha = module._alpha_of(index) if isinstance(module, fusedrnn.LeakyRNN) else None
            layers.append(
                steps_of(
                    series,
                    [getattr(module, name) for name in names],
                    h0,
                    1 if alpha is None else alpha,
                    form,
                    nonlinearity,
                    index % directions == 1,
                )
            )
            if index % directions == directions - 1:
                parts = layers[-directions:]
                series = [torch.cat([part[t]["h"] for part in parts]) for t in range(len(series))]
        rows.append(layers)
    return rows


def loss_of(output: Any) -> Tensor:
    """Return a loss in which every element of the output has a different weight."""
    data = data_of(output)
    return (data.square() * torch.linspace(0.5, 2, data.numel(), **WIDE).view_as(data)).sum()


def output_like(module: nn.RNNBase, x: Any, rows: list[list[Steps]]) -> Any:
    """Return the output of a module in its own layout, from the steps of every row."""
    directions = 2 if module.bidirectional else 1
    series = [
        torch.stack([torch.cat([s["h"] for s in step]) for step in zip(*layers[-directions:])])
        for layers in rows
    ]
    if isinstance(x, PackedSequence):
        lengths = [len(s) for s in series]
        padded = nn.utils.rnn.pad_sequence(series)
        return pack(padded, lengths, x.sorted_indices is None)
    if x.dim() == 2:
        return series[0]
    return torch.stack(series, 0 if module.batch_first else 1)


def assert_traces(trace: fusedrnn.Trace, rows: list[list[Steps]], loss: Tensor | None) -> None:
    """Compare every tensor of a trace with the steps of a loop and their gradients."""
    assert trace.batch == len(rows)
    for row, layers in enumerate(rows):
        found = trace.row(row)
        assert len(found) == len(layers)
        for layer, steps in zip(found, layers):
            names = ["from_input", "from_state", "z", "state", "h", "slope"]
            if loss is not None:
                kinds = {"grad_state": "state", "grad_h": "h", "delta": "z"}
                wanted = [step[name] for step in steps for name in kinds.values()]
                gradients = torch.autograd.grad(
                    loss, wanted, retain_graph=True, materialize_grads=True
                )
                for t, step in enumerate(steps):
                    step.update(zip(kinds, gradients[3 * t : 3 * t + 3]))
                names += kinds
            assert list(layer.series) == names
            for name in names:
                want = torch.stack([step[name] for step in steps])
                assert_close(layer.series[name], want.detach(), msg=lambda m: f"{name}: {m}")  # noqa: B023


def made(kind: str, nonlinearity: str, **layout: Any) -> tuple[nn.RNNBase, str]:
    """Return a module and the form of its layers."""
    options = KINDS[kind]
    if options is None:
        return fusedrnn.RNN(I, H, nonlinearity=nonlinearity, **layout, **WIDE), "rate"
    module = fusedrnn.LeakyRNN(I, H, nonlinearity=nonlinearity, **options, **layout, **WIDE)
    return module, module.form


# ---- every module


@pytest.mark.parametrize("given", ["loss", "output_grad"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_quantity_is_that_of_a_loop(layout, input, kind, given):
    module, form = made(kind, "tanh", **LAYOUTS[layout])
    x = INPUTS[input]()
    hx = state_for(module, x, **WIDE) if layout != "one layer" else None
    rows = traced_by_hand(module, x, hx, form, "tanh")
    output = output_like(module, x, rows)
    for series, want in zip(by_row(module, x, output), expected_rows(module, x, hx, form)):
        assert_close(series, want)  # the loop of this test agrees with the reference
    loss = loss_of(output)
    (gradient,) = torch.autograd.grad(loss, data_of(output), retain_graph=True)
    if given == "loss":
        trace = fusedrnn.trace(module, x, hx, loss=loss_of)
        assert trace.loss == pytest.approx(loss.item())
    else:
        trace = fusedrnn.trace(module, x, hx, output_grad=gradient)
        assert trace.loss is None
    assert_close(data_of(trace.output), data_of(output))
    assert type(trace.output) is type(x)
    assert_traces(trace, rows, loss)
    assert_traces(fusedrnn.trace(module, x, hx), rows, None)


def expected_rows(module: nn.RNNBase, x: Any, hx: Tensor | None, form: str) -> list[Tensor]:
    leaks = None
    if isinstance(module, fusedrnn.LeakyRNN):
        leaks = [module._alpha_of(i) for i in range(len(module._all_weights))]
    return [row[0] for row in expected(module, x, hx, form=form, leaks=leaks)]


@pytest.mark.parametrize("nonlinearity", reference.NONLINEARITIES)
@pytest.mark.parametrize("kind", ["no leak", "rate", "potential", "inside"])
def test_every_nonlinearity(kind, nonlinearity):
    module, form = made(kind, nonlinearity, num_layers=2)
    x = INPUTS["batched"]()
    rows = traced_by_hand(module, x, None, form, nonlinearity)
    loss = loss_of(output_like(module, x, rows))
    assert_traces(fusedrnn.trace(module, x, loss=loss_of), rows, loss)


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("kind", KINDS)
def test_cells_are_traced_like_a_loop(kind, batched):
    options = KINDS[kind]
    cell: Any
    if options is None:
        cell = fusedrnn.RNNCell(I, H, **WIDE)
    else:
        cell = fusedrnn.LeakyRNNCell(I, H, **options, **WIDE)
    form, alpha = getattr(cell, "form", "rate"), None if options is None else cell._alpha_of(0)
    x, hx = torch.randn(B, I, **WIDE), torch.randn(B, H, **WIDE)
    if not batched:
        x, hx = x[0], hx[0]
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    rows = [
        [steps_of(row[None], weights, h0, 1 if alpha is None else alpha, form, "tanh", False)]
        for row, h0 in zip(x.view(-1, I), hx.view(-1, H))
    ]
    states = torch.stack([layers[0][0]["state"] for layers in rows]).view(hx.shape)
    trace = fusedrnn.trace(cell, x, hx, loss=loss_of)
    assert_close(trace.output, states)
    assert_traces(trace, rows, loss_of(states))


def test_large_cells_run_in_the_engine():
    cell, x = fusedrnn.RNNCell(256, 256, nonlinearity="relu"), torch.randn(100, 256)
    trace = fusedrnn.trace(cell, x)
    assert torch.equal(trace.output, trace[0].h[0])
    assert_close(trace.output, cell(x))


# ---- what is not in the loop: training, dtypes, hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5},
        {"noise": 0.5},
        {"state_noise": 0.5},
        {"noise": 0.1, "state_noise": 0.1, "dropout": 0.2, "form": "inside", "bidirectional": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_dropout_and_noise_are_those_of_a_call_in_training(options, dtype):
    module = fusedrnn.LeakyRNN(I, H, 2, alpha=0.5, **options, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    torch.manual_seed(1)
    output, _ = module(x)
    output.square().sum().backward()
    torch.manual_seed(1)
    trace = fusedrnn.trace(module, x, loss=lambda output: output.square().sum())
    assert torch.equal(trace.output, output)
    for layer in trace:
        suffix = f"_l{layer.layer}" + "_reverse" * layer.reverse
        gradient = getattr(module, "bias_hh" + suffix).grad
        assert_close(layer.delta.flatten(0, 1).sum(0), gradient)
        assert_close(layer.z, layer.from_input + layer.from_state)
    module.eval()
    assert torch.equal(fusedrnn.trace(module, x).output, module(x)[0])


def test_a_trace_computes_under_autocast():
    rnn, x = fusedrnn.RNN(I, H), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        trace = fusedrnn.trace(rnn, x, loss=lambda output: output.float().sum())
        assert torch.equal(trace.output, rnn(x)[0])
    assert {t.dtype for t in trace[0].series.values()} == {torch.bfloat16}
    assert 0 <= trace[0].recurrent_share.min() <= trace[0].recurrent_share.max() <= 1
    assert trace[0].spectral_radius > 0


def test_grad_modes_and_frozen_weights_do_not_affect_a_trace():
    rnn, x = fusedrnn.RNN(I, H, 2), torch.randn(T, B, I)
    want = fusedrnn.trace(rnn, x, loss=torch.sum)
    with torch.no_grad():
        assert torch.equal(fusedrnn.trace(rnn, x, loss=torch.sum)[0].delta, want[0].delta)
    with torch.inference_mode():
        assert torch.equal(fusedrnn.trace(rnn, x, loss=torch.sum)[0].delta, want[0].delta)
    rnn.requires_grad_(False)
    frozen = fusedrnn.trace(rnn, x.requires_grad_(), loss=torch.sum)
    assert torch.equal(frozen[0].delta, want[0].delta)
    assert all(p.grad is None for p in (*rnn.parameters(), x))
    assert not any(t.requires_grad for layer in frozen for t in layer.series.values())
    assert not frozen.output.requires_grad


def test_frozen_modules_have_gradients_too():
    rnn, x = fusedrnn.RNN(I, H, 2), torch.randn(T, B, I)
    want = fusedrnn.trace(rnn, x, loss=torch.sum)
    found = fusedrnn.trace(rnn.requires_grad_(False), x, loss=torch.sum)
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(found, want))


def test_hooks_run_once_and_parametrizations_are_applied():
    rnn = fusedrnn.RNN(I, H)
    nn.utils.parametrize.register_parametrization(
        rnn, "weight_hh_l0", fusedrnn.parametrizations.Masked(1 - torch.eye(H))
    )
    calls = []
    rnn.register_forward_hook(lambda *_: calls.append(1))
    trace = fusedrnn.trace(rnn, torch.randn(T, B, I))
    assert calls == [1]
    assert trace[0].w_hh.diagonal().eq(0).all()


def test_a_compiled_module_can_be_traced():
    rnn, x = fusedrnn.RNN(I, H), torch.randn(T, B, I)
    want = fusedrnn.trace(rnn, x, loss=torch.sum)
    rnn.compile(backend="eager")
    assert_close(fusedrnn.trace(rnn, x, loss=torch.sum)[0].delta, want[0].delta)


def test_a_weight_that_is_trained_later_does_not_change_the_trace():
    rnn = fusedrnn.RNN(I, H)
    trace = fusedrnn.trace(rnn, torch.randn(T, B, I))
    before = trace[0].w_hh.clone()
    with torch.no_grad():
        rnn.weight_hh_l0.zero_()
    assert torch.equal(trace[0].w_hh, before)


# ---- the classes


def test_layers_come_in_the_order_of_h_n():
    rnn = fusedrnn.RNN(I, H, 2, bidirectional=True)
    trace = fusedrnn.trace(rnn, torch.randn(T, B, I))
    assert [(layer.layer, layer.reverse) for layer in trace] == [
        (0, False), (0, True), (1, False), (1, True),
    ]  # fmt: skip
    assert trace[-1] is trace.layers[3]
    assert len(trace) == 4


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_the_spectral_radius_is_that_of_a_step_with_slope_1(alpha):
    rnn = fusedrnn.LeakyRNN(I, H, nonlinearity="identity", alpha=alpha, bias=False, **WIDE)
    (layer,) = fusedrnn.trace(rnn, torch.zeros(T, B, I, **WIDE))

    def step(h: Tensor) -> Tensor:
        return rnn(torch.zeros(1, I, **WIDE), h[None])[1][0]

    jacobian = torch.autograd.functional.jacobian(step, torch.zeros(H, **WIDE))
    assert_close(layer.step_matrix, jacobian)
    radius = torch.linalg.eigvals(jacobian).abs().max().item()
    assert layer.spectral_radius == pytest.approx(radius)


def test_the_recurrent_share_compares_magnitudes():
    (layer,) = fusedrnn.trace(fusedrnn.RNN(I, H), torch.randn(T, B, I))
    ours, other = layer.from_state.abs().sum(-1), layer.from_input.abs().sum(-1)
    assert_close(layer.recurrent_share, ours / (ours + other))
    nothing = dataclasses.replace(
        layer, from_input=torch.zeros(T, B, H), from_state=torch.zeros(T, B, H)
    )
    assert nothing.recurrent_share.eq(0).all()


def test_repr_has_a_line_for_each_layer_and_direction():
    rnn = fusedrnn.RNN(I, H, 2, bidirectional=True)
    lines = repr(fusedrnn.trace(rnn, torch.randn(T, B, I), loss=torch.sum)).split("\n")
    assert lines[0].startswith(
        "Trace of RNN(4, 6, num_layers=2, bidirectional=True), torch.float32, T 5, B 3, loss "
    )
    names = ["layer 0", "layer 0, reverse", "layer 1", "layer 1, reverse"]
    assert [re.split(r" {2,}", line.strip())[0] for line in lines[2:]] == names
    assert len({len(line) for line in lines[1:]}) == 1  # columns are aligned


def test_repr_of_a_packed_trace_has_the_gradients_of_the_rows_that_run():
    x = pack(torch.randn(T, B, I, **WIDE), LENGTHS, False)
    trace = fusedrnn.trace(fusedrnn.RNN(I, H, **WIDE), x, loss=loss_of)
    assert "N 9, T 5, B 3" in repr(trace)
    norms = [float(word) for word in repr(trace).split()[-2:]]
    rows = [trace.row(b)[0].grad_state for b in range(B)]
    first = torch.stack([row[0] for row in rows]).norm().item()
    assert norms == pytest.approx([first, rows[1][-1].norm().item()], rel=5e-3)


# ---- errors

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "torch's module": (
        {"rnn": nn.RNN(I, H)},
        TypeError,
        "rnn must be an RNN or a cell of fusedrnn, got RNN; fusedrnn.replace",
    ),
    "no RNN": ({"rnn": nn.Linear(I, H)}, TypeError, "rnn must be an RNN .*, got Linear"),
    "no module": ({"rnn": "RNN"}, TypeError, "rnn must be an RNN .*, got str"),
    "both": (
        {"loss": torch.sum, "output_grad": torch.ones(T, B, H)},
        ValueError,
        "output_grad must be None if loss is given, got both",
    ),
    "loss that is a number": (
        {"loss": 3.0}, TypeError, "loss must be a function of the output, got float",
    ),
    "loss that returns a number": (
        {"loss": lambda output: output.sum().item()},
        TypeError,
        "loss must return a tensor, got float",
    ),
    "loss with many values": (
        {"loss": lambda output: output}, ValueError, r"loss must return a scalar, got \[5, 3, 6\]",
    ),
    "constant loss": (
        {"loss": lambda output: torch.zeros(())},
        ValueError,
        "loss must depend on the output, got one that does not",
    ),
    "loss of something else": (
        {"loss": lambda output: torch.zeros((), requires_grad=True).exp()},
        ValueError,
        "loss must depend on the output, got one that does not",
    ),
    "detached loss": (
        {"loss": lambda output: output.detach().sum()},
        ValueError,
        "loss must depend on the output, got one that does not",
    ),
    "gradient that is a number": (
        {"output_grad": 1.0}, TypeError, "output_grad must be a tensor, got float",
    ),
    "gradient of another shape": (
        {"output_grad": torch.ones(T, B)},
        RuntimeError,
        r"output_grad must be \[5, 3, 6\] of torch.float32 .*, got \[5, 3\]",
    ),
    "gradient of another dtype": (
        {"output_grad": torch.ones(T, B, H, dtype=torch.float64)},
        RuntimeError,
        "output_grad must be .* of torch.float32 on cpu like the output, got .* of torch.float64",
    ),
    "no values": (
        {"rnn": fusedrnn.RNN(I, H, device="meta"), "x": torch.zeros(T, B, I, device="meta")},
        RuntimeError,
        "x must have a dtype and a device for which the engine has a kernel, got .* on meta",
    ),
    "bad input": ({"x": torch.zeros(T, B, I + 1)}, RuntimeError, "input.size"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_clear_error(name):
    arguments, error, message = BAD[name]
    arguments = {"rnn": fusedrnn.RNN(I, H), "x": torch.zeros(T, B, I), **arguments}
    with pytest.raises(error, match=message):
        fusedrnn.trace(**arguments)


@pytest.mark.filterwarnings("ignore:fusedrnn. no kernel")
def test_a_dtype_without_a_kernel_gets_a_clear_error():
    rnn = fusedrnn.RNN(I, H, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="the engine has a kernel, got torch.complex64 on cpu"):
        fusedrnn.trace(rnn, torch.zeros(T, B, I, dtype=torch.complex64))


def test_a_row_that_does_not_exist_is_an_error():
    trace = fusedrnn.trace(fusedrnn.RNN(I, H), torch.zeros(T, B, I))
    assert torch.equal(trace.row(-1)[0].h, trace[0].h[:, -1])
    with pytest.raises(IndexError, match=r"b must be in \[-3, 3\), got 3"):
        trace.row(3)
    with pytest.raises(IndexError, match=r"b must be left out after row\(\), got 0"):
        trace.row(0).row(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_directions_that_run_concurrently_come_in_order():
    rnn = fusedrnn.RNN(I, H, 2, bidirectional=True, device="cuda")
    x = torch.randn(200, B, I)
    found = fusedrnn.trace(rnn, x.cuda(), loss=torch.sum)
    want = fusedrnn.trace(rnn.cpu(), x, loss=torch.sum)
    for ours, theirs in zip(found, want):
        assert ours.reverse == theirs.reverse
        assert_close(ours.delta.cpu(), theirs.delta, rtol=1e-3, atol=1e-4)
