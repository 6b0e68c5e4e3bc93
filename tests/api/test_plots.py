"""fusedrnn.plots: pictures are compared with those in tests/api/images, which were reviewed by eye.

    python tests/api/test_plots.py

redraws the pictures. Look at them before you commit.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images

import fusedrnn
from fusedrnn import LayerTrace, plots

IMAGES = Path(__file__).resolve().parent / "images"
# Root mean square of the differences between pixels, whose values go up to 255. Fonts come with
# matplotlib, and rounding differences in the data move no pixel. Moving a line by one pixel gives
# more than 2.
TOLERANCE = 1.0
T, B, I, H = 20, 2, 5, 12
WIDE = {"dtype": torch.float64}


def last_step(output: Any) -> torch.Tensor:
    return output[-1].square().sum()


@functools.cache
def traced(kind: str = "plain") -> fusedrnn.Trace:
    torch.manual_seed(0)
    x = torch.randn(T, B, I, **WIDE)
    if kind == "relu":
        rnn: Any = fusedrnn.RNN(I, H, nonlinearity="relu", **WIDE)
    elif kind == "leaky":
        rnn = fusedrnn.LeakyRNN(I, H, form="potential", alpha=0.3, **WIDE)
    else:
        rnn = fusedrnn.RNN(I, H, 2, bidirectional=True, **WIDE)
        fusedrnn.parametrizations.spectral_radius_(rnn.weight_hh_l0, 1.1)
    return fusedrnn.trace(rnn, x, loss=last_step)


def layer(kind: str = "plain", index: int = 0) -> LayerTrace:
    return traced(kind).row(0)[index]


# For each picture: what is drawn, and its size in inches.
PICTURES: dict[str, tuple[Callable[[Any], Any], tuple[float, float]]] = {
    "states": (lambda axes: plots.states(axes, layer()), (5, 3)),
    "states, relu": (lambda axes: plots.states(axes, layer("relu")), (5, 3)),
    "states, leaky": (lambda axes: plots.states(axes, layer("leaky")), (5, 3)),
    "saturation": (lambda axes: plots.saturation(axes, layer()), (5, 3)),
    "gradient": (lambda axes: plots.gradient_norm(axes, layer()), (5, 3)),
    "gradient, reverse": (lambda axes: plots.gradient_norm(axes, layer(index=1)), (5, 3)),
    "shares": (lambda axes: plots.shares(axes, layer()), (5, 3)),
    "eigenvalues": (lambda axes: plots.eigenvalues(axes, layer()), (4, 3.5)),
    "eigenvalues, leaky": (lambda axes: plots.eigenvalues(axes, layer("leaky")), (4, 3.5)),
    "unrolled": (lambda axes: plots.unrolled(axes, layer()), (9, 3)),
    "unrolled, reverse": (
        lambda axes: plots.unrolled(axes, layer(index=1), inputs=list("abcdefghij" * 2), steps=6),
        (9, 3),
    ),
    "cell": (lambda axes: plots.cell(axes, layer(), 3), (6, 3)),
    "cell, leaky": (lambda axes: plots.cell(axes, layer("leaky"), T, units=20), (6, 4)),
}


def picture(name: str, dark: bool) -> Figure:
    draw, size = PICTURES[name]
    with matplotlib.rc_context(plots.style(dark)):
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        assert draw(axes) is axes
    return figure


def overview(dark: bool) -> Figure:
    return traced().plot(row=1, dark=dark)


def path_of(name: str, dark: bool) -> Path:
    words = name.replace(",", "").split()
    return IMAGES / f"{'-'.join([*words, 'dark' if dark else 'light'])}.png"


def check(figure: Figure, want: Path, tmp_path: Path) -> None:
    found = tmp_path / want.name
    figure.savefig(found, dpi=50)
    pyplot.close(figure)
    assert compare_images(str(want), str(found), TOLERANCE) is None


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_as_reviewed(name, dark, tmp_path):
    check(picture(name, dark), path_of(name, dark), tmp_path)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_overview_is_as_reviewed(dark, tmp_path):
    check(overview(dark), path_of("overview", dark), tmp_path)


def test_the_comparison_notices_a_line_that_is_moved_by_a_pixel(tmp_path):
    figure = picture("gradient", False)
    line = figure.axes[0].lines[0]
    to_pixels = figure.axes[0].transData
    places = to_pixels.transform(line.get_xydata())
    places[:, 1] += figure.dpi / 50  # one pixel of the picture
    line.set_data(to_pixels.inverted().transform(places).T)
    with pytest.raises(AssertionError, match="RMS Value"):
        check(figure, path_of("gradient", False), tmp_path)


def test_without_gradients_the_overview_leaves_out_their_plot():
    rnn = fusedrnn.RNN(I, H)
    figure = fusedrnn.trace(rnn, torch.randn(T, B, I)).plot()
    titles = {axes.get_title("left") for axes in figure.axes}
    pyplot.close(figure)
    assert "What drives the units" in titles
    assert not any("Gradient" in title for title in titles)


def test_a_single_sequence_is_drawn_without_its_number(tmp_path):
    check(traced().row(1).plot(), path_of("overview", False), tmp_path)


@pytest.mark.filterwarnings("error")
def test_gradients_that_end_or_overflow_are_drawn():
    """The loss depends on step 4 only, so that no gradient reaches later ones."""
    rnn = fusedrnn.RNN(I, H)
    middle = fusedrnn.trace(rnn, torch.randn(T, B, I), loss=lambda output: output[3].sum())
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(1e9)
    overflow = fusedrnn.trace(rnn, torch.zeros(T, B, I), output_grad=torch.full((T, B, H), 1e38))
    for trace in (middle, overflow):
        figure = trace.plot()
        figure.savefig("/dev/null", format="png", dpi=20)
        pyplot.close(figure)
    drawn = plots.unrolled(Figure().subplots(), middle.row(0)[0], steps=T)
    colour = plots.to_rgb(plots._LIGHT.gradient)
    arrows = [p for p in drawn.patches if plots.to_rgb(p.get_edgecolor()) == colour]
    assert len(arrows) == 3  # from step 4 to steps 3, 2 and 1


@pytest.mark.parametrize("shape", [(1, 1, I), (1, I), (3, 1, I)], ids=str)
@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_short_sequences_and_states_of_zero_are_drawn(name, shape):
    rnn = fusedrnn.RNN(I, 1, nonlinearity=name)
    for parameter in rnn.parameters():
        torch.nn.init.zeros_(parameter)
    figure = fusedrnn.trace(rnn, torch.zeros(shape), loss=torch.sum).plot()
    figure.savefig("/dev/null", format="png", dpi=20)
    pyplot.close(figure)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_low_precision_and_cells_are_drawn(dtype):
    rnn = fusedrnn.RNN(I, H, dtype=dtype)
    x = torch.nn.utils.rnn.pack_sequence([torch.randn(n, I).to(dtype) for n in (5, 3, 1)])
    cell = fusedrnn.LeakyRNNCell(I, H, form="inside", alpha=0.5, dtype=dtype)
    traces = [
        fusedrnn.trace(rnn, x, loss=lambda output: output.data.float().sum()),
        fusedrnn.trace(cell, torch.randn(2, I).to(dtype), loss=lambda state: state.float().sum()),
    ]
    for trace in traces:
        figure = trace.plot(row=1)
        figure.savefig("/dev/null", format="png", dpi=20)
        pyplot.close(figure)


EACH = [
    plots.states, plots.saturation, plots.gradient_norm, plots.shares, plots.eigenvalues,
    plots.unrolled, functools.partial(plots.cell, step=1),
]  # fmt: skip


@pytest.mark.parametrize("draw", EACH)
def test_bad_input_gets_a_clear_error(draw):
    axes = Figure().subplots()
    with pytest.raises(TypeError, match="layer must be a LayerTrace, got Trace"):
        draw(axes, traced())
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, I), torch.randn(2, I)])
    for x in (torch.randn(T, B, I), packed):
        (batch,) = fusedrnn.trace(fusedrnn.RNN(I, H), x)
        with pytest.raises(ValueError, match=r"layer must be of one sequence, \[T, H\], got "):
            draw(axes, batch)


def test_missing_gradients_and_steps_get_a_clear_error():
    axes = Figure().subplots()
    bare = fusedrnn.trace(fusedrnn.RNN(I, H), torch.randn(T, B, I)).row(0)[0]
    with pytest.raises(ValueError, match="call trace with loss or output_grad"):
        plots.gradient_norm(axes, bare)
    for step in (0, T + 1):
        with pytest.raises(IndexError, match=rf"step must be in \[1, 20\], got {step}"):
            plots.cell(axes, bare, step)
    with pytest.raises(ValueError, match="units must be at least 1, got 0"):
        plots.cell(axes, bare, 1, units=0)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        plots.unrolled(axes, bare, steps=1)
    with pytest.raises(ValueError, match=r"inputs must have 20 strings, got 3"):
        plots.unrolled(axes, bare, inputs=["a", "b", "c"])


def test_without_matplotlib_only_plots_are_missing():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch, fusedrnn\n"
        "trace = fusedrnn.trace(fusedrnn.RNN(3, 4), torch.zeros(2, 1, 3), loss=torch.sum)\n"
        "print(trace)\n"
        "trace.plot()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.startswith("Trace of RNN(3, 4)")
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fusedrnn: plots need matplotlib 3.10 or later")
    assert "pip install matplotlib" in last


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for dark in (False, True):
        overview(dark).savefig(path_of("overview", dark), dpi=50)
        for name in PICTURES:
            picture(name, dark).savefig(path_of(name, dark), dpi=50)
        pyplot.close("all")
