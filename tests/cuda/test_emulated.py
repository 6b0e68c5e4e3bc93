"""Checks of the CUDA engine on the emulator, other than those of its results."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from engines import EMULATED, OLD, Engine, emulated

import fusedrnn

FREE = Engine("emulated", "h100")
PACKED = Case(lengths=(5, 3, 3, 1), reset=True, alpha=True, H=33)


def all_passes(case: Case) -> list[torch.Tensor]:
    """Return the results of activation, adjoint and tangent."""
    tensors = list(case.arguments(requires_grad=True).values())
    h, h_n = fusedrnn.rnn(**dict(zip(case.arguments(), tensors)), **case.flags())
    gradients = torch.autograd.grad(h.sum() + h_n.sum(), tensors, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)
    return [h, h_n, *gradients, *again]


@pytest.mark.parametrize("engine", EMULATED, ids=str)
def test_the_regime_that_was_asked_for_runs(engine):
    library, arguments = emulated(engine.name), Case().arguments()
    before = library.runs()
    with engine.installed():
        fusedrnn.rnn(**arguments)
    after = library.runs()
    fusedrnn.rnn(**arguments)  # on the CPU engine again
    assert library.runs() == after
    (regime,) = {name for name in after if after[name] > before[name]}
    assert engine.regime in (None, regime)


@pytest.mark.parametrize("case", [Case(), PACKED, PACKED.with_(dtype=torch.float32)], ids=str)
@pytest.mark.parametrize("engine", EMULATED, ids=str)
def test_a_call_neither_synchronises_nor_allocates(engine, case):
    """Only tensors are allocated, so the call can be captured in a CUDA graph."""
    library = emulated(engine.name)
    with engine.installed():
        all_passes(case)  # the first call queries the properties of the device
        library.reset_counters()
        all_passes(case)
    counters = library.counters()
    assert counters.pop("launches") >= 3
    quiet = ("failed_launches", "synchronizations", "copies", "allocations", "frees")
    assert {name: counters[name] for name in quiet} == dict.fromkeys(quiet, 0)


@pytest.mark.parametrize("engine", EMULATED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_order_of_threads(engine, dtype):
    case = Case(T=4, B=9, H=70, dtype=dtype)
    found = []
    for seed in range(3):
        with engine.installed(seed):
            found.append(all_passes(case))
    for again in found[1:]:
        torch.testing.assert_close(again, found[0], rtol=0, atol=0)


def test_a_failed_launch_names_the_plan():
    with FREE.installed():
        emulated(FREE.name).fail_next_launch(1)
        with pytest.raises(RuntimeError, match=r"fusedrnn: .*launch failed: .*plan was: .* regime"):
            fusedrnn.rnn(**Case().arguments())
        fusedrnn.rnn(**Case().arguments())  # the next launch succeeds


@pytest.mark.parametrize("regime", ["block", "cluster", "grid"])
def test_tf32_only_where_torch_allows_it(regime):
    case = Case(T=2, B=64, I=16, H=64, dtype=torch.float32)  # large enough for tensor cores
    exact = all_passes(case.with_(dtype=torch.float64))
    error = {}
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            with Engine("emulated", "tiny", regime).installed():
                found = all_passes(case)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        error[allowed] = [
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact)
        ]
    assert max(error[False]) < 2e-6
    assert 1e-5 < max(error[True]) < 1e-2


@pytest.mark.slow  # needs another build
def test_bfloat16_on_a_device_without_support_for_it():
    case = PACKED.with_(dtype=torch.bfloat16)
    with OLD.installed():
        found = fusedrnn.rnn(**case.arguments(), **case.flags())
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, fusedrnn.rnn(**case.arguments(), **case.flags()))


@pytest.mark.parametrize("lengths", [(40, 1), (9,) * 3 + (7,) * 16 + (2,) * 60], ids=str)
def test_batch_groups_that_begin_late_do_not_hang(lengths):
    """In a packed backward, blocks send nothing in the steps before their group's first row."""
    case, engine = Case(lengths=lengths, H=7), Engine("emulated", "h100", "cluster")
    found = []
    for seed in range(8):
        with engine.installed(seed):
            found.append(all_passes(case))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", EMULATED, ids=str)
def test_a_nan_stays_in_its_row(engine, dtype):
    """Rows are adjacent, and the padding of K is memory that held other values."""
    arguments = Case(T=5, B=37, H=45, dtype=dtype).arguments()
    arguments["x"][1, ::9] = torch.nan
    with engine.installed():
        h, _ = fusedrnn.rnn(**arguments)
    assert h[0].isfinite().all()
    ill = torch.arange(37) % 9 == 0
    assert h[1:, ill].isnan().all()
    assert h[:, ~ill].isfinite().all()


@pytest.mark.parametrize("size", [7, 130])
def test_blocks_without_units_change_no_result(size):
    """The number of blocks in a cluster is a power of two, so some blocks may have no units."""
    case = Case(T=4, H=size, dtype=torch.bfloat16)
    expected = all_passes(case)
    for seed in range(3):
        with Engine("emulated", "h100", "cluster").installed(seed):
            for found, wanted in zip(all_passes(case), expected):
                assert (found - wanted).abs().max() <= 0.1 * wanted.abs().max()
