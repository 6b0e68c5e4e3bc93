"""Draw the chart of README.md and three plots from the results; print the tables of the documents.

    python bench/charts.py

Reads ``results/main.json`` and ``results/gpu-h200/speed-bench.json``; writes ``results/speed.svg``.
The plots need matplotlib. They are written as PNG and SVG: ``steps`` (the time of a step against H)
and ``heat`` (the speed-up over nn.RNN for each B and H) from ``results/grid.json``, and ``memory``
(against T) from ``results/memory.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_report
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from peers import BACKWARD, FORWARD
from report import layout, number

RESULTS = Path(__file__).parent / "results"
CHART = RESULTS / "speed.svg"
MODES = {FORWARD: "forward", BACKWARD: "forward + backward"}
OURS, BASELINE, IN_A_GRAPH = "fusedrnn", "nn.RNN", "nn.RNN in a graph"

# The columns of the CPU tables. A peer that was not timed at every shape is left out.
TABLES = {
    "README.md": (BASELINE, "JAX scan", OURS),
    "docs/performance.md": (BASELINE, "loop", "JAX scan", "ONNX Runtime", OURS),
}

# The text and the colours have a contrast of 3 to 1 or more on white and on GitHub's dark page.
MARKERS = {
    "loop": ("#8a8a8a", '<circle r="3.5" fill="none" stroke="#8a8a8a" stroke-width="1.5"/>'),
    "JAX scan": ("#3d85d6", '<path d="M0-5 5 0 0 5-5 0Z" fill="#3d85d6"/>'),
    "ONNX Runtime": ("#2f9e6e", '<path d="M0-5 5 4H-5Z" fill="#2f9e6e"/>'),
    IN_A_GRAPH: ("#a06cd5", '<rect x="-4" y="-4" width="8" height="8" fill="#a06cd5"/>'),
    OURS: ("#e8590c", '<circle r="5.5" fill="#e8590c"/>'),
}
TEXT, LINE = "#808080", "#80808055"

LEFT, PANEL, GAP, ROW = 150, 340, 45, 22  # pixels
LOW, HIGH = -2, 6  # the axis, in powers of two

Ratios = dict[str, dict[str, float]]  # times as fast as nn.RNN, by mode and peer


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def cpu_rows(data: dict[str, Any]) -> dict[str, Ratios]:
    rows: dict[str, Ratios] = {}
    for result in data["results"]:
        ratios = rows.setdefault(shape_of(result), {mode: {} for mode in MODES})
        if result["peer"] in MARKERS:
            ratios[result["mode"]][result["peer"]] = result["ratio"]["median"]
    return rows


def gpu_rows(data: dict[str, Any], precision: str) -> dict[str, Ratios]:
    def ratios(result: dict[str, Any], mode: str) -> dict[str, float]:
        times = {peer: gpu_report.us(result, peer, mode) for peer in (BASELINE, IN_A_GRAPH, OURS)}
        return {peer: times[BASELINE] / times[peer] for peer in (IN_A_GRAPH, OURS)}

    return {
        shape_of(result): {mode: ratios(result, mode) for mode in MODES}
        for result in data["results"]
        if result["precision"] == precision
    }


def shape_of(result: dict[str, Any]) -> str:
    return ", ".join(map(str, result["shape"].values()))


def draw(cpu: dict[str, Any], gpu: dict[str, Any]) -> str:
    """Return the chart as SVG: a row for each shape, a panel for each mode, a dot for each peer."""
    env = cpu["environment"]
    groups = {
        f"{env['cores']} cores of an {env['cpu'].split(' (')[0]}, float32": cpu_rows(cpu),
        f"{gpu['environment']['gpu']}, bfloat16": gpu_rows(gpu, "bf16"),
        f"{gpu['environment']['gpu']}, float32": gpu_rows(gpu, "f32"),
    }
    body: list[str] = []
    y = 62.0
    for title, rows in groups.items():
        body.append(text(0, y, title, "start", bold=True))
        for shape, ratios in rows.items():
            y += ROW
            body.append(text(LEFT - 12, y, shape, "end"))
            for panel, mode in enumerate(MODES):
                body += dots(panel, y, ratios[mode])
        y += 1.7 * ROW
    bottom = y - ROW
    body.append(text(LEFT - 12, 40, "T, B, I, H", "end", bold=True))
    axes = [line for panel, mode in enumerate(MODES) for line in axis(panel, mode, bottom)]
    width, height = LEFT + 2 * PANEL + GAP + 15, bottom + 22
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
            f'viewBox="0 0 {width} {height:.0f}" role="img" font-size="12" '
            'font-family="system-ui, sans-serif">',
            "<title>How many times as fast as nn.RNN fusedrnn and other libraries are</title>",
            *legend(),
            *axes,
            *body,
            "</svg>\n",
        ]
    )


def place(panel: int, ratio: float) -> float:
    return LEFT + panel * (PANEL + GAP) + PANEL * (math.log2(ratio) - LOW) / (HIGH - LOW)


def dots(panel: int, y: float, ratios: dict[str, float]) -> Iterator[str]:
    for peer, (_, marker) in MARKERS.items():
        if peer in ratios:
            yield f'<g transform="translate({place(panel, ratios[peer]):.1f} {y:.1f})">{marker}</g>'
    right = place(panel, max(ratios.values())) + 10
    yield text(right, y, f"{ratios[OURS]:.2g}×", "start", MARKERS[OURS][0])


def axis(panel: int, mode: str, bottom: float) -> Iterator[str]:
    yield text(place(panel, 2 ** ((LOW + HIGH) / 2)), 40, MODES[mode], "middle", bold=True)
    for power in range(LOW, HIGH + 1):
        x = place(panel, 2**power)
        width = 1.5 if power == 0 else 0.75
        colour = TEXT if power == 0 else LINE
        yield (
            f'<path d="M{x:.1f} 52V{bottom:.1f}" stroke="{colour}" stroke-width="{width}"/>'
            + text(x, bottom + 12, f"{2.0**power:g}", "middle")
        )


def legend() -> Iterator[str]:
    x = 0.0
    yield text(x, 12, "times as fast as nn.RNN (line at 1):", "start")
    x += 228
    for peer, (_, marker) in reversed(MARKERS.items()):
        yield f'<g transform="translate({x:.0f} 12)">{marker}</g>' + text(x + 10, 12, peer, "start")
        x += 32 + 7 * len(peer)


def text(
    x: float, y: float, words: str, anchor: str, colour: str = TEXT, bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y + 4:.1f}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{words}</text>"
    )


def table(cpu: dict[str, Any], mode: str, document: str) -> str:
    """Return a table of a document: microseconds per step, and the speed-up over nn.RNN."""
    rows: dict[str, dict[str, Any]] = {}
    for result in cpu["results"]:
        if result["mode"] == mode:
            rows.setdefault(shape_of(result), {})[result["peer"]] = result
    peers = [peer for peer in TABLES[document] if all(peer in row for row in rows.values())]
    cells = []
    for shape, row in rows.items():
        times = [number(row[peer]["us_per_step"]) for peer in peers]
        cells.append([shape, *times, f"**{row[OURS]['ratio']['median']:.1f}**"])
    return layout(["T, B, I, H", *peers, "×"], cells, markdown=True)


def by_sizes(data: dict[str, Any], mode: str) -> dict[tuple[int, int, int], dict[str, Any]]:
    """Return the results of each (T, B, H), by peer."""
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    for result in data["results"]:
        if result["mode"] == mode and "us_per_step" in result:
            T, B, _, H = result["shape"].values()
            found.setdefault((T, B, H), {})[result["peer"]] = result
    return found


def conditions(data: dict[str, Any]) -> str:
    env = data["environment"]
    instructions = env["instruction_set"]
    return f"{env['dtype']}, {env['threads']} threads, {env['cpu'].split(' (')[0]} ({instructions})"


def plot_steps(data: dict[str, Any]) -> Figure:
    """Plot the time of a step against H = I: a panel for each batch size, a line for each peer."""
    found = by_sizes(data, BACKWARD)
    batches = (1, 16, 256)
    figure, axes = pyplot.subplots(1, len(batches), figsize=(11, 4), layout="constrained")
    for axis, batch in zip(axes, batches):
        rows = {H: row for (_, B, H), row in found.items() if B == batch}
        for peer in (BASELINE, "loop", "JAX scan", OURS):
            times = {H: row[peer]["us_per_step"] for H, row in rows.items() if peer in row}
            if times:
                colour = MARKERS[peer][0] if peer in MARKERS else "black"
                axis.plot(list(times), list(times.values()), "o-", label=peer, color=colour)
        floors = {
            H: 1e6 * row[OURS]["floor_seconds"] / T
            for (T, B, H), row in found.items()
            if B == batch
        }
        axis.plot(list(floors), list(floors.values()), ":", label="floor (estimated)", color="grey")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(list(rows), list(map(str, rows)))
        axis.set_xlabel("H = I")
        axis.set_title(f"B = {batch}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("µs a step, forward + backward")
    axes[0].legend(fontsize=8)
    figure.suptitle(conditions(data), fontsize=9)
    return figure


def plot_heat(data: dict[str, Any]) -> Figure:
    """Colour the speed-up over nn.RNN for each B and H = I; cells below 1 have a red frame."""
    found = by_sizes(data, BACKWARD)
    batches, units = (sorted({sizes[i] for sizes in found}) for i in (1, 2))
    ratios = {(B, H): row[OURS]["ratio"]["median"] for (_, B, H), row in found.items()}
    logs = [[math.log2(ratios[B, H]) for H in units] for B in batches]
    figure, axis = pyplot.subplots(figsize=(7.5, 4), layout="constrained")
    most = max(abs(log) for row in logs for log in row)
    axis.imshow(logs, cmap="RdYlGn", vmin=-most, vmax=most, alpha=0.7, aspect="auto")
    for y, B in enumerate(batches):
        for x, H in enumerate(units):
            axis.text(x, y, f"{ratios[B, H]:.2g}", ha="center", va="center")
            if ratios[B, H] < 1:
                axis.add_patch(
                    Rectangle(
                        (x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="red", linewidth=2.5
                    )
                )
    axis.set_xticks(range(len(units)), list(map(str, units)))
    axis.set_yticks(range(len(batches)), list(map(str, batches)))
    axis.set_xlabel("H = I")
    axis.set_ylabel("B")
    axis.set_title(
        f"Times as fast as nn.RNN, forward + backward\n{conditions(data)}; red: slower", fontsize=9
    )
    return figure


def plot_memory(data: dict[str, Any]) -> Figure:
    """Plot memory against T: the peak of forward + backward, and what is kept between them."""
    found = by_sizes(data, BACKWARD)
    figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for key, style, name in (("peak_bytes", "o-", "peak"), ("kept_bytes", "x:", "kept")):
        for peer in (BASELINE, OURS):
            sizes = {T: row[peer][key] / 2**20 for (T, _, _), row in found.items()}
            colour = MARKERS[peer][0] if peer in MARKERS else "black"
            axis.plot(
                list(sizes), list(sizes.values()), style, label=f"{peer}, {name}", color=colour
            )
    shape = data["results"][0]["shape"]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    steps = [T for T, _, _ in found]
    axis.set_xticks(steps, list(map(str, steps)))
    axis.set_xlabel(f"T (B = {shape['B']}, I = {shape['I']}, H = {shape['H']})")
    axis.set_ylabel("MiB, forward + backward")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(conditions(data), fontsize=9)
    return figure


PLOTS = {
    "steps": (plot_steps, "grid"),
    "heat": (plot_heat, "grid"),
    "memory": (plot_memory, "memory"),
}


def main() -> None:
    cpu, gpu = load("main.json"), load("gpu-h200/speed-bench.json")
    CHART.write_text(draw(cpu, gpu))
    pyplot.rcParams["svg.hashsalt"] = "fusedrnn"  # the same file every time
    for name, (plot, source) in PLOTS.items():
        if not (RESULTS / f"{source}.json").exists():
            continue
        figure = plot(load(f"{source}.json"))
        figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
        figure.savefig(RESULTS / f"{name}.png", dpi=120)
    for document in TABLES:
        for mode in MODES:
            print(f"{document}, {mode}:\n\n{table(cpu, mode, document)}\n")


if __name__ == "__main__":
    main()
