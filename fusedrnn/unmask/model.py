"""The character model of the blog post from which this project began, its text and its batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UserError(Exception):
    """A request that cannot be fulfilled; the message is shown to the user."""


class CharLoopModel(nn.Module):
    """The blog post's model: an RNN of two linear layers and an addition, in a loop.

    For each character c in turn, starting from a hidden state of zeros::

        hidden = tanh(l_hidden(hidden + relu(l_in(e(c)))))

    Args:
        vocab_size: Number of different characters, V.
        n_in: Size of the embedding.
        h: Number of hidden units, H.
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


def window_batches(
    text: Tensor, context: int, batch: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Return windows [context, B] of characters and the next ones, [B], in random order.

    The windows of an epoch do not overlap. ``seed`` shifts their starts, so that epochs differ.
    """
    windows = text[seed % context :].unfold(0, context + 1, context)  # [windows, context + 1]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    rows = [windows[i].T.contiguous() for i in order.split(batch)]
    return [(row[:-1], row[-1]) for row in rows]


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
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file: it is not UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path} is not a text file: it holds NUL bytes")
    return text


def language_reference() -> str:
    """Return the text of Python's ``help("topics")``, which every CPython contains."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python has no pydoc_data: choose a text with --text FILE") from error
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
