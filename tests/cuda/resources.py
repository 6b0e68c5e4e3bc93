"""Registers, stack and spills of the CUDA kernels as nvcc compiles them for every architecture.

    python tests/cuda/resources.py    compiles everything; writes tests/cuda/resources.txt

The table is in the repository, so that test_cuda_build.py notices changes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))  # as a script

from paths import ROOT, toolkit

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
HEADERS = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")])
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
FLAGS = ("-std=c++17", "-O3", "-lineinfo", *COMMON_NVCC_FLAGS)
CHECKS = ("-Werror=all-warnings", "-Xptxas=-v")
BUILD = ROOT / "build" / "cubins"
TABLE = Path(__file__).with_suffix(".txt")

Usage = dict[str, str]  # by kernel: its resources, in words


@functools.cache
def release() -> str:
    """Return the version of nvcc; versions compile the same kernels differently."""
    said = subprocess.check_output([f"{toolkit()}/bin/nvcc", "--version"], text=True)
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return found[1] if found else "unknown"


def compiled(source: Path, architecture: str) -> tuple[Path, str]:
    """Compile the kernels of a file; return the cubin and the log of ptxas, both cached."""
    digest = hashlib.sha256(repr((release(), FLAGS, CHECKS)).encode())
    for path in (source, *HEADERS):
        digest.update(path.read_bytes())
    stem = f"{source.stem}-sm_{architecture}"
    cubin = BUILD / f"{stem}-{digest.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".log")
    if not (cubin.exists() and log.exists()):
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{stem}-*"):
            old.unlink()
        target = ["-cubin", f"-arch=sm_{architecture}", str(source), "-o", str(cubin)]
        command = [f"{toolkit()}/bin/nvcc", *FLAGS, *CHECKS, *target]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
        log.write_text(run.stdout + run.stderr)
    return cubin, log.read_text()


def demangled(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    said = subprocess.check_output(["c++filt", *names], text=True) if names else ""
    return dict(zip(names, map(short, said.splitlines())))


def short(name: str) -> str:
    """Shorten the output of c++filt to, e.g., `persistent<Fma<float, 2, 1>, adjoint>`."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\((?!fusedrnn::Pass).*\)$", "", name)
    for i, said in enumerate(("activation", "tangent", "adjoint")):  # enum class Pass
        name = name.replace(f"(fusedrnn::Pass){i}", said)
    return name.replace("fusedrnn::cuda::", "").replace("fusedrnn::", "")


def usage(log: str) -> Usage:
    """Parse the log of ptxas for each kernel and each function that a kernel calls."""
    found: Usage = {}
    kernels = set(re.findall(r"Compiling entry function '(\w+)'", log))
    blocks = re.split(r"Function properties for ", log)[1:]
    names = demangled(block.split(None, 1)[0] for block in blocks)
    for block in blocks:
        mangled = block.split(None, 1)[0]
        stack, stores, loads = re.findall(r"(\d+) bytes (?:stack|spill)", block)[:3]
        words = []
        if mangled in kernels:
            registers = re.search(r"Used (\d+) registers", block)
            shared = re.search(r"(\d+) bytes smem", block)
            words.append(f"{registers[1] if registers else '?'} registers")
            if shared:
                words.append(f"{shared[1]} B shared")
        if stack != "0":
            words.append(f"{stack} B stack")
        if (stores, loads) != ("0", "0"):
            words.append(f"{stores} + {loads} B spilled")
        if words:
            found[names[mangled]] = ", ".join(words)
    return found


def table(found: dict[tuple[str, str], Usage]) -> str:
    """Format one line per kernel, or one per group of architectures that need the same."""
    lines = [
        f"# By python tests/cuda/resources.py with nvcc {release()}, {' '.join(FLAGS)}",
    ]
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (source, architecture), kernels in found.items():
        for kernel, words in kernels.items():
            rows.setdefault((source, kernel), {}).setdefault(words, []).append(architecture)
    for source, kernel in sorted(rows):
        for words, architectures in rows[source, kernel].items():
            lines.append(f"{source}\t{kernel}\t{' '.join(architectures)}\t{words}")
    return "\n".join(lines) + "\n"


def read_table() -> tuple[str, dict[tuple[str, str], Usage]]:
    """Return the nvcc release that the table is for, and its entries by source and architecture."""
    head, *lines = TABLE.read_text().splitlines()
    found: dict[tuple[str, str], Usage] = {}
    for line in lines:
        source, kernel, architectures, words = line.split("\t")
        for architecture in architectures.split():
            found.setdefault((source, architecture), {})[kernel] = words
    return re.findall(r"nvcc ([\d.]+)", head)[0], found


def main() -> None:
    pairs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        logs = pool.map(lambda pair: compiled(*pair)[1], pairs)
        found = {
            (source.name, architecture): usage(log)
            for (source, architecture), log in zip(pairs, logs)
        }
    TABLE.write_text(table(found))
    print(f"{TABLE}: {len(found)} of {len(SOURCES)} files and {len(ARCHITECTURES)} architectures")


if __name__ == "__main__":
    sys.exit(main())
