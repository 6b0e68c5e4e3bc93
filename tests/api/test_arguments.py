"""Wrong arguments: each raises one clear sentence, and none crashes."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import fuzz_ops
import numpy as np
import pytest
import torch
from cases import Case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import fusedrnn

OPS = torch.ops.fusedrnn
PACKED = Case(lengths=(3, 2, 1))

# complex64 runs as the plain loop, which must raise the same errors.
pytestmark = pytest.mark.filterwarnings("ignore:fusedrnn. no kernel for torch.complex64")
each_path = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)


def call(case: Case, **changes: Any) -> tuple[Tensor, Tensor]:
    arguments = {**case.arguments(), **case.flags(), **changes}
    return fusedrnn.rnn(**arguments)


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(5, 4), torch.ones(3, 4)], layout=layout)


# ---- fusedrnn.rnn

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [[[0.5]]]}, TypeError, "x must be a tensor, got list"),
    ({"x": np.ones((5, 3, 4))}, TypeError, "x must be a tensor, got ndarray"),
    ({"x": None}, TypeError, "x must be a tensor, got None"),
    ({"x": torch.ones(5, 3, 4, dtype=torch.int64)}, TypeError, "x must be floating-point or"),
    ({"x": torch.ones(5, 3, 4).to_sparse()}, TypeError, "x must be a dense tensor, got torch.spa"),
    ({"x": torch.ones(5, 3, 4).to_mkldnn()}, TypeError, "x must be a dense tensor, got torch._mk"),
    ({"x": nested(torch.strided)}, TypeError, "x must be a dense tensor, got a nested one"),
    ({"x": nested(torch.jagged)}, TypeError, "x must be a dense tensor, got a nested one"),
    ({"w_ih": np.ones((7, 4))}, TypeError, "w_ih must be a tensor, got ndarray"),
    ({"w_hh": None}, TypeError, "w_hh must be a tensor, got None"),
    ({"w_hh": None, "alpha": 0.5}, TypeError, "w_hh must be a tensor, got None"),
    ({"w_hh": torch.eye(7).to_sparse()}, TypeError, "w_hh must be a dense tensor, got torch.spa"),
    ({"h0": [0.0] * 7}, TypeError, "h0 must be a tensor, got list"),
    ({"reset": [[True] * 3] * 5}, TypeError, "reset must be a tensor, got list"),
    ({"batch_sizes": [3, 2]}, TypeError, "batch_sizes must be a tensor, got list"),
    ({"nonlinearity": torch.tanh}, TypeError, "nonlinearity must be one of tanh, relu, "),
    ({"nonlinearity": None}, TypeError, "leaky_relu, elu, got None"),
    ({"nonlinearity": "cosh"}, ValueError, "Unknown nonlinearity 'cosh'. Select from tanh, relu,"),
    ({"reverse": "yes"}, TypeError, "reverse must be a bool, got str"),
    ({"w_hh": torch.tensor(1.0)}, RuntimeError, "w_hh must be [H, H], got []"),
    ({"w_hh": torch.tensor(1.0), "alpha": 0.5}, RuntimeError, "w_hh must be [H, H], got []"),
    ({"x": torch.ones(5, 4)}, RuntimeError, "x must be [T, B, size], got [5, 4]"),
    ({"x": torch.ones(0, 3, 4)}, RuntimeError, "Expected sequence length to be larger than 0"),
    ({"w_ih": torch.ones(7, 9)}, RuntimeError, "w_ih must have sizes [7, 4], got [7, 9]"),
    ({"b_hh": torch.ones(1)}, RuntimeError, "b_hh must have sizes [7], got [1]"),
    ({"h0": torch.ones(1, 7)}, RuntimeError, "h0 must have sizes [3, 7], got [1, 7]"),
    ({"h0": torch.ones(3, 7).double()}, RuntimeError, "h0 must be "),
    ({"h0": torch.ones(3, 7, device="meta")}, RuntimeError, "must be on cpu, got meta"),
    ({"reset": torch.ones(5, 1).bool()}, RuntimeError, "reset must have sizes [5, 3], got [5, 1]"),
    ({"reset": torch.ones(5, 3)}, RuntimeError, "reset must be "),
    ({"alpha": "0.5"}, TypeError, "alpha must be a number or a tensor, got str"),
    ({"alpha": 0.5j}, TypeError, "alpha must be a number or a tensor, got complex"),
    ({"alpha": np.full(7, 0.5)}, TypeError, "alpha must be a number or a tensor, got ndarray"),
    ({"alpha": torch.full((7,), 0.5j)}, TypeError, "alpha must be real, got torch.complex64"),
    ({"alpha": torch.ones(7).to_sparse()}, TypeError, "alpha must be a dense tensor, got torch.sp"),
    ({"alpha": torch.ones(3)}, ValueError, "alpha must be a number or a tensor [], [H], [T, B], "),
    ({"alpha": 0}, ValueError, "alpha must be in (0, 1], got 0"),
    ({"alpha": float("nan")}, ValueError, "alpha must be in (0, 1], got nan"),
    (
        {"alpha": 1e-50},
        ValueError,
        "alpha must be in (0, 1], got 1e-50, which rounds to 0 in torch.",
    ),
    *(
        ({"alpha": torch.tensor([0.5] * 6 + [value])}, ValueError, "alpha must be in [0, 1], got ")
        for value in (-1.0, 1.5, 5.0, float("nan"), float("inf"))
    ),
    ({"alpha": torch.tensor(2.0)}, ValueError, "alpha must be in [0, 1], got 2"),
]


def in_dtype(name: str, value: Any, dtype: torch.dtype) -> Any:
    """Cast a float32 tensor to the dtype under test, so that only the intended fault remains."""
    right_already = name in ("alpha", "reset") or not isinstance(value, Tensor)
    if right_already or value.dtype != torch.float32 or value.layout == torch._mkldnn:
        return value
    return value.to(dtype)


@each_path
@pytest.mark.parametrize(("change", "error", "text"), WRONG, ids=[text for _, _, text in WRONG])
def test_a_wrong_argument_is_named(change, error, text, dtype):
    change = {name: in_dtype(name, value, dtype) for name, value in change.items()}
    with pytest.raises(error, match=re.escape(text)) as raised:
        call(Case(dtype=dtype), **change)
    assert type(raised.value) is error
    assert str(raised.value).startswith(("fusedrnn: ", "Unknown nonlinearity", "Expected sequence"))


@each_path
@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (torch.tensor([1, 2, 3]), "batch_sizes must be positive and non-increasing, got [1, 2, 3]"),
        (torch.tensor([5, -3]), "batch_sizes must be positive and non-increasing, got [5, -3]"),
        (torch.tensor([3, 2]), "batch_sizes sum to 5, but packed x has 6 rows"),
        (torch.tensor([], dtype=torch.int64), "Expected sequence length to be larger than 0"),
        (torch.tensor([3.0, 2.0, 1.0]), "batch_sizes must be a dense 1-D int64 CPU tensor, got "),
        (torch.tensor(6), "batch_sizes must be a dense 1-D int64 CPU tensor, got "),
    ],
    ids=str,
)
def test_wrong_batch_sizes_are_named(sizes, text, dtype):
    with pytest.raises(RuntimeError, match=re.escape(text)):
        call(PACKED.with_(dtype=dtype), batch_sizes=sizes)


@pytest.mark.parametrize(
    "number", [1, True, 0.25, Fraction(1, 4), Decimal("0.25"), np.float32(0.25), np.array(0.25)]
)
@each_path
def test_alpha_may_be_any_type_of_number(number, dtype):
    case = Case(dtype=dtype)
    assert_close(call(case, alpha=number), call(case, alpha=torch.tensor(float(number))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_smallest_alpha_is_the_smallest_number_of_the_dtype(dtype):
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    case = Case(dtype=dtype)
    call(case, alpha=least)
    if dtype != torch.float64:  # a Python float cannot be smaller than that of float64
        with pytest.raises(ValueError, match="which rounds to 0 in"):
            call(case, alpha=least / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_bounds_of_alpha_are_allowed(dtype):
    case = Case(dtype=dtype)
    assert_close(call(case, alpha=torch.ones(7)), call(case))
    h, _ = call(case, alpha=torch.zeros(7))
    assert_close(h, case.arguments()["h0"].expand_as(h))
    with pytest.raises(ValueError, match=r"got 1\.0+\d"):
        call(case, alpha=torch.tensor(1 + 2 * torch.finfo(dtype).eps, dtype=dtype))


def test_only_the_elements_of_a_strided_alpha_are_checked():
    alpha = torch.tensor([0.5, 7.0]).repeat(7)
    call(Case(dtype=torch.float32), alpha=alpha[::2])
    with pytest.raises(ValueError, match="got 7"):
        call(Case(dtype=torch.float32), alpha=alpha[1::2])


def test_values_of_alpha_on_meta_are_not_read():
    arguments = {k: v.to("meta") for k, v in Case().arguments().items()}
    h, _ = fusedrnn.rnn(**arguments, alpha=torch.full((7,), 5.0, device="meta"))
    assert h.shape == (5, 3, 7)


@pytest.mark.filterwarnings("ignore:fusedrnn. no kernel for torch.float8_e5m2")
def test_float8_arguments_raise_the_same_errors():
    arguments = {k: v.to(torch.float8_e5m2) for k, v in Case().arguments().items()}
    arguments["w_hh"] = arguments["w_hh"][0]
    with pytest.raises(RuntimeError, match=r"w_hh must be \[H, H\], got \[7\]"):
        fusedrnn.rnn(**arguments)


def test_modules_name_a_tensor_that_is_not_dense():
    rnn = fusedrnn.RNN(4, 7)
    with pytest.raises(TypeError, match="fusedrnn: x must be a dense tensor, got torch.sparse_coo"):
        rnn(torch.ones(5, 3, 4).to_sparse())


def test_cause_of_a_type_error_is_not_shown():
    """Otherwise the dispatcher's message would be printed above ours."""
    with pytest.raises(TypeError) as raised:
        call(Case(), nonlinearity=torch.tanh)
    assert raised.value.__suppress_context__


# ---- the ops


def arguments_of(op: str, batch_sizes: Tensor) -> tuple[Any, ...]:
    series, states, w_hh = torch.randn(6, 7), torch.randn(3, 7), torch.randn(7, 7)
    layout = (None, batch_sizes, "tanh", "rate", False, None)
    if op == "activation":
        x, w_ih = torch.randn(6, 4), torch.randn(7, 4)
        return (x, w_ih, None, None, states, None, w_hh, None, None, *layout)
    if op == "tangent":
        return (series, None, None, states, None, series, w_hh, None, *layout[:-1], True)
    return (series, None, None, states, series, w_hh, None, *layout, True, True)


@pytest.mark.parametrize("op", ["activation", "tangent", "adjoint"])
def test_batch_sizes_on_meta_beside_cpu_tensors_are_an_error(op):
    sizes = torch.tensor([3, 2, 1], device="meta")
    with pytest.raises(RuntimeError, match="batch_sizes must be on cpu, got meta"):
        getattr(OPS, op)(*arguments_of(op, sizes))


@pytest.mark.parametrize("op", ["previous", "following"])
def test_batch_sizes_on_meta_beside_a_cpu_series_are_an_error(op):
    first = (None,) if op == "previous" else ()
    sizes = torch.tensor([3, 2, 1], device="meta")
    with pytest.raises(RuntimeError, match="1-D int64 CPU tensor, got MetaLongType"):
        getattr(OPS, op)(torch.randn(6, 7), *first, None, sizes, False)


@pytest.mark.parametrize("on_meta", [False, True])
def test_batch_sizes_beside_tensors_on_meta(on_meta):
    sizes = torch.tensor([3, 2, 1], device="meta" if on_meta else "cpu")
    arguments = [
        a.to("meta") if torch.is_tensor(a) and a is not sizes else a
        for a in arguments_of("activation", sizes)
    ]
    h, h_n, _ = OPS.activation(*arguments)
    assert (h.shape, h_n.shape) == ((6, 7), (3, 7))
    assert OPS.previous(h, h_n, None, sizes, False).shape == (6, 7)


def test_batch_sizes_are_on_the_cpu_beside_fake_cuda_tensors():
    given = arguments_of("activation", torch.tensor([3, 2, 1]))
    for device in ("cpu", "cuda"):
        with FakeTensorMode():
            fake = [torch.empty(a.shape, device="cuda") if torch.is_tensor(a) else a for a in given]
            fake[10] = torch.empty(3, dtype=torch.int64, device=device)
            if device == "cpu":
                assert OPS.activation(*fake)[0].device.type == "cuda"
            else:
                with pytest.raises(RuntimeError, match="batch_sizes must be on cpu, got cuda"):
                    OPS.activation(*fake)


def bptt(**changes: Any) -> Any:
    series = torch.randn(5, 3, 7)
    arguments = {
        "g": series, "d": None, "f": None, "g_n": None, "x": torch.randn(5, 3, 4),
        "w_ih": torch.randn(7, 4), "b_ih": torch.randn(7), "b_hh": torch.randn(7),
        "h0": torch.randn(3, 7), "v0": None, "w_hh": torch.randn(7, 7),
        "alpha": torch.full((7,), 0.5), "reset": None, "batch_sizes": None, "h": series.clone(),
        "saved": series.clone(), "nonlinearity": "tanh", "form": "rate", "reverse": False,
        "grad_clip": None, "wanted": fuzz_ops.ALL_WANTED,
    }  # fmt: skip
    return OPS.bptt(*{**arguments, **changes}.values())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"saved": None}, "saved must be given with alpha, elu, softplus and potential, got None"),
        (
            {"saved": None, "alpha": None, "nonlinearity": "elu"},
            "saved must be given with alpha, elu, softplus and potential, got None",
        ),
        ({"saved": torch.randn(5, 3, 1)}, "saved must have sizes [5, 3, 7], got [5, 3, 1]"),
        ({"alpha": None}, "alpha must be given for its gradient, got None"),
        ({"w_ih": None, "x": torch.randn(5, 3, 7)}, "w_ih must be given for its gradient, got Non"),
        ({"w_ih": None}, "x must have sizes [5, 3, 7], got [5, 3, 4]"),
        ({"w_ih": torch.randn(4, 7)}, "w_ih must have sizes [7, 4], got [4, 7]"),
        ({"x": torch.randn(5, 2, 4)}, "x must have sizes [5, 3, 4], got [5, 2, 4]"),
        ({"x": torch.randn(5, 3, 4).double()}, "x must be Float, got Double"),
        ({"h0": torch.randn(1, 7)}, "h0 must have sizes [3, 7], got [1, 7]"),
        ({"h": torch.randn(5, 7)}, "h must be [T, B, size], got [5, 7]"),
        ({"g": torch.randn(4, 3, 7)}, "g must have sizes [5, 3, 7], got [4, 3, 7]"),
    ],
)
def test_bptt_checks_what_it_reads(change, text):
    assert len(bptt()) == 9
    with pytest.raises(RuntimeError, match=re.escape(text)):
        bptt(**change)


SERIES, ROWS = torch.randn(5, 3, 7), torch.randn(9, 7)
COMPOSITE: list[tuple[str, tuple[Any, ...], str]] = [
    (
        "previous",
        (torch.randn(9, 7), None, None, torch.tensor([12, -3]), False),
        "sum to more than",
    ),
    ("previous", (torch.randn(9, 7), None, None, torch.tensor([4, 5]), False), "non-increasing"),
    ("previous", (torch.randn(9, 7), None, None, torch.tensor([5, 3]), False), "has 9 rows"),
    ("previous", (SERIES, torch.randn(7), None, None, False), "first must be [B, H], got [7]"),
    ("previous", (SERIES, torch.randn(2, 7), None, None, False), "first must have sizes [3, 7]"),
    ("previous", (SERIES[:0], None, None, None, False), "length to be larger than 0"),
    ("following", (SERIES, torch.ones(5, 1).bool(), None, False), "reset must have sizes [5, 3]"),
    ("following", (SERIES, torch.ones(5, 3), None, False), "reset must be bool, got Float"),
    ("following", (SERIES[0], None, None, False), "series must be [T, B, size], got [3, 7]"),
    ("following_first", (SERIES, None, None, False, 2), "batch must be 3, got 2"),
    ("following_first", (SERIES[0], None, torch.tensor([2, 1]), True, 3), "batch must be 2, got 3"),
    ("recurrent_product", (SERIES[:4], SERIES, None, None, None, False), "delta must have sizes"),
    ("recurrent_product", (SERIES[0], SERIES, None, None, None, False), "delta must be [T, B, si"),
    (
        "recurrent_product",
        (SERIES.double(), SERIES, None, None, None, False),
        "delta must be Float",
    ),
]


@pytest.mark.parametrize(("op", "given", "text"), COMPOSITE, ids=[text for *_, text in COMPOSITE])
def test_composite_ops_check_their_arguments(op, given, text):
    with pytest.raises(RuntimeError, match=re.escape(text)):
        getattr(OPS, op)(*given)


def test_batch_sizes_that_cannot_be_read_corrupt_no_memory():
    """batch_sizes cannot be read inside the wrappers of torch.func.

    With wrong values, repeat_interleave would write past the end of its result.
    """
    series, wrong = torch.randn(9, 7), torch.tensor([1000, -3])
    torch.func.grad(lambda s, sizes: OPS.previous(s, None, None, sizes, False).sum())(series, wrong)
    right = torch.tensor([4, 3, 2])
    found = torch.func.vjp(lambda s: OPS.previous(s, None, None, right, False), series)[0]
    assert_close(found, OPS.previous(series, None, None, right, False))


@pytest.mark.parametrize("first", range(0, 1000, 200))
def test_random_arguments_crash_no_op(first):
    outcomes = fuzz_ops.run(range(first, first + 200))
    assert outcomes["right"] > 20
    assert outcomes["RuntimeError"] > 20
