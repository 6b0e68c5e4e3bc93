"""Train an excitatory-inhibitory RNN to decide between two stimuli, and look at its dynamics.

    pip install fusedrnn[examples]
    python examples/neuroscience.py

A trial presents noisy evidence for left or right. Its coherence is the difference of the two means.
After a delay without stimulus, the network reports which side was stronger. The network is a
continuous-time RNN (tau = 100 ms, in steps of 20 ms). Its state is a current, and its output a
firing rate. It has noise, and 80 % of its units are excitatory and 20 % inhibitory (Dale's
principle), as in Song, Yang and Wang, PLOS Computational Biology 12(2), 2016. The figure shows the
psychometric curve and, in the plane of the first two principal components, trials and the fixed
points during the delay.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fusedrnn
from fusedrnn.parametrizations import Dale

UNITS, EXCITATORY = 50, 40
FIXATION, STIMULUS, DELAY, RESPONSE = 5, 20, 50, 5  # in steps of 20 ms
COHERENCES = (-0.64, -0.32, -0.16, -0.08, -0.04, 0.0, 0.04, 0.08, 0.16, 0.32, 0.64)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fusedrnn.LeakyRNN(
            3, UNITS, nonlinearity="sigmoid", form="potential", tau=100.0, dt=20.0, noise=0.5
        )
        signs = torch.ones(UNITS)
        signs[EXCITATORY:] = -1
        with torch.no_grad():  # inhibition balances the four times as many excitatory units
            self.rnn.weight_hh_l0[:, EXCITATORY:] *= EXCITATORY / (UNITS - EXCITATORY)
            radius = torch.linalg.eigvals(self.rnn.weight_hh_l0.abs() * signs).abs().max()
            self.rnn.weight_hh_l0 *= 4 / radius
        parametrize.register_parametrization(self.rnn, "weight_hh_l0", Dale(signs))
        self.readout = nn.Linear(EXCITATORY, 2)  # only excitatory units project to other areas

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the choices, the rates and the currents of all steps."""
        rates, _, currents = self.rnn(x, return_potential=True)
        return self.readout(rates[..., :EXCITATORY]), rates, currents


def trials(coherence: Tensor) -> Tensor:
    """Return the input of a trial for each coherence: fixation, evidence for left and for right."""
    steps = FIXATION + STIMULUS + DELAY + RESPONSE
    x = torch.zeros(steps, len(coherence), 3)
    x[:-RESPONSE, :, 0] = 1
    means = torch.stack([1 - coherence, 1 + coherence], -1) / 2
    noise = 0.5 * torch.randn(STIMULUS, len(coherence), 2)
    x[FIXATION : FIXATION + STIMULUS, :, 1:] = means + noise
    return x


def train(network: Network, iterations: int, batch: int = 64) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for i in range(iterations):
        coherence = torch.tensor(COHERENCES)[torch.randint(len(COHERENCES), (batch,))]
        sides = torch.where(coherence == 0, torch.rand(batch) < 0.5, coherence > 0).long()
        choices, rates, _ = network(trials(coherence))
        held = choices[-DELAY - RESPONSE :]  # the choice must be held after the stimulus
        loss = nn.functional.cross_entropy(held.flatten(0, 1), sides.repeat(len(held)))
        optimizer.zero_grad()
        (loss + 1e-3 * rates.square().mean()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if (i + 1) % 100 == 0:
            print(f"iteration {i + 1}: cross entropy {loss.item():.3f}")


@torch.no_grad()
def psychometric_curve(network: Network, repeats: int) -> list[float]:
    """Return the fraction of choices of the right side, for each coherence."""
    coherence = torch.tensor(COHERENCES).repeat_interleave(repeats)
    choices, _, _ = network(trials(coherence))
    right = choices[-RESPONSE:].mean(0).argmax(-1).float()
    return right.view(len(COHERENCES), repeats).mean(1).tolist()


def draw(
    path: Path,
    curve: list[float],
    currents: Tensor,
    coherence: Tensor,
    found: fusedrnn.FixedPoints,
) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.plot(COHERENCES, curve, "o-", color="black")
    left.axhline(0.5, color="gray", linewidth=0.5)
    left.set(xlabel="coherence", ylabel="choices of the right side", ylim=(-0.03, 1.03))

    # The axes are the first two principal components of the currents in the trials drawn.
    currents = currents[FIXATION:-RESPONSE]
    mean = currents.mean((0, 1))
    axes = torch.linalg.svd((currents - mean).flatten(0, 1), full_matrices=False)[2][:2].T
    paths, points = (currents - mean) @ axes, (found.points - mean) @ axes
    colors = plt.get_cmap("coolwarm")((coherence.numpy() + 0.64) / 1.28)
    for trial, color in zip(paths.unbind(1), colors):
        right.plot(*trial.T, color=color, linewidth=1, alpha=0.8)
    for stable, marker, face in ((True, "o", "black"), (False, "o", "white")):
        some = points[found.stable == stable].T
        name = "stable" if stable else "unstable"
        right.scatter(*some, marker=marker, color=face, edgecolors="black", zorder=3, label=name)
    right.set(xlabel="first principal component", ylabel="second principal component")
    right.legend(title="fixed points of the delay", loc="best")
    scale = plt.cm.ScalarMappable(plt.Normalize(-0.64, 0.64), "coolwarm")
    figure.colorbar(scale, ax=right, label="coherence")
    figure.savefig(path, dpi=120)


def main(
    iterations: int = 600, repeats: int = 200, path: Path | None = None
) -> tuple[list[float], fusedrnn.FixedPoints]:
    """Train a network; return its psychometric curve and its fixed points during the delay."""
    network = Network()
    train(network, iterations)
    curve = psychometric_curve(network, repeats)
    network.eval()  # turns off the noise of the network, but not that of the stimulus
    with torch.no_grad():
        coherence = torch.tensor(COHERENCES).repeat_interleave(4)
        _, _, currents = network(trials(coherence))
    starts = currents[FIXATION + STIMULUS - 1 : -RESPONSE].flatten(0, 1)
    starts = starts[torch.randperm(len(starts))[:200]]
    fixation = torch.tensor([1.0, 0.0, 0.0])
    found = fusedrnn.fixed_points(network.rnn, fixation, starts, tolerance=1e-6, distance=1e-2)
    if path is not None:
        draw(path, curve, currents, coherence, found)
    return curve, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("neuroscience.png"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more threads would mostly wait for each other
    curve, found = main(options.iterations, path=options.out)
    print("\ncoherence  choices of the right side")
    for coherence, fraction in zip(COHERENCES, curve):
        print(f"{coherence:9.2f}  {fraction:25.3f}")
    print(f"\n{found}\n\nfigure: {options.out}")
