"""Streaming: a sequence processed sample by sample, or in blocks of samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import ENGINES
from torch import Tensor
from torch.testing import assert_close

import fusedrnn

T, B, I, H = 9, 3, 4, 6
WIDE = {"dtype": torch.float64}
MODULES: dict[str, tuple[type, dict[str, Any]]] = {
    "RNN": (fusedrnn.RNN, {}),
    "relu": (fusedrnn.RNN, {"nonlinearity": "relu", "bias": False}),
    "rate": (fusedrnn.LeakyRNN, {"alpha": 0.3}),
    "learned": (fusedrnn.LeakyRNN, {"alpha": 0.3, "learn_alpha": True, "nonlinearity": "elu"}),
    "inside": (fusedrnn.LeakyRNN, {"alpha": torch.full((H,), 0.3), "form": "inside"}),
    "no leak": (fusedrnn.LeakyRNN, {"form": "inside", "nonlinearity": "softplus"}),
    "potential": (
        fusedrnn.LeakyRNN, {"alpha": 0.3, "form": "potential", "nonlinearity": "sigmoid"}),
}  # fmt: skip
every_module = pytest.mark.parametrize("kind", MODULES)
every_depth = pytest.mark.parametrize("num_layers", [1, 3])


def build(kind: str, **options: Any) -> Any:
    cls, usual = MODULES[kind]
    return cls(I, H, **usual, **options, **WIDE)


def stream(module: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for sample in x.unbind(0):
        y, state = module.step(sample, state)
        outputs.append(y)
    return torch.stack(outputs), state


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("batch", [B, 1, None])
@every_depth
@every_module
@pytest.mark.slow_emulated
def test_steps_give_the_results_of_the_sequence(kind, num_layers, batch, mode, engine):
    module = build(kind, num_layers=num_layers)
    rows = () if batch is None else (batch,)
    x = torch.randn(T, *rows, I, **WIDE)
    with mode():
        state = module.init_state(batch)
        assert state.shape == (num_layers, *rows, H)
        assert_close(stream(module, x, state), module(x))
        state = torch.randn_like(state)
        before = state.clone()
        assert_close(stream(module, x, state), module(x, state))
        assert torch.equal(state, before)


@every_module
def test_batch_first_does_not_affect_steps(kind):
    module = build(kind, batch_first=True)
    x = torch.randn(T, B, I, **WIDE)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            output, h_n = module(x.transpose(0, 1))
            assert_close(stream(module, x, module.init_state(B)), (output.transpose(0, 1), h_n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [8, 64, 100])
@pytest.mark.parametrize(("block", "steps"), [(25, 100), (64, 240)])
@pytest.mark.parametrize("kind", [kind for kind in MODULES if kind != "potential"])
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.kind == "cpu"], ids=str, indirect=True)
def test_blocks_have_the_bits_of_the_sequence(kind, block, steps, size, dtype, engine):
    """No GPU: there, the planner may choose a different kernel for a different number of steps."""
    cls, options = MODULES[kind]
    if kind == "inside":
        options = {**options, "alpha": 0.3}
    module = cls(1, size, num_layers=2, **options, dtype=dtype).requires_grad_(False)
    x = torch.randn(steps, 1, 1, dtype=dtype)
    whole, h_n = module(x)
    outputs, state = [], module.init_state(1)
    for part in x.split(block):
        output, state = module(part, state)
        outputs.append(output)
    assert torch.equal(torch.cat(outputs), whole)
    assert torch.equal(state, h_n)


@pytest.mark.parametrize("block", [1, 5, 64])
@every_module
@pytest.mark.slow_emulated
def test_short_blocks_agree_with_the_sequence(kind, block, engine):
    module = build(kind, num_layers=2).requires_grad_(False)
    x, state = torch.randn(130, B, I, **WIDE), module.init_state(B)
    outputs = []
    for part in x.split(block):
        output, state = module(part, state)
        outputs.append(output)
    assert_close((torch.cat(outputs), state), module(x))


@every_module
def test_gradients_pass_through_steps(kind):
    module = build(kind, num_layers=2)
    x = torch.randn(T, B, I, **WIDE, requires_grad=True)
    leaves = [x, *module.parameters()]
    found = torch.autograd.grad(stream(module, x, module.init_state(B))[0].sin().sum(), leaves)
    assert_close(found, torch.autograd.grad(module(x)[0].sin().sum(), leaves))


def test_noise_and_dropout_of_a_step_act_in_training_only():
    noisy = fusedrnn.LeakyRNN(I, H, alpha=0.5, state_noise=0.5)
    dropping = fusedrnn.RNN(I, H, num_layers=2, dropout=0.5)
    x = torch.randn(B, I)
    for module in (noisy, dropping):
        state = module.init_state(B)
        with torch.no_grad():
            assert (module.step(x, state)[0] != module.step(x, state)[0]).any()
            module.eval()
            assert_close(module.step(x, state), module.step(x, state), rtol=0, atol=0)


def test_a_state_shares_no_memory_with_the_previous_one():
    module = fusedrnn.RNN(I, H)
    with torch.inference_mode():
        state = module.init_state(B)
        y, new = module.step(torch.randn(B, I), state)
    assert len({t.untyped_storage().data_ptr() for t in (state, y, new)}) == 3


STATE = torch.zeros(1, B, H)
X = torch.zeros(B, I)
ERRORS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "x 0-D": (X[0, 0], STATE, ValueError, "fusedrnn: x must be [B, I] or [I], got []"),
    "x 3-D": (X[None], STATE, ValueError, "fusedrnn: x must be [B, I] or [I], got [1, 3, 4]"),
    "features": (
        X[:, :2], STATE, RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 4, got 2"),
    "layers": (X, STATE.repeat(2, 1, 1), RuntimeError, "Expected hidden size (1, 3, 6), got "),
    "rows": (X, STATE[:, :2], RuntimeError, "Expected hidden size (1, 3, 6), got [1, 2, 6]"),
    "dtype of x": (X.double(), STATE, ValueError, "RNN input dtype (torch.float64) does not"),
    "dtype of the state": (X, STATE.double(), RuntimeError, "h0 must be "),
    "batched state": (X[0], STATE, RuntimeError, "For unbatched 2-D input, hx should also be 2-D"),
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, mode):
    x, state, error, message = ERRORS[case]
    for cls in (fusedrnn.RNN, fusedrnn.LeakyRNN):
        with mode(), pytest.raises(error) as info:
            cls(I, H).step(x, state)
        assert message in str(info.value)


def test_bidirectional_modules_refuse_to_stream():
    for cls in (fusedrnn.RNN, fusedrnn.LeakyRNN):
        module = cls(I, H, bidirectional=True)
        for call in (lambda m=module: m.init_state(B), lambda m=module: m.step(X, STATE)):
            with torch.no_grad(), pytest.raises(ValueError, match="bidirectional must be False"):
                call()


# ---- other uses


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@every_module
def test_compiles_into_one_graph(kind, mode):
    torch._dynamo.reset()
    module, x = build(kind, num_layers=2), torch.randn(B, I, **WIDE)
    state = module.init_state(B)
    with mode():
        compiled = torch.compile(module.step, backend="aot_eager", fullgraph=True)
        assert_close(compiled(x, state), module.step(x, state))


@every_module
def test_exports(kind):
    class Step(torch.nn.Module):
        def __init__(self, rnn: Any) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return self.rnn.step(x, state)

    module, x = build(kind, num_layers=2), torch.randn(B, I, **WIDE)
    state = module.init_state(B)
    with torch.no_grad():
        program = torch.export.export(Step(module), (x, state))
        assert_close(program.module()(x, state), module.step(x, state))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@every_module
def test_vmap(kind, mode):
    module = build(kind, num_layers=2)
    x, state = torch.randn(5, B, I, **WIDE), torch.randn(5, 2, B, H, **WIDE)
    with mode():
        want = zip(*(module.step(*sample) for sample in zip(x, state)))
        assert_close(torch.vmap(module.step)(x, state), tuple(map(torch.stack, want)))


def test_autocast():
    module = fusedrnn.RNN(I, H)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, state = module.step(X, STATE)
        assert (y.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16)
        assert_close((y, state), (module(X[None], STATE)[1][0], module(X[None], STATE)[1]))


def test_parametrized_weights():
    module = fusedrnn.RNN(I, H)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        assert_close(module.step(X, STATE)[1], module(X[None], STATE)[1])
