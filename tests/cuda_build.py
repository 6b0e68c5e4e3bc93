"""Builds, links and loads the whole CUDA extension, which needs no GPU: ``make cuda-build``.

Run by a Python whose torch has CUDA, in a copy of the checkout (build/cuda-build), since what is
built in place here belongs to another torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "cuda-build"

CHECK = """
import torch, fusedrnn
from fusedrnn import _C, _ops
assert _C.has_cuda
for op in ("activation", "tangent", "adjoint"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusedrnn::{op}", "CUDA"), op
fusedrnn.RNN(3, 4)(torch.zeros(2, 1, 3))
print(f"{_C.__file__}: {_ops.build_info()['cuda']}; kernels of all ops are registered for CUDA")
"""


def copy_checkout() -> None:
    """Times stay as they are, so that a second build finds what has not changed."""
    built = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    for name in ("csrc", "fusedrnn"):
        shutil.rmtree(COPY / name, ignore_errors=True)
        shutil.copytree(ROOT / name, COPY / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, COPY / name)


def main() -> None:
    COPY.mkdir(parents=True, exist_ok=True)
    copy_checkout()
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=COPY,
        env={**os.environ, "FUSEDRNN_CUDA": "1", "WERROR": "1"},
        check=True,
    )
    print(f"built in {time.monotonic() - started:.0f} s")
    subprocess.run([sys.executable, "-c", CHECK], cwd=COPY, check=True)


if __name__ == "__main__":
    main()
