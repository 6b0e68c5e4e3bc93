"""Show a character model at work in one HTML page: ``python -m fusedrnn unmask``.

The page holds the weights of the blog post's model (`CharLoopModel`) and runs it in JavaScript
(``page.js``). A reader types a text and follows first every value of the forward pass, then the
gradient of one prediction through time. The page loads nothing else and works offline.
"""

from __future__ import annotations

import base64
import io
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional import recurrence
from .model import CharLoopModel, UserError, Vocabulary, read_text, window_batches

CHARS = 400_000
EMBEDDING, HIDDEN = 16, 64  # squares, because the page draws a vector as a square
CONTEXT, BATCH, EPOCHS, LR = 32, 16, 6, 4e-3
LARGEST_PAGE = 2_000_000  # bytes


@dataclass(frozen=True)
class Settings:
    """Options of ``python -m fusedrnn unmask``."""

    text: str | None = None
    checkpoint: str | None = None
    save: str | None = None
    out: str = "unmask.html"


def write_page(s: Settings) -> None:
    """Train a model, or load one, and write its page."""
    text = read_text(s.text, CHARS)
    if s.checkpoint is None:
        say(f"Training on {len(text):,} characters of {s.text or 'the Python language reference'}")
        model, vocabulary = train(text)
    else:
        model, vocabulary = load(s.checkpoint)
    html = page(model, vocabulary, examples(text, vocabulary)).encode()
    if len(html) > LARGEST_PAGE:
        raise UserError(
            f"the page would have {len(html) / 1e6:.1f} MB, and {LARGEST_PAGE / 1e6:g} MB are the "
            f"limit: the model has {len(vocabulary.characters):,} different characters and "
            f"{model.h:,} hidden units"
        )
    if s.save is not None:
        write(s.save, checkpoint(model, vocabulary))
    write(s.out, html)
    say(f"{s.out}: {len(html) / 1000:.0f} kB. Open it in a browser.")


def say(line: str) -> None:
    """Print and flush, so that a pipe also receives the line immediately."""
    print(line, flush=True)


def write(path: str, content: bytes) -> None:
    """Write a file; if that fails, raise a UserError of one sentence."""
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


# --- The model ------------------------------------------------------------------------------------


def log_probabilities(model: CharLoopModel, cs: Tensor) -> Tensor:
    """Map characters [T, B] to the log probabilities of each next one, [T, B, V].

    The last step equals ``model(*cs)``, which predicts only the character after the window. The
    recurrence runs in one call, as in `CharFusedModel` of examples/charlm.py.
    """
    u = model.l_hidden(F.relu(model.l_in(model.e.weight)))  # [V, H], once for each character
    h, _ = recurrence(F.embedding(cs, u), None, model.l_hidden.weight)
    return F.log_softmax(model.l_out(h), dim=-1)


def every_step_loss(model: CharLoopModel, cs: Tensor, following: Tensor) -> Tensor:
    """Compute the mean negative log likelihood of every next character of a window.

    Each window starts from a hidden state of zeros, as the page does.
    """
    targets = torch.cat([cs[1:], following.unsqueeze(0)])
    return F.nll_loss(log_probabilities(model, cs).flatten(0, 1), targets.flatten())


def train(text: str) -> tuple[CharLoopModel, Vocabulary]:
    """Train a small model on ``text``, and print the loss of each epoch."""
    if len(text) < 2 * CONTEXT:
        raise UserError(
            f"the text is too short: {len(text):,} characters, and {2 * CONTEXT} are needed"
        )
    torch.set_num_threads(1)  # a second thread would wait more than it computes
    torch.manual_seed(0)
    vocabulary = Vocabulary.of(text)
    numbers = vocabulary.encode(text)
    model = CharLoopModel(len(vocabulary.characters), EMBEDDING, HIDDEN)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = LR * (1 - epoch / EPOCHS)
        losses = []
        for cs, following in window_batches(numbers, CONTEXT, BATCH, seed=epoch):
            loss = every_step_loss(model, cs, following)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        say(f"  epoch {epoch + 1} of {EPOCHS}: mean loss {sum(losses) / len(losses):.3f}")
    return model, vocabulary


def checkpoint(model: CharLoopModel, vocabulary: Vocabulary) -> bytes:
    """Return the contents of a checkpoint, which `load` reads."""
    file = io.BytesIO()
    torch.save({"vocabulary": vocabulary.characters, "model": model.state_dict()}, file)
    return file.getvalue()


def load(path: str) -> tuple[CharLoopModel, Vocabulary]:
    """Load a model of any size from a checkpoint.

    A checkpoint is a dict, written by `torch.save`: ``"vocabulary"`` is the string of the
    characters, in the order of their numbers; ``"model"`` is the ``state_dict`` of a
    `CharLoopModel` or `CharFusedModel`.
    """
    expected = 'a checkpoint must be a dict with "vocabulary" and "model", as --save writes it'
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        vocabulary, weights = Vocabulary("".join(saved["vocabulary"])), saved["model"]
        (v, n_in), (h, _) = weights["e.weight"].shape, weights["l_hidden.weight"].shape
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # torch.load raises many types, depending on what the file holds
        raise UserError(f"{path} does not fit: {expected}") from error
    if v != len(vocabulary.characters):
        raise UserError(
            f"{path} does not fit: its vocabulary has {len(vocabulary.characters):,} characters, "
            f"and its embedding {v:,}"
        )
    model = CharLoopModel(v, n_in, h)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path} does not fit the model of the blog post: {reason}") from error
    return model, vocabulary


# --- The page -------------------------------------------------------------------------------------


def examples(text: str, vocabulary: Vocabulary, count: int = 5) -> list[str]:
    """Choose beginnings of sentences, spread evenly over the text, that the model can read."""
    known = set(vocabulary.characters)
    sentences = re.findall(r"(?:^|[.!?]\s)([^\W\d_][\w ,;'’-]{19,})", text, re.MULTILINE)
    starts = dict.fromkeys(textwrap.shorten(s, 28, placeholder="").rstrip(",;-") for s in sentences)
    found = [start for start in starts if set(start) <= known]
    found = [start for start in found if start[0].isupper()] or found  # some scripts have no case
    return found[:: max(len(found) // count, 1)][:count]


def page(model: CharLoopModel, vocabulary: Vocabulary, texts: list[str]) -> str:
    """Return the page of a model: the template, with its style, its script and the weights."""
    weights = {
        name: base64.b64encode(weight.float().contiguous().numpy().astype("<f4").tobytes()).decode()
        for name, weight in model.state_dict().items()
    }
    facts = {"characters": list(vocabulary.characters), "examples": texts, "weights": weights}
    parts = {
        # `<` is escaped because `</script>` in a text would end the element
        "MODEL": json.dumps(facts).replace("<", r"\u003c"),
        "STYLE": (Path(__file__).parent / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": (Path(__file__).parent / "page.js").read_text(encoding="utf-8"),
    }
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return re.sub(r"/\* (MODEL|STYLE|SCRIPT) \*/", lambda match: parts[match[1]], template)
