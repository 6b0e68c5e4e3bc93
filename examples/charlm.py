"""Train the character model from which this project began, with fusedrnn and without.

    python examples/charlm.py

Part 1 is the blog post's model: eight characters predict the next one. It compares a Python loop
with ``fusedrnn.recurrence``. Part 2 is the sequence form of the model: every character predicts the
next one, and the state is carried from chunk to chunk. It compares a Python loop and ``nn.RNN``
with ``fusedrnn.RNN``. In each part, all models start from the same weights and see the same
batches, so their losses agree.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedrnn
from fusedrnn.unmask.model import CharLoopModel, UserError, Vocabulary, read_text, window_batches

EMBEDDING, CONTEXT, BATCH = 42, 8, 16  # BATCH windows of CONTEXT characters in part 1
CHUNK, STREAMS = 64, 4  # STREAMS parts of the text, read in parallel, in part 2
TEMPERATURE = 0.8  # for the text written at the end; lower values favour likely characters


class CharFusedModel(CharLoopModel):
    """The same model as `CharLoopModel`, with one call in place of the loop.

    With the weight W and the bias b of l_hidden, and with ``v = relu(l_in(e(c)))``::

        l_hidden(hidden + v)  =  hidden @ W.T + u      where  u = v @ W.T + b = l_hidden(v)

    u depends only on the character, so it is computed once for each distinct character.
    """

    def forward(self, *cs: Tensor) -> Tensor:
        different, which = torch.stack(cs).unique(return_inverse=True)  # [D], indices [T, B]
        v = F.relu(self.l_in(self.e(different)))  # [D, H]
        u = F.embedding(which, self.l_hidden(v))  # [T, B, H]
        _, hidden = fusedrnn.recurrence(u, None, self.l_hidden.weight)  # h0 = None: zeros
        return F.log_softmax(self.l_out(hidden), dim=-1)


class CharSequenceModel(nn.Module):
    """The sequence form of the model, whose RNN is ``torch.nn.RNN`` or ``fusedrnn.RNN``."""

    def __init__(
        self, vocab_size: int, n_in: int, h: int, rnn: Callable[[int, int], nn.RNNBase] = nn.RNN
    ) -> None:
        super().__init__()
        self.e = nn.Embedding(vocab_size, n_in)
        self.rnn = rnn(n_in, h)
        self.l_out = nn.Linear(h, vocab_size)

    def forward(self, cs: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return log probabilities of what follows characters [T, B], [T, B, V], and the state."""
        states, hidden = self.rnn(self.e(cs), hidden)
        return F.log_softmax(self.l_out(states), dim=-1), hidden


class CharSequenceLoopModel(CharSequenceModel):
    """The same model as `CharSequenceModel`, run by a Python loop as in the blog post."""

    def forward(self, cs: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh = self.rnn.all_weights[0]
        h = w_hh.new_zeros(cs.size(1), w_hh.size(0)) if hidden is None else hidden[0]
        states = []
        for c in cs:
            h = torch.tanh(F.linear(self.e(c), w_ih, b_ih) + F.linear(h, w_hh, b_hh))
            states.append(h)
        return F.log_softmax(self.l_out(torch.stack(states)), dim=-1), h.unsqueeze(0)


def sequence_batches(text: Tensor, chunk: int, streams: int) -> list[tuple[Tensor, Tensor]]:
    """Split the text into ``streams`` columns, read in parallel, ``chunk`` characters at a time."""
    columns = text[: len(text) // streams * streams].view(streams, -1).T.contiguous()
    return list(zip(columns[:-1].split(chunk), columns[1:].split(chunk), strict=True))


@dataclass
class Run:
    """One model in training, its time, and its mean loss in each epoch."""

    model: nn.Module
    lr: float = 1e-3
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, fused=True)

    def gradient(self, cs: Tensor, following: Tensor) -> float:
        """Run one forward and backward pass and return the mean negative log likelihood."""
        self.optimizer.zero_grad()
        if following.dim() == 1:  # the characters after windows
            log_p = self.model(*cs)
        else:
            log_p, hidden = self.model(cs, self.hidden)
            self.hidden = hidden.detach()  # gradients stop here (truncated BPTT)
        loss = F.nll_loss(log_p.flatten(0, -2), following.flatten())
        loss.backward()
        return loss.item()


def compete(runs: dict[str, Run], epochs: list[list[tuple[Tensor, Tensor]]]) -> None:
    """Train the runs in turns of 25 batches, so that other load on the machine affects all alike.

    Each run starts an epoch with an untimed pass, because first calls are slower.
    """
    start = next(iter(runs.values())).model.state_dict()
    for run in runs.values():
        run.model.load_state_dict(start)
    print("\n  mean loss" + "".join(f"{name:>14}" for name in runs) + f"{'apart by':>12}")
    for number, batches in enumerate(epochs, start=1):
        for run in runs.values():
            run.gradient(*batches[0])
            run.hidden = None
            run.losses.append(0.0)
        count = sum(following.numel() for _, following in batches)
        for first in range(0, len(batches), 25):
            for run in runs.values():
                begin = time.perf_counter()
                for cs, following in batches[first : first + 25]:
                    run.losses[-1] += run.gradient(cs, following) * following.numel() / count
                    run.optimizer.step()
                run.seconds += time.perf_counter() - begin
        losses = [run.losses[-1] for run in runs.values()]
        if not all(map(math.isfinite, losses)):
            raise UserError("the training diverged")
        row = "".join(f"{loss:14.6f}" for loss in losses)
        print(f"  epoch {number:3}{row}{max(losses) - min(losses):12.1e}")
    fused = list(runs)[-1]
    for name, run in runs.items():
        ratio = f"   {fused} is {run.seconds / runs[fused].seconds:.2f} times as fast"
        rate = len(epochs) * count / run.seconds
        print(f"  {name:14}{rate:12,.0f} characters a second{'' if name == fused else ratio}")


@torch.no_grad()
def write(model: nn.Module, prompt: Tensor, count: int) -> list[int]:
    """Continue ``prompt`` [T] by ``count`` characters."""
    cs, hidden, written = prompt.unsqueeze(1), None, []
    for _ in range(count):
        log_p, hidden = model(cs, hidden)
        cs = (log_p[-1] / TEMPERATURE).softmax(-1).multinomial(1)
        written.append(int(cs))
    return written


def main(words: list[str] | None = None) -> tuple[dict[str, Run], dict[str, Run]]:
    """Train the models of both parts; return the runs of each part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", metavar="FILE", help="default: Python's language reference")
    parser.add_argument("--chars", type=int, default=400_000, help="length of the text")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256, help="number of units")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options = parser.parse_args(words)
    text = read_text(options.text, options.chars)
    if len(text) < STREAMS * (CHUNK + 1):
        raise UserError(f"the text must have {STREAMS * (CHUNK + 1)} characters, got {len(text)}")
    vocabulary = Vocabulary.of(text)
    numbers = vocabulary.encode(text)
    sizes = len(vocabulary.characters), EMBEDDING, options.hidden
    print(f"{len(text):,} characters, {sizes[0]} different; {options.hidden} hidden units")
    torch.manual_seed(0)

    def runs(**models: nn.Module) -> dict[str, Run]:
        dtype = getattr(torch, options.dtype)
        return {name.replace("_", "."): Run(m.to(dtype)) for name, m in models.items()}

    print(f"\nPart 1, the blog post's model: {CONTEXT} characters predict the next one")
    windows = runs(loop=CharLoopModel(*sizes), fusedrnn=CharFusedModel(*sizes))
    compete(windows, [window_batches(numbers, CONTEXT, BATCH, i) for i in range(options.epochs)])

    print(f"\nPart 2, its sequence form: {STREAMS} streams in chunks of {CHUNK} characters")
    loop, layer = CharSequenceLoopModel(*sizes), CharSequenceModel(*sizes)
    fused = CharSequenceModel(*sizes, fusedrnn.RNN)
    sequences = runs(loop=loop, nn_RNN=layer, fusedrnn_RNN=fused)
    compete(sequences, [sequence_batches(numbers, CHUNK, STREAMS)] * options.epochs)

    print("\nThe last model continues the text:\n")
    print(vocabulary.decode([*numbers[:CONTEXT], *write(fused, numbers[:CONTEXT], 400)]))
    return windows, sequences


if __name__ == "__main__":
    # Print each line at once, also to a pipe, and replace characters that a terminal does not have.
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        main()
    except UserError as error:
        sys.exit(f"charlm: {error}")
