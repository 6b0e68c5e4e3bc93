"""What all tests share: one thread and one seed for each, and the rule of accuracy."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from engines import ENGINES, OLD, Engine
from hypothesis import settings
from torch import Tensor

# No deadline: a first call compiles, and the machine may be shared. Under CI the same examples
# each time: what fails there must fail again at the desk.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def one_seed_one_thread() -> Iterator[None]:
    """Workers of pytest-xdist fill the cores already. A test of threads sets its own number."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)  # a test that changed it must not reach the next


@pytest.fixture(params=ENGINES, ids=str)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Every engine: the test runs on each, with new tensors on its device."""
    seed = zlib.crc32(request.node.nodeid.encode())
    with request.param.installed(seed):
        yield request.param


@pytest.hookimpl(tryfirst=True)  # before -m "not slow" takes effect
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        engine = getattr(getattr(item, "callspec", None), "params", {}).get("engine")
        if not isinstance(engine, Engine) or engine.kind != "emulated":
            continue
        if engine == OLD or item.get_closest_marker("slow_emulated"):
            item.add_marker("slow")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests the CUDA engine passed, which a skip would hide."""
    passed = Counter(
        name
        for report in terminalreporter.stats.get("passed", [])
        for name in re.findall(r"(?<=[\[-])(?:emulated|cuda)(?::\w+)*", report.nodeid)
    )
    if passed:
        each = ", ".join(f"{count} {name}" for name, count in passed.items())
        terminalreporter.write_line(f"passed by the CUDA engine: {each}")


def as_tensors(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def assert_as_accurate_as_torch(
    ours: Tensor | Sequence[Tensor],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    args: Sequence[Any],
    slack: float = 2.0,
    floor: float = 4.0,
) -> None:
    """Our error against float64 is at most `slack` times torch's own error in the same dtype.

    `reference(*args)` is what torch computes in the dtype of `args`, and, with every floating
    tensor among them cast to float64, the truth. `floor` is what is granted besides, in eps of
    the largest value: where torch happens to be exact we need not be.
    """
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    theirs, truths = as_tensors(reference(*args)), as_tensors(reference(*wide))
    found = as_tensors(ours)
    assert len(found) == len(truths), f"{len(found)} results instead of {len(truths)}"
    for i, (our, their, truth) in enumerate(zip(found, theirs, truths)):
        assert our.shape == truth.shape, f"result {i}: {our.shape} instead of {truth.shape}"
        assert our.dtype == their.dtype, f"result {i}: {our.dtype} instead of {their.dtype}"
        excess = inaccuracy(our, their, truth, slack, floor)
        assert not excess, f"result {i}: {excess}"


def inaccuracy(our: Tensor, their: Tensor, truth: Tensor, slack: float, floor: float) -> str:
    """What breaks the rule of :func:`assert_as_accurate_as_torch` in one result, or nothing."""
    if truth.numel() == 0:
        return ""
    our_error = (our.detach().double() - truth.detach()).abs().max().item()
    torch_error = (their.detach().double() - truth.detach()).abs().max().item()
    granted = floor * torch.finfo(our.dtype).eps * max(truth.detach().abs().max().item(), 1e-30)
    if our_error <= slack * torch_error + granted:
        return ""
    return f"error {our_error:.3g} > {slack} * {torch_error:.3g} + {granted:.3g}"
