"""Check results, then measure time and memory."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import Peer, Problem, TorchPeer, UnbindLoop
from torch import Tensor

# A peer is wrong if its distance from the float64 loop exceeds SLACK times the baseline's, plus
# FLOOR eps of the largest value. The baseline itself must be within sqrt(eps) of the largest value.
SLACK = 4.0
FLOOR = 8.0


MIN_ROUNDS = 5  # fewer give no meaningful quartiles
TURNS = 16  # rounds that a time box is divided into, if a single call is short enough
OVERWRITTEN = 128 << 20  # bytes: more than the caches of most machines
PAUSE = 0.001  # seconds between turns, because thread pools spin for a while after their last task


@dataclass
class Check:
    """How far a peer's results are from the float64 loop's, and how far they may be."""

    error: float  # of the worst result, in units of its largest value
    bound: float  # for the same result

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for nan


def distances(results: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Return the largest error of each result, relative to the largest value of its truth.

    A truth with fewer steps than the result is compared with the result's first steps.
    """
    if len(results) != len(truth):
        raise ValueError(f"{len(results)} results instead of {len(truth)}")
    scales = [t.abs().max().clamp_min(1e-300) for t in truth]
    results = [r if r.numel() == t.numel() else r[: t.size(0)] for r, t in zip(results, truth)]
    return [
        ((r.double().reshape(t.shape) - t).abs().max() / scale).item()
        for r, t, scale in zip(results, truth, scales)
    ]


class Judge:
    """The float64 truth of one problem and mode, and the baseline's distance from it."""

    def __init__(self, problem: Problem, eps: float, mode: str, baseline: Peer) -> None:
        loop = UnbindLoop()
        loop.prepare(problem)
        self.mode = mode
        self.truth = loop.results(mode)
        self.eps = eps
        self.baseline = baseline
        self.baseline_distances = distances(baseline.results(mode), self.truth)

    def check(self, peer: Peer) -> Check:
        if peer is self.baseline:
            return Check(max(self.baseline_distances), math.sqrt(self.eps))
        found = distances(peer.results(self.mode), self.truth)
        floor = FLOOR * max(self.eps, peer.eps)
        bounds = [SLACK * d + floor for d in self.baseline_distances]
        checks = [Check(d, b) for d, b in zip(found, bounds)]
        nans = [check for check in checks if math.isnan(check.error)]
        return nans[0] if nans else max(checks, key=lambda check: check.error / check.bound)


Timer = Callable[[Callable[[], Any], int], float]  # (call, calls) -> seconds per call


def time_calls(call: Callable[[], Any], calls: int) -> float:
    """Return the mean seconds per call over `calls` calls."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def time_calls_on_gpu(call: Callable[[], Any], calls: int) -> float:
    """Return the same from CUDA events, from the start of the first call to the end of the last."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def timer_for(device: torch.device) -> Timer:
    return time_calls_on_gpu if device.type == "cuda" else time_calls


def capture(make: Callable[[], Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    """Capture the call that `make` returns in a CUDA graph and return its replay.

    Without CUDA, return the call itself.

    `make` runs on the captured stream, because a backward runs on the stream of its forward.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(2):  # libraries do setup that cannot be captured on their first call
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()

    held = graph, call  # the graph reads memory that the call owns, such as a forward's states

    def replay() -> Any:
        held[0].replay()
        return result

    return replay


def is_fatal(error: Exception, device: torch.device) -> bool:
    """Return whether this process has lost the device: a kernel failed, not only a call."""
    if device.type != "cuda" or isinstance(error, torch.OutOfMemoryError):
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def take_turns(
    calls: dict[str, Callable[[], Any]],
    seconds: float,
    time_calls: Timer = time_calls,
    pause: float = PAUSE,
) -> dict[str, list[float]]:
    """Time the calls in turns until the time box is full; return seconds per call, by round."""
    slot = seconds / (TURNS * len(calls))

    def turn_of(call: Callable[[], Any]) -> Callable[[], float]:
        call()
        repeats = max(1, round(slot / time_calls(call, 3)))

        def turn() -> float:
            if repeats > 1:  # a single long call is hardly affected
                call()  # wakes its thread pool, and warms the caches
            return time_calls(call, repeats)

        return turn

    return rounds({name: turn_of(call) for name, call in calls.items()}, seconds, pause)


def take_cold_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Time single calls in turns; before each call, all cores overwrite their caches."""
    other = torch.zeros(OVERWRITTEN // 4)

    def turn_of(call: Callable[[], Any]) -> Callable[[], float]:
        def turn() -> float:
            other.add_(1)
            return time_calls(call, 1)

        return turn

    return rounds({name: turn_of(call) for name, call in calls.items()}, seconds)


def rounds(
    turns: dict[str, Callable[[], float]], seconds: float, pause: float = PAUSE
) -> dict[str, list[float]]:
    """Run the turns in rounds until the time box is full; return their results, by round."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # as timeit does
    try:
        end = time.perf_counter() + seconds
        order = list(turns)
        while len(times[order[0]]) < MIN_ROUNDS or time.perf_counter() < end:
            for name in order:
                time.sleep(pause)
                times[name].append(turns[name]())
            order.append(order.pop(0))  # so that no call always follows the same one
    finally:
        if collecting:
            gc.enable()
    return times


def kept_bytes(peer: TorchPeer) -> int:
    """Return the bytes alive between forward and backward: what autograd saved, and the output.

    The weights are not counted, because they stay alive anyway.
    """
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(peer.output())
    for weight in peer.weights:
        storages.pop(weight.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


def resident(field_name: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field_name}")


def peak_growth(peer: Peer, problem: Problem) -> int:
    """Return the peak growth of the resident set during one forward+backward (Linux).

    This is accurate only in a fresh process: memory that was freed but not returned to the system
    would be reused unseen. For the same reason the warm-up is a problem of one step.
    """
    peer.prepare(problem.first(1))
    peer.forward_backward()
    peer.prepare(problem)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    peer.forward_backward()
    return resident("VmHWM") - before
