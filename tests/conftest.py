"""Shared by all tests: one thread and one seed per test, and the accuracy rule."""

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

# No deadline: a first call compiles, and the machine may be shared. CI uses the same examples each
# time, so that a failure there can be reproduced locally.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def one_seed_one_thread() -> Iterator[None]:
    """Reset the seed, and use one thread, because pytest-xdist workers already fill the cores.

    A test of threads sets its own number.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)  # a test may have changed it


@pytest.fixture(params=ENGINES, ids=str)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Run the test on every engine, with new tensors on the device of that engine."""
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
    """Print how many tests the CUDA engine passed, so that skipped tests are noticed."""
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

    `reference(*args)` is torch's result in the dtype of `args`. With every floating-point tensor in
    `args` cast to float64, it is the truth. `floor` is an additional tolerance, in eps of the
    largest value, because torch may happen to be exact.
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
    """Say how a result breaks the rule of :func:`assert_as_accurate_as_torch`, or return ""."""
    if truth.numel() == 0:
        return ""
    our_error = (our.detach().double() - truth.detach()).abs().max().item()
    torch_error = (their.detach().double() - truth.detach()).abs().max().item()
    granted = floor * torch.finfo(our.dtype).eps * max(truth.detach().abs().max().item(), 1e-30)
    if our_error <= slack * torch_error + granted:
        return ""
    return f"error {our_error:.3g} > {slack} * {torch_error:.3g} + {granted:.3g}"
