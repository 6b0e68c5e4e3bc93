"""The engines that tests run on: CPU instruction sets, emulated CUDA, CUDA where there is a GPU.

Emulated CUDA (``tests/emulator``) takes CPU tensors: while it is installed, the ops run the CUDA
engine, as nvcc compiled it, in place of the CPU engine.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from fusedrnn import _C

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "emulated"
REGIMES = ("step", "block", "cluster", "grid")  # kRegimeNames of csrc/cuda/plan.h


@dataclass(frozen=True)
class Engine:
    kind: str  # cpu, emulated, cuda
    name: str = ""  # the instruction set, or the device that is pretended
    regime: str | None = None  # None: as the planner chooses

    def __str__(self) -> str:
        return ":".join(part for part in (self.kind, self.name, self.regime) if part)

    @contextmanager
    def installed(self, seed: int = 0) -> Iterator[None]:
        """While this lasts, the ops run on this engine, and new tensors are on its device."""
        if self.kind == "cpu":
            before = _C.build_info()["isa_chosen"]
            if not _C.use_isa(self.name):
                pytest.skip(f"this machine has no {self.name}")
            yield
            _C.use_isa(before)
        elif self.kind == "emulated":
            library = emulated(self.name)
            library.schedule(b"random", seed, 0.05)
            library.use_regime(-1 if self.regime is None else REGIMES.index(self.regime))
            library.install()
            try:
                yield
            finally:
                library.uninstall()
        else:
            _C.use_regime(self.regime)
            torch.set_default_device("cuda")
            try:
                yield
            finally:
                torch.set_default_device(None)
                _C.use_regime(None)


# A forced regime still gives way to another where it cannot run a problem.
EMULATED = [
    Engine("emulated", "h100"),
    Engine("emulated", "tiny", "step"),
    Engine("emulated", "tiny", "block"),
    Engine("emulated", "h100", "cluster"),
    Engine("emulated", "tiny", "grid"),
]
ON_GPU = [Engine("cuda", "gpu", regime) for regime in (None, *REGIMES)]
ENGINES = [
    *(Engine("cpu", name) for name in _C.build_info()["isa_compiled"]),
    *(EMULATED if os.environ.get("FUSEDRNN_EMULATED") else []),  # until the kernels are complete
    *(ON_GPU if torch.cuda.is_available() and "cuda" in _C.build_info() else []),
]


def nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    return Path(found).resolve() if found else None


class Emulated:
    """The CUDA engine on a pretend device: its own copy of the library, which asks only once."""

    def __init__(self, path: Path, device: str) -> None:
        self._library = ctypes.CDLL(str(path))
        if self._library.cudaemu_use_device(device.encode()) != 0:
            raise ValueError(f"the emulator knows no device {device!r}")
        self.install = self._library.fusedrnn_install
        self.uninstall = self._library.fusedrnn_uninstall
        self.use_regime = self._library.fusedrnn_use_regime
        self._library.fusedrnn_runs.restype = ctypes.c_int64
        self._library.cudaemu_schedule.argtypes = [
            ctypes.c_char_p,
            ctypes.c_uint64,
            ctypes.c_double,
        ]

    def schedule(self, order: bytes, seed: int, yield_probability: float) -> None:
        self._library.cudaemu_schedule(order, seed, yield_probability)

    def runs(self) -> dict[str, int]:
        """How often each regime ran so far."""
        return {name: self._library.fusedrnn_runs(i) for i, name in enumerate(REGIMES)}


@functools.cache
def emulated(device: str) -> Emulated:
    """The CUDA engine on a pretend device, built by whichever process comes first."""
    if nvcc() is None:
        if os.environ.get("FUSEDRNN_NVCC") == "required":
            pytest.fail("the emulated CUDA engine was not tested: no nvcc")
        pytest.skip("emulated CUDA needs nvcc")
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = build_emulated()
        copy = BUILD / f"{path.stem}-{device}.so"
        if not copy.exists() or copy.stat().st_mtime < path.stat().st_mtime:
            partial = copy.with_suffix(".partial")
            shutil.copy(path, partial)
            partial.rename(copy)  # a library in use must not change
    return Emulated(copy, device)


def build_emulated() -> Path:
    import emulator

    lib = Path(torch.__file__).parent / "lib"
    return emulator.build_library(
        sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
        name="emulated_engine",
        include=[
            *cpp_extension.include_paths(),
            sysconfig.get_path("include"),
        ],
        cxx_flags=[
            "-std=c++20",
            "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ],
        cpp_sources=[ROOT / "tests" / "emulated_engine.cpp", ROOT / "csrc" / "cuda" / "plan.cpp"],
        link_flags=[f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"],
    )
