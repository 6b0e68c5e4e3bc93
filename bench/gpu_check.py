#!/usr/bin/env python3
"""Everything that only a machine with a GPU can tell, in ten minutes: ``make gpu-check``.

Builds fusedrnn for this machine's GPU and the torch that is installed, without network, into a
folder of its own; runs the tests of the CUDA engine, compute-sanitizer's four tools on small cases,
and bench_gpu.py. Each phase has a time limit, and none stops the next. Results:

    bench/results/gpu-<device>-<date>/check.json   what each phase came to
                                      check.txt    what each phase printed
                                      gpu.txt, gpu.json    by bench_gpu.py

The exit status is 0 if every phase succeeded. --emulated runs the same script to its end where
there is no GPU, on the emulated engine and the smallest cases.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-check" / "site"  # where fusedrnn is installed
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")

# What a phase gets at most, seconds, as a part of the whole. The benchmark gets all that is left.
SHARES = {"machine": 0.06, "build": 0.2, "tests": 0.25, "streams": 0.08}
SHARES.update(dict.fromkeys(TOOLS, 0.08))
BENCHMARK_LEAST = 60
STREAMS = ("bptt", "directions", "cuda_graphs")

MACHINE = """
import json, platform, torch
facts = {"python": platform.python_version(), "torch": torch.__version__}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    facts["device"] = properties.name
    facts["architecture"] = f"{properties.major}.{properties.minor}"
print(json.dumps(facts))
"""


@dataclass
class Phase:
    name: str
    command: list[str]
    limit_seconds: float
    seconds: float = 0
    status: int | None = None  # None: it ran out of time, and was ended
    last_line: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 0

    def __str__(self) -> str:
        result = "ok" if self.ok else "TOO LONG" if self.status is None else f"FAILED {self.status}"
        return f"{self.name:<10} {result:<10} {self.seconds:6.1f} s   {self.last_line}"


class Check:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + options.seconds
        self.phases: list[Phase] = []
        self.machine: dict[str, Any] = {}
        self.out = Path(options.out or ROOT / "build" / "gpu-check" / "unnamed")
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(SITE),
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, name: str, command: Sequence[object], **environment: str) -> str:
        """One phase; what it printed, which also goes into check.txt."""
        share = SHARES.get(name)
        limit = self.left() if share is None else min(self.left(), share * self.options.seconds)
        phase = Phase(name, [str(word) for word in command], round(max(limit, 5), 1))
        print(f"{name}: {' '.join(phase.command)}", flush=True)
        started = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "check.txt").open("a+") as log:
            log.write(f"\n==== {name}: {' '.join(phase.command)}\n")
            log.flush()
            before = log.tell()
            phase.status = self.wait(phase, log, {**self.environment, **environment})
            log.seek(before)
            printed = log.read()
        phase.seconds = round(time.monotonic() - started, 1)
        lines = [line for line in printed.splitlines() if line.strip()]
        phase.last_line = lines[-1].strip(" =")[:120] if lines else ""
        self.phases.append(phase)
        print(phase, flush=True)
        self.write()
        return printed

    @staticmethod
    def wait(phase: Phase, log: IO[str], environment: Mapping[str, str]) -> int | None:
        folder = SITE.parent  # not ROOT, whose fusedrnn is not the one that was built
        folder.mkdir(parents=True, exist_ok=True)
        try:
            process = subprocess.Popen(
                phase.command, cwd=folder, env=dict(environment), stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            log.write(f"{error}\n")
            return 127
        try:
            return process.wait(phase.limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it and its children, which hold the GPU
            process.wait()
            return None

    def write(self) -> None:
        facts = {
            "machine": self.machine,
            "emulated": self.options.emulated,
            "seconds": self.options.seconds,
            "phases": [{**asdict(phase), "ok": phase.ok} for phase in self.phases],
        }
        (self.out / "check.json").write_text(json.dumps(facts, indent=1) + "\n")

    def name_folder(self) -> None:
        """Results go where the machine's name says, once it is known."""
        if self.options.out:
            return
        device = "emulated" if self.options.emulated else self.machine.get("device", "unknown")
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        date = datetime.datetime.now().strftime("%Y%m%d-%H%M")
        named = ROOT / "bench" / "results" / f"gpu-{slug}-{date}"
        named.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(named, ignore_errors=True)
        shutil.move(self.out, named)
        self.out = named

    def __call__(self) -> int:
        emulated = self.options.emulated
        if not self.options.out:
            shutil.rmtree(self.out, ignore_errors=True)
        printed = self.run("machine", [sys.executable, "-c", MACHINE])
        if self.phases[-1].ok:
            self.machine = json.loads(printed.splitlines()[-1])
        self.name_folder()
        if not emulated and "device" not in self.machine:
            print("no GPU that torch can use; --emulated tries the script without", file=sys.stderr)
            return 1

        shutil.rmtree(SITE, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        # CUDA or an error, and for this GPU alone
        cuda = {"FUSEDRNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": self.machine.get("architecture", "")}
        self.run("build", [*pip, "--quiet", "--target", SITE, ROOT], **({} if emulated else cuda))

        which = "emulated:tiny:grid and default" if emulated else "cuda:gpu"
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        pytest += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        files = [ROOT / "tests" / f"test_{name}.py" for name in self.options.tests.split(",")]
        self.run("tests", [*pytest, "-m", "not slow", "-k", which, *files])
        # what only a device has: several streams, graphs that are captured
        files = [ROOT / "tests" / f"test_{name}.py" for name in STREAMS]
        self.run("streams", [*pytest, "-m", "not slow", *files])

        cases = [sys.executable, ROOT / "tests" / "sanitizer_cases.py"]
        for tool in TOOLS:
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            # every tensor an allocation of its own, so that its ends are known
            self.run(
                tool,
                [*cases, "emulated"] if emulated else [*sanitizer, *cases],
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )

        budget = BENCHMARK_LEAST if emulated else max(BENCHMARK_LEAST, self.left() - 15)
        tiny = ["--device", "cpu", "--tiny", "--emulated"] if emulated else []
        bench = [sys.executable, ROOT / "bench" / "bench_gpu.py", "--out", self.out]
        self.run("benchmark", [*bench, "--budget", int(budget), *tiny])

        print(f"\n{self.out}")
        for phase in self.phases:
            print(phase)
        return 0 if all(phase.ok for phase in self.phases) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emulated", action="store_true", help="try the script without a GPU")
    parser.add_argument("--seconds", type=float, help="in all (default: 570; emulated, 3000)")
    parser.add_argument("--out", help="a folder for the results")
    parser.add_argument(
        "--tests",
        default="recurrence,numerics,gradients",
        help="files of tests, by comma (default: %(default)s)",
    )
    options = parser.parse_args()
    options.seconds = options.seconds or (3000 if options.emulated else 570)
    return Check(options)()


if __name__ == "__main__":
    sys.exit(main())
