#!/usr/bin/env python3
"""Time fusedrnn on a GPU against cuDNN, CUDA graphs, torch.compile and FlashRNN, and measure the
latencies that fusedrnn's planner relies on. See bench/README.md. gpu_check.py runs some groups of
this benchmark.

New kernels may hang or crash the device. Therefore a child process does the work and announces each
step. If the child is silent for too long or dies, the parent ends it, records the loss, and starts
another child for the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_cases import TINY_CHECK_STEPS, Case, Run, all_cases, tiny_cases
from gpu_peers import PEERS
from gpu_report import brief, device_facts, nvidia_smi, render, summary
from report import environment

# For a checkout that is built but not installed; an installed fusedrnn takes precedence.
sys.path.append(str(Path(__file__).resolve().parent.parent))

MARK = "@@"  # starts each line that a child prints for its parent
SILENCE = 30.0  # seconds of silence after which a child counts as hung
START = 120.0  # the same before its first message: `import torch` has taken 34 s on a fresh machine
GRACE = 8.0  # seconds that the last case may run past the deadline
FATAL = 3  # a peer that takes a child down this many times is left out of all cases
GROUPS = ("probes", *PEERS)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, default=Path("bench/results/gpu.json"), help="(default: %(default)s)")
    add("--budget", type=float, default=300, help="seconds in all (default: %(default)g)")
    add("--groups", default=",".join(GROUPS), help="by comma (default: %(default)s)")
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cuda, or cpu to try the script (default: cuda)",
    )
    add("--tiny", action="store_true", help="the smallest shapes, to try the script")
    add("--emulated", action="store_true", help="probes on the emulator: their times mean nothing")
    add("--silence", type=float, default=SILENCE, help=argparse.SUPPRESS)
    add("--child", help=argparse.SUPPRESS)  # the work of a child, as JSON
    options = parser.parse_args(arguments)
    options.groups = options.groups.split(",")
    if unknown := [group for group in options.groups if group not in GROUPS]:
        parser.error(f"unknown groups {unknown}; known: {', '.join(GROUPS)}")
    if options.budget <= 0:
        parser.error("--budget must be positive")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --device cpu --tiny tries the script without")
    return options


def cases_of(options: argparse.Namespace) -> list[Case]:
    cases = tiny_cases() if options.tiny else all_cases()
    return [case for case in cases if case.group in options.groups]


# ---- the child


def say(kind: str, **what: Any) -> None:
    print(MARK + json.dumps({"kind": kind, **what}), flush=True)


def child(options: argparse.Namespace) -> int:
    """Do the tasks (``"probes"`` or the index of a case) and report the result of each."""
    work = json.loads(options.child)
    cases = cases_of(options)
    device = torch.device(options.device)
    say("at", task=work["tasks"][0], name="start", phase="libraries", limit=START)
    load_libraries(device)
    say("environment", environment={**environment(1, "several", 0), **device_facts(device)})
    for place, task in enumerate(work["tasks"]):
        without = work["without"].get(task, {})

        def announce(
            name: str, phase: str = "", limit: float | None = None, task: str = task
        ) -> None:
            say("at", task=task, name=name, phase=phase, limit=limit)

        announce("begin")
        left = work["deadline"] - time.time()
        if left < needed(task, cases):
            say("no time", task=task)
        elif task == "probes":
            probe(options, without, announce)
        else:
            case = cases[int(task)]
            # Checks, captures and warm-up take half of the time.
            share = left / (len(work["tasks"]) - place) / 2
            seconds = min(3.0, max(0.2, 2 * share if case.group == "shapes" else share))
            start = time.perf_counter()
            run = Run(case, device, seconds, announce, without)
            if options.tiny:
                run.seconds, run.check_steps = 0.05, TINY_CHECK_STEPS
            result = run()
            result["took_seconds"] = time.perf_counter() - start
            say("result", task=task, result=result)
        say("done", task=task)
    say("end")
    return 0


def load_libraries(device: torch.device) -> None:
    """Load cuDNN and cuBLAS, which a fresh machine reads from disk for a while without output."""
    rnn = torch.nn.RNN(8, 8, device=device)
    output, _ = rnn(torch.zeros(2, 1, 8, device=device))
    output.sum().backward()
    for dtype in (torch.float64, torch.bfloat16):
        a = torch.zeros(8, 8, dtype=dtype, device=device)
        (a @ a).sum().item()


def needed(task: str, cases: list[Case]) -> float:
    """Return the seconds that must be left for a task to be worth starting."""
    return 60 if task != "probes" and cases[int(task)].group == "compile" else 0


def probe(options: argparse.Namespace, without: dict[str, str], announce: Any) -> None:
    from probes import Probes, Setting, build, build_emulated

    if options.device != "cuda" and not options.emulated:
        say("probe", row={"probe": "all", "error": "no GPU here, and --emulated was not asked for"})
        return
    announce("nvcc", limit=180.0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = build_emulated() if options.emulated else build(Path(folder))
        except Exception as error:  # compiler and emulator raise many types
            say("probe", row={"probe": "all", "error": f"not built: {error}"})
            return
        setting = Setting.on_emulator() if options.emulated else Setting.on_gpu()
        for row in Probes(library, setting, without, announce).run():
            say("probe", row=row)


# ---- the parent


@dataclass
class Record:
    """All results, as written to the JSON file."""

    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    emulated: bool = False
    probes: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task
    lost: list[dict[str, Any]] = field(default_factory=list)  # what took a child down
    not_run: list[str] = field(default_factory=list)  # for lack of time
    seconds: float = 0

    def as_json(self) -> dict[str, Any]:
        results = list(self.results.values())
        layers = [result for result in results if result["group"] != "regimes"]
        return {**vars(self), "results": results, "summary": summary(layers)}


def words_of(
    process: subprocess.Popen[str], silence: float, deadline: float
) -> Iterator[dict[str, Any]]:
    """Yield a child's messages until it ends.

    Raises TimeoutError if it is silent for too long, or if a case runs more than GRACE seconds
    past the deadline.
    """
    words: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                with contextlib.suppress(ValueError):  # the child was killed within a line
                    words.put(json.loads(line.removeprefix(MARK)))
            else:  # a library's output
                sys.stderr.write(line)
        words.put(None)

    threading.Thread(target=listen, daemon=True).start()
    limit = START
    while True:
        try:
            word = words.get(timeout=max(0.0, min(limit, deadline + GRACE - time.time())))
        except queue.Empty:
            raise TimeoutError(f"silent for {limit:g} s") from None
        if word is None or word["kind"] == "end":  # its own children may keep the pipe open
            return
        limit = max(silence, word.get("limit") or 0)
        yield word


class Foreman:
    """Run all tasks in child processes, one child after another."""

    script = __file__

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.options, self.arguments = options, arguments
        self.cases = cases_of(options)
        self.tasks = ["probes"] if "probes" in options.groups else []
        self.tasks += [str(number) for number in range(len(self.cases))]
        self.without: dict[str, dict[str, str]] = {task: {} for task in self.tasks}
        self.deadline = time.time() + options.budget
        self.record = Record(command=" ".join(["python", *sys.argv]), emulated=options.emulated)

    def name_of(self, task: str) -> str:
        return task if task == "probes" else str(self.cases[int(task)])

    def run(self) -> Record:
        start = time.time()
        while self.tasks and time.time() < self.deadline:
            self.send_child()
        self.record.not_run += map(self.name_of, self.tasks)
        if self.options.device == "cuda":
            self.record.environment["nvidia_smi_at_the_end"] = nvidia_smi()
        self.record.seconds = round(time.time() - start, 1)
        return self.record

    def send_child(self) -> None:
        work = {"tasks": self.tasks, "without": self.without, "deadline": self.deadline}
        process = subprocess.Popen(
            [sys.executable, self.script, *self.arguments, "--child", json.dumps(work)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
        at: dict[str, Any] = {"task": self.tasks[0], "name": "start", "phase": ""}
        try:
            for word in words_of(process, self.options.silence, self.deadline):
                at = self.hear(word, at)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            how = f"it ended, exit status {process.returncode}"
        except TimeoutError as error:
            how = str(error)
        process.send_signal(signal.SIGABRT)  # makes Python print a traceback
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may linger, waiting for a GPU
            process.wait(5)
        if self.tasks and time.time() < self.deadline:
            self.write_off(at, how)

    def hear(self, word: dict[str, Any], at: dict[str, Any]) -> dict[str, Any]:
        """Record a message of a child and return where the child is now."""
        kind = word.pop("kind")
        if kind == "environment":
            self.record.environment = self.record.environment or word["environment"]
        elif kind == "probe":
            self.record.probes.append(word["row"])
            self.without["probes"][word["row"]["probe"]] = "done"
        elif kind == "result":
            self.record.results[word["task"]] = word["result"]
            case = self.cases[int(word["task"])]
            print(f"{case}: {word['result']['took_seconds']:.1f} s", file=sys.stderr, flush=True)
        elif kind == "no time":
            self.record.not_run.append(self.name_of(word["task"]))
        elif kind == "done":
            self.tasks.remove(word["task"])
            self.save()
        else:
            return word
        return at

    def write_off(self, at: dict[str, Any], how: str) -> None:
        """From now on, leave out what a child was running when it was lost."""
        task, name, phase = at["task"], at["name"], at["phase"]
        note = f"{phase}: took the process down ({how})"
        where = self.name_of(task)
        self.record.lost.append({"where": where, "name": name, "phase": phase, "how": how})
        print(f"LOST at {where}: {name}, {note}", file=sys.stderr, flush=True)
        times = sum(lost["name"] == name for lost in self.record.lost)
        if name == "start":  # the next child may start
            if times >= FATAL:
                self.record.not_run += map(self.name_of, self.tasks)
                self.tasks.clear()
            return
        if task == "probes":
            self.record.probes.append({"probe": name, "error": note})
            if name == "nvcc" or name in self.without[task]:
                self.tasks.remove(task)
            self.without[task][name] = note
            return
        # A loss that names no peer is blamed on fusedrnn. If the child was lost although the blamed
        # peer was left out, the loss would only recur, so the task is dropped.
        known = {kind.name for kind in self.cases[int(task)].kinds}
        blamed = name if name in known or name.startswith("regime") else "fusedrnn"
        if blamed in self.without[task] and task in self.tasks:
            self.tasks.remove(task)
        for other in self.tasks if times >= FATAL else [task]:
            if other != "probes":
                self.without[other][blamed] = note
                if blamed.startswith("fusedrnn"):
                    self.without[other]["fusedrnn in a graph"] = note

    def save(self) -> None:
        self.options.json.parent.mkdir(parents=True, exist_ok=True)
        self.options.json.write_text(json.dumps(self.record.as_json(), indent=1) + "\n")


def main() -> int:
    options = parse_arguments()
    if options.child:
        try:
            status = child(options)
        except Exception:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)  # at once: after a lost device, a normal exit may hang
    foreman = Foreman(options, sys.argv[1:])
    record = foreman.run()
    foreman.save()
    print(f"{render(record.as_json())}\n\n== summary\n{brief(record.as_json())}")
    return 1 if record.lost or record.as_json()["summary"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
