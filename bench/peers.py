"""The benchmark problem and its peers: nn.RNN, fusedrnn, Python loops, JAX, ONNX Runtime."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

FORWARD, BACKWARD = "forward", "forward+backward"
MODES = (FORWARD, BACKWARD)
CPU = torch.device("cpu")


class Shape(NamedTuple):
    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        return f"{self.T},{self.B},{self.I},{self.H}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        sizes = [int(size) for size in text.split(",")]
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError
        return cls(*sizes)


@dataclass
class Problem:
    """One layer's inputs, weights and the gradient of its output, in float64 unless cast.

    A packed problem has as many rows as the dense one of its shape.

    With two directions there are twice as many weights, and `grad` has twice the features.
    """

    shape: Shape
    x: Tensor  # [T, B, I]
    weights: list[Tensor]  # w_ih [H, I], w_hh [H, H], b_ih [H], b_hh [H]
    grad: Tensor  # [T, B, H], of the output
    h0: Tensor | None = None  # [B, H]; None means zero, as in nn.RNN
    batch_sizes: Tensor | None = None  # packed: x and grad are [T*B, *], and B is a mean
    grad_input: bool = False  # whether to compute x's gradient, too
    threads: int = 1

    @classmethod
    def random(
        cls,
        shape: Shape,
        dtype: torch.dtype,
        *,
        cell: bool,
        grad_input: bool,
        threads: int,
        device: torch.device = CPU,
        directions: int = 1,
        packed: bool = False,
    ) -> Problem:
        """Draw a problem: weights as nn.RNN initialises them, all values exact in `dtype`."""
        T, B, I, H = shape
        random = torch.Generator(device).manual_seed(0)
        bound = 1 / math.sqrt(H)

        def exact(values: Tensor) -> Tensor:
            return values.to(dtype).double()

        def normal(*size: int) -> Tensor:
            return exact(torch.randn(size, generator=random, dtype=torch.float64, device=device))

        def uniform(*size: int) -> Tensor:
            numbers = torch.rand(size, generator=random, dtype=torch.float64, device=device)
            return exact((2 * numbers - 1) * bound)

        rows = (T * B,) if packed else (T, B)
        return cls(
            shape,
            x=normal(*rows, I),
            weights=[
                uniform(*size) for _ in range(directions) for size in ((H, I), (H, H), (H,), (H,))
            ],
            grad=normal(*rows, directions * H),
            h0=exact(normal(B, H).tanh()) if cell else None,
            batch_sizes=ragged(T, B) if packed else None,
            grad_input=grad_input,
            threads=threads,
        )

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(
            self,
            x=self.x.to(dtype),
            weights=[w.to(dtype) for w in self.weights],
            grad=self.grad.to(dtype),
            h0=None if self.h0 is None else self.h0.to(dtype),
        )

    def first(self, steps: int) -> Problem:
        """Return the problem of the first steps; of all steps if there are fewer."""
        shape = self.shape._replace(T=min(steps, self.shape.T))
        if self.batch_sizes is None:
            return replace(self, shape=shape, x=self.x[:steps], grad=self.grad[:steps])
        sizes = self.batch_sizes[:steps]
        rows = int(sizes.sum())
        return replace(self, shape=shape, x=self.x[:rows], grad=self.grad[:rows], batch_sizes=sizes)

    def flops(self, mode: str) -> int:
        T, B, I, H = self.shape
        rows = T * B
        if mode == FORWARD:
            return 2 * rows * H * (I + H)
        # In addition to the forward: the GEMMs of the adjoint, of dW_hh and dW_ih, and of dx if
        # it is requested.
        return 2 * rows * H * (2 * I + 3 * H + (I if self.grad_input else 0))


def ragged(T: int, B: int) -> Tensor:
    """Return the batch sizes of B sequences with lengths spaced evenly from 1 to 2T - 1.

    Their average is T.
    """
    lengths = torch.tensor([T + int((T - 1) * (B - 1 - 2 * b) / max(B - 1, 1)) for b in range(B)])
    return (lengths > torch.arange(int(lengths.max())).unsqueeze(1)).sum(1)


class Peer:
    """A way to run the layer. Results may be arrays of another library, but must be complete."""

    name: ClassVar[str]
    eps: float = 0.0  # set by a peer that computes in lower precision than the problem's
    compile_seconds: float | None = None  # set by a peer that measures it
    requires: ClassVar[tuple[str, ...]] = ()  # modules to import
    packs: ClassVar[bool] = False  # whether it takes packed batches

    @classmethod
    def missing(cls) -> str | None:
        """Return why this peer cannot run here at all, or None."""
        for module in cls.requires:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        return None

    @classmethod
    def declines(cls, problem: Problem, mode: str) -> str | None:
        """Return why this peer skips the problem, or None. The problem is already in its dtype."""
        return None

    def prepare(self, problem: Problem) -> None:
        raise NotImplementedError

    def forward(self) -> Any:
        """Return the output, [T, B, H], without building a graph."""
        raise NotImplementedError

    def forward_backward(self) -> tuple[Any, Sequence[Any]]:
        """Return the output and the gradients of the weights (then of h0 and x, if requested)."""
        raise NotImplementedError

    def to_torch(self, array: Any) -> Tensor:
        return array.detach()

    def call(self, mode: str) -> Callable[[], Any]:
        return self.forward if mode == FORWARD else self.forward_backward

    def results(self, mode: str) -> list[Tensor]:
        if mode == FORWARD:
            return [self.to_torch(self.forward())]
        output, gradients = self.forward_backward()
        return [self.to_torch(array) for array in (output, *gradients)]


class TorchPeer(Peer):
    """A peer that autograd differentiates: a subclass only has to compute the output."""

    weights: list[Tensor]

    def prepare(self, problem: Problem) -> None:
        self.problem = problem
        self.weights = self.make_weights(problem)
        self.x = problem.x.detach().requires_grad_(problem.grad_input)
        wanted = list(self.weights)
        self.h0 = None
        if problem.h0 is not None:  # a cell's state is from the step before, so it needs a gradient
            self.h0 = problem.h0.detach().requires_grad_()
            wanted.append(self.h0)
        self.wanted = [*wanted, self.x] if problem.grad_input else wanted

    def make_weights(self, problem: Problem) -> list[Tensor]:
        return [w.detach().requires_grad_() for w in problem.weights]

    def output(self) -> Tensor:
        raise NotImplementedError

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.output()

    def forward_backward(self) -> tuple[Tensor, Sequence[Tensor]]:
        output = self.output()
        return output, torch.autograd.grad(output, self.wanted, self.problem.grad)

    def backward_alone(self) -> Callable[[], Any]:
        """Return a call that repeats the backward of a single forward."""
        output = self.output()
        return lambda: torch.autograd.grad(
            output, self.wanted, self.problem.grad, retain_graph=True
        )


class ModulePeer(TorchPeer):
    """A peer that is a module with nn.RNN's parameters in nn.RNN's order."""

    bidirectional: bool

    def make_module(self, I: int, H: int) -> nn.Module:
        raise NotImplementedError

    def make_weights(self, problem: Problem) -> list[Tensor]:
        self.bidirectional = len(problem.weights) == 8
        with problem.x.device:
            module = self.make_module(problem.shape.I, problem.shape.H).to(problem.x.dtype)
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), problem.weights):
                parameter.copy_(value)
        self.module = module
        return list(module.parameters())

    def output(self) -> Tensor:
        if self.problem.batch_sizes is None:
            return self.module(self.x)[0]
        return self.module(PackedSequence(self.x, self.problem.batch_sizes))[0].data


class TorchRNN(ModulePeer):
    name = "nn.RNN"
    packs = True

    def make_module(self, I: int, H: int) -> nn.Module:
        return nn.RNN(I, H, bidirectional=self.bidirectional)


class FusedRNN(ModulePeer):
    name = "fusedrnn"
    packs = True

    @classmethod
    def missing(cls) -> str | None:
        return fusedrnn_missing()

    def make_module(self, I: int, H: int) -> nn.Module:
        import fusedrnn

        return fusedrnn.RNN(I, H, bidirectional=self.bidirectional)


def fusedrnn_missing() -> str | None:
    try:
        import fusedrnn  # noqa: F401
    except ImportError as error:  # not built, or with another torch; the message says what to do
        return str(error)
    return None


class UnbindLoop(TorchPeer):
    """The best plain loop: one input GEMM for all steps, and `unbind`.

    Indexing `u[t]` instead would give a gradient of the size of `u`, mostly zeros, for each step.
    """

    name = "loop"
    packs = True

    def output(self) -> Tensor:
        if self.problem.batch_sizes is not None:
            return self.run_packed(self.x, self.problem.batch_sizes, *self.weights)
        output = self.run(self.x, self.h0, *self.weights[:4])
        if len(self.weights) == 4:
            return output
        reverse = self.run(self.x.flip(0), self.h0, *self.weights[4:]).flip(0)
        return torch.cat([output, reverse], -1)

    @staticmethod
    def run(
        x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
    ) -> Tensor:
        u = F.linear(x, w_ih, b_ih + b_hh)
        h = u.new_zeros(u.shape[1:]) if h0 is None else h0
        states = []
        for u_t in u.unbind(0):
            h = torch.tanh(u_t + h @ w_hh.T)
            states.append(h)
        return torch.stack(states)

    @staticmethod
    def run_packed(
        x: Tensor, batch_sizes: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
    ) -> Tensor:
        u = F.linear(x, w_ih, b_ih + b_hh)
        h = u.new_zeros(int(batch_sizes[0]), u.size(-1))
        states = []
        for u_t in u.split(batch_sizes.tolist()):
            h = torch.tanh(u_t + h[: u_t.size(0)] @ w_hh.T)
            states.append(h)
        return torch.cat(states)


class CellLoop(ModulePeer):
    name = "RNNCell loop"

    def make_module(self, I: int, H: int) -> nn.Module:
        return nn.RNNCell(I, H)

    def output(self) -> Tensor:
        h = None
        states = []
        for x_t in self.x.unbind(0):
            h = self.module(x_t, h)
            states.append(h)
        return torch.stack(states)


class CompiledLoop(UnbindLoop):
    name = "torch.compile"
    packs = False
    max_T = 32  # the graph is unrolled: compiling takes a second or more per step

    @classmethod
    def declines(cls, problem: Problem, mode: str) -> str | None:
        if problem.shape.T > cls.max_T:
            return f"T > {cls.max_T}: the loop is unrolled, and compiling takes minutes"
        return None

    def prepare(self, problem: Problem) -> None:
        super().prepare(problem)
        torch.compiler.reset()  # otherwise the eighth shape would silently run uncompiled
        self.compiled = torch.compile(self.run, fullgraph=True, dynamic=False)

    def output(self) -> Tensor:
        return self.compiled(self.x, self.h0, *self.weights)


class JaxScan(Peer):
    """`lax.scan` over the projected input, jitted; gradients by `jax.vjp`, jitted with it."""

    name = "JAX scan"
    requires = ("jax",)

    def prepare(self, problem: Problem) -> None:
        jax = import_jax(problem.threads)
        jnp = jax.numpy
        wide = problem.x.dtype == torch.float64
        jax.config.update("jax_enable_x64", wide)
        dtype = str(problem.x.dtype).removeprefix("torch.")

        def array(tensor: Tensor) -> Any:  # through float32, which holds the small types exactly
            return jnp.asarray((tensor if wide else tensor.float()).numpy(), dtype=dtype)

        self.x = array(problem.x)
        self.weights = [array(w) for w in problem.weights]
        self.grad = array(problem.grad)

        def layer(x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
            def step(h: Any, u_t: Any) -> tuple[Any, Any]:
                h = jnp.tanh(u_t + h @ w_hh.T)
                return h, h

            u = x @ w_ih.T + (b_ih + b_hh)
            return jax.lax.scan(step, jnp.zeros_like(u[0]), u)[1]

        def layer_and_gradients(x: Any, weights: Any, grad: Any) -> Any:
            if problem.grad_input:
                output, pull = jax.vjp(lambda *args: layer(args[-1], *args[:-1]), *weights, x)
            else:
                output, pull = jax.vjp(lambda *args: layer(x, *args), *weights)
            return output, pull(grad)

        self.layer = jax.jit(layer)
        self.layer_and_gradients = jax.jit(layer_and_gradients)
        self.ready = jax.block_until_ready

    def forward(self) -> Any:
        return self.ready(self.layer(self.x, *self.weights))

    def forward_backward(self) -> tuple[Any, Sequence[Any]]:
        return self.ready(self.layer_and_gradients(self.x, self.weights, self.grad))

    def to_torch(self, array: Any) -> Tensor:
        import numpy as np

        wide = array.dtype == np.float64
        return torch.from_numpy(np.array(array, dtype=np.float64 if wide else np.float32))


def import_jax(threads: int) -> Any:
    # XLA sizes its pool once, by NPROC; --xla_cpu_multi_thread_eigen no longer has any effect.
    os.environ["NPROC"] = str(threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    return jax


class OnnxRuntime(Peer):
    name = "ONNX Runtime"
    requires = ("onnx", "onnxruntime")

    @classmethod
    def declines(cls, problem: Problem, mode: str) -> str | None:
        if mode != FORWARD:
            return "it runs forward only"
        if problem.x.dtype != torch.float32:
            return "its RNN is float32 only"
        return None

    def prepare(self, problem: Problem) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = problem.threads
        options.inter_op_num_threads = 1
        # Keep its threads from spinning into the next peer's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(
            self.model(problem).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.x = problem.x.numpy()

    @staticmethod
    def model(problem: Problem) -> Any:
        from onnx import TensorProto, helper, numpy_helper

        T, B, I, H = problem.shape
        w_ih, w_hh, b_ih, b_hh = problem.weights
        node = helper.make_node("RNN", ["x", "w", "r", "b"], ["y"], hidden_size=H)
        graph = helper.make_graph(
            [node],
            "rnn",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [T, B, I])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [T, 1, B, H])],
            [
                numpy_helper.from_array(w_ih[None].numpy(), "w"),
                numpy_helper.from_array(w_hh[None].numpy(), "r"),
                numpy_helper.from_array(torch.cat([b_ih, b_hh])[None].numpy(), "b"),
            ],
        )
        opset = helper.make_opsetid("", 14)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8)

    def forward(self) -> Any:
        return self.session.run(None, {"x": self.x})[0]

    def to_torch(self, array: Any) -> Tensor:
        return torch.from_numpy(array).squeeze(1)


class TorchCell(ModulePeer):
    name = "nn.RNNCell"

    def prepare(self, problem: Problem) -> None:
        super().prepare(replace(problem, x=problem.x[0], grad=problem.grad[0]))

    def make_module(self, I: int, H: int) -> nn.Module:
        return nn.RNNCell(I, H)

    def output(self) -> Tensor:
        return self.module(self.x, self.h0)


class FusedCell(TorchCell):
    name = "fusedrnn.RNNCell"

    @classmethod
    def missing(cls) -> str | None:
        return fusedrnn_missing()

    def make_module(self, I: int, H: int) -> nn.Module:
        import fusedrnn

        return fusedrnn.RNNCell(I, H)


# The first is the baseline of every ratio, the second is the subject of the benchmark.
LAYER_PEERS: list[type[Peer]] = [
    TorchRNN, FusedRNN, UnbindLoop, CellLoop, CompiledLoop, JaxScan, OnnxRuntime,
]  # fmt: skip
CELL_PEERS: list[type[Peer]] = [TorchCell, FusedCell]
