#!/usr/bin/env python3
"""Run the checks that need a GPU, in three short parts: ``make gpu-speed``, ``make gpu-tune`` and
``make gpu-truth``, or all three by ``make gpu-check``.

    speed  200 s  build for this GPU, every regime and dtype once, headline shapes against cuDNN
    tune   200 s  latencies of the GPU, every regime forced, a sweep of H, ncu for each regime
    truth  240 s  tests, streams, graphs, compute-sanitizer, every kernel, waits with a time limit

A part has stages, one after another. A stage has jobs, several at a time. Each job is a process
with a time limit; if it fails, hangs or crashes, the others still run. Output goes line by line
into OUT/<part>.txt, the result of each job into OUT/<part>.jsonl, measurements into
OUT/<part>-bench.json. The last lines printed are a summary of less than 12,000 characters. The exit
status is 0 if all jobs succeeded.

--emulated runs a whole part without a GPU, on the emulated engine, with the smallest cases.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
BUILDS = ROOT / "build" / "cuda"  # where tests/cuda/build_extension.py builds
SECONDS = {"speed": 200, "tune": 200, "truth": 240}
EMULATED_FACTOR = 15  # an emulated part may take this many times as long
PRINTED = 11_000  # characters of the summary, at most
BUDGET = "{seconds}"  # placeholder in a command for its time limit, less some time to finish
SUMMARY = "== summary"  # lines that a job prints after this one go into the summary
REGIMES = ("step", "block", "cluster", "grid")  # kRegimeNames of csrc/cuda/plan.h
DTYPES = ("float32", "float64", "bfloat16", "float16", "tf32")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Signals for a job that is out of time, and the seconds to wait after each. The first makes Python
# print a traceback; the second does so even while Python is in C code (faulthandler).
ENDINGS = ((signal.SIGINT, 3), (signal.SIGABRT, 3), (signal.SIGKILL, 3))


@dataclass
class Job:
    name: str
    command: list[object]
    limit: float  # seconds
    package: Path = ROOT  # where fusedrnn is imported from
    environment: dict[str, str] = field(default_factory=dict)
    summarise: Callable[[list[str]], list[str]] | None = None  # summary of its output
    seconds: float = 0
    result: str = "no time left"  # then ok, FAILED <status> or TOO LONG
    lines: list[str] = field(default_factory=list)  # its output

    @property
    def ok(self) -> bool:
        return self.result == "ok"

    def under(self, *tool: object) -> Job:
        self.command = [*tool, *self.command]
        return self

    def __str__(self) -> str:
        last = next((line for line in reversed(self.lines) if line.strip(" =")), "")
        return f"{self.name:<24} {self.result:<12} {self.seconds:6.1f} s  {last.strip(' =')[:110]}"

    def summary(self) -> list[str]:
        """Return the job's own summary and, after a failure, the failed tests or the last lines."""
        found = self.lines[self.lines.index(SUMMARY) + 1 :] if SUMMARY in self.lines else []
        if self.summarise:
            found = self.summarise(self.lines)
        if not self.ok and self.lines:
            listed = [line for line in self.lines if line.startswith(("FAILED ", "ERROR "))]
            last = [line for line in self.lines if not line.startswith("Extension modules: ")]
            found += [f"    {line[:160]}" for line in (listed or last)[-6:]]
        return found


@dataclass
class Stage:
    name: str
    at_once: int
    share: float  # of the part's time, at most
    jobs: list[Job]


class Part:
    """Run the stages of a part and keep their output."""

    def __init__(self, name: str, out: Path, seconds: float, stages: list[Stage]) -> None:
        self.name, self.out, self.seconds, self.stages = name, out, seconds, stages
        self.end = time.monotonic() + seconds
        self.lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / f"{name}.txt").open("w", buffering=1)  # line by line
        self.results = (out / f"{name}.jsonl").open("w", buffering=1)

    def say(self, text: str) -> None:
        with self.lock:
            print(text, file=self.log)
            print(text, flush=True)

    def run(self) -> int:
        for stage in self.stages:
            end = min(self.end, time.monotonic() + stage.share * self.seconds)
            with ThreadPoolExecutor(stage.at_once) as pool:
                list(pool.map(lambda job, end=end: self.run_job(job, end), stage.jobs))
        print(self.summary(), flush=True)
        return 0 if all(job.ok for stage in self.stages for job in stage.jobs) else 1

    def run_job(self, job: Job, end: float) -> None:
        started = time.monotonic()
        limit = min(job.limit, end - started)
        if limit > 1:
            self.attend(job, limit)
        job.seconds = round(time.monotonic() - started, 1)
        record = {"part": self.name, "job": job.name, "result": job.result, "seconds": job.seconds}
        with self.lock:
            print(json.dumps({**record, "summary": job.summary()}), file=self.results)
        self.say(str(job))

    def attend(self, job: Job, limit: float) -> None:
        """Run a job, keep its output, and end it if it takes too long."""
        command = [str(word).replace(BUDGET, f"{max(limit - 15, 1):.0f}") for word in job.command]
        self.say(f"{job.name}: {' '.join(command)}")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(job.package), os.environ.get("PYTHONPATH", "")]),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            **job.environment,
        }
        BUILDS.mkdir(parents=True, exist_ok=True)  # jobs run here: ROOT has another fusedrnn
        # Give the job its own process group, so that its children can be killed, too, but not its
        # own session: that would survive this script if the script is killed, and keep the GPU.
        group: dict[str, Any] = {"process_group": 0}
        if sys.version_info < (3, 11):
            group = {"preexec_fn": os.setpgrp}
        try:
            process = subprocess.Popen(
                command, env=environment, cwd=BUILDS, text=True, errors="replace",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **group,
            )  # fmt: skip
        except OSError as error:
            job.result, job.lines = "FAILED 127", [str(error)]
            return
        listener = threading.Thread(target=self.listen, args=(process, job), daemon=True)
        listener.start()
        try:
            status = process.wait(limit)
            job.result = f"FAILED {status}" if status else "ok"
        except subprocess.TimeoutExpired:
            job.result = "TOO LONG"
            for ending, patience in ENDINGS:
                os.killpg(process.pid, ending)
                try:
                    process.wait(patience)
                    break
                except subprocess.TimeoutExpired:
                    pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
        listener.join(2)

    def listen(self, process: subprocess.Popen[str], job: Job) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            job.lines.append(line.rstrip("\n"))
            with self.lock:
                print(f"{job.name}| {job.lines[-1]}", file=self.log)

    def summary(self) -> str:
        """Return a line per stage and job, then the jobs' own summaries.

        For a stage with more than 20 jobs, only the failed ones are listed.
        """
        lines = [f"== {self.name}: {self.out}"]
        for stage in self.stages:
            bad = [job for job in stage.jobs if not job.ok]
            took = max((job.seconds for job in stage.jobs), default=0)
            lines.append(
                f"{stage.name:<12} {len(stage.jobs) - len(bad)} of {len(stage.jobs)} ok, "
                f"the longest {took:.1f} s"
            )
            lines += map(str, bad if len(stage.jobs) > 20 else stage.jobs)
        more = [line for stage in self.stages for job in stage.jobs for line in job.summary()]
        text = "\n".join([*lines, *more])
        if len(text) > PRINTED:
            text = f"{text[:PRINTED]}\n... the rest is in {self.name}.jsonl"
        return text


# The tests of test_cuda_kernels.py in four processes.
KERNELS = {
    "block": "test_small and block",
    "cluster": "test_small and cluster",
    "grid": "test_small and grid",
    "others": "not test_small",
}
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no")
NCU = (
    "ncu", "--clock-control", "none", "--kernel-name", "regex:persistent|plain|fused_step",
    "--launch-skip", "1", "--launch-count", "1", "--csv", "--page", "raw",
    *(word for name in ("SpeedOfLight", "LaunchStats", "InstructionStats", "SchedulerStats",
                               "WarpStateStats")
      for word in ("--section", name)),
)  # fmt: skip


def ncu_summary(lines: list[str]) -> list[str]:
    """Return one line: instructions per step and warp, issue slots used, the longest stalls."""
    at = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    run = next((line for line in lines if line.startswith("profiled ")), "")
    if at is None or len(lines) < at + 3:
        return [f"{run}: no profile"] if run else []
    header, _, values = csv.reader(lines[at : at + 3])  # the second line has units
    found: dict[str, float] = {}
    for name, value in zip(header, values):
        try:
            found[name] = float(value.replace(",", ""))
        except ValueError:  # not a number
            continue
    steps = float(run.split("T=")[1].split()[0]) if "T=" in run else 1
    if "step" in run.split():  # a launch is a step
        steps = 1
    warps = found.get("launch__grid_size", 0) * found.get("launch__block_size", 0) / 32
    executed = found.get("smsp__inst_executed.sum", found.get("sm__inst_executed.sum", 0))
    stalls = {
        name.partition("issue_stalled_")[2].partition("_per_")[0]: value
        for name, value in found.items()
        if "issue_stalled_" in name and name.endswith(".ratio")
    }
    worst = sorted(stalls.items(), key=lambda item: -item[1])[:5]
    words = [f"{executed / warps / steps:.0f} instructions a step and warp"] if warps else []
    words += [
        f"{name.partition('__')[2].partition('.')[0]} {found[name]:.4g}"
        for name in found
        if name.startswith(("smsp__issue_active.", "launch__registers", "gpu__time_duration."))
    ]
    words.append("stalls " + ", ".join(f"{name} {value:.2f}" for name, value in worst))
    return [f"{run}: {'; '.join(words)}"]


# ---- the parts


class Jobs:
    """The jobs of all parts. Emulated jobs are the same, but without the GPU tools."""

    def __init__(self, out: Path, emulated: bool, seconds: float) -> None:
        self.out, self.emulated, self.seconds = out, emulated, seconds
        self.word = ["--emulated"] if emulated else []
        self.at_once = 2 if emulated else 8

    def job(self, name: str, command: list[object], share: float, which: str = "gpu") -> Job:
        """Make a job that uses a build of build_extension.py, limited to a share of the time."""
        package = ROOT if self.emulated else BUILDS / which
        return Job(name, [sys.executable, *command], share * self.seconds, package)

    def build(self, which: str) -> Job:
        command: list[object] = [TESTS / "cuda" / "build_extension.py", which]
        if self.emulated:  # `make` built it; the first job builds the emulated engine
            command = ["-c", "import fusedrnn; print(fusedrnn.__file__)"]
        return self.job(f"build {which}", command, 0.7)

    def smokes(self, which: str) -> list[Job]:
        script = TESTS / "cuda" / "smoke.py"
        return [
            self.job(f"{regime} {dtype}", [script, *self.word, regime, dtype], 0.1, which)
            for regime in REGIMES
            for dtype in DTYPES
        ]

    def tests(self, file: str, name: str, wanted: str = "", emulated: str = "") -> Job:
        """Make a job that runs the tests of a file selected by pytest's -k, in one process."""
        command: list[object] = ["-m", "pytest", "-v", "-p", "no:cacheprovider"]
        command += ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml", "-m", "not slow"]
        if wanted := emulated if self.emulated else wanted:
            command += ["-k", wanted]
        (path,) = TESTS.glob(f"*/test_{file}.py")
        return self.job(name, [*command, path], 0.45)

    def sanitizer(self, tool: str) -> Job:
        """Run all small problems under a tool of compute-sanitizer, limited to our kernels.

        initcheck is not limited, because it must also see what torch's kernels write. racecheck and
        initcheck leave out 16-bit types (--wide): on an H200, cuBLAS's 16-bit GEMMs end racecheck
        with an internal error, and initcheck takes their results for uninitialised.
        """
        wide = ["--wide"] if tool in ("racecheck", "initcheck") else []
        job = self.job(tool, [TESTS / "cuda" / "smoke.py", *self.word, *wide], 0.4)
        # Give each tensor an allocation of its own, so that its bounds are known.
        job.environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        ours = () if tool == "initcheck" else ("--kernel-name", "kns=fusedrnn")
        return job if self.emulated else job.under(*SANITIZER, "--tool", tool, *ours)

    def bench(self, part: str, groups: str) -> Job:
        tiny = ["--device", "cpu", "--tiny", "--emulated"] if self.emulated else []
        words = ["--groups", groups, "--budget", BUDGET, *tiny]
        script, json_file = ROOT / "bench" / "bench_gpu.py", self.out / f"{part}-bench.json"
        return self.job(f"measure {groups}", [script, "--json", json_file, *words], 1)

    def profile(self, regime: str) -> Job:
        script = ROOT / "bench" / "gpu_regimes.py"
        job = self.job(f"ncu {regime}", [script, *self.word, regime], 0.12)
        job.summarise = ncu_summary
        return job if self.emulated else job.under(*NCU)

    def speed(self) -> list[Stage]:
        return [
            Stage("build", 1, 0.7, [self.build("gpu")]),
            Stage("smoke", self.at_once, 0.3, self.smokes("gpu")),
            Stage("headline", 1, 1, [self.bench("speed", "shapes")]),
        ]

    def tune(self) -> list[Stage]:
        return [
            Stage("build", 1, 0.7, [self.build("gpu")]),
            Stage("measure", 1, 0.65, [self.bench("tune", "probes,regimes,sweep")]),
            Stage("ncu", 1, 1, [self.profile(regime) for regime in REGIMES]),
        ]

    def truth(self) -> list[Stage]:
        """Test the release build, because that is what ships.

        The check build, in which waits have a time limit, compiles at the same time; the smoke
        tests run with it at the end.
        """
        check = self.build("check")
        check.environment = {"MAX_JOBS": "6"}  # the tests run at the same time
        small, steps = "emulated:tiny:grid and default", "test_step and elu"
        jobs = [
            check,
            self.tests("recurrence", "recurrence", "cuda:gpu", small),
            self.tests("numerics", "numerics", "cuda:gpu", "emulated:tiny:grid and ends"),
            self.tests(
                "gradients", "gradients", "cuda:gpu", "emulated:tiny:block and match and reset"
            ),
            self.tests("directions", "directions"),
            self.tests("cuda_graphs", "graphs"),
            *map(self.sanitizer, SANITIZERS),
            self.tests("cuda_large", "large", "cuda:gpu", "emulated and bits and block"),
            *(
                self.tests("cuda_kernels", f"kernels {name}", f"cuda:kernels and {which}", steps)
                for name, which in KERNELS.items()
            ),
        ]
        return [
            Stage("build", 1, 0.7, [self.build("gpu")]),
            Stage("tests", self.at_once, 0.8, jobs),
            Stage("time limits", self.at_once, 1, self.smokes("check")),
        ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=SECONDS)
    parser.add_argument("--emulated", action="store_true", help="try a part without a GPU")
    parser.add_argument("--seconds", type=float, help="in all, if not as above")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="a folder")
    options = parser.parse_args()
    seconds = options.seconds or SECONDS[options.part] * (
        EMULATED_FACTOR if options.emulated else 1
    )
    out = options.out.resolve()
    jobs = Jobs(out, options.emulated, seconds)
    stages = {"speed": jobs.speed, "tune": jobs.tune, "truth": jobs.truth}[options.part]()
    return Part(options.part, out, seconds, stages).run()


if __name__ == "__main__":
    sys.exit(main())
