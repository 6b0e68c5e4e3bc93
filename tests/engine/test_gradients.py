"""Derivatives of every order against finite differences and the reference, in float64."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from cases import Calls, Case
from engines import CPU, DIFFERENTIATED, ENGINES
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn
from fusedrnn import reference

SMALL = Case(T=3, B=2, I=2, H=3)
FORMS = [
    SMALL.with_(form=form, alpha=alpha, alpha_varies=varies, **others)
    for form in ("rate", "potential", "inside")
    for alpha, varies, others in (
        (False, False, {"state_input": True, "nonlinearity": "softplus"}),
        (True, False, {"reset": True, "reset_to": True, "reverse": True}),
        (True, True, {"lengths": (3, 1, 1), "reset": True, "state_input": True}),
    )
]
CASES = [
    SMALL.with_(reverse=reverse, lengths=lengths, reset=reset, alpha=alpha)
    for reverse in (False, True)
    for lengths in (None, (3, 1, 1))
    for reset in (False, True)
    for alpha in (False, True)
] + [
    SMALL.with_(T=1),
    SMALL.with_(B=0),
    SMALL.with_(h0=False),
    SMALL.with_(h0=False, bias=False, reverse=True),
    SMALL.with_(h0=False, lengths=(3, 2), reverse=True),
    *(
        SMALL.with_(nonlinearity=name, alpha=alpha)
        for name in reference.NONLINEARITIES
        for alpha in (False, True)
    ),
    *FORMS,
]


def function_of(case: Case, rnn=fusedrnn.rnn):
    names, flags = list(case.arguments()), case.flags()
    return lambda *tensors: rnn(**dict(zip(names, tensors)), **flags)


@pytest.mark.parametrize("engine", DIFFERENTIATED, ids=str, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.slow_emulated
def test_first_derivatives(engine, case):
    tensors = tuple(case.arguments(requires_grad=True).values())
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(function_of(case), tensors, check_forward_ad=True, **batched)


@pytest.mark.parametrize("engine", DIFFERENTIATED, ids=str, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.slow_emulated
def test_second_derivatives(engine, case):
    tensors = tuple(case.arguments(requires_grad=True).values())
    assert gradgradcheck(
        function_of(case), tensors, check_fwd_over_rev=True, check_batched_grad=True
    )


# More rows than the chunk of delta that the CPU engine keeps, so that sums span several chunks.
LONG = [
    Case(T=300, B=3, I=5, H=33),
    Case(T=300, B=3, I=5, H=33, reverse=True, reset=True, h0=False),
    Case(T=3, B=300, I=33, H=17, reset=True),
    Case(T=600, B=1, I=1, H=65, bias=False),
    Case(lengths=(300,) * 3 + (200, 17, 1), I=3, H=31, reset=True),
    Case(lengths=(270, 269, 30), I=40, H=8, reverse=True, alpha=True, form="potential"),
]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("engine", CPU, ids=str, indirect=True)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_gradients_of_many_rows_match_the_reference(engine, case, threads):
    torch.set_num_threads(threads)
    tensors = list(case.arguments(requires_grad=True).values())

    def gradients(rnn) -> list[torch.Tensor]:
        value = sum(y.sin().sum() for y in function_of(case, rnn)(*tensors))
        return list(torch.autograd.grad(value, tensors))

    torch.testing.assert_close(
        gradients(fusedrnn.rnn), gradients(reference.rnn), rtol=1e-10, atol=1e-10
    )


def derivatives(case: Case, rnn, order: int) -> list[torch.Tensor]:
    """Replace the value by its squared gradient ``order`` times, and return the last gradients."""
    tensors = list(case.arguments(requires_grad=True).values())
    value = sum(y.sin().sum() for y in function_of(case, rnn)(*tensors))
    for _ in range(order):
        gradients = torch.autograd.grad(value, tensors, create_graph=True)
        value = sum(g.square().sum() for g in gradients)
    return list(torch.autograd.grad(value, tensors))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        SMALL.with_(reset=True, alpha=True, lengths=(3, 1)),
        *FORMS,
        # enough units for some on each side of every kink, and some with a slope of 0
        *(Case(nonlinearity=name, alpha=True) for name in reference.NONLINEARITIES),
    ],
    ids=str,
)
def test_derivatives_of_higher_order(case, order):
    torch.testing.assert_close(
        derivatives(case, fusedrnn.rnn, order), derivatives(case, reference.rnn, order)
    )


@pytest.mark.parametrize("engine", DIFFERENTIATED, ids=str, indirect=True)
@pytest.mark.parametrize("nonlinearity", ["tanh", "softplus"])
def test_derivatives_of_the_potential(engine, nonlinearity):
    case = SMALL.with_(form="potential", alpha=True, reset=True, nonlinearity=nonlinearity)
    tensors = tuple(case.arguments(requires_grad=True).values())
    f = function_of(case, lambda **given: fusedrnn.rnn(**given, return_potential=True)[::2])
    expected = function_of(case, lambda **given: reference.rnn(**given, return_potential=True)[::2])
    torch.testing.assert_close(f(*tensors), expected(*tensors))
    assert gradcheck(f, tensors, check_forward_ad=True)
    assert gradgradcheck(f, tensors, check_fwd_over_rev=True)


BIGGER = [
    Case(T=20, B=9, I=17, H=70),
    Case(T=20, B=9, I=17, H=70, reverse=True, reset=True),
    Case(T=30, B=1, I=5, H=129, alpha=True),
    Case(T=1, B=33, I=5, H=31),
    Case(lengths=(30,) * 5 + (20,) * 9 + (19, 2, 2, 1), H=33),
    Case(lengths=(30,) * 5 + (20,) * 9 + (19, 2, 2, 1), H=33, reverse=True, reset=True, alpha=True),
    Case(T=20, B=9, I=17, H=70, form="potential", alpha=True, reverse=True),
    Case(T=20, B=9, I=17, H=70, form="inside", alpha=True, alpha_varies=True, reset=True),
    Case(T=9, B=2, H=129, form="potential", nonlinearity="softplus", reset=True, state_input=True),
]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("case", BIGGER, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_match_the_reference(case, dtype):
    def gradients(rnn, dtype):
        tensors = list(case.with_(dtype=dtype).arguments(requires_grad=True).values())
        h, h_n = function_of(case, rnn)(*tensors)
        weights = torch.linspace(-1, 1, h.numel(), dtype=dtype).view(h.shape)
        return torch.autograd.grad((h * weights).sum() + h_n.sum(), tensors)

    torch.testing.assert_close(
        gradients(fusedrnn.rnn, dtype), gradients(reference.rnn, torch.float64),
        check_dtype=False, **({"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}),
    )  # fmt: skip


def before_a_guard_page(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that ends where a page without read permission begins."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    end = -(-size // page) * page
    memory = mmap.mmap(-1, end + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + end), page, 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=end - size)
    return flat.view(tensor.shape).copy_(tensor.detach())


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.kind == "cpu"], ids=str, indirect=True)
@pytest.mark.parametrize(
    "case",
    [
        Case(reset=True),
        Case(T=20, B=9, I=17, H=70, dtype=torch.float32),
        Case(lengths=(5, 3, 3, 1), reset=True, alpha=True),
        Case(lengths=(5, 3, 3, 1), reset=True, reverse=True, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_nothing_is_read_past_the_end_of_an_argument(engine, case):
    """A read past the end would be a segmentation fault."""
    arguments, flags = case.arguments(), case.flags()
    arguments = {name: before_a_guard_page(t).requires_grad_() for name, t in arguments.items()}
    if case.reset:
        flags["reset"] = before_a_guard_page(flags["reset"])
    h, h_n = fusedrnn.rnn(**arguments, **flags)
    torch.autograd.grad(h.sum() + h_n.sum(), list(arguments.values()))


@pytest.mark.parametrize("only", ["h", "h_n"])
@pytest.mark.parametrize("case", [Case(), Case(T=1), Case(T=1, B=60)], ids=str)
def test_a_loss_may_use_one_output_alone(case, only):
    tensors = list(case.arguments(requires_grad=True).values())
    found, expected = (
        torch.autograd.grad(function_of(case, rnn)(*tensors)[only == "h_n"].sum(), tensors)
        for rnn in (fusedrnn.rnn, reference.rnn)
    )
    torch.testing.assert_close(found, expected)


def test_a_second_backward_gives_the_same_gradients():
    tensors = list(SMALL.arguments(requires_grad=True).values())
    h, _ = function_of(SMALL)(*tensors)
    first = torch.autograd.grad(h.sum(), tensors, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(h.sum(), tensors), first, rtol=0, atol=0)


def test_gradients_of_a_function_share_no_memory():
    tensors = list(SMALL.arguments(requires_grad=True).values())
    h, _ = function_of(SMALL)(*tensors)
    gradients = torch.autograd.grad(h.sum(), tensors)
    assert len({g.data_ptr() for g in gradients}) == len(gradients)


@pytest.mark.parametrize(
    ("wanted", "products"), [("x", 1), ("w_ih", 1), ("w_hh", 2), ("b_ih", 0), ("h0", 0)]
)
def test_gradients_that_are_not_required_are_not_computed(wanted, products):
    arguments = Case().arguments()
    arguments[wanted].requires_grad_()
    with Calls() as calls:
        fusedrnn.rnn(**arguments)[0].sum().backward()
    assert calls.names.count("activation") == 1
    assert calls.names.count("adjoint") == 1
    # two for w_hh: the product with h0 is separate, so that the states need not be copied
    assert sum(calls.names.count(name) for name in ("mm", "addmm", "bmm")) == products


class ZerosGiven(TorchDispatchMode):
    """Records the ops of this library that receive an all-zero tensor."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if func.namespace == "fusedrnn" and not all(t.any() for t in tensors):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_missing_gradients_are_not_replaced_by_zeros(order):
    tensors = list(SMALL.arguments(requires_grad=True).values())
    with ZerosGiven() as zeros:
        value = function_of(SMALL)(*tensors)[1].sum()
        for _ in range(order):
            (gradient,) = torch.autograd.grad(value, tensors[:1], create_graph=True)
            value = gradient.square().sum()
    assert not zeros.names


def test_the_ops_that_run_do_not_depend_on_the_length():
    def ops(T):
        arguments = Case(T=T).arguments(requires_grad=True)
        with Calls() as calls:
            fusedrnn.rnn(**arguments)[0].sum().backward()
        return calls.names

    assert ops(8) == ops(640)


def saved_bytes(rnn, x) -> int:
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rnn(x)
    return sum(saved.values())


@pytest.mark.parametrize("hx", [False, True])
def test_only_input_output_weights_and_h0_are_saved(hx):
    T, B, I, H = 50, 8, 16, 32
    rnn = fusedrnn.RNN(I, H)
    x = torch.randn(T, B, I)
    h0 = torch.randn(1, B, H) if hx else None
    saved = saved_bytes(lambda x: rnn(x, h0), x)
    assert saved == 4 * (T * B * I + T * B * H + H * I + H * H + (B * H if hx else 0))


def test_gradients_share_no_memory():
    """Callers may scale gradients in place, for example to clip them."""
    given = Case(T=9).arguments(requires_grad=True)
    h, _ = fusedrnn.rnn(**given)
    found = torch.autograd.grad(h.sin().sum(), list(given.values()))
    assert len({g.untyped_storage().data_ptr() for g in found}) == len(given)
