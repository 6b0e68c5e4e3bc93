"""Installing and importing the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from paths import ROOT

import fusedrnn


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """Make a fresh checkout, which has Python sources and nothing built."""
    shutil.copytree(
        ROOT / "fusedrnn",
        tmp_path / "fusedrnn",
        ignore=shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__"),
    )
    return tmp_path


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in `cwd`, which takes precedence over the checkout named in .venv's .pth file."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def import_error(cwd: Path) -> str:
    run = python("import fusedrnn", cwd)
    assert run.returncode == 1, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "During handling of" not in run.stderr  # one sentence, not two tracebacks
    return last


def test_unbuilt_checkout_says_what_to_run_and_where(unbuilt: Path) -> None:
    message = import_error(unbuilt)
    assert "fusedrnn is not built" in message
    assert "pip install --no-build-isolation -e ." in message
    assert str(unbuilt) in message


def test_another_torch_says_which_and_what_to_run(unbuilt: Path) -> None:
    (unbuilt / "fusedrnn" / "_build_info.py").write_text('TORCH_VERSION = "1.2.3+old"\n')
    message = import_error(unbuilt)
    assert "built with torch 1.2.3+old" in message
    assert f"this is torch {torch.__version__}" in message
    assert "pip install --no-build-isolation --force-reinstall --no-deps ." in message


def test_setup_without_torch_says_what_to_run() -> None:
    """torch is not installed in pip's isolated build environment."""
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    run = python(code, ROOT)
    assert run.returncode == 1
    assert "pip install --no-build-isolation" in run.stderr
    assert "Traceback" not in run.stderr


def test_version_is_the_same_everywhere() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert fusedrnn.__version__ == version


def test_package_is_typed() -> None:
    assert (Path(fusedrnn.__file__).parent / "py.typed").exists()


def test_every_public_name_exists() -> None:
    assert [name for name in fusedrnn.__all__ if not hasattr(fusedrnn, name)] == []


BUILT = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a copy of the repository without build products."""
    copy = tmp_path / "checkout"
    for name in ("fusedrnn", "csrc", "tests", "bench", "docs", "examples", ".ci", ".github"):
        shutil.copytree(ROOT / name, copy / name, ignore=BUILT)
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml")]
    names = ("setup.py", "MANIFEST.in", "Makefile", "LICENSE", "CITATION.cff", ".clang-format")
    for path in (*files, *(ROOT / name for name in names)):
        shutil.copy(path, copy)
    return copy


def test_sdist_is_the_checkout(checkout: Path) -> None:
    """By default, setuptools would leave out headers and include build products."""
    before = {str(p.relative_to(checkout)) for p in checkout.rglob("*") if p.is_file()}
    (checkout / "fusedrnn" / "_build_info.py").write_text("")  # as in a checkout that is in use
    (checkout / "fusedrnn" / "_C.so").write_text("")
    code = "from setuptools import build_meta; build_meta.build_sdist('out')"
    run = python(code, checkout)
    assert run.returncode == 0, run.stdout + run.stderr
    with tarfile.open(next((checkout / "out").glob("fusedrnn-*.tar.gz"))) as sdist:
        files = {m.name.split("/", 1)[1] for m in sdist.getmembers() if m.isfile()}
    assert before <= files
    assert {f for f in files - before if not f.startswith("fusedrnn.egg-info/")} == {
        "PKG-INFO",
        "setup.cfg",
    }


@pytest.mark.slow
def test_build_gives_a_wheel_that_runs_elsewhere(checkout: Path, tmp_path: Path) -> None:
    """`python -m build` makes an sdist and, from it, a wheel that installs in an empty venv."""
    if not os.environ.get("CI"):
        pytest.importorskip(
            "build.__main__", reason="build is not installed (see .ci/requirements.txt)"
        )

    def succeed(*command: str | Path, cwd: Path = tmp_path) -> str:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    succeed(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, cwd=checkout)
    (wheel,) = tmp_path.glob("fusedrnn-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fusedrnn", f"fusedrnn-{fusedrnn.__version__}.dist-info"}  # no tests, no bench
    sources = [p for p in (ROOT / "fusedrnn").rglob("*.*") if p.suffix not in (".so", ".pyc")]
    assert {str(path.relative_to(ROOT)) for path in sources} <= set(names)
    assert any(re.fullmatch(r"fusedrnn/_C\..*\.so", name) for name in names)

    venv = tmp_path / "venv"
    succeed(sys.executable, "-m", "venv", venv)
    (site,) = venv.glob("lib/python*/site-packages")
    # Add the torch that the wheel was built with. The checkout is not importable: the .pth file
    # that names it has an effect only in its own venv.
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    succeed(venv / "bin" / "pip", "install", "--no-index", "--no-deps", wheel)
    code = """
import torch, fusedrnn
rnn = fusedrnn.RNN(3, 4, num_layers=2)
output, h_n = torch.compile(rnn, backend="eager", fullgraph=True)(torch.randn(5, 2, 3))
output.sum().backward()
print(fusedrnn.__file__, output.shape, all(p.grad is not None for p in rnn.parameters()))
"""
    found = succeed(venv / "bin" / "python", "-c", code)
    assert found.split(maxsplit=1) == [
        str(site / "fusedrnn" / "__init__.py"),
        "torch.Size([5, 2, 4]) True\n",
    ]
    assert "CPU engine    built" in succeed(venv / "bin" / "python", "-m", "fusedrnn", "info")
