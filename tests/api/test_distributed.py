"""Training in two processes on one machine gives the loss of a single process at every step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA GPUs, and NCCL"
)


def run(backend: str, *kinds: str) -> None:
    script = Path(__file__).with_name("distributed_script.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    found = subprocess.run(
        [sys.executable, *launch, str(script), backend, *kinds],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    assert [line.split(":")[0] for line in found.stdout.splitlines()] == list(kinds), found.stdout


@needs_gloo
def test_ddp_and_fsdp_eager_and_compiled():
    run("gloo", "ddp", "fsdp", "ddp+aot_eager", "fsdp+aot_eager")


@pytest.mark.slow
@needs_gloo
def test_ddp_and_fsdp_with_inductor():
    run("gloo", "ddp+inductor", "fsdp+inductor")


@needs_two_gpus
def test_ddp_and_fsdp_with_nccl():
    run("nccl", "ddp", "fsdp", "ddp+aot_eager", "fsdp+aot_eager")
