"""Build and load the CUDA extension with the torch of this Python: ``make cuda-build``.

    python tests/cuda/build_extension.py [all | gpu | check]

    all    for all architectures, with warnings as errors; needs no GPU
    gpu    for the GPU of this machine, or for TORCH_CUDA_ARCH_LIST
    check  like gpu, with a time limit on every wait in a kernel (FUSEDRNN_CHECK of setup.py)

Each is built in a copy of the checkout, build/cuda/<which>, because a build in place may belong to
a different torch. A build of unchanged sources is not repeated.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ROOT / "build" / "cuda"

LOAD = """
import torch, fusedrnn
from fusedrnn import _C, ops
assert _C.has_cuda
for op in ("activation", "tangent", "adjoint"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusedrnn::{op}", "CUDA"), op
fusedrnn.RNN(3, 4)(torch.zeros(2, 1, 3))
print(f"{_C.__file__}: {ops.build_info()['cuda']}; kernels of all ops are registered for CUDA")
"""
CAPABILITY = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"


def digest() -> str:
    """Hash everything that is compiled.

    File times are not used, because copying a checkout may change them.
    """
    found = hashlib.sha256(importlib.metadata.version("torch").encode())
    for path in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def build(which: str) -> None:
    copy = BUILDS / which
    stamp = copy / "built.txt"
    sources = digest()  # before the copy, so that an edit during the build causes another build
    built = stamp.exists() and stamp.read_text() == sources
    stale = () if built else ("csrc", "fusedrnn")
    for name in stale:
        shutil.rmtree(copy / name, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    for name in ("csrc", "fusedrnn"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored, dirs_exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    if built:
        print(f"{copy}: built before")
        return
    started = time.monotonic()
    environment = {**os.environ, "FUSEDRNN_CUDA": "1"}
    if which == "all":
        environment["WERROR"] = "1"
    elif "TORCH_CUDA_ARCH_LIST" not in environment:
        said = subprocess.check_output([sys.executable, "-c", CAPABILITY], text=True)
        environment["TORCH_CUDA_ARCH_LIST"] = said.split()[-1]
    if which == "check":
        environment["FUSEDRNN_CHECK"] = "1"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=copy, env=environment, check=True)
    if which == "all":
        subprocess.run([sys.executable, "-c", LOAD], cwd=copy, check=True)
    stamp.write_text(sources)
    print(f"built in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    build(*sys.argv[1:] or ["all"])
