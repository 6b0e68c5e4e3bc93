"""Streaming: a sequence processed sample by sample, or in blocks of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from engines import ENGINES
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close

import fusedrnn
from fusedrnn import _C

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


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("batch", [B, None])
@every_depth
@every_module
def test_a_state_shares_no_memory_with_the_previous_one(kind, num_layers, batch, mode):
    module = build(kind, num_layers=num_layers)
    with mode():
        state = module.init_state(batch)
        y, new = module.step(torch.randn(*state.shape[1:-1], I, **WIDE), state)
    assert len({t.untyped_storage().data_ptr() for t in (state, y, new)}) == 3


# ---- the step in the engine


def ops_of(call: Callable[[], Any]) -> Counter[str]:
    """Count the ops of this package that a call consists of."""
    with torch.profiler.profile() as profile:
        call()
    names = (event.name.partition("fusedrnn::") for event in profile.events())
    return Counter(name for _, found, name in names if found)


@every_depth
@every_module
def test_a_step_is_one_op_without_activation_if_no_code_must_see_it(kind, num_layers):
    module, x = build(kind, num_layers=num_layers).float(), torch.randn(1, I)
    state = module.init_state(1)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert ops_of(lambda: module.step(x, state)) == {"step": 1}
            with torch.autocast("cpu", torch.bfloat16):
                assert ops_of(lambda: module.step(x, state))["activation"] >= num_layers


@every_depth
@every_module
def test_a_step_allocates_the_output_and_the_state_only(kind, num_layers):
    module, x = build(kind, num_layers=num_layers), torch.randn(1, I, **WIDE)
    state = module.init_state(1)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        module.step(x, state)
    sizes = {event.name: event.self_cpu_memory_usage for event in profile.events()}
    assert sizes["fusedrnn::step"] == (1 + num_layers) * H * 8


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("size", [1, 3, 17, 33])
@pytest.mark.parametrize("batch", [1, 3, 5, 64])
@pytest.mark.parametrize("kind", [kind for kind in MODULES if kind != "inside"])
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.kind == "cpu"], ids=str, indirect=True)
def test_a_step_has_the_bits_of_a_sequence_of_one_step(kind, batch, size, dtype, engine):
    cls, options = MODULES[kind]
    module = cls(size, size, num_layers=2, **options, dtype=dtype).requires_grad_(False)
    x, state = torch.randn(batch, size, dtype=dtype), torch.randn(2, batch, size, dtype=dtype)
    output, h_n = module(x[None], state)
    y, new = module.step(x, state)
    assert torch.equal(y, output[0])
    assert torch.equal(new, h_n)


@pytest.mark.parametrize("batch", [B, None])
@every_depth
@every_module
def test_the_engine_gives_the_bits_of_the_op_for_each_layer(kind, num_layers, batch):
    """Another engine, or a call that must be seen, uses the op for each layer."""
    module = build(kind, num_layers=num_layers)
    state = torch.randn_like(module.init_state(batch))
    x = torch.randn(*state.shape[1:-1], I, **WIDE)
    with torch.inference_mode():
        found = module.step(x, state)
        _C.allow_shortcuts(False)
        try:
            want = module.step(x, state)
            assert ops_of(lambda: module.step(x, state))["activation"] == num_layers
        finally:
            _C.allow_shortcuts(True)
    assert all(map(torch.equal, found, want))


@every_module
def test_memory_layouts_do_not_affect_steps(kind):
    module, x = build(kind, num_layers=2), torch.randn(I, B, **WIDE).t()
    state = torch.randn(H, 2, B, **WIDE).permute(1, 2, 0)
    with torch.no_grad():
        want = module.step(x.contiguous(), state.contiguous())
        assert_close(module.step(x, state), want)
        assert_close(module.step(x.repeat(1, 2)[:, :I], state.repeat(1, 1, 2)[..., :H]), want)
        for name, weight in list(module.named_parameters()):
            if weight.dim() == 2:
                setattr(module, name, torch.nn.Parameter(weight.t().contiguous().t()))
        assert_close(module.step(x, state), want)
        assert_close(module.step(x[:1].expand(B, I), state), module.step(x[[0, 0, 0]], state))


@every_module
def test_a_step_reads_the_weights_that_the_module_has_now(kind):
    module = build(kind, num_layers=2)
    x, state = torch.randn(B, I, **WIDE), torch.randn(2, B, H, **WIDE)

    def check() -> Tensor:
        with torch.inference_mode():
            (y, new), (output, h_n) = module.step(x, state), module(x[None], state)
        assert_close((y, new), (output[0], h_n))
        return y

    seen = [check()]
    changed = {k: v.detach() * 0.5 for k, v in module.named_parameters()}
    with torch.no_grad():
        result = torch.func.functional_call(module, changed, (x[None], state))
        module.weight_hh_l1.mul_(0.5)
    seen.append(check())
    module.weight_hh_l0 = torch.nn.Parameter(torch.randn(H, H, **WIDE))
    seen.append(check())
    module.load_state_dict({**module.state_dict(), **changed}, assign=True)
    seen.append(check())
    assert_close(seen[-1], result[0][0])
    module.weight_ih_l0.data = torch.randn(H, I, **WIDE)
    seen.append(check())
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    module.parametrizations.weight_hh_l0.original0.data.mul_(0.5)
    seen.append(check())
    torch.nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    del module.weight_hh_l1
    module.weight_hh_l1 = torch.randn(H, H, **WIDE)
    seen.append(check())
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
    module.float()
    module.weight_hh_l1 = module.weight_hh_l1.float()
    x, state = x.float(), state.float()
    check()


class Step(torch.nn.Module):
    """A module whose forward is one step of an RNN."""

    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.rnn.step(x, state)


@every_module
def test_functional_call_of_a_step(kind):
    module, other = build(kind, num_layers=2), build(kind, num_layers=2)
    weights = {f"rnn.{k}": v for k, v in other.state_dict().items()}
    x, state = torch.randn(B, I, **WIDE), module.init_state(B)
    with torch.inference_mode():
        before = module.step(x, state)
        found = torch.func.functional_call(Step(module), weights, (x, state))
        assert_close(found, other.step(x, state), rtol=0, atol=0)
        assert_close(module.step(x, state), before, rtol=0, atol=0)


@every_module
def test_tangents_pass_through_steps_without_gradients(kind):
    module = build(kind, num_layers=2)
    x, state = torch.randn(B, I, **WIDE), torch.randn(2, B, H, **WIDE)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        found = [forward_ad.unpack_dual(t).tangent for t in module.step(dual, state)]
    _, want = torch.func.jvp(lambda x: module.step(x, state), (x,), (torch.ones_like(x),))
    assert_close(tuple(found), want)


def test_alpha_of_a_step_must_be_in_range():
    module = fusedrnn.LeakyRNN(I, H, alpha=0.5)
    module.alpha.fill_(1.5)
    with torch.no_grad(), pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        module.step(X, STATE)


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
