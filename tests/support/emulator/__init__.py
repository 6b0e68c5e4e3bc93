"""Run CUDA kernels, as nvcc compiles them, on the CPU of a machine without a GPU. See README.md."""

from .build import BuildError, build_library, build_program, cuda_home, run_program
from .library import DEVICES, ORDERS, Kernels, Library
from .ptx import UnsupportedError

__all__ = [
    "DEVICES",
    "ORDERS",
    "BuildError",
    "Kernels",
    "Library",
    "UnsupportedError",
    "build_library",
    "build_program",
    "cuda_home",
    "run_program",
]
