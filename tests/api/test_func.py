"""torch.func transforms, alone and nested, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case
from stream_log import on_gpu
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from fusedrnn import reference

SMALL = Case(T=3, B=2, I=2, H=3)
FUNCTIONS = [
    SMALL,
    SMALL.with_(reset=True, alpha=True),
    SMALL.with_(lengths=(3, 1), reverse=True, alpha=True, nonlinearity="softplus"),
    SMALL.with_(form="potential", alpha=True, reset=True, reset_to=True),
    SMALL.with_(form="inside", alpha=True, alpha_varies=True, nonlinearity="elu", lengths=(3, 1)),
]


def function_of(name, case, rnn):
    """Return the layer as a function of one argument, and that argument's value."""
    arguments = case.arguments()
    argument, flags = arguments.pop(name), case.flags()
    return (lambda a: rnn(**{name: a}, **arguments, **flags)[0]), argument


TRANSFORMS = {
    "grad": lambda f, w: grad(lambda w: f(w).sum())(w),
    "vjp": lambda f, w: vjp(f, w)[1](torch.ones_like(f(w))),
    "jvp": lambda f, w: jvp(f, (w,), (w,)),
    "linearize": lambda f, w: linearize(f, w)[1](w.cos()),
    "jacrev": lambda f, w: jacrev(f)(w),
    "jacrev in chunks": lambda f, w: jacrev(f, chunk_size=2)(w),
    "jacfwd": lambda f, w: jacfwd(f)(w),
    "hessian": lambda f, w: hessian(lambda w: f(w).sum())(w),
    "functionalize of grad": lambda f, w: functionalize(grad(lambda w: f(w).sum()))(w),
    "grad of grad": lambda f, w: grad(lambda w: grad(lambda w: f(w).pow(3).sum())(w).sum())(w),
    "jvp of grad": lambda f, w: jvp(grad(lambda w: f(w).pow(3).sum()), (w,), (w,)),
    "grad of jvp": lambda f, w: grad(lambda w: jvp(f, (w,), (w,))[1].pow(2).sum())(w),
    "jvp of jvp": lambda f, w: jvp(lambda w: jvp(f, (w,), (w,))[1], (w,), (w,)),
    "jvp of jvp of grad": lambda f, w: jvp(
        lambda w: jvp(grad(lambda w: f(w).pow(3).sum()), (w,), (w,))[1], (w,), (w,)
    ),
    "grad of jvp of jvp": lambda f, w: grad(
        lambda w: jvp(lambda w: jvp(f, (w,), (w,))[1], (w,), (w,))[1].pow(2).sum()
    )(w),
    "jacrev of jacfwd": lambda f, w: jacrev(jacfwd(lambda w: f(w).sum()))(w),
    "grad in which no_grad holds": lambda f, w: grad(lambda w: without_grad(f, w).pow(2).sum())(w),
    "grad of grad in which no_grad holds": lambda f, w: grad(
        lambda w: grad(lambda w: (without_grad(f, w) * w.sum()).sum())(w).sum()
    )(w),
}


def without_grad(f, w):
    with torch.no_grad():
        return f(w)


@pytest.fixture(autouse=True)
def no_fallback():
    """Disable vmap's fallback (a loop with a warning), so that an op without a rule raises."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


@pytest.mark.parametrize("case", FUNCTIONS, ids=str)
@pytest.mark.parametrize("argument", ["x", "w_ih", "b_ih", "h0", "w_hh", "alpha"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform(transform, argument, case):
    if argument == "alpha" and not case.alpha:
        case = case.with_(alpha=True)
    found, expected = (
        transform(*function_of(argument, case, rnn)) for rnn in (fusedrnn.rnn, reference.rnn)
    )
    torch.testing.assert_close(found, expected)


def test_all_arguments_at_once():
    case = FUNCTIONS[2]
    flags = case.flags()

    def hessians(rnn):
        def value(arguments):
            h, h_n = rnn(**arguments, **flags)
            return h.sin().sum() + h_n.cos().sum()

        return hessian(value)(case.arguments())

    torch.testing.assert_close(hessians(fusedrnn.rnn), hessians(reference.rnn))


def test_jvp_without_grad_mode():
    with torch.no_grad():
        found, expected = (
            TRANSFORMS["jvp"](*function_of("w_hh", FUNCTIONS[0], rnn))
            for rnn in (fusedrnn.rnn, reference.rnn)
        )
    torch.testing.assert_close(found, expected)


# A custom op without its own jvp silently gives zero tangents. The next tests detect that.


@pytest.mark.parametrize("case", FUNCTIONS, ids=str)
@pytest.mark.parametrize("argument", ["x", "w_ih", "b_ih", "h0", "w_hh", "alpha"])
def test_no_tangent_is_silently_zero(argument, case):
    case = case.with_(alpha=case.alpha or argument == "alpha")
    f, value = function_of(argument, case, fusedrnn.rnn)
    direction = torch.randn_like(value)
    step = 1e-6 * direction
    expected = (f(value + step) - f(value - step)) / 2e-6
    assert expected.abs().max() > 1e-3
    _, found = jvp(f, (value,), (direction,))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("op", ["activation", "tangent", "adjoint"])
def test_each_op_by_itself_has_a_tangent(op):
    """Call each op directly through ``torch.ops``, like a user who does not know autograd.py."""
    case = FUNCTIONS[1]
    arguments, flags = case.arguments(), case.flags()
    series = torch.randn(case.T, case.B, case.H, dtype=torch.float64)
    layout = (flags["reset"], None, "sigmoid", "rate", False)
    if op == "activation":
        names = ("x", "w_ih", "b_ih", "b_hh", "h0", "v0", "w_hh", "alpha", "q")
        given, last = [arguments.get(name) for name in names], (None,)
    else:
        states = [arguments["h0"]] if op == "adjoint" else [arguments["h0"], None]
        given = [series, series.cos(), None, *states, series.sigmoid()]
        given += [arguments["w_hh"], arguments["alpha"]]
        last = (None, True, True) if op == "adjoint" else (True,)

    def f(*given: Any) -> Any:
        return getattr(torch.ops.fusedrnn, op)(*given, *layout, *last)

    for i, value in enumerate(given):
        if value is None:
            continue
        one = [*given]

        def of_one(a, i=i, one=one):
            return f(*one[:i], a, *one[i + 1 :])

        direction = torch.randn_like(value)
        step = 1e-6 * direction
        found = jvp(of_one, (value,), (direction,))[1]
        for tangent, plus, minus in zip(found, of_one(value + step), of_one(value - step)):
            torch.testing.assert_close(tangent, (plus - minus) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "transform",
    [
        "grad",
        "jvp",
        "jacrev",
        "hessian",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("jacfwd", "grad of grad")),
    ],
)
def test_transforms_inside_of_compiled_code(transform):
    torch._dynamo.reset()
    f, w = function_of("w_hh", FUNCTIONS[1], fusedrnn.rnn)
    expected = TRANSFORMS[transform](*function_of("w_hh", FUNCTIONS[1], reference.rnn))
    compiled = torch.compile(
        lambda w: TRANSFORMS[transform](f, w), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(w), expected)


def test_per_sample_gradients_inside_of_compiled_code():
    torch._dynamo.reset()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)

    def gradients(rnn):
        def loss(w, x):
            return rnn(x, None, w)[0].sin().sum()

        return vmap(grad(loss), (None, 0))

    w = torch.randn(2, 2, dtype=torch.float64)
    compiled = torch.compile(gradients(fusedrnn.rnn), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(w, x), gradients(reference.rnn)(w, x))


def test_dual_numbers_inside_of_compiled_code():
    torch._dynamo.reset()

    def tangent(f, w):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(w, w.cos()))).tangent

    f, w = function_of("w_hh", FUNCTIONS[1], fusedrnn.rnn)
    compiled = torch.compile(lambda w: tangent(f, w), backend="aot_eager")
    expected = tangent(*function_of("w_hh", FUNCTIONS[1], reference.rnn))
    torch.testing.assert_close(compiled(w), expected)


# Modules


def test_functional_call():
    rnn = fusedrnn.RNN(3, 4).double()
    other = {k: torch.randn_like(v) for k, v in rnn.named_parameters()}
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    h, _ = functional_call(rnn, other, (x,))
    torch.testing.assert_close(h, reference.rnn(x, *other.values())[0])


MODULE_TRANSFORMS = {
    "grad": lambda f, w: grad(f)(w),
    "jvp": lambda f, w: jvp(f, (w,), ({k: v.cos() for k, v in w.items()},)),
    "jacrev of grad": lambda f, w: jacrev(grad(f))(w),
    "hessian": lambda f, w: hessian(f)(w),
}


@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([2, 2, 1, 1])], ids=["", "packed"])
@pytest.mark.parametrize("transform", MODULE_TRANSFORMS.values(), ids=MODULE_TRANSFORMS)
def test_transforms_of_a_module(transform, batch_sizes):
    rnn = fusedrnn.RNN(2, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    weights = {k: v.detach() for k, v in rnn.named_parameters()}
    shape = (4, 2, 2) if batch_sizes is None else (6, 2)
    x = torch.randn(shape, dtype=torch.float64)

    def module(weights):
        input = x if batch_sizes is None else PackedSequence(x, batch_sizes)
        output, h_n = functional_call(rnn, weights, (input,))
        return (output if batch_sizes is None else output.data), h_n

    def loops(weights):
        output, h_n, weights = x, [], list(weights.values())
        for layer in range(2):
            directions = [
                reference.rnn(
                    output, *weights[8 * layer + 4 * d :][:4], reverse=d == 1,
                    batch_sizes=batch_sizes,
                )
                for d in range(2)
            ]  # fmt: skip
            output = torch.cat([h for h, _ in directions], -1)
            h_n += [last for _, last in directions]
        return output, torch.stack(h_n)

    def value(f):
        return lambda weights: sum(y.sin().sum() for y in f(weights))

    with torch.no_grad():  # torch.func ignores an outer no_grad
        found = transform(value(module), weights)
    torch.testing.assert_close(found, transform(value(loops), weights))


@on_gpu
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_packed_on_a_gpu(transform):
    """If a transform is active, batch sizes are copied to the device in a different way."""
    arguments = Case(lengths=(5, 3, 3, 1)).arguments()
    w_hh = arguments.pop("w_hh")

    def result(w_hh, **others):
        def output(w_hh):
            return fusedrnn.rnn(w_hh=w_hh, **others, **Case(lengths=(5, 3, 3, 1)).flags())[0]

        if transform == "jvp":
            return jvp(output, (w_hh,), (w_hh.sin(),))[1]
        return grad(lambda w_hh: output(w_hh).sin().sum())(w_hh)

    on_device = {name: t.cuda() for name, t in arguments.items()}
    torch.testing.assert_close(result(w_hh.cuda(), **on_device).cpu(), result(w_hh, **arguments))
