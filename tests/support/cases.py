"""Problems for tests of the engines, and their expected results."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrnn import reference


@dataclass(frozen=True)
class Case:
    """One layer in one direction. With ``lengths``, the batch is packed; then ``B`` is not used."""

    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 7
    nonlinearity: str = "tanh"
    reverse: bool = False
    lengths: tuple[int, ...] | None = None
    reset: bool = False
    alpha: bool = False
    alpha_varies: bool = False  # an alpha for each step and row; with alpha=True
    form: str = "rate"
    reset_to: bool = False  # with reset=True
    state_input: bool = False
    grad_clip: float | None = None
    bias: bool = True
    h0: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0  # for the values of the tensors

    def __str__(self) -> str:
        usual = vars(Case())
        unusual = [f"{k}={v}" for k, v in vars(self).items() if v != usual[k]]
        return " ".join(unusual) or "default"

    @property
    def batch_sizes(self) -> Tensor | None:
        if self.lengths is None:
            return None
        longest = max(self.lengths)
        return torch.tensor(
            [sum(n > t for n in self.lengths) for t in range(longest)], device="cpu"
        )

    @property
    def names(self) -> list[str]:
        """The names of the arguments that have a gradient."""
        biases = ["b_ih", "b_hh"] * self.bias
        others = ("h0", "alpha", "reset_to", "state_input")
        return ["x", "w_ih", "w_hh", *biases, *(name for name in others if getattr(self, name))]

    def arguments(self, requires_grad: bool = False) -> dict[str, Tensor]:
        """Return all arguments that have a gradient, by their names in ``rnn``.

        They are on torch's default device, with the same values on every device.
        """
        torch.default_generator.manual_seed(self.seed)  # torch.manual_seed takes 1 ms
        rows = (self.T, self.B) if self.lengths is None else (sum(self.lengths),)
        batch = self.B if self.lengths is None else len(self.lengths)
        wide = {"dtype": torch.float64, "device": "cpu"}
        scale = self.H**-0.5
        found = {
            "x": torch.randn(*rows, self.I, **wide),
            "w_ih": torch.randn(self.H, self.I, **wide) * self.I**-0.5,
            "w_hh": torch.randn(self.H, self.H, **wide) * scale,
        }
        if self.bias:
            found["b_ih"] = torch.randn(self.H, **wide)
            found["b_hh"] = torch.randn(self.H, **wide)
        if self.h0:
            found["h0"] = torch.randn(batch, self.H, **wide)
        if self.alpha:
            shape = (*rows, self.H) if self.alpha_varies else (self.H,)
            found["alpha"] = torch.rand(shape, **wide) * 0.9 + 0.05
        if self.reset_to:
            found["reset_to"] = torch.randn(*rows, self.H, **wide)
        if self.state_input:
            found["state_input"] = torch.randn(*rows, self.H, **wide)
        device = torch.get_default_device()
        return {k: v.to(device, self.dtype).requires_grad_(requires_grad) for k, v in found.items()}

    def flags(self) -> dict[str, object]:
        rows = (self.T, self.B) if self.lengths is None else (sum(self.lengths),)
        generator = torch.Generator().manual_seed(self.seed + 1)
        reset = torch.rand(rows, generator=generator, device="cpu") <= 0.3
        return {
            "nonlinearity": self.nonlinearity,
            "form": self.form,
            "reverse": self.reverse,
            "batch_sizes": self.batch_sizes,
            "reset": reset.to(torch.get_default_device()) if self.reset else None,
            "grad_clip": self.grad_clip,
        }

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)


def oracle(case: Case, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the results of the reference in float64."""
    wide = {k: v.double() for k, v in arguments.items()}
    return reference.rnn(**wide, **case.flags())  # type: ignore[arg-type]


# Cases that differ in kind. Sizes straddle the tiles of every instruction set.
SIZES = [
    Case(T=1, B=1, I=1, H=1),
    Case(T=1, B=5, I=3, H=17),
    Case(T=3, B=1, I=1, H=3),
    Case(T=9, B=2, I=33, H=31),
    Case(T=40, B=1, I=17, H=33),
    Case(T=70, B=3, I=5, H=129),
    Case(T=6, B=31, I=129, H=17),
    Case(T=4, B=33, I=3, H=65),
    Case(T=3, B=7, I=20, H=1000),
    Case(T=30, B=1, I=1000, H=130),
]
FLAGS = [
    Case(reverse=True),
    Case(h0=False),
    Case(bias=False),
    Case(reset=True),
    Case(alpha=True),
    Case(lengths=(5, 3, 3, 1)),
    Case(lengths=(1,)),
    Case(lengths=(4, 4, 4)),
    Case(lengths=(30,) * 5 + (20,) * 9 + (19, 2, 2, 1), reverse=True, H=33),
    Case(T=20, B=9, H=70, reverse=True, reset=True, alpha=True, h0=False),
    Case(lengths=(9, 8, 8, 5, 1, 1), reverse=True, reset=True, alpha=True),
    Case(lengths=(9, 8, 8, 5, 1, 1), reset=True, h0=False, I=40),
]
NONLINEARITIES = [
    Case(T=20, nonlinearity=name, alpha=alpha)
    for name in reference.NONLINEARITIES
    for alpha in (False, True)
]
_ENDING = (9, 8, 8, 5, 1, 1)
FORMS = [
    *(
        Case(form=form, nonlinearity=n, alpha=True, T=9)
        for form in ("potential", "inside")
        for n in ("tanh", "softplus", "sigmoid", "elu")
    ),
    *(
        Case(form=form, alpha=True, alpha_varies=True, state_input=True, reset=True, B=9, H=33)
        for form in ("rate", "potential", "inside")
    ),
    *(
        Case(lengths=_ENDING, form=form, alpha=True, reset=True, reset_to=True, reverse=reverse)
        for form in ("rate", "potential", "inside")
        for reverse in (False, True)
    ),
    Case(form="potential", h0=False, reverse=True),
    Case(form="potential", nonlinearity="sigmoid", h0=False, reset=True),
    Case(form="inside", state_input=True),
    Case(state_input=True, T=9, B=2, I=33, H=31),
    Case(reset=True, reset_to=True, T=3, B=7, I=20, H=129),
    Case(lengths=_ENDING, form="potential", alpha=True, alpha_varies=True, reverse=True),
    Case(T=40, B=1, I=17, H=129, form="potential", alpha=True),
]
ALL = [Case(), *SIZES, *FLAGS, *NONLINEARITIES, *FORMS]


class Calls(TorchDispatchMode):
    """Records the names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))
