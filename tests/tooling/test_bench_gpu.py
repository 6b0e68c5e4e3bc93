"""The GPU benchmark completes without a GPU, and continues after its child hangs or dies.

The times themselves are not tested.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_gpu
import gpu_cases
import gpu_peers
import gpu_regimes
import gpu_report
import measure
import peers
import probes
import pytest
import torch
from engines import Engine
from gpus import H100
from paths import BENCH

from fusedrnn import _C

TINY = ["--device", "cpu", "--tiny"]


def run(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    ran = subprocess.run(
        [
            *(sys.executable, str(BENCH / "bench_gpu.py"), *TINY),
            *("--json", str(folder / "gpu.json"), *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran, json.loads((folder / "gpu.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gpu")
    groups = ",".join(group for group in bench_gpu.GROUPS if group != "compile")  # which is slow
    ran, data = run(folder, "--budget", "600", "--groups", groups)
    return ran.stdout, data


def test_every_peer_is_checked_and_timed(tiny: tuple[str, dict[str, Any]]) -> None:
    _, data = tiny
    (regimes,) = (result for result in data["results"] if result["group"] == "regimes")
    assert regimes["regimes"] == {}  # only with CUDA does a planner choose among regimes
    layers = [result for result in data["results"] if result is not regimes]
    precisions = ["bf16", "f32", "f16", "tf32", "f32", "f32"]
    assert [result["precision"] for result in layers] == precisions
    assert data["lost"] == []
    assert data["not_run"] == []
    for result in layers:
        who = {name for name, found in result["peers"].items() if not found["failed"]}
        there = {kind.name for kind in gpu_peers.PEERS[result["group"]]} - {"FlashRNN"}
        assert who == there - ({"nn.RNN TF32"} if result["precision"] != "f32" else set())
        for name in who:
            found = result["peers"][name]
            assert set(found["seconds"]) == set(gpu_peers.GPU_MODES)
            assert [check["passed"] for check in found["check"].values()] == [True, True]
        assert set(result["chains"]) == {peers.FORWARD, gpu_peers.ALONE}
        assert result["predicted"]["backward"]["words"]


def test_regimes_are_forced_and_compared_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU engine stands in for every regime."""
    forced: list[str | None] = []
    plan = _C.plan_cuda
    monkeypatch.setattr(_C, "has_cuda", True)
    monkeypatch.setattr(_C, "use_regime", forced.append, raising=False)
    monkeypatch.setattr(_C, "plan_cuda", lambda **of: plan(**{**of, "device": H100}))
    case = gpu_cases.Case("regimes", peers.Shape(5, 2, 3, 8), "f32")
    result = gpu_cases.Run(case, torch.device("cpu"), 0.01, without={"regime cluster": "it hung"})()
    assert set(result["regimes"]) == set(gpu_regimes.REGIMES)
    for regime, ways in result["regimes"].items():
        for way in (peers.FORWARD, gpu_peers.ALONE):
            if regime == "cluster":
                assert ways[way] == {"failed": "it hung"}
            elif "failed" not in ways[way]:
                assert ways[way]["error"] < 1e-6
                assert ways[way]["plan"]["regime"] == regime
                assert len(ways[way]["seconds"]) >= measure.MIN_ROUNDS
    assert "step" in forced
    assert "cluster" not in forced
    assert forced[1::2] == [None] * (len(forced) // 2)
    rows = gpu_report.regime_rows([result])[1]
    assert [row[2] for row in rows] == list(gpu_regimes.REGIMES)


@pytest.mark.slow_emulated
@pytest.mark.parametrize("precision", ["bf16", "f32"])
def test_a_case_on_every_engine(engine: Engine, precision: str) -> None:
    device = torch.device("cuda" if engine.kind == "cuda" else "cpu")
    case = gpu_cases.Case("shapes", peers.Shape(5, 2, 3, 8), precision)
    result = gpu_cases.Run(case, device, 0.01, check_steps=3)()
    for name in ("fusedrnn", "fusedrnn in a graph"):
        found = result["peers"][name]
        assert found["failed"] is None
        assert [check["passed"] for check in found["check"].values()] == [True, True]
        assert set(found["seconds"]) == set(gpu_peers.GPU_MODES)
        if engine.kind == "cuda" and name == "fusedrnn":
            assert found["peak_bytes"] > 0
    assert set(result["chains"]) == {peers.FORWARD, gpu_peers.ALONE}


def test_output_says_that_there_was_no_gpu(tiny: tuple[str, dict[str, Any]]) -> None:
    text, _ = tiny
    assert "NO GPU" in text
    assert "no GPU here, and --emulated was not asked for" in text
    for title in ("everyone\n", "plans\n"):
        assert f"== {title}" in text


def test_the_last_lines_are_a_summary(tiny: tuple[str, dict[str, Any]]) -> None:
    text, _ = tiny
    _, _, last = text.partition("\n== summary\n")
    for word in ("× cuDNN", "predicted", "H=8", "ns: "):
        assert word in last
    assert "== " not in last


@pytest.mark.slow
def test_torch_compile(tmp_path: Path) -> None:
    _, data = run(tmp_path, "--groups", "compile")
    (result,) = data["results"]
    assert result["peers"]["torch.compile"]["compile_seconds"] > 0


# A child process that starts to check a peer and then exits or hangs, depending on `end`.
BAD_CHILD = """
import json, sys, time
work = json.loads(sys.argv[-1])
task = work["tasks"][0]
def say(**word): print("@@" + json.dumps(word), flush=True)
say(kind="environment", environment={{}})
name = next((n for n in ("fusedrnn", "nn.RNN") if n not in work["without"][task]), None)
if name:
    say(kind="at", task=task, name=name, phase="check", limit=None)
    {end}
for task in work["tasks"]:
    say(kind="done", task=task)
say(kind="end")
"""


@pytest.mark.parametrize(
    ("end", "how"),
    [("sys.exit(3)", "it ended, exit status 3"), ("time.sleep(60)", "silent for 0.5 s")],
)
def test_a_peer_that_ends_the_process_is_left_out(
    end: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "child.py"
    script.write_text(BAD_CHILD.format(end=end))
    monkeypatch.setattr(bench_gpu.Foreman, "script", str(script))
    arguments = [*TINY, "--groups", "shapes", "--json", str(tmp_path / "gpu.json")]
    arguments += ["--silence", "0.5"]
    foreman = bench_gpu.Foreman(bench_gpu.parse_arguments(arguments), arguments)
    record = foreman.run()
    assert [lost["name"] for lost in record.lost] == ["fusedrnn", "nn.RNN"]
    assert all(how in lost["how"] for lost in record.lost)
    assert set(foreman.without["0"]) == {"fusedrnn", "fusedrnn in a graph", "nn.RNN"}
    assert foreman.tasks == record.not_run == []


def test_a_child_that_cannot_start_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "child.py"
    script.write_text("raise SystemExit(1)")
    monkeypatch.setattr(bench_gpu.Foreman, "script", str(script))
    arguments = [*TINY, "--json", str(tmp_path / "gpu.json")]
    record = bench_gpu.Foreman(bench_gpu.parse_arguments(arguments), arguments).run()
    assert [lost["name"] for lost in record.lost] == ["start"] * bench_gpu.FATAL
    assert len(record.not_run) >= 5
    assert record.results == {}


def test_a_peer_that_fails_is_noted_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Any) -> Any:
        raise ValueError("no kernel\nfor this")

    monkeypatch.setattr(peers.FusedRNN, "output", fail)
    case = gpu_cases.Case("sweep", peers.Shape(3, 1, 2, 4), "f32")
    result = gpu_cases.Run(case, torch.device("cpu"), 0.01)()
    ours, theirs = result["peers"]["fusedrnn"], result["peers"]["nn.RNN"]
    assert ours["failed"].startswith("check forward+backward: ValueError: no kernel")
    assert ours["seconds"] == {} == result["chains"]
    assert theirs["failed"] is None
    assert theirs["seconds"]
    gpu_report.render(
        {"results": [result], "summary": gpu_report.summary([result]), "probes": [], "lost": [],
         "not_run": [], "environment": {}}
    )  # fmt: skip


def test_flashrnn_gets_its_documented_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def flashrnn(Wx: Any, R: Any, b: Any, *, function: str, dtype: str) -> Any:
        assert (function, dtype) == ("elman", "float32")
        u = Wx[:, :, 0] + b[0]  # [batch, time, gate, head, unit], [gate, head, unit]
        h, states = torch.zeros_like(u[:, 0]), []
        for u_t in u.unbind(1):
            h = torch.tanh(u_t + torch.einsum("ndp,bnp->bnd", R[0], h))
            states.append(h)
        return torch.stack(states, 1)[None], h  # [state, batch, time, head, unit]

    package = types.ModuleType("flashrnn")
    package.flashrnn = types.ModuleType("flashrnn.flashrnn")  # type: ignore[attr-defined]
    package.flashrnn.flashrnn = flashrnn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashrnn", package)
    problem = peers.Problem.random(
        peers.Shape(5, 2, 3, 4), torch.float32, cell=False, grad_input=True, threads=1
    )
    judge = measure.Judge(problem, 1e-7, peers.BACKWARD, a_loop(problem))
    theirs = gpu_peers.FlashRNN()
    theirs.prepare(problem.to(torch.float32))
    assert max(measure.distances(theirs.results(peers.BACKWARD), judge.truth)) < 1e-6
    assert theirs.compile_seconds is not None


def a_loop(problem: peers.Problem) -> peers.Peer:
    loop = peers.UnbindLoop()
    loop.prepare(problem)
    return loop


class Wrong(peers.FusedRNN):
    def output(self) -> torch.Tensor:
        return super().output() * 1.01


def test_wrong_results_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_peers.PEERS, "sweep", [peers.TorchRNN, Wrong])
    case = gpu_cases.Case("sweep", peers.Shape(3, 1, 2, 4), "f32")
    result = gpu_cases.Run(case, torch.device("cpu"), 0.01)()
    assert len(gpu_report.summary([result])["wrong"]) == 2


def a_result(precision: str, us: float, cudnn: float, chain: float) -> dict[str, Any]:
    """Make a result for a shape with promises (T = 512), with these microseconds per step."""

    def peer(us: float) -> dict[str, Any]:
        seconds = {mode: [us * 512e-6] for mode in (peers.FORWARD, peers.BACKWARD)}
        check = {peers.FORWARD: {"error": 0.0, "bound": 1.0, "passed": True}}
        return {"seconds": seconds, "check": check, "coarse": False}

    return {
        "group": "shapes",
        "shape": {"T": 512, "B": 32, "I": 256, "H": 512},
        "precision": precision,
        "peers": {"fusedrnn": peer(us), "nn.RNN": peer(cudnn)},
        "chains": {peers.FORWARD: [512e-6], gpu_peers.ALONE: [chain * 512e-6]},
        "predicted": {},
    }


def test_promises_are_compared_with_the_results() -> None:
    kept = gpu_report.summary([a_result("bf16", 0.55, 1.7, 1.2)])["promises"]
    assert [promise["target"] for promise in kept] == [0.55, 1.3, 3, 3]
    assert all(promise["met"] for promise in kept)
    broken = gpu_report.summary([a_result("f32", 0.91, 0.9, 1.4)])
    assert [promise["target"] for promise in broken["promises"]] == [0.9, 1.3, 3, 3]
    assert broken["met"] == 0
    assert len(broken["slower_than_best_peer"]) == 2
    unknown = a_result("bf16", math.nan, 1, 1)
    assert gpu_report.summary([unknown])["met"] == 1  # only the promise for backward alone


def test_a_longer_result_is_compared_over_the_first_steps() -> None:
    truth = torch.ones(2, 3, dtype=torch.float64)
    assert measure.distances([torch.ones(5, 3)], [truth]) == [0]
    assert measure.distances([2 * torch.ones(5, 3)], [truth]) == [1]


def test_cases_cover_the_sweep_and_the_promised_shapes() -> None:
    cases = gpu_cases.all_cases()
    assert len(set(cases)) == len(cases)
    sweep = {(c.shape.B, c.shape.H) for c in cases if c.group == "sweep"}
    sizes = (64, 128, 256, 384, 512, 768, 1024, 2048)
    assert sweep == {(B, H) for B in (1, 16, 64) for H in sizes}
    shapes = {tuple(c.shape[1:]) for c in cases if c.group == "shapes"}
    assert shapes == set(gpu_report.TARGETS)


@pytest.mark.parametrize("arguments", [["--groups", "all"], ["--budget", "0"], ["--device", "x"]])
def test_bad_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_gpu.parse_arguments([*TINY, *arguments])
    assert "error: " in capsys.readouterr().err


# ---- code for GPUs only, with stand-ins for torch.cuda, to check the calls and their order


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


def test_event_times_are_converted_from_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)

    def call() -> None:
        FakeEvent.now += 2.0

    timer = measure.timer_for(torch.device("cuda"))
    assert timer(call, 5) == pytest.approx(2e-3)


def test_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            said.append("wait")

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    @contextlib.contextmanager
    def on(*streams: Any, **more: Any) -> Iterator[None]:
        said.append("capture" if more else "on the stream")
        yield
        said.append("end")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", on)

    def make() -> Any:
        said.append("make")
        return lambda: said.append("call") or "result"  # type: ignore[func-returns-value]

    replay = measure.capture(make, torch.device("cuda"))
    assert (replay(), replay()) == ("result", "result")
    assert said == [
        *("wait", "on the stream", "make", "call", "call", "end", "wait"),
        *("capture", "call", "end", "replay", "replay"),
    ]


def test_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Somebody(peers.UnbindLoop):
        def forward_backward(self) -> Any:
            return torch.ones(1), ()

    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 10,
        "max_memory_allocated": 17,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert gpu_cases.peak_bytes(Somebody()) == 7


# ---- probes, on the emulator

needs_nvcc = pytest.mark.skipif(probes.nvcc() is None, reason="no nvcc: no kernel can be built")


@pytest.fixture(scope="module")
def emulated() -> probes.Probes:
    return probes.Probes(probes.build_emulated(), probes.Setting.on_emulator())


@needs_nvcc
def test_every_probe_runs(emulated: probes.Probes) -> None:
    rows = list(emulated.run())
    assert [row for row in rows if row and "error" in row] == []
    names = [row["probe"] for row in rows if row]
    assert len(set(names)) == len(names) >= 20
    left_out = probes.Probes(emulated.library, emulated.setting, without=names[1:])
    assert [row["probe"] for row in left_out.run() if row] == names[:1]


@needs_nvcc
def test_probes_exchange_the_expected_values(emulated: probes.Probes) -> None:
    """Otherwise, the probe of an exchange could be fast because it exchanges nothing."""
    out, sink = emulated.out, emulated.sink
    emulated.call("probe_async_ping_pong", 5, out, sink)
    assert sink[0] == 10  # each hop adds one
    emulated.call("probe_flag_ping_pong", 5, out, sink)
    assert sink[0] == 5  # the last message
    emulated.call("probe_cluster_exchange", 4, 64, 5, out, sink)
    assert sink[:64].tolist() == [thread + 5.0 for thread in range(64)]
    for by_async in (False, True):
        sink.zero_()
        emulated.call("probe_cluster_gather", by_async, 4, 64, 5, out, sink)
        assert sink[:64].tolist() == [thread + 5.0 for thread in range(64)]
    for by_bulk, run, pad in ((False, 1, 16), (False, 2, 32), (False, 8, 0), (True, 1, 0)):
        sink.zero_()
        emulated.call("probe_cluster_send", by_bulk, run, pad, 4, 64, 5, out, sink)
        assert sink[:64].tolist() == [thread + 5.0 for thread in range(64)]
    words = torch.zeros(8, dtype=torch.int64)
    emulated.call("probe_flag_in_data", 4, 32, 5, out, words, sink)
    assert (words >> 32).tolist() == [4] * 4 + [5] * 4  # the last steps of the two slots
    counter = torch.zeros(1, dtype=torch.int32)
    emulated.call("probe_counter_barrier", 4, 32, 5, out, counter)
    assert counter.item() == 4 * 6  # 4 blocks; 5 steps, and one barrier before timing starts
    ring = torch.tensor([3, 0, 1, 2], dtype=torch.int32)
    emulated.call("probe_l2", ctypes.c_int64(4), 5, out, ring, sink)
    assert sink[0] == 3  # 0 -> 3 -> 2 -> 1 -> 0 -> 3


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_probes_compile(arch: int, tmp_path: Path) -> None:
    command = [
        probes.nvcc() or "", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Werror", "all-warnings",
        str(probes.SOURCE), "-o", str(tmp_path / "probes.cubin"),
    ]  # fmt: skip
    assert subprocess.run(command, check=False).returncode == 0
