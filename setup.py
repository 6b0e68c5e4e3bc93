"""Builds fusedrnn._C: ``pip install --no-build-isolation .`` (or ``-e .``), with torch installed.

Environment variables:
    DEBUG=1     No optimisation, debug symbols.
    SANITIZE    Passed to -fsanitize=, e.g. ``address,undefined`` (see tests/test_sanitizers.py).
    MAX_JOBS    Compilers at once (torch's own; default: as many as there are cores).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "fusedrnn is built against the torch it will run with, and none is installed here: "
        "`pip install torch`, then `pip install --no-build-isolation .`"
    )

try:
    import ninja

    # torch looks for the program on PATH, where a venv that is not activated has none
    os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ["PATH"]
except ImportError:
    pass  # there may be a ninja of the system's; without any, torch compiles one file at a time

ROOT = Path(__file__).parent
DEBUG = os.getenv("DEBUG") == "1"
SANITIZE = os.getenv("SANITIZE")


class BuildExtensionAndInfo(BuildExtension):
    """Also records the torch it was built with, which the package compares on import."""

    def run(self) -> None:
        super().run()
        package = ROOT / "fusedrnn" if self.inplace else Path(self.build_lib) / "fusedrnn"
        info = f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n'
        (package / "_build_info.py").write_text(info)


level = "-O0" if DEBUG else "-O1" if SANITIZE else "-O3"  # more takes a sanitizer very long
compile_args = [level, "-g" if DEBUG else "-g1" if SANITIZE else "-g0"]
compile_args += ["-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
compile_args += ["-Wno-unused-parameter"]  # torch's headers have many
link_args = ["-fopenmp"]
if SANITIZE:
    compile_args += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover", "-fno-omit-frame-pointer"]
    link_args += [f"-fsanitize={SANITIZE}"]

# relative and sorted: the same command every time, so that ninja sees no change
PATTERNS = ("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/plan.cpp")  # the CUDA planner is plain C++
sources = sorted(str(p.relative_to(ROOT)) for pattern in PATTERNS for p in ROOT.glob(pattern))

setup(
    packages=["fusedrnn"],
    package_data={"fusedrnn": ["py.typed"]},
    ext_modules=[
        CppExtension(
            "fusedrnn._C",
            sources,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ],
    cmdclass={"build_ext": BuildExtensionAndInfo},
)
