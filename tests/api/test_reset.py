"""Resets in fusedrnn.RNN: the state at the beginning of each episode, in every layout."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_oracle import assert_matches, data_of, expected, pack, state_for
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

import fusedrnn

T, B, I, H = 6, 3, 4, 5
LENGTHS = [4, 6, 1]  # unsorted
WIDE = {"dtype": torch.float64}


def packed(values: Tensor, enforce_sorted: bool = False) -> PackedSequence:
    return pack(values, LENGTHS, enforce_sorted)


INPUTS: dict[str, Callable[[], Any]] = {
    "batched": lambda: torch.randn(T, B, I, **WIDE),
    "one step": lambda: torch.randn(1, B, I, **WIDE),
    "unbatched": lambda: torch.randn(T, I, **WIDE),
    "packed": lambda: packed(torch.randn(T, B, I, **WIDE)),
    "packed, sorted": lambda: packed(torch.randn(T, B, I, **WIDE), True),
    "packed, equal lengths": lambda: pack_padded_sequence(
        torch.randn(T, B, I, **WIDE), torch.tensor([T] * B)
    ),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "bidirectional": {"bidirectional": True},
    "deep": {"num_layers": 3, "bidirectional": True, "nonlinearity": "relu"},
    "batch_first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False},
}
TARGETS = ["none", "of a unit", "of a layer", "of a row"]


def rnn(**options: Any) -> fusedrnn.RNN:
    return fusedrnn.RNN(I, H, **options, **WIDE)


def resets_for(x: Any) -> Tensor:
    return torch.rand(data_of(x).shape[:-1]) < 0.4


def target_for(kind: str, module: nn.RNNBase, x: Any) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "of a unit":
        return torch.randn(H, **WIDE)
    if kind == "of a layer":
        return torch.randn(len(module._all_weights), H, **WIDE)
    return state_for(module, x, **WIDE)


# ---- results


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_reference(layout, kind, target):
    module, x = rnn(**LAYOUTS[layout]), INPUTS[kind]()
    options = {"reset": resets_for(x), "reset_to": target_for(target, module, x)}
    for hx in (None, state_for(module, x, **WIDE)):
        want = expected(module, x, hx, nonlinearity=module.nonlinearity, **options)
        assert_matches(module, x, module(x, hx, **options), want)


@pytest.mark.parametrize("layers", [1, 2])
def test_episodes_do_not_influence_each_other(layers):
    """In both directions, a sequence with resets is the concatenation of its episodes."""
    module = rnn(num_layers=layers, bidirectional=True)
    x = torch.randn(T, 1, I, **WIDE)
    hx, start = (torch.randn(2 * layers, 1, H, **WIDE) for _ in range(2))
    reset = torch.tensor([False, False, True, True, False, False])[:, None]
    output, h_n = module(x, hx, reset=reset, reset_to=start)
    forward = torch.arange(2 * layers) % 2 == 0  # directions alternate in hx
    episodes = []
    for first, last in ((0, 2), (2, 3), (3, 6)):
        from_hx = forward if first == 0 else ~forward & (last == 6)
        state = torch.where(from_hx[:, None, None], hx, start)
        episodes.append(module(x[first:last], state))
    assert_close(output, torch.cat([episode[0] for episode in episodes]))
    ends = torch.where(forward[:, None, None], episodes[-1][1], episodes[0][1])
    assert_close(h_n, ends)


def test_a_reset_at_the_first_step_replaces_the_state_of_the_call():
    module, x = rnn(), torch.randn(T, B, I, **WIDE)
    hx, reset = torch.randn(1, B, H, **WIDE), torch.zeros(T, B, dtype=torch.bool)
    reset[0, 1] = True
    start = hx.clone()
    start[:, 1] = 0
    assert_close(module(x, hx, reset=reset), module(x, start))


def test_a_mask_without_resets_has_no_effect():
    for options in LAYOUTS.values():
        module, x = rnn(**options), torch.randn(T, B, I, **WIDE)
        results = module(x, reset=torch.zeros(T, B, dtype=torch.bool))
        assert_close(results, module(x))


def test_a_nan_does_not_survive_a_reset():
    module, x = rnn(bidirectional=True), torch.randn(T, B, I, **WIDE)
    x[2] = torch.nan
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[[2, 3]] = True
    output, _ = module(x, reset=reset)
    assert output.isnan().all(-1).all(-1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_resets_may_be_a_packed_sequence(enforce_sorted):
    module, values = rnn(bidirectional=True), torch.randn(T, B, I, **WIDE)
    padded = torch.rand(T, B) < 0.4
    x, reset = packed(values, enforce_sorted), packed(padded, enforce_sorted)
    output, h_n = module(x, reset=reset)
    by_data = module(x, reset=reset.data)
    assert torch.equal(output.data, by_data[0].data)
    assert torch.equal(h_n, by_data[1])
    rows = expected(module, x, reset=reset)
    assert_matches(module, x, (output, h_n), rows)


def test_rows_of_the_target_follow_the_rows_of_the_batch():
    """With enforce_sorted=False, rows are sorted inside a PackedSequence, but not in hx."""
    module, values = rnn(), torch.randn(T, B, I, **WIDE)
    target = torch.randn(1, B, H, **WIDE)
    x = packed(values)
    _, h_n = module(x, reset=torch.ones(len(x.data), dtype=torch.bool), reset_to=target)
    for row, length in enumerate(LENGTHS):
        step = values[length - 1 : length, row : row + 1]
        assert_close(h_n[:, row], module(step, target[:, row : row + 1])[1][:, 0])


# ---- gradients


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed"])
def test_gradients_match_the_reference(kind, target):
    module, x = rnn(num_layers=2, bidirectional=True), INPUTS[kind]()
    hx, reset = state_for(module, x, **WIDE).requires_grad_(), resets_for(x)
    reset_to = target_for(target, module, x)
    leaves = [*module.parameters(), hx]
    if reset_to is not None:
        leaves.append(reset_to.requires_grad_())

    def gradients(parts: list[Tensor], h_n: Tensor) -> tuple[Tensor, ...]:
        loss = sum(part.sin().sum() for part in parts) + h_n.square().sum()
        return torch.autograd.grad(loss, leaves)

    output, h_n = module(x, hx, reset=reset, reset_to=reset_to)
    want = expected(module, x, hx, reset=reset, reset_to=reset_to)
    outputs, states = zip(*want, strict=True)
    assert_close(gradients([data_of(output)], h_n), gradients(outputs, torch.stack(states)))


# ---- errors

X = torch.zeros(T, B, I)
MASK = torch.zeros(T, B, dtype=torch.bool)
PACKED = packed(X)
PACKED_MASK = packed(MASK)
OTHER_ORDER = pack_padded_sequence(MASK, torch.tensor([6, 4, 1]), enforce_sorted=False)
OTHER_LENGTHS = pack_padded_sequence(MASK, torch.tensor([5, 5, 1]), enforce_sorted=False)
ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a list": (X, {"reset": MASK.tolist()}, TypeError, "reset must be a tensor, got list"),
    "a packed mask for a tensor": (
        X, {"reset": PACKED_MASK}, TypeError, "reset must be a tensor, got PackedSequence"),
    "float": (
        X, {"reset": MASK.float()}, RuntimeError, "reset must be torch.bool, got torch.float32"),
    "integer": (
        X, {"reset": MASK.byte()}, RuntimeError, "reset must be torch.bool, got torch.uint8"),
    "batch first": (
        X, {"reset": MASK.mT}, RuntimeError, "reset must have sizes [6, 3], got [3, 6]"),
    "a step too many": (
        X[1:], {"reset": MASK}, RuntimeError, "reset must have sizes [5, 3], got [6, 3]"),
    "one for all rows": (
        X, {"reset": MASK[:, 0]}, RuntimeError, "reset must have sizes [6, 3], got [6]"),
    "of units": (
        X, {"reset": MASK[..., None].expand(T, B, H)}, RuntimeError,
        "reset must have sizes [6, 3], got [6, 3, 5]"),
    "batched for unbatched": (
        X[:, 0], {"reset": MASK}, RuntimeError, "reset must have sizes [6], got [6, 3]"),
    "padded for packed": (
        PACKED, {"reset": MASK}, RuntimeError, "reset must have sizes [11], got [6, 3]"),
    "packed in another order": (
        PACKED, {"reset": OTHER_ORDER}, RuntimeError,
        "reset must be packed like the input, got sorted_indices [0, 1, 2] instead of [1, 0, 2]"),
    "packed with other lengths": (
        PACKED, {"reset": OTHER_LENGTHS}, RuntimeError,
        "reset must be packed like the input, got batch_sizes [3, 2, 2, 2, 2] "
        "instead of [3, 2, 2, 2, 1, 1]"),
    "target alone": (
        X, {"reset_to": X[0, 0]}, ValueError,
        "reset must be a tensor if reset_to is given, got None"),
    "target a number": (
        X, {"reset": MASK, "reset_to": 0.5}, TypeError, "reset_to must be a tensor, got float"),
    "target of another size": (
        X, {"reset": MASK, "reset_to": torch.zeros(H + 1)}, RuntimeError,
        "reset_to must have sizes [5], [2, 5] or [2, 3, 5], got [6]"),
    "target of another number of layers": (
        X, {"reset": MASK, "reset_to": torch.zeros(1, H)}, RuntimeError,
        "reset_to must have sizes [5], [2, 5] or [2, 3, 5], got [1, 5]"),
    "target of another batch": (
        X, {"reset": MASK, "reset_to": torch.zeros(2, B + 1, H)}, RuntimeError,
        "reset_to must have sizes [5], [2, 5] or [2, 3, 5], got [2, 4, 5]"),
    "target of another batch, packed": (
        PACKED, {"reset": PACKED_MASK, "reset_to": torch.zeros(2, B + 1, H)}, RuntimeError,
        "reset_to must have sizes [5], [2, 5] or [2, 3, 5], got [2, 4, 5]"),
    "target of rows, unbatched": (
        X[:, 0], {"reset": MASK[:, 0], "reset_to": torch.zeros(2, 1, H)}, RuntimeError,
        "reset_to must have sizes [5] or [2, 5], got [2, 1, 5]"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    x, arguments, error, message = ERRORS[case]
    with pytest.raises(error) as info:
        fusedrnn.RNN(I, H, bidirectional=True)(x, **arguments)
    assert str(info.value) == f"fusedrnn: {message}"


def test_errors_of_the_input_are_those_of_nn_rnn():
    module = fusedrnn.RNN(I, H)
    with pytest.raises(ValueError, match="RNN: Expected input to be 2D or 3D, got 1D tensor"):
        module(X[0, 0], reset=MASK[0, 0])
    with pytest.raises(RuntimeError, match="input.size.-1. must be equal to input_size"):
        module(X[..., :3], reset=MASK)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        module(X, torch.zeros(2, B, H), reset=MASK)


def test_signature():
    parameters = inspect.signature(fusedrnn.RNN(I, H).forward).parameters
    assert list(parameters)[:4] == ["input", "hx", "reset", "reset_to"]


# ---- other uses


@pytest.mark.parametrize("kind", INPUTS)
def test_compiles_into_one_graph(kind):
    torch._dynamo.reset()
    module, x = rnn(num_layers=2, bidirectional=True), INPUTS[kind]()
    reset, reset_to = resets_for(x), target_for("of a row", module, x)

    def function(x: Any, reset: Tensor, reset_to: Tensor) -> tuple[Tensor, Tensor]:
        output, h_n = module(x, reset=reset, reset_to=reset_to)
        return data_of(output), h_n

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert_close(compiled(x, reset, reset_to), function(x, reset, reset_to))


def test_exports_with_dynamic_batch_and_time():
    module = rnn(num_layers=2, bidirectional=True, batch_first=True)
    x, reset = torch.randn(B, T, I, **WIDE), torch.rand(B, T) < 0.4
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module, (x,), {"reset": reset}, dynamic_shapes={"input": sizes, "reset": sizes}
        )
    x, reset = torch.randn(2, 9, I, **WIDE), torch.rand(2, 9) < 0.4
    assert_close(program.module()(x, reset=reset), module(x, reset=reset))


def test_vmap_over_resets_and_targets():
    module, x = rnn(bidirectional=True), torch.randn(T, B, I, **WIDE)
    resets, targets = torch.rand(4, T, B) < 0.4, torch.randn(4, 2, B, H, **WIDE)

    def run(reset: Tensor, reset_to: Tensor) -> tuple[Tensor, Tensor]:
        return module(x, reset=reset, reset_to=reset_to)

    want = [run(*arguments) for arguments in zip(resets, targets)]
    assert_close(torch.vmap(run)(resets, targets), tuple(map(torch.stack, zip(*want))))


def test_vmap_over_packed_resets():
    module, x = rnn(bidirectional=True), packed(torch.randn(T, B, I, **WIDE))
    resets = torch.rand(4, len(x.data)) < 0.4
    got = torch.vmap(lambda reset: module(x, reset=reset)[0].data)(resets)
    assert_close(got, torch.stack([module(x, reset=reset)[0].data for reset in resets]))


def test_parametrizations_and_functional_call():
    module, x = rnn(), torch.randn(T, B, I, **WIDE)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    options = {"reset": torch.rand(T, B) < 0.4}
    weights = {n: p.detach() * 2 for n, p in module.named_parameters()}
    results = torch.func.functional_call(module, weights, (x,), options)
    module.load_state_dict(weights)
    assert_close(results, module(x, **options))


def test_meta_device():
    module = fusedrnn.RNN(I, H, bidirectional=True, device="meta")
    output, h_n = module(
        X.to("meta"), reset=MASK.to("meta"), reset_to=torch.empty(H, device="meta")
    )
    assert (output.shape, h_n.shape) == ((T, B, 2 * H), (2, B, H))


def test_low_precision_and_autocast():
    for dtype in (torch.bfloat16, torch.float16):
        module = fusedrnn.RNN(I, H, dtype=dtype)
        target = torch.ones(H, dtype=dtype)
        assert module(X.to(dtype), reset=MASK, reset_to=target)[0].dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = fusedrnn.RNN(I, H)(X, reset=MASK, reset_to=torch.ones(H))
    assert output.dtype == torch.bfloat16
