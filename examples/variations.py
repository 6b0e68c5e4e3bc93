"""Variations of the blog post's RNN, trained side by side on the same text.

    python examples/variations.py [--figure FILE] [--chars N] [--epochs N]

Every variation reads the same characters, in batches of the same number of characters. The
variations take turns, so that other load on the machine affects all alike. This takes two minutes
at most on two cores. The figure, which needs matplotlib, shows the loss of each variation against
the characters read.

Letters: T steps, B rows, V symbols, H hidden units.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from charlm import sequence_batches
from torch import Tensor, nn
from torch.nn import functional as F

import fusedrnn
from fusedrnn.unmask.model import Vocabulary, read_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EMBEDDING, HIDDEN = 32, 128
BATCH = 512  # characters
TURN = 20  # batches

RNNMaker = Callable[..., fusedrnn.RNN | fusedrnn.LeakyRNN]


@dataclass(frozen=True)
class Variation:
    """A task and a model: what is predicted, and by which RNN."""

    name: str
    steps: int  # characters between two updates, through which gradients flow
    rnn: RNNMaker = fusedrnn.RNN
    carry: bool = False  # start from the last state of the previous batch, without its gradient
    # "next": the character after every step; "last": that after the last step; "hidden": the hidden
    # characters.
    predict: str = "next"


def leaky(*args: int) -> fusedrnn.LeakyRNN:
    return fusedrnn.LeakyRNN(*args, alpha=0.5)


def relu(*args: int) -> fusedrnn.RNN:
    return fusedrnn.RNN(*args, nonlinearity="relu")


def stacked(*args: int) -> fusedrnn.RNN:
    return fusedrnn.RNN(*args, num_layers=2)


def both_ways(*args: int) -> fusedrnn.RNN:
    return fusedrnn.RNN(*args, bidirectional=True)


VARIATIONS = [
    Variation("many to one", 8, predict="last"),  # the model of the blog post
    Variation("every step predicts", 8),
    Variation("carried state", 64, carry=True),  # truncated BPTT
    Variation("carried, relu", 64, relu, carry=True),
    Variation("carried, leaky", 64, leaky, carry=True),
    Variation("carried, stacked", 64, stacked, carry=True),
    # Sees what follows, so it cannot predict the next character: it predicts hidden ones instead.
    Variation("bidirectional tagger", 64, both_ways, predict="hidden"),
]


class Model(nn.Module):
    """An embedding, an RNN and a linear layer; the last symbol of the embedding stands for "?"."""

    def __init__(self, symbols: int, rnn: RNNMaker) -> None:
        super().__init__()
        self.e = nn.Embedding(symbols + 1, EMBEDDING)
        self.rnn = rnn(EMBEDDING, HIDDEN)
        self.l_out = nn.Linear(HIDDEN * (2 if self.rnn.bidirectional else 1), symbols)

    def forward(self, cs: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map characters [T, B] and a state to the states [T, B, D * H] and the last state."""
        return self.rnn(self.e(cs), hidden)


@dataclass
class Run:
    """A variation in training."""

    variation: Variation
    model: Model
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    state: Tensor | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        self.generator = torch.Generator().manual_seed(0)  # selects the hidden characters

    def loss(self, cs: Tensor, following: Tensor) -> Tensor:
        """Compute the mean negative log likelihood, in nats, of the characters to predict."""
        v, model = self.variation, self.model
        if v.predict == "hidden":
            hidden = torch.rand(cs.shape, generator=self.generator) < 0.2
            states, _ = model(torch.where(hidden, model.e.num_embeddings - 1, cs), None)
            return F.cross_entropy(model.l_out(states[hidden]), cs[hidden])
        states, last = model(cs, self.state)
        self.state = last.detach() if v.carry else None
        if v.predict == "last":
            states, following = states[-1:], following[-1:]
        return F.cross_entropy(model.l_out(states.flatten(0, 1)), following.flatten())

    def update(self, cs: Tensor, following: Tensor) -> None:
        """Take one step of gradient descent."""
        self.optimizer.zero_grad()
        loss = self.loss(cs, following)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)  # the gradient of relu may explode
        self.optimizer.step()
        self.losses.append(loss.item())

    @property
    def final(self) -> float:
        """The mean loss of the last tenth of the training."""
        tail = self.losses[-max(len(self.losses) // 10, 1) :]
        return sum(tail) / len(tail)


def train(chars: int, epochs: int) -> list[Run]:
    """Train all variations in turns."""
    text = read_text(None, chars)
    vocabulary = Vocabulary.of(text)
    numbers = vocabulary.encode(text)
    runs, batches = [], []
    for variation in VARIATIONS:
        torch.manual_seed(0)
        runs.append(Run(variation, Model(len(vocabulary.characters), variation.rnn)))
        whole = sequence_batches(numbers, variation.steps, BATCH // variation.steps)
        batches.append([batch for batch in whole if len(batch[0]) == variation.steps] * epochs)
    for first in range(0, max(map(len, batches)), TURN):
        for run, of_run in zip(runs, batches, strict=True):
            start = time.perf_counter()
            for batch in of_run[first : first + TURN]:
                run.update(*batch)
            run.seconds += time.perf_counter() - start
    return runs


def draw(runs: list[Run]) -> Figure:
    """Draw the losses of all runs against the characters read, in a new figure."""
    from matplotlib import pyplot, rcParams

    text = rcParams["text.color"]
    colours = [text, "#E69F00", "#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for run, colour in sorted(zip(runs, colours), key=lambda pair: -pair[0].final):
        losses = torch.tensor(run.losses)
        width = max(len(losses) // 40, 1)
        smooth = losses.unfold(0, width, 1).median(1).values
        read = (torch.arange(len(smooth)) + width) * BATCH
        label = f"{run.variation.name} ({run.final:.2f})"
        axes.plot(read.numpy(), smooth.numpy(), color=colour, label=label)
    axes.set_xlabel("characters read")
    axes.set_ylabel("loss (nats per predicted character), running median")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:,.0f},000" if value else "0")
    axes.set_title("Variations of an RNN on the same text (loss at the end)")
    axes.legend()
    return figure


def main(words: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", metavar="FILE", help="write the loss curves to an image")
    parser.add_argument("--chars", type=int, default=400_000, help="length of the text")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args(words)
    # Threads that share so small a step mostly wait for each other, above all on a loaded machine.
    torch.set_num_threads(1)
    runs = train(options.chars, options.epochs)
    print(f"{'':22}{'characters a second':>20}{'loss at the end':>18}")
    for run in runs:
        rate = len(run.losses) * BATCH / run.seconds
        print(f"{run.variation.name:22}{rate:20,.0f}{run.final:18.3f}")
    if options.figure:
        from matplotlib import rc_context

        from fusedrnn import plots

        with rc_context(plots.style()):
            draw(runs).savefig(options.figure)
    return runs


if __name__ == "__main__":
    main()
