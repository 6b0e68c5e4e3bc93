"""Programs that load, trace, script, quantize, initialise, or count the operations of a module.

These tests check what the Limits of README say about such programs, mostly with stand-ins for them.
"""

from __future__ import annotations

import copy
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import fusedrnn

T, B, I, H = 5, 3, 4, 6
OURS = (fusedrnn.RNN, fusedrnn.RNNCell)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(I, H, 2, batch_first=True)
        self.cell = nn.RNNCell(H, H)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.head(self.cell(output[:, -1]))


@pytest.fixture
def model() -> Model:
    return fusedrnn.replace(Model().eval())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, T, I)


def python(code: str, cwd: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=cwd, env=env, check=True)


# ---- loading


def results(rnn: nn.Module, cell: nn.Module) -> list[Tensor]:
    """Return results and gradients of two modules, which are the same in any process."""
    torch.set_num_threads(1)
    x = torch.linspace(-1, 1, T * B * I).view(T, B, I)
    output, h_n = rnn(x)
    packed, _ = rnn(pack_padded_sequence(x, torch.tensor([2, T, 1]), enforce_sorted=False))
    h = cell(x[0], cell(x[1]))
    tensors = [output, h_n, packed.data, h]
    weights = [*rnn.parameters(), *cell.parameters()]
    loss = sum(t.sin().sum() for t in tensors)
    return [*(t.detach() for t in tensors), *torch.autograd.grad(loss, weights)]


def test_whole_modules_load_in_a_process_that_imported_fusedrnn(tmp_path: Path) -> None:
    """weights_only=True is torch.load's default. Safe globals that the user added are kept."""
    rnn = fusedrnn.RNN(I, H, 2, "relu", bidirectional=True)
    cell = fusedrnn.RNNCell(I, H)
    torch.save({"rnn": rnn, "cell": cell}, tmp_path / "modules.pt")
    python(
        "import torch\n"
        "torch.serialization.add_safe_globals([torch.nn.Linear])\n"
        "import fusedrnn\n"
        "assert torch.nn.Linear in torch.serialization.get_safe_globals()\n"
        "modules = torch.load('modules.pt')\n"
        "from test_other_programs import results\n"
        "torch.save(results(**modules), 'results.pt')",
        tmp_path,
    )
    found = torch.load(tmp_path / "results.pt")
    assert_close(found, results(rnn, cell), rtol=0, atol=0)


def test_loading_a_model_needs_only_its_other_classes_made_safe(model: Model, x: Tensor) -> None:
    """By default, torch.load allows no module class, not even nn.RNN."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) == {
        f"{Model.__module__}.Model",
        "torch.nn.modules.linear.Linear",
    }
    file.seek(0)
    with torch.serialization.safe_globals([Model, nn.Linear]):
        assert_close(torch.load(file)(x), model(x), rtol=0, atol=0)


def test_a_traced_file_loads_after_fusedrnn_is_imported(tmp_path: Path) -> None:
    rnn = fusedrnn.RNN(I, H)
    x = torch.randn(T, B, I)
    torch.jit.trace(rnn, (x,)).save(str(tmp_path / "traced.pt"))
    torch.save([x, rnn(x)[0].detach()], tmp_path / "expected.pt")
    python(
        "import torch\n"
        "try: torch.jit.load('traced.pt')\n"
        "except RuntimeError as error: assert 'fusedrnn::activation' in str(error)\n"
        "else: raise AssertionError\n"
        "import fusedrnn\n"
        "x, expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(torch.jit.load('traced.pt')(x)[0].detach(), expected)",
        tmp_path,
    )


# ---- torch.fx


class LeafTracer(fx.Tracer):
    """The tracer shown in the docstring of fusedrnn.RNN."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, OURS) or super().is_leaf_module(m, module_qualified_name)


def leaves(traced: fx.GraphModule) -> list[type]:
    return [
        type(traced.get_submodule(n.target)) for n in traced.graph.nodes if n.op == "call_module"
    ]


def test_fx_traces_a_model_with_our_modules_as_leaves(model: Model, x: Tensor) -> None:
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(model)
    traced = fx.GraphModule(model, LeafTracer().trace(model))
    assert leaves(traced) == [fusedrnn.RNN, fusedrnn.RNNCell, nn.Linear]
    assert_close(traced(x), model(x), rtol=0, atol=0)


def test_fx_traces_before_replace(x: Tensor) -> None:
    model = Model()
    traced = fusedrnn.replace(fx.symbolic_trace(model))
    assert leaves(traced) == [fusedrnn.RNN, fusedrnn.RNNCell, nn.Linear]
    assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_prepare_fx_with_our_modules_as_leaves(model: Model, x: Tensor) -> None:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.fx.custom_config import PrepareCustomConfig

    config = PrepareCustomConfig().set_non_traceable_module_classes(list(OURS))
    prepared = quantize_fx.prepare_fx(
        model, get_default_qconfig_mapping(), (x,), prepare_custom_config=config
    )
    found = leaves(prepared)
    assert [cls for cls in found if cls in (*OURS, nn.Linear)] == [*OURS, nn.Linear]
    assert len(found) > 3  # observers
    assert_close(prepared(x), model(x))


# ---- tools that recognise modules by torch's classes


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_restored_model_can_be_scripted(model: Model, x: Tensor) -> None:
    expected = model(x)
    with pytest.raises(Exception, match="annotation"):
        torch.jit.script(model)
    assert_close(torch.jit.script(fusedrnn.restore(model))(x), expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_restored_cells_are_quantized_dynamically(model: Model, x: Tensor) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")

    def quantized(model: nn.Module) -> Any:
        return quantization.quantize_dynamic(model, {nn.RNNCell, nn.Linear})

    assert type(quantized(model).cell) is fusedrnn.RNNCell
    expected = model(x)
    found = fusedrnn.replace(quantized(fusedrnn.restore(model)))
    assert type(found.rnn) is fusedrnn.RNN
    assert type(found.cell) is torch.ao.nn.quantized.dynamic.RNNCell
    assert_close(found(x), expected, rtol=0, atol=0.1)


def initialise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.RNN):
            nn.init.eye_(module.weight_hh_l0)
    return model


def test_initialisers_see_the_layer_before_replace_and_after_restore(model: Model) -> None:
    assert not torch.equal(initialise(model).rnn.weight_hh_l0, torch.eye(H))
    first = fusedrnn.replace(initialise(Model()))
    last = fusedrnn.replace(initialise(fusedrnn.restore(model)))
    for each in (first, last):
        assert type(each.rnn) is fusedrnn.RNN
        assert torch.equal(each.rnn.weight_hh_l0, torch.eye(H))


def test_torch_nn_rnn_can_be_assigned_while_a_model_is_built(
    monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    """Code may use nn.RNN by name to build a layer, as a base class or in isinstance."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn, "RNN", fusedrnn.RNN)
        patch.setattr(torch.nn, "RNNCell", fusedrnn.RNNCell)

        class Mine(nn.RNN):
            def forward(self, *args: Any) -> Any:
                output, h_n = super().forward(*args)
                return output + 1, h_n

        model = Model()
        model.mine = Mine(I, H, batch_first=True)
        initialise(model)
        assert isinstance(model.mine, nn.RNN)
        restored = fusedrnn.restore(copy.deepcopy(model))
        assert type(restored.rnn) is torch.nn.modules.rnn.RNN
        assert_close(restored(x), model(x))
        with pytest.raises(torch._dynamo.exc.Unsupported):  # refuses instances of nn.RNN
            torch.compile(model, backend="eager", fullgraph=True)(x)

    assert isinstance(model.rnn, fusedrnn.RNN)
    assert isinstance(model.mine, fusedrnn.RNN)
    assert torch.equal(model.mine.weight_hh_l0, torch.eye(H))
    for module in (model, model.mine):
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert_close(compiled(x), module(x))


# ---- counting


def count_by_class(model: nn.Module, x: Tensor, rules: dict[type, Callable[..., int]]) -> int:
    """Count as thop and ptflops do: with a forward hook chosen by each module's exact class."""
    counts: list[int] = []

    def hook(rule: Callable[..., int]) -> Any:
        return lambda module, args, result: counts.append(rule(module, *args))

    rules = {nn.Linear: lambda m, x: x.numel() * m.out_features, **rules}
    handles = [
        m.register_forward_hook(hook(rules[type(m)])) for m in model.modules() if type(m) in rules
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return sum(counts)


def rnn_products(m: nn.RNNBase, x: Tensor) -> int:
    return sum(x[..., 0].numel() * w.numel() for w in m.parameters() if w.dim() == 2)


def test_counters_by_class_need_a_rule_or_restore(model: Model, x: Tensor) -> None:
    torchs = {nn.RNN: rnn_products, nn.RNNCell: rnn_products}
    expected = count_by_class(Model(), x, torchs)
    assert count_by_class(model, x, torchs) == B * H * 2  # nn.Linear alone
    assert count_by_class(model, x, dict.fromkeys(OURS, rnn_products)) == expected
    assert count_by_class(fusedrnn.restore(model), x, torchs) == expected


def test_thop(model: Model, x: Tensor) -> None:
    thop = pytest.importorskip("thop")
    hooks = importlib.import_module("thop.rnn_hooks")
    expected = thop.profile(Model(), (x,), verbose=False)
    rules = {fusedrnn.RNN: hooks.count_rnn, fusedrnn.RNNCell: hooks.count_rnn_cell}
    assert thop.profile(model, (x,), verbose=False, custom_ops=rules) == expected


def test_ptflops(model: Model) -> None:
    """Its hook omits H additions per step and layer if the class is not a subclass of torch's."""
    ptflops = pytest.importorskip("ptflops")
    hooks = importlib.import_module("ptflops.pytorch_ops")

    def count(model: nn.Module, **more: Any) -> int:
        return ptflops.get_model_complexity_info(
            model, (T, I), as_strings=False, print_per_layer_stat=False, backend="pytorch", **more
        )[0]

    expected = count(Model())
    rules = {
        fusedrnn.RNN: hooks.rnn_flops_counter_hook,
        fusedrnn.RNNCell: hooks.rnn_cell_flops_counter_hook,
    }
    assert count(model, custom_modules_hooks=rules) == expected - 2 * T * H
    assert count(fusedrnn.restore(model)) == expected


# ---- differential privacy


def test_opacus_trains_it() -> None:
    pytest.importorskip("opacus")
    accuracy, epsilon = importlib.import_module("private_training").main(epochs=4)
    assert accuracy > 0.6
    assert 0 < epsilon < 10
