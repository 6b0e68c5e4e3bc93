"""The ops as torch sees them: registration, fake kernels, transforms, and errors."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn import _C, ops

CASES = [
    Case(),
    Case(dtype=torch.float32),
    Case(h0=False, bias=False, nonlinearity="relu", reverse=True),
    Case(reset=True, alpha=True),
    Case(reset=True, reverse=True, nonlinearity="elu"),
    Case(T=1, B=0),
    Case(lengths=(4, 2, 1), alpha=True),
    Case(lengths=(4, 4), reset=True, reverse=True, h0=False),
    Case(state_input=True, reset=True),
    Case(form="potential", alpha=True),
    Case(form="potential", lengths=(4, 2, 1), nonlinearity="elu", reset=True),
    Case(grad_clip=0.1, reset=True, alpha=True),
    Case(form="inside", alpha=True, alpha_varies=True, reverse=True),
]

WITHOUT_GRADIENTS = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*WITHOUT_GRADIENTS, "test_aot_dispatch_dynamic")


def series(case: Case) -> torch.Tensor:
    return torch.randn(*case.arguments()["x"].shape[:-1], case.H).to(case.dtype)


def op_arguments(op: str, case: Case) -> tuple:
    found, flags = case.arguments(requires_grad=True), case.flags()
    alpha, h0, reset, sizes = found.get("alpha"), found.get("h0"), flags["reset"], case.batch_sizes
    layout = (reset, sizes, case.nonlinearity, case.form, case.reverse)
    clipped = (*layout, case.grad_clip)
    v0 = torch.randn_like(h0).requires_grad_() if h0 is not None and "pot" in case.form else None
    if op == "activation":
        names = ("x", "w_ih", "b_ih", "b_hh", "h0")
        given = (*(found.get(name) for name in names), v0, found["w_hh"], alpha)
        return (*given, found.get("state_input"), *clipped)
    driven = tuple(series(case).requires_grad_() for _ in range(3))
    driven = (*driven[:2], None if case.form == "rate" else driven[2])
    saved = series(case).tanh().requires_grad_()
    if op == "adjoint":
        return (*driven, h0, saved, found["w_hh"], alpha, *clipped, True, True)
    return (*driven, h0, v0, saved, found["w_hh"], alpha, *layout, True)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", ["activation", "tangent", "adjoint"])
def test_opcheck(op, case):
    differentiable = op != "adjoint" or case.grad_clip is None
    tests = ALL_CHECKS if differentiable else WITHOUT_GRADIENTS
    arguments = op_arguments(op, case)
    torch.library.opcheck(getattr(torch.ops.fusedrnn, op).default, arguments, test_utils=tests)


@pytest.mark.parametrize("op", ["tangent", "adjoint"])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck_without_optional_arguments(op, full):
    case = Case()
    saved, w_hh = series(case), case.arguments()["w_hh"]
    states = (None,) if op == "adjoint" else (None, None)
    layout = (None, None, "tanh", "rate", False)
    last = (None, False, full) if op == "adjoint" else (full,)
    arguments = (series(case), None, None, *states, saved, w_hh, None, *layout, *last)
    torch.library.opcheck(getattr(torch.ops.fusedrnn, op).default, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["activation", "tangent", "adjoint"])
def test_opcheck_of_views(op, dtype):
    """No check of gradients: in low precision, torch's rounding errors are as large as ours."""
    arguments = op_arguments(op, Case(dtype=dtype, reset=True))
    strange = tuple(
        a.mT.contiguous().mT if torch.is_tensor(a) and a.dim() > 1 else a for a in arguments
    )
    torch.library.opcheck(
        getattr(torch.ops.fusedrnn, op).default, strange, test_utils=WITHOUT_GRADIENTS
    )


def composite_arguments(op: str, case: Case) -> tuple:
    found, flags = case.arguments(requires_grad=True), case.flags()
    h0, reset, sizes, alpha = found.get("h0"), flags["reset"], case.batch_sizes, found.get("alpha")
    one, other = (series(case).requires_grad_() for _ in range(2))
    layout = (reset, sizes, case.reverse)
    if op == "previous":
        return (one, h0, *layout)
    if op == "following":
        return (one, *layout)
    if op == "following_first":
        return (one, *layout, case.B if sizes is None else int(sizes[0]))
    if op == "recurrent_product":
        return (one, other, h0, *layout)
    h = series(case).tanh().requires_grad_()
    saves = alpha is not None or case.nonlinearity in _C.saving_z or case.form == "potential"
    if case.form == "potential":
        found["v0"] = h0
    names = ("x", "w_ih", "b_ih", "b_hh", "h0", "v0", "w_hh", "alpha")
    given = (one, None, None, h0, *(found.get(name) for name in names), reset, sizes)
    wanted = [found.get(name) is not None for name in (*names, "state_input")]
    options = (case.nonlinearity, case.form, case.reverse, case.grad_clip)
    return (*given, h, h if saves else None, *options, wanted)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
@pytest.mark.parametrize(
    "op", ["bptt", "previous", "following", "following_first", "recurrent_product"]
)
def test_opcheck_of_composites(op, case):
    torch.library.opcheck(getattr(torch.ops.fusedrnn, op).default, composite_arguments(op, case))


def step_arguments(
    form: str, layers: int, bias: bool, leak: int | None, batch: int | None
) -> tuple:
    def tensor(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, dtype=torch.float64).mul(0.3).requires_grad_()

    rows, size = () if batch is None else (batch,), 7
    weights = []
    for inputs in (4, size, size)[:layers]:
        weights += [tensor(size, inputs), tensor(size, size)]
        weights += [tensor(size), tensor(size)] if bias else []
    if leak is not None:
        sizes = (size,) * leak
        weights += [
            torch.rand(sizes, dtype=torch.float64, requires_grad=True) for _ in range(layers)
        ]
    v0 = tensor(layers, *rows, size) if form == "potential" else None
    return tensor(*rows, 4), tensor(layers, *rows, size), weights, "tanh", form, v0


@pytest.mark.parametrize(
    "case",
    [
        ("rate", 1, True, None, 3),
        ("rate", 3, False, 0, 1),
        ("potential", 2, True, 1, 2),
        ("inside", 1, False, 1, None),
    ],
    ids=str,
)
def test_opcheck_of_step(case):
    torch.library.opcheck(ops.step, step_arguments(*case))


STEP_ERRORS = {
    "x must be [B, I] or [I], got [1, 1, 4]": ("x", torch.zeros(1, 1, 4)),
    "h0 must be [L, B, H], got [3, 7]": ("h0", torch.zeros(3, 7)),
    "v0 must be [L, B, H], got [7]": ("v0", torch.zeros(7)),
    "v0 must be None unless the form is potential": ("v0", torch.zeros(1, 3, 7)),
    "weights must be 2 to 5 tensors for each of the 0 layers of h0, got 4": (
        "h0", torch.zeros(0, 3, 7)),
    "weights must be 2 to 5 tensors for each of the 1 layers of h0, got 1": (
        "weights", [torch.zeros(7, 4)]),
    "for each of the 2 layers of h0, got 5": ("weights", [torch.zeros(7, 4)] * 5, 2),
    "w_ih must have sizes [7, 4], got [7, 5]": (
        "weights", [torch.zeros(7, size, dtype=torch.float64) for size in (5, 7)]),
    "h0 must have sizes [3, 7], got [2, 7]": ("h0", torch.zeros(1, 2, 7, dtype=torch.float64)),
    "h0 must be Double, got Float": ("h0", torch.zeros(1, 3, 7)),
    "Unknown nonlinearity 'cosh'": ("nonlinearity", "cosh"),
    "Unknown form 'rates'": ("form", "rates"),
}  # fmt: skip


@pytest.mark.parametrize("text", STEP_ERRORS)
def test_bad_arguments_of_step_are_named(text):
    name, value, *layers = STEP_ERRORS[text]
    names = ("x", "h0", "weights", "nonlinearity", "form", "v0")
    arguments = dict(zip(names, step_arguments("rate", *(layers or [1]), True, None, 3)))
    arguments[name] = value
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) as error:
        ops.step(*arguments.values())
    assert text in str(error.value)


def test_every_op_is_checked():
    names = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fusedrnn::")
    }
    checked = {"activation", "tangent", "adjoint", "step", "bptt", "previous", "following"}
    assert names == checked | {"following_first", "recurrent_product"}


@pytest.mark.parametrize("layout", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_flops_are_counted_as_those_of_nn_rnn(layout):
    x = torch.randn(5, 3, 8)
    counts = []
    for cls in (fusedrnn.RNN, torch.nn.RNN):
        rnn = cls(8, 16, **layout)
        with FlopCounterMode(display=False) as flops:
            rnn(x)[0].sum().backward()
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1]


def test_jit_trace_of_a_trained_module():
    rnn, x = fusedrnn.RNN(3, 4), torch.randn(5, 2, 3)
    traced = torch.jit.trace(rnn, (x,))
    other = torch.randn_like(x)
    torch.testing.assert_close(traced(other), rnn(other))


def test_meta_tensors_give_shapes():
    h, h_n = fusedrnn.RNN(3, 4, device="meta")(torch.empty(5, 2, 3, device="meta"))
    assert (h.shape, h_n.shape) == ((5, 2, 4), (1, 2, 4))


@pytest.mark.parametrize("name", ["w_ih", "w_hh", "b_ih", "h0", "reset", "alpha"])
def test_a_tensor_on_another_device_is_an_error(name):
    arguments = {**Case(alpha=True).arguments(), "reset": torch.zeros(5, 3, dtype=torch.bool)}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(RuntimeError, match="must be on cpu, got meta"):
        fusedrnn.rnn(**arguments)


BAD = [
    ({"x": torch.randn(4)}, "x must be [T, B, size], got [4]"),
    ({"x": torch.randn(0, 3, 4)}, "Expected sequence length to be larger than 0 in RNN"),
    ({"x": torch.randn(5, 3, 9)}, "w_ih must have sizes [7, 9], got [7, 4]"),
    ({"w_ih": torch.randn(7, 4).double()}, "w_ih must be Float, got Double"),
    ({"w_hh": torch.randn(7, 6)}, "w_hh must have sizes [7, 7], got [7, 6]"),
    ({"b_ih": torch.randn(6)}, "b_ih must have sizes [7], got [6]"),
    ({"h0": torch.randn(2, 7)}, "h0 must have sizes [3, 7], got [2, 7]"),
    ({"reset": torch.ones(5, 3)}, "reset must be bool, got Float"),
    ({"reset": torch.ones(5, 2).bool()}, "reset must have sizes [5, 3], got [5, 2]"),
    ({"alpha": 1.5}, "alpha must be in (0, 1], got 1.5"),
    ({"alpha": torch.ones(3)}, "with H = 7 and T = 5, B = 3, got [3]"),
    ({"batch_sizes": torch.tensor([3])}, "packed x must be [N, size], got [5, 3, 4]"),
    ({"x": torch.randn(5, 4), "batch_sizes": torch.tensor([1, 4])}, "non-increasing, got [1, 4]"),
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


@pytest.mark.parametrize("alpha", [0, -0.5, 1.0001, torch.nan])
def test_alpha_as_a_number_is_above_0_and_at_most_1(alpha):
    with pytest.raises(ValueError) as error:
        fusedrnn.rnn(**Case().arguments(), alpha=alpha)
    assert str(error.value) == f"fusedrnn: alpha must be in (0, 1], got {alpha}"


@pytest.mark.parametrize("sizes", [[3, 2, 0], [5, 0], [5, -1]])
def test_batch_sizes_are_positive(sizes):
    arguments = {**Case().arguments(), "x": torch.randn(5, 4, dtype=torch.float64)}
    del arguments["h0"]
    with pytest.raises(RuntimeError, match="batch_sizes must be positive"):
        fusedrnn.rnn(**arguments, batch_sizes=torch.tensor(sizes))


def test_an_unknown_nonlinearity_is_named():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'cosh'. Select from tanh, relu, "):
        fusedrnn.rnn(**Case().arguments(), nonlinearity="cosh")
