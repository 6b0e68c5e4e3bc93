"""bench/gpu_check.py: a failed job does not stop the others, and its output is kept."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import smoke
from engines import REGIMES
from gpu_check import Job, Jobs, Part, Stage

PARTS = {"speed": 3, "tune": 3, "truth": 3}  # the number of stages of each part
OK = ["ok"] * 3
LIMIT = 5  # seconds, for a job that hangs; on a busy machine, starting Python takes some of them
STUCK = "import signal, time\ndef stuck():\n    time.sleep(99)\n"
FAILURES = {  # planted code, its result, and text that the log must contain
    "error": ("raise ValueError('planted')", "FAILED 1", "ValueError: planted"),
    "crash": ("import os\nos.kill(os.getpid(), 11)", "FAILED -11", "Segmentation fault"),
    "hang": (f"{STUCK}stuck()", "TOO LONG", "in stuck"),
}


def a_job(name: str, code: str, limit: float = 60) -> Job:
    return Job(name, [sys.executable, "-c", code], limit)


def stages_of(name: str, out: Path, emulated: bool = True) -> list[Stage]:
    return getattr(Jobs(out, emulated, 60), name)()


def run(out: Path, *jobs: Job, at_once: int = 1, seconds: float = 60) -> str:
    """Run all jobs in one stage and return the log."""
    Part("part", out, seconds, [Stage("stage", at_once, 1, list(jobs))]).run()
    return (out / "part.txt").read_text()


@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name, count in PARTS.items() for stage in range(count)]
)
def test_failures_in_any_stage_stop_no_other_job(name, stage, tmp_path, capsys):
    stages = stages_of(name, tmp_path)
    for one in stages:
        del one.jobs[1:]
        one.jobs[0].command = [sys.executable, "-c", "print('fine')"]
    planted = [a_job(failure, code, LIMIT) for failure, (code, _, _) in FAILURES.items()]
    planted[0].limit = planted[1].limit = 60
    stages[stage].jobs[:0] = planted
    assert Part(name, tmp_path, 300, stages).run() == 1
    log = (tmp_path / f"{name}.txt").read_text()
    assert log.count("| fine") == len(stages)
    records = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    results = {record["job"]: record["result"] for record in records}
    assert sorted(results.values()) == sorted([*(r for _, r, _ in FAILURES.values()), *OK])
    _, _, summary = capsys.readouterr().out.partition(f"\n== {name}: ")
    for failure, (_, result, words) in FAILURES.items():
        assert results[failure] == result
        assert words in log
        assert f"{failure:<24} {result}" in summary
        assert words in summary


def test_a_job_that_ignores_interrupts_still_shows_where_it_is(tmp_path):
    job = a_job("job", f"{STUCK}signal.signal(signal.SIGINT, signal.SIG_IGN)\nstuck()", LIMIT)
    assert "in stuck" in run(tmp_path, job)
    assert job.result == "TOO LONG"


def test_a_job_is_ended_with_its_children(tmp_path):
    alive = tmp_path / "alive"
    child = "print('child', flush=True)\nimport time\ntime.sleep(9)\n"
    child += f"open({str(alive)!r}, 'w')"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    assert "job| child" in run(tmp_path, a_job("job", code, LIMIT))
    time.sleep(9 - LIMIT)
    assert not alive.exists()


def test_the_log_is_written_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ENDINGS", ((signal.SIGKILL, 3),))
    job = a_job("job", "print('begun')\nimport time\ntime.sleep(99)", LIMIT)
    assert "job| begun" in run(tmp_path, job)


def test_jobs_without_time_left_are_named(tmp_path):
    first, second = a_job("first", "import time; time.sleep(99)"), a_job("second", "")
    run(tmp_path, first, second, seconds=LIMIT)
    assert (first.result, second.result) == ("TOO LONG", "no time left")


def test_a_program_that_is_missing_is_named(tmp_path):
    job = Job("job", ["/no/such/compiler"], 60)
    run(tmp_path, job)
    assert job.result == "FAILED 127"
    assert "No such file" in "".join(job.summary())


def test_the_summary_is_printed_last_and_fits(tmp_path, capsys):
    failures = [a_job(f"job {i}", f"print('{'x' * 200}\\n' * 20); 1 / 0") for i in range(24)]
    measured = a_job("measured", "print('long tables\\n== summary\\n1.5 µs')")
    assert "measured| long tables" in run(tmp_path, measured, *failures, at_once=2, seconds=300)
    _, _, summary = capsys.readouterr().out.partition("\n== part: ")
    assert len(summary) < 12_000
    assert "1 of 25 ok" in summary
    assert "\n1.5 µs\n" in summary
    assert "long tables" not in summary


def test_a_budget_is_the_limit_less_some_time_to_finish(tmp_path):
    job = Job("job", [sys.executable, "-c", f"print({gpu_check.BUDGET!r})"], 40)
    run(tmp_path, job)
    assert 20 <= int(job.lines[0]) <= 25


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_jobs_name_files_that_exist(name, emulated, tmp_path):
    stages = stages_of(name, tmp_path, emulated)
    assert len(stages) == PARTS[name]
    for word in (word for stage in stages for job in stage.jobs for word in job.command):
        if isinstance(word, Path) and word.suffix != ".json":
            assert word.exists()


def test_every_regime_and_dtype_has_a_smoke_test(tmp_path):
    assert gpu_check.REGIMES == REGIMES
    names = [job.name.split() for job in stages_of("speed", tmp_path)[1].jobs]
    assert [tuple(words) for words in names] == smoke.PAIRS


NCU = """\
==PROF== Connected to process 7
profiled cluster T=64 B=64 I=1024 H=1024
"ID","Kernel Name","launch__grid_size","launch__block_size","smsp__inst_executed.sum",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","smsp__issue_active.avg.pct"
"","","","","inst","inst","inst","%"
"0","persistent","64","256","3,276,800","0.25","1.50","41.5"
"""


def test_a_profile_is_summarised_in_one_line():
    (line,) = gpu_check.ncu_summary(NCU.splitlines())
    assert line.startswith("profiled cluster T=64 ")
    assert "100 instructions a step and warp" in line
    assert "issue_active 41.5" in line
    assert line.endswith("stalls wait 1.50, barrier 0.25")
    assert gpu_check.ncu_summary(NCU.splitlines()[:2]) == [
        "profiled cluster T=64 B=64 I=1024 H=1024: no profile"
    ]
