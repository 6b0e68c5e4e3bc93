"""Fixtures and hooks of all tests: each test has one thread and one seed."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import ENGINES, OLD, Engine
from hypothesis import settings

from fusedrnn import _C

# No deadline: a first call compiles, and the machine may be shared. CI uses the same examples each
# time, so that a failure there can be reproduced locally.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def one_seed_one_thread() -> Iterator[None]:
    """Reset the seed, and use one thread, because pytest-xdist workers already fill the cores.

    A test of threads sets its own number, which may exceed the number of cores.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    _C.use_cores(1024)
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
