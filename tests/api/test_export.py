"""torch.export: batch and time stay dynamic, even after the program is processed further."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

import fusedrnn

I, H = 4, 6
T_AND_B = {0: Dim("T"), 1: Dim("B")}
DEEP: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
# torch itself gives this warning whenever it decomposes a program. Our own warnings are errors (see
# export) or fail test_no_warning_that_a_linear_layer_does_not_give.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


def export(model: nn.Module, *arguments: Any, **options: Any) -> ExportedProgram:
    """Export the model; every warning, ours or torch's, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return torch.export.export(model, arguments, **options)


def forms(program: ExportedProgram) -> dict[str, ExportedProgram]:
    """Return the program, the decomposed program, and the latter after saving and loading."""
    decomposed = program.run_decompositions()
    file = io.BytesIO()
    torch.export.save(decomposed, file)
    file.seek(0)
    return {"exported": program, "decomposed": decomposed, "loaded": torch.export.load(file)}


def seeded(function: Callable[..., Any], *arguments: Any) -> Any:
    torch.manual_seed(1)  # for dropout
    return function(*arguments)


def layers(program: ExportedProgram) -> int:
    targets = [str(node.target) for node in program.graph.nodes]
    return targets.count("fusedrnn.activation.default")


@pytest.mark.parametrize(
    ("mode", "state"),
    [
        pytest.param({}, False, id="one layer"),
        pytest.param({**DEEP, "dropout": 0.5}, True, id="deep, in training, from a state"),
        pytest.param({"batch_first": True, "nonlinearity": "relu"}, True, id="batch_first"),
    ],
)
@STRICT
def test_batch_and_time_stay_dynamic(strict, mode, state):
    """They stay dynamic after decomposition, saving and loading, and dropout stays active."""
    rnn = fusedrnn.RNN(I, H, **mode)
    count = rnn.num_layers * (2 if rnn.bidirectional else 1)

    def arguments(T: int, B: int) -> tuple[Tensor, ...]:
        x = torch.randn((B, T, I) if rnn.batch_first else (T, B, I))
        return (x, torch.randn(count, B, H)) if state else (x,)

    T_and_B = {0: Dim("B"), 1: Dim("T")} if rnn.batch_first else T_AND_B
    shapes = (T_and_B, {1: Dim("B")}) if state else (T_and_B,)
    program = export(rnn, *arguments(5, 3), dynamic_shapes=shapes, strict=strict)
    for form in forms(program).values():
        assert layers(form) == count
        for T, B in [(5, 3), (64, 7), (1, 1)]:
            given = arguments(T, B)
            assert_close(seeded(form.module(), *given), seeded(rnn, *given))


def test_dropout_is_active_in_a_decomposed_program():
    """In a decomposed nn.RNN, dropout is silently off."""
    rnn, x = fusedrnn.RNN(I, H, 2, dropout=0.5), torch.randn(5, 3, I)
    module = export(rnn, x).run_decompositions().module()
    assert not torch.equal(module(x)[0], module(x)[0])


def test_the_graph_does_not_grow_with_the_length():
    rnn = fusedrnn.RNN(I, H, **DEEP)
    short, long = (export(rnn, torch.randn(T, 3, I)) for T in (8, 640))
    assert len(short.graph.nodes) == len(long.graph.nodes)
    short, long = (program.run_decompositions() for program in (short, long))
    assert len(short.graph.nodes) == len(long.graph.nodes)


def test_unbatched_input_exports():
    rnn, x = fusedrnn.RNN(I, H, **DEEP), torch.randn(5, I)
    program = export(rnn, x, dynamic_shapes=({0: Dim("T")},))
    for form in forms(program).values():
        x = torch.randn(30, I)
        assert_close(form.module()(x), rnn(x))


# ---- packed


class Packing(nn.Module):
    """Takes the lengths as an input."""

    def __init__(self, enforce_sorted: bool, **options: Any) -> None:
        super().__init__()
        self.rnn = fusedrnn.RNN(I, H, **options)
        self.head = nn.Linear(2 * H if self.rnn.bidirectional else H, 3)
        self.enforce_sorted = enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        sequences = pack_padded_sequence(x, lengths, enforce_sorted=self.enforce_sorted)
        output, h_n = self.rnn(sequences)
        return self.head(output.data).relu(), h_n


@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["unsorted", "sorted"])
def test_packed_input_with_lengths_as_an_input(enforce_sorted):
    """Exported non-strictly, because Dynamo does not trace torch's pack_padded_sequence."""
    model = Packing(enforce_sorted, **DEEP, dropout=0.5)
    program = export(
        model,
        torch.randn(5, 3, I),
        torch.tensor([5, 3, 2]),
        dynamic_shapes=(T_AND_B, {0: Dim("B")}),
    )
    for form in forms(program).values():
        for T, lengths in [(5, [5, 3, 2]), (9, [9, 8, 6, 6]), (30, [30]), (3, [3, 3])]:
            given = torch.randn(T, len(lengths), I), torch.tensor(lengths)
            assert_close(seeded(form.module(), *given), seeded(model, *given))


class Packed(nn.Module):
    """Takes the components of a PackedSequence as inputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = fusedrnn.RNN(I, H, **options)

    def forward(self, data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
        output, h_n = self.rnn(PackedSequence(data, batch_sizes))
        return output.data, h_n


def packed(*lengths: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(lengths[0], len(lengths), I)
    data, batch_sizes, _, _ = pack_padded_sequence(x, torch.tensor(lengths))
    return data, batch_sizes


PACKED_SHAPES = ({0: Dim("N")}, {0: Dim("T")})


@STRICT
def test_packed_data_as_an_input(strict):
    model = Packed(**DEEP)
    program = export(model, *packed(5, 3, 2), dynamic_shapes=PACKED_SHAPES, strict=strict)
    for form in forms(program).values():
        for lengths in [(5, 3, 2), (9, 8, 6, 6), (30,), (3, 3)]:
            given = packed(*lengths)
            assert_close(form.module()(*given), model(*given))


# ---- other exports, and uses of a program


class Leaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_ih = nn.Parameter(torch.randn(H, I) * I**-0.5)
        self.w_hh = nn.Parameter(torch.randn(H, H) * H**-0.5)
        self.alpha = nn.Parameter(torch.rand(H) * 0.8 + 0.1)

    def forward(self, x: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        return fusedrnn.rnn(
            x, self.w_ih, self.w_hh, reset=reset, alpha=self.alpha, nonlinearity="softplus"
        )


@STRICT
def test_functions_with_reset_and_alpha_export(strict):
    model = Leaky()
    program = export(
        model,
        torch.randn(5, 3, I),
        torch.rand(5, 3) <= 0.3,
        dynamic_shapes=(T_AND_B, T_AND_B),
        strict=strict,
    )
    x, reset = torch.randn(20, 8, I), torch.rand(20, 8) <= 0.3
    for form in forms(program).values():
        assert_close(form.module()(x, reset), model(x, reset))


@STRICT
def test_a_cell_exports(strict):
    cell = fusedrnn.RNNCell(I, H)
    B = {0: Dim("B")}
    program = export(
        cell, torch.randn(3, I), torch.randn(3, H), dynamic_shapes=(B, B), strict=strict
    )
    x, h = torch.randn(40, I), torch.randn(40, H)
    for form in forms(program).values():
        assert_close(form.module()(x, h), cell(x, h))


def test_an_exported_program_can_be_trained():
    rnn = fusedrnn.RNN(I, H, **DEEP)
    exported = export(rnn, torch.randn(5, 3, I), dynamic_shapes=(T_AND_B,)).module()
    x = torch.randn(9, 2, I)
    found, want = (
        torch.autograd.grad(m(x)[0].pow(2).sum(), [p for _, p in sorted(m.named_parameters())])
        for m in (exported, rnn)
    )
    assert_close(found, want)


def test_no_warning_that_a_linear_layer_does_not_give():
    """Decomposition gives warnings of torch's own, so the linear layer is the comparison."""

    def seen(model: nn.Module) -> set[tuple[type, str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            program = torch.export.export(model, (torch.randn(5, 3, I),), dynamic_shapes=(T_AND_B,))
            for form in forms(program).values():
                form.module()(torch.randn(9, 2, I))
        return {(w.category, str(w.message)) for w in caught}

    assert seen(fusedrnn.RNN(I, H, **DEEP)) <= seen(nn.Linear(I, H))


# ---- AOTInductor


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batched", "packed", "lengths"])
def test_aotinductor_packages_it_and_another_process_runs_it(kind, tmp_path):
    model: nn.Module
    shapes: Any
    if kind == "batched":
        model, given = fusedrnn.RNN(I, H, **DEEP), (torch.randn(5, 3, I),)
        others = [(torch.randn(T, B, I),) for T, B in [(1, 1), (64, 7), (640, 2)]]
        shapes = ({0: Dim("T", max=10_000), 1: Dim("B", max=10_000)},)
    elif kind == "packed":
        model, given = Packed(**DEEP), packed(5, 3, 2)
        others = [packed(9, 8, 6, 6), packed(30), packed(3, 3)]
        shapes = PACKED_SHAPES
    else:
        model = Packing(enforce_sorted=False, **DEEP)
        given = (torch.randn(5, 3, I), torch.tensor([2, 5, 3]))
        others = [(torch.randn(max(n), len(n), I), torch.tensor(n)) for n in ([6, 9, 1, 6], [30])]
        shapes = (T_AND_B, {0: Dim("B")})
    model.eval()
    program = export(model, *given, dynamic_shapes=shapes)
    package = tmp_path / "model.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    with torch.no_grad():
        cases = [(arguments, model(*arguments)) for arguments in [given, *others]]
    torch.save(cases, tmp_path / "cases.pt")
    code = f"""
import torch
import fusedrnn  # its ops; nothing else of it
run = torch._inductor.aoti_load_package({str(package)!r})
for arguments, want in torch.load({str(tmp_path / "cases.pt")!r}):
    torch.testing.assert_close(tuple(run(*arguments)), want)
print("all equal")
"""
    root = Path(fusedrnn.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert found.stdout == "all equal\n", found.stderr
