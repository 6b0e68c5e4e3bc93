"""Ragged batches: padded with lengths, and jagged nested tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from module_oracle import expected, state_for
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn import reference

T, B, I, H = 7, 5, 4, 6
LENGTHS = [3, 6, 1, 6, 4]  # unsorted, with a tie, and none of T steps
WIDE = {"dtype": torch.float64}
MODULES: dict[str, tuple[type, dict[str, Any]]] = {
    "RNN": (fusedrnn.RNN, {"nonlinearity": "relu"}),
    "LeakyRNN": (fusedrnn.LeakyRNN, {"alpha": 0.3, "form": "inside"}),
    "potential": (
        fusedrnn.LeakyRNN, {"alpha": 0.3, "form": "potential", "nonlinearity": "softplus"}),
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "bidirectional": {"bidirectional": True},
    "deep": {"num_layers": 3, "bidirectional": True},
    "batch_first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
every_module = pytest.mark.parametrize("kind", MODULES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def build(kind: str, **options: Any) -> Any:
    cls, usual = MODULES[kind]
    return cls(I, H, **usual, **options, **WIDE)


def padded(module: Any, width: int = I, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """Return a random input in the layout of the module, with NaN in the padding."""
    x = torch.randn(T, len(lengths), width, **WIDE)
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    return x.transpose(0, 1).contiguous() if module.batch_first else x


def jagged(lengths: Sequence[int] = LENGTHS) -> Any:
    parts = [torch.randn(length, I, **WIDE) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def like(x: Any, values: Callable[..., Tensor]) -> Any:
    """Return a series for the jagged ``x``, from a function of the number of rows."""
    rows = values(x.values().size(0))
    return torch.nested.nested_tensor_from_jagged(rows, x.offsets(), x.lengths())


def oracle(module: Any, kind: str, x: Any, hx: Any = None, **options: Any) -> list[list[Tensor]]:
    options["nonlinearity"] = module.nonlinearity
    if kind != "RNN":
        options["form"] = module.form
        if "alpha" not in options:
            options["leaks"] = [0.3] * len(module._all_weights)
    return expected(module, x, hx, **options)


def assert_padded(module: Any, results: Any, want: list[list[Tensor]], padding: float) -> None:
    """Compare padded results with those of each row, whose lengths are LENGTHS."""
    output, h_n, *potential = results
    for i, series in enumerate((output, *potential)):
        rows = series.unbind(0 if module.batch_first else 1)
        for row, row_want, length in zip(rows, want, LENGTHS, strict=True):
            assert_close(row[:length], row_want[2 * i])
            assert (row[length:] == padding).all()
    assert_close(h_n, torch.stack([row[1] for row in want], 1))


# ---- padded


@every_layout
@every_module
def test_each_row_runs_as_if_alone(kind, layout, engine):
    module = build(kind, **LAYOUTS[layout])
    x, lengths = padded(module), torch.tensor(LENGTHS)
    potential = {"return_potential": True} if kind == "potential" else {}
    for hx in (None, state_for(module, x, **WIDE)):
        results = module(x, hx, lengths=lengths, padding_value=-7.5, **potential)
        assert_padded(module, results, oracle(module, kind, x, hx, lengths=LENGTHS), -7.5)
    reset, reset_to = torch.rand(x.shape[:2]) < 0.4, state_for(module, x, **WIDE)
    options: dict[str, Any] = {"reset": reset, "reset_to": reset_to}
    if kind != "RNN":
        options["alpha"] = torch.rand(*x.shape[:2], H, **WIDE)
    results = module(x, hx, lengths=lengths, **options, **potential)
    assert_padded(module, results, oracle(module, kind, x, hx, lengths=LENGTHS, **options), 0.0)


@every_layout
@every_module
@pytest.mark.slow_emulated
def test_a_row_of_length_zero_keeps_its_state(kind, layout, engine):
    module = build(kind, **LAYOUTS[layout])
    lengths = torch.tensor([0, 4, 0, 2, 0])
    x = padded(module, lengths=lengths.tolist())
    hx = state_for(module, x, **WIDE)
    some = lengths > 0
    batch = 0 if module.batch_first else 1
    reset_to = state_for(module, x, **WIDE)
    reset = torch.rand(x.shape[:2]) < 0.4
    output, h_n = module(x, hx, reset=reset, reset_to=reset_to, lengths=lengths)
    rows = some.nonzero()[:, 0]
    want, want_h_n = module(
        x.index_select(batch, rows), hx[:, some], reset=reset.index_select(batch, rows),
        reset_to=reset_to[:, some], lengths=lengths[some],
    )  # fmt: skip
    assert_close(output.index_select(batch, rows), want, rtol=0, atol=0)
    assert_close(h_n[:, some], want_h_n, rtol=0, atol=0)
    assert (output.index_select(batch, (~some).nonzero()[:, 0]) == 0).all()
    assert_close(h_n[:, ~some], hx[:, ~some], rtol=0, atol=0)


@every_layout
@every_module
@pytest.mark.parametrize("steps", [T, 0])
def test_a_batch_of_empty_rows_returns_its_states(kind, layout, steps):
    module = build(kind, **LAYOUTS[layout])
    x = torch.randn(*((B, steps) if module.batch_first else (steps, B)), I, **WIDE)
    hx = state_for(module, x, **WIDE).requires_grad_()
    lengths = torch.zeros(B, dtype=torch.int64)
    output, h_n = module(x, hx, lengths=lengths, padding_value=2.0)
    width = H * (2 if module.bidirectional else 1)
    assert_close(output, torch.full((*x.shape[:2], width), 2.0, **WIDE))
    assert_close(h_n, hx)
    assert_close(torch.autograd.grad(h_n.sum(), hx)[0], torch.ones_like(hx))
    outputs, _ = module(x, hx, lengths=lengths, return_all_layers=True)
    assert len(outputs) == module.num_layers
    last, _ = module(x, hx, lengths=lengths, last_only=True)
    assert last.shape == (B, width)
    if kind == "potential":
        assert_close(module(x, hx, lengths=lengths, return_potential=True)[2], output * 0)


def test_an_empty_batch():
    module = build("RNN")
    output, h_n = module(torch.randn(T, 0, I, **WIDE), lengths=torch.zeros(0, dtype=torch.int64))
    assert (output.shape, h_n.shape) == ((T, 0, H), (1, 0, H))


@every_module
def test_padded_and_packed_results_have_the_same_bits(kind, engine):
    module = build(kind, num_layers=2, bidirectional=True)
    x, lengths = padded(module), torch.tensor(LENGTHS, device="cpu")
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, h_n = module(packed)
    found, found_h_n = module(x, lengths=lengths)
    found = pack_padded_sequence(found, lengths, enforce_sorted=False)
    assert_close(found.data, output.data, rtol=0, atol=0)
    assert_close(found_h_n, h_n, rtol=0, atol=0)


@every_module
def test_last_only_and_all_layers_of_ragged_rows(kind, engine):
    module = build(kind, num_layers=2, bidirectional=True)
    lengths = torch.tensor([0, 4, 0, 2, 7])
    x, hx = padded(module, lengths=lengths.tolist()), torch.randn(H, **WIDE)
    outputs, h_n = module(x, hx, lengths=lengths, return_all_layers=True)
    lasts, _ = module(x, hx, lengths=lengths, return_all_layers=True, last_only=True)
    phi = torch.nn.functional.softplus if kind == "potential" else torch.clone
    for layer, (output, last) in enumerate(zip(outputs, lasts, strict=True)):
        assert_close(last, torch.cat([*phi(h_n[2 * layer : 2 * layer + 2])], -1))
        for row, length in enumerate(lengths):
            if length:
                assert_close(last[row, :H], output[length - 1, row, :H])
                assert_close(last[row, H:], output[0, row, H:])
            else:
                assert_close(last[row], phi(hx).repeat(2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16], ids=str)
def test_lengths_of_every_integer_dtype(dtype):
    module = build("RNN")
    x, lengths = padded(module), torch.tensor(LENGTHS)
    assert_close(module(x, lengths=lengths.to(dtype)), module(x, lengths=lengths))


def test_dropout_between_layers():
    module = fusedrnn.RNN(I, H, num_layers=2, dropout=1.0, **WIDE)
    x, lengths = padded(module), torch.tensor(LENGTHS)
    second = fusedrnn.RNN(H, H, **WIDE)
    names = [name for name in module.state_dict() if name.endswith("l1")]
    second.load_state_dict({n.replace("l1", "l0"): module.state_dict()[n] for n in names})
    zeros = torch.zeros(T, B, H, **WIDE)
    assert_close(module(x, lengths=lengths)[0], second(zeros, lengths=lengths)[0])


def test_noise_is_drawn_for_every_step():
    module = fusedrnn.LeakyRNN(I, H, alpha=0.5, noise=0.1, state_noise=0.1, **WIDE)
    x, lengths = padded(module), torch.tensor(LENGTHS)
    first, second = (module(x, lengths=lengths)[0] for _ in range(2))
    for row, length in enumerate(LENGTHS):
        assert (first[:length, row] != second[:length, row]).all()


# ---- gradients


@every_layout
@every_module
def test_gradients_match_those_of_the_rows(kind, layout, engine):
    module = build(kind, **LAYOUTS[layout])
    x = padded(module).requires_grad_()
    hx = state_for(module, x, **WIDE).requires_grad_()
    leaves = [x, hx, *module.parameters()]
    output, h_n = module(x, hx, lengths=torch.tensor(LENGTHS))
    (output.sin().sum() + h_n.square().sum()).backward()
    found = [leaf.grad.clone() for leaf in leaves]
    rows = oracle(module, kind, x, hx, lengths=LENGTHS)
    loss = sum(row[0].sin().sum() + row[1].square().sum() for row in rows)
    assert_close(found, list(torch.autograd.grad(loss, leaves)))
    assert found[0][x.isnan()].eq(0).all()


@every_module
def test_second_derivatives(kind):
    module = build(kind, bidirectional=True)
    module.mode = "RNN_TANH"  # relu has no second derivative
    lengths = torch.tensor([2, 0, 3])
    x = torch.randn(3, 3, I, **WIDE, requires_grad=True)
    hx = torch.randn(2, 3, H, **WIDE, requires_grad=True)

    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, hx: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        options = {"lengths": lengths}
        return torch.func.functional_call(module, dict(zip(names, weights)), (x, hx), options)

    inputs = (x, hx, *module.parameters())
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


# ---- the functions

FORMS = ["rate", "potential", "inside"]
SERIES_OF_A_FUNCTION: list[dict[str, tuple[int, ...]]] = [
    {},
    {"alpha": (), "reset_to": (H,)},
    {"alpha": (H,), "reset_to": (B, H), "state_input": (T, B, H)},
    {"alpha": (T, B), "reset_to": (T, B, H)},
    {"alpha": (T, B, 1)},
    {"alpha": (T, B, H), "state_input": (T, B, H)},
]


def arguments_of_a_function(sizes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return random arguments, with NaN in the padding of series."""
    found: dict[str, Any] = {name: torch.rand(size, **WIDE) for name, size in sizes.items()}
    found["h0"] = torch.rand(B, H, **WIDE)
    if "reset_to" in found:
        found["reset"] = torch.rand(T, B) < 0.4
    past = torch.arange(T)[:, None] >= torch.tensor(LENGTHS)
    for name, series in found.items():
        if series.shape[:2] == (T, B) and name != "reset":
            series[past] = torch.nan
        if name != "reset":
            series.requires_grad_()
    return found


def of_row(name: str, argument: Tensor, row: int, length: int) -> Tensor:
    if argument.shape[:2] == (T, B):
        part = argument[:length, row : row + 1]
        return part.unsqueeze(-1) if name == "alpha" and part.dim() == 2 else part
    return argument[row : row + 1] if argument.shape == (B, H) else argument


@pytest.mark.parametrize("sizes", SERIES_OF_A_FUNCTION, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_functions_run_each_row_as_if_alone(form, reverse, sizes):
    weights = [torch.randn(*shape, **WIDE) for shape in ((H, I), (H, H), (H,), (H,))]
    weights = [weight.requires_grad_() for weight in weights]
    x = padded(build("RNN")).requires_grad_()
    arguments = arguments_of_a_function(sizes)
    options = {"form": form, "reverse": reverse, "return_potential": form == "potential"}
    lengths = torch.tensor(LENGTHS)
    results = fusedrnn.rnn(
        x, *weights, **arguments, **options, lengths=lengths, padding_value=-7.5
    )  # fmt: skip
    want = [torch.full_like(result, -7.5) for result in results]
    for row, length in enumerate(LENGTHS):
        parts = {name: of_row(name, value, row, length) for name, value in arguments.items()}
        of_rows = reference.rnn(x[:length, row : row + 1], *weights, **parts, **options)
        for i, part in enumerate(of_rows):
            if i == 1:
                want[1][row] = part[0]
            else:
                want[i][:length, row] = part[:, 0]
    assert_close(list(results), want)
    leaves = [x, *weights, *(a for name, a in arguments.items() if name != "reset")]
    found, wanted = (
        torch.autograd.grad(sum(r.sin().sum() for r in each), leaves, allow_unused=True)
        for each in (results, want)
    )
    assert_close(
        [g for g in found if g is not None],
        [torch.zeros_like(f) if w is None else w for f, w in zip(found, wanted) if f is not None],
    )


def test_recurrence_takes_lengths(engine):
    w_hh, u = torch.randn(H, H, **WIDE), torch.randn(T, B, H, **WIDE)
    lengths = torch.tensor([0, 4, 0, 2, 7])
    h0 = torch.randn(B, H, **WIDE)
    for start in (h0, None):
        h, last = fusedrnn.recurrence(u, start, w_hh, nonlinearity="relu", lengths=lengths)
        for row, length in enumerate(lengths):
            first = (torch.zeros_like(h0) if start is None else h0)[row : row + 1]
            want = first
            if length:
                part = u[:length, row : row + 1]
                steps, want = reference.recurrence(part, first, w_hh, nonlinearity="relu")
                assert_close(h[:length, row], steps[:, 0])
            assert (h[length:, row] == 0).all()
            assert_close(last[row], want[0])


@pytest.mark.parametrize("steps", [T, 0])
def test_functions_accept_rows_without_steps(steps):
    w_hh, u = torch.randn(H, H, **WIDE), torch.randn(steps, B, H, **WIDE)
    h0 = torch.randn(B, H, **WIDE, requires_grad=True)
    options = {"form": "potential", "return_potential": True, "padding_value": 2.0}
    lengths = torch.zeros(B, dtype=torch.int64)
    h, last, v = fusedrnn.recurrence(u, h0, w_hh, lengths=lengths, **options)
    assert_close((h, v), (torch.full((steps, B, H), 2.0, **WIDE),) * 2)
    assert_close(last, h0)
    assert last.data_ptr() != h0.data_ptr()
    assert_close(torch.autograd.grad(last.sum(), h0)[0], torch.ones_like(h0))
    assert_close(fusedrnn.recurrence(u, None, w_hh, lengths=lengths)[1], torch.zeros_like(h0))


FUNCTION_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "of T": ({"lengths": torch.ones(T).long()}, ValueError, "lengths must be [5], got [7]"),
    "packed": (
        {"batch_sizes": torch.tensor([B] * T)}, ValueError,
        "batch_sizes must be None with lengths, got a tensor"),
    "unbatched": (
        {"x": torch.zeros(T, H)}, ValueError,
        "x must be [T, B, I] with lengths, got [7, 6]"),
    "a list": ({"x": [1.0]}, ValueError, "x must be [T, B, I] with lengths, got list"),
    "reset": (
        {"reset": torch.zeros(B, T).bool()}, RuntimeError,
        "reset must be [7, 5, ...] with lengths, got [5, 7]"),
    "alpha": (
        {"alpha": torch.ones(B, T)}, RuntimeError,
        "alpha must be [7, 5, ...] with lengths, got [5, 7]"),
    "state_input": (
        {"state_input": torch.ones(T, B - 1, H)}, RuntimeError,
        "state_input must be [7, 5, ...] with lengths, got [7, 4, 6]"),
    "h0": ({"h0": torch.ones(B - 1, H)}, RuntimeError, "h0 must be [5, H], got [4, 6]"),
    "h0 a list": ({"h0": [1.0]}, TypeError, "h0 must be a tensor, got list"),
    "reset_to": (
        {"reset": torch.zeros(T, B).bool(), "reset_to": torch.ones(B - 1, H)}, RuntimeError,
        "reset_to must be [5, H], got [4, 6]"),
    "padding without lengths": (
        {"lengths": None, "padding_value": 1.0}, ValueError,
        "padding_value must be 0.0 without lengths, got 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", FUNCTION_ERRORS)
def test_errors_of_a_function(case):
    changes, error, message = FUNCTION_ERRORS[case]
    arguments = {
        "x": torch.zeros(T, B, H), "w_ih": None, "w_hh": torch.zeros(H, H),
        "lengths": torch.tensor(LENGTHS), **changes,
    }  # fmt: skip
    with pytest.raises(error) as info:
        fusedrnn.rnn(**arguments)
    assert str(info.value) == f"fusedrnn: {message}"


def test_functions_support_compile_and_vmap():
    torch._dynamo.reset()
    w_hh, lengths = torch.randn(H, H, **WIDE), torch.tensor(LENGTHS)
    u, h0 = torch.randn(3, T, B, H, **WIDE), torch.randn(3, B, H, **WIDE)
    reset, alpha = torch.rand(T, B) < 0.4, torch.rand(T, B, **WIDE)

    def run(u: Tensor, h0: Tensor, lengths: Tensor = lengths) -> tuple[Tensor, ...]:
        return fusedrnn.recurrence(
            u, h0, w_hh, reset=reset, reset_to=h0, alpha=alpha, lengths=lengths
        )

    want = [run(*sample) for sample in zip(u, h0)]
    assert_close(torch.vmap(run)(u, h0), tuple(map(torch.stack, zip(*want))))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_close(compiled(u[0], h0[0], lengths), want[0])


# ---- nested


@every_layout
@every_module
@pytest.mark.slow_emulated
def test_jagged_input_gives_jagged_output(kind, layout, engine):
    module, x = build(kind, **LAYOUTS[layout]), jagged()
    reset = like(x, lambda n: torch.rand(n) < 0.4)
    options: dict[str, Any] = {"reset": reset, "reset_to": torch.randn(H, **WIDE)}
    if kind != "RNN":
        options["alpha"] = like(x, lambda n: torch.rand(n, 1, **WIDE))
    hx = torch.randn(len(module._all_weights), B, H, **WIDE)
    potential = {"return_potential": True} if kind == "potential" else {}
    results = module(x, hx, **options, **potential)
    assert results[0].shape[:2] == x.shape[:2]
    width = H * (2 if module.bidirectional else 1)
    for result in (results[0], *results[2:]):
        assert_close(result + like(x, lambda n: torch.zeros(n, width, **WIDE)), result)
    time_first = build(kind, **{**LAYOUTS[layout], "batch_first": False})
    time_first.load_state_dict(module.state_dict())
    padding = {n: pad_sequence([*v.unbind()]) for n, v in options.items() if n != "reset_to"}
    first, lengths = pad_sequence([*x.unbind()]), torch.tensor(LENGTHS)
    options.update(padding)
    want = time_first(first, hx, lengths=lengths, **options, **potential)
    for result, of_padded in zip(results[::2], want[::2], strict=True):
        assert_close(pad_sequence([*result.unbind()]), of_padded)
    assert_close(results[1], want[1])


@every_module
def test_jagged_with_empty_rows_and_with_holes(kind):
    module = build(kind, num_layers=2)
    lengths = torch.tensor([2, 0, 5])
    values = torch.randn(3, T, I, **WIDE)
    starts = torch.zeros(3, dtype=torch.int64)
    holes = torch.nested.narrow(values, 1, starts, lengths, layout=torch.jagged)
    whole = torch.nested.nested_tensor(
        [row[:n] for row, n in zip(values, lengths)], layout=torch.jagged
    )
    want, want_h_n = module(values.transpose(0, 1), lengths=lengths)
    for x in (holes, whole):
        output, h_n = module(x)
        assert_close(h_n, want_h_n)
        for row, (length, part) in enumerate(zip(lengths, output.unbind(), strict=True)):
            assert_close(part, want[:length, row])


@every_module
def test_gradients_of_jagged(kind):
    module, x = build(kind, bidirectional=True), jagged()
    values = x.values().requires_grad_()
    x = torch.nested.nested_tensor_from_jagged(values, x.offsets())
    output, _ = module(x)
    found = torch.autograd.grad(output.values().sin().sum(), [values, *module.parameters()])
    output, _ = module(pad_sequence([*x.unbind()]), lengths=torch.tensor(LENGTHS))
    want = torch.autograd.grad(output.sin().sum(), [values, *module.parameters()])
    assert_close(found, want)


# ---- errors

X = torch.zeros(T, B, I)
OK = torch.tensor(LENGTHS)
JAGGED = torch.nested.nested_tensor([torch.zeros(n, I) for n in LENGTHS], layout=torch.jagged)
OTHER = torch.nested.nested_tensor([torch.zeros(n) for n in LENGTHS], layout=torch.jagged)
MASK = torch.zeros(T, B, dtype=torch.bool)
ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a list": (X, {"lengths": LENGTHS}, TypeError, "lengths must be a tensor, got list"),
    "float": (X, {"lengths": OK.float()}, TypeError, "lengths must be integers, got torch.float32"),
    "bool": (X, {"lengths": OK > 3}, TypeError, "lengths must be integers, got torch.bool"),
    "of T": (X, {"lengths": torch.ones(T).long()}, ValueError, "lengths must be [5], got [7]"),
    "a number": (X, {"lengths": torch.tensor(3)}, ValueError, "lengths must be [5], got []"),
    "too long": (X, {"lengths": OK + 2}, ValueError, "lengths must be in [0, 7], got 8"),
    "negative": (X, {"lengths": OK - 2}, ValueError, "lengths must be in [0, 7], got -1"),
    "unbatched": (
        X[:, 0], {"lengths": OK}, ValueError, "input must be [T, B, I] with lengths, got [7, 4]"),
    "packed": (
        pack_padded_sequence(X, OK, enforce_sorted=False), {"lengths": OK}, ValueError,
        "input must be [T, B, I] with lengths, got PackedSequence"),
    "nested": (
        JAGGED, {"lengths": OK}, ValueError,
        "input must be [T, B, I] with lengths, got a nested tensor"),
    "padding without lengths": (
        X, {"padding_value": -1.0}, ValueError,
        "padding_value must be 0.0 without lengths, got -1.0"),
    "padding of nested": (
        JAGGED, {"padding_value": -1.0}, ValueError,
        "padding_value must be 0.0 without lengths, got -1.0"),
    "padding a tensor": (
        X, {"lengths": OK, "padding_value": OK}, TypeError,
        "padding_value must be a number, got Tensor"),
    "strided": (
        torch.nested.nested_tensor([torch.zeros(n, I) for n in LENGTHS]), {}, TypeError,
        "input must have the layout torch.jagged if nested, got torch.strided"),
    "jagged in another dimension": (
        JAGGED.transpose(1, 2), {}, ValueError,
        "input must be [B, lengths, I] if nested, got a nested tensor"),
    "jagged of two dimensions": (
        OTHER, {}, ValueError, "input must be [B, lengths, I] if nested, got a nested tensor"),
    "mask of a nested input": (
        JAGGED, {"reset": MASK}, TypeError, "reset must be nested like input, got torch.strided"),
    "mask of another nested tensor": (
        JAGGED, {"reset": OTHER.bool()}, ValueError,
        "reset must have the offsets of input; create it with "
        "torch.nested.nested_tensor_from_jagged(values, input.offsets(), input.lengths())"),
    "mask with units": (
        JAGGED, {"reset": JAGGED.bool()}, RuntimeError,
        "reset must have sizes [5, lengths], got [5, lengths, 4]"),
    "mask with lengths": (
        X, {"lengths": OK, "reset": MASK.mT}, RuntimeError,
        "reset must have sizes [7, 5], got [5, 7]"),
    "target alone": (
        X, {"lengths": OK, "reset_to": X[0, 0]}, ValueError,
        "reset must be a tensor if reset_to is given, got None"),
    "target of another batch": (
        X, {"lengths": OK, "reset": MASK, "reset_to": torch.zeros(2, 4, H)}, RuntimeError,
        "reset_to must have sizes [6], [2, 6] or [2, 5, 6], got [2, 4, 6]"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    x, arguments, error, message = ERRORS[case]
    for cls in (fusedrnn.RNN, fusedrnn.LeakyRNN):
        with pytest.raises(error) as info:
            cls(I, H, bidirectional=True)(x, **arguments)
        assert str(info.value) == f"fusedrnn: {message}"


def test_errors_of_the_state_are_those_of_nn_rnn():
    for hx in (torch.zeros(1, B - 1, H), torch.zeros(2, B, H), torch.zeros(1, 1, H + 1)):
        with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 5, 6\)"):
            fusedrnn.RNN(I, H)(X, hx, lengths=OK)


def test_lengths_batched_by_vmap_are_refused():
    module = fusedrnn.RNN(I, H)
    with pytest.raises(NotImplementedError, match="lengths must be the same for all samples"):
        torch.vmap(lambda n: module(X, lengths=n))(OK.repeat(2, 1))


# ---- other uses


@every_module
@pytest.mark.parametrize("lengths", [LENGTHS, [0, 7, 0, 2, 1], [1] * B, [7, 0, 0, 0, 0]], ids=str)
def test_compiles_into_one_graph(kind, lengths):
    torch._dynamo.reset()
    module = build(kind, num_layers=2, bidirectional=True)
    x, lengths = padded(module, lengths=lengths), torch.tensor(lengths)
    hx = torch.randn(4, B, H, **WIDE)
    reset = torch.rand(T, B) < 0.4

    def function(x: Tensor, hx: Tensor, lengths: Tensor) -> Any:
        return *module(x, lengths=lengths, reset=reset), *module(x, hx, lengths=lengths)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    leaves = [*module.parameters()]
    results = []
    for run in (compiled, function):
        found = run(x, hx, lengths)
        results.append((found, torch.autograd.grad(found[0].sin().sum(), leaves)))
    assert_close(*results)


@every_module
def test_a_jagged_input_compiles_into_one_graph(kind):
    torch._dynamo.reset()
    module, x = build(kind, num_layers=2, bidirectional=True), jagged([3, 0, 2])
    compiled = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
    (output, h_n), (want, want_h_n) = compiled(x), module(x)
    assert_close((output.values(), h_n), (want.values(), want_h_n))


def test_other_lengths_do_not_recompile():
    torch._dynamo.reset()
    module = build("RNN", num_layers=2, bidirectional=True)
    compiled = torch.compile(lambda x, n: module(x, lengths=n), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in (LENGTHS, [0, 7, 0, 2, 1], [1] * B):
            x = padded(module, lengths=lengths)
            assert_close(
                compiled(x, torch.tensor(lengths)), module(x, lengths=torch.tensor(lengths))
            )


@every_module
def test_exports(kind):
    module = build(kind, num_layers=2, batch_first=True)
    lengths = torch.tensor(LENGTHS)
    x = padded(module)
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        module, (x,), {"lengths": lengths},
        dynamic_shapes={"input": sizes, "lengths": {0: torch.export.Dim.AUTO}},
    )  # fmt: skip
    x, lengths = torch.randn(3, 9, I, **WIDE), torch.tensor([0, 9, 4])
    assert_close(program.module()(x, lengths=lengths), module(x, lengths=lengths))


@every_module
def test_vmap_and_per_sample_gradients(kind):
    module = build(kind, num_layers=2, bidirectional=True)
    lengths, weights = torch.tensor([2, 0, 3]), dict(module.named_parameters())
    x, hx = torch.randn(4, 3, 3, I, **WIDE), torch.randn(4, 4, 3, H, **WIDE)

    def run(x: Tensor, hx: Tensor) -> Any:
        return module(x, hx, lengths=lengths)

    want = zip(*(run(*sample) for sample in zip(x, hx)))
    assert_close(torch.vmap(run)(x, hx), tuple(map(torch.stack, want)))

    def loss(weights: dict[str, Tensor], x: Tensor, lengths: Tensor) -> Tensor:
        options = {"lengths": lengths}
        output, h_n = torch.func.functional_call(module, weights, (x,), options)
        return output.sin().sum() + h_n.square().sum()

    gradient = torch.func.grad(loss)
    found = torch.vmap(gradient, (None, 0, None))(weights, x, lengths)
    wanted = [gradient(weights, sample, lengths) for sample in x]
    assert_close(found, {n: torch.stack([w[n] for w in wanted]) for n in found})


def test_a_module_on_meta_takes_lengths_on_the_cpu():
    module = fusedrnn.RNN(I, H, device="meta")
    output, h_n = module(X.to("meta"), lengths=OK)
    assert (output.shape, h_n.shape) == ((T, B, H), (1, B, H))


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = fusedrnn.RNN(I, H)(X, torch.zeros(1, B, H), lengths=OK)
    assert (output.dtype, h_n.dtype) == (torch.bfloat16, torch.bfloat16)
