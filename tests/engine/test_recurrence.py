"""The engines' forward pass against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ALL, Case, oracle
from hypothesis import given
from hypothesis import strategies as st

import fusedrnn
from fusedrnn import reference

pytestmark = pytest.mark.usefixtures("engine")


def check(case: Case) -> None:
    arguments = case.arguments()
    h, h_n = fusedrnn.rnn(**arguments, **case.flags())
    torch.testing.assert_close((h, h_n), oracle(case, arguments), check_dtype=False)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_matches_the_reference(case):
    check(case)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_float32_matches_the_reference(case):
    check(case.with_(dtype=torch.float32))


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=9).map(
    lambda found: tuple(sorted(found, reverse=True))
)


@given(
    st.builds(
        Case,
        T=st.integers(1, 30),
        B=st.integers(0, 20),
        I=st.integers(1, 40),
        H=st.integers(1, 80),
        nonlinearity=st.sampled_from(list(reference.NONLINEARITIES)),
        reverse=st.booleans(),
        lengths=st.none() | lengths,
        reset=st.booleans(),
        alpha=st.booleans(),
        alpha_varies=st.booleans(),
        form=st.sampled_from(["rate", "potential", "inside"]),
        state_input=st.booleans(),
        bias=st.booleans(),
        h0=st.booleans(),
    )
)
def test_random_problems_match_the_reference(case):
    check(case)


@pytest.mark.parametrize("case", [Case(), Case(lengths=(5, 3, 1)), Case(alpha=True)], ids=str)
def test_recurrence_takes_u_in_place_of_the_input_product(case):
    arguments = case.arguments()
    u = torch.randn(*arguments["x"].shape[:-1], case.H, dtype=torch.float64)
    h0, w_hh = arguments["h0"], arguments["w_hh"]
    flags = {**case.flags(), "alpha": arguments.get("alpha")}
    torch.testing.assert_close(
        fusedrnn.recurrence(u, h0, w_hh, **flags), reference.recurrence(u, h0, w_hh, **flags)
    )


@pytest.mark.parametrize("missing", ["b_ih", "b_hh"])
def test_one_of_the_two_biases_may_be_missing(missing):
    arguments = Case().arguments()
    del arguments[missing]
    torch.testing.assert_close(fusedrnn.rnn(**arguments), reference.rnn(**arguments))


def test_alpha_may_be_a_number_or_a_scalar_tensor():
    arguments = Case().arguments()
    expected = reference.rnn(**arguments, alpha=0.3)
    torch.testing.assert_close(fusedrnn.rnn(**arguments, alpha=0.3), expected)
    scalar = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(fusedrnn.rnn(**arguments, alpha=scalar), expected)


def test_an_empty_batch_has_no_rows():
    case = Case(B=0)
    h, h_n = fusedrnn.rnn(**case.arguments())
    assert h.shape == (case.T, 0, case.H)
    assert h_n.shape == (0, case.H)


def test_any_strides(engine):
    case = Case(T=6, B=5, I=8, H=20)
    dense = case.arguments()
    batch_first = {**dense, "x": dense["x"].transpose(0, 1).contiguous().transpose(0, 1)}
    features_apart = {k: torch.stack([v, v], -1)[..., 0] for k, v in dense.items()}
    transposed = {k: v.mT.contiguous().mT if v.dim() > 1 else v for k, v in dense.items()}
    # Our kernels must multiply the inputs: the order of sums in torch's GEMM may depend on strides.
    with replace(engine, fuse_input=True).installed():
        expected = fusedrnn.rnn(**dense)
        for arguments in (batch_first, features_apart, transposed):
            assert not all(v.is_contiguous() for v in arguments.values())
            torch.testing.assert_close(fusedrnn.rnn(**arguments), expected, rtol=0, atol=0)


def test_the_last_state_shares_no_memory_with_the_output():
    h, h_n = fusedrnn.rnn(**Case().arguments())
    torch.testing.assert_close(h_n, h[-1], rtol=0, atol=0)
    h_n.zero_()
    assert (h[-1] != 0).all()


def test_nan_and_inf_propagate_as_in_the_reference():
    for nonlinearity in reference.NONLINEARITIES:
        case = Case(T=6, B=4, nonlinearity=nonlinearity)
        arguments = case.arguments()
        arguments["x"][2, 0] = torch.nan
        arguments["x"][2, 1] = torch.inf
        arguments["x"][2, 2] = -torch.inf
        torch.testing.assert_close(
            fusedrnn.rnn(**arguments, **case.flags()), oracle(case, arguments), equal_nan=True
        )


def test_a_nan_in_the_weights_reaches_every_state():
    arguments = Case(h0=False).arguments()
    arguments["w_hh"].fill_(torch.nan)
    h, _ = fusedrnn.rnn(**arguments)
    assert h.isnan().all()


def test_a_reset_discards_a_nan():
    case = Case(T=4, B=2)
    arguments = case.arguments()
    arguments["h0"].fill_(torch.nan)
    reset = torch.zeros(4, 2, dtype=torch.bool)
    reset[1] = True
    h, _ = fusedrnn.rnn(**arguments, reset=reset)
    assert h[0].isnan().all()
    assert h[1:].isfinite().all()


def test_a_reset_starts_a_new_sequence():
    arguments = Case(T=7, h0=False).arguments()
    reset = torch.zeros(7, 3, dtype=torch.bool)
    reset[4] = True
    h, _ = fusedrnn.rnn(**arguments, reset=reset)
    x = arguments.pop("x")
    parts = [fusedrnn.rnn(x[:4], **arguments)[0], fusedrnn.rnn(x[4:], **arguments)[0]]
    torch.testing.assert_close(h, torch.cat(parts), rtol=0, atol=1e-15)
