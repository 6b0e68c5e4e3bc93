"""Plot a trace that ``fusedrnn.trace`` recorded, with matplotlib.

Each function draws into an ``Axes`` and returns it, so that the caller can arrange and change the
plots; `overview` arranges all of them except `cell`. Each takes one layer and direction of one
sequence, such as ``trace.row(0)[0]``. Steps are numbered from 1, because h with the number 0 is the
state before the first step.

Colours follow the background of the ``Axes``; `style` has settings for a light and for a dark one.
They are chosen for colour-blind readers: lines and areas use the palette of Okabe and Ito (2008),
unsigned values use cividis, and signed values a map from blue to red (on a dark background, to
orange).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .trace import LayerTrace

try:
    from matplotlib import patches, pyplot, rc_context
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as _error:
    raise ImportError(
        f"fusedrnn: plots need matplotlib 3.10 or later ({_error}); run `pip install matplotlib`"
    ) from _error


@dataclass(frozen=True)
class _Colours:
    background: str
    text: str
    muted: str
    first: str  # the recurrence and the state
    second: str  # the input
    gradient: str
    signed: str  # a colour map
    unsigned: str = "cividis"


_LIGHT = _Colours("#FFFFFF", "#1A1C20", "#646A73", "#0072B2", "#E69F00", "#B64A00", "RdBu_r")
_DARK = _Colours("#15171C", "#E7E9EC", "#9BA1AB", "#56B4E9", "#E69F00", "#FF8A3D", "managua_r")


def style(dark: bool = False) -> dict[str, Any]:
    """Return settings for ``matplotlib.rc_context``, light or dark.

    Example::

        >>> from matplotlib import pyplot, rc_context
        >>> trace = fusedrnn.trace(fusedrnn.RNN(10, 20), torch.randn(5, 3, 10))
        >>> with rc_context(fusedrnn.plots.style(dark=True)):
        ...     figure, axes = pyplot.subplots()
        >>> axes = fusedrnn.plots.eigenvalues(axes, trace.row(0)[0])
    """
    c = _DARK if dark else _LIGHT
    return {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), c.background),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), c.text),
        **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), c.muted),
        **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor", "legend.labelcolor"), c.text),
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.8,
        "savefig.dpi": 150,
    }


# --- Helpers --------------------------------------------------------------------------------------


def _luminance(colour: Any) -> float:
    red, green, blue = to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _colours(axes: Axes) -> _Colours:
    return _LIGHT if _luminance(axes.get_facecolor()) > 0.5 else _DARK


def _numbers(tensor: Tensor) -> Any:
    """Convert to NumPy, which matplotlib reads without a warning."""
    return tensor.double().cpu().numpy()


def _check(layer: Any) -> None:
    if not isinstance(layer, LayerTrace):
        raise TypeError(f"fusedrnn: layer must be a LayerTrace, got {type(layer).__name__}")
    if layer.h.dim() != 2 or layer.batch_sizes is not None:
        raise ValueError(
            f"fusedrnn: layer must be of one sequence, [T, H], got {list(layer.h.shape)}; "
            "take one with trace.row(b)"
        )


def _gradient(layer: LayerTrace) -> Tensor:
    """Return the norm of the gradient for each state, ``[T]``."""
    if layer.grad_state is None:
        raise ValueError("fusedrnn: layer must have gradients: call trace with loss or output_grad")
    return torch.linalg.vector_norm(layer.grad_state.double().cpu(), dim=-1)


def _state_letter(layer: LayerTrace) -> str:
    return "v" if layer.form == "potential" else "h"


def _sent_name(layer: LayerTrace) -> str:
    """Return the mathtext, without dollar signs, for the output that a step starts from."""
    return f"h_{{t{'+' if layer.reverse else '-'}1}}"


def _state_name(layer: LayerTrace) -> str:
    return "potential $v_t$" if layer.form == "potential" else "state $h_t$"


def _colour_scale(values: Tensor, colours: _Colours) -> ScalarMappable:
    """Map values to colours: from 0 if none is negative, otherwise symmetric about 0."""
    low, high = values.min().item(), values.max().item()
    largest = max(-low, high)
    if largest == 0 or 0.1 < largest <= 1:
        largest = 1  # the same colours for most layers
    if low >= 0:
        return ScalarMappable(Normalize(0, largest), colours.unsigned)
    return ScalarMappable(Normalize(-largest, largest), colours.signed)


def _heat_map(axes: Axes, series: Tensor, scale: ScalarMappable, label: str) -> Axes:
    """Draw a series ``[T, H]`` with time to the right and units upward."""
    image = axes.imshow(
        _numbers(series).T,
        cmap=scale.cmap,
        norm=scale.norm,
        aspect="auto",
        origin="lower",
        extent=(0.5, len(series) + 0.5, -0.5, series.size(1) - 0.5),
        interpolation="nearest",
    )
    _colour_bar(axes, image, label)
    axes.set_ylabel("hidden unit")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return _over_time(axes, len(series))


def _colour_bar(axes: Axes, scale: ScalarMappable, label: str) -> None:
    bar = axes.figure.colorbar(scale, ax=axes, pad=0.01, aspect=25)
    bar.set_label(label)
    bar.locator = MaxNLocator(4, steps=[1, 2, 5, 10])
    bar.outline.set_visible(False)  # type: ignore[operator]


def _column(
    axes: Axes, values: Tensor, scale: ScalarMappable, box: tuple[float, float, float]
) -> None:
    """Draw a vector as a column of coloured cells; ``box`` is its left, width and height."""
    left, width, height = box
    edges = torch.linspace(0, height, len(values) + 1)
    axes.pcolormesh(
        [left, left + width],
        _numbers(edges),
        _numbers(values.unsqueeze(1)),
        cmap=scale.cmap,
        norm=scale.norm,
    )
    frame = {"fill": False, "edgecolor": _colours(axes).text, "linewidth": 1}
    axes.add_patch(patches.Rectangle((left, 0), width, height, **frame))  # type: ignore[arg-type]


def _over_time(axes: Axes, steps: int) -> Axes:
    axes.set_xlabel("step $t$")
    axes.set_xlim(0.5, steps + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return axes


# --- Plots ----------------------------------------------------------------------------------------


def states(axes: Axes, layer: LayerTrace) -> Axes:
    """Draw the state of every unit over time as a heat map."""
    _check(layer)
    axes.set_title("State of every unit")
    scale = _colour_scale(layer.state, _colours(axes))
    return _heat_map(axes, layer.state, scale, _state_name(layer))


def saturation(axes: Axes, layer: LayerTrace) -> Axes:
    """Draw the slope of the nonlinearity over time as a heat map: dark units are saturated."""
    _check(layer)
    axes.set_title("Saturation: where the slope is 0, no gradient passes")
    scale = _colour_scale(layer.slope, _colours(axes))
    return _heat_map(axes, layer.slope, scale, r"slope $\varphi'$")


def gradient_norm(axes: Axes, layer: LayerTrace) -> Axes:
    r"""Draw the norm of the gradient for each state on a log axis.

    The dashed line starts from the norm at the last step and multiplies it, at each step back, by
    ``LayerTrace.spectral_radius``. The gradient from the last step alone would change at this rate
    in the long run if every slope were 1 (Bengio, Simard and Frasconi, 1994; Pascanu, Mikolov and
    Bengio, 2013).
    """
    _check(layer)
    c, norms, letter = _colours(axes), _gradient(layer), _state_letter(layer)
    norm = rf"$\|\partial L\,/\,\partial {letter}_t\|$"
    steps = torch.arange(1, len(norms) + 1)
    axes.set_title("Gradient, on its way back through time")
    axes.plot(
        steps.numpy(),
        norms.where(norms > 0, torch.nan).numpy(),
        ".-",
        color=c.gradient,
        label="norm of the gradient",
    )
    axes.set_yscale("log")
    axes.set_ylabel(f"{norm}  (loss per unit of state)")
    arrived = steps[(norms > 0) & norms.isfinite()]
    if len(arrived):
        last = arrived[0 if layer.reverse else -1]
        alone = norms[last - 1] * layer.spectral_radius ** (arrived - last).abs()
        words = f"{_radius(layer)} per step, if all slopes were 1"
        axes.plot(arrived.numpy(), alone.numpy(), "--", color=c.muted, linewidth=1.4, label=words)
        low, high = norms[arrived - 1].aminmax()
        low, high = min(low, max(alone.min(), low / 100)), max(high, min(alone.max(), high * 100))
        room = (high / low) ** 0.35 * 2  # for the legend, below
        axes.set_ylim((low / room).item(), (high * 2).item())
    axes.legend(loc="lower center")
    axes.grid(axis="y", color=c.muted, alpha=0.25, linewidth=0.6)
    return _over_time(axes, len(norms))


def _radius(layer: LayerTrace) -> str:
    return rf"$\rho({_matrix(layer)}) = {layer.spectral_radius:.2f}$"


def _matrix(layer: LayerTrace) -> str:
    return r"W_{hh}" if layer.alpha is None else r"(1-\alpha)\,I + \alpha W_{hh}"


def shares(axes: Axes, layer: LayerTrace) -> Axes:
    """Draw the shares of the input and of the recurrence in the pre-activation over time."""
    _check(layer)
    c, share = _colours(axes), layer.recurrent_share.double().cpu()
    edges = torch.arange(len(share) + 1) + 0.5
    axes.set_title("What drives the units")
    recurrent = rf"recurrence, $W_{{hh}}\, {_sent_name(layer)} + b_{{hh}}$"
    for height, place, colour, ink, name in (
        (torch.ones_like(share), 0.94, c.second, "black", r"input, $W_{ih}\, x_t + b_{ih}$"),
        (share, 0.06, c.first, c.background, recurrent),
    ):
        axes.stairs(height.numpy(), edges.numpy(), fill=True, color=colour)
        axes.text(
            0.5, place, name, transform=axes.transAxes, ha="center", va="center", color=ink,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("share of the pre-activation")
    return _over_time(axes, len(share))


def eigenvalues(axes: Axes, layer: LayerTrace) -> Axes:
    """Draw the eigenvalues of the recurrent weight and the unit circle.

    With a leak, draw the eigenvalues of ``LayerTrace.step_matrix``.
    """
    _check(layer)
    c = _colours(axes)
    values = torch.linalg.eigvals(layer.step_matrix.double().cpu())
    angle = torch.linspace(0, 2 * torch.pi, 361)
    radius = rf"$\rho = {layer.spectral_radius:.2f}$"
    axes.set_title(f"Eigenvalues of ${_matrix(layer)}$: {radius}")
    axes.plot(_numbers(angle.cos()), _numbers(angle.sin()), color=c.muted, linewidth=1.2)
    axes.text(0.75, -0.75, "unit circle", ha="left", va="top", color=c.muted)
    axes.plot(_numbers(values.real), _numbers(values.imag), "o", color=c.first, markersize=4)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(r"real part of $\lambda$")
    axes.set_ylabel(r"imaginary part of $\lambda$")
    return axes


def unrolled(
    axes: Axes, layer: LayerTrace, inputs: Sequence[str] | None = None, steps: int = 8
) -> Axes:
    """Draw the layer unrolled in time: one column of units per step, coloured by its state.

    With gradients, the width of an arrow back shows the norm of the gradient at its end, on a
    logarithmic scale; there is no arrow where no gradient passes.

    Args:
        inputs: What to write below each step; by default x with its number.
        steps: Maximum number of steps to draw, at least 2; of a longer sequence, only the first and
            the last steps are drawn.
    """
    _check(layer)
    if steps < 2:
        raise ValueError(f"fusedrnn: steps must be at least 2, got {steps}")
    c, T = _colours(axes), len(layer.state)
    if inputs is not None and len(inputs) != T:
        raise ValueError(f"fusedrnn: inputs must have {T} strings, got {len(inputs)}")
    shown = list(range(T)) if T <= steps else [*range(steps // 2), *range(T - steps // 2, T)]
    scale = _colour_scale(layer.state, c)
    letter = _state_letter(layer)
    widths = None
    if layer.grad_state is not None:
        norms = _gradient(layer)
        widths = 0.4 + 3.2 * (1 + (norms / norms.max()).log10() / 4).clamp(0, 1).nan_to_num(0)

    def arrow(start: tuple[float, float], end: tuple[float, float], **settings: Any) -> None:
        settings = {"arrowstyle": "-|>", "mutation_scale": 10, "color": c.text, **settings}
        axes.add_patch(patches.FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **settings))

    half, places, x = 0.2, {}, 0.0
    for previous, t in zip([None, *shown], shown):
        x += 0.0 if previous is None else 1.0 if t == previous + 1 else 1.6
        places[t] = x
        _column(axes, layer.state[t], scale, (x - half, 2 * half, 1))
        axes.text(x, 1.06, f"${letter}_{{{t + 1}}}$", ha="center", va="bottom")
        arrow((x, -0.34), (x, -0.03))
        word = f"$x_{{{t + 1}}}$" if inputs is None else inputs[t]
        axes.text(x, -0.4, word, ha="center", va="top")
    place, sign, number = (x, 1, T + 1) if layer.reverse else (0.0, -1, 0)
    arrow((place + sign * 0.6, 0.5), (place + sign * (half + 0.04), 0.5))
    axes.text(place + sign * 0.76, 0.5, f"${letter}_{{{number}}}$", ha="center", va="center")
    for t, after in pairwise(shown):
        left, right = places[t] + half + 0.04, places[after] - half - 0.04
        middle = (left + right) / 2
        forward = ((right, 0.5), (left, 0.5)) if layer.reverse else ((left, 0.5), (right, 0.5))
        arrow(*forward)
        if after > t + 1:
            axes.text(middle, 0.56, r"$\cdots$", ha="center", va="bottom", fontsize=14)
        sender, receiver = (t, after) if layer.reverse else (after, t)
        if widths is not None and norms[sender] > 0:
            start, end = ((place, 0.24) for place, _ in reversed(forward))
            arrow(start, end, color=c.gradient, linewidth=float(widths[receiver]))
    first = shown[0]
    axes.text(places[first] + 0.06, -0.19, "$W_{ih}$", ha="left", va="center", color=c.muted)
    if len(shown) > 1:
        gap = (places[first] + places[shown[1]]) / 2
        axes.text(gap, 0.55, "$W_{hh}$", ha="center", va="bottom", color=c.muted)
    if widths is not None:
        name = rf"$\partial L\,/\,\partial {letter}$"
        axes.text(x + half + 0.08, 0.24, name, va="center", color=c.gradient)
    axes.set_title("The layer, unrolled in time")
    axes.set_xlim(-0.9, x + 0.9)
    axes.set_ylim(-0.62, 1.3)
    axes.set_axis_off()
    _colour_bar(axes, scale, _state_name(layer))
    return axes


def cell(axes: Axes, layer: LayerTrace, step: int, units: int = 8) -> Axes:
    """Draw one step with its numbers: two linear layers, an addition and the nonlinearity.

    Args:
        step: Number of the step, from 1.
        units: Number of units to draw, starting with the first.
    """
    _check(layer)
    T, H = layer.h.shape
    if not 1 <= step <= T:
        raise IndexError(f"fusedrnn: step must be in [1, {T}], got {step}")
    if units < 1:
        raise ValueError(f"fusedrnn: units must be at least 1, got {units}")
    c = _colours(axes)
    columns = [
        (layer.from_input, r"$W_{ih}\, x_t + b_{ih}$", "+"),
        (layer.from_state, rf"$W_{{hh}}\, {_sent_name(layer)} + b_{{hh}}$", "="),
        (layer.z, "$z_t$", r"$\longrightarrow$"),
        (layer.h, "$h_t$", ""),
    ]
    values = torch.stack([series[step - 1, :units] for series, *_ in columns]).double().cpu()
    scale = _colour_scale(values, c)
    for place, (column, (_, name, sign)) in enumerate(zip(values, columns)):
        x = 1.5 * place
        _column(axes, column, scale, (x, 1, len(column)))
        axes.text(x + 0.5, len(column) + 0.25, name, ha="center", va="bottom", fontsize=11)
        axes.text(x + 1.25, len(column) / 2, sign, ha="center", va="center", fontsize=14)
        for unit, value in enumerate(column.tolist()):
            ink = "black" if _luminance(scale.to_rgba(value)[:3]) > 0.45 else "white"
            axes.text(x + 0.5, unit + 0.5, f"{value:+.2f}", ha="center", va="center", color=ink)
    of_how_many = f"{H} units" if units >= H else f"the first {units} of {H} units"
    middle = len(values[0]) / 2
    name = layer.nonlinearity.replace("_", " ")
    axes.text(4.25, middle + 0.3, name, ha="center", va="bottom", fontsize=8)
    if layer.alpha is not None:
        axes.text(4.25, middle - 0.3, r"leak $\alpha$", ha="center", va="top", fontsize=8)
    axes.set_title(f"Step {step}: {of_how_many}")
    axes.set_xlim(-0.1, 5.6)
    axes.set_ylim(-0.2, len(values[0]) + 1.2)
    axes.set_axis_off()
    return axes


def overview(layer: LayerTrace, dark: bool = False) -> Figure:
    """Arrange the plots of one layer and direction of one sequence in a new figure.

    If the trace has no gradients, `gradient_norm` is left out.
    """
    _check(layer)
    below = ["shares", "eigenvalues"]
    if layer.grad_state is not None:
        below.insert(0, "gradient")
    mosaic: Any = [["unrolled"], [[["states", "saturation"]]], [[below]]]
    draw = {
        "unrolled": unrolled, "states": states, "saturation": saturation,
        "gradient": gradient_norm, "shares": shares, "eigenvalues": eigenvalues,
    }  # fmt: skip
    with rc_context(style(dark)):
        figure = pyplot.figure(
            figsize=(12, 10), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08)
        )
        words = f"{layer.name}: {layer.nonlinearity}, {layer.h.size(1)} units"
        figure.suptitle(words.capitalize(), fontsize=12, fontweight="bold")
        ratios = (0.85, 1, 1.15)
        for name, axes in figure.subplot_mosaic(mosaic, height_ratios=ratios).items():
            draw[name](axes, layer)
    return figure
