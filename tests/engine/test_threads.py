"""The engine's threads: how they divide the work, and that the results do not depend on it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from cases import Case

import fusedrnn
from fusedrnn import _C


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The first splits the batch, the second the hidden units, the third both ways at once.
PROBLEMS = [
    Case(T=40, B=64, I=20, H=200),
    Case(T=40, B=1, I=20, H=500),
    Case(T=60, B=8, I=20, H=300),
    Case(T=60, B=1, I=20, H=600, reverse=True, reset=True, alpha=True),
    Case(lengths=(40, 40, 39, 11, 2, 1), I=20, H=600, reverse=True),
    Case(lengths=(60, 9), I=20, H=600, reset=True),
]


def plan(case: Case, threads: int) -> dict:
    return _C.plan_cpu(
        dtype="float64", T=case.T, B=case.B, I=case.I, H=case.H, threads=threads, isa="avx512"
    )


def test_these_problems_are_split_as_meant():
    assert plan(PROBLEMS[0], 2)["batch_groups"] == 2
    assert plan(PROBLEMS[1], 2)["hidden_groups"] == 2
    split = plan(PROBLEMS[2], 4)
    assert split["batch_groups"] == split["hidden_groups"] == 2


def run(case: Case, threads: int) -> list[torch.Tensor]:
    torch.set_num_threads(threads)
    arguments = case.arguments(requires_grad=True)
    h, h_n = fusedrnn.rnn(**arguments, **case.flags())
    return [h, h_n, *torch.autograd.grad(h.sum() + h_n.sum(), list(arguments.values()))]


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
@pytest.mark.parametrize("threads", [2, 3, 4, 7])
def test_any_number_of_threads_gives_the_same(case, threads):
    torch.testing.assert_close(run(case, threads), run(case, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_two_runs_give_the_same_bits(case):
    case = case.with_(dtype=torch.float32)
    first = run(case, 2)
    for _ in range(5):
        torch.testing.assert_close(run(case, 2), first, rtol=0, atol=0)


def test_threads_that_call_at_once_do_not_disturb_each_other():
    case = PROBLEMS[2].with_(T=20)
    arguments, expected = case.arguments(), run(case, 2)[0].detach()
    wrong = []

    def work():
        for _ in range(10):
            h, _ = fusedrnn.rnn(**arguments)
            if not torch.allclose(h, expected, rtol=1e-12, atol=1e-12):
                wrong.append(h)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_set_num_threads_is_obeyed():
    count = (
        "import os, torch, fusedrnn; torch.set_num_threads(1)\n"
        "fusedrnn.rnn(torch.randn(40, 64, 20), torch.randn(200, 20), torch.randn(200, 200) / 20)\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    if sys.platform != "linux":
        pytest.skip("counts threads in /proc")
    alone = count.split("\n")[0] + "\n" + count.split("\n")[2]
    found = [subprocess.check_output([sys.executable, "-c", code]) for code in (alone, count)]
    assert found[0] == found[1]
    more = count.replace("set_num_threads(1)", "set_num_threads(3)")
    assert int(subprocess.check_output([sys.executable, "-c", more])) > int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thread_keeps_no_scratch_memory_of_a_huge_call():
    """The matrix is packed into 128 MB; a second call would reuse what the first one kept.

    In a process of its own, whose memory no other test changes.
    """
    code = textwrap.dedent("""
        import mmap, torch, fusedrnn

        def call(size):
            x, w_ih, w_hh = torch.zeros(25, 1, 1), torch.zeros(size, 1), torch.zeros(size, size)
            fusedrnn.rnn(x, w_ih, w_hh)

        def resident_bytes():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * mmap.PAGESIZE

        torch.set_num_threads(1)
        call(64)
        before = resident_bytes()
        call(5792)
        call(5792)
        print(resident_bytes() - before)
    """)
    assert int(subprocess.check_output([sys.executable, "-c", code])) < 64 << 20
