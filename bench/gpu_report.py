"""Format the results of bench_gpu.py as tables, and compare them with the goals."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import torch
from gpu_peers import ALONE, TF32RNN
from peers import BACKWARD, FORWARD
from report import layout, number

OURS = ("fusedrnn", "fusedrnn in a graph")
CUDNN = "nn.RNN"

# Goals on an H100: µs per step of forward, by B, I, H and precision.
TARGETS = {
    (1, 64, 64): {"bf16": 0.16, "f32": 0.16},
    (16, 128, 256): {"bf16": 0.35, "f32": 0.4},
    (32, 256, 512): {"bf16": 0.55, "f32": 0.9},
    (64, 1024, 1024): {"bf16": 0.8, "f32": 4.0},
    (128, 2048, 2048): {"bf16": 3.0, "f32": 22.0},
}
BACKWARD_CHAIN = 1.3  # at most this many times the forward chain
OVER_CUDNN = 3.0  # minimum speed-up, for bf16 and f32, H 264 to 1024, B up to 64

Result = dict[str, Any]


def device_facts(device: torch.device) -> dict[str, Any]:
    """Describe the GPU, its driver and its libraries; on a CPU, only that there is none."""
    engine = {"cuda_engine": cuda_engine()}
    if device.type != "cuda":
        return {"gpu": f"none: {device}", **engine}
    properties = torch.cuda.get_device_properties(device)
    return {
        **engine,
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": nvidia_smi(),
        "nvcc": output_of("nvcc", "--version").rpartition("\n")[2],
        "host": platform.node(),
    }


def nvidia_smi() -> str:
    """Return the driver version, current and maximum clock, power and temperature."""
    return output_of(
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.draw,temperature.gpu",
        "--format=csv,noheader",
    )


def cuda_engine() -> str:
    try:
        from fusedrnn.ops import build_info
    except ImportError as error:
        return str(error)
    return str(build_info()["cuda"])


def output_of(program: str, *arguments: str) -> str:
    if shutil.which(program) is None:
        return f"no {program}"
    run = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return run.stdout.strip() or run.stderr.strip()


def median_us(seconds: list[float] | None, T: int) -> float:
    """Return microseconds per step; nan if nothing was measured."""
    times = sorted(seconds or [])
    return 1e6 * times[len(times) // 2] / T if times else math.nan


def us(result: Result, peer: str, mode: str) -> float:
    found = result["peers"].get(peer) or {}
    return median_us(found.get("seconds", {}).get(mode), result["shape"]["T"])


def us_backward(result: Result, peer: str) -> float:
    """Return the difference between forward+backward and forward."""
    return us(result, peer, BACKWARD) - us(result, peer, FORWARD)


def us_chain(result: Result, mode: str) -> float:
    return median_us(result["chains"].get(mode), result["shape"]["T"])


def best_peer(result: Result, mode: str) -> tuple[str, float]:
    """Return the fastest peer other than fusedrnn that is as precise as the case requires."""
    times = {
        name: us(result, name, mode)
        for name, found in result["peers"].items()
        if name not in OURS and passed(found)
    }
    times = {name: time for name, time in times.items() if not math.isnan(time)}
    if not times:
        return "", math.nan
    name = min(times, key=lambda name: times[name])
    return name, times[name]


def passed(found: dict[str, Any]) -> bool:
    """Return whether every check passed at the precision of the case.

    A peer in TF32 was checked with TF32's tolerance, so it does not count as float32.
    """
    checks = found["check"].values()
    return bool(checks) and all(check["passed"] for check in checks) and not found["coarse"]


def ratio(result: Result, peer: str, mode: str, ours: str = OURS[0]) -> float:
    """Return how many times as fast as `peer` fusedrnn is."""
    return us(result, peer, mode) / us(result, ours, mode)


def name_of(result: Result) -> str:
    return ",".join(str(size) for size in result["shape"].values()) + f" {result['precision']}"


# ---- the goals


def promises(results: list[Result]) -> Iterator[dict[str, Any]]:
    """Yield each goal, the measured value and whether the goal is met."""

    def promise(what: str, target: float, found: float, met: bool) -> dict[str, Any]:
        known = None if math.isnan(found) else found
        return {"what": what, "target": target, "found": known, "met": bool(met)}

    for result in results:
        if result["group"] != "shapes":
            continue
        _, B, I, H = result["shape"].values()
        target = TARGETS.get((B, I, H), {}).get(result["precision"])
        if target is not None:
            found = us(result, OURS[0], FORWARD)
            yield promise(f"{name_of(result)}: µs forward", target, found, found <= target)
            found = us_chain(result, ALONE) / us_chain(result, FORWARD)
            yield promise(
                f"{name_of(result)}: backward chain / forward chain", BACKWARD_CHAIN, found,
                found <= BACKWARD_CHAIN,
            )  # fmt: skip
    for result in results:
        _, B, _, H = result["shape"].values()
        wanted = result["precision"] in ("bf16", "f32") and 264 <= H <= 1024 and B <= 64
        for mode in (FORWARD, BACKWARD):
            found = ratio(result, CUDNN, mode)
            least = OVER_CUDNN if wanted else 1.0
            if wanted or found < 1:
                yield promise(f"{name_of(result)}: × {CUDNN}, {mode}", least, found, found >= least)


def summary(results: list[Result]) -> dict[str, Any]:
    kept = list(promises(results))
    return {
        "promises": kept,
        "met": sum(promise["met"] for promise in kept),
        "wrong": [
            f"{name} at {name_of(result)}, {mode}: error {check['error']:.3g}, bound "
            f"{check['bound']:.3g}"
            for result in results
            for name, found in result["peers"].items()
            for mode, check in found["check"].items()
            if not check["passed"]
        ],
        "slower_than_best_peer": [
            f"{name_of(result)} {mode}: {time:.3g} µs, {name}; ours {us(result, OURS[0], mode):.3g}"
            for result in results
            for mode in (FORWARD, BACKWARD)
            for name, time in [best_peer(result, mode)]
            if time < us(result, OURS[0], mode)
        ],
    }


# ---- the tables


def cell(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else number(value)


def mebibytes(count: int | None) -> str:
    return "-" if count is None else number(count / 2**20)


def everyone(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the header and a row per case and peer."""
    header = ["T,B,I,H", "", "who", "fwd", "fwd+bwd", "bwd", "alone", "error", "bound"]
    header += ["peak MiB", "kept MiB", "notes"]
    rows = []
    for result in results:
        for name, found in result["peers"].items():
            checks = list(found["check"].values())
            worst = max(checks, key=lambda c: c["error"] / c["bound"]) if checks else None
            notes = []
            if any(not check["passed"] for check in checks):
                notes.append("WRONG")
            if found["compile_seconds"] is not None:
                notes.append(f"compiled in {found['compile_seconds']:.0f} s")
            if found["failed"]:
                notes.append(found["failed"].split("\n")[0][:100])
            rows.append(
                [
                    *name_of(result).split(" "),
                    name,
                    *(cell(us(result, name, mode)) for mode in (FORWARD, BACKWARD)),
                    cell(us_backward(result, name)),
                    cell(us(result, name, ALONE)),
                    *([f"{worst['error']:.1e}", f"{worst['bound']:.1e}"] if worst else ["-", "-"]),
                    mebibytes(found["peak_bytes"]),
                    mebibytes(found["kept_bytes"]),
                    "; ".join(notes),
                ]
            )
    return header, rows


def probe_rows(probes: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["probe", "ns", "cycles", ""]
    rows = []
    for row in probes:
        more = row.get("error", "")
        if "clusters" in row:
            more = f"{row['clusters']} clusters, {row['registers']} registers a thread"
        rows.append([row["probe"], cell(row.get("ns")), cell(row.get("cycles")), more])
    return header, rows


def regime_rows(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the header and a row per regime: measured and predicted time, and their ratio."""
    header = ["T,B,I,H", "", "regime", "fwd", "predicted", "÷", "error"]
    header += ["chain bwd", "predicted", "÷", "error", "notes"]
    rows = []
    for result in results:
        for regime, ways in result["regimes"].items():
            row = [*name_of(result).split(" "), regime]
            notes = []
            for way in (FORWARD, ALONE):
                found = ways.get(way, {})
                time = median_us(found.get("seconds"), result["shape"]["T"])
                predicted = found.get("plan", {}).get("microseconds", math.nan)
                error = found.get("error")
                row += [cell(time), cell(predicted), cell(time / predicted if predicted else None)]
                row.append("-" if error is None else f"{error:.1e}")
                if "failed" in found:
                    notes.append(f"{way}: {found['failed']}"[:100])
            rows.append([*row, "; ".join(notes)])
    return header, rows


def describe(data: dict[str, Any]) -> list[str]:
    env = data["environment"]
    if not env:
        return ["nothing was started"]
    lines = [
        ", ".join(f"{key} {env[key]}" for key in ("gpu", "sms", "cuda", "cudnn") if key in env),
        ", ".join(
            f"{key} {env[key]}"
            for key in ("nvidia_smi", "nvidia_smi_at_the_end", "nvcc")
            if key in env
        ),
        f"fusedrnn's CUDA engine: {env['cuda_engine']}",
        f"{env['cpu']}, {env['os']}; " + ", ".join(f"{k} {v}" for k, v in env["versions"].items()),
        f"{env['date']}, commit {env['commit']}: {data['command']}; {data['seconds']} s",
        "µs a step, medians; one layer with biases, gradients of x and all weights. bwd: "
        "fwd+bwd less fwd. alone: backward, the graph kept. chain: the recurrence alone. "
        "predicted: the planner, for the chain. ×: times as fast as the other. error: of the "
        "largest value, against a float64 loop.",
        "L2 is not flushed between calls: weights and input of a training step are warm, too.",
    ]
    if env["gpu"].startswith("none"):
        lines.append(
            "NO GPU: CPU tensors and a wall clock, to try the script. The graphs are plain calls "
            "here, nn.RNN is not cuDNN's, and the times say nothing."
        )
    if data["emulated"]:
        lines.append("The probes ran on the emulator: their times mean nothing.")
    return [line for line in lines if line]


def render(data: dict[str, Any]) -> str:
    """Render the full tables. `brief` adds the chains with their predictions, and the ratios."""
    results = [result for result in data["results"] if result["group"] != "regimes"]
    regimes = [result for result in data["results"] if result["group"] == "regimes"]
    found = data["summary"]
    blocks = ["\n".join("# " + line for line in describe(data))]
    if data["probes"]:
        blocks.append("== probes\n" + table(*probe_rows(data["probes"])))
    if regimes:
        blocks.append("== regimes\n" + table(*regime_rows(regimes)))
    if results:
        blocks.append("== everyone\n" + table(*everyone(results)))
    if found["promises"]:
        rows = [
            [p["what"], cell(p["target"]), cell(p["found"]), "met" if p["met"] else "NOT MET"]
            for p in found["promises"]
        ]
        title = f"== goals: {found['met']} of {len(found['promises'])} met\n"
        blocks.append(title + table(["", "target", "found", ""], rows))
    plans = [
        f"{name_of(result)}: {way}: {plan['words'] if isinstance(plan, dict) else plan}"
        for result in results
        if result["group"] == "shapes"
        for way, plan in result["predicted"].items()
    ]
    lists = {
        "plans": plans,
        "slower than the best other": found["slower_than_best_peer"],
        "WRONG": found["wrong"],
        "LOST, took the process down": [
            f"{lost['where']}: {lost['name']}, {lost['phase']}: {lost['how']}"
            for lost in data["lost"]
        ],
        "not run, no time left": data["not_run"],
    }
    blocks += [f"== {title}\n" + "\n".join(lines) for title, lines in lists.items() if lines]
    return "\n\n".join(blocks)


def brief(data: dict[str, Any]) -> str:
    """Render the most important numbers in about 8,000 characters."""
    of: dict[str, list[Result]] = {}
    for result in data["results"]:
        of.setdefault(result["group"], []).append(result)
    blocks = describe(data)[:2]  # the GPU, its driver and clocks
    if probes := [f"{row['probe']} {cell(row.get('ns'))}" for row in data["probes"]]:
        blocks.append("ns: " + "; ".join(probes))
    header = ["µs fwd", "chain", "predicted", "regime", "× cuDNN", "× TF32"]
    header += ["fwd+bwd", "chain bwd", "predicted", "regime", "× cuDNN", "× TF32"]
    blocks += [
        table([group, "", *header], [brief_row(result) for result in results])
        for group, results in of.items()
        if group not in ("regimes", "sweep")
    ]
    if "regimes" in of:
        regimes = list(dict.fromkeys(name for r in of["regimes"] for name in r["regimes"]))
        rows = [
            [*name_of(result).split(" "), way, *(versus(result, name, way) for name in regimes)]
            for result in of["regimes"]
            for way in (FORWARD, ALONE)
            if result["regimes"]
        ]
        blocks.append(table(["measured/predicted µs", "", "", *regimes], rows))
    if "sweep" in of:
        sizes = sorted({result["shape"]["H"] for result in of["sweep"]})
        cells: dict[tuple[str, str, str], dict[int, str]] = {}
        for result in of["sweep"]:
            for mode in (FORWARD, BACKWARD):
                key = f"B={result['shape']['B']}", result["precision"], mode
                found = f"{cell(us(result, OURS[0], mode))} ×{cell(ratio(result, CUDNN, mode))}"
                cells.setdefault(key, {})[result["shape"]["H"]] = found
        rows = [[*key, *(row.get(H, "-") for H in sizes)] for key, row in cells.items()]
        blocks.append(table(["µs × cuDNN", "", "", *(f"H={H}" for H in sizes)], rows))
    found = data["summary"]
    missed = [f"{p['what']} {cell(p['found'])}" for p in found["promises"] if not p["met"]]
    lost = [f"{one['where']}: {one['name']}, {one['phase']}: {one['how']}" for one in data["lost"]]
    for title, lines in (
        ("WRONG", found["wrong"]),
        ("LOST, took the process down", lost),
        (f"goals missed of {len(found['promises'])}", missed),
        ("not run", data["not_run"]),
    ):
        if lines:
            more = [f"and {len(lines) - 8} more"] if len(lines) > 9 else lines[8:]
            blocks.append(f"{title}: " + "; ".join([*lines[:8], *more]))
    return "\n".join(blocks)


def brief_row(result: Result) -> list[str]:
    row = name_of(result).split(" ")
    for mode, way, plan in ((FORWARD, FORWARD, "forward"), (BACKWARD, ALONE, "backward")):
        predicted = result["predicted"].get(plan, {})
        row += [cell(us(result, OURS[0], mode)), cell(us_chain(result, way))]
        row += [cell(predicted.get("microseconds")), predicted.get("regime", "-")]
        row += [cell(ratio(result, name, mode)) for name in (CUDNN, TF32RNN.name)]
    return row


def versus(result: Result, regime: str, way: str) -> str:
    """Return the measured and the predicted time of a forced regime."""
    found = result["regimes"][regime].get(way, {})
    if "failed" in found:
        return "-" if found["failed"].startswith("it cannot") else "FAILED"
    time = median_us(found.get("seconds"), result["shape"]["T"])
    return f"{cell(time)}/{cell(found.get('plan', {}).get('microseconds'))}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return layout(header, rows, markdown=False)
