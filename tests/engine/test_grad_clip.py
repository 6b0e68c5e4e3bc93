"""Clipping of the gradient of the state in every step, against the reference."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from cases import Case
from engines import DIFFERENTIATED
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn import leaky, modules, reference

CLIP = 0.1
CASES = [
    Case(),
    Case(reverse=True, h0=False),
    Case(nonlinearity="relu", reset=True, reset_to=True, T=17, B=3, H=33),
    Case(lengths=(9, 8, 8, 5, 1, 1), reset=True, reverse=True, H=17),
    Case(lengths=(9, 8, 8, 5, 1, 1), alpha=True),
    Case(T=1, B=33, H=31),
    Case(T=3, B=1, I=1, H=1),
    Case(B=0),
    Case(T=7, B=2, H=129),
    *(
        Case(form=form, alpha=True, nonlinearity=nonlinearity, **others)
        for form in ("rate", "potential", "inside")
        for nonlinearity, others in (
            ("tanh", {"T": 17, "B": 9, "H": 33}),
            ("softplus", {"alpha_varies": True, "state_input": True, "reset": True}),
            ("tanh", {"lengths": (5, 3, 3, 1), "reverse": True, "reset": True, "reset_to": True}),
        )
    ),
]


def gradients(rnn: Any, case: Case, clip: float | None, tensors: Any = None) -> tuple[Tensor, ...]:
    """Return the gradients of all arguments, with a loss that depends on every result."""
    named = case.arguments(requires_grad=True)
    if tensors is not None:
        named = {k: t.detach().requires_grad_() for k, t in zip(named, tensors)}
    flags: dict[str, Any] = {**case.flags(), "grad_clip": clip}
    if case.form == "potential":
        flags["return_potential"] = True
    loss = sum(result.square().sum() for result in rnn(**named, **flags))
    return torch.autograd.grad(loss, list(named.values()))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_match_the_reference(case):
    found, expected = (gradients(rnn, case, CLIP) for rnn in (fusedrnn.rnn, reference.rnn))
    assert_close(found, expected)
    if case.T > 1 and case.B > 0:
        assert not torch.allclose(expected[2], gradients(reference.rnn, case, None)[2], rtol=1e-3)


@pytest.mark.parametrize("engine", DIFFERENTIATED, ids=str, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_accurate_as_torch(engine, dtype):
    case = Case(T=17, B=9, H=33, alpha=True, dtype=dtype)
    tensors = list(case.arguments().values())
    assert_as_accurate_as_torch(
        gradients(fusedrnn.rnn, case, CLIP, tensors),
        lambda *tensors: gradients(reference.rnn, case, CLIP, tensors),
        tensors,
    )


def test_each_step_clips_what_it_sends_and_nothing_else():
    w, h0 = torch.full((1, 1), 2.0), torch.zeros(1, 1, requires_grad=True)
    u = torch.zeros(3, 1, 1, requires_grad=True)
    h, h_n = fusedrnn.recurrence(u, h0, w, nonlinearity="identity", grad_clip=3.0)
    # The last step receives 7 + 5, steps 1 and 0 receive 3 from the next step and 7 themselves.
    found = torch.autograd.grad((7 * h).sum() + 5 * h_n.sum(), (u, h0))
    assert found[0].flatten().tolist() == [10, 10, 12]
    assert found[1].item() == 3


@pytest.mark.parametrize("engine", DIFFERENTIATED, ids=str, indirect=True)
def test_a_limit_that_is_never_reached_changes_nothing(engine):
    assert_close(gradients(fusedrnn.rnn, Case(), 1e30), gradients(fusedrnn.rnn, Case(), None))


@pytest.mark.parametrize("engine", DIFFERENTIATED, ids=str, indirect=True)
def test_nan_is_not_clipped(engine):
    u, h0 = torch.zeros(3, 2, 5, requires_grad=True), torch.zeros(2, 5, requires_grad=True)
    h, _ = fusedrnn.recurrence(u, h0, torch.eye(5), grad_clip=CLIP)
    weights = torch.ones_like(h)
    weights[2, 0, 3] = torch.nan
    du, dh0 = torch.autograd.grad((h * weights).sum(), (u, h0))
    assert du[0, 0, 3].isnan()
    assert dh0[0, 3].isnan()
    assert not du[:, 1].isnan().any()


# ---- modules

I, H, T, B = 4, 6, 9, 3
MODULES: dict[str, tuple[type, dict[str, Any]]] = {
    "one layer": (fusedrnn.RNN, {}),
    "two layers": (fusedrnn.RNN, {"num_layers": 2, "batch_first": True}),
    "bidirectional": (fusedrnn.RNN, {"num_layers": 2, "bidirectional": True}),
    "leaky": (fusedrnn.LeakyRNN, {"alpha": 0.3, "learn_alpha": True}),
    "potential": (fusedrnn.LeakyRNN, {"alpha": 0.3, "form": "potential"}),
    "zoneout": (fusedrnn.RNN, {"zoneout": 0.3}),
    "weight_drop": (fusedrnn.RNN, {"weight_drop": 0.3}),
}
every_module = pytest.mark.parametrize("kind", MODULES)


def build(kind: str, **options: Any) -> Any:
    cls, usual = MODULES[kind]
    return cls(I, H, **usual, **options, dtype=torch.float64)


def of_module(module: Any, x: Any, **options: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(3)  # for the masks
    output, h_n = module(x, **options)
    output = output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
    loss = output.square().sum() + 3 * h_n.square().sum()
    return torch.autograd.grad(loss, list(module.parameters()))


@every_module
@pytest.mark.parametrize("layout", ["padded", "unbatched", "packed", "lengths"])
def test_modules_match_the_reference(kind, layout, monkeypatch):
    module = build(kind, grad_clip=CLIP)
    x: Any = torch.randn(T, B, I, dtype=torch.float64)
    options = {}
    if layout == "unbatched":
        x = x[:, 0]
    elif layout == "packed":
        x = pack_padded_sequence(x, torch.tensor([4, 9, 1]), enforce_sorted=False)
    elif layout == "lengths":
        x = x.transpose(0, 1) if module.batch_first else x
        options["lengths"] = torch.tensor([4, 9, 0])
    found = of_module(module, x, **options)
    module.grad_clip = None
    unclipped = of_module(module, x, **options)
    module.grad_clip = CLIP
    for of in (modules, leaky):
        monkeypatch.setattr(of, "rnn", reference.rnn)
    monkeypatch.setattr("fusedrnn.functional.rnn", reference.rnn)  # for dropout.py
    assert_close(found, of_module(module, x, **options))
    assert not torch.allclose(found[1], unclipped[1], rtol=1e-3)


@pytest.mark.parametrize("kind", ["two layers", "leaky", "potential"])
@pytest.mark.parametrize("option", [{"checkpoint_every": 4}, {"truncate": 4}], ids=str)
def test_blocks_of_steps_clip_as_the_whole_sequence(kind, option):
    module = build(kind, grad_clip=CLIP, **option)
    x = torch.randn(T, B, I, dtype=torch.float64)
    found = of_module(module, x)
    if "truncate" in option:  # the blocks one by one
        x = x.transpose(0, 1) if module.batch_first else x
        module.truncate, state, outputs = None, None, []
        for part in x.split(4):
            part = part.transpose(0, 1) if module.batch_first else part
            output, last = module(part, state)
            outputs.append(output)
            state = last.detach()
        loss = sum(output.square().sum() for output in outputs) + 3 * last.square().sum()
        expected = torch.autograd.grad(loss, list(module.parameters()))
    else:
        module.checkpoint_every = None
        expected = of_module(module, x)
    assert_close(found, expected)


@pytest.mark.parametrize("kind", ["two layers", "leaky", "potential"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_to_one_graph(kind, backend):
    module = build(kind, grad_clip=CLIP)
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    output, h_n = compiled(x)
    loss = output.square().sum() + 3 * h_n.square().sum()
    assert_close(torch.autograd.grad(loss, list(module.parameters())), of_module(module, x))


@pytest.mark.parametrize("form", ["rate", "potential", "inside"])
def test_per_sample_gradients(form):
    case = Case(form=form, alpha=True, h0=False)
    tensors = case.arguments()
    samples = torch.randn(4, *tensors.pop("x").shape, dtype=torch.float64)
    options: dict[str, Any] = {**case.flags(), "grad_clip": CLIP}

    def loss(w_hh: Tensor, x: Tensor) -> Tensor:
        h0 = x.new_ones(case.B, case.H)
        h, h_n = fusedrnn.rnn(x, **{**tensors, "w_hh": w_hh}, h0=h0, **options)
        return h.square().sum() + h_n.square().sum()

    w_hh = tensors["w_hh"]
    assert_close(
        vmap(grad(loss), (None, 0))(w_hh, samples),
        torch.stack([grad(loss)(w_hh, x) for x in samples]),
    )
    ensemble = torch.stack([w_hh, 2 * w_hh])
    assert_close(
        vmap(grad(loss), (0, None))(ensemble, samples[0]),
        torch.stack([grad(loss)(w, samples[0]) for w in ensemble]),
    )


def test_call_for_per_sample_grads():
    module = fusedrnn.RNN(I, H, grad_clip=CLIP, batch_first=True, dtype=torch.float64)
    x = torch.randn(B, T, I, dtype=torch.float64)
    call_for_per_sample_grads(module, loss_reduction="sum")(x)[0].square().sum().backward()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x[None],))[0].square().sum()

    expected = vmap(grad(loss), (None, 0))(dict(module.named_parameters()), x)
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad_sample, expected[name])  # type: ignore[attr-defined]


def test_export_keeps_the_limit():
    module = build("one layer", grad_clip=CLIP)
    x = torch.randn(T, B, I, dtype=torch.float64)
    exported = torch.export.export(module, (x,)).module()
    output, h_n = exported(x)
    loss = output.square().sum() + 3 * h_n.square().sum()
    expected = dict(zip([n for n, _ in module.named_parameters()], of_module(module, x)))
    found = dict(exported.named_parameters())
    assert_close(dict(zip(found, torch.autograd.grad(loss, list(found.values())))), expected)


# ---- what it cannot do


@pytest.mark.parametrize("kind", ["one layer", "potential"])
def test_second_derivatives_raise(kind):
    module = build(kind, grad_clip=CLIP)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="grad_clip must be None for second derivatives"):
        first.sum().backward()
    gradient = grad(lambda x: module(x)[0].sum())
    with pytest.raises(NotImplementedError, match="grad_clip must be None for second derivatives"):
        jvp(gradient, (x.detach(),), (x.detach(),))


@pytest.mark.parametrize("kind", ["one layer", "potential"])
def test_tangents_are_not_clipped(kind):
    module = build(kind, grad_clip=1e-3)
    x, hx = torch.randn(T, B, I, dtype=torch.float64), torch.randn(1, B, H, dtype=torch.float64)
    found = jvp(module, (x, hx), (x, hx))
    module.grad_clip = None
    assert_close(found, jvp(module, (x, hx), (x, hx)))


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1.5, ValueError), (float("nan"), ValueError), ("1", TypeError)],
)
def test_bad_values_raise(value, error):
    for cls in (fusedrnn.RNN, fusedrnn.LeakyRNN):
        with pytest.raises(error, match="fusedrnn: grad_clip must be .*, got "):
            cls(I, H, grad_clip=value)
    x, w = torch.randn(T, B, H), torch.randn(H, H)
    for x_of in (x, x.to(torch.complex64)):  # the second runs as a loop
        with pytest.raises(error, match="fusedrnn: grad_clip must be .*, got "):
            fusedrnn.rnn(x_of, None, w.to(x_of.dtype), grad_clip=value)


def test_the_op_refuses_bad_limits():
    arguments = (torch.randn(T, B, H), *[None] * 5, torch.randn(H, H), *[None] * 4)
    with pytest.raises(ValueError, match="grad_clip must be positive or None, got -1"):
        torch.ops.fusedrnn.activation(*arguments, "tanh", "rate", False, -1.0)


def test_recurrent_dropout_refuses_it_in_training():
    module = fusedrnn.RNN(I, H, recurrent_dropout=0.5, grad_clip=CLIP)
    with pytest.raises(ValueError, match="grad_clip must be None with recurrent_dropout in trai"):
        module(torch.randn(T, B, I))
    module.eval()(torch.randn(T, B, I))[0].sum().backward()


def test_trace_refuses_clipped_gradients():
    module, x = fusedrnn.RNN(I, H, grad_clip=CLIP), torch.randn(T, B, I)
    assert fusedrnn.trace(module, x)[0].h.shape == (T, B, H)
    with pytest.raises(ValueError, match="grad_clip must be None to trace gradients, got 0.1"):
        fusedrnn.trace(module, x, loss=torch.sum)


def test_repr_copies_replace_and_restore():
    module = fusedrnn.RNN(I, H, grad_clip=CLIP)
    assert "grad_clip=0.1" in repr(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.grad_clip == CLIP
    with pytest.raises(ValueError, match="grad_clip must be None to restore a module, got 0.1"):
        fusedrnn.restore(module)
    converted = fusedrnn.replace(nn.RNN(I, H))
    assert converted.grad_clip is None
    converted.grad_clip = CLIP
    converted(torch.randn(T, B, I))[0].sum().backward()
