"""The engine under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")
WHAT = "reference or strides or bits or low_precision or first_derivatives"
TESTS = ("recurrence", "gradients", "threads", "numerics")


def runtime(name: str) -> str:
    """Where g++ keeps a runtime library; the name itself if it has none."""
    compiler = os.environ.get("CXX", "g++")
    return subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The package, built with sanitizers, in a folder of its own."""
    if any(runtime(name) == name for name in RUNTIMES):
        pytest.skip("this compiler has no sanitizers")
    base = tmp_path_factory.mktemp("sanitized")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-base", base, "--build-lib", base],
        cwd=ROOT,
        env={**os.environ, "SANITIZE": "address,undefined"},
        check=True,
    )
    return base


@pytest.mark.slow
def test_no_byte_is_read_or_written_astray(sanitized):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", f"({WHAT}) and not emulated"),
            *("-m", "not slow", "--rootdir", ROOT / "tests"),
            *(ROOT / "tests" / f"test_{name}.py" for name in TESTS),
        ],
        cwd=sanitized,
        env={
            **os.environ,
            "PYTHONPATH": str(sanitized),
            # Python itself is not instrumented, so the runtimes must come first; and it leaks.
            "LD_PRELOAD": ":".join(runtime(name) for name in RUNTIMES),
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
