"""Report the results and the machine as JSON, as tables and as a plot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from measure import FLOOR, SLACK, Check
from peers import Shape


@dataclass
class Quartiles:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Result:
    mode: str
    shape: Shape
    peer: str
    check: Check
    flops: int
    times: list[float] = field(default_factory=list)  # seconds per call, by round; [] if wrong
    cold: list[float] = field(default_factory=list)  # the same after the caches were overwritten
    floor: float | None = None  # seconds, of the problem
    kept_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def us_per_step(self) -> float:
        return 1e6 * statistics.median(self.times) / self.shape.T

    @property
    def gflops(self) -> float:
        return self.flops / statistics.median(self.times) / 1e9

    def ratio_to(self, other: Result, which: str = "times") -> Quartiles:
        """Return quartiles, over rounds, of the speed-up over `other`; `which` may be "cold"."""
        pairs = zip(getattr(self, which), getattr(other, which))
        return Quartiles.of([b / a for a, b in pairs])

    @property
    def share_of_floor(self) -> float | None:
        return self.floor and self.floor / statistics.median(self.times)

    def as_json(self, baseline: Result | None) -> dict[str, Any]:
        row: dict[str, Any] = {
            "mode": self.mode,
            "shape": self.shape._asdict(),
            "peer": self.peer,
            "check": {**asdict(self.check), "passed": self.check.passed},
            "kept_bytes": self.kept_bytes,
            "peak_bytes": self.peak_bytes,
        }
        if self.times:
            row |= {
                "us_per_step": self.us_per_step,
                "gflops": self.gflops,
                "seconds_per_call": self.times,
            }
            if baseline is not None:
                row["ratio"] = asdict(self.ratio_to(baseline))
            if self.floor is not None:
                row |= {"floor_seconds": self.floor, "share_of_floor": self.share_of_floor}
            if self.cold:
                row["cold_seconds_per_call"] = self.cold
                if baseline is not None:
                    row["cold_ratio"] = asdict(self.ratio_to(baseline, "cold"))
        return row


@dataclass
class Report:
    environment: dict[str, Any]
    baseline: str
    subject: str
    results: list[Result] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # peer, or peer and mode: reason

    @property
    def wrong(self) -> list[Result]:
        return [result for result in self.results if not result.check.passed]

    @property
    def peers(self) -> list[str]:
        return list(dict.fromkeys(result.peer for result in self.results))

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(result.mode for result in self.results))

    def timed(self, mode: str) -> dict[Shape, dict[str, Result]]:
        """Return timed results by shape and peer: a row for every shape, without wrong peers."""
        rows: dict[Shape, dict[str, Result]] = {}
        for result in self.results:
            if result.mode == mode:
                row = rows.setdefault(result.shape, {})
                if result.times:
                    row[result.peer] = result
        return rows

    def ratios(self, mode: str, peer: str, other: str) -> dict[Shape, Quartiles]:
        """Return how many times as fast as `other` a peer is, for the shapes where both ran."""
        return {
            shape: row[peer].ratio_to(row[other])
            for shape, row in self.timed(mode).items()
            if peer in row and other in row
        }

    def geometric_means(self, mode: str) -> dict[str, float]:
        """Return each peer's geometric mean ratio to the baseline, over the shapes where it ran."""
        means = {}
        for peer in self.peers:
            if ratios := self.ratios(mode, peer, self.baseline):
                means[peer] = statistics.geometric_mean(r.median for r in ratios.values())
        return means

    def losses(self, mode: str) -> dict[str, dict[str, float]]:
        """Return the subject's ratios below 1, by peer and shape, worst first."""
        found = {}
        for peer in self.peers:
            ratios = self.ratios(mode, self.subject, peer)
            lost = {str(s): r.median for s, r in ratios.items() if r.median < 1}
            if lost:
                found[peer] = dict(sorted(lost.items(), key=lambda item: item[1]))
        return found

    def as_json(self) -> dict[str, Any]:
        def baseline(result: Result) -> Result | None:
            return self.timed(result.mode)[result.shape].get(self.baseline)

        return {
            "environment": self.environment,
            "baseline": self.baseline,
            "subject": self.subject,
            "skipped": self.skipped,
            "results": [result.as_json(baseline(result)) for result in self.results],
            "summary": {
                mode: {
                    "geometric_mean_ratio": self.geometric_means(mode),
                    "subject_slower_than": self.losses(mode),
                }
                for mode in self.modes
            },
        }


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in text.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    name = fields.get("model name", platform.machine())
    where = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return f"{name} ({where})" if where else name


def available_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def git_commit() -> str:
    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Neighbours:
    """Count the cores that other processes kept busy, on average since construction (Linux)."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.before = self.cpu_seconds()

    @staticmethod
    def cpu_seconds() -> float:
        """Return the CPU time of the machine so far, less this process and its children."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[1:8])
        machine = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        return machine - sum(os.times()[:4])

    def cores(self) -> float:
        seconds = time.perf_counter() - self.start
        return round(max(0.0, self.cpu_seconds() - self.before) / seconds, 2)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "jax", "jaxlib", "onnxruntime", "triton", "flashrnn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(threads: int, dtype: str, seconds: float) -> dict[str, Any]:
    script, *arguments = sys.argv
    return {
        "cpu": cpu_model(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": available_cores(),
        "os": platform.platform(),
        "versions": versions(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "not MKL",
        "threads": threads,
        "dtype": dtype,
        "seconds_per_shape_and_mode": seconds,
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "commit": git_commit(),
        "command": shlex.join(["python", os.path.relpath(script), *arguments]),
        "cores_busy_with_other_processes": None,  # set at the end
    }


def describe(report: Report) -> list[str]:
    env = report.environment
    busy = env["cores_busy_with_other_processes"]
    lines = [
        f"{env['cpu']}, {env['cores']} cores, torch uses {env['instruction_set']}, {env['blas']}",
        f"{env['os']}; " + ", ".join(f"{k} {v}" for k, v in env["versions"].items()),
        f"{env['threads']} threads each (torch.set_num_threads; JAX: NPROC={env['threads']}; ONNX "
        f"Runtime: intra_op_num_threads), {env['dtype']}",
        f"{env['date']}, commit {env['commit']}: {env['command']}",
        "One process, in turns; medians over rounds. ×: times as fast as "
        f"{report.baseline}, median of per-round ratios [quartiles]. The input product is timed "
        "too; forward is under no_grad.",
        f"Each was first held against a float64 loop: at most {SLACK:g} times {report.baseline}'s "
        f"own error plus {FLOOR:g} eps of the largest value.",
    ]
    gradient = "" if env["grad_input"] else "no "
    lines.append(f"With backward, x requires {gradient}gradient.")
    if env["packed"]:
        lines.append(
            "Packed: B sequences with lengths from 1 to 2T - 1, T on average; µs/step is the time "
            "of a call over T, as for a dense batch of as many rows."
        )
    if any(result.floor for result in report.results):
        lines.append(
            "floor: an estimate of the least time (bench/floor.py); share: the floor divided by "
            "fusedrnn's time."
        )
    if any(result.cold for result in report.results):
        lines.append("cold: single calls after all cores overwrote their caches.")
    if busy is not None and busy > 0.05:
        lines.append(f"NOT ALONE: other processes kept {busy:g} cores busy meanwhile")
    return lines + [f"skipped: {who}: {why}" for who, why in report.skipped.items()]


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def rows_of(report: Report, mode: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and a row per shape: the baseline, all of the subject, and the others."""
    base, ours = report.baseline, report.subject
    table = report.timed(mode)
    ran = {peer for row in table.values() for peer in row}
    others = [peer for peer in report.peers if peer in ran - {base, ours}]
    memory = [
        (f"{title} MiB {peer}", peer, attribute)
        for title, attribute in (("kept", "kept_bytes"), ("peak", "peak_bytes"))
        for peer in (base, ours)
        if any(peer in row and getattr(row[peer], attribute) for row in table.values())
    ]

    def speed(row: dict[str, Result], peer: str) -> str:
        return number(row[peer].us_per_step) if peer in row else "-"

    def ratio(row: dict[str, Result], peer: str) -> str:
        if peer not in row or base not in row:
            return "-"
        median = row[peer].ratio_to(row[base]).median
        return f"**{median:.2f}**" if peer == ours and median < 1 else f"{median:.2f}"

    def quartiles(row: dict[str, Result]) -> str:
        if ours not in row or base not in row:
            return "-"
        found = row[ours].ratio_to(row[base])
        return f"[{found.low:.2f} {found.high:.2f}]"

    def mebibytes(row: dict[str, Result], peer: str, attribute: str) -> str:
        count = getattr(row[peer], attribute) if peer in row else None
        return "-" if count is None else number(count / 2**20)

    has_floor = any(result.floor for row in table.values() for result in row.values())
    cold = [
        peer for peer in report.peers if any(peer in r and r[peer].cold for r in table.values())
    ]

    def floor(row: dict[str, Result]) -> list[str]:
        if not has_floor:
            return []
        if ours not in row:
            return ["-", "-"]
        result = row[ours]
        seconds, share = result.floor or 0.0, result.share_of_floor or 0.0
        return [number(1e6 * seconds / result.shape.T), f"{share:.0%}"]

    def cold_speed(row: dict[str, Result], peer: str) -> str:
        if peer not in row or base not in row:
            return "-"
        result = row[peer]
        speed = number(1e6 * statistics.median(result.cold) / result.shape.T)
        return f"{speed} ({result.ratio_to(row[base], 'cold').median:.2f})"

    header = ["T,B,I,H", f"{base} µs/step", f"{ours} µs/step", "GFLOP/s", "×", "[quartiles]"]
    header += ["floor", "share"] * has_floor + [f"{peer} (×)" for peer in others]
    header += [f"{peer} cold (×)" for peer in cold] + [title for title, _, _ in memory]
    rows = [
        [
            str(shape),
            speed(row, base),
            speed(row, ours),
            number(row[ours].gflops) if ours in row else "-",
            ratio(row, ours),
            quartiles(row),
            *floor(row),
            *(
                f"{speed(row, peer)} ({ratio(row, peer)})" if peer in row else "-"
                for peer in others
            ),
            *(cold_speed(row, peer) for peer in cold),
            *(mebibytes(row, peer, attribute) for _, peer, attribute in memory),
        ]
        for shape, row in table.items()
    ]
    return header, rows


def layout(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    if markdown:
        lines = [header, ["---:"] * len(header), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def summary(report: Report, mode: str) -> list[str]:
    means = report.geometric_means(mode)
    others = ", ".join(f"{k} {v:.2f}" for k, v in means.items() if k != report.baseline)
    count = len(report.timed(mode))
    title = f"{mode}: times as fast as {report.baseline}, geometric mean over {count} shapes"
    lines = [f"{title}: {others}"]
    losses = report.losses(mode)
    for peer, shapes in losses.items():
        where = ", ".join(f"({shape}) {ratio:.2g}×" for shape, ratio in shapes.items())
        lines.append(f"{mode}: {report.subject} SLOWER than {peer} at {where}")
    if report.subject in means and not losses:
        lines.append(f"{mode}: {report.subject} is nowhere slower than any of the others")
    return lines


def render(report: Report, markdown: bool) -> str:
    blocks = ["\n".join(("- " if markdown else "# ") + line for line in describe(report))]
    for mode in report.modes:
        title = f"### {mode}\n" if markdown else f"== {mode}"
        blocks.append(title + "\n" + layout(*rows_of(report, mode), markdown))
    lines = [line for mode in report.modes for line in summary(report, mode)]
    lines += [
        f"WRONG, not timed: {r.peer} at ({r.shape}), {r.mode}: error {r.check.error:.2g} of the "
        f"largest value, bound {r.check.bound:.2g}"
        for r in report.wrong
    ]
    blocks.append("\n".join(("- " if markdown else "") + line for line in lines))
    return "\n\n".join(blocks)


def plot(report: Report, path: str) -> None:
    """Plot each peer's ratio to the baseline for each shape; below the line it is slower."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(report.modes), 1, figsize=(11, 4 * len(report.modes)), squeeze=False
    )
    for axis, mode in zip(axes[:, 0], report.modes):
        places = {shape: place for place, shape in enumerate(report.timed(mode))}
        for peer in report.peers:
            ratios = report.ratios(mode, peer, report.baseline)
            if peer != report.baseline and ratios:
                ours = peer == report.subject
                axis.plot(
                    [places[shape] for shape in ratios],
                    [ratio.median for ratio in ratios.values()],
                    "o-" if ours else "x:",
                    label=peer,
                    zorder=2 + ours,
                )
        axis.axhline(1, color="black", linewidth=1, label=report.baseline)
        axis.set_yscale("log")
        axis.set_xticks(range(len(places)), map(str, places), rotation=45, ha="right", fontsize=8)
        axis.set_ylabel(f"times as fast as {report.baseline}")
        axis.set_title(f"{mode}, {report.environment['dtype']}, T,B,I,H below")
        axis.legend(fontsize=8)
    env = report.environment
    figure.text(0.01, 0.005, f"{env['cpu']}, {env['threads']} threads, {env['date']}", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
