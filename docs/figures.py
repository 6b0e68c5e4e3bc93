"""Make the figures of docs/unmask.md, in docs/figures.

    python docs/figures.py

Trains the character model of examples/charlm.py and the variations of examples/variations.py. This
takes two minutes on two cores, and needs matplotlib.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot, rc_context
from matplotlib.figure import Figure
from torch.nn import functional as F

import fusedrnn
from fusedrnn import plots
from fusedrnn.unmask.model import Vocabulary, read_text

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"
sys.path.insert(0, str(ROOT / "examples"))

import charlm  # noqa: E402
import variations  # noqa: E402

SENTENCE = "The value of the expression is a "
DPI = 110


def save(name: str, figure: Figure) -> None:
    figure.savefig(FIGURES / f"{name}.png", dpi=DPI)
    pyplot.close(figure)


def trained_model(text: str) -> tuple[charlm.CharSequenceModel, Vocabulary]:
    """Train the sequence form of the post's model, small enough to draw every unit."""
    torch.manual_seed(0)
    vocabulary = Vocabulary.of(text)
    model = charlm.CharSequenceModel(len(vocabulary.characters), 32, 48, fusedrnn.RNN)
    run = charlm.Run(model, lr=2e-3)
    for batch in charlm.sequence_batches(vocabulary.encode(text), 64, 8):
        run.gradient(*batch)
        run.optimizer.step()
    return model, vocabulary


def trace_of(
    model: charlm.CharSequenceModel, vocabulary: Vocabulary, text: str
) -> fusedrnn.LayerTrace:
    """Trace the prediction of the last character of ``text`` from those before it."""
    *read, target = vocabulary.encode(text)
    x = model.e(torch.stack(read).unsqueeze(1))

    def loss(states: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.l_out(states[-1]), target.view(1))

    return fusedrnn.trace(model.rnn, x, loss=loss).row(0)[0]


def cell(layer: fusedrnn.LayerTrace) -> Figure:
    figure, axes = pyplot.subplots(figsize=(7.5, 3.8), layout="constrained")
    plots.cell(axes, layer, 5)
    return figure


def unrolled(layer: fusedrnn.LayerTrace, text: str) -> Figure:
    figure, axes = pyplot.subplots(figsize=(10, 3.4), layout="constrained")
    plots.unrolled(axes, layer, inputs=[c.replace(" ", "␣") for c in text])
    return figure


def fates() -> list[tuple[str, fusedrnn.LayerTrace]]:
    """Return untrained layers in which the gradient vanishes, persists and explodes."""
    found = []
    for words, rho in (("It vanishes", 0.7), ("It persists", 1.0), ("It explodes", 1.3)):
        torch.manual_seed(0)
        rnn = fusedrnn.RNN(8, 48, bias=False, dtype=torch.float64)
        fusedrnn.parametrizations.spectral_radius_(rnn.weight_hh_l0, rho)
        x = 1e-3 * torch.randn(30, 1, 8, dtype=torch.float64)  # small: all slopes are close to 1
        trace = fusedrnn.trace(rnn, x, loss=lambda states: states[-1].sum())
        found.append((words, trace.row(0)[0]))
    return found


def gradients(layers: list[tuple[str, fusedrnn.LayerTrace]]) -> Figure:
    figure, axes = pyplot.subplots(
        2, 3, figsize=(11, 6.5), height_ratios=(1, 1.15), layout="constrained"
    )
    for (words, layer), above, below in zip(layers, *axes, strict=True):
        plots.gradient_norm(above, layer).set_title(words)
        above.set_ylim(1e-6, 1e5)
        plots.eigenvalues(below, layer).set_aspect("equal", adjustable="box")
        below.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
    return figure


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # threads that share such small steps mostly wait for each other
    model, vocabulary = trained_model(read_text(None, 400_000))
    short = trace_of(model, vocabulary, SENTENCE[:9])
    long = trace_of(model, vocabulary, SENTENCE)
    runs = variations.main([])
    with rc_context(plots.style()):
        save("cell", cell(short))
        save("unrolled", unrolled(short, SENTENCE[:8]))
        save("overview", plots.overview(long))
        save("gradients", gradients(fates()))
        save("variations", variations.draw(runs))


if __name__ == "__main__":
    main()
