"""fusedrnn.replace and fusedrnn.restore: a model's nn.RNN and nn.RNNCell changed in place."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import fusedrnn

T, B, I, H = 5, 3, 4, 6


class Model(nn.Module):
    """Layers of several kinds; one nn.RNN is used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(I, H, 2, "relu", batch_first=True, dropout=0.5, bidirectional=True)
        self.head = nn.ModuleDict({"again": nn.RNN(2 * H, H), "cell": nn.RNNCell(H, H)})
        self.shared = self.head["again"]
        self.lstm = nn.LSTM(H, H)
        self.gru = nn.GRU(H, H)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(x)
        x, h = self.shared(x)
        h = self.head["cell"](h[0])
        return self.gru(self.lstm(x)[0])[0] + h


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_every_rnn_and_cell_is_replaced_and_nothing_else() -> None:
    model = fusedrnn.replace(Model())
    assert {n: type(m) for n, m in model.named_modules()} == {
        "": Model,
        "rnn": fusedrnn.RNN,
        "head": nn.ModuleDict,
        "head.again": fusedrnn.RNN,
        "head.cell": fusedrnn.RNNCell,
        "lstm": nn.LSTM,
        "gru": nn.GRU,
    }


def test_model_is_changed_in_place_and_returned() -> None:
    model = Model()
    assert fusedrnn.replace(model) is model


def test_model_computes_and_trains_as_before() -> None:
    models = Model(), Model()
    models[1].load_state_dict(models[0].state_dict())
    fusedrnn.replace(models[1])
    x = torch.randn(B, T, I)
    results = []
    for model in models:
        torch.manual_seed(1)  # the model is in training mode: dropout
        y = model(x)
        results.append((y, torch.autograd.grad(y.sum(), list(model.parameters()))))
    assert_close(*results)


@pytest.mark.parametrize("module", [nn.RNN(I, H), nn.RNNCell(I, H)], ids=["RNN", "RNNCell"])
def test_model_may_itself_be_an_rnn(module: nn.Module) -> None:
    x = torch.randn(B, I)
    before = copy.deepcopy(module)(x)
    after = fusedrnn.replace(copy.deepcopy(module))
    assert type(after) in (fusedrnn.RNN, fusedrnn.RNNCell)
    assert_close(after(x), before)


def test_shared_modules_stay_shared() -> None:
    model = Model()
    fusedrnn.replace(model)
    assert model.shared is model.head["again"]


def test_an_optimizer_made_before_keeps_working() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    fusedrnn.replace(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[n] is after[n] for n in before)

    weight = model.rnn.weight_hh_l0.detach().clone()
    model(torch.randn(B, T, I)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.rnn.weight_hh_l0, weight)


def test_settings_are_kept() -> None:
    model = Model().double().eval()
    model.rnn.train()
    model.rnn.weight_hh_l0.requires_grad_(False)
    model.rnn.register_buffer("steps", torch.zeros(1))
    model.rnn.remark = "kept"
    text, state = repr(model), model.state_dict()
    fusedrnn.replace(model)
    assert repr(model) == text
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model.rnn.training
    assert not model.head["cell"].training
    assert not model.rnn.weight_hh_l0.requires_grad
    assert model.rnn.remark == "kept"
    assert model.rnn.weight_ih_l0.dtype == torch.float64


def test_hooks_are_kept() -> None:
    model, seen = Model(), []
    model.rnn.register_forward_hook(lambda m, a, r: seen.append(type(m)))
    handle = model.rnn.register_forward_pre_hook(lambda m, a: seen.append("removed"))
    fusedrnn.replace(model)
    handle.remove()  # a handle made before replace() still works
    model(torch.randn(B, T, I))
    assert seen == [fusedrnn.RNN]


@pytest.mark.parametrize("legacy", [False, True], ids=["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_is_kept(legacy: bool) -> None:
    weight_norm = nn.utils.weight_norm if legacy else parametrizations.weight_norm
    theirs = weight_norm(nn.RNN(I, H), "weight_hh_l0")
    ours = weight_norm(nn.RNN(I, H), "weight_hh_l0")
    ours.load_state_dict(theirs.state_dict())
    fusedrnn.replace(ours)
    x = torch.randn(T, B, I)
    results = []
    for module in (ours, theirs):
        output, h_n = module(x)
        grads = torch.autograd.grad(output.sum(), list(module.parameters()))
        results.append((output, h_n, grads))
    assert_close(*results)


def test_parametrized_module_is_one_of_ours_afterwards() -> None:
    module = parametrizations.weight_norm(nn.RNN(I, H), "weight_hh_l0")
    replica = copy.deepcopy(module)  # shares its generated class with the module
    fusedrnn.replace(module)
    assert isinstance(module, fusedrnn.RNN)
    assert isinstance(replica, nn.RNN)
    assert isinstance(copy.deepcopy(module), fusedrnn.RNN)
    parametrizations.weight_norm(module, "weight_ih_l0")
    for name in ("weight_hh_l0", "weight_ih_l0"):
        parametrize.remove_parametrizations(module, name)
    assert type(module) is fusedrnn.RNN


def test_subclasses_are_left_alone() -> None:
    class Mine(nn.RNN):
        def forward(self, *args: Any) -> str:
            return "mine"

    model = nn.Sequential(Mine(I, H))
    fusedrnn.replace(model)
    assert type(model[0]) is Mine
    assert model(torch.zeros(T, B, I)) == "mine"


def test_a_parametrized_subclass_is_left_alone() -> None:
    class Mine(nn.RNN):
        pass

    module = parametrizations.weight_norm(Mine(I, H), "weight_hh_l0")
    fusedrnn.replace(module)
    assert isinstance(module, Mine)


def test_replacing_twice_changes_nothing_more() -> None:
    model = fusedrnn.replace(fusedrnn.replace(Model()))
    assert type(model.rnn) is fusedrnn.RNN


def test_replaced_model_can_be_pickled_and_moved() -> None:
    model = fusedrnn.replace(Model().eval())
    x = torch.randn(B, T, I)
    assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
    model.double()
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
    assert model(x.double()).dtype == torch.float64


@pytest.mark.parametrize("function", [fusedrnn.replace, fusedrnn.restore])
@pytest.mark.parametrize("bad", [None, "model", nn.RNN, [nn.RNN(I, H)]])
def test_anything_but_a_module_is_a_type_error(function: Any, bad: Any) -> None:
    with pytest.raises(TypeError, match=r"fusedrnn: model must be a torch\.nn\.Module, got \w+"):
        function(bad)


# ---- restore


def built_with_fusedrnn(monkeypatch: pytest.MonkeyPatch) -> Model:
    with monkeypatch.context() as patch:
        patch.setattr(nn, "RNN", fusedrnn.RNN)
        patch.setattr(nn, "RNNCell", fusedrnn.RNNCell)
        return Model()


def test_restore_gives_a_model_as_torch_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the attributes of each module are equal, however the model was made."""
    theirs = Model()
    for model in (fusedrnn.replace(Model()), built_with_fusedrnn(monkeypatch)):
        assert type(model.rnn) is fusedrnn.RNN
        assert fusedrnn.restore(model) is model
        assert repr(model) == repr(theirs)
        for ours, torchs in zip(model.modules(), theirs.modules(), strict=True):
            assert type(ours) is type(torchs)
            assert set(vars(ours)) == set(vars(torchs))
        model.load_state_dict(theirs.state_dict())
        x = torch.randn(B, T, I)
        torch.manual_seed(1)  # dropout
        y = model(x)
        torch.manual_seed(1)
        assert_close(y, theirs(x), rtol=0, atol=0)


def test_restore_keeps_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = built_with_fusedrnn(monkeypatch), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.rnn.register_forward_hook(lambda m, a, r: seen.append(type(m)))
    before = dict(model.named_parameters())
    fusedrnn.restore(model)
    assert model.shared is model.head["again"]
    assert all(before[n] is p for n, p in model.named_parameters())
    weight = model.rnn.weight_hh_l0.detach().clone()
    model(torch.randn(B, T, I)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.rnn.weight_hh_l0, weight)
    assert seen == [nn.RNN]


def test_restored_modules_list_their_weights_for_cudnn() -> None:
    rnn = fusedrnn.RNN(I, H, 2, bidirectional=True)
    rnn.weight_hh_l1 = nn.Parameter(torch.randn(H, H))
    fusedrnn.restore(rnn)
    assert [id(w) for w in rnn._flat_weights] == [id(w) for w in rnn.parameters()]
    for module in (rnn.double(), copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        module.flatten_parameters()
        assert [id(w) for w in module._flat_weights] == [id(w) for w in module.parameters()]
    rnn.weight_hh_l0 = nn.Parameter(torch.zeros(H, H, dtype=torch.float64))
    assert rnn._flat_weights[1] is rnn.weight_hh_l0


@pytest.mark.parametrize("legacy", [False, True], ids=["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_survives_restore(legacy: bool) -> None:
    weight_norm = nn.utils.weight_norm if legacy else parametrizations.weight_norm
    theirs = weight_norm(nn.RNN(I, H), "weight_hh_l0")
    ours = weight_norm(fusedrnn.RNN(I, H), "weight_hh_l0")
    ours.load_state_dict(theirs.state_dict())
    fusedrnn.restore(ours)
    assert isinstance(ours, nn.RNN)
    x = torch.randn(T, B, I)
    results = []
    for module in (ours, theirs):
        output, h_n = module(x)
        results.append((output, torch.autograd.grad(h_n.sum(), list(module.parameters()))))
    assert_close(*results, rtol=0, atol=0)


def test_parametrized_modules_survive_the_round_trip() -> None:
    module = parametrizations.weight_norm(fusedrnn.RNN(I, H), "weight_hh_l0")
    assert isinstance(copy.deepcopy(fusedrnn.restore(module)), nn.RNN)
    assert isinstance(fusedrnn.replace(module), fusedrnn.RNN)
    fusedrnn.restore(module)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is nn.RNN


def test_restore_leaves_other_classes_alone() -> None:
    class Mine(fusedrnn.RNN):
        pass

    model = nn.Sequential(Mine(I, H), nn.LSTM(H, H), nn.RNN(H, H))
    weights = model[2]._flat_weights
    fusedrnn.restore(model)
    assert [type(m) for m in model] == [Mine, nn.LSTM, nn.RNN]
    assert model[2]._flat_weights is weights


def test_replace_undoes_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built_with_fusedrnn(monkeypatch).eval()
    classes = [type(m) for m in model.modules()]
    x = torch.randn(B, T, I)
    y = model(x)
    assert_close(fusedrnn.restore(model)(x), y)
    fusedrnn.replace(model)
    assert [type(m) for m in model.modules()] == classes
    assert_close(model(x), y, rtol=0, atol=0)


def test_restored_model_loads_where_fusedrnn_is_not_installed(tmp_path: Path) -> None:
    rnn = fusedrnn.restore(fusedrnn.RNN(I, H, 2))
    x = torch.randn(T, B, I)
    torch.save([rnn, x, rnn(x)[0].detach()], tmp_path / "model.pt")
    code = """
import sys
sys.modules["fusedrnn"] = None
import torch
rnn, x, output = torch.load("model.pt", weights_only=False)
assert type(rnn) is torch.nn.RNN
torch.testing.assert_close(rnn(x)[0].detach(), output)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
