"""The examples run, here with little training; their own commands train for longer."""

from __future__ import annotations

import importlib
import os

import pytest
import torch


def example(name: str, package: str, monkeypatch: pytest.MonkeyPatch):
    if not os.environ.get("CI"):  # in CI, a missing package is an error
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setenv("MPLBACKEND", "agg")
    return importlib.import_module(name)


def test_neuroscience(monkeypatch, tmp_path):
    neuroscience = example("neuroscience", "matplotlib", monkeypatch)
    path = tmp_path / "figure.png"
    curve, found = neuroscience.main(iterations=5, repeats=4, path=path)
    assert len(curve) == len(neuroscience.COHERENCES)
    assert all(0 <= fraction <= 1 for fraction in curve)
    assert (found.counts > 0).all()
    assert (found.residuals <= 1e-6).all()
    assert path.read_bytes().startswith(b"\x89PNG")


def test_amplifier(monkeypatch, tmp_path):
    amplifier = example("amplifier", "matplotlib", monkeypatch)
    path = tmp_path / "figure.png"
    result = amplifier.main(epochs=10, samples=2650, path=path)
    assert result.error_to_signal < 0.1
    assert result.real_time_factor > 0
    assert result.same_bits
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_clipper_limits_and_passes_small_signals(monkeypatch):
    amplifier = example("amplifier", "matplotlib", monkeypatch)
    seconds = torch.arange(2000).double()[:, None] / amplifier.RATE
    loud, quiet = (a * torch.sin(2 * torch.pi * 200 * seconds).numpy() for a in (5.0, 0.01))
    assert 0.4 < abs(amplifier.circuit(loud)).max() < 0.8  # volts at which a diode conducts
    assert abs(amplifier.circuit(quiet) - quiet).max() < 0.05 * 0.01


def test_recurrent_ppo(monkeypatch):
    ppo = example("recurrent_ppo", "gymnasium", monkeypatch)
    score, (fused, loop) = ppo.main(updates=8)
    assert score > 30  # a random policy scores 22
    assert min(fused, loop) > 0


def test_recurrent_ppo_plays_what_it_trains_on(monkeypatch):
    """One call over a rollout gives the probabilities of the single steps that were played."""
    ppo = example("recurrent_ppo", "gymnasium", monkeypatch)
    agent = ppo.Agent()
    torch.nn.init.normal_(agent.policy.weight)
    player = ppo.Player(agent, 0)
    for _ in range(2):
        rollout, before = player.play()
        assert rollout.starts[1:].any()
        policy, _ = agent(rollout.x, before, rollout.starts)
        torch.testing.assert_close(policy.log_prob(rollout.actions), rollout.log_probabilities)
        looped = ppo.loop_with_masks(agent.rnn, rollout.x, before, rollout.starts)
        torch.testing.assert_close(agent.rnn(rollout.x, before, rollout.starts)[0], looped)
