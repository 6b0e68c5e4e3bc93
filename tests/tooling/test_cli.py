"""The command line: its output and its error messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fusedrnn
from fusedrnn import __main__ as command_line
from fusedrnn import info, unmask
from fusedrnn.__main__ import main

TINY = ["charlm", "--chars", "300", "--epochs", "1", "--hidden", "8"]


def module(*arguments, stdout=subprocess.PIPE, **environment):
    """Run ``python -m fusedrnn`` in a process of its own, with one thread."""
    root = str(Path(fusedrnn.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "fusedrnn", *arguments],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )


def test_charlm_runs_as_a_module(tmp_path):
    file = tmp_path / "text"
    file.write_text("naïve café, “quoted” – " * 30, encoding="utf-8")
    done = module(*TINY, "--text", str(file), PYTHONIOENCODING="ascii")  # an ASCII terminal
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "The last model continues the text:\n\nna?ve ca" in done.stdout


def test_charlm_has_the_options_of_the_example():
    done = module("charlm", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: charlm.py" in done.stdout
    assert module("charlm", "--epochs", "x").returncode == 2
    done = module("charlm", "--text", "/none")
    assert (done.returncode, done.stderr) == (
        1,
        "charlm: cannot read /none: No such file or directory\n",
    )


def test_charlm_needs_a_clone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "fusedrnn" / "__main__.py"))
    assert main(["charlm", "--epochs", "1"]) == 2
    assert capsys.readouterr() == (
        "",
        "python -m fusedrnn charlm: this example is not part of the installed package: run "
        "`python examples/charlm.py` in a clone of the repository\n",
    )


def test_no_arguments_print_help(capsys):
    assert main([]) == 0
    out, _ = capsys.readouterr()
    assert "charlm" in out
    assert "info" in out


WRONG_TEXTS = {
    "missing": (None, "cannot read {}: No such file or directory"),
    "directory": ("/", "cannot read {}: Is a directory"),
    "empty": (b"", "the text is too short: 0 characters"),
    "short": (b"short", "the text is too short: 5 characters"),
    "not UTF-8": (b"\xff\xfe\x00a" * 999, "{} is not a text file: it is not UTF-8"),
    "binary": (b"\x7fELF\0\1\2" * 999, "{} is not a text file: it holds NUL bytes"),
}


@pytest.mark.parametrize("case", WRONG_TEXTS)
def test_wrong_text_gets_one_sentence(case, tmp_path, capsys):
    content, sentence = WRONG_TEXTS[case]
    file = tmp_path / "text"
    if content == "/":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    assert main(["unmask", "--text", str(file)]) == 2
    out, err = capsys.readouterr()
    assert "epoch" not in out
    assert err.startswith(f"python -m fusedrnn unmask: {sentence.format(file)}")
    assert err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_text(tmp_path, capsys):
    file = tmp_path / "text"
    file.write_text("secret")
    file.chmod(0)
    assert main(["unmask", "--text", str(file)]) == 2
    assert capsys.readouterr().err.endswith(f"cannot read {file}: Permission denied\n")


def test_control_c_ends_cleanly(monkeypatch, capsys):
    def interrupt(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(unmask, "write_page", interrupt)
    assert main(["unmask"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_closed_pipe_ends_the_command_quietly():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = module(*TINY, stdout=pipe)
    assert (done.returncode, done.stderr) == (1, "")


def test_info_says_what_was_built(monkeypatch, capsys):
    ops = ModuleType("fusedrnn.ops")
    ops.build_info = lambda: {
        "torch_built": "2.13.0",
        "compiler": "g++ 12.2.0",
        "isa_compiled": ["baseline", "avx2"],
        "isa_chosen": "avx2",
        "cuda": "not built: no nvcc",
    }
    monkeypatch.setitem(sys.modules, "fusedrnn.ops", ops)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for line in [
        f"torch         {torch.__version__}",
        f"threads       {torch.get_num_threads()} ",
        "built with    torch 2.13.0, compiler g++ 12.2.0",
        "CPU engine    built: kernels for baseline, avx2; this machine runs avx2",
        "CUDA engine   not built: no nvcc",
    ]:
        assert f"\n{line}" in out


def test_info_of_this_build(capsys):
    pytest.importorskip("fusedrnn.ops")
    assert main(["info"]) == 0
    assert "CPU engine    built: kernels for " in capsys.readouterr().out


def test_info_without_the_extension_prints_what_it_can(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fusedrnn.ops", None)
    assert main(["info"]) == 1
    out = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in out
    assert "CPU engine    not loaded: " in out


def test_the_cpu_is_named_on_other_systems_than_linux(monkeypatch):
    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(info.Path, "read_text", missing)
    name, flags = info.cpu()
    assert name
    assert flags == set()


@pytest.mark.parametrize(("count", "cores"), [(6, 6), (None, 1)])
def test_cores_where_a_process_has_no_affinity(count, cores, monkeypatch):
    monkeypatch.delattr(info.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(info.os, "cpu_count", lambda: count)
    assert info.usable_cores() == cores
