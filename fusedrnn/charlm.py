"""Train the character model from which this project began: ``python -m fusedrnn charlm``.

Part 1 is the blog post's model. Eight characters predict the next one. `CharLoopModel` runs the
recurrence in a Python loop, `CharFusedModel` calls `fusedrnn.recurrence`.

Part 2 is its sequence form. Every character predicts the next one, and the hidden state is carried
from chunk to chunk. It is run by a Python loop, by `torch.nn.RNN` and by `fusedrnn.RNN`.

In each part all models start from the same weights and see the same batches, so their losses
agree and only the time differs.

Shapes: T steps, B rows, V different characters, N inputs (the embedding), H hidden units.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import RNN, recurrence

# --- The models -----------------------------------------------------------------------------------


class CharLoopModel(nn.Module):
    """The blog post's model: an RNN of two linear layers and an addition, in a loop.

    For each character c in turn, starting from a hidden state of zeros::

        hidden = tanh(l_hidden(hidden + relu(l_in(e(c)))))
    """

    def __init__(self, vocab_size: int, n_in: int, h: int) -> None:
        super().__init__()
        self.h = h
        self.e = nn.Embedding(vocab_size, n_in)
        self.l_in = nn.Linear(n_in, h)
        self.l_hidden = nn.Linear(h, h)
        self.l_out = nn.Linear(h, vocab_size)

    def forward(self, *cs: Tensor) -> Tensor:
        """Map T tensors [B] of characters to the log probabilities of the next one, [B, V]."""
        hidden = self.e.weight.new_zeros(len(cs[0]), self.h)
        for c in cs:
            inp = F.relu(self.l_in(self.e(c)))
            hidden = torch.tanh(self.l_hidden(hidden + inp))
        return F.log_softmax(self.l_out(hidden), dim=-1)


class CharFusedModel(CharLoopModel):
    """The same model as `CharLoopModel`, with one call in place of the loop.

    The linear layer distributes over the addition. With the weight W and the bias b of l_hidden,
    and with ``v = relu(l_in(e(c)))``::

        l_hidden(hidden + v)  =  hidden @ W.T + u      where  u = v @ W.T + b = l_hidden(v)

    u does not depend on the hidden state, so it is computed outside the loop. It depends only on
    the character, so it is computed once for each distinct character of the batch.
    """

    def forward(self, *cs: Tensor) -> Tensor:
        """Map T tensors [B] of characters to the log probabilities of the next one, [B, V]."""
        different, which = torch.stack(cs).unique(return_inverse=True)  # [D], indices [T, B]
        v = F.relu(self.l_in(self.e(different)))  # [D, H]
        u = F.embedding(which, self.l_hidden(v))  # [T, B, H]
        _, hidden = recurrence(u, None, self.l_hidden.weight)  # h0 = None: zeros
        return F.log_softmax(self.l_out(hidden), dim=-1)


RNNMaker = Callable[[int, int], nn.RNNBase]


class CharSequenceModel(nn.Module):
    """The sequence form, whose RNN is a layer: `torch.nn.RNN` or its drop-in `fusedrnn.RNN`.

    ``hidden = tanh(W_ih @ e(c) + b_ih + W_hh @ hidden + b_hh)``, and each hidden state predicts the
    next character.
    """

    def __init__(self, vocab_size: int, n_in: int, h: int, rnn: RNNMaker = nn.RNN) -> None:
        super().__init__()
        self.e = nn.Embedding(vocab_size, n_in)
        self.rnn = rnn(n_in, h)
        self.l_out = nn.Linear(h, vocab_size)

    def forward(self, cs: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict from characters [T, B] and the state before them, [1, B, H] (None: zeros).

        Returns the log probabilities of each next character, [T, B, V], and the state after them.
        """
        states, hidden = self.rnn(self.e(cs), hidden)
        return F.log_softmax(self.l_out(states), dim=-1), hidden


class CharSequenceLoopModel(CharSequenceModel):
    """The same model as `CharSequenceModel`, run by a Python loop as in the blog post."""

    def forward(self, cs: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Do the same as `CharSequenceModel.forward`."""
        w_ih, w_hh, b_ih, b_hh = self.rnn.all_weights[0]
        h = w_hh.new_zeros(cs.size(1), w_hh.size(0)) if hidden is None else hidden[0]
        states = []
        for c in cs:
            h = torch.tanh(F.linear(self.e(c), w_ih, b_ih) + F.linear(h, w_hh, b_hh))
            states.append(h)
        return F.log_softmax(self.l_out(torch.stack(states)), dim=-1), h.unsqueeze(0)


# --- Batches and losses ---------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]  # characters [T, B]; the next ones, [B] or [T, B]
LossOf = Callable[[nn.Module, Batch, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


def window_batches(text: Tensor, context: int, batch: int, seed: int) -> list[Batch]:
    """Return windows of ``context`` characters and the next one, in random order, for one epoch.

    The windows do not overlap. ``seed`` shifts their starts, so that epochs differ.
    """
    windows = text[seed % context :].unfold(0, context + 1, context)  # [windows, context + 1]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    rows = [windows[i].T.contiguous() for i in order.split(batch)]
    return [(row[:-1], row[-1]) for row in rows]


def window_loss(model: nn.Module, batch: Batch, hidden: Tensor | None) -> tuple[Tensor, None]:
    """Compute the mean negative log likelihood of the character after each window.

    No state is carried from batch to batch.
    """
    cs, following = batch
    return F.nll_loss(model(*cs), following), None


def sequence_batches(text: Tensor, chunk: int, streams: int) -> list[Batch]:
    """Split the text into ``streams`` columns, read in parallel, ``chunk`` characters at a time."""
    columns = text[: len(text) // streams * streams].view(streams, -1).T.contiguous()
    return list(zip(columns[:-1].split(chunk), columns[1:].split(chunk), strict=True))


def sequence_loss(
    model: nn.Module, batch: Batch, hidden: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute the mean negative log likelihood of every next character, and the next state.

    The state is detached: gradients stop at the end of the chunk (truncated BPTT), but the state is
    carried on.
    """
    cs, following = batch
    log_p, hidden = model(cs, hidden)
    return F.nll_loss(log_p.flatten(0, 1), following.flatten()), hidden.detach()


# --- Training -------------------------------------------------------------------------------------


@dataclass
class Run:
    """One model in training: its name, its training time, and its mean loss in each epoch."""

    name: str
    model: nn.Module
    lr: float
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, fused=True)
        self.hidden: Tensor | None = None

    def gradient(self, loss_of: LossOf, batch: Batch) -> float:
        """Run one forward and backward pass and return the loss."""
        self.optimizer.zero_grad()
        loss, self.hidden = loss_of(self.model, batch, self.hidden)
        loss.backward()
        return loss.item()


def train_epoch(
    runs: Sequence[Run], batches: Sequence[Batch], loss_of: LossOf, progress: Progress
) -> None:
    """Train every run on the same batches for one epoch.

    The runs take turns of 25 batches, so that other load on the machine affects all alike. Each
    starts with an untimed pass whose gradient is discarded, because first calls are slower.
    """
    totals = [0.0 for _ in runs]
    for run in runs:
        run.gradient(loss_of, batches[0])
        run.hidden = None
    for first in range(0, len(batches), 25):
        turn = batches[first : first + 25]
        for i, run in enumerate(runs):
            start = time.perf_counter()
            for batch in turn:
                totals[i] += run.gradient(loss_of, batch) * batch[1].numel()
                run.optimizer.step()
            run.seconds += time.perf_counter() - start
        progress.advance(len(turn))
    for run, total in zip(runs, totals, strict=True):
        run.losses.append(total / sum(following.numel() for _, following in batches))


class Progress:
    """A progress bar on a terminal; otherwise (a log file) a line every fifteen seconds."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self.label = label
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self.tty = self.stream.isatty()
        self.done = 0
        self.start = self.reported = time.monotonic()

    def advance(self, steps: int) -> None:
        """Count ``steps`` more as done and show the progress."""
        self.done += steps
        now = time.monotonic()
        share = self.done / self.total
        left = (now - self.start) * (1 - share) / share
        if self.tty:
            tail = f" {share:4.0%}, {left:.0f} s left "
            room = max(shutil.get_terminal_size().columns - len(self.label) - len(tail) - 4, 5)
            bar = "#" * round(room * share)
            self.stream.write(f"\r{self.label} [{bar:.<{room}}]{tail}")
        elif now - self.reported >= 15:
            self.reported = now
            self.stream.write(f"{self.label}: {share:.0%} done, {left:.0f} s left\n")
        self.stream.flush()

    def clear(self) -> None:
        """Erase the bar, to make room for a line of output."""
        if self.tty:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


# --- Text in, text out ----------------------------------------------------------------------------


class CharlmError(Exception):
    """A request that cannot be fulfilled; the message is shown to the user."""


def read_text(path: str | None, chars: int) -> str:
    """Read the first ``chars`` characters of a UTF-8 file.

    If ``path`` is None, take them from Python's language reference.
    """
    if path is None:
        return language_reference()[:chars]
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(chars)
    except OSError as error:
        raise CharlmError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CharlmError(f"{path} is not a text file: it is not UTF-8") from error
    if "\0" in text:
        raise CharlmError(f"{path} is not a text file: it holds NUL bytes")
    return text


def language_reference() -> str:
    """Return the text of Python's ``help("topics")``, which every CPython contains."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CharlmError(
            "this Python has no pydoc_data: choose a text with --text FILE"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Vocabulary:
    """The distinct characters of a text, sorted; the index of a character is its number."""

    characters: str

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """Build the vocabulary of ``text``."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tensor:
        """Return the numbers of the characters, [len(text)]."""
        number = {character: i for i, character in enumerate(self.characters)}
        return torch.tensor([number[character] for character in text])

    def decode(self, numbers: Iterable[int]) -> str:
        """Return the text for the numbers."""
        return "".join(self.characters[i] for i in numbers)


Writer = Callable[[nn.Module, Tensor, float, torch.Generator], Iterator[int]]


def draw(log_p: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw characters [B] from log probabilities [B, V]; low temperatures favour likely ones."""
    return (log_p / temperature).softmax(-1).multinomial(1, generator=generator).squeeze(1)


def write_windows(
    model: nn.Module, prompt: Tensor, temperature: float, generator: torch.Generator
) -> Iterator[int]:
    """Continue ``prompt`` [T] endlessly; the last T characters predict the next."""
    cs = list(prompt.unsqueeze(1))
    while True:
        cs = [*cs[1:], draw(model(*cs), temperature, generator)]
        yield int(cs[-1])


def write_sequence(
    model: nn.Module, prompt: Tensor, temperature: float, generator: torch.Generator
) -> Iterator[int]:
    """Continue ``prompt`` [T] endlessly; the hidden state summarises what was written."""
    cs, hidden = prompt.unsqueeze(1), None
    while True:
        log_p, hidden = model(cs, hidden)
        cs = draw(log_p[-1], temperature, generator).unsqueeze(0)
        yield int(cs)


# --- The demonstration ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Options of ``python -m fusedrnn charlm``. Part 1 uses windows, part 2 streams."""

    text: str | None = None
    chars: int = 400_000
    epochs: int = 3
    hidden: int = 256
    embedding: int = 42
    context: int = 8
    batch: int = 16
    chunk: int = 64
    streams: int = 4
    lr: float = 1e-3
    sample: int = 400
    temperature: float = 0.8
    dtype: str = "float32"
    seed: int = 0
    threads: int | None = None


def demonstrate(s: Settings) -> tuple[list[Run], list[Run]]:
    """Train and report both parts; return the runs of each, with the fused one last."""
    text = read_text(s.text, s.chars)
    needed = max(2 * s.context, s.streams * (s.chunk + 1))
    if len(text) < needed:
        raise CharlmError(
            f"the text is too short: {len(text):,} characters, and {s.streams} streams of "
            f"{s.chunk}-character chunks after windows of {s.context} need {needed:,}"
        )
    if s.threads is not None:
        torch.set_num_threads(s.threads)
    vocabulary = Vocabulary.of(text)
    numbers = vocabulary.encode(text)
    v, dtype = len(vocabulary.characters), getattr(torch, s.dtype)
    say(
        f"{len(text):,} characters of {s.text or 'the Python language reference'}, {v} different; "
        f"embedding {s.embedding}, hidden {s.hidden}, Adam {s.lr:g}, {s.dtype}, "
        f"{torch.get_num_threads()} threads"
    )

    def contest(models: dict[str, nn.Module]) -> list[Run]:
        start = next(iter(models.values())).state_dict()
        for model in models.values():
            model.load_state_dict(start)
        return [Run(name, model.to(dtype), s.lr) for name, model in models.items()]

    paragraph = text.rfind("\n\n", 0, len(text) // 2) + 2  # the last that begins before the middle
    prompt = text[paragraph : paragraph + s.context]

    def sample(write: Writer, run: Run) -> None:
        if s.sample:
            generator = torch.Generator().manual_seed(s.seed)
            with torch.no_grad():
                written = write(run.model, vocabulary.encode(prompt), s.temperature, generator)
                answer = vocabulary.decode(islice(written, s.sample))
            say_sample(f"{run.name} continues {prompt!r}", prompt + answer)

    torch.manual_seed(s.seed)
    say(
        f"\nPart 1, the blog post's model: {s.context} characters predict the next, batch {s.batch}"
    )
    windows = contest(
        {
            "Python loop": CharLoopModel(v, s.embedding, s.hidden),
            "fusedrnn": CharFusedModel(v, s.embedding, s.hidden),
        }
    )
    shuffled = [
        window_batches(numbers, s.context, s.batch, s.seed + epoch) for epoch in range(s.epochs)
    ]
    compete("part 1", windows, shuffled, window_loss)
    sample(write_windows, windows[-1])

    say(
        f"\nPart 2, its sequence form: every character predicts the next, "
        f"{s.streams} streams in chunks of {s.chunk}"
    )
    sequences = contest(
        {
            "Python loop": CharSequenceLoopModel(v, s.embedding, s.hidden),
            "nn.RNN": CharSequenceModel(v, s.embedding, s.hidden),
            "fusedrnn.RNN": CharSequenceModel(v, s.embedding, s.hidden, RNN),
        }
    )
    in_order = sequence_batches(numbers, s.chunk, s.streams)
    compete("part 2", sequences, [in_order] * s.epochs, sequence_loss)
    sample(write_sequence, sequences[-1])
    return windows, sequences


def compete(
    label: str, runs: Sequence[Run], epochs: Sequence[Sequence[Batch]], loss_of: LossOf
) -> None:
    """Train the runs on the batches of each epoch; print their losses and then their speeds."""
    say("\n  mean loss" + "".join(f"{run.name:>14}" for run in runs) + f"{'apart by':>12}")
    apart = []
    progress = Progress(label, sum(map(len, epochs)))
    for number, batches in enumerate(epochs, start=1):
        train_epoch(runs, batches, loss_of, progress)
        losses = [run.losses[-1] for run in runs]
        apart.append(max(losses) - min(losses))
        progress.clear()
        if not all(map(math.isfinite, losses)):
            raise CharlmError("the training diverged: try a smaller --lr")
        say(f"  epoch {number:3}" + "".join(f"{x:14.6f}" for x in losses) + f"{apart[-1]:12.1e}")
    say(f"  The losses differ by {max(apart):.1e} at most.\n")

    predicted = sum(following.numel() for batches in epochs for _, following in batches)
    fused = runs[-1]
    for run in runs:
        ratio = f"   {fused.name} is {run.seconds / fused.seconds:.2f} times as fast"
        rate = f"{predicted / run.seconds:12,.0f} characters a second"
        say(f"  {run.name:<14}{rate}{'' if run is fused else ratio}")


def say_sample(title: str, text: str) -> None:
    """Print generated text with a mark on each line, in characters that stdout can encode."""
    encoding = sys.stdout.encoding or "utf-8"
    say(f"\n  {title}:\n".encode(encoding, "replace").decode(encoding))
    for line in text.encode(encoding, "replace").decode(encoding).split("\n"):
        say(f"    | {line}".rstrip())


def say(line: str) -> None:
    """Print and flush, so that a pipe also receives the line immediately."""
    print(line, flush=True)
