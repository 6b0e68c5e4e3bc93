"""Long sequences: states recomputed in backward, gradients truncated every k steps."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from module_oracle import data_of, pack, state_for
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import blocks

T, B, I, H = 9, 3, 4, 6
LENGTHS = [4, 9, 1]
WIDE: dict[str, Any] = {"dtype": torch.float64}
MODULES: dict[str, tuple[type, dict[str, Any]]] = {
    "RNN": (fusedrnn.RNN, {}),
    "learned leak": (fusedrnn.LeakyRNN, {"alpha": 0.3, "learn_alpha": True}),
    "potential": (
        fusedrnn.LeakyRNN, {"alpha": 0.3, "form": "potential", "nonlinearity": "softplus"}),
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2, "batch_first": True},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
}
INPUTS = ("padded", "unbatched", "packed", "unsorted", "lengths")
CALLS: dict[str, dict[str, Any]] = {
    "output": {},
    "last_only": {"last_only": True},
    "all layers": {"return_all_layers": True},
}
every_module = pytest.mark.parametrize("kind", MODULES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_input = pytest.mark.parametrize("x", INPUTS)


def build(kind: str, **options: Any) -> Any:
    cls, usual = MODULES[kind]
    return cls(I, H, **usual, **options, **WIDE)


def arguments(module: Any, x: str) -> tuple[Any, dict[str, Any]]:
    """Return an input, and options that fit it: a state, resets and reset targets."""
    shape = (B, T) if module.batch_first and x != "packed" and x != "unsorted" else (T, B)
    values = torch.randn(*shape, I, **WIDE)
    options: dict[str, Any] = {}
    if x == "unbatched":
        values = values[:, 0] if not module.batch_first else values[0]
    elif x in ("packed", "unsorted"):
        values = pack(values, LENGTHS, x == "packed")
    elif x == "lengths":
        options["lengths"] = torch.tensor([4, 9, 0])
    options["hx"] = state_for(module, values, **WIDE).requires_grad_()
    options["reset"] = torch.rand(data_of(values).shape[:-1]) < 0.2
    target = (options["hx"].size(0), H) if x == "unbatched" else options["hx"].shape
    options["reset_to"] = torch.randn(*target, **WIDE).requires_grad_()
    if module.__class__ is fusedrnn.LeakyRNN and module.form == "potential":
        options["return_potential"] = True
    return values, options


def tensors_of(results: Any) -> list[Tensor]:
    flat: list[Tensor] = []
    for result in results:
        flat += [data_of(r) for r in (result if isinstance(result, list) else [result])]
    return flat


def with_gradients(module: Any, x: Any, options: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """Return the results and the gradients of every input and parameter."""
    data = data_of(x).detach().requires_grad_()
    results = tensors_of(module(x._replace(data=data) if data_of(x) is not x else data, **options))
    inputs = [data, options["hx"], options["reset_to"], *module.parameters()]
    loss = sum(
        (r * torch.linspace(1, 2, r.numel(), **WIDE).view_as(r)).sin().sum() for r in results
    )
    return results, torch.autograd.grad(loss, inputs)


# ---- checkpoint_every


@pytest.mark.parametrize("call", CALLS)
@every_input
@every_layout
@every_module
@pytest.mark.slow_emulated
def test_recomputed_states_change_no_result_and_no_gradient(kind, layout, x, call, engine):
    module = build(kind, **LAYOUTS[layout])
    x, options = arguments(module, x)
    options.update(CALLS[call])
    want = with_gradients(module, x, options)
    for module.checkpoint_every in (1, 2, 4, T, 100):
        assert_close(with_gradients(module, x, options), want)


def test_recomputed_states_have_the_same_clipped_gradients():
    module = build("learned leak", num_layers=2, grad_clip=0.01)
    x, options = arguments(module, "packed")
    want = with_gradients(module, x, options)
    module.checkpoint_every = 2
    assert_close(with_gradients(module, x, options), want)


class Calls(TorchDispatchMode):
    """Records the number of steps of each forward recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.fusedrnn.activation.default:
            self.steps.append(args[0].size(0))
        return func(*args, **(kwargs or {}))


def test_every_block_runs_again_in_backward_from_the_last_to_the_first():
    module = fusedrnn.RNN(I, H, 2, checkpoint_every=4)
    with Calls() as forward:
        _, h_n = module(torch.randn(T, B, I), last_only=True)
    with Calls() as backward:
        h_n.sum().backward()
    assert forward.steps == [4, 4, 4, 4, 1, 1]  # two layers in each block
    assert backward.steps == [1, 1, 4, 4, 4, 4]


@pytest.mark.parametrize("steps", [4, 3])
def test_a_sequence_of_one_block_is_not_recomputed(steps):
    module = fusedrnn.RNN(I, H, checkpoint_every=4)
    _, h_n = module(torch.randn(steps, B, I))
    with Calls() as backward:
        h_n.sum().backward()
    assert not backward.steps


MEMORY = """
import re, pathlib, torch, fusedrnn
torch.set_num_threads(1)
def peak():  # not ru_maxrss, which starts at that of the parent process
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024
x = torch.randn(200_000, 1, 1)
rnn = fusedrnn.RNN(1, 64, 2, dropout=0.5)
def grow(steps, gradients=True):
    before = peak()
    with torch.set_grad_enabled(gradients):
        y = rnn(x[:steps], last_only=True)[0].sum()
    if gradients:
        y.backward()
    return peak() - before
grow(5000)
rnn.eval()
grow(5000, False)
print(grow(len(x), False))
rnn.train()
rnn.checkpoint_every = 500
grow(2000)
print(grow(len(x)))
rnn.dropout = 0
print(grow(len(x)))
rnn.checkpoint_every = None
print(grow(len(x)))
"""


def test_memory_grows_by_the_kept_states_and_one_block():
    command = [sys.executable, "-c", MEMORY]
    words = subprocess.run(command, capture_output=True, check=True).stdout
    inference, dropout, gradients, without = map(float, words.split())
    assert max(inference, dropout, gradients) < 8  # MiB
    assert without > 95  # two layers of 49 MiB


def test_derivatives_of_second_order(engine):
    module = build("RNN", num_layers=2, checkpoint_every=2)
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, weights)), (x,))

    weights = [p.detach().requires_grad_() for p in module.parameters()]
    x = torch.randn(5, 2, I, **WIDE, requires_grad=True)
    module.checkpoint_every = None
    want = torch.autograd.functional.hvp(lambda x: run(x, *weights)[0].sin().sum(), x, x.detach())
    module.checkpoint_every = 2
    got = torch.autograd.functional.hvp(lambda x: run(x, *weights)[0].sin().sum(), x, x.detach())
    assert_close(got, want)
    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *weights), fast_mode=True)


def test_second_derivatives_if_the_input_depends_on_a_weight():
    module = build("RNN", checkpoint_every=2)
    v = torch.randn(5, 2, H, **WIDE)

    def derivative() -> Any:
        weight = module.weight_hh_l0
        x = v @ weight[:, :I]
        (first,) = torch.autograd.grad(module(x)[0].sin().sum(), weight, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), weight)

    got = derivative()
    module.checkpoint_every = None
    assert_close(got, derivative())


def test_batches_of_gradients_and_tangents_of_gradients():
    module = build("RNN", checkpoint_every=2)
    x = torch.randn(5, 2, I, **WIDE, requires_grad=True)
    tangent = torch.randn(5, 2, H, **WIDE)

    def derivatives() -> Any:
        y = module(x)[0]
        identity = torch.eye(y.numel(), **WIDE).view(-1, *y.shape)
        (rows,) = torch.autograd.grad(y, x, identity, is_grads_batched=True, retain_graph=True)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(y), tangent)
            (g,) = torch.autograd.grad(y, x, dual)
            return rows, *forward_ad.unpack_dual(g)

    got = derivatives()
    module.checkpoint_every = None
    assert_close(got, derivatives())


def test_tangents_pass_through_a_checkpointed_layer():
    module = build("RNN", checkpoint_every=2)
    x, v = torch.randn(2, 5, 2, I, **WIDE)

    def tangent() -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, v))[0])

    got = tangent()
    module.checkpoint_every = None
    assert_close(tuple(got), tuple(tangent()))


@pytest.mark.parametrize("frozen", [True, False])
def test_under_saved_tensor_hooks_and_in_a_checkpoint(frozen):
    module = build("RNN", num_layers=2, checkpoint_every=2).requires_grad_(not frozen)
    x = torch.randn(5, 2, I, **WIDE, requires_grad=True)
    inputs = [t for t in (x, *module.parameters()) if t.requires_grad]

    def gradients(run: Any) -> Any:
        return torch.autograd.grad(run(module, x)[0].sin().sum(), inputs)

    got = gradients(lambda module, x: checkpoint(module, x, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        saved = module(x)[0].sin().sum()
    module.checkpoint_every = None
    want = gradients(lambda module, x: module(x))
    assert_close(got, want)
    assert_close(torch.autograd.grad(saved, inputs), want)


def test_a_weight_that_was_modified_before_backward_raises():
    module = build("RNN", checkpoint_every=2)
    loss = module(torch.randn(5, 2, I, **WIDE))[0].sum()
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_runs_blocks_under_the_autocast_of_forward(dtype):
    module = fusedrnn.LeakyRNN(I, H, 2, alpha=0.3, checkpoint_every=4)
    x, parameters = torch.randn(T, B, I), list(module.parameters())
    enabled = dtype is torch.bfloat16

    def gradients(other: bool) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled):
            output, h_n = module(x)
        assert output.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16, other):
            return torch.autograd.grad(output.sum() + h_n.sum(), parameters)

    assert_close(gradients(False), gradients(True), rtol=0, atol=0)


def test_blocks_before_the_last_truncation_do_not_run_again():
    module = fusedrnn.RNN(I, H, checkpoint_every=2, truncate=4)
    x = torch.randn(T, B, I, requires_grad=True)
    _, h_n = module(x, last_only=True)
    with Calls() as backward:
        h_n.sum().backward()
    assert backward.steps == [1]
    assert (x.grad[:8] == 0).all()
    assert (x.grad[8] != 0).all()


@pytest.mark.parametrize("create_graph", [False, True])
def test_only_the_state_requires_a_gradient(create_graph):
    module = build("RNN", checkpoint_every=2, truncate=4).requires_grad_(False)
    x, hx = torch.randn(T, B, I, **WIDE), torch.randn(1, B, H, **WIDE, requires_grad=True)

    def gradient() -> Any:
        output, h_n = module(x, hx)
        loss = output.sin().sum() + h_n.sum()
        return torch.autograd.grad(loss, hx, create_graph=create_graph)

    got = gradient()
    module.checkpoint_every = None
    assert_close(got, gradient())


def test_weights_that_were_swapped_for_the_forward_are_used_in_backward():
    module = build("RNN", checkpoint_every=4)
    x = torch.randn(T, B, I, **WIDE)
    others = {n: torch.randn_like(p).requires_grad_() for n, p in module.named_parameters()}

    def gradients() -> Any:
        output, _ = torch.func.functional_call(module, others, (x,))
        return torch.autograd.grad(output.sum(), list(others.values()))

    got = gradients()
    module.checkpoint_every = None
    assert_close(got, gradients())


def test_recomputation_with_a_parametrized_weight_changes_no_gradient():
    module = build("RNN", checkpoint_every=4)
    parametrizations.weight_norm(module, "weight_hh_l0")
    x, options = arguments(module, "padded")
    got = with_gradients(module, x, options)
    module.checkpoint_every = None
    assert_close(got, with_gradients(module, x, options))


@pytest.mark.parametrize("seeded", [False, True])
def test_random_numbers_are_the_same_in_both_runs_of_a_block(seeded):
    module = fusedrnn.LeakyRNN(
        I, H, 2, alpha=0.3, noise=0.5, state_noise=0.5, dropout=0.5, checkpoint_every=4, **WIDE
    )
    x = torch.randn(T, B, I, **WIDE)
    options = {"generator": torch.Generator() if seeded else None}

    def seed() -> None:
        torch.manual_seed(1)
        if seeded:
            options["generator"].manual_seed(2)

    seed()
    output, h_n = module(x, **options)
    loss = output.sin().sum() + h_n.sum()
    seed()
    module.checkpoint_every = None
    outputs, state = [], None
    for block in x.split(4):
        part, state = module(block, state, **options)
        outputs.append(part)
    want = torch.cat(outputs)
    assert_close(output, want)
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(want.sin().sum() + state.sum(), parameters)
    for retain in (True, False):  # a second backward repeats the draws once more
        assert_close(torch.autograd.grad(loss, parameters, retain_graph=retain), wanted)


def test_zoneout_draws_the_same_numbers_in_both_runs():
    module = build("RNN", zoneout=0.5, checkpoint_every=4)
    x = torch.randn(T, B, I, **WIDE)
    torch.manual_seed(1)
    loss = module(x)[0].sin().sum()
    module.checkpoint_every = None
    torch.manual_seed(1)
    outputs, state = [], None
    for block in x.split(4):
        part, state = module(block, state)
        outputs.append(part)
    want = torch.cat(outputs).sin().sum()
    parameters = list(module.parameters())
    torch.manual_seed(3)
    got = torch.autograd.grad(loss, parameters)
    assert_close(got, torch.autograd.grad(want, parameters))


@pytest.mark.parametrize("name", ["recurrent_dropout", "weight_drop"])
def test_masks_of_a_whole_sequence_exclude_blocks_in_training(name):
    module = fusedrnn.RNN(I, H, checkpoint_every=4, **{name: 0.5})
    with pytest.raises(ValueError, match=f"{name} must be 0 in training with checkpoint_every or"):
        module(torch.randn(T, B, I))
    module.eval()(torch.randn(T, B, I))


# ---- truncate


def cut_loop(module: Any, x: Tensor, k: int) -> Any:
    """Run one direction of one layer in chunks: truncated BPTT as users write it."""
    outputs, state = [], None
    for start in range(0, x.size(0), k):
        output, state = module(x[start : start + k], state)
        outputs.append(output)
        state = state.detach()
    return torch.cat(outputs)


@pytest.mark.parametrize("checkpoint_every", [None, 2])
@pytest.mark.parametrize("k", [1, 3, 4, T, 20])
@every_module
@pytest.mark.slow_emulated
def test_truncate_is_a_loop_over_chunks_with_detached_states(kind, k, checkpoint_every, engine):
    module = build(kind, num_layers=2)
    x = torch.randn(T, B, I, **WIDE, requires_grad=True)
    inputs = [x, *module.parameters()]
    whole = module(x)[0]
    want = cut_loop(module, x, k)
    wanted = torch.autograd.grad(want.sin().sum(), inputs)
    module.truncate, module.checkpoint_every = k, checkpoint_every
    got = module(x)[0]
    assert_close(got, whole)
    assert_close(torch.autograd.grad(got.sin().sum(), inputs), wanted)


def test_truncate_counts_each_direction_from_its_own_first_step():
    module = build("RNN", bidirectional=True)
    one = build("RNN")
    x = torch.randn(T, B, I, **WIDE, requires_grad=True)
    with torch.no_grad():
        for name, weight in one.named_parameters():
            weight.copy_(getattr(module, name + "_reverse"))
    want = cut_loop(one, x.flip(0), 4).flip(0)
    module.truncate = 4
    got = module(x)[0][..., H:]
    assert_close(got, want)
    assert_close(torch.autograd.grad(got.sin().sum(), x), torch.autograd.grad(want.sin().sum(), x))


def test_truncate_splits_all_rows_of_a_packed_sequence_at_the_same_steps():
    module = build("RNN", truncate=3)
    x = torch.randn(T, B, I, **WIDE, requires_grad=True)
    got = module(x, lengths=torch.tensor(LENGTHS))[0]
    rows = [module(x[:n, b])[0] for b, n in enumerate(LENGTHS)]
    want = nn.utils.rnn.pad_sequence(rows)
    assert_close(got, want)
    assert_close(torch.autograd.grad(got.sin().sum(), x), torch.autograd.grad(want.sin().sum(), x))


def test_a_row_that_begins_at_a_truncation_keeps_the_gradient_of_its_state():
    module = build("RNN", bidirectional=True, truncate=3)
    x, hx = torch.randn(6, 2, I, **WIDE), torch.randn(2, 2, H, **WIDE, requires_grad=True)

    def gradient() -> Tensor:
        return torch.autograd.grad(module(x, hx, lengths=torch.tensor([6, 3]))[0].sum(), hx)[0]

    cut = gradient()
    module.truncate = None
    assert_close(cut[:, 1], gradient()[:, 1])


def test_tangents_are_truncated_like_gradients():
    module = build("RNN", truncate=4)
    x, v, g = torch.randn(3, T, B, I, **WIDE)
    g = torch.randn(T, B, H, **WIDE)
    _, tangent = torch.func.jvp(lambda x: module(x)[0], (x,), (v,))
    _, vjp = torch.func.vjp(lambda x: module(x)[0], x)
    assert_close((tangent * g).sum(), (vjp(g)[0] * v).sum())


FUNCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "leak of each step": {"alpha": torch.linspace(0.1, 1, T * B, **WIDE).view(T, B)},
    "targets of each step": {
        "alpha": 0.3, "reset": torch.arange(T * B).view(T, B) % 5 == 3,
        "reset_to": torch.linspace(-1, 1, T * B * H, **WIDE).view(T, B, H),
        "state_input": torch.linspace(1, -1, T * B * H, **WIDE).view(T, B, H),
    },
    "targets of rows": {
        "reset": torch.arange(T * B).view(T, B) % 5 == 3,
        "reset_to": torch.linspace(-1, 1, B * H, **WIDE).view(B, H),
    },
    "potential": {"form": "potential", "alpha": 0.3, "return_potential": True},
}  # fmt: skip


@pytest.mark.parametrize("layout", ["padded", "reverse", "lengths"])
@pytest.mark.parametrize("options", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.slow_emulated
def test_functions_truncate_like_a_loop_over_chunks(options, layout, engine):
    x, state = torch.randn(T, B, I, **WIDE), torch.randn(B, H, **WIDE)
    weights = [torch.randn(*s, **WIDE) / 2 for s in ((H, I), (H, H), (H,), (H,))]
    inputs = [t.requires_grad_() for t in (x, *weights, state)]
    options = {n: v.to(x.device) if isinstance(v, Tensor) else v for n, v in options.items()}
    lengths = torch.tensor([T] * B if layout == "padded" else LENGTHS)
    reverse = layout == "reverse"
    if layout != "lengths":
        got = fusedrnn.rnn(*inputs, reverse=reverse, truncate=4, **options)
        lengths = torch.tensor([T] * B)
    else:
        got = fusedrnn.rnn(*inputs, lengths=lengths, truncate=4, **options)
    series, lasts = [], []
    for b, length in enumerate(lengths.tolist()):
        steps = list(range(length))[::-1] if reverse else list(range(length))
        h, outputs = inputs[-1][b : b + 1], []
        for i, t in enumerate(steps):
            step = {
                name: value
                if not isinstance(value, Tensor)
                else value[t : t + 1, b : b + 1]
                if value.shape[:2] == (T, B)
                else value[b : b + 1]
                for name, value in options.items()
            }
            h = h.detach() if i > 0 and i % 4 == 0 else h
            y, h, *v = fusedrnn.rnn(x[t : t + 1, b : b + 1], *weights, h, **step)
            outputs.append(torch.cat([y, *v], -1))
        outputs = outputs[::-1] if reverse else outputs
        series.append(torch.cat(outputs)[:, 0])
        lasts.append(h)
    want = [nn.utils.rnn.pad_sequence(series), torch.cat(lasts)]
    got = [torch.cat([got[0], *got[2:]], -1), got[1]]
    assert_close(got, want)

    def gradients(results: list[Tensor]) -> Any:
        return torch.autograd.grad(sum(r.sin().sum() for r in results), inputs)

    assert_close(gradients(got), gradients(want))


def test_functions_truncate_packed_series_with_a_leak_of_each_row():
    x = pack(torch.randn(T, B, H, **WIDE), LENGTHS, True)
    w_hh = torch.randn(H, H, **WIDE, requires_grad=True)
    alpha = torch.rand(len(x.data), **WIDE)

    def gradient(data: Tensor, h0: Any, w_hh: Tensor, **options: Any) -> Any:
        h, last = fusedrnn.recurrence(data, h0, w_hh, batch_sizes=x.batch_sizes, **options)
        return h, last, *torch.autograd.grad(h.sin().sum() + last.sum(), w_hh)

    got = gradient(x.data, None, w_hh, alpha=alpha, truncate=3)
    want = gradient(x.data, None, w_hh, alpha=alpha.unsqueeze(-1), truncate=3)
    assert_close(got, want)
    assert_close(got[0], gradient(x.data, None, w_hh, alpha=alpha)[0])
    assert not torch.equal(got[2], gradient(x.data, None, w_hh, alpha=alpha)[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate": 0}, "truncate must be at least 1, got 0"),
        ({"truncate": 2.0}, "truncate must be an int or None, got float"),
        ({"truncate": 4, "reset": torch.zeros(T + 1, B, dtype=torch.bool)}, "reset must"),
        ({"truncate": 4, "state_input": torch.zeros(T + 1, B, H)}, "must"),
        ({"truncate": 4, "reset": [True]}, "reset must be a tensor, got list"),
        ({"truncate": 4, "batch_sizes": torch.tensor([2, 1])}, "must"),
    ],
)
def test_functions_check_arguments_with_truncate(options, message):
    w_hh = torch.randn(H, H, requires_grad=True)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"fusedrnn: .*{message}"):
        fusedrnn.recurrence(torch.randn(T, B, H), None, w_hh, **options)


# ---- both

BOTH = pytest.mark.parametrize("option", [{"checkpoint_every": 4}, {"truncate": 4}], ids=str)


@BOTH
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_to_one_graph(option, backend):
    dropout = 0.5 if backend == "aot_eager" else 0.0  # inductor draws other numbers than eager
    module = build("RNN", num_layers=2, dropout=dropout, **option)
    x = torch.randn(T, B, I, **WIDE)
    parameters = list(module.parameters())

    def gradients(run: Any) -> Any:
        torch.manual_seed(1)
        output, h_n = run(x)
        loss = output.sin().sum() + h_n.sum()
        return output, torch.autograd.grad(loss, parameters)

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert_close(gradients(compiled), gradients(module))


@BOTH
def test_packed_input_cannot_be_compiled(option):
    module = fusedrnn.RNN(I, H, **option)
    x = pack(torch.randn(T, B, I), LENGTHS, False)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="must be None for packed or ragged input"):
        torch.compile(module, backend="eager", fullgraph=True)(x)


@BOTH
def test_transforms_of_torch_func(option):
    module = build("RNN", **option)
    x = torch.randn(2, T, B, I, **WIDE)
    want = [torch.autograd.functional.jacobian(lambda x: module(x)[0].sum(), s) for s in x]
    got = torch.vmap(torch.func.grad(lambda x: module(x)[0].sum()))(x)
    assert_close(got, torch.stack(want))


@pytest.mark.parametrize("option", ["checkpoint_every", "truncate"])
def test_export_keeps_time_dynamic(option):
    module = fusedrnn.RNN(I, H, **{option: 4}).eval()
    steps = torch.export.Dim("steps", min=2)
    with torch.set_grad_enabled(option == "checkpoint_every"):  # must be off for truncate
        program = torch.export.export(module, (torch.randn(T, B, I),), dynamic_shapes=({0: steps},))
    x = torch.randn(2 * T, B, I)
    assert_close(program.module()(x), module(x))


def test_without_gradients_only_last_only_runs_in_blocks():
    module = fusedrnn.RNN(I, H, checkpoint_every=4, truncate=3)
    with torch.no_grad(), Calls() as calls:
        module(torch.randn(T, B, I))
    assert calls.steps == [T]
    module.truncate = None
    with torch.no_grad(), Calls() as calls:
        module(torch.randn(T, B, I), last_only=True)
    assert calls.steps == [4, 4, 1]  # so the whole output is never stored


@pytest.mark.parametrize("ragged", [False, True])
@every_layout
@every_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_state_alone_is_computed_in_blocks(
    kind, layout, ragged, dtype, engine, monkeypatch
):
    cls, usual = MODULES[kind]
    module = cls(I, H, dtype=dtype, **usual, **LAYOUTS[layout])
    steps = 157
    x = torch.randn(*((B, steps) if module.batch_first else (steps, B)), I, dtype=dtype)
    options = {"lengths": torch.tensor([40, 157, 110])} if ragged else {}
    want = module(x, last_only=True, **options)
    monkeypatch.setattr(blocks, "_STEPS", 50)
    with torch.inference_mode():
        got = module(x, last_only=True, **options)
    exact = {"rtol": 0, "atol": 0} if engine.kind == "cpu" and kind != "potential" else {}
    assert_close(got, want, **exact)


def test_only_a_long_call_that_needs_no_gradient_and_no_series_runs_in_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_STEPS", 4)

    def steps(module: Any, length: int = T, last_only: bool = True) -> list[int]:
        with Calls() as calls:
            module(torch.randn(length, B, I), last_only=last_only)
        return calls.steps

    frozen = fusedrnn.RNN(I, H).requires_grad_(False)
    assert steps(frozen) == [4, 5]  # a short block would round differently
    assert steps(frozen, 7) == [7]
    assert steps(frozen, last_only=False) == [T]
    noisy = fusedrnn.LeakyRNN(I, H, noise=0.1)
    assert steps(noisy) == [T]
    with torch.no_grad():
        assert steps(noisy) == [T]  # in blocks, layers would draw in another order
        assert steps(noisy.eval()) == [4, 5]
        assert steps(fusedrnn.RNN(I, H, weight_drop=0.5)) == [T]
        assert steps(fusedrnn.RNN(I, H, 2, bidirectional=True)) == [4, 5] * 4


@BOTH
def test_trace_refuses_gradients_of_blocks(option):
    module, x = fusedrnn.RNN(I, H, **option), torch.randn(T, B, I)
    assert fusedrnn.trace(module, x)[0].h.shape == (T, B, H)
    with pytest.raises(ValueError, match="must be None to trace gradients, got 4"):
        fusedrnn.trace(module, x, loss=torch.sum)


@pytest.mark.parametrize("cls", [fusedrnn.RNN, fusedrnn.LeakyRNN])
@pytest.mark.parametrize("name", ["checkpoint_every", "truncate"])
def test_bad_option_values_raise(cls, name):
    for value, error in ((0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=rf"fusedrnn: {name} must be .*, got "):
            cls(I, H, **{name: value})


@pytest.mark.parametrize("cls", [fusedrnn.RNN, fusedrnn.LeakyRNN])
def test_repr_copies_and_modules_from_before_these_options(cls):
    module = cls(I, H, checkpoint_every=4, truncate=8)
    assert "checkpoint_every=4, truncate=8" in repr(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (other.checkpoint_every, other.truncate) == (4, 8)
    del module.__dict__["checkpoint_every"], module.__dict__["truncate"]
    old = pickle.loads(pickle.dumps(module))
    assert old.checkpoint_every is None
    assert "checkpoint_every" not in repr(old)
    old(torch.randn(T, B, I))
    converted = fusedrnn.replace(nn.RNN(I, H))
    converted.truncate = 3
    converted(torch.randn(T, B, I))


def test_restore_refuses_truncated_gradients():
    model = torch.nn.Sequential(fusedrnn.RNN(3, 4), fusedrnn.RNN(4, 4, truncate=5))
    with pytest.raises(ValueError, match="truncate must be None to restore a module, got 5"):
        fusedrnn.restore(model)
    assert type(model[0]) is fusedrnn.RNN
    restored = fusedrnn.restore(fusedrnn.RNN(3, 4, checkpoint_every=5))
    assert type(restored) is torch.nn.RNN
    assert vars(restored).keys() == vars(torch.nn.RNN(3, 4)).keys()
