"""Call ops with random valid and invalid arguments: expect an error, or results of the right sizes.

python tests/support/fuzz_ops.py [COUNT [FIRST]]    COUNT calls, whose seeds begin at FIRST

A seed determines its call, and is printed if the call fails. Memory is filled with NaN before an op
writes to it, so that results that were never written are found.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _C, reference

OPS = (
    "activation",
    "tangent",
    "adjoint",
    "step",
    "bptt",
    "previous",
    "following",
    "following_first",
    "recurrent_product",
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STRANGE = (torch.int64, torch.bool, torch.complex64, torch.uint8, *DTYPES)
GRADIENTS = ("x", "w_ih", "b_ih", "b_hh", "h0", "v0", "w_hh", "alpha", "q")  # of bptt
UNUSED = ("v0", "r", "f")  # unused in the form "rate", like q of activation
ALL_WANTED = [name not in (*UNUSED, "q") for name in GRADIENTS]
OPTIONAL = ("w_ih", "b_ih", "b_hh", "h0", "reset", "first", "s0", "w", "q", "g", "d", "g_n")
HUGE = 2**62
ZEROS = (0.0, 0.05, 0.1)  # B, I or H is 0 if a random number is within 0.05 above this


class Call:
    """One op and its arguments, which are valid until `spoil` changes some of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.op = self.random.choice(OPS)
        self.dtype = self.random.choice(DTYPES)
        T, B, I, H = (self.random.choice((1, 2, 3, 5, 17)) for _ in range(4))
        zero = self.random.random()
        B, I, H = (size * (zero < low or zero > low + 0.05) for size, low in zip((B, I, H), ZEROS))
        packed = B > 0 and self.random.random() < 0.4
        sizes = (
            sorted((self.random.randint(1, B) for _ in range(T)), reverse=True) if packed else []
        )
        rows = (sum(sizes),) if packed else (T, B)
        B = sizes[0] if packed else B
        leaky = self.random.random() < 0.4
        name = self.random.choice(list(reference.NONLINEARITIES))
        driven = self.random.random() < 0.2  # no w_ih: x is the input of the units
        series, states = (*rows, H), (B, H)
        shapes = {
            "x": (*rows, H if driven else I), "w_ih": (H, I), "w_hh": (H, H), "b_ih": (H,),
            "b_hh": (H,), "h0": states, "s0": states, "g_n": states, "first": states,
            **dict.fromkeys(("w", "q", "g", "d", "h", "saved", "series", "delta"), series),
        }  # fmt: skip
        if self.op == "step":
            layers, states = self.random.choice((1, 2, 3)), states[self.random.randrange(2) :]
            shapes |= {"x": (*states[:-1], I), "h0": (layers, *states)}
        self.schema = getattr(torch.ops.fusedrnn, self.op).default._schema.arguments
        self.arguments: dict[str, Any] = {}
        for name_of in (argument.name for argument in self.schema):
            value: Any
            if name_of in UNUSED or (name_of == "q" and self.op == "activation"):
                value = None
            elif name_of in shapes:
                value = self.tensor(*shapes[name_of])
            elif name_of == "weights":
                biases = [(H,), (H,)] * (self.random.random() < 0.7)
                value = [
                    self.tensor(*size)
                    for layer in range(layers)
                    for size in ((H, H if layer else I), (H, H), *biases)
                ]
                sizes_of_alpha = self.random.choice(((), (H,)))
                alphas = (self.tensor(*sizes_of_alpha) for _ in range(layers * leaky))
                value += [alpha.abs().clamp(0, 1) for alpha in alphas]
            elif name_of == "alpha":
                value = self.tensor(H).abs().clamp(0, 1) if leaky else None
            elif name_of == "reset":
                value = torch.rand(rows, generator=self.numbers) <= 0.3
            elif name_of == "batch_sizes":
                value = torch.tensor(sizes) if packed else None
            elif name_of == "nonlinearity":
                value = name
            elif name_of == "form":
                value = "rate"
            elif name_of == "batch":
                value = B
            elif name_of == "grad_clip":
                value = self.random.choice((None, 0.1))
            elif name_of == "wanted":
                value = [self.random.random() < 0.7 for _ in range(9)]
            else:  # reverse, full, to_h0
                value = self.random.random() < 0.5
            if name_of in OPTIONAL and self.op != "step" and self.random.random() < 0.3:
                value = None
            self.arguments[name_of] = value
        if driven and "w_ih" in self.arguments:
            self.arguments["w_ih"] = None
        if self.op == "activation" and self.arguments["w_ih"] is None:
            self.arguments["x"] = self.tensor(*series)
        if self.op == "bptt":
            if self.arguments["w_ih"] is None:
                self.arguments["x"] = self.tensor(*series)
            wanted = self.arguments["wanted"]
            for place, of in enumerate(GRADIENTS):
                wanted[place] &= of not in UNUSED and of != "q"
                if of in ("w_ih", "b_ih", "b_hh", "alpha"):
                    wanted[place] &= self.arguments[of] is not None
            if not leaky and name not in _C.saving_z:
                self.arguments["saved"] = None
        self.spoilt: list[str] = []

    def __str__(self) -> str:
        def word(value: Any) -> str:
            if isinstance(value, list):
                return f"[{', '.join(map(word, value))}]"
            if not isinstance(value, Tensor):
                return repr(value)
            if value.dtype == torch.int64 and value.numel() < 20 and value.is_cpu:
                return str(value.tolist() if value.layout == torch.strided else value)
            return f"{value.dtype}{list(value.shape) if not value.is_nested else '[nested]'}"

        given = ", ".join(f"{name}={word(value)}" for name, value in self.arguments.items())
        return f"{self.op}({given}), wrong: {self.spoilt or 'nothing'}"

    def tensor(self, *sizes: int) -> Tensor:
        t = torch.randn(sizes, generator=self.numbers, dtype=torch.float64).mul(0.3).to(self.dtype)
        return t.requires_grad_(self.random.random() < 0.2)

    def spoil(self, name: str) -> None:
        self.spoilt.append(name)
        value = self.arguments[name]
        if name == "batch_sizes" and self.random.random() < 0.8:
            self.arguments[name] = self.wrong_batch_sizes(value)
        elif isinstance(value, Tensor):
            ways = [getattr(self, way) for way in dir(self) if way.startswith("with_")]
            self.arguments[name] = self.random.choice(ways)(value)
        elif name == "weights":
            place = self.random.randrange(len(value))
            ways = [getattr(self, way) for way in dir(self) if way.startswith("with_")]
            wrong = self.random.choice(ways)(value[place])
            others = [[], [wrong], [wrong, value[place]]]
            self.arguments[name] = [
                *value[:place],
                *self.random.choice(others),
                *value[place + 1 :],
            ]
        elif name == "nonlinearity":
            self.arguments[name] = self.random.choice(("", "cosh", "tanh\0", "é" * 99, None, 3))
        elif name == "form":
            self.arguments[name] = self.random.choice(("", "rates", "rate\0", "é" * 99, None, 3))
        elif name == "grad_clip":
            self.arguments[name] = self.random.choice((0, -1.0, float("nan"), "1", [1.0]))
        elif name == "batch":
            self.arguments[name] = self.random.choice((value + 1, value - 1, 0, -1, HUGE, -HUGE))
        elif name == "wanted":
            self.arguments[name] = self.random.choice((ALL_WANTED, [True] * 8, [], [False] * 9))
        else:
            self.arguments[name] = self.random.choice((None, 7, "yes", self.tensor(2, 3), [1.0]))

    def wrong_batch_sizes(self, value: Any) -> Any:
        right = value.tolist() if isinstance(value, Tensor) else [2, 1]
        at = self.random.randrange(len(right))
        wrong = list(right)
        wrong[at] = self.random.choice((0, -1, right[at] + 1, -right[at], HUGE, -HUGE, 2**63 - 1))
        return self.random.choice(
            (
                torch.tensor(wrong),
                torch.tensor([12, -3]),
                torch.tensor(right[::-1]),
                torch.tensor([HUGE] * 4),
                torch.tensor(right, dtype=torch.int32),
                torch.tensor(right, dtype=torch.float32),
                torch.tensor([right]),
                torch.tensor(right[0]),
                torch.tensor([], dtype=torch.int64),
                torch.tensor(right).repeat_interleave(2)[::2],
                torch.tensor(right, device="meta"),
                torch._neg_view(torch.tensor(right)),
                torch.tensor(right).to_sparse(),
                right,
                None,
            )
        )

    # Ways to change a tensor; some of them leave it valid.

    def with_another_size(self, t: Tensor) -> Any:
        if t.dim() == 0:
            return t
        sizes = list(t.shape)
        dim = self.random.randrange(len(sizes))
        sizes[dim] = max(0, self.random.choice((sizes[dim] + 1, sizes[dim] - 1, 0, 1)))
        return self.tensor(*sizes).to(t.dtype)

    def with_another_rank(self, t: Tensor) -> Any:
        sizes = [self.random.choice((0, 1, 2, 3)) for _ in range(self.random.randrange(5))]
        return self.tensor(*sizes).to(t.dtype)

    def with_swapped_dimensions(self, t: Tensor) -> Any:
        return t.transpose(0, -1) if t.dim() > 1 else t

    def with_another_dtype(self, t: Tensor) -> Any:
        return t.detach().to(self.random.choice(STRANGE))

    def with_other_strides(self, t: Tensor) -> Any:
        if t.dim() == 0:
            return t
        return self.random.choice(
            (
                t.repeat_interleave(2, -1)[..., ::2],
                t.transpose(0, -1).contiguous().transpose(0, -1),
                torch.cat([t, t], -1)[..., t.size(-1) :],
                t[..., :1].expand(t.shape) if t.size(-1) else t,
            )
        )

    def with_values_out_of_range(self, t: Tensor) -> Any:
        value = self.random.choice((float("nan"), float("inf"), -1.0, 5.0))
        return t.detach().clone().fill_(value) if t.is_floating_point() else t

    def with_meta(self, t: Tensor) -> Any:
        return t.to("meta")

    def with_another_layout(self, t: Tensor) -> Any:
        if t.dim() < 2:
            return t.detach().to_sparse()
        return self.random.choice((Tensor.to_sparse, _nested))(t.detach())

    def with_no_tensor(self, t: Tensor) -> Any:
        return self.random.choice((None, 0.5, "tanh", [0.5, 0.5], True))

    def wrong_sizes(self, results: tuple[Tensor | None, ...]) -> bool:
        found = [None if t is None else tuple(t.shape) for t in results]
        # activation, tangent and adjoint return a result of size [0] if it is not wanted.
        maybe_empty = self.op in ("activation", "tangent", "adjoint")
        return len(found) != len(self.expected()) or any(
            one != other and not (maybe_empty and i > 0 and one == (0,))
            for i, (one, other) in enumerate(zip(found, self.expected()))
        )

    def expected(self) -> tuple[tuple[int, ...] | None, ...]:
        """Return the sizes of the results, from those of the arguments; None for no result."""
        a = self.arguments
        if self.op in ("previous", "following"):
            return (tuple(a["series"].shape),)
        if self.op == "following_first":
            return ((a["batch"], a["series"].size(-1)),)
        if self.op == "recurrent_product":
            return ((a["delta"].size(-1), a["series"].size(-1)),)
        if self.op == "step":
            return (*a["x"].shape[:-1], a["h0"].size(-1)), tuple(a["h0"].shape)
        series = a.get("h", a.get("saved", a.get("x")))
        size = a["w_hh"].size(0)
        sizes = a["batch_sizes"]
        batch = series.size(1) if sizes is None else int(sizes[0])
        full, states = (*series.shape[:-1], size), (batch, size)
        if self.op == "bptt":
            w_ih = None if a["w_ih"] is None else tuple(a["w_ih"].shape)
            x, units = tuple(a["x"].shape), (size,)
            found = (x, w_ih, units, units, states, None, (size, size), units, None)
            return tuple(f if wanted else None for f, wanted in zip(found, a["wanted"]))
        unused = (0,)
        return {
            "activation": (full, states, full),
            "tangent": (full, states, full, unused),
            "adjoint": (full, states, unused, full, unused),
        }[self.op]

    def plain(self) -> list[Tensor]:
        """Return the tensor arguments, or an empty list if one is not a dense CPU tensor."""
        values = [*self.arguments.values(), *self.arguments.get("weights", ())]
        tensors = [t for t in values if isinstance(t, Tensor)]
        plain = all(t.is_cpu and t.layout == torch.strided and not t.is_nested for t in tensors)
        return tensors if plain else []

    def check(self) -> str:
        """Run the op; return 'right' or the type of the error."""
        for name in self.random.sample(
            list(self.arguments), self.random.choice((0, 1, 1, 1, 2, 3))
        ):
            self.spoil(name)
        op: Callable[..., Any] = getattr(torch.ops.fusedrnn, self.op)
        try:
            # With gradients, a step does not call the engine directly.
            with torch.set_grad_enabled(self.op != "step" or self.random.random() < 0.3):
                results = op(*self.arguments.values())
            results = (results,) if isinstance(results, Tensor) else results
            # Clipped gradients cannot be differentiated.
            clipped = self.op != "activation" and self.arguments.get("grad_clip") is not None
            if not clipped and any(t is not None and t.requires_grad for t in results):
                total = sum(t.sum() for t in results if t is not None and t.requires_grad)
                total.backward()
        except Exception as error:
            if not self.spoilt or not str(error) or "INTERNAL ASSERT" in str(error):
                raise
            return type(error).__name__
        tensors = self.plain()
        if not tensors:
            return "right for other tensors"
        assert not self.wrong_sizes(results), f"sizes of {results}"
        if all(bool(t.isfinite().all()) for t in tensors):
            assert all(t is None or not t.isnan().any() for t in results), "not all was written"
        return "right"


def _nested(t: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(t.unbind()) or [t])


def run(seeds: range) -> dict[str, int]:
    """Count the outcomes. Raise at the first call whose outcome is not allowed."""
    outcomes: dict[str, int] = {}
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for seed in seeds:
            call = Call(seed)
            try:
                outcome = call.check()
            except Exception as error:
                raise AssertionError(f"seed {seed}: {call}") from error
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    finally:
        torch.use_deterministic_algorithms(False)
    return outcomes


if __name__ == "__main__":
    count, first = (int(word) for word in (sys.argv[1:] + ["1000", "0"][len(sys.argv) - 1 :]))
    print(run(range(first, first + count)))
