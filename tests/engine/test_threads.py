"""The engine's threads divide the work as planned, and results do not depend on their number."""

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


# The first splits the batch, the second the hidden units, and the third both.
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


def test_the_problems_are_split_as_described():
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
def test_any_number_of_threads_gives_the_same_results(case, threads):
    torch.testing.assert_close(run(case, threads), run(case, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_two_runs_give_the_same_bits(case):
    case = case.with_(dtype=torch.float32)
    first = run(case, 2)
    for _ in range(5):
        torch.testing.assert_close(run(case, 2), first, rtol=0, atol=0)


def test_concurrent_calls_do_not_disturb_each_other():
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
    more = count.replace("set_num_threads(1)", "set_num_threads(3); fusedrnn._C.use_cores(3)")
    assert int(subprocess.check_output([sys.executable, "-c", more])) > int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="sets the affinity")
def test_threads_do_not_exceed_the_cores_that_the_process_may_use():
    """A new process, because torch creates its threads once, for the cores at that time."""
    code = textwrap.dedent("""
        import os, time, torch, fusedrnn

        def threads():
            return fusedrnn._C.cpu_threads(), len(os.listdir("/proc/self/task"))

        torch.set_num_threads(1)
        arguments = torch.zeros(40, 64, 20), torch.zeros(200, 20), torch.zeros(200, 200)
        cores = os.sched_getaffinity(0)
        torch.set_num_threads(len(cores) + 2)
        before = threads()[1]
        os.sched_setaffinity(0, {min(cores)})
        time.sleep(0.02)  # until the affinity is read again
        fusedrnn.rnn(*arguments)
        limit, after = threads()
        os.sched_setaffinity(0, cores)
        time.sleep(0.02)
        print(limit, after - before, threads()[0] == len(cores))
    """)
    found = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert found == "1 0 True\n"


def test_neither_torch_s_threads_nor_the_cores_are_exceeded():
    torch.set_num_threads(3)
    _C.use_cores(2)
    assert _C.cpu_threads() == 2
    _C.use_cores(4)
    assert _C.cpu_threads() == 3


NO_QUOTA = 2**31 - 1


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2),
        ("0::/a", {"a/cpu.max": "300000 100000", "cpu.max": "400000 100000"}, 3),
        ("0::/", {"cpu.max": "50000 100000"}, 1),  # half a core
        ("0::/", {"cpu.max": "max 100000"}, NO_QUOTA),
        (
            "3:cpuset:/z\n4:cpu,cpuacct:/a\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            "4:cpuacct,cpu:/docker/of/the/host",  # in a container, whose own group is the mount
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
            2,
        ),
        (
            "4:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            NO_QUOTA,
        ),
        ("3:cpuset:/", {"cpu.max": "100000 100000"}, NO_QUOTA),
        (None, {}, NO_QUOTA),  # not Linux
    ],
)
def test_the_quota_of_a_cgroup_in_whole_cores(tmp_path, groups, files, cores):
    if groups is not None:
        files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
        files["proc/self/cgroup"] = groups
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert _C.cores_in_quota(str(tmp_path)) == cores


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thread_keeps_no_scratch_memory_of_a_huge_call():
    """The matrix is packed into 128 MB, and a second call would reuse what the first one kept.

    The calls run in a new process, because other tests would change its memory.
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
