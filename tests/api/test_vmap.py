"""torch.func.vmap against a Python loop over the samples, each run by the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from cases import Calls, Case
from pairs import pair
from torch import Tensor
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

import fusedrnn
from fusedrnn import reference

V = 4


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """Disable vmap's fallback (a loop with a warning), so that an op without a rule raises."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def loop(f: Callable, in_dims: Any = 0) -> Callable:
    """Return what vmap(f, in_dims) is defined to compute, as a loop over the samples."""

    def looped(*args: Any) -> Any:
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
        size = next(a.size(d) for a, d in zip(args, dims) if d is not None)
        results = [
            f(*(a if d is None else a.select(d, v) for a, d in zip(args, dims)))
            for v in range(size)
        ]
        return tree_map(lambda *each: torch.stack(each), *results)

    return looped


def stacked(case: Case, names: tuple[str, ...]) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """Return all arguments and their in_dims.

    The named arguments hold V different samples, stacked along a dimension that varies.
    """
    arguments, in_dims = case.arguments(), []
    reset = case.flags()["reset"]
    if reset is not None:
        arguments["reset"] = reset
    for place, (name, value) in enumerate(arguments.items()):
        if name not in names:
            in_dims.append(None)
            continue
        different = [value.roll(v, 0) * (1 if name == "reset" else 1 - v / 9) for v in range(V)]
        dim = place % (value.dim() + 1)
        arguments[name] = torch.stack(different, dim).to(value.dtype)
        in_dims.append(dim if place % 2 else dim - value.dim() - 1)  # counted from either end
    return list(arguments.values()), tuple(in_dims)


def function_of(case: Case, rnn: Callable) -> Callable:
    names, flags = list(case.arguments()), case.flags()
    if flags.pop("reset") is not None:
        return lambda *args: rnn(**dict(zip([*names, "reset"], args)), **flags)
    return lambda *args: rnn(**dict(zip(names, args)), **flags)


KINDS = [
    Case(),
    Case(h0=False, bias=False, nonlinearity="relu", reverse=True),
    Case(reset=True, alpha=True),
    Case(lengths=(4, 2, 1)),
    Case(lengths=(4, 2, 2), reset=True, alpha=True, reverse=True, h0=False),
    Case(form="potential", alpha=True, alpha_varies=True, state_input=True),
    Case(form="inside", alpha=True, lengths=(4, 2, 2), reset=True, reset_to=True),
]
BATCHED = [
    ("x",),
    ("h0",),
    ("reset",),
    ("b_ih",),
    ("w_ih",),
    ("w_hh",),
    ("alpha",),
    ("state_input", "reset_to"),
    ("x", "h0", "reset"),
    ("x", "w_ih"),
    ("x", "h0", "b_hh"),
    ("w_ih", "w_hh", "b_ih", "b_hh"),
    ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "alpha", "reset"),
]


def has(case: Case, names: tuple[str, ...]) -> bool:
    return bool({*case.arguments(), *(["reset"] if case.reset else [])} & set(names))


@pytest.mark.parametrize(
    ("case", "names"),
    [
        pytest.param(case, names, id=f"{case}-{'+'.join(names)}")
        for case in KINDS
        for names in BATCHED
        if has(case, names)
    ],
)
def test_any_argument(case, names):
    args, in_dims = stacked(case, names)
    found = vmap(function_of(case, fusedrnn.rnn), in_dims)(*args)
    expected = loop(function_of(case, reference.rnn), in_dims)(*args)
    torch.testing.assert_close(found, expected)


def both(case: Case, rnn: Callable, only: tuple[int, ...]) -> Callable:
    """Return a smooth scalar function that takes the arguments with the indices ``only`` first."""
    f = function_of(case, rnn)

    def value(*args: Any) -> Tensor:
        chosen, others = list(args[: len(only)]), list(args[len(only) :])
        order = [chosen.pop(0) if i in only else others.pop(0) for i in range(len(args))]
        h, h_n = f(*order)
        return h.sin().sum() + (h_n * h_n).sum()

    return value


# Arguments: vmap or the loop, f, the arguments of f, their in_dims. Derivatives are with respect to
# the first two arguments.
COMPOSITIONS = {
    "vmap of grad": lambda over, f, a, d: over(grad(f, (0, 1)), d)(*a),
    "vmap of vjp": lambda over, f, a, d: over(
        lambda p, q, *a: vjp(lambda p, q: f(p, q, *a), p, q)[1](f(p, q, *a)), d
    )(*a),
    "vmap of jvp": lambda over, f, a, d: over(
        lambda p, q, *a: jvp(lambda p, q: f(p, q, *a), (p, q), (p + 1, q * q))[1], d
    )(*a),
    "vmap of jacrev": lambda over, f, a, d: over(jacrev(grad(f, (0, 1)), (0, 1)), d)(*a),
    "vmap of hessian": lambda over, f, a, d: over(hessian(f, (0, 1)), d)(*a),
    "grad of vmap": lambda over, f, a, d: grad(lambda *a: over(f, d)(*a).pow(3).sum(), (0, 1))(*a),
    "jvp of vmap": lambda over, f, a, d: jvp(
        lambda p, q: over(f, d)(p, q, *a[2:]), (a[0], a[1]), (a[0] + 1, a[1])
    )[1],
    "jacrev of vmap": lambda over, f, a, d: jacrev(over(f, d), (0, 1))(*a),
    "jacfwd of vmap": lambda over, f, a, d: jacfwd(over(f, d), (0, 1))(*a),
    "hessian of vmap": lambda over, f, a, d: hessian(lambda *a: over(f, d)(*a).sum(), (0, 1))(*a),
    "grad of vmap of grad": lambda over, f, a, d: grad(
        lambda *a: sum(g.pow(2).sum() for g in over(grad(f, (0, 1)), d)(*a)), (0, 1)
    )(*a),
    "vmap of vmap": lambda over, f, a, d: over(
        over(f, d), tuple(None if e is None else -1 for e in d)
    )(*(t if e is None else torch.stack([t, t.cos()], -1).to(t.dtype) for t, e in zip(a, d))),
    "vmap of grad of vmap": lambda over, f, a, d: over(
        grad(lambda s, *a: over(lambda *a: f(*a) * s, d)(*a).sum(), (0, 1, 2)),
        (0, *(None for _ in a)),
    )(torch.linspace(1, 2, 3, dtype=a[0].dtype), *a),
}


@pytest.mark.parametrize("names", [("x", "h0"), ("w_hh", "w_ih"), ("x", "w_hh", "reset", "alpha")])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=3, B=2, I=2, H=3, nonlinearity="sigmoid"),
        Case(T=3, B=2, I=2, H=3, reset=True, alpha=True, reverse=True),
        Case(lengths=(3, 1), I=2, H=3, alpha=True),
        Case(T=3, B=2, I=2, H=3, form="potential", alpha=True, alpha_varies=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("composition", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_composition(composition, case, names):
    args, in_dims = stacked(case, names)
    all_names = [*case.arguments(), "reset"]
    only = tuple(all_names.index(name) for name in sorted(names[:2], key=all_names.index))
    order = [*only, *(i for i in range(len(args)) if i not in only)]
    args, in_dims = [args[i] for i in order], tuple(in_dims[i] for i in order)
    found = composition(vmap, both(case, fusedrnn.rnn, only), args, in_dims)
    expected = composition(loop, both(case, reference.rnn, only), args, in_dims)
    torch.testing.assert_close(found, expected)


def test_chunks_and_functions_without_batched_arguments():
    case = Case()
    args, in_dims = stacked(case, ("x", "h0"))
    f = function_of(case, fusedrnn.rnn)
    torch.testing.assert_close(vmap(f, in_dims, chunk_size=3)(*args), vmap(f, in_dims)(*args))
    x = case.arguments()["x"]
    arguments = {k: v for k, v in case.arguments().items() if k != "x"}
    h = vmap(lambda scale: fusedrnn.rnn(x, **arguments)[0] * scale)(torch.ones(2).double())
    torch.testing.assert_close(h[1], reference.rnn(x, **arguments)[0])


@pytest.mark.parametrize("names", [("x", "reset"), ("w_hh", "w_ih"), ("h0",)], ids="+".join)
@pytest.mark.parametrize("case", [Case(reset=True), Case(lengths=(3, 1), reset=True)], ids=str)
def test_a_batch_of_zero_samples_gives_empty_gradients(case, names):
    """An empty batch, which Poisson sampling occasionally draws."""
    args, in_dims = stacked(case, names)
    empty = [a if d is None else a.narrow(d, 0, 0) for a, d in zip(args, in_dims)]
    f = both(case, fusedrnn.rnn, tuple(range(len(args))))
    found = vmap(grad(f, (0, 1, 2)), in_dims)(*empty)
    for result, some in zip(found, vmap(grad(f, (0, 1, 2)), in_dims)(*args)):
        assert result.shape == (0, *some.shape[1:])


@pytest.mark.parametrize("names", [("x",), ("w_hh", "w_ih"), ("w_ih",)], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype, names):
    case = Case(T=20, B=3, I=9, H=33, dtype=dtype)
    args, in_dims = stacked(case, names)
    found = vmap(function_of(case, fusedrnn.rnn), in_dims)(*args)
    assert_as_accurate_as_torch(found, loop(function_of(case, reference.rnn), in_dims), args)


def test_sequences_packed_differently_are_refused():
    case = Case(lengths=(2, 1, 1))
    sizes = torch.tensor([[3, 1], [2, 2]])
    arguments = case.arguments()
    with pytest.raises(RuntimeError, match="vmap over batch_sizes is not supported"):
        vmap(lambda sizes: fusedrnn.rnn(**arguments, batch_sizes=sizes)[0])(sizes)


# What runs, and how often


def calls_of(size: int, T: int, names: tuple[str, ...]) -> list[str]:
    """Return the ops run by per-sample gradients of all weights, if only ``names`` are batched."""
    case = Case(T=T, B=2)
    arguments = case.arguments()
    weights = {k: arguments.pop(k) for k in ("w_ih", "w_hh", "b_ih", "b_hh")}
    for name in names:
        arguments[name] = torch.stack([arguments[name]] * size)

    def loss(weights: Any, arguments: Any) -> Tensor:
        return fusedrnn.rnn(**weights, **arguments)[0].sum()

    with Calls() as calls:
        vmap(grad(loss), (None, {name: 0 if name in names else None for name in arguments}))(
            weights, arguments
        )
    return calls.names


@pytest.mark.parametrize("names", [("x",), ("h0",), ("x", "h0")], ids="+".join)
def test_per_sample_gradients_without_a_loop(names):
    calls = calls_of(2, 8, names)
    assert calls.count("activation") == calls.count("adjoint") == 1
    assert calls.count("bmm") <= 4  # dw_ih; dw_hh, and its part from h0; x for all samples
    assert calls == calls_of(64, 80, names)


def test_per_sample_gradients_copy_no_series():
    T, size, I, H = 30, 16, 8, 24
    weights = {"w_ih": torch.randn(H, I), "w_hh": torch.randn(H, H) / H**0.5}
    x, g = torch.randn(T, 1, size, I), torch.randn(T, 1, size, H)

    def gradients() -> Any:
        def of_one(x: Tensor, g: Tensor) -> Any:
            return vjp(lambda weights: fusedrnn.rnn(x, **weights)[0], weights)[1](g)

        return vmap(of_one, 2)(x, g)

    gradients()
    with torch.profiler.profile(profile_memory=True) as profile:
        gradients()
    allocated = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0]
    weight_gradients = 4 * size * H * max(I, H)
    assert sum(n > weight_gradients for n in allocated) == 2, allocated  # h and delta


def test_an_ensemble_runs_one_call_per_member():
    case = Case()
    args, in_dims = stacked(case, ("w_ih", "w_hh", "b_ih", "b_hh"))
    with Calls() as calls:
        vmap(function_of(case, fusedrnn.rnn), in_dims)(*args)
    assert calls.names.count("activation") == V


@pytest.mark.parametrize("names", [("w_ih",), ("b_ih", "x"), ("reset", "h0")], ids="+".join)
def test_samples_that_share_the_recurrent_weight_run_in_one_call(names):
    case = Case(reset=True)
    args, in_dims = stacked(case, names)
    with Calls() as calls:
        vmap(function_of(case, fusedrnn.rnn), in_dims)(*args)
    assert calls.names.count("activation") == 1


# Modules


MODULES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "nonlinearity": "relu", "bias": False},
]


@pytest.mark.parametrize("options", MODULES, ids=str)
@pytest.mark.parametrize("shape", [(6, 2, 3), (6, 3)], ids=["batched", "unbatched"])
def test_a_module_over_its_input(options, shape):
    ours, theirs = pair(3, 5, dtype=torch.float64, **options)
    x = torch.randn(V, *shape, dtype=torch.float64)
    torch.testing.assert_close(vmap(ours)(x), loop(theirs)(x))


@pytest.mark.parametrize("options", MODULES, ids=str)
def test_an_ensemble_of_modules(options):
    pairs = [pair(3, 5, dtype=torch.float64, **options) for _ in range(V)]
    weights, buffers = stack_module_state([ours for ours, _ in pairs])
    x = torch.randn(6, 2, 3, dtype=torch.float64)

    def call(weights: Any, buffers: Any, x: Tensor) -> Any:
        return functional_call(pairs[0][0], (weights, buffers), (x,))

    found = vmap(call, (0, 0, None))(weights, buffers, x)
    each = [theirs(x) for _, theirs in pairs]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*each))))
    found[0].sin().sum().backward()
    for i, (_, theirs) in enumerate(pairs):
        each[i][0].sin().sum().backward()
        for name, weight in theirs.named_parameters():
            torch.testing.assert_close(weights[name].grad[i], weight.grad)


@pytest.mark.parametrize("options", MODULES, ids=str)
def test_per_sample_gradients_of_a_module(options):
    ours, theirs = pair(3, 5, dtype=torch.float64, **options)
    x = torch.randn(V, 6, 2, 3, dtype=torch.float64)

    def gradients(module: torch.nn.Module) -> Callable:
        def loss(weights: Any, x: Tensor) -> Tensor:
            return functional_call(module, weights, (x,))[0].sin().sum()

        return grad(loss)

    weights = {k: w.detach() for k, w in ours.named_parameters()}
    found = vmap(gradients(ours), (None, 0))(weights, x)
    for v in range(V):
        expected = gradients(theirs)(weights, x[v])
        torch.testing.assert_close({k: g[v] for k, g in found.items()}, expected)


def test_packed_samples():
    ours, theirs = pair(3, 5, dtype=torch.float64, bidirectional=True)
    batch_sizes = torch.tensor([3, 3, 2, 1])
    order = torch.tensor([2, 0, 1])
    data = torch.randn(9, V, 3, dtype=torch.float64)

    def run(rnn: torch.nn.Module) -> Callable:
        def packed(data: Tensor) -> Any:
            output, h_n = rnn(PackedSequence(data, batch_sizes, order, order.argsort()))
            return output.data, h_n

        return packed

    torch.testing.assert_close(vmap(run(ours), 1)(data), loop(run(theirs), 1)(data))


@pytest.mark.parametrize("hidden", [5, 1500])  # torch's own op, and the engine
def test_cells(hidden):
    cell, theirs = pair(3, hidden, name="RNNCell", dtype=torch.float64)
    x, h = torch.randn(V, 2, 3).double(), torch.randn(2, V, hidden).double()
    torch.testing.assert_close(vmap(cell, (0, 1))(x, h), loop(theirs, (0, 1))(x, h))


def test_dropout_follows_the_randomness_mode():
    rnn = fusedrnn.RNN(3, 64, num_layers=2, dropout=0.5)
    x = torch.ones(1, 6, 2, 3).expand(V, -1, -1, -1)
    with pytest.raises(RuntimeError, match="random operation while in randomness error mode"):
        vmap(rnn)(x)
    same, _ = vmap(rnn, randomness="same")(x)
    different, _ = vmap(rnn, randomness="different")(x)
    for v in range(1, V):
        torch.testing.assert_close(same[v], same[0])
        assert not torch.equal(different[v], different[0])
    assert not torch.equal(same[0], different[0])
    rnn.eval()
    torch.testing.assert_close(vmap(rnn)(x)[0][0], rnn(x[0])[0])
