"""Ctrl-C during a long call of the CPU engine."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The child interrupts a call that would take many seconds, and then makes a short one.
CHILD = """
import os, signal, sys, threading, time, torch, fusedrnn

torch.set_num_threads(int(sys.argv[2]))
rnn = fusedrnn.RNN(8, 256)
w_ih, w_hh, b_ih, b_hh = (p.detach() for p in rnn.parameters())
short, steps = torch.randn(50, 1, 8), 2_000_000
compiled = torch.compile(rnn, dynamic=True, backend="eager")

def series(size):  # in the memory of one step
    return torch.zeros(1, 1, size).expand(steps, 1, size)

calls = {
    "forward": lambda: rnn(series(8)),
    "compiled": lambda: compiled(series(8)),
    "backward": lambda: torch.ops.fusedrnn.bptt(
        series(256), None, None, None, series(8), w_ih, b_ih, b_hh, None, None, w_hh, None, None,
        None, series(256), None, "tanh", "rate", False, None,
        [False, True, True, True, False, False, True, False, False],
    ),
}
want = rnn(short)[0].detach()
compiled(short)

def interrupt():
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

threading.Timer(0.5, interrupt).start()
try:
    calls[sys.argv[1]]()
except KeyboardInterrupt:
    print(time.monotonic() - sent)
output, _ = rnn(short)
assert torch.equal(output, want)
output.sum().backward()
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", ["forward", "backward", "compiled"])
def test_control_c_ends_a_long_call_soon_and_the_next_call_is_correct(call, threads):
    command = [sys.executable, "-c", CHILD, call, str(threads)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    assert printed, "was not interrupted"
    assert float(printed) < 1
