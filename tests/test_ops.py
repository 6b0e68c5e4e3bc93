"""The ops as torch sees them: registration, fake kernels, transforms, and errors."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp

import fusedrnn
from fusedrnn import reference

CASES = [
    Case(),
    Case(h0=False, bias=False, nonlinearity="relu", reverse=True),
    Case(keep=True, alpha=True),
    Case(lengths=(4, 2, 1), alpha=True),
]


def series(case: Case) -> torch.Tensor:
    return torch.randn(*case.arguments()["x"].shape[:-1], case.H, dtype=torch.float64)


def op_arguments(op: str, case: Case) -> tuple:
    found, flags = case.arguments(requires_grad=True), case.flags()
    walk = (
        found.get("alpha"),
        flags["keep"],
        flags["batch_sizes"],
        case.nonlinearity,
        case.reverse,
    )
    if op == "activation":
        names = ("x", "w_ih", "b_ih", "b_hh", "h0", "w_hh")
        return (*(found.get(name) for name in names), *walk)
    driven = tuple(series(case).requires_grad_() for _ in range(2))
    phi = series(case).tanh().requires_grad_()
    last = (True, True) if op == "adjoint" else (True,)
    return (*driven, found.get("h0"), phi, found["w_hh"], *walk, *last)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", ["activation", "tangent", "adjoint"])
def test_opcheck(op, case):
    torch.library.opcheck(getattr(torch.ops.fusedrnn, op).default, op_arguments(op, case))


@pytest.mark.parametrize("op", ["tangent", "adjoint"])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck_with_little_given(op, full):
    case = Case()
    phi, w_hh = series(case), case.arguments()["w_hh"]
    last = (False, full) if op == "adjoint" else (full,)
    arguments = (series(case), None, None, phi, w_hh, None, None, None, "tanh", False, *last)
    torch.library.opcheck(getattr(torch.ops.fusedrnn, op).default, arguments)


FUNCTIONS = [Case(T=3, B=2, I=2, H=3), Case(T=3, B=2, I=2, H=3, keep=True, alpha=True)]


def function_of(name, case, rnn):
    """The layer as a function of one of its arguments, and that argument."""
    arguments = case.arguments()
    argument, flags = arguments.pop(name), case.flags()
    return (lambda a: rnn(**{name: a}, **arguments, **flags)[0]), argument


TRANSFORMS = {
    "grad": lambda f, w: grad(lambda w: f(w).sum())(w),
    "vjp": lambda f, w: vjp(f, w)[1](torch.ones_like(f(w))),
    "jvp": lambda f, w: jvp(f, (w,), (w,)),
    "jacrev": lambda f, w: jacrev(f)(w),
    "jacfwd": lambda f, w: jacfwd(f)(w),
    "hessian": lambda f, w: hessian(lambda w: f(w).sum())(w),
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
    "grad in which no_grad holds": lambda f, w: grad(lambda w: without_grad(f, w).pow(2).sum())(w),
    "grad of grad in which no_grad holds": lambda f, w: grad(
        lambda w: grad(lambda w: (without_grad(f, w) * w.sum()).sum())(w).sum()
    )(w),
}


def without_grad(f, w):
    with torch.no_grad():
        return f(w)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap has no rule of its own yet
@pytest.mark.parametrize("case", FUNCTIONS, ids=str)
@pytest.mark.parametrize("argument", ["x", "w_ih", "b_ih", "h0", "w_hh", "alpha"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func(transform, argument, case):
    if argument == "alpha" and not case.alpha:
        case = case.with_(alpha=True)
    found, expected = (
        transform(*function_of(argument, case, rnn)) for rnn in (fusedrnn.rnn, reference.rnn)
    )
    torch.testing.assert_close(found, expected)


def test_jvp_without_grad_mode():
    with torch.no_grad():
        found, expected = (
            TRANSFORMS["jvp"](*function_of("w_hh", FUNCTIONS[0], rnn))
            for rnn in (fusedrnn.rnn, reference.rnn)
        )
    torch.testing.assert_close(found, expected)


def test_jit_trace_of_a_trained_module():
    rnn, x = fusedrnn.RNN(3, 4), torch.randn(5, 2, 3)
    traced = torch.jit.trace(rnn, (x,))
    torch.testing.assert_close(traced(x), rnn(x))


def test_functional_call():
    rnn = fusedrnn.RNN(3, 4).double()
    other = {k: torch.randn_like(v) for k, v in rnn.named_parameters()}
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    h, _ = functional_call(rnn, other, (x,))
    torch.testing.assert_close(h, reference.rnn(x, *other.values())[0])


def test_meta_tensors_give_shapes():
    h, h_n = fusedrnn.RNN(3, 4, device="meta")(torch.empty(5, 2, 3, device="meta"))
    assert (h.shape, h_n.shape) == ((5, 2, 4), (1, 2, 4))


@pytest.mark.parametrize("name", ["w_ih", "w_hh", "b_ih", "h0", "keep", "alpha"])
def test_one_tensor_elsewhere_is_an_error(name):
    arguments = {**Case(alpha=True).arguments(), "keep": torch.ones(5, 3, dtype=torch.bool)}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(RuntimeError, match="must be on cpu like the others, got meta"):
        fusedrnn.rnn(**arguments)


BAD = [
    ({"x": torch.randn(4)}, "x must be [T, B, size], got [4]"),
    ({"x": torch.randn(0, 3, 4)}, "Expected sequence length to be larger than 0 in RNN"),
    ({"x": torch.randn(5, 3, 9)}, "w_ih must have sizes [7, 9], got [7, 4]"),
    ({"w_ih": torch.randn(7, 4).double()}, "w_ih must be Float like the others, got Double"),
    ({"w_hh": torch.randn(7, 6)}, "w_hh must have sizes [7, 7], got [7, 6]"),
    ({"b_ih": torch.randn(6)}, "b_ih must have sizes [7], got [6]"),
    ({"h0": torch.randn(2, 7)}, "h0 must have sizes [3, 7], got [2, 7]"),
    ({"keep": torch.ones(5, 3)}, "keep must be bool, got Float"),
    ({"keep": torch.ones(5, 2).bool()}, "keep must have sizes [5, 3], got [5, 2]"),
    ({"alpha": 1.5}, "alpha must be in (0, 1], got 1.5"),
    ({"alpha": torch.ones(3)}, "alpha must be a number or a tensor [] or [7], got [3]"),
    ({"batch_sizes": torch.tensor([3])}, "packed x must be [N, size], got [5, 3, 4]"),
    ({"x": torch.randn(5, 4), "batch_sizes": torch.tensor([1, 4])}, "never rise, got [1, 4]"),
    ({"x": torch.randn(5, 4), "batch_sizes": torch.tensor([3, 1])}, "sum to 4, but packed x has 5"),
    (
        {"x": torch.randn(4, 4), "batch_sizes": torch.tensor([2**62 + 1] * 4)},
        "more than the 4 rows",
    ),
    ({"x": torch.randn(5, 4), "batch_sizes": torch.tensor([3.0, 2])}, "1-D int64 CPU tensor"),
]


@pytest.mark.parametrize(("change", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_arguments_are_named(change, text):
    arguments = {**Case(dtype=torch.float32).arguments(), **change}
    with pytest.raises((RuntimeError, ValueError)) as error:
        fusedrnn.rnn(**arguments)
    assert text in str(error.value)


def test_an_unknown_nonlinearity_is_named():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'cosh'. Select from tanh, relu, "):
        fusedrnn.rnn(**Case().arguments(), nonlinearity="cosh")
