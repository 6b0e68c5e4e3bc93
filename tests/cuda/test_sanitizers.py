"""Both engines under sanitizers.

The CPU engine runs under AddressSanitizer and UndefinedBehaviorSanitizer, and the CUDA engine, on
the emulator, under AddressSanitizer and ThreadSanitizer.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import emulator
import pytest
from engines import NVCC_FLAGS, PASSES, REGIMES, TILES, need_nvcc
from paths import ROOT

HERE = Path(__file__).parent
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")
WHAT = "reference or strides or bits or low_precision or first_derivatives or random_arguments"
TESTS = (
    *(f"engine/test_{name}.py" for name in ("recurrence", "gradients", "threads", "numerics")),
    "api/test_arguments.py",
)


# ---- the CPU engine ----


def runtime(name: str) -> str:
    """Return the path of a g++ runtime library, or the bare name if there is none."""
    compiler = os.environ.get("CXX", "g++")
    return subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """Build the package with sanitizers in a separate folder."""
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
def test_the_cpu_engine_accesses_no_memory_out_of_bounds(sanitized):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", f"({WHAT}) and not emulated:"),
            *("-m", "not slow", "--rootdir", ROOT / "tests"),
            *(ROOT / "tests" / name for name in TESTS),
        ],
        cwd=sanitized,
        env={
            **os.environ,
            "PYTHONPATH": str(sanitized),
            # Python leaks memory and is not instrumented, so the runtimes must be preloaded.
            "LD_PRELOAD": ":".join(runtime(name) for name in RUNTIMES),
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [False, True], ids=["on all cores", "on one core"])
def test_the_barrier_orders_memory(tmp_path, pinned):
    if runtime("libtsan.so") == "libtsan.so" or shutil.which("setarch") is None:
        pytest.skip("no ThreadSanitizer, or no setarch")
    source, program = ROOT / "tests" / "engine" / "barrier.cpp", tmp_path / "barrier"
    compiler = os.environ.get("CXX", "g++")
    flags = ("-std=c++17", "-O1", "-fsanitize=thread", "-pthread")
    subprocess.run([compiler, *flags, source, "-o", program], check=True)
    core = str(min(os.sched_getaffinity(0)))
    where = ["taskset", "-c", core] if pinned else []
    result = subprocess.run(
        [*where, "setarch", "-R", program], capture_output=True, text=True, timeout=600
    )
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr[-5000:]


# ---- the CUDA engine ----
#
# sanitized_engine.cpp runs it: planner, launchers, and the kernels as nvcc compiled them.


@functools.cache
def program(sanitizer: str) -> Path:
    """Build the program with all kernels."""
    return build(sanitizer, "engine", sorted((ROOT / "csrc" / "cuda").glob("*.cu")))


def build(
    sanitizer: str | None,
    name: str,
    sources: Sequence[Path],
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
) -> Path:
    need_nvcc()
    if shutil.which("setarch") is None:
        pytest.skip("no setarch")
    version = subprocess.check_output([emulator.build.CXX, "-dumpversion"], text=True)
    if sanitizer == "thread" and int(version.partition(".")[0]) > 12:
        pytest.skip("ThreadSanitizer since gcc 13 has fewer threads than a block")
    return emulator.build_program(
        sources,
        HERE / "sanitized_engine.cpp",
        name=f"{name}-{sanitizer}",
        sanitizer=sanitizer,
        include=include,
        nvcc_flags=(*NVCC_FLAGS, *flags),
        cxx_flags=["-O1"],
        cpp_sources=[ROOT / "csrc" / "cuda" / "plan.cpp"],
    )


def run(path: Path, *problems: str, seed: int = 1, device: str = "tiny") -> Any:
    """Run the program; it prints each problem, so that a sanitizer's report follows its problem."""
    return emulator.run_program(path, device, str(seed), *problems, timeout=1200)


def assert_right(path: Path, *problems: str, **options: Any) -> None:
    result = run(path, *problems, **options)
    text = result.stdout[-2000:] + result.stderr[:5000]
    assert result.returncode == 0, text
    assert result.stdout.count("right\n") == len(problems) > 0, text


def problems(regime: str, ways: Sequence[tuple[int, int]], shapes: Sequence[str]) -> Iterator[str]:
    """Yield each shape for each tile and split, in each pass.

    A shape without an H gets an odd one: in the block regime it just fits into one block, and in
    the cluster and grid regimes it just does not.
    """
    for tile, split in ways:
        held = TILES[tile].held * TILES[tile].chunk * split  # the part of K in registers
        units = min(TILES[tile].block_units // split, held)
        H = {"step": 67, "block": units - 1}.get(regime, units + 1)
        for shape in shapes:
            for which in PASSES:
                yield f"{regime} {which} tile={tile} split={split} H={H} {shape}"


def tile_of(arithmetic: str) -> int:
    return next(i for i, tile in enumerate(TILES) if tile.arithmetic == arithmetic)


EVERY_WAY = [(i, split) for i, tile in enumerate(TILES) for split in tile.splits]
EVERY_NUMBER = [(tile_of(f"fma_{n}"), 1) for n in ("f32", "f64")] + [
    (tile_of(f"mma_{n}"), 1) for n in ("bf16", "f16")
]
EVERY_SHAPE = [
    "T=2 B=2 I=1 H=1 h0",
    "T=3 B=1 I=1",
    "T=4 B=9 I=5 h0 bias reset alpha",
    "T=2 B=10 I=16 h0 bias unfused",
    "T=11 B=2 I=3 h0",  # inputs are prefetched some steps ahead
    "T=11 B=2 I=16 descending",
    "T=11 B=1 I=16 H=16 h0 bias unfused plain",
    "T=11 B=1 I=5 H=16 descending unfused plain",
    "sizes=4,3,3,1 I=3 h0 bias reset alpha apart",
    "sizes=5,5,2,1 I=16 h0 reset descending",
]


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_cuda_kernels_access_no_memory_out_of_bounds(regime):
    ways = EVERY_NUMBER if regime == "step" else EVERY_WAY
    assert_right(program("address"), *problems(regime, ways, EVERY_SHAPE))


# Buffers, and the problem in which each of them is one element too short.
SHORT = "tile=0 split=1 T=3 B=3 I=3 H=7 h0 bias reset alpha"
SHORTENED = {
    **dict.fromkeys(["x", "w_ih", "b_ih", "b_hh", "alpha", "reset"], f"activation {SHORT}"),
    **dict.fromkeys(["w_hh", "first", "last", "out0", "out1"], f"adjoint {SHORT}"),
    **dict.fromkeys(["in0", "in1", "gate"], f"tangent {SHORT}"),
    "offsets": "activation tile=0 split=1 sizes=3,2,1 I=3 H=7",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "name"),
    [
        *((regime, name) for regime in REGIMES for name in SHORTENED),
        *(("grid", "counters"), ("step", "carry")),
    ],
)
def test_an_access_out_of_bounds_is_found(regime, name):
    problem = f"{regime} {SHORTENED.get(name, SHORTENED['alpha'])}"
    result = run(program("address"), f"{problem} short={name}")
    assert "heap-buffer-overflow" in result.stderr, result.stdout + result.stderr
    assert re.search(r"#\d .*csrc/cuda/\w+\.cuh:\d+", result.stderr), result.stderr


# All ways in which threads wait for each other: products without tensor cores, and with tensor
# cores whose warps do or do not share units; batch groups of several blocks; several groups of
# rows; and rows that end early or begin late.
WAITING_WAYS = [
    (tile_of("fma_f32"), 1),
    (tile_of("fma_f64"), 1),
    (tile_of("mma_bf16"), 1),
    (tile_of("mma_bf16"), 8),
    (tile_of("mma_f16"), 2),
    (tile_of("mma_tf32"), 4),
]
WAITING_SHAPES = [
    "T=5 B=1 I=5 H=16 h0 bias unfused plain",
    "T=4 B=9 I=5 h0 bias reset alpha",
    "sizes=11,9,3,1 I=3 h0 bias reset alpha apart",
    "sizes=11,9,3,1 I=16 h0 reset descending",
]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("regime", REGIMES)
def test_cuda_has_no_race(regime, seed):
    ways = EVERY_NUMBER if regime == "step" else WAITING_WAYS
    assert_right(program("thread"), *problems(regime, ways, WAITING_SHAPES), seed=seed)


@pytest.mark.slow
def test_blocks_without_units_have_no_race():
    """Only 13 blocks of a cluster of 16 have units."""
    shape = f"cluster tile={tile_of('mma_bf16')} split=8 H=130 T=3 B=3 I=3 h0"
    assert_right(program("thread"), *(f"{shape} {which}" for which in PASSES), device="h100")


# Synchronisation that can be left out of csrc/cuda: the file, the text to replace, the replacement
# (FORGET: whether to leave it out), and a problem in which leaving it out is a race.
BLOCK = "block tile=0 split=1 T=3 B=2 I=3 H=33 h0"
TENSOR, SPLIT = (
    f"block tile={tile_of('mma_bf16')} split={split} T=3 B=2 I=3 H=33 h0" for split in (1, 2)
)
CLUSTER = "cluster tile=0 split=1 T=3 B=2 I=3 H=67 h0"
PLAIN = "block tile=0 split=1 T=3 B=1 I=3 H=36 h0 unfused plain"
PLAIN_CLUSTER = "cluster tile=0 split=1 T=3 B=1 I=3 H=72 h0 unfused plain"
GRID = "grid tile=0 split=1 T=3 B=2 I=3 H=67 h0"
STEP = "step tile=0 split=1 T=3 B=2 I=3 H=67 h0"
FORGOTTEN = {
    "block-begin": (
        "persistent.cuh",
        "else\n      __syncthreads();",
        "else if (!FORGET)\n      __syncthreads();",
        BLOCK,
    ),
    "block-step": (
        "persistent.cuh",
        "__syncthreads();\n    if (p.regime == Regime::cluster)\n",
        "if (!FORGET) __syncthreads();\n    if (p.regime == Regime::cluster)\n",
        TENSOR,
    ),
    "warps-of-a-unit": (
        "products.cuh",
        'asm volatile("bar.sync',
        'if (!FORGET) asm volatile("bar.sync',
        SPLIT,
    ),
    "cluster-begin": (
        "persistent.cuh",
        "cluster_barrier();\n    else",
        "FORGET ? __syncthreads() : cluster_barrier();\n    else",
        CLUSTER,
    ),
    "cluster-step": (
        "persistent.cuh",
        "if (p.regime == Regime::cluster)\n      wait_for_arrivals",
        "if (p.regime == Regime::cluster && !FORGET)\n      wait_for_arrivals",
        CLUSTER,
    ),
    "plain-step": (
        "plain.cuh",
        "__syncthreads();\n      if (kCluster)\n",
        "if (!FORGET) __syncthreads();\n      if (kCluster)\n",
        PLAIN,
    ),
    "plain-cluster-step": (
        "plain.cuh",
        "if (kCluster)\n        wait_for_arrivals",
        "if (kCluster && !FORGET)\n        wait_for_arrivals",
        PLAIN_CLUSTER,
    ),
    "grid-arrive": (
        "exchange.cuh",
        "const TimeLimit& limit) {\n  __syncthreads();",
        "const TimeLimit& limit) {\n  if (!FORGET) __syncthreads();",
        GRID,
    ),
    "grid-release": (
        "exchange.cuh",
        'asm volatile("red.release.gpu',
        'if (FORGET) asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(arrived));\n'
        'else asm volatile("red.release.gpu',
        GRID,
    ),
    "grid-gathered": (
        "persistent.cuh",
        "copies_done();\n          __syncthreads();",
        "copies_done();\n          if (!FORGET) __syncthreads();",
        GRID,
    ),
    "slab": (
        "step.cuh",
        "__syncthreads();\n    const int64_t next",
        "if (!FORGET) __syncthreads();\n    const int64_t next",
        STEP,
    ),
    "slabs-end": (
        "step.cuh",
        "__syncthreads();  // the product",
        "if (!FORGET) __syncthreads();  // the product",
        STEP,
    ),
    "groups-of-a-sum": (
        "step.cuh",
        "}\n      __syncthreads();",
        "}\n      if (!FORGET) __syncthreads();",
        STEP,
    ),
    # States that another block writes in the same launch.
    "launch": ("step.cuh", "layer.step(s - 1)", "layer.step(FORGET ? s : s - 1)", STEP),
}


# Cases in which leaving a barrier out is no race. The adjoint starts from zeros, which were written
# one barrier earlier. Without inputs, the last slab is not in the memory where sums are added up.
NO_RACE = {
    ("block-begin", "adjoint"),
    ("slabs-end", "adjoint"),
    ("slabs-end", "tangent"),
    ("plain-step", "tangent"),  # for which there is no plain kernel
    ("plain-cluster-step", "tangent"),
}


@functools.cache
def forgetful() -> Path:
    """Build with a copy of csrc in which each entry of FORGOTTEN can be selected at run time."""
    folder = ROOT / "build" / "forgetful"
    copied = {path: path.read_text() for path in (ROOT / "csrc").glob("**/*.*h")}
    for number, (file, text, instead, _) in enumerate(FORGOTTEN.values(), 1):
        path = ROOT / "csrc" / "cuda" / file
        assert copied[path].count(text) == 1, f"{file} no longer has {text!r}, or more than once"
        instead = instead.replace("FORGET", f"(forgotten == {number})")
        copied[path] = copied[path].replace(text, instead)
    with emulator.build.locked(folder / "lock"):  # another worker may be compiling it
        for path, text in copied.items():
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists() or copy.read_text() != text:
                copy.write_text(text)
    return build(
        "thread",
        "forgetful",
        [ROOT / "csrc" / "cuda" / "engine.cu", HERE / "forgotten_barriers.cu"],
        include=[folder / "csrc" / "cuda"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("barrier", "which"),
    sorted({*itertools.product(FORGOTTEN, PASSES)} - NO_RACE),
)
def test_a_forgotten_barrier_is_found(barrier, which):
    number, problem = list(FORGOTTEN).index(barrier) + 1, f"{FORGOTTEN[barrier][-1]} {which}"
    assert_right(forgetful(), f"{problem} forget=0")
    result = run(forgetful(), f"{problem} forget={number}")
    assert "ThreadSanitizer: data race" in result.stderr, result.stdout + result.stderr
    assert re.search(r"csrc/cuda/\w+\.cuh:\d+", result.stderr), result.stderr


# ---- waits with a time limit ----


@functools.cache
def limited() -> Path:
    """Build the program with time limits on waits.

    The emulated clock advances by 64 per read, so a wait ends after three million polls, before the
    emulator reports a livelock.
    """
    return build(
        None,
        "limited",
        [ROOT / "csrc" / "cuda" / "engine.cu", HERE / "forgotten_barriers.cu"],
        include=[ROOT / "csrc" / "cuda"],
        flags=["-DFUSEDRNN_CHECK=200000000"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(("regime", "problem"), {"cluster": CLUSTER, "grid": GRID}.items())
def test_a_check_build_names_a_wait_that_never_ends(regime, problem):
    assert_right(limited(), f"{problem} activation")
    result = run(limited(), f"{problem} activation stuck")
    where = rf"no end of the wait for .*\({regime}\), pass 0, .*: step 0, block \d+ of \d+, thread"
    assert re.search(where, result.stdout), result.stdout + result.stderr
    assert re.search(r"\btrap\b", result.stdout), result.stdout
    assert result.returncode == 1
