"""The benchmarks run, print what they should, and do not time wrong results.

The times themselves are not tested.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_loops
import bench_rnn
import bench_software
import charts
import floor
import measure
import peers
import pytest
import torch
from paths import BENCH

import fusedrnn

TINY = ["--seconds", "0.01", "--threads", "1", "--peers", "fusedrnn,loop,RNNCell loop"]


def run(*arguments: str, program: str = "bench_rnn.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / program), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Return the output and the JSON of a run over two shapes."""
    path = tmp_path_factory.mktemp("bench") / "out.json"
    ran = run("--shapes", "3,2,5,7", "2,1,1,1", "--json", str(path), *TINY)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, json.loads(path.read_text())


def test_table_has_each_shape_and_peer(tiny: tuple[str, dict[str, Any]]) -> None:
    text, _ = tiny
    assert "== forward\n" in text
    assert "== forward+backward\n" in text
    assert text.count("\n  3,2,5,7") + text.count("\n3,2,5,7") == 2
    for word in ("nn.RNN µs/step", "fusedrnn µs/step", "GFLOP/s", "loop (×)", "kept MiB fusedrnn"):
        assert word in text
    assert "geometric mean over 2 shapes" in text
    assert torch.__version__ in text


def test_json_has_everything(tiny: tuple[str, dict[str, Any]]) -> None:
    _, data = tiny
    environment = data["environment"]
    for key in ("cpu", "cores", "os", "threads", "dtype", "date", "commit", "command"):
        assert environment[key]
    assert environment["versions"]["torch"] == torch.__version__
    assert len(data["results"]) == 2 * 2 * 4  # shapes, modes, peers
    for result in data["results"]:
        assert result["check"]["passed"]
        assert result["check"]["error"] <= result["check"]["bound"]
        assert len(result["seconds_per_call"]) >= measure.MIN_ROUNDS
        assert result["us_per_step"] > 0
        assert result["gflops"] > 0
        ratio = result["ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        if result["mode"] == "forward+backward":
            assert result["kept_bytes"] > 0
    assert data["summary"]["forward"]["geometric_mean_ratio"]["nn.RNN"] == 1


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes_run(dtype: str) -> None:
    ran = run("--shapes", "2,2,3,4", "--dtype", dtype, "--markdown", *TINY)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "| 2,2,3,4 |" in ran.stdout


def test_cells() -> None:
    ran = run("--set", "cell", "--shapes", "1,2,3,4", "--seconds", "0.01", "--threads", "1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "fusedrnn.RNNCell µs/step" in ran.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--shapes", "1,2,3"], ["--shapes", "0,1,1,1"], ["--peers", "cuDNN"], ["--threads", "0"]],
)
def test_bad_arguments_are_named(arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.returncode == 2
    assert "error: " in ran.stderr
    assert "Traceback" not in ran.stderr


class Wrong(peers.UnbindLoop):
    """Correct except for the gradient of one weight."""

    name = "fusedrnn"

    def forward_backward(self) -> tuple[torch.Tensor, Any]:
        output, (w_ih, w_hh, *others) = super().forward_backward()
        return output, (w_ih, w_hh * 1.001, *others)


def test_wrong_results_are_not_timed() -> None:
    options = bench_rnn.parse_arguments(["--shapes", "5,2,3,4", *TINY])
    options.kinds = [peers.TorchRNN, Wrong]
    report = bench_rnn.run(options)
    (wrong,) = report.wrong
    assert (wrong.peer, wrong.mode) == ("fusedrnn", "forward+backward")
    assert wrong.times == []
    assert "WRONG, not timed: fusedrnn at (5,2,3,4)" in bench_rnn.render(report, markdown=False)


def test_an_error_of_nan_fails_the_check() -> None:
    assert not measure.Check(math.nan, 1.0).passed


def test_sets_span_what_they_promise() -> None:
    wide = bench_rnn.SETS["wide"]
    assert len(set(wide)) == len(wide) >= 24
    spans = {"T": (8, 1000), "B": (1, 1024), "I": (1, 2048), "H": (16, 1024)}
    for size, span in spans.items():
        values = [getattr(shape, size) for shape in wide]
        assert (min(values), max(values)) == span


def test_packed_cold_and_floor_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    ran = run("--shapes", "3,4,2,5", "--packed", "--cold", "--floor", "--json", str(path), *TINY)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for words in ("Packed: ", "floor  share", "nn.RNN cold (×)", "fusedrnn cold (×)"):
        assert words in ran.stdout
    data = json.loads(path.read_text())
    assert data["skipped"]["RNNCell loop, forward"] == "it does not support packed batches"
    assert len(data["results"]) == 2 * 3  # modes, peers
    for result in data["results"]:
        assert result["check"]["passed"]
        assert len(result["cold_seconds_per_call"]) >= measure.MIN_ROUNDS
        assert result["cold_ratio"]["median"] > 0
        assert result["floor_seconds"] > 0
        assert result["share_of_floor"] > 0


@pytest.mark.parametrize(("T", "B"), [(1, 1), (5, 1), (1, 4), (5, 2), (10, 16), (7, 33)])
def test_packed_problems_have_as_many_rows_as_dense_ones(T: int, B: int) -> None:
    sizes = peers.ragged(T, B)
    assert sizes.sum() == T * B
    assert sizes[0] == B
    assert sizes[-1] > 0
    assert (sizes.diff() <= 0).all()
    assert len(sizes) == (2 * T - 1 if B > 1 else T)


def test_the_gradient_of_x_is_named(tiny: tuple[str, dict[str, Any]]) -> None:
    assert "x requires gradient." in tiny[0]
    ran = run("--shapes", "2,1,1,1", "--no-grad-input", *TINY)
    assert "x requires no gradient." in ran.stdout


def test_a_floor_has_a_barrier_in_each_step_if_threads_share_the_units() -> None:
    def floor_of(B: int, threads: int) -> float:
        shape = peers.Shape(10, B, 64, 2048)
        problem = peers.Problem.random(
            shape, torch.float64, cell=False, grad_input=True, threads=threads
        )
        return floor.floor(problem, peers.FORWARD)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("product_rate", "copy_rate"):
            patch.setattr(floor, name, lambda *_: 1e30)
        patch.setattr(floor, "read_rate", lambda _: 1e9)
        reads = 10 * 8 * 2048**2 / 1e9
        assert floor_of(1, 1) == floor_of(2, 2) == pytest.approx(reads)
        assert floor_of(1, 2) == pytest.approx(reads / 2 + 10 * floor.BARRIER)


def test_plots_of_results(tmp_path: Path) -> None:
    sizes = [f"3,{B},{H},{H}" for B in (1, 16, 256) for H in (2, 4)]
    path = tmp_path / "out.json"
    ran = run("--shapes", *sizes, "--floor", "--json", str(path), *TINY)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    data = json.loads(path.read_text())
    steps, heat = charts.plot_steps(data), charts.plot_heat(data)
    assert [axis.get_title() for axis in steps.axes] == ["B = 1", "B = 16", "B = 256"]
    assert [len(axis.lines) for axis in steps.axes] == [4, 4, 4]  # nn.RNN, loop, fusedrnn, floor
    assert len(heat.axes[0].texts) == 6
    lost = sum(float(text.get_text()) < 1 for text in heat.axes[0].texts)
    assert len(heat.axes[0].patches) == lost
    for result in data["results"]:
        result["peak_bytes"] = result["kept_bytes"]  # --memory would start a process for each
    assert len(charts.plot_memory(data).axes[0].lines) == 4  # two peers, peak and kept


# ---- bench_loops.py


def test_loops_are_timed_against_their_calls(tmp_path: Path) -> None:
    path = tmp_path / "loops.json"
    ran = run("--tiny", "--threads", "1", "--json", str(path), program="bench_loops.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    data = json.loads(path.read_text())
    assert data["environment"]["threads"] == 1
    assert len(data["results"]) == len(bench_loops.RECIPES) * 2 * 2  # sizes, modes
    for result in data["results"]:
        assert result["check"]["error"] <= result["check"]["bound"]
        assert len(result["loop"]) == len(result["call"]) >= measure.MIN_ROUNDS
        assert 0 < result["speed_up"]["low"] <= result["speed_up"]["high"]
        assert result["us_per_step"] > 0
    for recipe in bench_loops.RECIPES:
        assert ran.stdout.count(recipe.name + " ") >= 2  # a row for each size
    assert "forward+backward: geometric mean" in ran.stdout


def test_a_call_that_differs_from_its_loop_is_not_timed() -> None:
    recipe = bench_loops.RECIPES[0]
    wrong = dataclasses.replace(recipe, call=lambda **a: [1.001 * r for r in recipe.loop(**a)])
    results = [
        bench_loops.measure(wrong, bench_loops.TINY[0], mode, 0.01) for mode in bench_loops.MODES
    ]
    for result in results:
        assert not result.check.passed
        assert result.loop == result.call == []
    assert bench_loops.table(results, markdown=False).count("WRONG") == 2
    assert bench_loops.means(results) == []


def test_unknown_recipes_are_named() -> None:
    ran = run("--recipes", "nn4n", "GRU", program="bench_loops.py")
    assert ran.returncode == 2
    assert "error: unknown recipes ['GRU']" in ran.stderr


def test_single_steps_of_a_stream_are_timed() -> None:
    ran = run("--stream", "--tiny", "--threads", "1", program="bench_loops.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    *_, head, one, three = (line.split() for line in ran.stdout.splitlines())
    assert head[:3] == ["layers", "H", "RNN.step"]
    for layers, row in (("1", one), ("3", three)):
        assert row[:2] == [layers, "8"]
        assert len(row) == len(head)
        assert all(float(time) > 0 for time in row[2:])


# ---- bench_software.py


def test_a_program_trains_with_both_classes() -> None:
    program = bench_software.Program("model", bench_software.PROGRAMS[0].train, 2)
    found = bench_software.compare(program, rounds=1)
    assert found.same
    assert min(found.torchs, found.fused, found.speed_up) > 0
    assert found.losses[1] < found.losses[0]
    assert bench_software.row(found)[:2] == ["model", "2"]


def test_a_program_with_other_losses_is_marked() -> None:
    classes = []

    def train(updates: int) -> list[float]:
        classes.append(torch.nn.RNN)
        return [1.0] * (updates - 1) + [1.0 + 0.01 * (torch.nn.RNN is fusedrnn.RNN)]

    before = torch.nn.RNN
    found = bench_software.compare(bench_software.Program("model", train, 3), rounds=2)
    assert torch.nn.RNN is before
    assert classes == [before, fusedrnn.RNN] * 3
    assert not found.same
    assert found.difference == pytest.approx(0.01)
    assert "DIFFERENT" in bench_software.row(found)[-2]


def test_busy_machines_are_timed_under_every_condition() -> None:
    ran = run("--shapes", "3,1,2,4", "--seconds", "0.01", program="bench_busy.py")
    assert ran.returncode == 0, ran.stderr
    rows = ran.stdout.split("nn.RNN\n")[1].splitlines()
    assert len(rows) == 5
    for row in rows:
        times = [float(word) for word in row.split()[-3:]]
        assert all(time > 0 for time in times)


def test_long_sequences_are_measured_in_every_case() -> None:
    ran = run("--steps", "50", "--cases", "3", program="bench_long.py")
    assert ran.returncode == 0, ran.stderr
    rows = [line.split() for line in ran.stdout.splitlines()[-3:]]
    assert [row[:6] for row in rows] == [
        ["50", "1", "1", "True", "None", "True"],
        ["50", "1", "1", "True", "1000", "True"],
        ["50", "1", "3", "True", "None", "True"],
    ]
