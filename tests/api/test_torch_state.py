"""Private names of torch: only fusedrnn/torch_state.py uses them, and imports need none."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusedrnn import torch_state

PACKAGE = Path(torch_state.__file__).parent

# Import the package in a fork without some private names of torch, and run every program there.
# torch itself needs the names, so they are put back before the programs run.
SCRIPT = """
import json, os, pkgutil, sys

import torch
import torch.nn.utils._expanded_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

torch.set_num_threads(1)
# Import once what the forks need.
torch.compile(torch.sin, backend="aot_eager")(torch.zeros(1))


def results():
    import fusedrnn

    torch.manual_seed(0)
    rnn, x = fusedrnn.RNN(3, 4), torch.randn(5, 2, 3)
    w_ih, w_hh, b_ih, b_hh = weights = [w.detach() for w in rnn.parameters()]

    def op(batch_sizes=None):
        args = x, w_ih, b_ih, b_hh, None, None, w_hh, None, None, None, batch_sizes
        return torch.ops.fusedrnn.activation(*args, "tanh", "rate", False, None)[0]

    def training():
        rnn(x)[0].sum().backward()
        return [w.grad for w in rnn.parameters()]

    def blocks():
        checkpoints = fusedrnn.RNN(3, 4, checkpoint_every=2, dtype=torch.float64)
        output, h_n = checkpoints(x.double())
        gradients = torch.autograd.grad(output.sum() + h_n.sum(), list(checkpoints.parameters()))
        return [g.round(decimals=9) for g in gradients]  # their sums may have another order

    @torch.no_grad()
    def inference():
        return *rnn(x), fusedrnn.rnn(x, *weights, alpha=torch.full((4,), 0.5))[0]

    def loop():
        output, _ = fusedrnn.rnn(x.to(torch.complex64), *(w + 0j for w in weights))
        return [output.real]

    def transforms():
        def loss(w):
            return fusedrnn.rnn(x, w_ih, w)[0].square().sum()

        return grad(loss)(w_hh), jvp(grad(loss), (w_hh,), (w_hh,))[1], *vmap(rnn, 1)(x[:, :, None])

    @torch.no_grad()
    def autocast():
        with torch.autocast("cpu"):
            return rnn(x)[0], op()

    def tracing():
        return torch.jit.trace(rnn, x, check_trace=False)(x)

    def compiling():
        return torch.compile(rnn, backend="aot_eager", fullgraph=True)(x)

    def fakes():
        nonlocal x, w_ih, b_ih, b_hh, w_hh
        with FakeTensorMode(shape_env=ShapeEnv()):
            x = torch.empty(6, 3)
            w_ih, w_hh, b_ih, b_hh = [torch.empty(w.shape) for w in weights]
            shape = op(torch.empty(3, dtype=torch.int64)).shape
        return [torch.zeros(shape)]

    def per_sample_gradients():
        model = fusedrnn.RNN(3, 4)
        call_for_per_sample_grads(model, batch_first=False)(x)[0].sum().backward()
        return [w.grad_sample for w in model.parameters()]

    found = {}
    for program in (training, blocks, inference, loop, transforms, autocast, tracing, compiling,
                    per_sample_gradients, fakes):
        try:
            found[program.__name__] = [result.tolist() for result in program()]
        except Exception as error:
            found[program.__name__] = str(error)
    return found


class Without:
    def __init__(self, whole, name):
        self.whole, self.name = whole, name

    def __getattr__(self, name):
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.whole, name)


def without(*names):
    undo = []
    for name in names:
        owner, _, name = f"torch.{name}".rpartition(".")
        owner = pkgutil.resolve_name(owner)
        if owner is torch._VF:  # it finds its attributes in owner.vf, which is read-only
            owner, name, value = owner, "vf", Without(owner.vf, name)
            undo.append((owner, name, owner.vf))
            owner.vf = value
        else:
            undo.append((owner, name, getattr(owner, name)))
            delattr(owner, name)
    import fusedrnn

    for change in undo:
        setattr(*change)
    return results()


def in_fork(function, *args):
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            found = function(*args)
        except BaseException as error:
            found = {"import": repr(error)}
        with os.fdopen(write, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found = json.load(pipe)
    os.wait()
    return found


print(json.dumps([in_fork(without, *names) for names in json.loads(sys.argv[1])]))
"""
EXPANDED_WEIGHTS = "nn.utils._expanded_weights"
IMPL = f"{EXPANDED_WEIGHTS}.expanded_weights_impl"
UTILS = f"{EXPANDED_WEIGHTS}.expanded_weights_utils"
CALLS = (
    *("training", "blocks", "inference", "transforms", "autocast", "tracing", "compiling", "fakes"),
    "per_sample_gradients",
)
NO_CALL = (CALLS, "fusedrnn: every call needs torch.{}, which torch ")
NO_TRANSFORM = (("transforms",), "fusedrnn: torch.func needs torch.{}, which torch ")
NO_HELPER = (
    ("per_sample_gradients",),
    "fusedrnn: call_for_per_sample_grads needs torch.{}, which torch ",
)
NO_RULE = (("per_sample_gradients",), "cannot handle function activation.default")
# For each name, the programs that fail without it, and the error. All others give the same results.
ERRORS = {
    "_C._AutoDispatchBelowAutograd": NO_CALL,
    "_functorch.autograd_function.enable_single_level_autograd_function": NO_TRANSFORM,
    "autograd.function._SingleLevelFunction": NO_TRANSFORM,
    "autograd.forward_ad._is_fwd_grad_enabled": NO_TRANSFORM,
    "autograd.forward_ad._set_fwd_grad_enabled": NO_TRANSFORM,
    f"{EXPANDED_WEIGHTS}.ExpandedWeight": NO_RULE,
    f"{IMPL}.implements_per_sample_grads": NO_RULE,
    f"{UTILS}.set_grad_sample_if_exists": NO_HELPER,
    f"{UTILS}.unpack_expanded_weight_or_tensor": NO_HELPER,
}


def run_without(groups: list[list[str]]) -> list[dict[str, Any]]:
    """Return the results of the programs, or their errors, without each group of names."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(groups)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_an_import_needs_no_private_name() -> None:
    (found,) = run_without([torch_state.NAMES])
    assert "import" not in found
    assert found["loop"] == run_without([[]])[0]["loop"]


@pytest.mark.slow  # half a minute
def test_without_a_private_name_results_are_the_same_or_an_error_names_it() -> None:
    wanted, *found = run_without([[], *([name] for name in torch_state.NAMES)])
    assert [name for name, result in wanted.items() if isinstance(result, str)] == []
    for name, results in zip(torch_state.NAMES, found):
        programs, error = ERRORS.get(name, ((), ""))
        for program, result in results.items():
            if program in programs:
                assert error.format(name) in result
            else:
                assert result == wanted[program], (name, program)


def private_names(path: Path) -> Iterator[str]:
    """Yield the names in a file that are private in torch or belong to a private module."""
    tree = ast.parse(path.read_text())
    imported = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            imported |= {alias.asname or alias.name for alias in node.names}
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "torch")
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if name.split(".")[0] in imported:
            yield name


def test_no_other_file_uses_a_private_name() -> None:
    found = {
        (path.name, name)
        for path in PACKAGE.rglob("*.py")
        if path.name != "torch_state.py"
        for name in private_names(path)
        if any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    }
    assert found == set()
