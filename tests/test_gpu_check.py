"""The script that a machine with a GPU runs: no phase stops the next, and the results tell all."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import gpu_check


@pytest.fixture
def check(tmp_path: Path) -> gpu_check.Check:
    return gpu_check.Check(
        argparse.Namespace(seconds=100, out=str(tmp_path), emulated=True, tests="recurrence")
    )


def run(check: gpu_check.Check, code: str, name: str = "memcheck") -> gpu_check.Phase:
    check.run(name, [sys.executable, "-c", code])
    return check.phases[-1]


def test_each_phase_is_told(check, tmp_path):
    assert run(check, "print('fine')").ok
    assert run(check, "print('bad'); raise SystemExit(9)").status == 9
    check.run("build", ["/no/such/compiler"])
    told = json.loads((tmp_path / "check.json").read_text())["phases"]
    assert [(phase["name"], phase["ok"], phase["status"]) for phase in told] == [
        ("memcheck", True, 0),
        ("memcheck", False, 9),
        ("build", False, 127),
    ]
    assert [phase["last_line"] for phase in told[:2]] == ["fine", "bad"]
    assert "No such file" in (tmp_path / "check.txt").read_text()


def test_a_phase_that_hangs_is_ended_with_its_children(check, monkeypatch):
    monkeypatch.setitem(gpu_check.SHARES, "hangs", 0.01)
    started = time.monotonic()
    sleeping = "[sys.executable, '-c', 'import time; time.sleep(99)']"
    child = f"import subprocess, sys; subprocess.run({sleeping})"
    phase = run(check, child, "hangs")
    assert time.monotonic() - started < 50
    assert phase.status is None
    assert "TOO LONG" in str(phase)
    assert run(check, "print('next')").ok


def test_the_benchmark_gets_time_however_long_the_others_take():
    assert sum(gpu_check.SHARES.values()) < 0.95
