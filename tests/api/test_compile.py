"""torch.compile: one graph contains the layer at any length; results are those of eager mode."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fusedrnn

I, H = 4, 6

INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)
BACKENDS = ["eager", "aot_eager", INDUCTOR]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Load the parts of torch that warn when they are first used."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.ones(1), torch.ones(1))
        importlib.import_module("torch._inductor.compile_fx")


@pytest.fixture(autouse=True)
def _afresh_and_without_warnings() -> Iterator[None]:
    """Start with nothing compiled, and make every warning, ours or torch's, an error."""
    torch._dynamo.reset()
    with (
        warnings.catch_warnings(),
        torch._inductor.config.patch(fallback_random=True),  # the same random numbers as eager
    ):
        warnings.simplefilter("error")
        yield


class Model(nn.Module):
    """A layer, with operations before and after it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = fusedrnn.RNN(I, H, **options)
        directions = 2 if self.rnn.bidirectional else 1
        self.head = nn.Linear(directions * H, 3)

    def forward(self, x: Any, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x._replace(data=x.data.sin()) if isinstance(x, PackedSequence) else x.sin()
        output, h_n = self.rnn(x, hx)
        output = output.data if isinstance(output, PackedSequence) else output
        return self.head(output).relu(), h_n.cos()


DEEP = {"num_layers": 2, "bidirectional": True}


def batched(T: int = 5, B: int = 3) -> Tensor:
    return torch.randn(T, B, I, requires_grad=True)


def packed(T: int = 5, B: int = 3, enforce_sorted: bool = False) -> PackedSequence:
    lengths = torch.randint(1, T + 1, (B,))
    lengths[B // 2] = T
    if enforce_sorted:
        lengths = lengths.sort(descending=True).values
    found = pack_padded_sequence(torch.randn(T, B, I), lengths, enforce_sorted=enforce_sorted)
    return found._replace(data=found.data.requires_grad_())


INPUTS: dict[str, Callable[..., Any]] = {
    "batched": batched,
    "packed": packed,
    "packed and sorted": lambda T=5, B=3: packed(T, B, enforce_sorted=True),
}
# In "packed", sorted_indices gives B. "packed and sorted" is harder, because it has none.
HARD_INPUTS = ["batched", "packed and sorted"]


def results_and_gradients(
    function: Callable[..., Any], module: nn.Module, x: Any, *others: Any
) -> tuple[Any, Any]:
    torch.manual_seed(1)  # for dropout
    results = function(x, *others)
    leaves = [x.data if isinstance(x, PackedSequence) else x, *module.parameters()]
    if isinstance(x, PackedSequence):
        leaves[0] = x[0]
    leaves += [other for other in others if other is not None and other.requires_grad]
    loss = sum(result.pow(2).sum() for result in results)
    return results, torch.autograd.grad(loss, leaves)


def assert_same(compiled: Callable[..., Any], model: nn.Module, *arguments: Any) -> None:
    """Check that results and gradients are the same as without torch.compile."""
    want = results_and_gradients(model, model, *arguments)
    assert_close(results_and_gradients(compiled, model, *arguments), want)


# ---- one graph


@pytest.mark.parametrize(
    ("kind", "state"),
    [("batched", False), ("batched", True), ("packed", True), ("packed and sorted", False)],
    ids=["batched", "batched from a state", "packed from a state", "packed and sorted"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_is_one_graph_with_eagers_results_and_gradients(backend, kind, state):
    model, x = Model(**DEEP, dropout=0.5), INPUTS[kind]()
    hx = torch.randn(4, 3, H, requires_grad=True) if state else None
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same(compiled, model, x, hx)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        pytest.param({"batch_first": True}, (3, 5, I), id="batch_first"),
        pytest.param({"nonlinearity": "relu", "num_layers": 3}, (5, 3, I), id="relu"),
        pytest.param({"bias": False}, (5, 3, I), id="no bias"),
        pytest.param({}, (5, I), id="unbatched"),
        pytest.param({}, (1, 1, I), id="of one step"),
    ],
)
def test_other_options_and_shapes_match_eager(options, shape):
    model = Model(**options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled, model, torch.randn(shape, requires_grad=True))


@pytest.mark.parametrize("kind", ["batched", "packed"])
def test_nothing_breaks_before_or_after_the_layer(kind):
    """The model is compiled without fullgraph; nn.RNN would split the frame in three."""
    explanation = torch._dynamo.explain(Model(**DEEP))(INPUTS[kind]())
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packing_inside_breaks_the_graph_as_torch_does_but_not_the_layer(enforce_sorted):
    """Dynamo does not trace pack_padded_sequence. After a break it reads .grad of all tensors."""
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    rnn, lengths = fusedrnn.RNN(I, H, **DEEP), torch.tensor([5, 3, 3])

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        sequences = pack_padded_sequence(x.sin(), lengths, enforce_sorted=enforce_sorted)
        output, h_n = rnn(sequences)
        return pad_packed_sequence(output)[0].cos(), h_n

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter)
    want = results_and_gradients(function, rnn, x := batched())
    assert_close(results_and_gradients(compiled, rnn, x), want)
    layers = [str(g.graph).count("fusedrnn.activation") for g in counter.graphs]
    assert [n for n in layers if n > 0] == [4]  # all of them in one graph


def graphs_of(model: nn.Module, *arguments: Any) -> dict[str, torch.fx.GraphModule]:
    """Return the forward and backward graphs that AOTAutograd makes of the model."""
    found = {}

    def keep(name: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            found[name] = graph
            return torch._dynamo.backends.debugging.boxed_nop(graph, inputs)

        return compiler

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    results_and_gradients(compiled, model, *arguments)
    return found


@pytest.mark.parametrize("kind", HARD_INPUTS)
def test_the_graph_does_not_grow_with_the_length(kind):
    """nn.RNN, where it compiles at all, has at least one node per step."""
    model = Model(**DEEP, dropout=0.5)
    short, long = (graphs_of(model, INPUTS[kind](T)) for T in (8, 640))
    for name in ("forward", "backward"):
        assert len(short[name].graph.nodes) == len(long[name].graph.nodes)
        ops = [str(n.target) for n in long[name].graph.nodes if "fusedrnn." in str(n.target)]
        op = "activation" if name == "forward" else "adjoint"
        assert ops == [f"fusedrnn.{op}.default"] * 4  # one for each layer and direction


@pytest.mark.slow
def test_compile_time_does_not_grow_with_the_length():
    from torch._inductor.utils import fresh_cache  # here, because it warns on import (see _loaded)

    def seconds(T: int) -> float:
        torch._dynamo.reset()
        model, x = Model(), batched(T)
        with fresh_cache():
            start = perf_counter()
            compiled = torch.compile(model, backend="inductor", fullgraph=True, dynamic=False)
            results_and_gradients(compiled, model, x)
            return perf_counter() - start

    seconds(7)  # loads the compiler
    assert seconds(640) < 3 * seconds(8)  # 80 times the length; the machine may be busy


# ---- dynamic sizes


@pytest.fixture
def float64() -> Iterator[None]:
    """Compute in float64: torch rounds sums over many rows differently from the engine."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", HARD_INPUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_length_and_batch_never_recompile(backend, kind):
    model = Model(**DEEP, dropout=0.5)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    assert_same(compiled, model, INPUTS[kind](5, 3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T, B in [(8, 7), (50, 2), (33, 40), (3, 5)]:
            assert_same(compiled, model, INPUTS[kind](T, B))


def test_dynamic_state_never_recompiles():
    model = Model(**DEEP)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same(compiled, model, batched(5, 3), torch.randn(4, 3, H))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(compiled, model, batched(9, 8), torch.randn(4, 8, H))


@pytest.mark.usefixtures("float64")
def test_a_second_length_makes_the_graph_dynamic():
    """By default, torch compiles the first length as static, and the second as dynamic."""
    model, counter = Model(**DEEP), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for T in (5, 8, 13, 100, 640):
        assert_same(compiled, model, batched(T))
    assert counter.frame_count == 2


# ---- dropout


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_active_in_compiled_code(backend):
    """In nn.RNN, if torch compiles it at all, dropout does nothing."""
    rnn, x = fusedrnn.RNN(I, H, 2, dropout=0.5), torch.randn(5, 3, I)
    compiled = torch.compile(rnn, backend=backend, fullgraph=True)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    rnn.eval()
    assert torch.equal(compiled(x)[0], compiled(x)[0])
    assert_close(compiled(x), rnn(x))


def test_dropout_may_change_between_calls():
    rnn, x = fusedrnn.RNN(I, H, 2, dropout=0.5), torch.randn(50, 3, I)
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    for p in (0.5, 0.0, 0.9):
        rnn.dropout = p
        torch.manual_seed(1)
        want = rnn(x)
        torch.manual_seed(1)
        assert_close(compiled(x), want, rtol=0, atol=0)


@pytest.mark.slow
def test_dropout_by_inductors_random_numbers_has_the_same_rate():
    """fallback_random is off. With identity weights, the output shows what dropout zeroed."""
    rnn = fusedrnn.RNN(100, 100, 2, nonlinearity="relu", dropout=0.25, bias=False)
    with torch.no_grad():
        for layer in (0, 1):
            getattr(rnn, f"weight_ih_l{layer}").copy_(torch.eye(100))
            getattr(rnn, f"weight_hh_l{layer}").zero_()
    with torch._inductor.config.patch(fallback_random=False):
        output, _ = torch.compile(rnn, backend="inductor", fullgraph=True)(torch.ones(50, 20, 100))
    assert output.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (output == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


# ---- functions, the cell, and contexts around them


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_functions_with_reset_and_alpha_compile(backend):
    layer = fusedrnn.RNN(I, H)
    layer.alpha = nn.Parameter(torch.rand(H) * 0.8 + 0.1)
    reset = torch.rand(5, 3) <= 0.3

    def function(x: Tensor) -> tuple[Tensor, ...]:
        w_ih, w_hh, b_ih, b_hh = layer.all_weights[0]
        u = x @ w_ih.T
        h, h_n = fusedrnn.rnn(
            x, w_ih, w_hh, b_ih, b_hh, reset=reset, alpha=layer.alpha, nonlinearity="sigmoid"
        )
        return h, h_n, *fusedrnn.recurrence(u, None, w_hh, alpha=0.3, reverse=True)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    want = results_and_gradients(function, layer, x := batched())
    assert_close(results_and_gradients(compiled, layer, x), want)


def test_a_loop_over_a_cell_compiles():
    cell = fusedrnn.RNNCell(I, H)

    def function(x: Tensor) -> tuple[Tensor]:
        h = None
        for step in x:
            h = cell(step, h)
        return (h,)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    want = results_and_gradients(function, cell, x := batched())
    assert_close(results_and_gradients(compiled, cell, x), want)


def test_a_replaced_layer_compiles():
    model = fusedrnn.replace(nn.Sequential(nn.RNN(I, H)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled, model, batched())


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast", "checkpoint"])
def test_contexts_and_checkpoints_around_the_layer_compile(context):
    rnn, x = fusedrnn.RNN(I, H, 2), batched()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        if context == "checkpoint":
            return checkpoint(rnn, x, use_reentrant=False)
        within = {
            "no_grad": torch.no_grad,
            "inference_mode": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        }
        with within[context]():
            return rnn(x)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    if context in ("no_grad", "inference_mode"):
        assert_close(compiled(x), function(x))
    else:
        want = results_and_gradients(function, rnn, x)
        assert_close(results_and_gradients(compiled, rnn, x), want)


def with_dual_numbers(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x))),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: vmap(lambda x: f(x.unsqueeze(1)), in_dims=1)(x),
    "dual numbers": with_dual_numbers,
}


@pytest.mark.parametrize(
    ("transform", "backend"),
    [
        pytest.param(transform, backend, id=f"{name} {backend}")
        for name, transform in TRANSFORMS.items()
        for backend in ("eager", "aot_eager")
        if backend == "aot_eager" or name in ("jvp", "dual numbers")
    ],
)
def test_transforms_inside_compiled_code(transform, backend):
    rnn = fusedrnn.RNN(I, H).double()

    def function(x: Tensor) -> Any:
        return transform(lambda x: rnn(x)[0].sin(), x)

    x = torch.randn(3, 2, I, dtype=torch.float64)
    assert_close(torch.compile(function, backend=backend, fullgraph=True)(x), function(x))


def test_per_sample_gradients_inside_compiled_code():
    rnn, x = fusedrnn.RNN(I, H).double(), torch.randn(5, 3, I, dtype=torch.float64)

    def function(weights: dict[str, Tensor], x: Tensor) -> Any:
        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(rnn, weights, (x.unsqueeze(1),))[0].pow(2).sum()

        return vmap(grad(loss), in_dims=(None, 1))(weights, x)

    weights = dict(rnn.named_parameters())
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(compiled(weights, x), function(weights, x))


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_compiled_training_has_the_losses_of_eager_training(backend):
    def losses(compile: bool) -> list[float]:
        torch.manual_seed(0)
        model = Model(**DEEP, dropout=0.2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        step = torch.compile(model, backend=backend, fullgraph=True) if compile else model
        found = []
        for _ in range(5):
            output, _ = step(torch.randn(7, 3, I))
            loss = (output - 1).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)
