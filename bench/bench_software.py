#!/usr/bin/env python3
"""Train programs of other projects with nn.RNN and with fusedrnn; compare their losses and speed.

This script installs pyro and darts into its own environment, build/software, and runs itself there
with the fusedrnn of this checkout. Each program is built and trained from the same seed with nn.RNN
and with ``torch.nn.RNN = fusedrnn.RNN``, in turns A B A B; its code is the same both times. A
speed-up is that of the whole training, including everything that is not an RNN. See
bench/README.md.

- **word language model**: the network and the training of pytorch/examples/word_language_model, on
  Python's language reference. PyTorch's examples are not packaged, so this is a rewrite.
- **Deep Markov Model**: that of pyro's examples (Krishnan, Shalit and Sontag, "Structured inference
  networks for nonlinear state space models", AAAI 2017). The examples are not in pyro's wheel, so
  this is a rewrite; the music is random.
- **darts**: ``RNNModel(model="RNN")``, trained by its ``fit``, on a series with two periods.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import re
import statistics
import subprocess
import sys
import time
import venv
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import Neighbours, available_cores, environment, number
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "build" / "software"
PACKAGES = ["pyro-ppl", "u8darts[torch]"]
TOLERANCE = 1e-3  # relative, for the loss of each update: rounding errors grow during training
ROUNDS = 3
LR = 0.1  # of the word language model; with the 20 of the example, relu diverges


# --- The programs: train for some updates and return the loss of each -----------------------------


class LanguageModel(nn.Module):
    def __init__(self, words: int, nonlinearity: str) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(words, 200)
        self.rnn = nn.RNN(200, 200, 2, nonlinearity=nonlinearity, dropout=0.2)
        self.decoder = nn.Linear(200, words)
        for weight in (self.encoder.weight, self.decoder.weight):
            nn.init.uniform_(weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        output, hidden = self.rnn(self.drop(self.encoder(x)), hidden)
        return F.log_softmax(self.decoder(self.drop(output)).flatten(0, 1), 1), hidden


def word_language_model(nonlinearity: str, updates: int) -> list[float]:
    from fusedrnn.unmask.model import language_reference

    words = re.findall(r"\w+|[^\w\s]", language_reference())
    numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
    text = torch.tensor([numbers[word] for word in words])
    columns = text[: len(text) // 20 * 20].view(20, -1).T.contiguous()
    model = LanguageModel(len(numbers), nonlinearity)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    hidden, losses = torch.zeros(2, 20, 200), []
    for i in range(updates):
        x, y = columns[35 * i : 35 * i + 35], columns[35 * i + 1 : 35 * i + 36]
        optimizer.zero_grad()
        log_p, hidden = model(x, hidden.detach())
        loss = F.nll_loss(log_p, y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        losses.append(loss.item())
    return losses


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse each row of x [B, T, N] in time, up to its length."""
    index = (lengths[:, None] - 1 - torch.arange(x.size(1))).clamp(min=0)
    return x.gather(1, index[..., None].expand_as(x))


class DeepMarkovModel(nn.Module):
    """Model notes x_t by latents z_t with gated transitions.

    For the approximate posterior q of z, pyro's guide, an RNN reads the notes in reverse.
    """

    def __init__(self, notes: int = 88, z: int = 100, hidden: int = 600) -> None:
        super().__init__()
        emission, transition = 100, 200
        self.emitter = nn.Sequential(
            *(nn.Linear(z, emission), nn.ReLU(), nn.Linear(emission, emission), nn.ReLU()),
            *(nn.Linear(emission, notes), nn.Sigmoid()),
        )
        self.gate = nn.Sequential(
            nn.Linear(z, transition), nn.ReLU(), nn.Linear(transition, z), nn.Sigmoid()
        )
        self.proposal = nn.Sequential(nn.Linear(z, transition), nn.ReLU(), nn.Linear(transition, z))
        self.kept = nn.Linear(z, z)
        nn.init.eye_(self.kept.weight)
        nn.init.zeros_(self.kept.bias)
        self.scale = nn.Sequential(nn.ReLU(), nn.Linear(z, z), nn.Softplus())
        self.combine = nn.Sequential(nn.Linear(z, hidden), nn.Tanh())
        self.loc_q = nn.Linear(hidden, z)
        self.scale_q = nn.Sequential(nn.Linear(hidden, z), nn.Softplus())
        self.rnn = nn.RNN(notes, hidden, nonlinearity="relu", batch_first=True)
        self.z_0, self.z_q_0 = (nn.Parameter(torch.zeros(z)) for _ in range(2))
        self.h_0 = nn.Parameter(torch.zeros(1, 1, hidden))

    def model(self, x: Tensor, lengths: Tensor) -> None:
        import pyro
        from pyro import distributions as dist

        pyro.module("dmm", self)
        mask = torch.arange(x.size(1)) < lengths[:, None]
        z = self.z_0.expand(len(x), -1)
        with pyro.plate("rows", len(x)):
            for t in pyro.markov(range(x.size(1))):
                here = mask[:, t : t + 1]
                gate, proposal = self.gate(z), self.proposal(z)
                loc = (1 - gate) * self.kept(z) + gate * proposal
                normal = dist.Normal(loc, self.scale(proposal))
                z = pyro.sample(f"z_{t}", normal.mask(here).to_event(1))
                played = dist.Bernoulli(self.emitter(z)).mask(here).to_event(1)
                pyro.sample(f"x_{t}", played, obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        import pyro
        from pyro import distributions as dist

        pyro.module("dmm", self)
        mask = torch.arange(x.size(1)) < lengths[:, None]
        packed = pack_padded_sequence(
            reverse(x, lengths), lengths, batch_first=True, enforce_sorted=False
        )
        output, _ = self.rnn(packed, self.h_0.expand(-1, len(x), -1).contiguous())
        future = reverse(pad_packed_sequence(output, batch_first=True)[0], lengths)
        z = self.z_q_0.expand(len(x), -1)
        with pyro.plate("rows", len(x)):
            for t in pyro.markov(range(x.size(1))):
                h = (self.combine(z) + future[:, t]) / 2
                normal = dist.Normal(self.loc_q(h), self.scale_q(h))
                z = pyro.sample(f"z_{t}", normal.mask(mask[:, t : t + 1]).to_event(1))


def deep_markov_model(updates: int) -> list[float]:
    import pyro

    pyro.clear_param_store()
    lengths = torch.randint(20, 130, (updates, 20))  # those of the JSB chorales are up to 129
    music = (torch.rand(updates, 20, 129, 88) < 4 / 88).float()  # four voices
    dmm = DeepMarkovModel()
    optimizer = pyro.optim.ClippedAdam(
        {"lr": 3e-4, "betas": (0.96, 0.999), "clip_norm": 10.0, "lrd": 0.99996, "weight_decay": 2.0}
    )
    svi = pyro.infer.SVI(dmm.model, dmm.guide, optimizer, pyro.infer.Trace_ELBO())
    losses = []
    for x, length in zip(music, lengths):
        losses.append(svi.step(x[:, : length.max()], length) / float(length.sum()))
    return losses


def darts_rnn_model(updates: int) -> list[float]:
    import numpy as np
    from darts import TimeSeries
    from darts.models import RNNModel
    from pytorch_lightning.callbacks import Callback

    losses: list[float] = []

    class Record(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    hours = np.arange(32 * updates + 168)
    noise = np.random.default_rng(0).normal(scale=0.1, size=len(hours))
    values = np.sin(hours * 2 * np.pi / 24) + np.sin(hours * 2 * np.pi / 168) + noise
    model = RNNModel(
        input_chunk_length=96,
        model="RNN",
        hidden_dim=25,  # the default of darts
        training_length=168,
        n_epochs=1,
        random_state=0,
        pl_trainer_kwargs={
            "accelerator": "cpu",
            "callbacks": [Record()],
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )
    model.fit(TimeSeries.from_values(values.astype(np.float32)))
    return losses


class Program(NamedTuple):
    name: str
    train: Callable[[int], list[float]]
    updates: int


PROGRAMS = [
    Program("word language model, RNN_TANH", lambda n: word_language_model("tanh", n), 12),
    Program("word language model, RNN_RELU", lambda n: word_language_model("relu", n), 12),
    Program("Deep Markov Model of pyro", deep_markov_model, 3),
    Program("RNNModel of darts", darts_rnn_model, 40),
]


# --- Comparison -----------------------------------------------------------------------------------


@contextlib.contextmanager
def assigned(rnn: type[nn.RNNBase]) -> Iterator[None]:
    """Build models with another class in place of ``torch.nn.RNN``."""
    torch_rnn = torch.nn.RNN
    torch.nn.RNN = rnn  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.nn.RNN = torch_rnn  # type: ignore[misc]


class Comparison(NamedTuple):
    program: str
    updates: int
    torchs: float  # median ms of an update, with everything in it
    fused: float
    speed_up: float  # median of the ratios of each round
    difference: float  # largest relative difference of the loss of an update
    losses: tuple[float, float]  # of the first and the last update

    @property
    def same(self) -> bool:
        return self.difference <= TOLERANCE  # False for nan


def compare(program: Program, rounds: int = ROUNDS) -> Comparison:
    """Train in turns A B A B, after one update of each that is not timed."""
    import fusedrnn

    kinds = (nn.RNN, fusedrnn.RNN)
    losses: list[list[float]] = []
    times: list[list[float]] = []
    for turn in range(rounds + 1):
        losses, found = [], []
        for kind in kinds:
            torch.manual_seed(0)
            with assigned(kind):
                begin = time.perf_counter()
                losses.append(program.train(program.updates if turn else 1))
                found.append(1e3 * (time.perf_counter() - begin) / len(losses[-1]))
        if turn:
            times.append(found)
    difference = max(abs(a - b) / abs(a) for a, b in zip(*losses))
    torchs, fused = map(statistics.median, zip(*times))
    speed_up = statistics.median(a / b for a, b in times)
    ends = (losses[1][0], losses[1][-1])
    return Comparison(program.name, program.updates, torchs, fused, speed_up, difference, ends)


HEADER = ["program", "updates", "nn.RNN ms", "fusedrnn ms", "×", "difference", "loss"]


def row(c: Comparison) -> list[str]:
    times = [number(c.torchs), number(c.fused), f"{c.speed_up:.2f}"]
    loss = f"{c.losses[0]:.3f} to {c.losses[1]:.3f}"
    difference = f"{c.difference:.1e}" + ("" if c.same else " DIFFERENT")
    return [c.program, str(c.updates), *times, difference, loss]


def line(cells: list[str]) -> str:
    return cells[0].ljust(32) + "".join(cell.rjust(13) for cell in cells[1:-1]) + "   " + cells[-1]


def describe(threads: int) -> list[str]:
    setting = environment(threads, "float32", 0)
    packages = {**setting["versions"]}
    for name in ("pyro-ppl", "u8darts", "pytorch-lightning"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return [
        f"{setting['cpu']}, {setting['cores']} cores, torch uses {setting['instruction_set']}",
        f"{setting['os']}; " + ", ".join(f"{k} {v}" for k, v in packages.items()),
        f"{threads} threads, {setting['date']}, commit {setting['commit']}: "
        + setting["command"].replace(" --inside", ""),
        f"ms of an update of the whole program, medians of {ROUNDS} trainings in turns; "
        "×: times as fast with fusedrnn; difference: largest of all losses, relative",
    ]


# --- The environment ------------------------------------------------------------------------------


def install() -> Path:
    """Create the environment if it does not exist, and return its Python."""
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if not done.exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        torch_version = torch.__version__.partition("+")[0]  # with which fusedrnn was built
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
        subprocess.run([*command, f"torch=={torch_version}", *PACKAGES], check=True)
        done.touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--programs", default="", help="only those whose name contains this")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [str(install()), __file__, "--inside", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}).returncode
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    print("\n".join([*describe(options.threads), "", line(HEADER)]), flush=True)
    neighbours, same = Neighbours(), True
    for program in PROGRAMS:
        if options.programs in program.name:
            found = compare(program)
            same &= found.same
            print(line(row(found)), flush=True)
    print(f"\nOther processes kept {neighbours.cores():g} cores busy meanwhile.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
