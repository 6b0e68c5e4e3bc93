"""Type checkers see the types of the installed package, which has a py.typed file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """\
from typing import Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

import fusedrnn

x = torch.zeros(2, 1, 3)
packed = PackedSequence(x)
rnn = fusedrnn.RNN(3, 4, num_layers=2, nonlinearity="relu", dropout=0.1, dtype=torch.float64)
base: nn.RNNBase = rnn
assert_type(rnn.forward(x), Tuple[Tensor, Tensor])
assert_type(rnn.forward(x, x), Tuple[Tensor, Tensor])
assert_type(rnn.forward(packed), Tuple[PackedSequence, Tensor])
assert_type(rnn.forward(packed, hx=x), Tuple[PackedSequence, Tensor])
assert_type(rnn.forward(x, last_only=True), Tuple[Tensor, Tensor])
assert_type(rnn.forward(packed, last_only=True), Tuple[Tensor, Tensor])
assert_type(fusedrnn.RNNCell(3, 4, bias=False).forward(x, None), Tensor)
assert_type(fusedrnn.rnn(x, None, x, alpha=0.5), Tuple[Tensor, Tensor])
assert_type(fusedrnn.recurrence(x, None, x, reset=x), Tuple[Tensor, Tensor])
potential = fusedrnn.rnn(x, None, x, form="potential", return_potential=True)
assert_type(potential, Tuple[Tensor, ...])
assert_type(fusedrnn.trace(rnn, packed, loss=lambda y: y.data.sum())[0], fusedrnn.LayerTrace)
assert_type(fusedrnn.replace(nn.Sequential(nn.RNN(3, 4))), nn.Sequential)
assert_type(fusedrnn.restore(nn.Sequential(nn.RNN(3, 4))), nn.Sequential)
reveal_type(fusedrnn.RNN.__init__)
"""
INIT = (
    "input_size: int",
    "hidden_size: int",
    "num_layers: int",
    "nonlinearity: str",
    "bias: bool",
    "batch_first: bool",
    "dropout: float",
    "bidirectional: bool",
)
WRONG = """\
import fusedrnn
rnn = fusedrnn.RNN(3, 4)
fusedrnn.RNN("3", 4)
fusedrnn.RNN(3)
fusedrnn.RNN(3, 4, proj_size=1)
fusedrnn.RNN(3, 4, layers=2)
rnn.forward("x")
rnn.forward([[0.0]], None)
fusedrnn.RNNCell(3, 4).forward(0)
fusedrnn.rnn(1, 2, 3)
fusedrnn.replace("model")
"""
WRONG_LINES = set(range(3, 12))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    return tmp_path


def pyright(*arguments: str, cwd: Path) -> dict:
    if not os.environ.get("CI"):  # in CI, a missing package is an error
        pytest.importorskip("pyright", reason="pyright is not installed (.ci/requirements.txt)")
        if shutil.which("node") is None:
            pytest.skip("pyright runs on node, and there is none")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    # --verifytypes ignores --pythonpath and takes the first python on PATH
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    return json.loads(run.stdout[run.stdout.index("{") :])


def test_pyright_sees_constructor_and_overloads(files):
    found = pyright("right.py", "wrong.py", cwd=files)["generalDiagnostics"]
    errors = [
        (Path(d["file"]).name, d["range"]["start"]["line"] + 1)
        for d in found
        if d["severity"] == "error"
    ]
    assert set(errors) == {("wrong.py", line) for line in WRONG_LINES}
    (revealed,) = (d["message"] for d in found if d["severity"] == "information")
    assert [parameter for parameter in INIT if parameter not in revealed] == []


def test_pyright_knows_every_type_of_the_public_modules(tmp_path):
    """The commands, a demonstration and the classes of derivatives are not public."""
    report = pyright("--verifytypes", "fusedrnn", "--ignoreexternal", cwd=tmp_path)
    public = re.compile(
        r"fusedrnn\.(modules|functional|onnx|explain|plots|reference|trace|[a-zA-Z]+$)"
    )
    symbols = [
        s
        for s in report["typeCompleteness"]["symbols"]
        if s["isExported"] and public.match(s["name"])
    ]
    assert len(symbols) > 20
    assert [s["name"] for s in symbols if not s["isTypeKnown"] or s["isTypeAmbiguous"]] == []


@pytest.mark.slow
def test_mypy_sees_constructor_and_overloads(files):
    command = [sys.executable, "-m", "mypy", "--strict", "right.py", "wrong.py"]
    run = subprocess.run(command, cwd=files, capture_output=True, text=True)
    errors = set(re.findall(r"^(\w+\.py):(\d+): error", run.stdout, re.M))
    assert errors == {("wrong.py", str(line)) for line in WRONG_LINES}, run.stdout + run.stderr
    (revealed,) = re.findall(r'Revealed type is "(.*)"', run.stdout)
    assert [parameter for parameter in INIT if parameter not in revealed] == []
