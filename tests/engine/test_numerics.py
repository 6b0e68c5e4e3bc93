"""The accuracy of the engines: nonlinearities and low precision."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from cases import Case
from engines import Engine
from pairs import pair
from torch.nn import functional as F

import fusedrnn
from fusedrnn import reference


def apply(nonlinearity: str, z: torch.Tensor) -> torch.Tensor:
    """Apply the engine's nonlinearity elementwise, through a recurrence whose weight is 0."""
    u = z.view(1, -1, 64)
    return fusedrnn.recurrence(u, None, u.new_zeros(64, 64), nonlinearity=nonlinearity)[0].view(-1)


def floats(first: int, last: int, stride: int) -> torch.Tensor:
    """Return floats with the bits first, first + stride, ...; their count is a multiple of 64."""
    count = (last - first) // stride // 64 * 64
    return torch.arange(count, dtype=torch.int32).mul(stride).add(first).view(torch.float32)


def ulps(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return the errors in units in the last place of float32; ``exact`` is float64."""
    _, exponent = torch.frexp(exact)
    return (found.double() - exact).abs() * torch.exp2(24.0 - exponent)


TINY, TEN = 0x20000000, 0x41200000  # bits of 1e-19 and 10.0


def stride(engine: Engine) -> int:
    """Return the stride between the floats to test; the emulator takes µs for each float."""
    return 13999 if engine.kind == "emulated" else 137


def check_tanh(z: torch.Tensor) -> None:
    found = apply("tanh", z)
    assert ulps(found, z.double().tanh()).max() <= 2
    assert torch.equal(apply("tanh", -z), -found)


def test_tanh_is_within_2_ulp_and_odd(engine):
    check_tanh(floats(TINY, TEN, stride(engine)))


@pytest.mark.slow
def test_tanh_of_every_float_is_within_2_ulp_and_odd():
    for first in range(TINY, TEN, 1 << 23):
        check_tanh(floats(first, min(first + (1 << 23), TEN), 1))


def test_tanh_of_float64_is_within_2_ulp(engine):
    z = floats(TINY, TEN, stride(engine)).double()
    found, exact = apply("tanh", z), z.tanh()
    _, exponent = torch.frexp(exact)
    assert ((found - exact).abs() * torch.exp2(53.0 - exponent)).max() <= 3  # 1 is torch's error


def test_tanh_at_the_ends_of_the_range_equals_torchs(engine):
    z = torch.tensor([0.0, 1e-45, -1e-45, 9.1, 1e30, torch.inf, -torch.inf, torch.nan]).repeat(8)
    torch.testing.assert_close(apply("tanh", z), z.tanh(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "softplus", "elu"])
def test_nonlinearities_computed_from_exp_match_torch(engine, nonlinearity):
    # beyond 20, torch's softplus returns z itself, which is off by 2e-9
    z = torch.linspace(-20, 20, 64 * (50 if engine.kind == "emulated" else 1000))
    torch.testing.assert_close(
        apply(nonlinearity, z).double(), reference.NONLINEARITIES[nonlinearity](z.double()),
        rtol=4e-7, atol=2e-9,
    )  # fmt: skip


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "softplus", "elu"])
def test_nonlinearities_computed_from_exp_at_the_ends_of_the_range(engine, nonlinearity):
    z = torch.tensor([87.5, 88.5, 95, 110, torch.inf], dtype=torch.float32)
    z = torch.cat([z, -z, torch.tensor([torch.nan, 0, -1e-45])]).repeat(64)
    found, exact = apply(nonlinearity, z), reference.NONLINEARITIES[nonlinearity](z.double())
    smallest = 2.0**-149
    torch.testing.assert_close(
        found.double(), exact.float().double(), rtol=4e-7, atol=smallest, equal_nan=True
    )
    assert (found[z == -torch.inf] == (-1 if nonlinearity == "elu" else 0)).all()


def derivatives(function, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and second derivatives of an elementwise function at each z."""
    z = z.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
    if not first.requires_grad:  # a constant
        return first, torch.zeros_like(z)
    (second,) = torch.autograd.grad(first.sum(), z, allow_unused=True, materialize_grads=True)
    return first.detach(), second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nonlinearity", list(reference.NONLINEARITIES))
def test_slopes_are_as_accurate_as_torch_in_saturation_too(engine, nonlinearity, dtype):
    # the offset of 0.31 keeps z away from the kinks of the nonlinearities
    z = (torch.linspace(-24, 24, 64 * (16 if engine.kind == "emulated" else 256)) + 0.31).to(dtype)
    function = reference.NONLINEARITIES[nonlinearity]
    ours, theirs = derivatives(lambda z: apply(nonlinearity, z), z), derivatives(function, z)
    if nonlinearity == "softplus":  # torch's default returns z itself beyond 20
        function = functools.partial(F.softplus, threshold=40)
    exact = derivatives(function, z.double())
    for our, their, truth in zip(ours, theirs, exact):
        # the largest error among 64 neighbours, whose slopes are of similar size
        our_error, their_error, size = (
            t.view(-1, 64).abs().amax(1)
            for t in (our.double() - truth, their.double() - truth, truth)
        )
        eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        granted = 4 * eps * size.clamp(min=smallest)
        if nonlinearity in ("tanh", "retanh"):
            granted += 2 * eps  # the slope is 1 - h * h, and h is within 2 ulp
        assert (our_error <= 2 * their_error + granted).all()


def leaky_step(
    k: float, z: float, alpha: float, nonlinearity: str, dtype=torch.float32, w: float = 0
) -> float:
    """Run one leaky step of one unit, from the state k and with the input z."""
    h, _ = fusedrnn.recurrence(
        torch.full((1, 1, 1), z, dtype=dtype), torch.full((1, 1), k, dtype=dtype),
        torch.full((1, 1), w, dtype=dtype), nonlinearity=nonlinearity, alpha=alpha,
    )  # fmt: skip
    return h.item()


def test_a_leak_neither_cancels_nor_overflows(engine):
    assert leaky_step(1e8, 1.0, 1.0, "relu") == 1
    assert leaky_step(torch.inf, 1.0, 0.5, "relu", w=1) == torch.inf
    assert leaky_step(3e38, -3e38, 0.5, "identity") == 0
    for dtype, k in ((torch.float32, 100.0), (torch.float16, 1e4), (torch.bfloat16, 1e4)):
        alpha = torch.tensor(0.999, dtype=dtype).item()
        exact = (1 - alpha) * k + alpha * torch.tensor(0.5, dtype=torch.float64).tanh().item()
        found = leaky_step(k, 0.5, alpha, "tanh", dtype)
        assert found == pytest.approx(exact, rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nonlinearity", list(reference.NONLINEARITIES))
def test_alpha_of_one_gives_the_bits_of_no_leak(engine, nonlinearity, dtype):
    case = Case(T=4, B=3, H=5, dtype=dtype, nonlinearity=nonlinearity, reset=True)
    arguments = case.arguments()
    arguments["x"][:, 0] = 0  # with the biases of -0.0 below: -0.0 must stay -0.0
    arguments["b_ih"].fill_(-0.0)
    arguments["b_hh"].fill_(-0.0)
    arguments["h0"][1] = 1e30 if dtype != torch.float64 else 1e300
    names = list(arguments)

    def run(alpha):
        given = [t.detach().requires_grad_() for t in arguments.values()]
        h, h_n = fusedrnn.rnn(**dict(zip(names, given)), **case.flags(), alpha=alpha)
        return h.detach(), h_n.detach(), *torch.autograd.grad(h.sum() + h_n.sum(), given)

    for leaky, plain in zip(run(1.0), run(None)):
        torch.testing.assert_close(leaky, plain, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(leaky.signbit() & ~leaky.isnan(), plain.signbit() & ~plain.isnan())


@pytest.mark.parametrize(
    ("T", "B", "I", "H", "num_layers"),
    [(24, 128, 1, 128, 2), (24, 1, 1, 128, 2), (10, 4, 20, 300, 1), (100, 16, 10, 50, 1)],
)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.slow_emulated
def test_float32_outputs_are_as_close_to_float64_as_torchs(
    engine, T, B, I, H, num_layers, nonlinearity
):
    ours, theirs = pair(I, H, num_layers, nonlinearity)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(T, B, I)
    truth = exact(x.double())[0]
    our_error, their_error = ((m(x)[0] - truth).square().mean().sqrt() for m in (ours, theirs))
    assert our_error <= 1.25 * their_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(T=50, B=8, I=16, H=65),
        Case(T=1, B=3, I=5, H=17),
        Case(T=20, B=2, H=129, alpha=True, reset=True, nonlinearity="sigmoid"),
        Case(lengths=(9, 8, 8, 5, 1, 1), reverse=True, I=33),
        Case(T=20, B=2, H=129, form="potential", alpha=True, reset=True),
        Case(T=20, B=8, I=16, H=65, form="inside", alpha=True, state_input=True),
    ],
    ids=str,
)
def test_low_precision_is_as_accurate_as_torch(engine, case, dtype):
    arguments = case.with_(dtype=dtype).arguments()
    names = list(arguments)

    def run(rnn):
        return lambda *tensors: rnn(**dict(zip(names, tensors)), **case.flags())[0]

    found = run(fusedrnn.rnn)(*arguments.values())
    assert found.dtype == dtype
    assert_as_accurate_as_torch(found, run(reference.rnn), tuple(arguments.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["rate", "potential", "inside"])
def test_low_precision_gradients_are_as_accurate_as_torch(engine, form, dtype):
    case = Case(T=20, B=8, I=16, H=65, form=form, alpha=form != "rate")
    arguments = case.with_(dtype=dtype).arguments(requires_grad=True)
    names = list(arguments)

    def gradients(rnn):
        def of(*tensors):
            tensors = [t.detach().requires_grad_() for t in tensors]
            h, _ = rnn(**dict(zip(names, tensors)), **case.flags())
            return torch.cat([g.flatten() for g in torch.autograd.grad(h.sum(), tensors)])

        return of

    assert_as_accurate_as_torch(
        gradients(fusedrnn.rnn)(*arguments.values()), gradients(reference.rnn),
        tuple(arguments.values()),
    )  # fmt: skip


@pytest.mark.slow_emulated
def test_every_16_bit_number_is_widened_and_narrowed_correctly(engine):
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        z = numbers.view(dtype)
        torch.testing.assert_close(apply("identity", z), z, rtol=0, atol=0, equal_nan=True)
        wide = torch.randn(1 << 16) * torch.exp2(torch.randint(-26, 18, (1 << 16,)).float())
        half, rest = wide.to(dtype), (wide - wide.to(dtype).float()).to(dtype)
        # u + x @ w is rounded once, like a sum of two 16-bit numbers in torch
        total = fusedrnn.rnn(
            half.view(1, -1, 1), torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype),
            h0=None, nonlinearity="identity",
        )[0].view(-1)  # fmt: skip
        torch.testing.assert_close(total, half, rtol=0, atol=0, equal_nan=True)
        both = torch.stack([half, rest], -1).view(1, -1, 2)
        total = fusedrnn.rnn(
            both, torch.ones(1, 2, dtype=dtype), torch.zeros(1, 1, dtype=dtype),
            nonlinearity="identity",
        )[0].view(-1)  # fmt: skip
        torch.testing.assert_close(
            total, (half.float() + rest.float()).to(dtype), rtol=0, atol=0, equal_nan=True
        )
