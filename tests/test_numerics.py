"""How accurate the engines are: the nonlinearities, and low precision."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from conftest import assert_as_accurate_as_torch
from engines import Engine

import fusedrnn
from fusedrnn import reference


def apply(nonlinearity: str, z: torch.Tensor) -> torch.Tensor:
    """The engine's nonlinearity of each number, by a recurrence whose weight is 0."""
    u = z.view(1, -1, 64)
    return fusedrnn.recurrence(u, None, u.new_zeros(64, 64), nonlinearity=nonlinearity)[0].view(-1)


def floats(first: int, last: int, stride: int) -> torch.Tensor:
    """The positive floats whose bits are first, first + stride, ..., a multiple of 64 of them."""
    count = (last - first) // stride // 64 * 64
    return torch.arange(count, dtype=torch.int32).mul(stride).add(first).view(torch.float32)


def ulps(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Errors in units of the last place of float32, of numbers in float64."""
    _, exponent = torch.frexp(exact)
    return (found.double() - exact).abs() * torch.exp2(24.0 - exponent)


TINY, TEN = 0x20000000, 0x41200000  # bits of 1e-19 and 10.0


def stride(engine: Engine) -> int:
    """Every so many floats: few on an engine that takes microseconds for each."""
    return 13999 if engine.kind == "emulated" else 137


def check_tanh(z: torch.Tensor) -> None:
    found = apply("tanh", z)
    assert ulps(found, z.double().tanh()).max() <= 2
    assert torch.equal(apply("tanh", -z), -found)


def test_tanh_is_within_2_ulp_and_odd(engine):
    check_tanh(floats(TINY, TEN, stride(engine)))


@pytest.mark.slow
def test_tanh_of_every_float():
    for first in range(TINY, TEN, 1 << 23):
        check_tanh(floats(first, min(first + (1 << 23), TEN), 1))


def test_tanh_of_float64_is_within_2_ulp(engine):
    z = floats(TINY, TEN, stride(engine)).double()
    found, exact = apply("tanh", z), z.tanh()
    _, exponent = torch.frexp(exact)
    assert ((found - exact).abs() * torch.exp2(53.0 - exponent)).max() <= 3  # torch's has 1 of them


def test_tanh_of_the_ends(engine):
    z = torch.tensor([0.0, 1e-45, -1e-45, 9.1, 1e30, torch.inf, -torch.inf, torch.nan]).repeat(8)
    torch.testing.assert_close(apply("tanh", z), z.tanh(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "softplus", "elu"])
def test_what_is_made_of_exp(engine, nonlinearity):
    # softplus: torch takes z itself beyond 20, which is 2e-9 off
    z = torch.linspace(-20, 20, 64 * (50 if engine.kind == "emulated" else 1000))
    torch.testing.assert_close(
        apply(nonlinearity, z).double(), reference.NONLINEARITIES[nonlinearity](z.double()),
        rtol=4e-7, atol=2e-9,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(T=50, B=8, I=16, H=65),
        Case(T=1, B=3, I=5, H=17),
        Case(T=20, B=2, H=129, alpha=True, keep=True, nonlinearity="sigmoid"),
        Case(lengths=(9, 8, 8, 5, 1, 1), reverse=True, I=33),
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
def test_low_precision_gradients_are_as_accurate_as_torch(engine, dtype):
    case = Case(T=20, B=8, I=16, H=65)
    arguments = case.with_(dtype=dtype).arguments(requires_grad=True)
    names = list(arguments)

    def gradients(rnn):
        def of(*tensors):
            tensors = [t.detach().requires_grad_() for t in tensors]
            h, _ = rnn(**dict(zip(names, tensors)))
            return torch.cat([g.flatten() for g in torch.autograd.grad(h.sum(), tensors)])

        return of

    assert_as_accurate_as_torch(
        gradients(fusedrnn.rnn)(*arguments.values()), gradients(reference.rnn),
        tuple(arguments.values()),
    )  # fmt: skip


@pytest.mark.slow_emulated
def test_every_16_bit_number_is_widened_and_narrowed_right(engine):
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        z = numbers.view(dtype)
        torch.testing.assert_close(apply("identity", z), z, rtol=0, atol=0, equal_nan=True)
        wide = torch.randn(1 << 16) * torch.exp2(torch.randint(-26, 18, (1 << 16,)).float())
        half, rest = wide.to(dtype), (wide - wide.to(dtype).float()).to(dtype)
        # u + x @ w in one rounding: the sum of two 16-bit numbers, as torch rounds it
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
