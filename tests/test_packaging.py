"""What a user meets before the first line of their own: installing and importing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fusedrnn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A checkout as git has it: Python sources, nothing built."""
    shutil.copytree(
        ROOT / "fusedrnn",
        tmp_path / "fusedrnn",
        ignore=shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__"),
    )
    return tmp_path


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run with `cwd` before the checkout that .venv's .pth file names."""
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
    """As in a build environment of pip's own, where torch is not installed."""
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


@pytest.mark.slow
def test_wheel_is_complete(unbuilt: Path) -> None:
    """`pip wheel` from bare sources: what `pip install --no-build-isolation .` installs."""
    shutil.copytree(ROOT / "csrc", unbuilt / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, unbuilt)
    pip = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", "out", "."]
    run = subprocess.run(
        [sys.executable, *pip], cwd=unbuilt, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (unbuilt / "out").glob("fusedrnn-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fusedrnn", f"fusedrnn-{fusedrnn.__version__}.dist-info"}  # no tests, no bench
    for needed in ("fusedrnn/py.typed", "fusedrnn/_build_info.py", "fusedrnn/__main__.py"):
        assert needed in names
    assert any(re.fullmatch(r"fusedrnn/_C\..*\.so", name) for name in names)

    installed = unbuilt / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = "import fusedrnn, torch; print(fusedrnn.RNN(3, 4)(torch.zeros(2, 1, 3))[0].shape)"
    run = python(code, installed)
    assert run.stdout.strip() == "torch.Size([2, 1, 4])", run.stderr
