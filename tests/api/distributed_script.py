"""Train a model on several processes and on one, and compare the losses of every step.

    torchrun --nproc_per_node 2 tests/api/distributed_script.py gloo ddp fsdp
    torchrun --nproc_per_node 2 tests/api/distributed_script.py nccl ddp+inductor

ddp is DistributedDataParallel, fsdp is fully_shard (FSDP2). A backend after the plus compiles the
model.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedrnn

T, B, I, H, STEPS = 6, 8, 5, 16, 4


class Tagger(nn.Module):
    """Labels each step: a bidirectional RNN of two layers, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = fusedrnn.RNN(I, H, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * H, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def train(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Train, and return the loss before each step on this process's share of the batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def parallel(kind: str, model: Tagger, device: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    fully_shard(model.rnn, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert model.rnn.weight_hh_l0.to_local().size(0) == H // mesh.size()  # each has its shard
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=["gloo", "nccl"])
    parser.add_argument("kinds", nargs="+", metavar="{ddp,fsdp}[+COMPILER]")
    options = parser.parse_args()

    dist.init_process_group(options.backend)
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    device = "cpu"
    if options.backend == "nccl":
        torch.cuda.set_device(rank)
        device = "cuda"

    torch.manual_seed(0)
    alone = Tagger().to(device)
    start = copy.deepcopy(alone)
    x, y = torch.randn(T, B, I, device=device), torch.randint(3, (T, B), device=device)
    expected = train(alone, x, y)
    share = slice(rank * B // size, (rank + 1) * B // size)
    for name in options.kinds:
        kind, _, compiler = name.partition("+")
        model = parallel(kind, copy.deepcopy(start), device)
        if compiler:
            torch.compiler.reset()
            model = torch.compile(model, backend=compiler)
        found = torch.tensor(train(model, x[:, share], y[:, share]), device=device)
        dist.all_reduce(found)
        torch.testing.assert_close((found / size).tolist(), expected, rtol=1e-5, atol=1e-6)
        if rank == 0:
            print(f"{name}: {expected[0]:.3f} ... {expected[-1]:.3f}, as in one process")
    # Skip gloo's destructors, which occasionally abort or hang, with nn.RNN as well.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
