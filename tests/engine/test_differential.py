"""Random trials of tests/support/differential.py with fixed seeds; its command tries others."""

from __future__ import annotations

from collections import Counter

import differential
import pytest
import torch


def check(seeds: range) -> None:
    engines = differential.available()
    threads = torch.get_num_threads()
    try:
        failures = [
            f"{kind}: {detail}\n"
            f"python tests/support/differential.py --case {seed} --engine {engine}\n"
            f"{differential.make_trial(seed)}"
            for seed in seeds
            for engine in [engines[seed % len(engines)]]
            for kind, detail in differential.check(seed, engine, Counter())
        ]
    finally:
        torch.set_num_threads(threads)
    assert not failures, "\n\n".join(failures[:5])


def test_random_trials_agree_with_the_reference():
    check(range(500))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_random_trials_agree_with_the_reference(part):
    check(range(1000 + 2500 * part, 3500 + 2500 * part))
