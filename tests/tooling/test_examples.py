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


def test_per_sample(monkeypatch):
    per_sample = example("per_sample", "sklearn", monkeypatch)
    private, plain, rows = per_sample.main(updates=60, rounds=1)
    assert plain > 0.9
    assert 0.5 < private < plain
    for row in rows:  # a loop over the samples and vmap have the same gradients
        assert row.error < 1e-5
        assert row.milliseconds > 0


def test_private_gradients_are_clipped_and_noised(monkeypatch):
    per_sample = example("per_sample", "sklearn", monkeypatch)
    gradients = {"a": torch.randn(500, 3, 4), "b": torch.randn(500, 40)}
    gradients = {
        name: g * torch.linspace(0, 1, 500).view(-1, *[1] * (g.dim() - 1))
        for name, g in gradients.items()
    }
    rows = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    expected = sum(row * min(1.0, per_sample.CLIP / max(row.norm().item(), 1e-9)) for row in rows)
    monkeypatch.setattr(per_sample, "NOISE_MULTIPLIER", 0.0)
    found = per_sample.private(gradients)
    flat = torch.cat([g.flatten() for g in found.values()])
    torch.testing.assert_close(flat, expected / per_sample.BATCH)
    monkeypatch.setattr(per_sample, "NOISE_MULTIPLIER", 5.0)
    noise = per_sample.private({"a": torch.zeros(3, 10_000)})["a"] * per_sample.BATCH
    assert noise.std().item() == pytest.approx(5.0 * per_sample.CLIP, rel=0.05)


def test_irregular_series(monkeypatch, tmp_path):
    irregular = example("irregular_series", "statsmodels", monkeypatch)
    path = tmp_path / "figure.png"
    errors, times = irregular.main(updates=30, count=16, path=path)
    assert list(times) == list(irregular.MODELS)
    assert list(errors) == [*irregular.MODELS, "no change", "harmonics of the year"]
    assert errors["grid, fusedrnn.RNN"] == pytest.approx(errors["grid, nn.RNN"], rel=1e-2)
    for name in irregular.MODELS:
        assert errors[name][1] < errors["no change"][1]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_irregular_series_has_the_windows_that_it_describes(monkeypatch):
    irregular = example("irregular_series", "statsmodels", monkeypatch)
    series = irregular.Series()
    week_of_1990 = series.weeks[~series.train][0]
    for train in (True, False):
        windows = series.windows(train, 0.2, 16, irregular.np.random.default_rng(0))
        values, harmonics, weeks = windows
        assert values.shape == harmonics.shape == weeks.shape == (irregular.WINDOW + 1, 16)
        gaps = weeks.diff(dim=0)
        assert gaps.min() >= 1
        assert gaps.mean().item() == pytest.approx(5, abs=1)
        assert bool((weeks < week_of_1990).all()) == train


def test_a_grid_holds_the_last_observation(monkeypatch):
    irregular = example("irregular_series", "statsmodels", monkeypatch)
    model = irregular.OnGrid(torch.nn.RNN(2, irregular.UNITS))
    values, gaps = torch.randn(4, 3), torch.tensor([2.0, 1, 3, 1])[:, None].repeat(1, 3)
    found = model(values, gaps)
    held = values.repeat_interleave(torch.tensor([2, 1, 3, 1]), 0)
    new = torch.tensor([1.0, 0, 1, 1, 0, 0, 1])[:, None].repeat(1, 3)
    h, _ = model.rnn(torch.stack([held, new], -1))
    torch.testing.assert_close(found, model.readout(h[[1, 2, 5, 6]])[..., 0])
