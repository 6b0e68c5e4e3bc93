"""Estimate a floor for the time of a layer from its arithmetic, memory traffic and barriers.

Three rates are measured in this process, with the fastest library at hand. The floor is an
estimate, not a proven bound: the rates are those of large or repeated operations, and the time of a
barrier is assumed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from peers import FORWARD, Problem
from report import available_cores

BARRIER = 1e-7  # seconds, assumed: a cache line moves to another core and one moves back
L1 = 32 << 10  # bytes; weights that fit are read as fast as they are multiplied
SIDE = 1536  # rows and columns of the matrices whose products are timed


def best(call: Callable[[], Any]) -> float:
    """Time a call several times and return the shortest time in seconds."""
    times: list[float] = []
    end = time.perf_counter() + 0.1
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@functools.cache
def product_rate(dtype: torch.dtype, threads: int) -> float:
    """Return the operations per second of the fastest large product with `threads` threads.

    The libraries are torch and, with all threads, numpy. Small types may be widened.
    """
    torch.set_num_threads(threads)
    wide = dtype if dtype == torch.float64 else torch.float32
    times = []
    for one in {dtype, wide}:
        a = torch.rand(SIDE, SIDE).to(one)
        times.append(best(functools.partial(torch.mm, a, a)))
    if threads == available_cores():
        b = torch.rand(SIDE, SIDE, dtype=wide).numpy()
        times.append(best(lambda: b @ b))
    return 2 * SIDE**3 / min(times)


@functools.cache
def read_rate(size: int) -> float:
    """Return the bytes per second at which one thread reads the same `size` bytes repeatedly."""
    torch.set_num_threads(1)
    times = max(1, (16 << 20) // size)
    numbers = torch.ones(size // 4).expand(times, -1)
    return times * size / best(lambda: numbers.sum(1))


@functools.cache
def copy_rate(size: int, threads: int) -> float:
    """Return the bytes per second, read or written, of a copy that moves `size` bytes in all."""
    torch.set_num_threads(threads)
    source = torch.ones(size // 8)
    target = torch.empty_like(source)
    return size / best(lambda: target.copy_(source))


def floor(problem: Problem, mode: str) -> float:
    """Return seconds: the largest of three parts, plus barriers if threads share the units.

    The first part is all products. The second is reading W_hh in every step of a recurrence: each
    thread reads its share, from the cache in which the share fits. The third is x, h and the
    gradients, each read or written once for each pass that needs it. A batch of fewer rows than
    threads may use one thread for each row or split the units among all threads; the floor is that
    of the faster choice.
    """
    T, B, I, H = problem.shape
    rows, recurrences = T * B, 1 if mode == FORWARD else 2
    size = problem.x.element_size()
    before = torch.get_num_threads()

    def with_threads(threads: int) -> float:
        groups = min(threads, B)
        products = problem.flops(mode) / product_rate(problem.x.dtype, threads)
        share = size * H * H * groups // threads
        reads = recurrences * T * share / read_rate(power_of_two(share)) if share > L1 else 0.0
        series = I + H if mode == FORWARD else 2 * I + 3 * H + problem.grad_input * I
        traffic = size * (rows * series + H * (I + H) * recurrences)
        copies = traffic / copy_rate(min(max(power_of_two(traffic), 1 << 20), 1 << 28), threads)
        barriers = recurrences * T * BARRIER if groups < threads else 0.0
        return max(products, reads, copies) + barriers

    try:
        return min(with_threads(threads) for threads in {min(B, problem.threads), problem.threads})
    finally:
        torch.set_num_threads(before)


def power_of_two(number: int) -> int:
    """Return the next power of two, so that few rates have to be measured."""
    return 1 << (number - 1).bit_length()
