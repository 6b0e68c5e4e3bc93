"""Model a distortion circuit with a small RNN, and run the model on a stream of audio.

    pip install fusedrnn[examples]
    python examples/amplifier.py

The circuit is a diode clipper: a resistor, and a capacitor parallel to two antiparallel diodes,

    dv/dt = (v_in - v) / (R C) - 2 I_s / C sinh(v / V_t),

integrated by the trapezoidal rule with Newton's method, at eight times the sample rate. An RNN is
trained on pairs of input and output by truncated backpropagation through time: the state passes
from segment to segment, but gradients do not. This is the method of Wright, Damskägg, Juvela and
Välimäki, "Real-time guitar amplifier emulation with deep learning", Applied Sciences 10(3), 2020.
Then the model processes a stream in blocks of 64 samples, as an audio driver delivers them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fusedrnn

RATE, OVERSAMPLING = 44100, 8
R, C, I_S, V_T = 2.2e3, 10e-9, 2.52e-9, 45.3e-3  # V_T includes the ideality factor of 1N4148 diodes
GAIN = 3.0  # volts at the input of the circuit
SEGMENT, BLOCK = 441, 64  # samples
UNITS = 24


def guitar(clips: int, samples: int, generator: np.random.Generator) -> np.ndarray:
    """Return plucked tones ``[samples, clips]``: decaying harmonics of a note."""
    seconds = np.arange(samples)[:, None] / RATE
    pitch = 82.4 * 2 ** (generator.integers(0, 37, clips) / 12)
    sound = np.zeros((samples, clips))
    for harmonic in range(1, 9):
        phase = 2 * np.pi * generator.random(clips)
        strength = generator.random(clips) / harmonic
        decay = np.exp(-seconds * 2 * harmonic)
        sound += strength * decay * np.sin(2 * np.pi * harmonic * pitch * seconds + phase)
    return sound / np.abs(sound).max(0) * generator.uniform(0.1, 1.0, clips)


def circuit(volts: np.ndarray) -> np.ndarray:
    """Return the output of the clipper for an input ``[samples, clips]`` in volts."""
    h = 1 / (RATE * OVERSAMPLING)

    def slope(v: np.ndarray, v_in: np.ndarray) -> np.ndarray:
        return (v_in - v) / (R * C) - 2 * I_S / C * np.sinh(v / V_T)

    v, before = np.zeros(volts.shape[1]), volts[0]
    output = np.empty_like(volts)
    for n, after in enumerate(volts):
        for k in range(OVERSAMPLING):
            old, new = (before + (after - before) * (k + i) / OVERSAMPLING for i in (0, 1))
            fixed = v + h / 2 * slope(v, old)
            for _ in range(4):
                error = v - fixed - h / 2 * slope(v, new)
                derivative = 1 + h / 2 * (1 / (R * C) + 2 * I_S / (C * V_T) * np.cosh(v / V_T))
                v = v - np.clip(error / derivative, -0.1, 0.1)  # sinh overflows far from the root
        output[n], before = v, after
    return output


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fusedrnn.RNN(1, UNITS)
        self.output = nn.Linear(UNITS, 1)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h, state = self.rnn(x, state)
        return self.output(h), state


def error_to_signal(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum() / target.square().sum()


def train(model: Model, x: Tensor, target: Tensor, epochs: int) -> None:
    """Train on clips ``[samples, clips, 1]`` with truncated BPTT."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=1e-5)
    for epoch in range(epochs):
        state = model.rnn.init_state(x.size(1))
        losses = []
        for x_part, target_part in zip(x.split(SEGMENT), target.split(SEGMENT)):
            y, state = model(x_part, state.detach())
            loss = error_to_signal(y, target_part)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}: error to signal {np.mean(losses):.4f}")


class Result(NamedTuple):
    error_to_signal: float  # on notes that were not used in training
    real_time_factor: float  # seconds of audio processed per second
    same_bits: bool  # whether blocks give the same bits as the whole sequence


@torch.inference_mode()
def stream(model: Model, x: Tensor) -> tuple[Tensor, float]:
    """Return the output for blocks of ``x [samples, 1, 1]``, and the real-time factor."""
    state = model.rnn.init_state(1)
    outputs = []
    start = time.perf_counter()
    for block in x.split(BLOCK):
        y, state = model(block, state)
        outputs.append(y)
    return torch.cat(outputs), len(x) / RATE / (time.perf_counter() - start)


def draw(path: Path, x: Tensor, target: Tensor, y: Tensor) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    part = slice(2000, 2600)
    milliseconds = np.arange(len(x))[part] / RATE * 1e3
    left.plot(milliseconds, x[part], color="lightgray", label="input")
    left.plot(milliseconds, target[part], color="black", label="circuit")
    left.plot(milliseconds, y[part], "--", color="tab:red", label="model")
    left.margins(y=0.15)
    left.set(xlabel="time (ms)", ylabel="voltage (V)")
    left.legend(loc="upper center", ncols=3)
    frequencies = np.fft.rfftfreq(len(x), 1 / RATE) / 1e3
    for signal, color, name in ((target, "black", "circuit"), (y, "tab:red", "model")):
        spectrum = np.abs(np.fft.rfft(signal.numpy() * np.hanning(len(signal))))
        decibels = 20 * np.log10(spectrum / spectrum.max() + 1e-12)
        right.plot(frequencies, decibels, color=color, linewidth=0.7, alpha=0.8, label=name)
    right.set(xlabel="frequency (kHz)", ylabel="level (dB)", xlim=(0, 8), ylim=(-90, 3))
    right.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def main(epochs: int = 60, samples: int = 8820, path: Path | None = None) -> Result:
    """Train a model; return its quality and its speed."""
    generator = np.random.default_rng(0)
    volts = GAIN * guitar(48, samples, generator)
    pairs = [torch.from_numpy(s).float().unsqueeze(-1) for s in (volts, circuit(volts))]
    (x, x_test), (target, target_test) = (pair.split([40, 8], 1) for pair in pairs)
    model = Model()
    train(model, x, target, epochs)
    with torch.inference_mode():
        y_test, _ = model(x_test, model.rnn.init_state(8))
        error = error_to_signal(y_test, target_test).item()
        one = x_test[: samples // BLOCK * BLOCK, :1]
        runs = [stream(model, one) for _ in range(9)]
        # The largest factor is that of the run with the fewest interruptions.
        y, factor = runs[0][0], max(factor for _, factor in runs)
        whole, _ = model(one, model.rnn.init_state(1))
    if path is not None:
        draw(path, one[:, 0, 0], target_test[: len(y), 0, 0], y[:, 0, 0])
    return Result(error, factor, torch.equal(y, whole))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("amplifier.png"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more threads would mostly wait for each other
    result = main(options.epochs, path=options.out)
    print(f"error to signal  {result.error_to_signal:.4f}")
    print(f"blocks of {BLOCK}     {result.real_time_factor:.0f} times real time")
    print(f"same bits as the whole sequence: {result.same_bits}\nfigure: {options.out}")
