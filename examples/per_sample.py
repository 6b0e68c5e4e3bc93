"""Train a classifier with differential privacy: the gradient of every sample, from one call.

    pip install fusedrnn[examples]
    python examples/per_sample.py

DP-SGD clips the gradient of each sample to the norm C, and adds noise with the standard deviation
noise multiplier × C to their sum. ``vmap(grad(loss))`` computes the gradients of all samples;
fusedrnn runs its kernel once for all of them. The end of the output compares this with a loop over
the samples, and both with nn.RNN. The data are the handwritten digits of scikit-learn, 8 by 8
pixels, read row by row: a sequence of 8 steps.

No epsilon is given, because this file has no privacy accountant. ``examples/private_training.py``
trains with opacus, which has one.

Source: Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar and Zhang, "Deep learning with differential
privacy", CCS 2016, algorithm 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import fusedrnn

UNITS, CLASSES, TEST = 64, 10, 360
BATCH = 256  # mean size of a batch: each sample is drawn with probability BATCH / samples
CLIP, NOISE_MULTIPLIER, LR = 1.0, 1.0, 0.01

Gradients = dict[str, Tensor]  # [B, ...] for each parameter


class Classifier(nn.Module):
    def __init__(self, rnn: Callable[[int, int], nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = rnn(8, UNITS)
        self.head = nn.Linear(UNITS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows of pixels [8, B, 8] to logits [B, 10]."""
        # nn.RNN fails under vmap if the state is not batched like x; fusedrnn would need no state.
        state = torch.zeros_like(x[:1, :, :1]).expand(-1, -1, UNITS)
        _, h_n = self.rnn(x, state)
        return self.head(h_n[0])


def loss_of(model: Classifier, parameters: Gradients, x: Tensor, y: Tensor) -> Tensor:
    """Compute the loss of one sample: x [8, 8], y []."""
    return F.cross_entropy(functional_call(model, parameters, x[:, None]), y[None])


def by_vmap(model: Classifier, x: Tensor, y: Tensor) -> Gradients:
    """Return the gradients of the loss of each sample of x [8, B, 8] and y [B]."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: Gradients, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(model, parameters, x, y)

    return vmap(grad(loss), (None, 1, 0))(parameters, x, y)


def by_loop(model: Classifier, x: Tensor, y: Tensor) -> Gradients:
    """Return the same gradients, computed sample by sample."""
    parameters = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(loss_of(model, parameters, *sample), list(parameters.values()))
        for sample in zip(x.unbind(1), y)
    ]
    return dict(zip(parameters, map(torch.stack, zip(*rows))))


def private(gradients: Gradients) -> Gradients:
    """Return the clipped and noised sum over the samples, divided by the mean batch size."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)  # [B]
    scale = (CLIP / norms).clamp(max=1)
    sums = {name: torch.tensordot(scale, g, 1) for name, g in gradients.items()}
    deviation = NOISE_MULTIPLIER * CLIP
    return {name: (g + deviation * torch.randn_like(g)) / BATCH for name, g in sums.items()}


def mean(gradients: Gradients) -> Gradients:
    return {name: g.sum(0) / BATCH for name, g in gradients.items()}


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows of pixels [8, N, 8] and digits [N], for training and for the test."""
    images, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(images, dtype=torch.float32) / 16)[order].view(-1, 8, 8).transpose(0, 1)
    y = torch.tensor(digits)[order]
    return x[:, TEST:], y[TEST:], x[:, :TEST], y[:TEST]


def train(reduce: Callable[[Gradients], Gradients], updates: int) -> float:
    """Train with per-sample gradients, which ``reduce`` combines; return the test accuracy."""
    torch.manual_seed(0)
    x, y, test_x, test_y = data()
    model = Classifier(fusedrnn.RNN)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    for _ in range(updates):
        drawn = torch.rand(len(y)) < BATCH / len(y)  # as the analysis of DP-SGD assumes
        gradients = reduce(by_vmap(model, x[:, drawn], y[drawn]))
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
    with torch.no_grad():
        return (model(test_x).argmax(-1) == test_y).double().mean().item()


class Row(NamedTuple):
    name: str
    error: float  # largest difference from nn.RNN in a loop, in units of its largest gradient
    milliseconds: float


def compare(rounds: int) -> list[Row]:
    """Compute the per-sample gradients of one batch in four ways, and time them in turns."""
    torch.manual_seed(0)
    x, y = data()[0][:, :BATCH], data()[1][:BATCH]
    torchs, fused = Classifier(nn.RNN), Classifier(fusedrnn.RNN)
    fused.load_state_dict(torchs.state_dict())
    ways = {
        "loop over samples, nn.RNN": (by_loop, torchs),
        "loop over samples, fusedrnn": (by_loop, fused),
        "vmap, nn.RNN": (by_vmap, torchs),
        "vmap, fusedrnn": (by_vmap, fused),
    }
    results = [way(model, x, y) for way, model in ways.values()]
    errors = [
        max(float((g - result[k]).abs().max() / g.abs().max()) for k, g in results[0].items())
        for result in results
    ]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for (way, model), found in zip(ways.values(), times):
            begin = time.perf_counter()
            way(model, x, y)
            found.append(1e3 * (time.perf_counter() - begin))
    return [Row(*row) for row in zip(ways, errors, map(statistics.median, times))]


def main(updates: int = 400, rounds: int = 11) -> tuple[float, float, list[Row]]:
    """Return the accuracy with and without privacy, and the comparison."""
    return train(private, updates), train(mean, updates), compare(rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads would mostly wait for each other
    with_privacy, without, rows = main(options.updates)
    print(f"{options.updates} updates with about {BATCH} samples each; accuracy in the test:")
    print(f"  {with_privacy:.3f} with C = {CLIP:g} and noise multiplier {NOISE_MULTIPLIER:g}")
    print(f"  {without:.3f} without clipping and noise")
    print(f"\ngradients of each of {BATCH} samples       ms        ×     difference")
    for row in rows:
        times = rows[0].milliseconds / row.milliseconds
        print(f"{row.name:30}{row.milliseconds:13.2f}{times:9.1f}{row.error:15.1e}")
