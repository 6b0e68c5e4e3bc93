"""The engines that tests run on: CPU instruction sets, emulated CUDA, and CUDA if there is a GPU.

Emulated CUDA (``tests/support/emulator``) takes CPU tensors: while it is installed, the ops run the
CUDA engine, compiled by nvcc, instead of the CPU engine.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import emulator
import pytest
import torch
from paths import ROOT, toolkit
from torch.utils import cpp_extension

from fusedrnn import _C

REGIMES = ("step", "block", "cluster", "grid")  # kRegimeNames of csrc/cuda/plan.h
PASSES = ("activation", "tangent", "adjoint")  # Pass of csrc/recurrence.h


@dataclass(frozen=True)
class Tile:
    """A tile; csrc/cuda/plan.h documents the fields."""

    arithmetic: str  # fma_f32 and so on
    units: int
    rows: int
    number_size: int
    chunk: int
    held: int
    chunk_bytes: int
    block_units: int  # if each warp has its own units

    @property
    def mma(self) -> bool:
        return self.arithmetic.startswith("mma")

    @property
    def splits(self) -> tuple[int, ...]:
        return (1, 2, 4, 8) if self.mma else (1,)

    @property
    def dtype(self) -> str:
        """The dtype of the tile; ``tf32`` means float32 where torch allows TF32."""
        short = {"f32": "float32", "f64": "float64", "bf16": "bfloat16", "f16": "float16"}
        name = self.arithmetic.partition("_")[2]
        return short.get(name, name)


TILES = tuple(Tile(**tile) for tile in _C.cuda_tiles())


@dataclass(frozen=True)
class Run:
    """A pass that the CUDA engine ran, and its plan; csrc/cuda/plan.h documents the fields."""

    which: str
    regime: str
    tile: int
    split: int
    fuse_input: bool
    rows: int
    units: int
    blocks: int
    batch_groups: int
    chunks: int


@dataclass(frozen=True)
class Engine:
    kind: str  # cpu, emulated, cuda
    name: str = ""  # the instruction set, or the pretend device
    # Overrides; None: the planner chooses.
    regime: str | None = None
    tile: int | None = None  # index into kTiles of csrc/cuda/plan.h
    split: int | None = None  # warps that share the K of the same units
    fuse_input: bool | None = None  # whether the input product is part of the step

    def __str__(self) -> str:
        parts = [getattr(self, field.name) for field in fields(self)]
        return ":".join(str(part) for part in parts if part not in (None, ""))

    @contextmanager
    def installed(self, seed: int = 0) -> Iterator[None]:
        """Inside this context, run the ops on this engine and create tensors on its device."""
        if self.kind == "cpu":
            before = _C.build_info()["isa_chosen"]
            if not _C.use_isa(self.name):
                pytest.skip(f"this machine has no {self.name}")
            yield
            _C.use_isa(before)
        elif self.kind == "emulated":
            library = emulated(self.name)
            library.schedule("random", seed, 0.05)
            print(f"{self}: threads in a random order, seed {seed}")  # shown if the test fails
            library.install(self.regime, self.tile, self.split, self.fuse_input)
            try:
                yield
            finally:
                library.uninstall()
        else:
            _C.use_regime(self.regime, self.tile, self.split, self.fuse_input)
            torch.set_default_device("cuda")
            try:
                yield
            finally:
                torch.set_default_device(None)
                _C.use_regime(None)


ARCHITECTURES = {"tiny": 90, "h100": 90, "t4": 75}  # of pretend devices, one build each
# If a forced regime cannot run a problem, the planner still chooses another.
EMULATED = [
    Engine("emulated", "h100"),
    Engine("emulated", "tiny", "step"),
    Engine("emulated", "tiny", "block"),
    Engine("emulated", "h100", "cluster"),
    Engine("emulated", "tiny", "grid"),
]
OLD = Engine("emulated", "t4")  # its tensor cores support only float16
ON_GPU = [Engine("cuda", "gpu", regime) for regime in (None, *REGIMES)]
ENGINES = [
    *(Engine("cpu", name) for name in _C.build_info()["isa_compiled"]),
    *EMULATED,
    OLD,
    *(ON_GPU if torch.cuda.is_available() and _C.has_cuda else []),
]
CPU = [engine for engine in ENGINES if engine.kind == "cpu"]
# For tests with finite differences, which call an engine hundreds of times.
DIFFERENTIATED = [
    Engine("cpu", _C.build_info()["isa_chosen"]),
    Engine("emulated", "h100"),
    Engine("emulated", "tiny", "grid"),
    *(engine for engine in ENGINES if engine.kind == "cuda" and engine.regime is None),
]


class Emulated(emulator.Library):
    """The CUDA engine on one pretend device.

    Each device has its own copy of the library, because the engine queries the device only once.
    """

    def __init__(self, path: Path, device: str) -> None:
        super().__init__(path)
        self.use_device(device)
        self.c.fusedrnn_runs.restype = ctypes.c_int64

    def install(
        self,
        regime: str | None,
        tile: int | None = None,
        split: int | None = None,
        fuse_input: bool | None = None,
    ) -> None:
        place = None if regime is None else REGIMES.index(regime)
        overrides = (place, tile, split, fuse_input)
        self.c.fusedrnn_use_regime(*(-1 if value is None else int(value) for value in overrides))
        self.c.fusedrnn_install()
        _C.allow_shortcuts(False)  # backward and steps must call the ops

    def uninstall(self) -> None:
        self.c.fusedrnn_uninstall()
        _C.allow_shortcuts(True)

    def runs(self) -> dict[str, int]:
        """Return how often each regime has run so far."""
        return {name: self.c.fusedrnn_runs(i) for i, name in enumerate(REGIMES)}

    @contextmanager
    def watched(self) -> Iterator[list[Run]]:
        """Yield a list that, when the context ends, is filled with the runs made inside it."""
        found: list[Run] = []
        self.c.fusedrnn_watch(1)
        try:
            yield found
            values = (ctypes.c_int64 * len(fields(Run)))()
            while self.c.fusedrnn_watched(ctypes.c_int64(len(found)), values):
                which, regime, *numbers = values
                found.append(Run(PASSES[which], REGIMES[regime], *numbers))
        finally:
            self.c.fusedrnn_watch(0)


# The same for every emulated build, so that nvcc compiles a file only once per architecture.
NVCC_FLAGS = ("-Werror=all-warnings", *cpp_extension.COMMON_NVCC_FLAGS)


def need_nvcc() -> None:
    if toolkit() is None:
        if os.environ.get("FUSEDRNN_NVCC") == "required":
            pytest.fail("the emulated CUDA engine was not tested: no nvcc")
        pytest.skip("emulated CUDA needs nvcc")


@functools.cache
def emulated(device: str) -> Emulated:
    """Return the CUDA engine on a pretend device; the first process that needs it builds it."""
    need_nvcc()
    libraries = Path(torch.__file__).parent / "lib"
    csrc = ROOT / "csrc" / "cuda"
    path = emulator.build_library(
        sorted(csrc.glob("*.cu")),
        name=f"fusedrnn-{device}",
        arch=ARCHITECTURES[device],
        nvcc_flags=NVCC_FLAGS,
        cxx_flags=[
            "-std=c++20",
            "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
            *(word for path in cpp_extension.include_paths() for word in ("-isystem", path)),
        ],
        cpp_sources=[Path(__file__).with_name("emulated_engine.cpp"), csrc / "plan.cpp"],
        link_flags=[f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"],
        out_dir=ROOT / "build" / "emulator" / device,
    )
    return Emulated(path, device)
