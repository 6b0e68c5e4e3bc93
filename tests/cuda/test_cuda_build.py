"""The CUDA sources compile for every architecture; no GPU is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import resources
import step_cost
from paths import ROOT, toolkit
from resources import ARCHITECTURES, SOURCES
from torch.utils import cpp_extension

needs_nvcc = pytest.mark.skipif(
    toolkit() is None and os.environ.get("FUSEDRNN_NVCC") != "required", reason="needs nvcc"
)
TENSOR_CORES = ("kernels_bf16.cu", "kernels_f16.cu", "kernels_tf32.cu")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_kernels_compile_without_warnings(source: Path, architecture: str) -> None:
    """Compiled with the flags of torch's own extension builds."""
    _, log = resources.compiled(source, architecture)
    found = resources.usage(log)
    release, expected = resources.read_table()
    if release != resources.release():
        pytest.skip(f"the table is of nvcc {release}, this is {resources.release()}")
    assert found == expected.get((source.name, architecture), {}), (
        "kernels need other resources than tests/cuda/resources.txt says: `make cuda-resources`"
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", [source.name for source in SOURCES])
def test_no_kernel_spills(source: str, architecture: str) -> None:
    _, found = resources.read_table()
    kernels = found.get((source, architecture), {})
    assert not {kernel: words for kernel, words in kernels.items() if "spilled" in words}


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", TENSOR_CORES)
def test_tensor_core_kernels_contain_their_instructions(source: str, architecture: str) -> None:
    if architecture == "75" and source != "kernels_f16.cu":
        pytest.skip("tensor cores of 7.5 know float16 alone")
    disassembler = step_cost.nvdisasm()
    if disassembler is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    cubin, _ = resources.compiled(ROOT / "csrc" / "cuda" / source, architecture)
    code = subprocess.check_output([disassembler, "--print-code", str(cubin)], text=True)
    functions = re.split(r"^\s*\.section\s+\.text\.(\w+)", code, flags=re.MULTILINE)[1:]
    kernels = dict(zip(functions[::2], functions[1::2]))
    names = resources.demangled(kernels)
    clusters = architecture not in ("75", "80", "86", "89")
    multiply = {
        names[k]: body
        for k, body in kernels.items()
        if names[k].startswith(("persistent<", "plain<")) and (clusters or "true>" not in names[k])
    }
    assert len(multiply) == 2 * 3 + 2 * 2 * (1 + clusters)  # tiles, times passes
    assert [name for name, body in multiply.items() if "HMMA" not in body] == []


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("dtype", step_cost.DTYPES)
@pytest.mark.parametrize("shape", step_cost.SHAPES, ids=str)
def test_a_step_costs_what_the_table_says(shape: tuple[int, int, int], dtype: str) -> None:
    if step_cost.nvdisasm() is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    header, *expected = step_cost.TABLE.read_text().split("\n\n")
    if header != step_cost.header().strip():
        pytest.skip(f"this is nvcc {resources.release()}; the table says {header!r}")
    found = step_cost.described(step_cost.cost(dtype, *shape)).strip()
    assert found in [block.strip() for block in expected], (
        "a step costs something else than tests/cuda/step_cost.txt says: `make cuda-step-cost`"
    )


@needs_nvcc
@pytest.mark.parametrize("source", ["csrc/cuda/recurrence_cuda.cpp", "csrc/module.cpp"])
def test_glue_parses_with_the_headers_of_any_torch(source: str) -> None:
    """A torch without CUDA lacks a generated header and the libraries to link."""
    includes = (
        ROOT / "csrc", f"{toolkit()}/include", *cpp_extension.include_paths(),
        sysconfig.get_path("include"),
    )  # fmt: skip
    subprocess.run(
        [
            os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", "-Wall", "-Werror",
            "-DFUSEDRNN_CUDA", "-DTORCH_EXTENSION_NAME=_C", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
            *(f"-isystem{path}" for path in includes), ROOT / source,
        ],
        check=True,
    )  # fmt: skip


def setup_py(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_requesting_a_cuda_engine_that_cannot_be_built_is_an_error() -> None:
    run = setup_py(FUSEDRNN_CUDA="1", SANITIZE="address")
    assert run.returncode == 1
    assert "FUSEDRNN_CUDA=1, but the CUDA engine cannot be built: SANITIZE was set" in run.stderr
    assert "Traceback" not in run.stderr


def test_an_invalid_fusedrnn_cuda_is_an_error() -> None:
    run = setup_py(FUSEDRNN_CUDA="yes")
    assert run.returncode == 1
    assert "FUSEDRNN_CUDA must be 0 or 1, got 'yes'" in run.stderr


@needs_nvcc
@pytest.mark.parametrize(
    ("wanted", "built"),
    [
        ("", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("8.0;9.0 12.0", "8.0;9.0 12.0"),
    ],
)
def test_architectures_that_are_built(wanted: str, built: str) -> None:
    code = (
        "import os, runpy, sys, torch, torch.utils.cpp_extension as cpp;"
        "torch.version.cuda = '13.0';"
        "cpp.CUDAExtension = cpp.CppExtension;"  # CUDAExtension needs torch's CUDA libraries
        "sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py');"
        "print(os.environ['TORCH_CUDA_ARCH_LIST'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": wanted},
    )  # fmt: skip
    assert run.stdout.splitlines()[-1] == built


def test_a_toolkit_of_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    code = (
        "import runpy, sys, torch; torch.version.cuda = '13.0'; sys.argv = ['setup.py', '--name'];"
        "runpy.run_path('setup.py')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_HOME": str(tmp_path), "FUSEDRNN_CUDA": "1"},
    )  # fmt: skip
    assert run.returncode == 1
    assert f"needs CUDA 13.0, and the toolkit is 12.4 in {tmp_path}" in run.stderr
