"""Run one shape in one precision: check and time every peer, and record the prediction."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from gpu_peers import (
    ALONE,
    GPU_MODES,
    PEERS,
    TF32_EPS,
    TF32RNN,
    CompiledShortLoop,
    FlashRNN,
    call_of,
    tf32,
)
from gpu_regimes import time_regimes
from measure import PAUSE, Judge, is_fatal, kept_bytes, take_turns, timer_for
from peers import BACKWARD, FORWARD, MODES, FusedRNN, Peer, Problem, Shape, TorchPeer

# The checks set the gradient of the output to zero after these steps, so that later steps do not
# affect the results.
CHECK_STEPS = 64
COMPILE_LIMIT = 180.0  # seconds of silence allowed while a loop compiles


class Precision(NamedTuple):
    dtype: torch.dtype
    eps: float


PRECISIONS = {
    "bf16": Precision(torch.bfloat16, 2.0**-7),
    "f32": Precision(torch.float32, 2.0**-23),
    "tf32": Precision(torch.float32, TF32_EPS),  # float32 tensors, TF32 GEMMs allowed
    "f16": Precision(torch.float16, 2.0**-10),
}


@dataclass(frozen=True)
class Case:
    group: str
    shape: Shape
    precision: str

    @property
    def kinds(self) -> list[type[Peer]]:
        kinds = PEERS[self.group]
        return [kind for kind in kinds if kind is not TF32RNN or self.precision == "f32"]

    @property
    def directions(self) -> int:
        return 2 if self.group == "directions" else 1

    def __str__(self) -> str:
        return f"{self.group} ({self.shape}) {self.precision}"


# The headline shapes: T, B, I, H.
SHAPES = [
    Shape(1024, 1, 64, 64),
    Shape(1024, 16, 128, 256),
    Shape(512, 32, 256, 512),
    Shape(512, 64, 1024, 1024),
    Shape(256, 128, 2048, 2048),
]


def all_cases() -> list[Case]:
    """Return all cases, most important first: the time may run out."""
    compiled = [Shape(16, 16, 128, 256), Shape(16, 64, 1024, 1024)]  # small T: unrolled
    both = ("bf16", "f32")
    return [
        *(Case("shapes", shape, p) for p in both for shape in SHAPES),
        *(Case("regimes", shape._replace(T=256), p) for p in both for shape in SHAPES),
        *(
            Case("sweep", Shape(256 if H < 1024 else 128, B, H, H), precision)
            for B in (1, 16, 64)
            for H in (64, 128, 256, 384, 512, 768, 1024, 2048)
            for precision in both
        ),
        *(Case("directions", shape, p) for p in both for shape in SHAPES[:4]),
        *(Case("others", shape, p) for p in PRECISIONS for shape in SHAPES),
        *(Case("compile", shape, "bf16") for shape in compiled),
    ]


TINY_CHECK_STEPS = 4


def tiny_cases() -> list[Case]:
    """Return the same kinds of cases, small enough for a CPU to run in a moment."""
    return [
        *(Case("shapes", Shape(6, 2, 3, 8), precision) for precision in ("bf16", "f32")),
        *(Case("others", Shape(6, 2, 3, 8), precision) for precision in ("f16", "tf32")),
        Case("regimes", Shape(5, 2, 3, 8), "bf16"),
        Case("directions", Shape(6, 2, 3, 8), "f32"),
        Case("compile", Shape(2, 2, 3, 8), "bf16"),
        Case("sweep", Shape(5, 1, 8, 8), "f32"),
    ]


@dataclass
class Found:
    """The results of one peer."""

    failed: str | None = None
    coarse: bool = False  # computed in lower precision than the case
    check: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # per call, by mode and round
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    compile_seconds: float | None = None


Announce = Callable[..., None]  # reports the current peer and phase, and how long it may take


class Run:
    def __init__(
        self,
        case: Case,
        device: torch.device,
        seconds: float,
        announce: Announce = lambda *words, **more: None,
        without: Mapping[str, str] = MappingProxyType({}),
        check_steps: int = CHECK_STEPS,
    ) -> None:
        self.case, self.device, self.seconds, self.announce = case, device, seconds, announce
        self.check_steps = check_steps
        self.precision = PRECISIONS[case.precision]
        self.without = without
        self.found = {k.name: Found(failed=without.get(k.name)) for k in case.kinds}

    def __call__(self) -> dict[str, Any]:
        if self.case.group == "regimes":
            return self.result(
                regimes=time_regimes(
                    self.case.shape,
                    self.case.precision,
                    self.precision.dtype,
                    self.device,
                    self.seconds,
                    self.announce,
                    self.without,
                )
            )
        with tf32(self.case.precision == "tf32"):
            problem, exact, peers = self.prepare()
            for mode in MODES:
                self.check(exact, mode, peers)
            del exact
            # From here on, all steps have a gradient. Set it in place: graphs read this memory.
            random = torch.Generator(self.device).manual_seed(1)
            problem.grad[self.check_steps :].normal_(generator=random)
            peers = [peer for peer in peers if not self.found[peer.name].failed]
            for mode in GPU_MODES:
                self.time(mode, peers)
            for peer in peers:
                self.weigh(peer)
            chains = self.time_chains(problem)
            predicted = self.predict(problem)
        peers.clear()  # frees their graphs, too
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.result(chains=chains, predicted=predicted)

    def result(self, **more: Any) -> dict[str, Any]:
        return {
            "group": self.case.group,
            "shape": self.case.shape._asdict(),
            "precision": self.case.precision,
            "peers": {name: asdict(found) for name, found in self.found.items()},
            **more,
        }

    def attempt(self, name: str, phase: str, action: Callable[[], Any], **more: Any) -> Any:
        """Return the action's result; if it fails, record the error and return None."""
        self.announce(name, phase, **more)
        try:
            return action()
        except Exception as error:
            if is_fatal(error, self.device):
                raise  # the device is lost to this process; a new process continues
            note = f"{phase}: {type(error).__name__}: {str(error).strip()[:600]}"
            self.found.setdefault(name, Found()).failed = note
            return None

    def prepare(self) -> tuple[Problem, Problem, list[Peer]]:
        """Return the problem, its first steps in float64, and the peers that can run it."""
        exact = Problem.random(
            self.case.shape,
            self.precision.dtype,
            cell=False,
            grad_input=True,
            threads=1,
            device=self.device,
            directions=self.case.directions,
        )
        if self.case.directions == 2:  # the reverse direction starts at the end
            self.check_steps = self.case.shape.T
        exact.grad[self.check_steps :] = 0
        problem = exact.to(self.precision.dtype)
        peers = [peer for kind in self.case.kinds if (peer := self.prepared(kind, problem))]
        return problem, exact.first(self.check_steps), peers

    def prepared(self, kind: type[Peer], problem: Problem) -> Peer | None:
        found = self.found[kind.name]
        found.failed = found.failed or kind.missing() or kind.declines(problem, BACKWARD)
        if found.failed:
            return None
        peer = kind()
        compiles = kind in (CompiledShortLoop, FlashRNN)
        self.attempt(
            peer.name,
            "prepare",
            lambda: peer.prepare(problem),
            limit=COMPILE_LIMIT if compiles else None,
        )
        found.coarse = peer.eps > self.precision.eps
        found.compile_seconds = peer.compile_seconds
        return None if found.failed else peer

    def check(self, exact: Problem, mode: str, peers: list[Peer]) -> None:
        """Check every peer; the first that runs, nn.RNN, is the baseline of the others."""
        judge = None
        for peer in peers:
            phase = f"check {mode}"
            if judge is None:
                make = functools.partial(Judge, exact, self.precision.eps, mode, peer)
                judge = self.attempt(peer.name, phase, make)
            if judge is not None:
                check = self.attempt(peer.name, phase, functools.partial(judge.check, peer))
                if check is not None:
                    verdict = {**asdict(check), "passed": check.passed}
                    self.found[peer.name].check[mode] = verdict

    def time(self, mode: str, peers: list[Peer]) -> None:
        calls = {}
        for peer in peers:
            if mode == ALONE and isinstance(peer, CompiledShortLoop):
                continue  # its graphs would overwrite what this mode keeps of the forward
            call = self.attempt(
                peer.name, f"ready to time {mode}", functools.partial(call_of, peer, mode)
            )
            if call is not None:
                calls[peer.name] = call
        times = self.attempt("everyone", f"time {mode}", functools.partial(self.turns, calls))
        for name, seconds in (times or {}).items():
            self.found[name].seconds[mode] = seconds

    def turns(self, calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        if not calls:
            return {}
        pause = 0 if self.device.type == "cuda" else PAUSE
        seconds = self.seconds / (len(GPU_MODES) + 1)  # + 1 for the chains
        return take_turns(calls, seconds, timer_for(self.device), pause)

    def weigh(self, peer: Peer) -> None:
        """Measure the memory of a peer, unless it uses CUDA graphs.

        A graph holds the memory of its peer as long as the graph exists.
        """
        if not isinstance(peer, TorchPeer) or isinstance(peer, CompiledShortLoop):
            return
        found = self.found[peer.name]
        found.kept_bytes = self.attempt(peer.name, "kept memory", lambda: kept_bytes(peer))
        if self.device.type == "cuda":
            found.peak_bytes = self.attempt(peer.name, "peak memory", lambda: peak_bytes(peer))

    def time_chains(self, problem: Problem) -> dict[str, list[float]]:
        """Time the recurrences of one direction alone, as they run inside the layer.

        Neither the input GEMM nor the GEMMs after the backward recurrence are included.
        """
        if self.found[FusedRNN.name].failed:
            return {}
        from fusedrnn import ops

        w_ih, w_hh, b_ih, b_hh = problem.weights[:4]
        grad = problem.grad[..., : self.case.shape.H].contiguous()
        u = torch.nn.functional.linear(problem.x, w_ih, b_ih + b_hh)
        rest = (None, None, "tanh", "rate", False, None)  # reset, batch_sizes

        def forward() -> Any:
            return ops.activation(u, *[None] * 5, w_hh, None, None, *rest)

        def both() -> dict[str, list[float]]:
            h, *_ = forward()

            def backward() -> Any:
                return ops.adjoint(grad, None, None, None, h, w_hh, None, *rest, False, False)

            return self.turns({FORWARD: forward, ALONE: backward})

        with torch.no_grad():
            return self.attempt("fusedrnn chains", "time chains", both) or {}

    def predict(self, problem: Problem) -> dict[str, Any]:
        """Return the planner's regime, µs per step and a sentence for each chain."""
        if self.found[FusedRNN.name].failed:
            return {}
        from fusedrnn.explain import plans

        peer = FusedRNN()
        peer.prepare(problem)
        return self.attempt("fusedrnn plan", "plan", lambda: plans(peer.module, peer.x)[0]) or {}


def peak_bytes(peer: TorchPeer) -> int:
    """Return the peak allocation of one forward+backward, above the inputs and the weights."""
    peer.forward_backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    peer.forward_backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
