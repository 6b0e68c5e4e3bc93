"""Large layers, long sequences and many runs on a GPU; small problems on the emulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from cases import Case
from engines import EMULATED, ENGINES, Engine
from torch import Tensor

import fusedrnn
from fusedrnn import reference

ON_GPU = [engine for engine in ENGINES if engine.kind == "cuda"]
LOW = (torch.bfloat16, torch.float16)
ALL = (torch.float32, *LOW)


def params(gpu: Sequence[Case], emulated: Case, regime: str | None = None) -> list[object]:
    """Pair `gpu` with the GPU engines, and `emulated` with the emulated ones (of one regime)."""
    pairs = [(engine, case) for engine in ON_GPU for case in gpu]
    pairs += [(engine, emulated) for engine in EMULATED]
    return [
        pytest.param(engine, case, id=f"{engine} {case}")
        for engine, case in pairs
        if regime in (None, engine.regime)
    ]


def results(rnn: Callable[..., tuple[Tensor, Tensor]], case: Case) -> Callable[..., list[Tensor]]:
    """Return a function that computes the results of `rnn` and their gradients."""
    names = list(case.arguments())

    def of(*tensors: Tensor) -> list[Tensor]:
        given = [t.detach().requires_grad_() for t in tensors]
        h, h_n = rnn(**dict(zip(names, given)), **case.flags())
        return [h.detach(), h_n.detach(), *torch.autograd.grad(h.sin().sum() + h_n.sum(), given)]

    return of


def check(engine: Engine, case: Case, dtype: torch.dtype) -> None:
    case = case.with_(dtype=dtype)
    with engine.installed():
        tensors = list(case.arguments().values())
        found = results(fusedrnn.rnn, case)(*tensors)
        assert_as_accurate_as_torch(found, results(reference.rnn, case), tensors)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize(
    ("engine", "case"),
    params(
        [Case(T=40, B=32, I=64, H=H) for H in (256, 384, 512, 768, 1024)],
        Case(T=4, B=9, I=16, H=70),
    ),
)
def test_large_layers(engine, case, dtype):
    check(engine, case, dtype)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize(
    ("engine", "case"),
    params(
        [Case(T=2000, B=4, I=8, H=64), Case(T=1000, B=3, I=16, H=300, reset=True, alpha=True)],
        Case(T=150, B=2, H=18),
    ),
)
def test_long_sequences(engine, case, dtype):
    check(engine, case, dtype)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize(
    ("engine", "case"),
    params(
        [Case(T=20, B=B, I=16, H=H) for B, H in ((130, 1024), (300, 512), (128, 2048))],
        Case(T=3, B=70, H=40),
        regime="grid",
    ),
)
def test_several_groups_of_rows(engine, case, dtype):
    check(engine, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("engine", "case"),
    params(
        [Case(T=64, B=16, I=32, H=256), Case(T=16, B=64, I=64, H=1024)],
        Case(T=3, B=9, H=40),
    ),
)
def test_every_run_has_the_same_bits(engine, case, dtype):
    case = case.with_(dtype=dtype)
    with engine.installed():
        tensors = list(case.arguments().values())
        run = results(fusedrnn.rnn, case)
        first = run(*tensors)
        differences = torch.zeros((), dtype=torch.int64)  # on the device: no run must wait
        for _ in range(1000 if engine.kind == "cuda" else 2):
            for wanted, found in zip(first, run(*tensors)):
                differences += (wanted != found).sum()
        assert differences == 0
