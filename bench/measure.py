"""Right first, then time, then memory."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peers import Peer, Problem, TorchPeer, UnbindLoop
from torch import Tensor

# Wrong: further from the float64 loop than SLACK times the baseline is, plus FLOOR eps of the
# largest value. The baseline itself must be within sqrt(eps) of the largest value.
SLACK = 4.0
FLOOR = 8.0


MIN_ROUNDS = 5  # fewer have no quartiles worth printing
TURNS = 16  # rounds that a time box is cut into, where a single call is short enough
PAUSE = 0.001  # seconds between turns: thread pools spin for a while after their last task


@dataclass
class Check:
    """How far a peer's results are from the float64 loop's, and how far they may be."""

    error: float  # of the worst result, in units of its largest value
    bound: float  # of that same result

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for nan


def distances(results: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Largest error of each result, relative to the largest value of its truth."""
    if len(results) != len(truth):
        raise ValueError(f"{len(results)} results instead of {len(truth)}")
    scales = [t.abs().max().clamp_min(1e-300) for t in truth]
    return [
        ((r.double().reshape(t.shape) - t).abs().max() / scale).item()
        for r, t, scale in zip(results, truth, scales)
    ]


class Judge:
    """Holds the float64 truth of one problem and mode, and the baseline's distance from it."""

    def __init__(self, problem: Problem, dtype: torch.dtype, mode: str, baseline: Peer) -> None:
        loop = UnbindLoop()
        loop.prepare(problem)
        self.mode = mode
        self.truth = loop.results(mode)
        self.eps = torch.finfo(dtype).eps
        self.baseline = baseline
        self.baseline_distances = distances(baseline.results(mode), self.truth)

    def check(self, peer: Peer) -> Check:
        if peer is self.baseline:
            return Check(max(self.baseline_distances), math.sqrt(self.eps))
        found = distances(peer.results(self.mode), self.truth)
        bounds = [SLACK * d + FLOOR * self.eps for d in self.baseline_distances]
        checks = [Check(d, b) for d, b in zip(found, bounds)]
        nans = [check for check in checks if math.isnan(check.error)]
        return nans[0] if nans else max(checks, key=lambda check: check.error / check.bound)


def time_calls(call: Callable[[], Any], calls: int) -> float:
    """Seconds a call, over that many."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def take_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each, once a round, until the time box is full."""
    slot = seconds / (TURNS * len(calls))
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(slot / time_calls(call, 3)))

    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # as timeit does
    try:
        end = time.perf_counter() + seconds
        order = list(calls)
        while len(times[order[0]]) < MIN_ROUNDS or time.perf_counter() < end:
            for name in order:
                time.sleep(PAUSE)
                if repeats[name] > 1:  # a single long call hardly feels it
                    calls[name]()  # wakes its thread pool, and warms the caches
                times[name].append(time_calls(calls[name], repeats[name]))
            order.append(order.pop(0))  # so that nobody always follows the same one
    finally:
        if collecting:
            gc.enable()
    return times


def kept_bytes(peer: TorchPeer) -> int:
    """Bytes alive between forward and backward: what autograd saved, and the output. The weights,
    which live anyway, are not counted."""
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

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
    """VmRSS or VmHWM of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field_name}")


def peak_growth(peer: Peer, problem: Problem) -> int:
    """By how much the resident set grows at most during one forward+backward (Linux).

    Honest only in a fresh process: memory freed earlier and not returned would be used again
    unseen. So the peer is warmed with a problem of one step.
    """
    one = replace(
        problem, shape=problem.shape._replace(T=1), x=problem.x[:1], grad=problem.grad[:1]
    )
    peer.prepare(one)
    peer.forward_backward()
    peer.prepare(problem)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    peer.forward_backward()
    return resident("VmHWM") - before
