"""fusedrnn.LeakyRNN and fusedrnn.LeakyRNNCell against the reference, layer by layer."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_oracle import (
    assert_checkpointing_repeats_draws,
    assert_matches,
    data_of,
    expected,
    pack,
    state_for,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn import reference

T, B, I, H = 5, 3, 4, 6
LENGTHS = [3, 5, 1]  # unsorted
FORMS = ["rate", "potential", "inside"]
WIDE = {"dtype": torch.float64}


def packed(values: Tensor, enforce_sorted: bool = False) -> PackedSequence:
    return pack(values, LENGTHS, enforce_sorted)


INPUTS: dict[str, Callable[[], Any]] = {
    "batched": lambda: torch.randn(T, B, I, **WIDE),
    "unbatched": lambda: torch.randn(T, I, **WIDE),
    "packed": lambda: packed(torch.randn(T, B, I, **WIDE)),
    "packed, sorted": lambda: packed(torch.randn(T, B, I, **WIDE), True),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"num_layers": 2, "batch_first": True},
    "no bias": {"bias": False, "bidirectional": True},
}


def leaky(*args: Any, **kwargs: Any) -> fusedrnn.LeakyRNN:
    return fusedrnn.LeakyRNN(*(args or (I, H)), **{**WIDE, **kwargs})


def alphas_for(x: Any) -> dict[str, Any]:
    rows = data_of(x).shape[:-1]
    return {
        "of a step": torch.rand(*rows, **WIDE),
        "of a step, with a last dimension": torch.rand(*rows, 1, **WIDE),
        "of a unit": torch.rand(*rows, H, **WIDE),
    }


# ---- results


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_form_matches_the_reference(layout, kind, form):
    module = leaky(form=form, alpha=0.3, nonlinearity="softplus", **LAYOUTS[layout])
    x = INPUTS[kind]()
    rows = data_of(x).shape[:-1]
    leaks = [0.3] * len(module._all_weights)
    options = {"form": form, "nonlinearity": "softplus", "leaks": leaks}
    potential = {"return_potential": form == "potential"}
    hx = state_for(module, x, **WIDE)
    for state in (None, hx):
        want = expected(module, x, state, **options)
        assert_matches(module, x, module(x, state, **potential), want)
    reset, target = torch.rand(rows) < 0.4, torch.randn(H, **WIDE)
    results = module(x, hx, reset=reset, reset_to=target, **potential)
    assert len(results) == (3 if form == "potential" else 2)
    want = expected(module, x, hx, reset=reset, reset_to=target, **options)
    assert_matches(module, x, results, want)


@pytest.mark.parametrize("alpha", ["of a step", "of a step, with a last dimension", "of a unit"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("layout", ["deep", "batch_first"])
def test_alpha_of_a_call_replaces_the_modules_alpha(layout, kind, alpha):
    module = leaky(alpha=0.9, **LAYOUTS[layout])
    x = INPUTS[kind]()
    value = alphas_for(x)[alpha]
    assert_matches(module, x, module(x, alpha=value), expected(module, x, alpha=value))
    if isinstance(x, PackedSequence):
        as_packed = x._replace(data=value)
        assert torch.equal(module(x, alpha=as_packed)[0].data, module(x, alpha=value)[0].data)


def test_packed_alpha_of_a_step_is_not_taken_for_one_of_a_unit():
    """Both are [N] and [H] when N equals H."""
    module = leaky(I, 4, alpha=0.9)
    x = PackedSequence(torch.randn(4, I, **WIDE), torch.tensor([2, 1, 1]))
    alpha = torch.rand(4, **WIDE)
    assert_close(module(x, alpha=alpha)[0].data, module(x, alpha=alpha[:, None])[0].data)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.2},
        {"alpha": torch.tensor(0.2, **WIDE)},
        {"alpha": torch.linspace(0, 1, H, **WIDE)},
        {"tau": 100, "dt": 20},
        {"tau": torch.linspace(1, 3, H, **WIDE), "dt": 0.5},
        {"alpha": 1},
        {},
    ],
    ids=lambda options: ", ".join(options) or "none",
)
def test_alpha_of_the_module(options):
    module, x = leaky(2 * I, H, **options), torch.randn(T, B, 2 * I, **WIDE)
    alpha = options.get("alpha", 1)
    if "tau" in options:
        alpha = options["dt"] / options["tau"]
    assert_matches(module, x, module(x), expected(module, x, leaks=[alpha]))


def test_by_default_results_equal_those_of_rnn():
    for layout in LAYOUTS.values():
        ours, plain = leaky(**layout), fusedrnn.RNN(I, H, **layout, **WIDE)
        ours.load_state_dict(plain.state_dict())
        x = torch.randn(T, B, I, **WIDE)
        assert_close(ours(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("nonlinearity", reference.NONLINEARITIES)
def test_every_nonlinearity(nonlinearity):
    module, x = leaky(nonlinearity=nonlinearity, alpha=0.5), torch.randn(T, B, I, **WIDE)
    want = expected(module, x, leaks=[0.5], nonlinearity=nonlinearity)
    assert_matches(module, x, module(x), want)


def test_state_and_potential_of_the_potential_form():
    module, x = leaky(form="potential", alpha=0.3), torch.randn(T, B, I, **WIDE)
    output, v_n, v = module(x, return_potential=True)
    assert_close(output, torch.tanh(v))
    assert_close(v_n[0], v[-1])
    halves = module(x[:2]), module(x[2:], module(x[:2])[1])
    assert_close(torch.cat([half[0] for half in halves]), output)


def test_dropout_is_applied_between_layers_in_training():
    module, x = leaky(I, H, 2, alpha=0.5, dropout=1.0), torch.randn(T, B, I, **WIDE)
    no_input = expected(module.eval(), x, leaks=[0.5, 0.5])
    assert_matches(module, x, module(x), no_input)
    output, _ = module.train()(x)
    assert_close(output[:, 0], output[:, 1])  # the second layer sees zeros


# ---- learning


def gradients(outputs: Any, module: nn.Module, *leaves: Tensor) -> list[Tensor]:
    loss = sum((part.sin() * (i + 1)).sum() for i, part in enumerate(outputs))
    return list(torch.autograd.grad(loss, [*module.parameters(), *leaves]))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_a_learned_alpha(form):
    module = leaky(I, H, 2, bidirectional=True, form=form, alpha=0.3, learn_alpha=True)
    names = [n for n, _ in module.named_parameters() if "alpha" in n]
    assert names == [f"alpha_logit_l{k}{d}" for k in range(2) for d in ("", "_reverse")]
    assert module.alpha is None
    for name in names:
        assert_close(torch.sigmoid(getattr(module, name)), torch.full((H,), 0.3, **WIDE))
    with torch.no_grad():
        for name in names:
            getattr(module, name).copy_(torch.randn(H))
    x = torch.randn(T, B, I, **WIDE, requires_grad=True)
    leaks = [torch.sigmoid(getattr(module, name)) for name in names]
    want = expected(module, x, form=form, leaks=leaks)
    outputs = [torch.stack([row[i] for row in want], 1) for i in range(2)]
    results = module(x)
    assert_close(list(results), outputs)
    assert_close(gradients(results, module, x), gradients(outputs, module, x))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_alpha_state_and_reset_target_of_a_call(form):
    module, x = leaky(form=form, alpha=0.3, nonlinearity="sigmoid"), torch.randn(T, B, I, **WIDE)
    leaves = {
        "alpha": torch.rand(T, B, H, **WIDE, requires_grad=True),
        "reset_to": torch.randn(1, B, H, **WIDE, requires_grad=True),
        "hx": torch.randn(1, B, H, **WIDE, requires_grad=True),
    }
    reset = torch.rand(T, B) < 0.4
    want = expected(module, x, reset=reset, form=form, nonlinearity="sigmoid", **leaves)
    outputs = [torch.stack([row[i] for row in want], 1) for i in range(2)]
    got = module(x, reset=reset, **leaves)
    assert_close(
        gradients(got, module, *leaves.values()), gradients(outputs, module, *leaves.values())
    )


def test_a_learned_alpha_changes_in_training():
    module, x = leaky(alpha=0.5, learn_alpha=True), torch.randn(T, B, I, **WIDE)
    target = leaky(alpha=0.1)
    target.load_state_dict(module.state_dict(), strict=False)
    wanted = target(x)[0].detach()
    optimizer = torch.optim.Adam([module.alpha_logit_l0], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        (module(x)[0] - wanted).square().sum().backward()
        optimizer.step()
    assert (torch.sigmoid(module.alpha_logit_l0) - 0.1).abs().max() < 0.05


# ---- noise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


NOISY = {"noise": 0.3, "state_noise": 0.2}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", INPUTS)
def test_one_seed_gives_the_same_bits(kind, form):
    module, x = leaky(I, H, 2, bidirectional=True, form=form, alpha=0.3, **NOISY), INPUTS[kind]()
    first, again, other = (module(x, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(data_of(first[0]), data_of(again[0]))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(data_of(first[0]), data_of(other[0]))
    torch.manual_seed(3)
    from_default = module(x)
    torch.manual_seed(3)
    assert torch.equal(data_of(module(x)[0]), data_of(from_default[0]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_noise_enters_where_the_equations_say(form, bias):
    module = leaky(form=form, alpha=0.3, bias=bias, **NOISY)
    x = torch.randn(T, B, I, **WIDE)
    generator = seeded()
    drive, added = (torch.randn(T, B, H, generator=generator, **WIDE) for _ in range(2))
    w_ih, w_hh, *biases = module._flat_weights
    u = x @ w_ih.T + sum(biases) + 0.3 * drive
    want = reference.rnn(
        u, None, w_hh, form=form, alpha=0.3, state_input=0.2 * added,
    )  # fmt: skip
    output, h_n = module(x, generator=seeded())
    assert_close(output, want[0])
    assert_close(h_n[0], want[1])
    leaves = list(module.parameters())
    assert_close(
        torch.autograd.grad(output.square().sum(), leaves),
        torch.autograd.grad(want[0].square().sum(), leaves),
    )


def test_noise_has_the_given_standard_deviation():
    for options in ({"noise": 0.7}, {"state_noise": 0.7}):
        module = leaky(1, 50, nonlinearity="identity", bias=False, **options)
        with torch.no_grad():
            for weight in module.parameters():
                weight.zero_()
            values = module(torch.zeros(100, 40, 1, **WIDE), generator=seeded())[0]
        assert abs(values.mean()) < 0.01
        assert abs(values.std() - 0.7) < 0.01
        flat = values.flatten(1)  # steps are independent
        assert torch.corrcoef(flat[:2])[0, 1].abs() < 0.1


def test_noise_is_off_in_eval_and_can_be_turned_on_for_the_layer_alone():
    model = nn.Sequential(leaky(alpha=0.3, **NOISY), nn.Identity()).eval()
    silent = leaky(alpha=0.3)
    silent.load_state_dict(model[0].state_dict())
    x = torch.randn(T, B, I, **WIDE)
    state = torch.get_rng_state()
    assert_close(model(x), silent(x), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    model[0].train()
    assert (model(x)[0] != silent(x)[0]).all()


def test_layers_and_directions_have_noise_of_their_own():
    module = leaky(1, 30, bidirectional=True, nonlinearity="identity", bias=False, noise=1.0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
        forward, reverse = module(torch.zeros(20, 5, 1, **WIDE))[0].chunk(2, -1)
    assert torch.corrcoef(torch.stack([forward.flatten(), reverse.flatten()]))[0, 1].abs() < 0.1


# ---- construction, state, copies


def test_signature():
    names = (
        "input_size hidden_size num_layers nonlinearity form alpha tau dt learn_alpha noise "
        "state_noise bias batch_first dropout bidirectional device dtype checkpoint_every truncate "
        "grad_clip recurrent_dropout zoneout weight_drop"
    )
    assert list(inspect.signature(fusedrnn.LeakyRNN).parameters) == names.split()
    names = (
        "input hx reset reset_to alpha generator return_potential lengths padding_value "
        "return_all_layers last_only"
    )
    assert list(inspect.signature(leaky().forward).parameters) == names.split()


def test_one_seed_gives_the_weights_of_nn_rnn():
    for cls, torch_cls in ((fusedrnn.LeakyRNN, nn.RNN), (fusedrnn.LeakyRNNCell, nn.RNNCell)):
        torch.manual_seed(7)
        ours, after_ours = cls(I, H, alpha=0.2, learn_alpha=True), torch.rand(1)
        torch.manual_seed(7)
        theirs, after_theirs = torch_cls(I, H), torch.rand(1)
        for name, weight in theirs.named_parameters():
            assert torch.equal(getattr(ours, name), weight)
        assert torch.equal(after_ours, after_theirs)


REPRS = {
    "": "4, 6",
    "num_layers=2, nonlinearity='relu', batch_first=True": (
        "4, 6, num_layers=2, batch_first=True, nonlinearity=relu"
    ),
    "form='potential', tau=100, dt=20, noise=0.1, state_noise=0.25": (
        "4, 6, form=potential, alpha=0.2, noise=0.1, state_noise=0.25"
    ),
    "alpha=0.2, learn_alpha=True": "4, 6, alpha=0.2, learn_alpha=True",
    "alpha=torch.full((6,), 0.5)": "4, 6, alpha=[6]",
    "alpha=0.2, device='meta'": "4, 6, alpha=[]",
}


@pytest.mark.parametrize("arguments", REPRS)
def test_repr(arguments):
    module = eval(f"fusedrnn.LeakyRNN(4, 6, {arguments})")
    assert repr(module) == f"LeakyRNN({REPRS[arguments]})"


def test_repr_of_a_cell():
    cell = fusedrnn.LeakyRNNCell(4, 6, False, "relu", form="inside", alpha=0.5)
    assert repr(cell) == "LeakyRNNCell(4, 6, bias=False, nonlinearity=relu, form=inside, alpha=0.5)"


CLASSES = [fusedrnn.LeakyRNN, fusedrnn.LeakyRNNCell]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_alpha_is_in_the_state_dict(cls, learned):
    first, second = (cls(I, H, alpha=alpha, learn_alpha=learned) for alpha in (0.2, 0.7))
    assert any("alpha" in name for name in first.state_dict())
    second.load_state_dict(first.state_dict())
    assert_close(second(torch.ones(2, I)), first(torch.ones(2, I)))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("cls", "torch_cls"), [(fusedrnn.LeakyRNN, nn.RNN), (fusedrnn.LeakyRNNCell, nn.RNNCell)]
)
def test_a_state_dict_of_torch_loads_and_leaves_alpha(cls, torch_cls, learned):
    theirs = torch_cls(I, H)
    model = nn.ModuleDict({"rnn": cls(I, H, alpha=0.25, learn_alpha=learned)})
    model.load_state_dict(nn.ModuleDict({"rnn": theirs}).state_dict())
    ours = model["rnn"]
    for name, weight in theirs.named_parameters():
        assert torch.equal(getattr(ours, name), weight)
    assert ours._alpha_of(0).flatten()[0].item() == pytest.approx(0.25)
    incomplete = dict(theirs.state_dict())
    missing = incomplete.popitem()[0]
    with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
        ours.load_state_dict(incomplete)


def test_a_state_dict_with_a_part_of_alpha_is_refused():
    ours = fusedrnn.LeakyRNN(I, H, 2, alpha=0.25, learn_alpha=True)
    state = ours.state_dict()
    del state["alpha_logit_l1"]
    with pytest.raises(RuntimeError, match="Missing key.*alpha_logit_l1"):
        ours.load_state_dict(state)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_copies_and_pickles_compute_the_same(cls, learned):
    def through_torch_save(module: nn.Module) -> nn.Module:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        return torch.load(buffer)  # weights_only

    alpha = torch.linspace(0.1, 0.9, H)
    module = cls(I, H, form="potential", alpha=alpha, learn_alpha=learned)
    x = torch.randn(B, I)
    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save):
        replica = duplicate(module)
        assert type(replica) is cls
        assert repr(replica) == repr(module)
        assert_close(replica(x), module(x), rtol=0, atol=0)
        replica.double()
        assert {t.dtype for t in replica.state_dict().values()} == {torch.float64}
        replica(x.double())
        replica.reset_parameters()
        assert_close(replica._alpha_of(0), alpha.double())


@pytest.mark.parametrize("learned", [False, True])
def test_reset_parameters_restores_alpha_and_draws_the_weights_as_nn_rnn(learned):
    module = fusedrnn.LeakyRNN(I, H, 2, alpha=0.25, learn_alpha=learned, device="meta")
    module.to_empty(device="cpu")
    torch.manual_seed(1)
    module.reset_parameters()
    torch.manual_seed(1)
    theirs = nn.RNN(I, H, 2)
    assert all(torch.equal(getattr(module, n), w) for n, w in theirs.named_parameters())
    assert module._alpha_of(1).flatten()[0].item() == pytest.approx(0.25)


def test_the_constructor_keeps_a_copy_of_alpha():
    alpha = torch.full((H,), 0.5)
    module = fusedrnn.LeakyRNN(I, H, alpha=alpha)
    alpha.fill_(7)
    module.reset_parameters()
    assert torch.equal(module.alpha, torch.full((H,), 0.5))


@pytest.mark.parametrize("cls", CLASSES)
def test_skip_init_and_meta(cls):
    assert isinstance(nn.utils.skip_init(cls, I, H, alpha=0.5), cls)
    module = cls(I, H, alpha=torch.full((H,), 0.5, device="meta"), device="meta")
    results = module(torch.empty(B, I, device="meta"))
    assert (results if isinstance(results, Tensor) else results[0]).shape == (B, H)


# ---- the cell


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_loop_of_the_cell_is_the_layer(form, bias):
    options = {"form": form, "nonlinearity": "softplus", "alpha": 0.3, "learn_alpha": True}
    layer = leaky(bias=bias, **options)
    cell = fusedrnn.LeakyRNNCell(I, H, bias, **options, **WIDE)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, hx = torch.randn(T, B, I, **WIDE), torch.randn(1, B, H, **WIDE)
    for start in (None, hx):
        state = None if start is None else start[0]
        found = torch.stack([state := cell(step, state) for step in x])
        output = nn.functional.softplus(found) if form == "potential" else found
        assert_close(output, layer(x, start)[0])
    assert_close(cell(x[0, 0]), cell(x[0, :1])[0])
    assert_close(cell(x[0, 0], hx[0, 0]), cell(x[0, :1], hx[0, :1])[0])


def test_noise_of_the_cell():
    cell = fusedrnn.LeakyRNNCell(I, H, alpha=0.3, **NOISY, **WIDE)
    x = torch.randn(B, I, **WIDE)
    first, again, other = (cell(x, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    layer = leaky(alpha=0.3, **NOISY)
    layer.load_state_dict({
        k if k == "alpha" else f"{k}_l0": v for k, v in cell.state_dict().items()
    })  # fmt: skip
    assert_close(layer(x[None], generator=seeded(1))[0][0], first)
    cell.eval()
    assert torch.equal(cell(x), cell(x))


# ---- errors

CONSTRUCTOR_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"alpha": 0}, ValueError, "alpha must be in (0, 1], got 0.0"),
    ({"alpha": 1.5}, ValueError, "alpha must be in (0, 1], got 1.5"),
    ({"alpha": -0.1}, ValueError, "alpha must be in (0, 1], got -0.1"),
    ({"alpha": float("nan")}, ValueError, "alpha must be in (0, 1], got nan"),
    ({"alpha": "a"}, TypeError, "alpha must be a number or a tensor, got str"),
    ({"alpha": [0.5] * H}, TypeError, "alpha must be a number or a tensor, got list"),
    ({"alpha": torch.tensor(1.5)}, ValueError, "alpha must be in [0, 1], got 1.5"),
    ({"alpha": torch.ones(H).index_fill(0, torch.tensor(2), -1)}, ValueError,
     "alpha must be in [0, 1], got -1.0"),
    ({"alpha": torch.ones(H + 1)}, ValueError,
     "alpha must be a number or a tensor [] or [6], got [7]"),
    ({"alpha": torch.ones(H, dtype=torch.int64)}, TypeError,
     "alpha must be floating-point, got torch.int64"),
    ({"tau": 100}, ValueError, "dt must be given with tau, got None"),
    ({"dt": 20}, ValueError, "tau must be given with dt, got None"),
    ({"alpha": 0.2, "tau": 100, "dt": 20}, ValueError,
     "alpha must be None with tau and dt, got 0.2"),
    ({"alpha": 0.2, "tau": 100}, ValueError, "alpha must be None with tau and dt, got 0.2"),
    ({"tau": 10, "dt": 15}, ValueError, "dt / tau must be in (0, 1], got 1.5"),
    ({"tau": 0, "dt": 1}, ValueError, "tau must be above 0, got 0.0"),
    ({"tau": torch.tensor([1.0, -2.0]), "dt": 1}, ValueError, "tau must be above 0, got -2.0"),
    ({"tau": 1, "dt": -1}, ValueError, "dt must be above 0, got -1.0"),
    ({"tau": "a", "dt": 1}, TypeError, "tau must be a number or a tensor, got str"),
    ({"learn_alpha": True}, ValueError, "alpha must be in (0, 1) with learn_alpha, got None"),
    ({"learn_alpha": True, "alpha": 1}, ValueError,
     "alpha must be in (0, 1) with learn_alpha, got 1.0"),
    ({"learn_alpha": True, "alpha": torch.tensor(0.0)}, ValueError,
     "alpha must be in (0, 1) with learn_alpha, got 0.0"),
    ({"form": "volt"}, ValueError, "form must be one of rate, potential, inside, got 'volt'"),
    ({"nonlinearity": "foo"}, ValueError,
     f"nonlinearity must be one of {', '.join(reference.NONLINEARITIES)}, got 'foo'"),
    ({"noise": -1}, ValueError, "noise must be at least 0 and finite, got -1"),
    ({"state_noise": float("inf")}, ValueError,
     "state_noise must be at least 0 and finite, got inf"),
    ({"noise": "loud"}, TypeError, "noise must be a number, got str"),
]  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTOR_ERRORS, ids=str)
def test_constructor_errors(cls, arguments, error, message):
    with pytest.raises(error) as info:
        cls(I, H, **arguments)
    assert str(info.value) == f"fusedrnn: {message}"


def test_errors_of_nn_rnn_remain():
    for arguments in ({"dropout": 1.5}, {"bias": 1}, {"num_layers": 0}, {"hidden_size": 0}):
        arguments = {"input_size": I, "hidden_size": H, **arguments}
        with pytest.raises(Exception) as theirs:
            nn.RNN(**arguments)
        with pytest.raises(theirs.type) as ours:
            fusedrnn.LeakyRNN(**arguments)
        assert str(ours.value) == str(theirs.value)


X = torch.zeros(T, B, I)
CALL_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"return_potential": True}, ValueError,
     "return_potential must be False unless form is 'potential', got True with form 'rate'"),
    ({"alpha": torch.ones(B, T)}, RuntimeError,
     "alpha must have sizes [5, 3], [5, 3, 1] or [5, 3, 6], got [3, 5]"),
    ({"alpha": torch.ones(H)}, RuntimeError,
     "alpha must have sizes [5, 3], [5, 3, 1] or [5, 3, 6], got [6]"),
    ({"alpha": 0.5}, TypeError, "alpha must be a tensor, got float"),
    ({"reset_to": torch.zeros(H)}, ValueError,
     "reset must be a tensor if reset_to is given, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), CALL_ERRORS, ids=str)
def test_call_errors(arguments, error, message):
    with pytest.raises(error) as info:
        fusedrnn.LeakyRNN(I, H, alpha=0.5)(X, **arguments)
    assert str(info.value) == f"fusedrnn: {message}"


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_alpha_of_a_call_must_be_in_range(value):
    alpha = torch.full((T, B), 0.5)
    alpha[2, 1] = value
    with pytest.raises(ValueError, match=f"alpha must be in .0, 1., got {value}"):
        fusedrnn.LeakyRNN(I, H)(X, alpha=alpha)


CELL_CALL_ERRORS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((X,), ValueError, "input must be [B, I] or [I], got [5, 3, 4]"),
    ((X[0, :, :3],), RuntimeError, "input must have 4 features, got 3"),
    ((X[0], torch.zeros(H)), ValueError, "hx must be [B, H], got [6]"),
    ((X[0, 0], torch.zeros(1, H)), ValueError, "hx must be [H], got [1, 6]"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CELL_CALL_ERRORS, ids=str)
def test_cell_call_errors(arguments, error, message):
    with pytest.raises(error) as info:
        fusedrnn.LeakyRNNCell(I, H)(*arguments)
    assert str(info.value) == f"fusedrnn: {message}"


# ---- transforms


@pytest.mark.parametrize("form", FORMS)
def test_compiles_into_one_graph(form):
    torch._dynamo.reset()
    options = {"form": form, "alpha": 0.3, "learn_alpha": True, **NOISY}
    module = leaky(I, H, 2, bidirectional=True, batch_first=True, **options)
    x, reset = torch.randn(B, T, I, **WIDE), torch.rand(B, T) < 0.4
    arguments = {"reset": reset, "reset_to": torch.randn(4, H, **WIDE)}
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, module):
        torch.manual_seed(1)
        output, h_n = function(x, state_for(module, x, **WIDE) * 0, **arguments)
        results.append((output, h_n, *torch.autograd.grad(output.sum(), module.parameters())))
    assert_close(*results)


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_compiles_a_packed_batch_into_one_graph(enforce_sorted):
    torch._dynamo.reset()
    module = leaky(bidirectional=True, form="potential", alpha=0.3)
    x = packed(torch.randn(T, B, I, **WIDE), enforce_sorted)
    reset, alpha = torch.rand(len(x.data)) < 0.4, torch.rand(len(x.data), H, **WIDE)

    def function(x: Any, reset: Tensor, alpha: Tensor) -> Any:
        results = module(x, reset=reset, alpha=alpha, return_potential=True)
        return results[0].data, results[1], results[2].data

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, reset, alpha), function(x, reset, alpha))


def test_a_generator_breaks_the_graph_and_gives_the_same_noise():
    torch._dynamo.reset()
    module, x = leaky(alpha=0.3, **NOISY), torch.randn(T, B, I, **WIDE)
    compiled = torch.compile(module, backend="eager")
    assert_close(compiled(x, generator=seeded()), module(x, generator=seeded()))


@pytest.mark.parametrize("form", FORMS)
def test_per_sample_gradients_by_vmap_and_grad(form):
    module = leaky(form=form, alpha=0.3, learn_alpha=True)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x, reset = torch.randn(B, T, I, **WIDE), torch.rand(B, T) < 0.4

    def loss(weights: Any, x: Tensor, reset: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,), {"reset": reset})[0].sin().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, reset)
    for row in range(B):
        want = torch.func.grad(loss)(weights, x[row], reset[row])
        assert_close({name: g[row] for name, g in got.items()}, want)


def test_noise_under_vmap_follows_the_randomness_mode():
    module, x = leaky(alpha=0.3, **NOISY), torch.zeros(4, T, B, I, **WIDE)
    same = torch.vmap(lambda x: module(x)[0], randomness="same")(x)
    assert_close(same[0], same[1])
    different = torch.vmap(lambda x: module(x)[0], randomness="different")(x)
    assert (different[0] != different[1]).all()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: module(x)[0])(x)


def test_checkpointing_repeats_the_noise_of_the_default_generator():
    module, x = leaky(alpha=0.3, **NOISY), torch.randn(T, B, I, **WIDE)
    assert_checkpointing_repeats_draws(module, x)


def test_autocast_computes_in_bfloat16():
    module = fusedrnn.LeakyRNN(I, H, 2, form="potential", alpha=0.3, **NOISY)
    with torch.autocast("cpu", torch.bfloat16):
        output, v_n = module(torch.randn(T, B, I))
    assert output.dtype == v_n.dtype == torch.bfloat16
    output.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
