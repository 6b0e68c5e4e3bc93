"""Dropout inside the recurrence: recurrent_dropout, zoneout and weight_drop, against a loop."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from module_oracle import assert_checkpointing_repeats_draws, data_of, pack, state_for
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn import functional
from fusedrnn.dropout import draw_mask
from fusedrnn.reference import NONLINEARITIES

T, B, I, H = 5, 3, 4, 6
LENGTHS = [3, 5, 1]  # unsorted
WIDE = {"dtype": torch.float64}

RATES: dict[str, dict[str, float]] = {
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "weight_drop": {"weight_drop": 0.2},
    "all": {"recurrent_dropout": 0.4, "zoneout": 0.3, "weight_drop": 0.2},
}
MODULES: dict[str, tuple[type, dict[str, Any]]] = {
    "RNN": (fusedrnn.RNN, {}),
    "relu": (fusedrnn.RNN, {"nonlinearity": "relu"}),
    "rate": (fusedrnn.LeakyRNN, {"alpha": 0.3, "learn_alpha": True, "state_noise": 0.1}),
    "plain, with noise": (fusedrnn.LeakyRNN, {"noise": 0.1, "state_noise": 0.1}),
    "potential": (
        fusedrnn.LeakyRNN,
        {"alpha": torch.linspace(0.1, 1, H), "form": "potential", "nonlinearity": "softplus"}),
    "potential without leak": (
        fusedrnn.LeakyRNN, {"form": "potential", "nonlinearity": "sigmoid", "state_noise": 0.1}),
    "inside": (fusedrnn.LeakyRNN, {"alpha": 0.3, "form": "inside", "state_noise": 0.1}),
    "inside without leak": (fusedrnn.LeakyRNN, {"form": "inside", "nonlinearity": "elu"}),
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "deep": {"num_layers": 2, "bidirectional": True, "bias": False},
}
LEAKY = [kind for kind, (cls, _) in MODULES.items() if cls is fusedrnn.LeakyRNN]
some_of_both = pytest.mark.parametrize(
    ("kind", "rates"), [*(("RNN", rates) for rates in RATES), *((kind, "all") for kind in LEAKY)]
)
every_rate = pytest.mark.parametrize("rates", RATES)
every_module = pytest.mark.parametrize("kind", MODULES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def build(kind: str, rates: str, **options: Any) -> Any:
    cls, usual = MODULES[kind]
    return cls(I, H, **usual, **RATES[rates], **{**WIDE, **options})


def padded(x: Any, series: Tensor) -> Tensor:
    """Return a series in the layout of ``x``, packed or not, as ``[T, B, ...]``."""
    if isinstance(x, PackedSequence):
        return pad_packed_sequence(x._replace(data=series))[0]
    return series


def layer(
    module: Any, index: int, x: Tensor, like: Any, lengths: Tensor, hx: Tensor | None,
    reset: Tensor | None, reset_to: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Run one layer and direction of the equations in the docstring of RNN, as a loop.

    Its masks and noise are drawn like those of the module, in the layout of ``like``.
    """
    steps, batch, size = *x.shape[:2], module.hidden_size
    leaky = isinstance(module, fusedrnn.LeakyRNN)
    weights = [getattr(module, name) for name in module._all_weights[index]]
    w_ih, w_hh, *biases = weights
    phi, form = NONLINEARITIES[module.nonlinearity], getattr(module, "form", "rate")
    alpha = module._alpha_of(index) if leaky else None
    alpha = torch.ones((), **WIDE) if alpha is None else alpha
    rows = data_of(like).shape[:-1]

    def noise(name: str) -> Tensor | float:
        if not (leaky and module.training and getattr(module, name)):
            return 0.0
        return padded(like, torch.randn(*rows, size, **WIDE) * getattr(module, name))

    def mask(name: str, *sizes: int) -> Tensor:
        return draw_mask(sizes, getattr(module, name), w_hh, None)

    u = x @ w_ih.T + sum(biases) + noise("noise")
    added = noise("state_noise")
    if module.training and module.weight_drop:
        w_hh = w_hh * mask("weight_drop", size, size) / (1 - module.weight_drop)
    sends: Tensor | float = 1.0
    if module.training and module.recurrent_dropout:
        sends = mask("recurrent_dropout", batch, size) / (1 - module.recurrent_dropout)
        if isinstance(like, PackedSequence) and like.unsorted_indices is not None:
            sends = sends[like.unsorted_indices]
    stays = torch.full((steps, batch, size), float(module.zoneout), **WIDE)
    if module.training and module.zoneout:
        stays = 1 - padded(like, mask("zoneout", *rows, size))

    reverse = module.bidirectional and index % 2 == 1
    state = torch.zeros(batch, size, **WIDE) if hx is None else hx[index]
    start = torch.zeros_like(state) if reset_to is None else reset_to[index].expand_as(state)
    outputs, potentials = [state] * steps, [state] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        k = state
        begins = t + 1 if reverse else t  # in reverse, an episode ends at its first step
        if reset is not None and begins < steps:
            here = reset[begins] & (begins < lengths)
            k = torch.where(here.unsqueeze(-1), start, k)
        s = u[t] + (sends * (phi(k) if form == "potential" else k)) @ w_hh.T
        s = phi(s) if form == "rate" else s
        s = (1 - alpha) * k + alpha * s + (added if isinstance(added, float) else added[t])
        s = phi(s) if form == "inside" else s
        s = stays[t] * k + (1 - stays[t]) * s
        state = torch.where((t < lengths).unsqueeze(-1), s, state)
        potentials[t], outputs[t] = s, phi(s) if form == "potential" else s
    return [torch.stack(outputs), state, torch.stack(potentials)]


def loop(
    module: Any, x: Any, hx: Tensor | None = None, reset: Tensor | None = None,
    reset_to: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the output, h_n and the potential; output and potential are zero in the padding."""
    series = padded(x, data_of(x))
    lengths = torch.tensor(LENGTHS if isinstance(x, PackedSequence) else [T] * series.size(1))
    reset = None if reset is None else padded(x, reset)
    inside = (torch.arange(T).unsqueeze(1) < lengths).unsqueeze(-1)
    directions = 2 if module.bidirectional else 1
    states: list[Tensor] = []
    for first in range(0, len(module._all_weights), directions):
        parts = [
            layer(module, i, series, x, lengths, hx, reset, reset_to)
            for i in range(first, first + directions)
        ]
        states += [part[1] for part in parts]
        series, potential = (
            torch.where(inside, torch.cat([part[i] for part in parts], -1), 0.0) for i in (0, 2)
        )
    return series, torch.stack(states), potential


def assert_is_the_loop(module: Any, x: Any, *arguments: Any) -> None:
    """Compare results and gradients with those of the loop, for the same seed."""
    hx, reset, reset_to = (*arguments, None, None, None)[:3]
    leaves = [*module.parameters(), *(t for t in (data_of(x), hx, reset_to) if t is not None)]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    potential = getattr(module, "form", "rate") == "potential"
    more = {"return_potential": True} if potential else {}
    found = []
    for run in ("module", "loop"):
        torch.manual_seed(3)
        if run == "module":
            results = module(x, hx, reset=reset, reset_to=reset_to, **more)
            results = [results[0], *results[2:], results[1]]
            results[:-1] = [padded(x, data_of(series)) for series in results[:-1]]
        else:
            output, h_n, v = loop(module, x, hx, reset, reset_to)
            results = [output, v, h_n] if potential else [output, h_n]
        loss = sum((i + 1) * result.sin().sum() for i, result in enumerate(results))
        found.append((results, torch.autograd.grad(loss, leaves)))
    assert_close(*found)


def sequence(packed: bool = False, enforce_sorted: bool = False) -> Any:
    x = torch.randn(T, B, I, **WIDE)
    x = pack(x, LENGTHS, enforce_sorted) if packed else x
    data_of(x).requires_grad_()
    return x


# ---- results and gradients


@every_layout
@every_rate
@every_module
def test_is_a_loop_with_the_same_masks(kind, rates, layout):
    module = build(kind, rates, **LAYOUTS[layout])
    for packed in (False, True):
        x = sequence(packed)
        assert_is_the_loop(module, x)
        hx = state_for(module, x, **WIDE).requires_grad_()
        reset = torch.rand(data_of(x).shape[:-1]) < 0.4
        targets = torch.randn(len(module._all_weights), B, H, **WIDE).requires_grad_()
        assert_is_the_loop(module, x, hx, reset)
        assert_is_the_loop(module, x, hx, reset, targets)
        assert_is_the_loop(module, x, None, reset, targets[:, 0])


@pytest.mark.parametrize(
    ("kind", "rates"),
    [("RNN", "recurrent_dropout"), ("potential", "all"), ("inside", "all"), ("rate", "zoneout")],
)
def test_every_engine_matches_the_loop(kind, rates, engine):
    module = build(kind, rates, num_layers=2, bidirectional=True)
    for packed in (False, True):
        x = sequence(packed)
        hx = state_for(module, x, **WIDE).requires_grad_()
        reset = torch.rand(data_of(x).shape[:-1]) < 0.4
        targets = torch.randn(4, B, H, **WIDE).requires_grad_()
        assert_is_the_loop(module, x, hx, reset, targets)


@every_rate
@every_module
def test_in_evaluation_only_zoneout_acts_by_its_mean(kind, rates):
    module = build(kind, rates, num_layers=2, bidirectional=True).eval()
    for packed in (False, True):
        before = torch.get_rng_state()
        x = sequence(packed)
        drawn = torch.get_rng_state()
        module(x)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert not torch.equal(before, drawn)
        assert_is_the_loop(module, x, state_for(module, x, **WIDE))
    if rates in ("recurrent_dropout", "weight_drop"):
        plain = MODULES[kind][0](I, H, 2, bidirectional=True, **MODULES[kind][1], **WIDE).eval()
        plain.load_state_dict(module.state_dict())
        assert_close(module(x)[0].data, plain(x)[0].data, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3, 2, 5), (4, 1, 3, 33), (3, 0, 2, 4)])
@every_module
def test_odd_sizes_match_the_loop(kind, sizes):
    steps, batch, inputs, size = sizes
    cls, usual = MODULES[kind]
    usual = {**usual, "alpha": 0.3} if kind == "potential" else usual
    module = cls(inputs, size, **usual, **RATES["all"], **WIDE)
    x = torch.randn(steps, batch, inputs, **WIDE)
    output, h_n = module(x, state_for(module, x, **WIDE))
    assert (output.shape, h_n.shape) == ((steps, batch, size), (1, batch, size))
    torch.manual_seed(1)
    output, h_n = module(x)
    torch.manual_seed(1)
    if batch:
        want = layer(module, 0, x, x, torch.full((batch,), steps), None, None, None)
        assert_close([output, h_n[0]], want[:2])


@pytest.mark.parametrize("form", ["rate", "potential"])
def test_alpha_of_a_call(form):
    options = {"form": form, "nonlinearity": "softplus", **WIDE}
    x, alpha = sequence(), torch.rand(T, B, H, **WIDE)
    module, plain = (
        fusedrnn.LeakyRNN(I, H, zoneout=0.3, **options),
        fusedrnn.LeakyRNN(I, H, **options),
    )
    plain.load_state_dict(module.state_dict())
    assert_close(module.eval()(x, alpha=alpha), plain(x, alpha=0.7 * alpha))
    results = []
    module = fusedrnn.LeakyRNN(I, H, alpha=0.3, **RATES["all"], **options)
    for arguments in ({}, {"alpha": torch.full((T, B), 0.3, **WIDE)}):
        torch.manual_seed(1)
        results.append(module(x, **arguments))
    assert_close(*results)


def test_alpha_that_varies_in_time_is_refused_in_the_form_inside():
    x = torch.randn(T, B, I, **WIDE)
    for rates in ("recurrent_dropout", "zoneout"):
        with pytest.raises(ValueError) as info:
            build("inside", rates)(x, alpha=torch.rand(T, B, **WIDE))
        assert str(info.value) == (
            "fusedrnn: alpha must be the same at every step in the form 'inside' with zoneout or "
            "recurrent_dropout, got [5, 3, 6]"
        )
    build("inside", "weight_drop")(x, alpha=torch.rand(T, B, **WIDE))


@some_of_both
def test_first_and_second_derivatives(kind, rates):
    cls, usual = MODULES[kind]
    usual = {**usual, "alpha": 0.3} if kind == "potential" else usual
    module = cls(2, 3, **usual, **RATES[rates], **WIDE)
    x = torch.randn(3, 2, 2, **WIDE, requires_grad=True)
    hx = torch.randn(1, 2, 3, **WIDE, requires_grad=True)
    target = torch.randn(3, **WIDE, requires_grad=True)
    reset = torch.rand(3, 2) < 0.4
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, hx: Tensor, target: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        options = {"reset": reset, "reset_to": target}
        return torch.func.functional_call(module, dict(zip(names, weights)), (x, hx), options)

    inputs = (x, hx, target, *module.parameters())
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


# ---- statistics


def constant(cls: type = fusedrnn.LeakyRNN, **options: Any) -> Any:
    """Return a linear layer of 100 units without input whose W_hh is the identity."""
    module = cls(1, 100, nonlinearity="identity", bias=False, **options)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.copy_(torch.eye(100))
    return module


X, ONES = torch.zeros(20, 50, 1), torch.ones(1, 50, 100)


def test_recurrent_dropout_draws_one_mask_for_each_row_and_unit():
    first, last = constant(recurrent_dropout=0.2)(X, ONES)[0][[0, -1]]
    zeros = first == 0
    assert_close(first[~zeros], torch.full_like(first[~zeros], 1 / 0.8))
    assert torch.equal(last == 0, zeros)
    assert abs(zeros.float().mean() - 0.2) < 0.02
    assert (zeros.float().mean(0) - 0.2).abs().max() < 0.3  # no unit, and no row, is always zero
    assert (zeros.float().mean(1) - 0.2).abs().max() < 0.2


def test_zoneout_draws_a_mask_for_each_step_row_and_unit():
    module = constant(zoneout=0.2)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    reset = torch.ones(X.shape[:2], dtype=torch.bool)
    stays = module(X, reset=reset, reset_to=torch.ones(100))[0]
    assert set(stays.unique().tolist()) == {0.0, 1.0}
    assert abs(stays.mean() - 0.2) < 0.005
    assert (stays.mean((1, 2)) - 0.2).abs().max() < 0.03
    assert torch.corrcoef(stays.flatten(1)).fill_diagonal_(0).abs().max() < 0.1
    module.eval()
    assert_close(module(X, reset=reset, reset_to=torch.ones(100))[0], torch.full_like(stays, 0.2))


def test_weight_drop_draws_one_mask_for_each_call():
    module = constant(weight_drop=0.2)
    with torch.no_grad():
        module.weight_hh_l0.fill_(1)
    h0 = torch.zeros(1, 50, 100)
    h0[0, :, 7] = 1
    reset = torch.ones(X.shape[:2], dtype=torch.bool)
    column = module(X, reset=reset, reset_to=h0)[0]
    assert (column == column[0, 0]).all()
    assert_close(column.unique(), torch.tensor([0, 1 / 0.8]))
    every = module(X, ONES)[0][0, 0] * 0.8 / 100
    assert abs(every.mean() - 0.8) < 0.02
    assert every.std() < 0.1


@every_rate
def test_the_expectation_of_a_linear_layer_is_kept(rates):
    """Dropout rescales to keep the mean of a step. In evaluation, zoneout acts by its mean."""
    module = constant(**RATES[rates])
    x, h0 = torch.zeros(1, 4000, 1), torch.ones(1, 4000, 100)
    with torch.no_grad():
        module.weight_hh_l0.fill_(0.01)
        got = torch.stack([module(x, 2 * h0)[0].mean() for _ in range(20)]).mean()
    assert abs(got - module.eval()(x, 2 * h0)[0].mean()) < 0.01


@pytest.mark.parametrize("kind", ["RNN", "potential"])
def test_one_seed_gives_the_same_bits_and_masks_in_every_dtype(kind):
    wide = build(kind, "all", num_layers=2, bidirectional=True)
    narrow = build(kind, "all", num_layers=2, bidirectional=True, dtype=torch.float32)
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(T, B, I, **WIDE)
    results = []
    for seed, module, input in (
        (1, narrow, x.float()), (1, narrow, x.float()), (2, narrow, x.float()), (1, wide, x),
    ):  # fmt: skip
        torch.manual_seed(seed)
        results.append(module(input)[0].double())
    assert torch.equal(results[0], results[1])
    assert (results[0] != results[2]).any()
    assert_close(results[0], results[3], rtol=1e-4, atol=1e-5)


def test_a_generator_is_the_source_of_every_mask():
    module, x = build("rate", "all", num_layers=2), torch.randn(T, B, I, **WIDE)
    first, again, other = (
        module(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert_close(first, again, rtol=0, atol=0)
    assert (first[0] != other[0]).all()
    state = torch.get_rng_state()
    module(x, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_drawn_when_off():
    module, x = fusedrnn.RNN(I, H, recurrent_dropout=0.0), torch.randn(T, B, I)
    state = torch.get_rng_state()
    module(x)
    assert torch.equal(torch.get_rng_state(), state)


@every_rate
def test_dropout_between_layers_is_drawn_between_their_masks(rates):
    """The dropout between two layers is drawn after the first layer's masks."""
    x = torch.randn(T, B, I, **WIDE)
    module = build("RNN", rates, num_layers=2, dropout=0.5)
    first, second = (fusedrnn.RNN(n, H, **RATES[rates], **WIDE) for n in (I, H))
    for k, part in enumerate((first, second)):
        part.load_state_dict({
            n.replace(f"l{k}", "l0"): w for n, w in module.state_dict().items() if f"l{k}" in n
        })  # fmt: skip
    torch.manual_seed(1)
    output, h_n = module(x)
    torch.manual_seed(1)
    between, first_h = first(x)
    want, second_h = second(torch.dropout(between, 0.5, True))
    assert_close((output, h_n), (want, torch.cat([first_h, second_h])))


# ---- layouts


@every_rate
@every_module
def test_lengths_give_the_results_of_a_packed_batch(kind, rates):
    module = build(kind, rates, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(T, B, I, **WIDE), torch.tensor(LENGTHS)
    torch.manual_seed(1)
    output, h_n = module(pack(x, LENGTHS, False))
    torch.manual_seed(1)
    found, found_h_n = module(x, lengths=lengths)
    assert_close(found, pad_packed_sequence(output)[0], rtol=0, atol=0)
    assert_close(found_h_n, h_n, rtol=0, atol=0)
    zeros = torch.zeros(B, dtype=torch.int64)
    assert (module(x, lengths=zeros)[0] == 0).all()


@every_rate
def test_other_layouts_give_the_results_of_the_batched_one(rates):
    module = build("rate", rates, num_layers=2)
    x = torch.randn(T, 1, I, **WIDE)
    first = copy.deepcopy(module)
    first.batch_first = True
    results = []
    for run in (
        lambda: module(x)[0],
        lambda: first(x.transpose(0, 1))[0].transpose(0, 1),
        lambda: module(x[:, 0])[0][:, None],
        lambda: module(x, return_all_layers=True)[0][-1],
    ):
        torch.manual_seed(1)
        results.append(run())
    for result in results[1:]:
        assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["RNN", "rate", "potential", "inside"])
def test_steps_match_the_sequence_in_evaluation_and_raise_in_training(kind):
    x, state = torch.randn(4, B, I, **WIDE), torch.randn(2, B, H, **WIDE)
    for rates in RATES:
        module = build(kind, rates, num_layers=2).eval()
        outputs, h = [], state
        with torch.no_grad():
            for sample in x:
                y, h = module.step(sample, h)
                outputs.append(y)
            assert_close((torch.stack(outputs), h), module(x, state))
        module.train()
        if rates != "zoneout":
            name = "weight_drop" if rates == "weight_drop" else "recurrent_dropout"
            for mode in (torch.no_grad, torch.enable_grad):
                with mode(), pytest.raises(ValueError, match=f"{name} must be 0 for a step in"):
                    module.step(x[0], state)
        else:
            with torch.no_grad():
                assert (module.step(x[0], state)[1] != module.step(x[0], state)[1]).any()


# ---- construction, copies, conversion

ERRORS: list[tuple[Any, type[Exception], str]] = [
    (-0.1, ValueError, "must be in [0, 1), got -0.1"),
    (1, ValueError, "must be in [0, 1), got 1"),
    (1.5, ValueError, "must be in [0, 1), got 1.5"),
    (float("nan"), ValueError, "must be in [0, 1), got nan"),
    ("a", TypeError, "must be a number, got str"),
    (None, TypeError, "must be a number, got NoneType"),
    (torch.tensor(0.5), TypeError, "must be a number, got Tensor"),
]


@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout", "weight_drop"])
@pytest.mark.parametrize("cls", [fusedrnn.RNN, fusedrnn.LeakyRNN])
@pytest.mark.parametrize(("value", "error", "message"), ERRORS, ids=str)
def test_constructor_errors(cls, name, value, error, message):
    with pytest.raises(error) as info:
        cls(I, H, **{name: value})
    assert str(info.value) == f"fusedrnn: {name} {message}"


@pytest.mark.parametrize("cls", [fusedrnn.RNN, fusedrnn.LeakyRNN])
def test_repr_names_what_is_on(cls):
    module = cls(I, H, zoneout=0.25, weight_drop=0.5)
    assert repr(module) == f"{cls.__name__}(4, 6, zoneout=0.25, weight_drop=0.5)"
    assert "drop" not in repr(cls(I, H))


@pytest.mark.parametrize("kind", ["RNN", "rate"])
def test_copies_and_pickles_compute_the_same(kind):
    def through_torch_save(module: nn.Module) -> nn.Module:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        return torch.load(buffer)  # weights_only

    module, x = build(kind, "all"), torch.randn(T, B, I, **WIDE)
    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save):
        replica = duplicate(module)
        assert repr(replica) == repr(module)
        results = []
        for each in (replica, module):
            torch.manual_seed(1)
            results.append(each(x))
        assert_close(*results, rtol=0, atol=0)


def test_modules_without_the_attributes_have_rates_of_0():
    """Such modules lack the attributes, and so does a new module without dropout."""
    for module in (fusedrnn.replace(nn.RNN(I, H)), fusedrnn.RNN(I, H), fusedrnn.LeakyRNN(I, H)):
        assert not {"recurrent_dropout", "zoneout", "weight_drop"} & set(vars(module))
        assert module.recurrent_dropout == module.zoneout == module.weight_drop == 0
        module(torch.randn(T, B, I))


def test_a_rate_may_be_changed_later():
    module, x = fusedrnn.replace(nn.RNN(I, H)), torch.randn(T, B, I)
    module.zoneout = 0.5
    want = fusedrnn.RNN(I, H, zoneout=0.5)
    want.load_state_dict(module.state_dict())
    assert_close(module.eval()(x), want.eval()(x), rtol=0, atol=0)


@every_rate
def test_restore_refuses_what_nn_rnn_cannot_do(rates):
    module = fusedrnn.RNN(I, H, **RATES[rates])
    model = nn.Sequential(fusedrnn.RNN(I, H), module)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    name, rate = next(iter(RATES[rates].items()))
    with pytest.raises(ValueError) as info:
        fusedrnn.restore(model)
    assert str(info.value) == f"fusedrnn: {name} must be 0 to restore a module, got {rate}"
    assert type(model[0]) is fusedrnn.RNN


# ---- other uses


@some_of_both
def test_compiles_into_one_graph(kind, rates):
    torch._dynamo.reset()
    module = build(kind, rates, bidirectional=True)
    reset, leaves = torch.rand(T, B) < 0.4, [*module.parameters()]
    lengths = torch.tensor(LENGTHS)

    def function(x: Tensor, hx: Tensor) -> Any:
        output = module(x, hx, reset=reset, reset_to=hx)[0]
        return output, *module(x, hx, reset=reset, reset_to=hx, lengths=lengths)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x, hx = torch.randn(T, B, I, **WIDE), torch.randn(2, B, H, **WIDE)
    results = []
    for run in (compiled, function):
        torch.manual_seed(1)
        found = run(x, hx)
        results.append((found, torch.autograd.grad(found[0].sin().sum(), leaves)))
    assert_close(*results)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "rate"])
def test_exports(kind, training):
    module = build(kind, "all", num_layers=2).train(training)
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        module, (torch.randn(T, B, I, **WIDE),), dynamic_shapes={"input": sizes}
    )
    x = torch.randn(T + 2, B + 1, I, **WIDE)
    results = []
    for run in (program.module(), module):
        torch.manual_seed(1)
        results.append(run(x))
    assert_close(*results)


@every_rate
@every_module
def test_vmap_follows_the_randomness_mode(kind, rates):
    module = build(kind, rates, num_layers=2, bidirectional=True)
    if hasattr(module, "noise"):
        module.noise = module.state_noise = 0.0
    x = torch.randn(1, T, B, I, **WIDE).repeat(4, 1, 1, 1)
    lengths = torch.tensor(LENGTHS)

    def run(x: Tensor) -> Any:
        return *module(x), *module(x, lengths=lengths)

    same = torch.vmap(run, randomness="same")(x)
    for result in same:
        assert_close(result, result[:1].expand_as(result))
    different = torch.vmap(run, randomness="different")(x)
    for result in different:
        assert (result[0] != result[1]).any()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(run)(x)
    module.eval()
    assert_close(torch.vmap(run)(x)[0][0], run(x[0])[0])


@every_rate
@pytest.mark.parametrize("kind", ["RNN", "potential", "inside"])
def test_per_sample_gradients(kind, rates):
    module = build(kind, rates, bidirectional=True)
    if kind == "inside":
        module.state_noise = 0.0
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x, reset = torch.randn(3, T, 2, I, **WIDE), torch.rand(3, T, 2) < 0.4

    def loss(weights: Any, x: Tensor, reset: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,), {"reset": reset})[0].sin().sum()

    gradient = torch.func.grad(loss)
    torch.manual_seed(1)
    found = torch.vmap(gradient, (None, 0, 0), randomness="same")(weights, x, reset)
    for row in range(3):
        torch.manual_seed(1)
        assert_close({n: g[row] for n, g in found.items()}, gradient(weights, x[row], reset[row]))


@every_rate
def test_checkpointing_repeats_the_masks(rates):
    module, x = build("RNN", rates, num_layers=2), torch.randn(T, B, I, **WIDE)
    assert_checkpointing_repeats_draws(module, x)


@pytest.mark.parametrize("kind", ["RNN", "rate", "potential", "inside"])
def test_autocast_computes_in_bfloat16(kind):
    module = build(kind, "all", num_layers=2, dtype=torch.float32)
    if kind in ("rate", "inside"):
        module.state_noise = 0.0  # its values differ between dtypes
    x = torch.randn(T, B, I)
    results = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, h_n = module(x, torch.randn(2, B, H), reset=torch.rand(T, B) < 0.4)
        results.append((output.float(), h_n.float()))
        if enabled:
            assert output.dtype == h_n.dtype == torch.bfloat16
            output.float().sum().backward()
            assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
    assert_close(*results, rtol=0.1, atol=0.05)


@every_rate
def test_meta_device(rates):
    module = build("rate", rates, device="meta")
    assert module(torch.randn(T, B, I, **WIDE, device="meta"))[0].shape == (T, B, H)


def test_dtypes_without_a_kernel_run_the_loop():
    module = fusedrnn.RNN(I, H, **RATES["all"], dtype=torch.complex128)
    functional._warn_slow.cache_clear()  # it warns once
    with pytest.warns(UserWarning, match="a plain loop over time runs instead"):
        assert module(torch.randn(T, B, I, dtype=torch.complex128))[0].is_complex()


def test_explain_names_the_layers():
    module = fusedrnn.RNN(I, H, 2, **RATES["all"])
    text = fusedrnn.explain(module, torch.randn(T, B, I))
    assert "each of layers 0 to 1: T 5, B 3, I 0, H 6" in text


def test_trace_applies_weight_drop_and_refuses_the_others():
    x = torch.randn(T, B, I, **WIDE)
    found = fusedrnn.trace(build("RNN", "weight_drop"), x)
    assert (found[0].w_hh == 0).any()
    for name, where in (("recurrent_dropout", "recurrent_dropout"), ("all", "recurrent_dropout")):
        with pytest.raises(ValueError, match=f"{where} must be 0 for a trace in training"):
            fusedrnn.trace(build("RNN", name), x)
    with pytest.raises(ValueError, match="zoneout must be 0 for a trace in training, got 0.3"):
        fusedrnn.trace(build("RNN", "zoneout"), x)
    module = build("RNN", "all").eval()
    found = fusedrnn.trace(module, x)
    assert_close(found[0].h, module(x)[0].detach())
    assert_close(found[0].alpha, torch.full((H,), 0.7, **WIDE))


def test_jacobian_refuses_zoneout():
    x, h = torch.randn(I, **WIDE), torch.randn(H, **WIDE)
    with pytest.raises(ValueError, match="zoneout must be 0 for a Jacobian, got 0.3"):
        fusedrnn.jacobian(build("RNN", "zoneout"), x, h)
    fusedrnn.jacobian(build("RNN", "weight_drop"), x, h)
