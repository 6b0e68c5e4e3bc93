"""explain() reports what the planners decide for the problem that a call really runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest
import torch
from gpus import H100
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import _C
from fusedrnn.explain import _Call, _cost, _plan_cuda, plans


@pytest.mark.parametrize("module", [fusedrnn.RNN, nn.RNN])
def test_different_layers_are_described_and_equal_ones_only_once(
    module: type[nn.RNNBase],
) -> None:
    rnn = module(10, 20, num_layers=3, bidirectional=True, dropout=0.5)
    x = torch.randn(7, 3, 10)
    text = fusedrnn.explain(rnn, x)
    assert type(rnn) is module  # unchanged: replace() was applied to a copy
    lines = text.split("\n")
    assert lines[0].startswith("RNN(10, 20, num_layers=3, dropout=0.5, bidirectional=True)")
    assert "torch.float32 on cpu" in lines[0]
    assert [line for line in lines[1:] if not line.startswith(" ")] == [
        "layer 0, in each direction: T 7, B 3, I 10, H 20",
        "each of layers 1 to 2, in each direction: T 7, B 3, I 40, H 20",
    ]
    assert sum("backward:" in line for line in lines) == 2
    assert "layer 0: T 7, B 3, I 10, H 20" in fusedrnn.explain(module(10, 20), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_a_step_costs_on_a_cpu_is_measured(dtype: torch.dtype) -> None:
    rnn = fusedrnn.LeakyRNN(10, 20, 2, alpha=0.5, form="potential", dtype=dtype)
    text = fusedrnn.explain(rnn, torch.randn(7, 3, 10, dtype=dtype))
    size = 8 if dtype == torch.float64 else 4
    pattern = (
        r"  weights:  (\S+) KB, fit in L1 \(\d+KB\)\n"
        r"  a step:   (\S+) multiplications; measured now: (\S+) µs, (\d+)% of the rate of a large "
        r"GEMM; likely bound by "
    )
    found = re.findall(pattern, text)
    assert [(float(kb), int(count.replace(",", ""))) for kb, count, *_ in found] == [
        (pytest.approx(size * 20 * inputs / 1024, rel=5e-3), 3 * 20 * inputs)
        for inputs in (10 + 20, 20 + 20)
    ]
    assert all(float(time) > 0 for _, _, time, _ in found)


@pytest.mark.parametrize(
    ("caches", "rate", "place", "bound"),
    [
        ([("L1 (1KB)", 1024), ("L2 (9KB)", 9216)], 1e9, "fit in L2 (9KB)", "latency: each step"),
        ([("L1 (1KB)", 1024), ("L3 (9KB)", 9216)], 1e9, "fit in L3 (9KB)", "reading the weights"),
        ([("L1 (1KB)", 1024)], 1e9, "too large for any cache", "reading the weights"),
        ([("L1 (9KB)", 9216)], 1e-9, "fit in L1 (9KB)", "arithmetic"),
    ],
    ids=["L2", "L3", "memory", "L1"],
)
def test_the_cache_of_the_weights_and_the_bound_of_a_step_are_named(
    monkeypatch: pytest.MonkeyPatch,
    caches: list[tuple[str, int]],
    rate: float,
    place: str,
    bound: str,
) -> None:
    """``rate`` is the speed of a large GEMM, in multiplications per microsecond."""
    module = sys.modules["fusedrnn.explain"]
    monkeypatch.setattr(module, "_caches", lambda: caches)
    monkeypatch.setattr(module, "_gemm_rate", lambda *_: rate)
    text = fusedrnn.explain(fusedrnn.RNN(32, 32), torch.zeros(5, 1, 32))
    assert f"weights:  8 KB, {place}" in text
    assert f"likely bound by {bound}" in text


def test_the_gemm_of_comparison_has_the_dtype_in_which_the_engine_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["fusedrnn.explain"]
    monkeypatch.setattr(module, "_best", lambda run: run().element_size())
    rate = module._gemm_rate.__wrapped__  # without the cache
    sizes = [512**3 / rate(dtype, 1) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert sizes == [8, 4, 4]


def test_explain_draws_no_random_numbers_and_leaves_no_gradients() -> None:
    rnn = fusedrnn.RNN(3, 4, num_layers=2, dropout=0.5)
    before = torch.get_rng_state()
    fusedrnn.explain(rnn, torch.zeros(2, 1, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in rnn.parameters())


def test_no_backward_where_no_gradient_is_wanted() -> None:
    rnn, x = fusedrnn.RNN(3, 4), torch.zeros(2, 1, 3)
    with torch.no_grad():
        assert "backward:" not in fusedrnn.explain(rnn, x)
    assert "backward:" not in fusedrnn.explain(rnn.requires_grad_(False), x)
    assert "backward:" in fusedrnn.explain(rnn, x.requires_grad_())


@pytest.fixture(params=_C.build_info()["isa_compiled"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.build_info()["isa_chosen"]
    if not _C.use_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _C.use_isa(before)


def test_threads_and_instruction_set(isa: str) -> None:
    torch.set_num_threads(2)
    text = fusedrnn.explain(fusedrnn.RNN(128, 1024), torch.zeros(100, 1, 128))
    assert f"{isa} kernel, 2 threads; hidden units split among 2 threads" in text
    text = fusedrnn.explain(fusedrnn.RNN(128, 256), torch.zeros(100, 16, 128))
    assert f"{isa} kernel, 2 threads; batch split among 2 groups" in text


def test_a_limit_of_threads_by_the_cores_is_named() -> None:
    torch.set_num_threads(3)
    _C.use_cores(2)
    text = fusedrnn.explain(fusedrnn.RNN(128, 1024), torch.zeros(100, 1, 128))
    assert (
        "kernel, 2 threads; at most 2 of torch's 3: one for each usable core; hidden units" in text
    )


def test_packed_and_low_precision_input_is_described() -> None:
    rnn = fusedrnn.RNN(8, 10).bfloat16()
    x = pack_sequence([torch.zeros(5, 8).bfloat16(), torch.zeros(3, 8).bfloat16()])
    text = fusedrnn.explain(rnn, x)
    assert "T 5, B 2, packed, I 8, H 10" in text
    assert "computed in float32" in text


@pytest.mark.parametrize("module", [fusedrnn.RNNCell, nn.RNNCell])
def test_cells_run_as_torchs_own_or_in_the_engine(module: type[nn.RNNCell]) -> None:
    small = module(8, 10)
    assert "torch's own cell" in fusedrnn.explain(small, torch.zeros(1, 8))
    assert type(small) is module
    large = module(128, 1024)
    assert "T 1, B 100, I 128, H 1024" in fusedrnn.explain(large, torch.zeros(100, 128))


def test_with_gradients_larger_cells_are_torchs_own() -> None:
    cell, x = fusedrnn.RNNCell(256, 256), torch.zeros(4, 256)
    assert "torch's own cell" in fusedrnn.explain(cell, x)
    with torch.no_grad():
        assert "torch's own cell" not in fusedrnn.explain(cell, x)


def test_the_reason_for_a_plain_loop_is_given() -> None:
    rnn = fusedrnn.RNN(3, 4, dtype=torch.complex64)
    text = fusedrnn.explain(rnn, torch.zeros(2, 1, 3, dtype=torch.complex64))
    assert text.endswith("a plain loop over time: no kernel for torch.complex64 tensors on cpu")
    assert "tensors on meta hold no data" in fusedrnn.explain(
        fusedrnn.RNN(3, 4, device="meta"), torch.zeros(2, 1, 3, device="meta")
    )


def test_autocast_is_taken_into_account() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert "computed in float32" in fusedrnn.explain(fusedrnn.RNN(3, 4), torch.zeros(2, 1, 3))


def test_plans_are_those_of_the_planner() -> None:
    (found,) = plans(fusedrnn.RNN(64, 64), torch.zeros(100, 1, 64))
    problem = {"T": 100, "B": 1, "I": 64, "H": 64, "threads": torch.get_num_threads()}
    assert found["forward"].items() >= _C.plan_cpu(**problem).items()
    assert found["backward"].items() >= _C.plan_cpu(adjoint=True, **problem).items()


def test_the_code_that_computes_the_gradient_gemms_is_named() -> None:
    x = torch.zeros(9, 3, 1024)
    assert "gradient GEMMs included" in fusedrnn.explain(fusedrnn.RNN(1024, 16), x)
    text = fusedrnn.explain(fusedrnn.RNN(1024, 1024), x)
    truth = _C.plan_cpu(adjoint=True, T=9, B=3, I=1024, H=1024, threads=1)
    assert ("then one torch GEMM" in text) is not truth["gemms"]


def test_cuda_plans_are_described() -> None:
    call = _Call(torch.zeros(100, 16, 128, dtype=torch.bfloat16), T=100, B=16, I=128, H=256)
    for adjoint in (False, True):
        plan = _plan_cuda(call, adjoint, H100)
        assert plan["regime"] in ("step", "block", "cluster", "grid")
        assert plan["microseconds"] > 0
        assert "H100" in plan["words"]
    call = _Call(torch.zeros(100, 1, 512), T=100, B=1, I=512, H=512)
    plan = _plan_cuda(call, False, H100)
    (cost,) = _cost(call, plan)
    microseconds = plan["microseconds"] + plan["input_microseconds"]
    assert (
        f"a step:   524,288 multiplications; predicted, not measured: {microseconds:.3g} µs" in cost
    )
    words = plan["words"]
    assert "one GEMM multiplies the inputs of all steps before" in words


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda() -> None:
    rnn = fusedrnn.RNN(8, 10, device="cuda")
    text = fusedrnn.explain(rnn, torch.zeros(5, 2, 8, device="cuda"))
    assert "regime" in text if _C.has_cuda else "a plain loop over time" in text


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="module must be an RNN or an RNN cell, got LSTM"):
        fusedrnn.explain(nn.LSTM(3, 4), torch.zeros(2, 1, 3))
    model = nn.Sequential(nn.RNN(3, 4))
    with pytest.raises(TypeError, match="got Sequential"):
        fusedrnn.explain(model, torch.zeros(2, 1, 3))
    assert type(model[0]) is nn.RNN


def test_explain_runs_no_hooks_and_accepts_parametrizations():
    rnn = torch.nn.utils.parametrizations.weight_norm(torch.nn.RNN(3, 4), "weight_hh_l0")
    rnn.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    assert "layer 0" in fusedrnn.explain(rnn, torch.randn(5, 2, 3))
