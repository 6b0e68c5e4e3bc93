"""ONNX export: one RNN node per layer and direction, which onnxruntime runs for any T and B."""

from __future__ import annotations

import io
import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn.reference import NONLINEARITIES

if not os.environ.get("CI"):  # in CI, a missing package is an error
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed (see .ci/requirements.txt)")

import onnx
import onnxruntime

# torch emits this about its own code when it decomposes a program. The last test checks our
# warnings.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")

I, H = 4, 6
T_AND_B = {0: Dim("T"), 1: Dim("B")}


def export(model: nn.Module | torch.export.ExportedProgram, *arguments: Any, **options: Any) -> Any:
    """Export the model to ONNX and check the result with onnx."""
    with warnings.catch_warnings():  # the last test checks warnings
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, arguments, verbose=False, **options)
    proto = program.model_proto
    onnx.checker.check_model(proto, full_check=True)
    return proto


def nodes(proto: onnx.ModelProto, kind: str = "RNN") -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == kind and node.domain == ""]


def run(proto: onnx.ModelProto, *arguments: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]
    feed = {name: argument.numpy() for name, argument in zip(names, arguments, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, feed)]


class Function(nn.Module):
    """One layer, computed by :func:`fusedrnn.rnn` or, if bare, by :func:`fusedrnn.recurrence`."""

    def __init__(self, bare: bool = False, **flags: Any) -> None:
        super().__init__()
        self.bare, self.flags = bare, flags
        self.w_ih = nn.Parameter(torch.randn(H, I) * I**-0.5)
        self.w_hh = nn.Parameter(torch.randn(H, H) * H**-0.5)
        self.bias = nn.Parameter(torch.randn(H))
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.bare:
            return fusedrnn.recurrence(x, None, self.w_hh, **self.flags)
        return fusedrnn.rnn(x, self.w_ih, self.w_hh, None, self.bias, **self.flags)


MODES: dict[str, tuple[dict[str, Any], bool]] = {
    "tanh from a state": ({}, True),
    "relu without bias": ({"nonlinearity": "relu", "bias": False}, False),
    "batch_first from a state": ({"batch_first": True}, True),
    "bidirectional": ({"bidirectional": True}, False),
    "layers from a state": ({"num_layers": 3, "dropout": 0.5}, True),  # dropout is off in eval mode
    "all from a state": (
        {"num_layers": 2, "nonlinearity": "relu", "bidirectional": True, "batch_first": True},
        True,
    ),
}


@pytest.mark.parametrize(("mode", "state"), MODES.values(), ids=MODES)
def test_every_mode_runs_in_onnxruntime_at_any_length_and_batch(mode, state):
    rnn = fusedrnn.RNN(I, H, **mode).eval()
    count = rnn.num_layers * (2 if rnn.bidirectional else 1)

    def arguments(T, B):
        x = torch.randn((B, T, I) if rnn.batch_first else (T, B, I))
        return (x, torch.randn(count, B, H)) if state else (x,)

    T_and_B = {0: Dim("B"), 1: Dim("T")} if rnn.batch_first else T_AND_B
    shapes = (T_and_B, {1: Dim("B")}) if state else (T_and_B,)
    proto = export(rnn, *arguments(5, 3), dynamic_shapes=shapes)
    assert len(nodes(proto)) == count
    for T, B in [(5, 3), (1, 1), (12, 2), (200, 7)]:
        given = arguments(T, B)
        assert_close(run(proto, *given), list(rnn(*given)), rtol=1e-5, atol=1e-5)


def test_unbatched_input():
    rnn, x, hx = fusedrnn.RNN(I, H, 2).eval(), torch.randn(5, I), torch.randn(2, H)
    proto = export(rnn, x, hx, dynamic_shapes=({0: Dim("T")}, None))
    assert len(nodes(proto)) == 2
    x = torch.randn(30, I)
    assert_close(run(proto, x, hx), list(rnn(x, hx)))


def test_the_graph_does_not_grow_with_the_length():
    rnn = fusedrnn.RNN(I, H, 2).eval()
    short, long = (export(rnn, torch.randn(T, 3, I)) for T in (8, 640))
    assert len(short.graph.node) == len(long.graph.node)


def test_a_cell_exports_as_a_node():
    cell, x, hx = fusedrnn.RNNCell(I, H, nonlinearity="relu").eval(), *torch.randn(2, 3, H)
    proto = export(cell, x[:, :I], hx, dynamic_shapes=({0: Dim("B")}, {0: Dim("B")}))
    assert len(nodes(proto)) == 1
    x, hx = torch.randn(7, I), torch.randn(7, H)
    assert_close(run(proto, x, hx), [cell(x, hx)])


def test_the_functions_export():
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                Function(bare, reverse=reverse)
                for bare in (False, True)
                for reverse in (False, True)
            )

        def forward(self, x: Tensor, u: Tensor) -> list[Tensor]:
            return [h for layer in self.layers for h in layer(u if layer.bare else x)]

    model = Layers().eval()
    given = torch.randn(5, 3, I), torch.randn(5, 3, H)
    proto = export(model, *given, dynamic_shapes=(T_AND_B, T_AND_B))
    assert len(nodes(proto)) == 4
    given = torch.randn(9, 4, I), torch.randn(9, 4, H)
    assert_close(run(proto, *given), model(*given))


KNOWN_TO_ONNX = ["tanh", "relu", "identity", "sigmoid", "softplus", "leaky_relu", "elu"]


def test_all_nonlinearities_of_onnx_export():
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Function(nonlinearity=name) for name in KNOWN_TO_ONNX)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x)[0] for layer in self.layers]

    model, x = Layers().eval(), torch.randn(9, 4, I)
    assert_close(run(export(model, x), x), model(x))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"alpha": 0.5}, "no leak (alpha)"),
        ({"reset": torch.zeros(5, 3, dtype=torch.bool)}, "no resets (reset)"),
        *(
            ({"nonlinearity": name}, f"no nonlinearity '{name}', only tanh, relu, ")
            for name in NONLINEARITIES
            if name not in KNOWN_TO_ONNX
        ),
    ],
    ids=["alpha", "reset", *(name for name in NONLINEARITIES if name not in KNOWN_TO_ONNX)],
)
def test_what_onnx_cannot_express_is_named(flags, text):
    with pytest.raises(Exception) as error:
        export(Function(**flags), torch.randn(5, 3, I))
    assert f"ONNX cannot express this layer: its RNN has {text}" in str(error.value)


def test_packed_sequences_raise_a_clear_error():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fusedrnn.RNN(I, H)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.rnn(pack_padded_sequence(x, lengths))[1]

    with pytest.raises(Exception) as error:
        export(Model().eval(), torch.randn(5, 3, I), torch.tensor([5, 2, 1]))
    assert "ONNX cannot express this layer: its RNN has no packed sequences" in str(error.value)


def test_the_error_for_an_exported_program_names_the_remedy():
    rnn, x = fusedrnn.RNN(I, H, 2).eval(), torch.randn(5, 3, I)
    program = torch.export.export(rnn, (x,), dynamic_shapes=(T_AND_B,))
    with pytest.raises(Exception) as error:
        export(program)
    assert "call its run_decompositions(fusedrnn.onnx.decompositions()) first" in str(error.value)
    leaky = torch.export.export(Function(alpha=0.5), (x,))
    with pytest.raises(Exception) as error:
        export(leaky)
    assert "its RNN has no leak (alpha)" in str(error.value)

    proto = export(program.run_decompositions(fusedrnn.onnx.decompositions()))
    assert len(nodes(proto)) == 2
    x = torch.randn(9, 2, I)
    assert_close(run(proto, x), list(rnn(x)))


def test_a_model_with_its_rnn_replaced():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, I)
            self.rnn = nn.RNN(I, H, batch_first=True, bidirectional=True)
            self.head = nn.Linear(2 * H, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.rnn(self.embed(tokens))[0]).log_softmax(-1)

    theirs = Tagger().eval()
    tokens = torch.randint(20, (3, 40))
    want = theirs(tokens)
    ours = fusedrnn.replace(theirs)
    proto = export(ours, tokens[:, :8], dynamic_shapes=({0: Dim("B"), 1: Dim("T")},))
    assert len(nodes(proto)) == 2
    assert_close(run(proto, tokens), [want])


@pytest.mark.parametrize(
    "mode",
    [{"bias": False}, {"num_layers": 2, "nonlinearity": "relu", "bidirectional": True}],
    ids=["no bias", "relu, layers, bidirectional"],
)
def test_the_old_torchscript_exporter_works(mode):
    rnn = fusedrnn.RNN(I, H, **mode).eval()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and warns about every size it reads
        torch.onnx.export(
            rnn,
            (torch.randn(5, 5, I),),
            file,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": [0, 1]},
        )
    proto = onnx.load_from_string(file.getvalue())
    assert len(nodes(proto)) == len(rnn.all_weights)
    x = torch.randn(9, 2, I)
    assert_close(run(proto, x), list(rnn(x)))

    with pytest.raises(Exception) as error:
        export(Function(nonlinearity="elu"), x, f=io.BytesIO(), dynamo=False)
    assert (
        "nonlinearity must be 'tanh' or 'relu' for torch.onnx.export(dynamo=False), got 'elu'"
        in str(error.value)
    )


def test_no_warning_that_a_linear_layer_does_not_give():
    """torch and onnxscript emit warnings of their own; our layers must not add any."""

    def seen(model: nn.Module) -> set[tuple[type, str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x = torch.randn(5, 3, I)
            torch.onnx.export(model.eval(), (x,), io.BytesIO(), dynamic_shapes=(T_AND_B,))
        return {(w.category, str(w.message)) for w in caught}

    assert seen(fusedrnn.RNN(I, H, 2, bidirectional=True)) <= seen(nn.Linear(I, H))
