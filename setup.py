"""Build fusedrnn._C.

Install torch first, then run ``pip install --no-build-isolation .`` (or ``-e .``).

Environment variables:
    FUSEDRNN_CUDA         0: no CUDA engine; 1: fail if it cannot be built. Unset: build it if
                          torch has CUDA and a toolkit of the same major version is found.
    CUDA_HOME             The CUDA toolkit. Unset: CUDA_PATH, the toolkit of the nvcc on PATH, or
                          /usr/local/cuda.
    TORCH_CUDA_ARCH_LIST  GPU architectures, e.g. "8.0;9.0". Unset: all from 7.5 on. The build
                          machine needs no GPU.
    FUSEDRNN_CHECK=1      A CUDA kernel traps when one of its waits has taken two seconds, and
                          prints which one.
    DEBUG=1               Disable optimisation and add debug symbols.
    WERROR=1              Treat warnings as errors.
    SANITIZE              Value for -fsanitize=, e.g. ``address,undefined``
                          (tests/cuda/test_sanitizers.py). The CUDA engine is left out.
    MAX_JOBS              Number of compilers that run at the same time. Read by torch. Unset: the
                          number of cores.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup


def find_toolkit() -> Path | None:
    """Find the CUDA toolkit.

    The nvcc on PATH may be a link, or a wrapper script outside the toolkit. Therefore accept only a
    folder that contains the toolkit's files.
    """
    nvcc = shutil.which("nvcc")
    for home in (
        os.getenv("CUDA_HOME"),
        os.getenv("CUDA_PATH"),
        Path(nvcc).resolve().parents[1] if nvcc else None,
        "/usr/local/cuda",
    ):
        files = ("bin/nvcc", "include/cuda_runtime.h")
        if home and all((Path(home) / file).exists() for file in files):
            return Path(home)
    return None


TOOLKIT = find_toolkit()
if TOOLKIT is not None:
    os.environ["CUDA_HOME"] = str(TOOLKIT)  # torch searches fewer places, on import

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "fusedrnn is built against the torch it will run with, and none is installed here: "
        "`pip install torch`, then `pip install --no-build-isolation .`"
    )

try:
    import ninja

    # torch looks for ninja on PATH, which lacks the bin folder of a venv that is not activated
    os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ["PATH"]
except ImportError:
    pass  # the system may have ninja; without it, torch compiles one file at a time

ROOT = Path(__file__).parent
DEBUG = os.getenv("DEBUG") == "1"
SANITIZE = os.getenv("SANITIZE")
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def nvcc_says(*question: str) -> str:
    return subprocess.check_output([f"{TOOLKIT}/bin/nvcc", *question], text=True)


def why_no_cuda() -> str | None:
    """Return why the CUDA engine is not built, or None if it is. Building requires no GPU."""
    wanted = os.getenv("FUSEDRNN_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"FUSEDRNN_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "FUSEDRNN_CUDA was 0"
    if SANITIZE:
        return "SANITIZE was set"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if TOOLKIT is None:
        return "no CUDA toolkit was found (CUDA_HOME, or nvcc on PATH)"
    release = re.search(r"release (\d+)\.(\d+)", nvcc_says("--version"))
    if release and release[1] != torch.version.cuda.split(".")[0]:
        found = f"{release[1]}.{release[2]} in {TOOLKIT}"
        return (
            f"torch {torch.__version__} needs CUDA {torch.version.cuda}, and the toolkit is {found}"
        )
    return None


def default_architectures() -> str:
    known = nvcc_says("--list-gpu-arch").split()
    return ";".join(a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known) + "+PTX"


REASON = why_no_cuda()
if REASON is not None and os.getenv("FUSEDRNN_CUDA") == "1":
    sys.exit(f"FUSEDRNN_CUDA=1, but the CUDA engine cannot be built: {REASON}")
if REASON is None:
    # By default, torch would build for the visible GPU alone, and fail if there is none.
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures()
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    CUDA = f"CUDA {torch.version.cuda}, architectures {architectures.replace(';', ' ')}"
else:
    CUDA = f"not built: {REASON}"


class BuildExtensionAndInfo(BuildExtension):
    """Build the extension, and record the torch version, which the package compares on import."""

    def run(self) -> None:
        super().run()
        package = ROOT / "fusedrnn" if self.inplace else Path(self.build_lib) / "fusedrnn"
        info = f'TORCH_VERSION = "{torch.__version__}"\nCUDA = "{CUDA}"\n'
        (package / "_build_info.py").write_text('"""Written by setup.py."""\n\n' + info)


level = "-O0" if DEBUG else "-O1" if SANITIZE else "-O3"  # -O3 is very slow with a sanitizer
cxx_args = [level, "-g" if DEBUG else "-g1" if SANITIZE else "-g0"]
cxx_args += ["-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
cxx_args += ["-Wno-unused-parameter"]  # torch's headers cause many of these
nvcc_args = [level, "-G" if DEBUG else "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
nvcc_args += ["-Xfatbin=-compress-all"]  # reduces the size to a fifth
if os.getenv("FUSEDRNN_CHECK") == "1":
    nvcc_args += ["-DFUSEDRNN_CHECK=4000000000"]  # GPU cycles; see csrc/cuda/exchange.cuh
link_args = ["-fopenmp"]
if os.getenv("WERROR") == "1":
    cxx_args += ["-Werror"]
    nvcc_args += ["-Werror=all-warnings"]
if SANITIZE:
    cxx_args += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover", "-fno-omit-frame-pointer"]
    link_args += [f"-fsanitize={SANITIZE}"]

patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/plan.cpp"]  # the planner is plain C++
if REASON is None:
    patterns += ["csrc/cuda/recurrence_cuda.cpp", "csrc/cuda/*.cu"]
    cxx_args += ["-DFUSEDRNN_CUDA"]

setup(
    license="BSD-3-Clause",
    packages=["fusedrnn", "fusedrnn.ops", "fusedrnn.unmask"],
    package_data={"fusedrnn": ["py.typed"], "fusedrnn.unmask": ["page.*"]},
    ext_modules=[
        (CppExtension if REASON else CUDAExtension)(
            "fusedrnn._C",
            # relative and sorted, so that the command stays the same and ninja sees no change
            sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)),
            extra_compile_args={"cxx": cxx_args, "nvcc": nvcc_args},
            extra_link_args=link_args,
        )
    ],
    cmdclass={"build_ext": BuildExtensionAndInfo},
)
