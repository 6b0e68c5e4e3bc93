"""Report versions, what was built, and why other parts were not: ``python -m fusedrnn info``."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from . import __version__

# The CPU flags that select the kernels, under their Linux names: x86 first, then Arm.
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "sve", "sve2", "bf16"),
)


def report() -> tuple[list[tuple[str, str]], bool]:
    """Return the lines to print, as (label, text), and whether the extension could be loaded."""
    threads = f"{torch.get_num_threads()} (torch.set_num_threads or OMP_NUM_THREADS changes it)"
    model, flags = cpu()
    lines = [
        ("fusedrnn", f"{__version__} in {Path(__file__).parent}"),
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("torch", str(torch.__version__)),
        ("platform", platform.platform()),
        ("CPU", f"{model}, {usable_cores()} cores to use"),
        ("instructions", " ".join(i for i in INSTRUCTION_SETS if i in flags) or "unknown"),
        ("threads", threads),
    ]
    try:
        from .ops import build_info

        built = build_info()
    except ImportError as error:
        return [*lines, ("CPU engine", f"not loaded: {error}")], False
    kernels = ", ".join(built["isa_compiled"])
    return [
        *lines,
        ("built with", f"torch {built['torch_built']}, compiler {built['compiler']}"),
        ("CPU engine", f"built: kernels for {kernels}; this machine runs {built['isa_chosen']}"),
        ("CUDA engine", str(built["cuda"])),
    ], True


def cpu() -> tuple[str, set[str]]:
    """Return the processor's name and flags.

    Without /proc/cpuinfo, the name comes from Python's ``platform``, and there are no flags.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    flags = found.get("flags") or found.get("Features", "")
    return found.get("model name", platform.machine()), set(flags.split())


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main() -> int:
    """Print the report; return 1 if the extension could not be loaded, otherwise 0."""
    lines, loaded = report()
    for label, text in lines:
        print(f"{label:<13} {text}")
    return 0 if loaded else 1
