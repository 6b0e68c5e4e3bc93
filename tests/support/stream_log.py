"""Stand-ins for torch.cuda's streams, which need no GPU and record the order of calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedrnn import _C, directions


class Log:
    """Records what was called on which stream."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.recorded: dict[str, set[int]] = {"here": set(), "side": set()}  # storages
        self.local = threading.local()
        self.sides: list[Stream] = []

    @property
    def current(self) -> Stream:
        return getattr(self.local, "current", HERE)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current
        self.local.current = stream
        try:
            yield
        finally:
            self.local.current = before

    def make(self, device: torch.device) -> Stream:
        self.sides.append(Stream("side", self))
        return self.sides[-1]

    def record(self, tensor: Tensor, stream: Stream) -> None:
        self.recorded[stream.name].add(tensor.untyped_storage().data_ptr())

    def watch(self, name: str, function: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            what = name + (" reverse" if kwargs.get("reverse") else "")
            self.calls.append((what, self.current.name))
            return function(*args, **kwargs)

        return watched


class Stream:
    def __init__(self, name: str, log: Log | None = None) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        log = self.log or other.log
        assert log is not None
        log.calls.append((self.name, "waits for", other.name))


HERE = Stream("here")
FORK, JOIN = ("side", "waits for", "here"), ("here", "waits for", "side")


@pytest.fixture
def stream_log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Make CPU tensors pass for CUDA tensors and replace the streams."""
    log = Log()
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(_C, "has_cuda", True)
    monkeypatch.setattr(Tensor, "record_stream", lambda *args: log.record(*args))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: log.current)
    monkeypatch.setattr(torch.cuda, "stream", log.stream)
    monkeypatch.setattr(torch.cuda, "Stream", log.make)
    monkeypatch.setattr(directions, "_streams", directions._Streams())
    return log


on_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.has_cuda), reason="needs a CUDA GPU and its engine"
)


def churn(*sizes: int, dtype: torch.dtype = torch.float64) -> None:
    """Overwrite free GPU memory with NaN on two streams, to reveal memory freed too early."""
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for stream in (torch.cuda.current_stream(), other):
        with torch.cuda.stream(stream):
            for size in sizes:
                torch.full((size,), float("nan"), dtype=dtype, device="cuda")
    torch.cuda.current_stream().wait_stream(other)


def assert_like_a_cpu(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close([t.cpu() for t in found], expected)


def warm_up(f: Callable[[], Any]) -> None:
    """Run f on a separate stream, as torch's documentation requires before a capture.

    The capture then finds everything that is created on first use.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(stream)


def capture(f: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a graph of ``f()``, and the results, which each replay recomputes."""
    warm_up(f)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = f()
    return graph, results
