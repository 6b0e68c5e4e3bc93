"""Peers for the GPU in addition to those of peers.py: CUDA graphs of these, TF32 and FlashRNN."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from measure import capture
from peers import (
    BACKWARD,
    FORWARD,
    CompiledLoop,
    FusedRNN,
    Peer,
    Problem,
    TorchPeer,
    TorchRNN,
    UnbindLoop,
)
from torch import Tensor
from torch.nn import functional as F

ALONE = "backward"  # alone, repeated after a single forward: a mode of the GPU benchmark only
GPU_MODES = (FORWARD, BACKWARD, ALONE)

TF32_EPS = 2.0**-10


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 GEMMs, torch's own and cuDNN's."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    # Not by torch.backends.cudnn.allow_tf32, which torch's own test modules freeze on import.
    torch._C._set_cudnn_allow_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]
        torch._C._set_cudnn_allow_tf32(before[1])


class TF32RNN(TorchRNN):
    """`nn.RNN` with torch's default settings: float32 tensors, TF32 GEMMs."""

    name = "nn.RNN TF32"
    eps = TF32_EPS

    def forward(self) -> Tensor:
        with tf32(True):
            return super().forward()

    def forward_backward(self) -> tuple[Tensor, Sequence[Tensor]]:
        with tf32(True):
            return super().forward_backward()

    def backward_alone(self) -> Callable[[], Any]:
        with tf32(True):
            backward = super().backward_alone()

        def call() -> Any:
            with tf32(True):
                return backward()

        return call


class Graphed(Peer):
    """Another peer in a CUDA graph: the same kernels, without the cost of Python and launches."""

    inner: ClassVar[type[TorchPeer]]

    def prepare(self, problem: Problem) -> None:
        self.device = problem.x.device
        self.peer = self.inner()
        self.peer.prepare(problem)
        self.calls: dict[str, Callable[[], Any]] = {}

    def call(self, mode: str) -> Callable[[], Any]:
        if mode not in self.calls:
            self.calls[mode] = capture(lambda: call_of(self.peer, mode), self.device)
        return self.calls[mode]

    def forward(self) -> Tensor:
        return self.call(FORWARD)()

    def forward_backward(self) -> tuple[Tensor, Sequence[Tensor]]:
        return self.call(BACKWARD)()


def call_of(peer: Peer, mode: str) -> Callable[[], Any]:
    if mode == ALONE and isinstance(peer, TorchPeer):
        return peer.backward_alone()
    return peer.call(mode)


class GraphedRNN(Graphed):
    name = "nn.RNN in a graph"
    inner = TorchRNN


class GraphedFusedRNN(Graphed):
    name = "fusedrnn in a graph"
    inner = FusedRNN

    @classmethod
    def missing(cls) -> str | None:
        return FusedRNN.missing()


class GraphedLoop(Graphed):
    name = "loop in a graph"
    inner = UnbindLoop


class CompiledShortLoop(CompiledLoop):
    """Compile the loop, on a GPU with CUDA graphs (`reduce-overhead`), and record the time."""

    def prepare(self, problem: Problem) -> None:
        super().prepare(problem)
        if problem.x.is_cuda:
            self.compiled = torch.compile(
                self.run, fullgraph=True, dynamic=False, mode="reduce-overhead"
            )
        self.compile_seconds = seconds_of(self.forward) + seconds_of(self.forward_backward)

    def output(self) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last call's results may be overwritten
        return super().output()


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class FlashRNN(UnbindLoop):
    """FlashRNN's fused Elman kernel, with the same input GEMM as the other peers.

    It compiles itself on the first use of each shape, after a sleep of up to ten seconds.
    """

    name = "FlashRNN"
    requires = ("flashrnn",)

    @classmethod
    def declines(cls, problem: Problem, mode: str) -> str | None:
        if not problem.x.is_cuda:
            return "it runs on CUDA only"
        return None

    def prepare(self, problem: Problem) -> None:
        super().prepare(problem)
        # FlashRNN always computes float32 in TF32.
        self.eps = TF32_EPS if problem.x.dtype == torch.float32 else 0.0
        function: Any = importlib.import_module("flashrnn")
        while not callable(function):
            function = function.flashrnn
        self.function = function
        self.compile_seconds = seconds_of(self.forward) + seconds_of(self.forward_backward)

    def output(self) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = self.weights
        u = F.linear(self.x, w_ih)
        states, _ = self.function(
            u.transpose(0, 1)[:, :, None, None],  # batch, time, gate, head, unit
            w_hh[None, None],
            (b_ih + b_hh)[None, None],
            function="elman",
            dtype=str(u.dtype).removeprefix("torch."),
        )
        return states[0, :, :, 0].transpose(0, 1)


# The peers of each group of cases (gpu_cases.py). Groups for which time is short have few peers.
CUDNN: list[type[Peer]] = [TorchRNN, FusedRNN, GraphedRNN, GraphedFusedRNN, TF32RNN]
PEERS: dict[str, list[type[Peer]]] = {
    "shapes": CUDNN,
    "regimes": [],  # gpu_regimes.py
    "sweep": [TorchRNN, FusedRNN],
    "directions": CUDNN,
    "others": [*CUDNN, GraphedLoop, FlashRNN],
    "compile": [TorchRNN, FusedRNN, GraphedFusedRNN, GraphedLoop, CompiledShortLoop],
}
