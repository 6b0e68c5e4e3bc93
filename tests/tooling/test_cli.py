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
from fusedrnn import charlm, info
from fusedrnn.__main__ import main, parser

TINY = ["charlm", *("--chars", "300"), *("--epochs", "1"), *("--hidden", "8"), *("--chunk", "8")]


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
    assert "fusedrnn.RNN continues" in done.stdout


def test_charlm_reports(capsys):
    assert main([*TINY, "--dtype", "float64", "--threads", str(torch.get_num_threads())]) == 0
    out, _ = capsys.readouterr()
    assert "300 characters of the Python language reference" in out
    assert out.count("\n  epoch   1 ") == 2
    assert out.count("characters a second") == 5


def test_nothing_asked_prints_help(capsys):
    assert main([]) == 0
    out, _ = capsys.readouterr()
    assert "charlm" in out
    assert "info" in out


def test_help_names_every_setting_and_its_default(capsys):
    with pytest.raises(SystemExit) as left:
        main(["charlm", "--help"])
    assert left.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, default in vars(charlm.Settings()).items():
        assert f"--{name}" in out
        assert default is None or f"(default: {default})" in out


WRONG_OPTIONS = {
    "--epochs 0": "argument --epochs: must be at least 1, not 0",
    "--hidden 0": "argument --hidden: must be at least 1, not 0",
    "--embedding -3": "argument --embedding: must be at least 1, not -3",
    "--batch x": "argument --batch: must be a whole number, not 'x'",
    "--chunk 1.5": "argument --chunk: must be a whole number, not '1.5'",
    "--seed -1": "argument --seed: must be at least 0, not -1",
    "--threads 0": "argument --threads: must be at least 1, not 0",
    "--threads 99999": "argument --threads: must be at most 1024, not 99999",
    "--lr 0": "argument --lr: must be a finite number above 0, not 0",
    "--lr nan": "argument --lr: must be a finite number above 0, not nan",
    "--temperature inf": "argument --temperature: must be a finite number above 0, not inf",
    "--temperature hot": "argument --temperature: must be a number, not 'hot'",
    "--dtype half": "argument --dtype: invalid choice: 'half'",
}


@pytest.mark.parametrize("options", WRONG_OPTIONS)
def test_wrong_option_gets_one_sentence(options, capsys):
    with pytest.raises(SystemExit) as left:
        main(["charlm", *options.split()])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"python -m fusedrnn charlm: {WRONG_OPTIONS[options]}")
    assert err.count("\n") == 1


LEAST = {"sample": 0, "seed": 0} | dict.fromkeys(
    ("chars", "hidden", "embedding", "epochs", "context", "batch", "chunk", "streams", "threads"), 1
)


@pytest.mark.parametrize(("option", "least"), LEAST.items())
def test_the_least_value_of_an_option(option, least):
    assert vars(parser().parse_args(["charlm", f"--{option}", str(least)]))[option] == least
    with pytest.raises(SystemExit):
        parser().parse_args(["charlm", f"--{option}", str(least - 1)])


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
    assert main(["charlm", "--text", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"python -m fusedrnn charlm: {sentence.format(file)}")
    assert err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_text(tmp_path, capsys):
    file = tmp_path / "text"
    file.write_text("secret")
    file.chmod(0)
    assert main(["charlm", "--text", str(file)]) == 2
    assert capsys.readouterr().err.endswith(f"cannot read {file}: Permission denied\n")


def test_control_c_ends_cleanly(monkeypatch, capsys):
    def interrupt(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(charlm, "demonstrate", interrupt)
    assert main(["charlm"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_reader_that_leaves_ends_it_quietly():
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


def test_cpu_elsewhere_than_on_linux(monkeypatch):
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
