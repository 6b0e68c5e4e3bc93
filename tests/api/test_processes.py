"""Worker processes: data loaders, weights in shared memory, modules sent through queues.

A forked process that computes with more than one thread hangs if its parent has already done so.
This is a limitation of the OpenMP runtime, and ``torch.nn.RNN`` has it as well. DataLoader workers
use one thread.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fusedrnn

I, H = 4, 5


class Encoded(Dataset):
    """Sequences, each encoded by a frozen RNN in the process that reads it."""

    def __init__(self) -> None:
        self.rnn = fusedrnn.RNN(I, H, num_layers=2).requires_grad_(False)
        self.x = torch.randn(8, 6, I)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return self.rnn(self.x[i])[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_dataset_may_use_an_rnn_in_worker_processes(context):
    data = Encoded()
    expected = data.rnn(data.x.transpose(0, 1))[0].transpose(0, 1)
    workers: Any = {"num_workers": 1 if context == "spawn" else 2}
    loader = DataLoader(data, batch_size=4, multiprocessing_context=context, **workers)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def descend(rnn: fusedrnn.RNN, x: Tensor, start: Any, lock: Any) -> None:
    """Run one Hogwild step: compute the gradient at the initial weights, update the shared ones."""
    torch.set_num_threads(1)
    rnn(x)[0].sin().sum().backward()
    start.wait()
    with lock, torch.no_grad():
        for weight in rnn.parameters():
            weight -= 0.1 * weight.grad


def test_shared_weights_that_processes_train():
    rnn = fusedrnn.RNN(I, H, dtype=torch.float64)
    xs = torch.randn(2, 6, 3, I, dtype=torch.float64)
    expected = [w.detach().clone() for w in rnn.parameters()]
    for x in xs:
        slopes = torch.autograd.grad(rnn(x)[0].sin().sum(), list(rnn.parameters()))
        expected = [w - 0.1 * slope for w, slope in zip(expected, slopes)]

    context = mp.get_context("spawn")
    start, lock = context.Barrier(2), context.Lock()
    rnn.share_memory()
    processes = [context.Process(target=descend, args=(rnn, x, start, lock)) for x in xs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    torch.testing.assert_close([w.detach() for w in rnn.parameters()], expected)


def answer(asked: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    rnn, x = asked.get()
    with torch.no_grad():
        answers.put(rnn(x)[0])
    asked.get()  # the answer is in this process's memory: stay alive until it is received


def test_a_module_can_be_sent_through_a_queue_to_a_forked_process():
    context = mp.get_context("fork")
    asked, answers = context.Queue(), context.Queue()
    process = context.Process(target=answer, args=(asked, answers))
    process.start()
    rnn, x = fusedrnn.RNN(I, H, bidirectional=True), torch.randn(6, 3, I)
    asked.put((rnn, x))
    found = answers.get(timeout=60)
    asked.put(None)
    process.join(60)
    torch.testing.assert_close(found, rnn(x)[0].detach())
