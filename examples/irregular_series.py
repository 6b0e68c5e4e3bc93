"""Predict a series with irregular gaps: a leak that depends on the gap, against a resampled grid.

    pip install fusedrnn[examples]
    python examples/irregular_series.py

The data are the concentrations of CO2 at Mauna Loa, weekly from 1958 to 2001 with missing weeks, as
statsmodels ships them. A fifth of the weeks is kept, at random, so that the gaps are between one
and about thirty weeks. At each observation, a model predicts how much the next one will differ. It
sees the observations up to then and the length of the gap, in one of three ways:

- on a grid: a step for each week, with the last observation as the input, and a flag for a new one;
- the gap as an input: a step for each observation;
- the leak, too: the same with the leak 1 - exp(-gap / tau) and a learned tau for each unit, which
  is the solution of tau h' = -h + phi(...) if phi(...) stays constant during the gap.

A parabola through all years is subtracted first. All models train on the same windows, from before
1990. The test windows are from 1990 on, also with other fractions of the weeks. Two rows of the
table need no training: no change, and harmonics of the year fitted to all data, which contain the
season that the models must learn.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from statsmodels.datasets import co2
from torch import Tensor, nn

import fusedrnn

UNITS, WINDOW, BATCH = 32, 30, 32  # WINDOW observations are predicted, after the first one
SKIPPED = 10  # predictions at the start of a window, which are not scored
KEPT, LR = 0.2, 1e-2
TEST_KEPT = (0.5, 0.2, 0.1)
YEAR = 365.25 / 7  # weeks


class Series:
    """The observations: their weeks, and their values without the trend."""

    def __init__(self) -> None:
        data = co2.load_pandas().data["co2"]
        self.train = (data.index.year < 1990)[data.notna()]
        self.weeks = np.flatnonzero(data.notna())
        ppm = data.dropna().to_numpy()
        years = self.weeks / YEAR
        angles = 2 * np.pi * np.outer(years, (1, 2))
        columns = np.column_stack([years**0, years, years**2, np.cos(angles), np.sin(angles)])
        fit = np.linalg.lstsq(columns, ppm, rcond=None)[0]
        detrended = ppm - columns[:, :3] @ fit[:3]
        self.scale = float(detrended.std())  # ppm
        self.values, self.harmonic = detrended / self.scale, columns[:, 3:] @ fit[3:] / self.scale

    def windows(
        self, train: bool, kept: float, count: int, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the values, the harmonics and the weeks of windows, [WINDOW + 1, count]."""
        rows = []
        for _ in range(count):
            keep = (generator.random(len(self.weeks)) < kept) & (self.train == train)
            index = np.flatnonzero(keep)
            start = generator.integers(len(index) - WINDOW)
            rows.append(index[start : start + WINDOW + 1])
        index = np.stack(rows, 1)
        parts = (self.values, self.harmonic, self.weeks)
        return tuple(torch.tensor(part[index], dtype=torch.float32) for part in parts)


class Model(nn.Module):
    """Predict the changes [WINDOW, B] from values and the gaps after them, [WINDOW, B]."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.readout = nn.Linear(UNITS, 1)


class OnGrid(Model):
    def forward(self, values: Tensor, gaps: Tensor) -> Tensor:
        ends = gaps.cumsum(0).long()  # weeks from the start of the window to the predicted one
        week = torch.arange(1, int(ends.max()) + 1).repeat(ends.size(1), 1)
        last = torch.searchsorted(ends.T.contiguous(), week).clamp(max=len(ends) - 1)
        held = values.T.gather(1, last)  # [B, weeks]
        new = torch.ones_like(held)
        new[:, 1:] = (last[:, 1:] != last[:, :-1]).float()
        h, _ = self.rnn(torch.stack([held, new], -1).transpose(0, 1))
        return self.readout(h.gather(0, (ends - 1)[..., None].expand(-1, -1, UNITS)))[..., 0]


class GapAsInput(Model):
    def forward(self, values: Tensor, gaps: Tensor) -> Tensor:
        h, _ = self.rnn(torch.stack([values, gaps / 10], -1))
        return self.readout(h)[..., 0]


class LeakOfGap(Model):
    def __init__(self, rnn: fusedrnn.LeakyRNN) -> None:
        super().__init__(rnn)
        self.log_tau = nn.Parameter(torch.linspace(math.log(2), math.log(100), UNITS))  # weeks

    def forward(self, values: Tensor, gaps: Tensor) -> Tensor:
        alpha = -torch.expm1(-gaps[..., None] / self.log_tau.exp())  # [WINDOW, B, UNITS]
        h, _ = self.rnn(torch.stack([values, gaps / 10], -1), alpha=alpha)
        return self.readout(h)[..., 0]


MODELS: dict[str, Callable[[], Model]] = {
    "grid, nn.RNN": lambda: OnGrid(nn.RNN(2, UNITS)),
    "grid, fusedrnn.RNN": lambda: OnGrid(fusedrnn.RNN(2, UNITS)),
    "gap as input, fusedrnn.RNN": lambda: GapAsInput(fusedrnn.RNN(2, UNITS)),
    "leak, too, LeakyRNN": lambda: LeakOfGap(fusedrnn.LeakyRNN(2, UNITS)),
}


def train(series: Series, updates: int) -> tuple[dict[str, Model], dict[str, float]]:
    """Train all models on the same windows; return them and the milliseconds of an update."""
    models, optimizers = {}, {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        models[name] = make()
        optimizers[name] = torch.optim.Adam(models[name].parameters(), lr=LR)
    times: dict[str, list[float]] = {name: [] for name in models}
    generator = np.random.default_rng(0)
    for i in range(updates):
        values, _, weeks = series.windows(True, KEPT, BATCH, generator)
        for name, model in models.items():
            begin = time.perf_counter()
            optimizers[name].param_groups[0]["lr"] = LR * (1 - i / updates)
            errors = model(values[:-1], weeks.diff(dim=0)) - values.diff(dim=0)
            optimizers[name].zero_grad()
            errors[SKIPPED:].square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return models, {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def predict(models: dict[str, Model], windows: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the changes by each model, by the two rows without training, and the true ones."""
    values, harmonics, weeks = windows
    found = {name: model(values[:-1], weeks.diff(dim=0)) for name, model in models.items()}
    found["no change"] = torch.zeros_like(values[1:])
    found["harmonics of the year"] = harmonics.diff(dim=0)
    found["truth"] = values.diff(dim=0)
    return {name: changes[SKIPPED:] for name, changes in found.items()}


def draw(path: Path, errors: dict[str, list[float]], predicted: dict[str, Tensor]) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, found in errors.items():
        left.plot([1 / kept for kept in TEST_KEPT], found, "o-", label=name)
    left.set(xlabel="mean gap in the test (weeks)", ylabel="error (ppm)", ylim=0)
    left.legend()
    for name in ("truth", "grid, nn.RNN", "leak, too, LeakyRNN"):
        right.plot(predicted[name][:, 0].numpy(), "o-", label=name)
    right.set(xlabel="observation, a tenth of the weeks kept", ylabel="change (σ)")
    right.legend()
    figure.savefig(path, dpi=120)


def main(
    updates: int = 1000, count: int = 256, path: Path | None = None
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the errors in ppm for each of TEST_KEPT, and the milliseconds of an update."""
    series = Series()
    models, times = train(series, updates)
    errors: dict[str, list[float]] = {}
    for kept in TEST_KEPT:
        predicted = predict(models, series.windows(False, kept, count, np.random.default_rng(1)))
        for name in [*models, "no change", "harmonics of the year"]:
            error = (predicted[name] - predicted["truth"]).square().mean().sqrt().item()
            errors.setdefault(name, []).append(error * series.scale)
    if path is not None:
        draw(path, errors, predicted)
    return errors, times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("irregular_series.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads would mostly wait for each other
    errors, times = main(options.updates, path=options.out)
    kept = "".join(f"{kept:8.0%}" for kept in TEST_KEPT)
    print(f"error in ppm, of weeks kept:{kept}   ms of an update")
    for name, found in errors.items():
        row = "".join(f"{error:8.3f}" for error in found)
        print(f"{name:28}{row}" + (f"{times[name]:18.2f}" if name in times else ""))
    print(f"\nfigure: {options.out}")
