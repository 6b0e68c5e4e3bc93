"""Random problems, each run by fusedrnn and by the reference: the differential test.

python tests/support/differential.py --minutes 60           new seeds until the time is over
python tests/support/differential.py --seed 7 --count 1000  the seeds 7, 8, ..., 1006
python tests/support/differential.py --case 7               the seed 7, printed in full
python tests/support/differential.py --accuracy             errors in float32, and torch.nn.RNN's

A seed determines a trial and all its values. --engine chooses the engine; by default, the seed
chooses one of this CPU's instruction sets. tests/engine/test_differential.py runs fixed seeds.

Every result must be as accurate as torch's in the same dtype, by the rule of accuracy.py. A result
that breaks the rule is checked again: then torch's error is the largest over evaluations whose
arguments are within one rounding of the given ones, and derivatives are not checked if a
pre-activation is that close to a kink of the nonlinearity.

With a NaN or an infinity in one argument, the results must have NaN and infinities where the
reference has them, in float64 or in the trial's dtype, except for the cases listed in EXPECTED.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, log2, nan
from typing import Any
from unittest.mock import patch

import torch
from accuracy import inaccuracy
from cases import Case
from engines import ENGINES, Engine
from pairs import pair
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.functional import elu, softplus

import fusedrnn
from fusedrnn import _C, reference

SLACK, FLOOR = 2.0, 8.0  # of the rule in accuracy.py
FLOOR_FLOAT64 = 64.0  # for float64: the reference is no more accurate than the engine
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The reference's functions, except those that torch computes wrongly. Above 20, torch's softplus
# returns the argument, which is off by up to 2e-9. At a NaN, torch's hardtanh and elu have a slope
# of 1 in some elements and of 0 or NaN in others, depending on the element's place in a vector.
DEFINITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **reference.NONLINEARITIES,
    "softplus": lambda z: softplus(z, threshold=40),
    "hardtanh": lambda z: torch.where(z < -1, -1, torch.where(z > 1, 1, z)),
    "elu": lambda z: torch.where(z.isnan(), z, elu(torch.where(z.isnan(), 0, z))),
}
KINKS = {"relu": [0], "retanh": [0], "leaky_relu": [0], "hardtanh": [-1, 1], "elu": [0]}
SATURATING = ("tanh", "retanh", "sigmoid")  # torch computes their slopes from rounded values, too
SELECTED = ("relu", "retanh", "hardtanh")

# Correct differences in NaN and infinities. The keys are the reasons. The predicates recognise a
# difference by the trial, the name of the result, our value and the reference's value.
EXPECTED: dict[str, Callable[[Trial, str, str, str], bool]] = {
    "a slope of 0 times NaN or infinity is NaN; torch's relu and hardtanh put 0 there": (
        lambda trial, of, ours, _: (
            of[0] == "d" and ours == "nan" and trial.case.nonlinearity in SELECTED
        )
    ),
    "without h0, the first step adds nothing to dw_hh; the reference adds 0 * NaN": (
        lambda trial, of, _, theirs: of == "dw_hh" and theirs == "nan" and not trial.case.h0
    ),
    "a row that ends, or is forgotten, has an adjoint of 0, which is multiplied by w_hh": (
        lambda trial, of, ours, _: (
            of[0] == "d" and ours == "nan" and trial.poison[0] == "w_hh"
            and (trial.case.reset or trial.case.lengths is not None)
        )
    ),
    "the gradient of alpha is a * (phi - k); the reference's, a * phi - a * k, is inf - inf": (
        lambda trial, of, ours, theirs: of == "dalpha" and theirs == "nan" and ours != "finite"
    ),
    "torch's jvp of a product multiplies a value by zeros where an argument has no tangent": (
        lambda trial, of, _, theirs: of[0] == "d" and theirs == "nan" and "jvp" in trial.mode
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A problem and the way it is run. ``case`` has the shapes and most flags."""

    seed: int
    case: Case
    without: list[str]  # arguments that are None
    alpha: str  # none, number, one, scalar, vector, ones
    scale: float  # of x
    layouts: dict[str, str]  # of arguments, and of the cotangents, that are not dense
    poison: tuple[str, float, float]  # argument or "", value, and relative place from 0 to 1
    wanted: list[str]  # arguments to differentiate with respect to
    used: list[int]  # which of output and h_n the loss depends on
    mode: str
    batched: dict[str, int]  # for vmap: arguments with a dimension of samples, and its index
    samples: int
    threads: int

    def __str__(self) -> str:
        return "\n".join(f"  {f.name:<11}{getattr(self, f.name)!r}" for f in fields(self))

    @property
    def results(self) -> list[str]:
        """The names of the results; those of derivatives begin with d."""
        outputs, gradients = [("h", "h_n")[i] for i in self.used], [f"d{n}" for n in self.wanted]
        mode = self.mode.removeprefix("vmap of ")
        return {
            "forward": outputs,
            "twice": [*outputs, *gradients, *gradients],
            "double": [*gradients, *(f"d{name}" for name in gradients)],
            "grad": gradients,
            "jvp": [*outputs, *(f"d{name}" for name in outputs)],
        }.get(mode, [*outputs, *gradients])


def make_trial(seed: int) -> Trial:
    rng = random.Random(seed)
    big = rng.random() < 0.005  # enough work for several threads

    def chance(probability: float) -> bool:
        return rng.random() < probability

    def size(*common: int) -> int:
        return rng.choice((31, 32, 33, 129) if chance(0.1) else common)

    T = 12 if big else rng.choice((17, 40) if chance(0.03) else (1, 1, 2, 3, 4, 5, 6, 9))
    B = rng.choice((1, 3, 16, 64) if big else (0, 1, 1, 2, 3, 3, 5, 17, 33))
    lengths = tuple(sorted((rng.randint(1, T) for _ in range(B or 1)), reverse=True))
    alpha = rng.choice(("none", "none", "none", "number", "one", "scalar", "vector", "ones"))
    case = Case(
        T=T,
        B=B,
        I=size(1, 2, 3, 5, 17),
        H=rng.choice((200, 300, 513)) if big else size(1, 2, 3, 5, 8, 16, 17),
        nonlinearity=rng.choice(list(reference.NONLINEARITIES)),
        reverse=chance(0.4),
        lengths=lengths if chance(0.3) else None,
        reset=chance(0.3),
        alpha=alpha in ("scalar", "vector", "ones"),
        bias=chance(0.8),
        h0=chance(0.6),
        dtype=rng.choice(DTYPES),
        seed=seed,
    )
    without = [name for name in ("b_ih", "b_hh") if chance(0.15)]
    if chance(0.1):
        case, without = replace(case, I=case.H), [*without, "w_ih"]
    floating = [name for name in case.names if name not in without]
    every = [*floating, *["reset"] * case.reset]
    mode = rng.choices(list(MODES), [weight for _, weight in MODES.values()])[0]
    poison = ("", 0.0, 0.0)
    if chance(0.3) and mode != "double" and alpha != "ones":  # (1 - alpha) * inf is NaN
        argument = rng.choice([name for name in floating if name != "alpha"])  # must be in (0, 1]
        poison = (argument, rng.choice((nan, inf, -inf)), rng.random())
    return Trial(
        seed=seed,
        case=case,
        without=without,
        alpha=alpha,
        scale=rng.choice((1, 1, 1, 1, 0.01, 8)),
        layouts={n: rng.choice(list(LAYOUTS)) for n in [*every, "cotangents"] if chance(0.2)},
        poison=poison,
        wanted=[name for name in floating if chance(0.6)] or [rng.choice(floating)],
        used=rng.choice(([0, 1], [0, 1], [0], [1])),
        mode=mode,
        batched={n: rng.randint(0, 1) for n in every if chance(0.4)} or {rng.choice(every): 0},
        samples=rng.choice((1, 2, 3)),
        threads=rng.choice((1, 2, 3)) if big or chance(0.03) else 1,
    )


def _sliced(tensor: Tensor) -> Tensor:
    inner = tensor.new_zeros([n + 1 for n in tensor.shape])[(slice(1, None),) * tensor.dim()]
    return inner.copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "batch first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t,
    "apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "sliced": _sliced,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() else t,  # every row is the first one
}


@dataclass(frozen=True)
class Problem:
    """The tensors of a trial."""

    args: dict[str, Tensor]
    flags: dict[str, Any]
    in_dims: tuple[int | None, ...]
    cotangents: tuple[Tensor, ...]  # of the outputs that are used
    tangents: tuple[Tensor, ...]  # of the wanted arguments

    def map(self, f: Callable[[Tensor], Tensor]) -> Problem:
        return replace(
            self,
            flags=dict(self.flags),
            args={k: f(v) if v.is_floating_point() else v for k, v in self.args.items()},
            cotangents=tuple(map(f, self.cotangents)),
            tangents=tuple(map(f, self.tangents)),
        )


def make_problem(trial: Trial) -> Problem:
    def sample(case: Case) -> dict[str, Any]:
        args = {k: v for k, v in case.arguments().items() if k not in trial.without}
        args["x"] *= trial.scale
        if trial.alpha == "scalar":
            args["alpha"] = args["alpha"][0]
        if trial.alpha == "ones":
            args["alpha"].fill_(1)
        return {**args, "reset": case.flags()["reset"]} if case.reset else args

    def lay_out(name: str, tensor: Tensor) -> Tensor:
        return LAYOUTS[trial.layouts[name]](tensor) if name in trial.layouts else tensor

    case, flags = trial.case, trial.case.flags()
    del flags["reset"]
    if trial.alpha in ("number", "one"):
        flags["alpha"] = 1.0 if trial.alpha == "one" else random.Random(trial.seed).uniform(0.05, 1)
    args = sample(case)
    batch = case.B if case.lengths is None else len(case.lengths)
    sizes = [(*args["x"].shape[:-1], case.H), (batch, case.H)]
    outputs = [torch.randn(size, dtype=torch.float64).to(args["x"]) for size in sizes]
    tangents = tuple(torch.randn_like(args[name]) for name in trial.wanted)
    in_dims: list[int | None] = [None] * len(args)
    if trial.mode.startswith("vmap"):
        samples = [sample(replace(case, seed=trial.seed + v)) for v in range(trial.samples)]
        for i, name in enumerate(args):
            if name in trial.batched:
                dim = in_dims[i] = min(trial.batched[name], args[name].dim())
                args[name] = torch.stack([each[name] for each in samples], dim)
    args = {name: lay_out(name, tensor) for name, tensor in args.items()}
    name, value, place = trial.poison
    if name and args[name].numel():
        flat = torch.tensor(int(place * args[name].numel()))
        args[name][torch.unravel_index(flat, args[name].shape)] = value
    cotangents = tuple(lay_out("cotangents", outputs[i]) for i in trial.used)
    return Problem(args, flags, tuple(in_dims), cotangents, tangents)


# ---- the modes: f maps the wanted arguments to the outputs that are used ----

Outputs = Callable[..., tuple[Tensor, ...]]
Tensors = tuple[Tensor, ...]


def forward(
    f: Outputs, wanted: Tensors, cotangents: Tensors, tangents: Tensors
) -> Iterable[Tensor]:
    with torch.no_grad():
        return f(*wanted)


def _graph(f: Outputs, wanted: Tensors) -> tuple[Tensors, Tensors]:
    leaves = tuple(t.detach().requires_grad_() for t in wanted)
    return leaves, f(*leaves)


def backward(
    f: Outputs, wanted: Tensors, cotangents: Tensors, tangents: Tensors
) -> Iterable[Tensor]:
    leaves, outputs = _graph(f, wanted)
    return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))


def twice(f: Outputs, wanted: Tensors, cotangents: Tensors, tangents: Tensors) -> Iterable[Tensor]:
    leaves, outputs = _graph(f, wanted)
    first = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    torch.autograd.backward(outputs, cotangents)
    return (*outputs, *first, *(leaf.grad for leaf in leaves))  # type: ignore[misc]


def double(f: Outputs, wanted: Tensors, cotangents: Tensors, tangents: Tensors) -> Iterable[Tensor]:
    leaves, outputs = _graph(f, wanted)
    first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    first = tuple(g + 0 * leaf for g, leaf in zip(first, leaves))  # a gradient may be constant
    return (*first, *torch.autograd.grad(first, leaves, tangents, materialize_grads=True))


def of_grad(
    f: Outputs, wanted: Tensors, cotangents: Tensors, tangents: Tensors
) -> Iterable[Tensor]:
    def loss(*wanted: Tensor) -> Tensor:
        return torch.stack([(y * c).sum() for y, c in zip(f(*wanted), cotangents)]).sum()

    return grad(loss, tuple(range(len(wanted))))(*wanted)


def of_vjp(f: Outputs, wanted: Tensors, cotangents: Tensors, tangents: Tensors) -> Iterable[Tensor]:
    outputs, pull = vjp(f, *wanted)
    return (*outputs, *pull(cotangents))


def of_jvp(f: Outputs, wanted: Tensors, cotangents: Tensors, tangents: Tensors) -> Iterable[Tensor]:
    # torch does not support expanded dual tensors
    outputs, derivatives = jvp(f, tuple(t.clone() for t in wanted), tangents)
    return (*outputs, *derivatives)


MODES: dict[str, tuple[Callable[..., Iterable[Tensor]], float]] = {  # with weights for the choice
    "forward": (forward, 15),
    "backward": (backward, 40),
    "twice": (twice, 5),
    "double": (double, 10),
    "grad": (of_grad, 4),
    "vjp": (of_vjp, 4),
    "jvp": (of_jvp, 4),
    "vmap of forward": (forward, 5),
    "vmap of grad": (of_grad, 4),
    "vmap of vjp": (of_vjp, 2),
    "vmap of jvp": (of_jvp, 1),
    "compile eager": (backward, 0.02),
    "compile aot_eager": (backward, 0.02),
}


def run(rnn: Callable[..., Any], trial: Trial, problem: Problem) -> Sequence[Tensor]:
    names, flags = list(problem.args), dict(problem.flags)
    if rnn is reference.rnn and trial.alpha == "one":
        del flags["alpha"]  # avoids (1 - alpha) * inf

    def all_outputs(*args: Tensor) -> tuple[Tensor, Tensor]:
        return rnn(**{"w_ih": None, **dict(zip(names, args))}, **flags)

    if rnn is fusedrnn.rnn and trial.mode.startswith("compile"):
        torch._dynamo.reset()
        backend = trial.mode.removeprefix("compile ")
        all_outputs = torch.compile(all_outputs, backend=backend, fullgraph=True)

    def one(*args: Tensor) -> tuple[Tensor, ...]:
        def outputs(*wanted: Tensor) -> tuple[Tensor, ...]:
            found = all_outputs(
                *{**dict(zip(names, args)), **dict(zip(trial.wanted, wanted))}.values()
            )
            return tuple(found[i] for i in trial.used)

        wanted = tuple(args[names.index(name)] for name in trial.wanted)
        return tuple(MODES[trial.mode][0](outputs, wanted, problem.cotangents, problem.tangents))

    batched = trial.mode.startswith("vmap")
    return (vmap(one, problem.in_dims) if batched else one)(*problem.args.values())


# ---- comparison with the reference ----


def kinds_of(tensor: Tensor) -> Tensor:
    """Return 0 for finite elements, 1 for inf, 2 for -inf and 3 for nan."""
    return tensor.isnan() * 3 + tensor.isposinf() * 1 + tensor.isneginf() * 2


def near_kink(trial: Trial, problem: Problem) -> bool:
    """Return whether a pre-activation is within rounding of a kink, where the slope jumps."""
    name, near = trial.case.nonlinearity, 8 * torch.finfo(trial.case.dtype).eps
    close: list[bool] = []

    def phi(z: Tensor) -> Tensor:
        values = z.detach()
        while torch._C._functorch.is_functorch_wrapped_tensor(values):
            values = torch._C._functorch.get_unwrapped(values)
        margin = near * values.nan_to_num(0, 0, 0).abs().clamp(1).max() if values.numel() else 0
        close.extend(bool(((values - kink).abs() <= margin).any()) for kink in KINKS[name])
        return DEFINITIONS[name](z)

    if name in KINKS:
        with patch.dict(reference.NONLINEARITIES, {name: phi}):
            run(reference.rnn, trial, problem.map(Tensor.double))
    return any(close)


def farthest(trial: Trial, problem: Problem, truths: Sequence[Tensor]) -> list[Tensor]:
    """Return torch's worst results over arguments within one rounding of the given ones."""
    eps, name, worst = torch.finfo(trial.case.dtype).eps, trial.case.nonlinearity, list(truths)

    for phase in range(6):

        def signs(t: Tensor, phase: int = phase) -> Tensor:  # vmap has no random numbers
            return (1e4 * t.detach().nan_to_num(0, 0, 0) + phase).sin().sign()

        def rounded(z: Tensor, signs: Callable[[Tensor], Tensor] = signs) -> Tensor:
            h, change = DEFINITIONS[name](z), (z - z.detach()).nan_to_num(0, 0, 0)
            return h * (1 + eps * signs(z)) + (name in SATURATING) * eps * signs(z) * change

        with patch.dict(reference.NONLINEARITIES, {name: rounded}):
            near = problem.map(lambda t, signs=signs: t * (1 + eps * signs(t)))  # type: ignore[misc]
            if "alpha" in near.flags:
                near.flags["alpha"] = problem.flags["alpha"] * (1 + eps * (-1) ** phase)
            for i, found in enumerate(run(reference.rnn, trial, near)):
                farther = (found.double() - truths[i]).abs() > (worst[i] - truths[i]).abs()
                worst[i] = torch.where(farther, found.double(), worst[i])
    return worst


def judge(trial: Trial, problem: Problem, notes: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield each failure's kind and details; ``notes`` counts the differences that are allowed."""
    truths = theirs = run(reference.rnn, trial, problem.map(Tensor.double))
    if trial.case.dtype != torch.float64:
        theirs = run(reference.rnn, trial, problem)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # such as vmap's about an op without a rule
            ours = run(fusedrnn.rnn, trial, problem)
    except Exception as error:
        yield f"{trial.mode}: raises {type(error).__name__}", str(error)[:2000]
        return
    what = trial.case.nonlinearity + " with alpha" * (trial.alpha != "none")
    what += f" {trial.poison[0]}={trial.poison[1]}" if trial.poison[0] else ""
    retried: list[Tensor] = []
    for i, (of, our, their, truth) in enumerate(zip(trial.results, ours, theirs, truths)):
        if (our.shape, our.dtype) != (their.shape, their.dtype):
            yield f"{trial.mode}: shape or dtype of {of}", f"{our.dtype} {list(our.shape)}"
            continue
        our, their, truth = our.detach(), their.detach(), truth.detach()
        finite = our.isfinite() & their.isfinite() & truth.isfinite()
        if not finite.all():
            found, expected = kinds_of(our), kinds_of(truth.to(our.dtype))
            wrong = (found != expected) & (found != kinds_of(their))
            for pair in set(zip(found[wrong].tolist(), expected[wrong].tolist())):
                a, b = (("finite", "inf", "-inf", "nan")[kind] for kind in pair)
                reason = next(
                    (why for why, holds in EXPECTED.items() if holds(trial, of, a, b)), ""
                )
                if reason:
                    notes[reason] += 1
                else:
                    yield (
                        f"{of}: {a}, not {b}: {what}",
                        f"of {our.numel()} {int(wrong.sum())} differ",
                    )
            our, their, truth = (torch.where(finite, t, 0) for t in (our, their, truth))
        floor = FLOOR_FLOAT64 if trial.case.dtype == torch.float64 else FLOOR
        excess = inaccuracy(our, their, truth, SLACK, floor)
        if not excess:
            continue
        if of[0] == "d" and near_kink(trial, problem):
            notes["a derivative near a kink is not judged"] += 1
            continue
        retried = retried or farthest(trial, problem, truths)
        their = torch.where(finite, retried[i], 0).nan_to_num(0, 0, 0)
        if still := inaccuracy(our, their, truth, SLACK, floor):
            yield f"{of}: inaccurate: {what} {trial.case.dtype}", f"{excess}; {still}"
        else:
            notes["accurate as torch for arguments within one rounding"] += 1


def check(seed: int, engine: Engine, notes: Counter[str]) -> list[tuple[str, str]]:
    """Return the failures of this seed's trial, run by this engine."""
    trial = make_trial(seed)
    if torch.get_num_threads() != trial.threads:
        torch.set_num_threads(trial.threads)
    with engine.installed(seed), patch.dict(reference.NONLINEARITIES, DEFINITIONS):
        return list(judge(trial, make_problem(trial), notes))


# ---- the commands ----


def available(name: str | None = None) -> list[Engine]:
    """Return the engines of this name, or by default one for each instruction set of this CPU."""
    if name:
        return [engine for engine in ENGINES if str(engine).startswith(name)]
    before = _C.build_info()["isa_chosen"]
    found = [engine for engine in ENGINES if engine.kind == "cpu" and _C.use_isa(engine.name)]
    _C.use_isa(before)
    return found


def search(seeds: Iterable[int], engines: list[Engine], minutes: float) -> int:
    """Return how many trials fail. Print the first failure of each kind, and counts at the end."""
    notes: Counter[str] = Counter()
    kinds: defaultdict[str, set[int]] = defaultdict(set)
    end, started = time.monotonic() + 60 * minutes, time.process_time()
    count = 0
    for seed in seeds:
        count += 1
        engine = engines[seed % len(engines)]
        for kind, detail in check(seed, engine, notes):
            if not kinds[kind]:
                print(f"--case {seed} --engine {engine}: {kind}: {detail}", flush=True)
            kinds[kind].add(seed)
        if time.monotonic() > end:
            break
    failed = len(set().union(*kinds.values()))
    print(f"{count} trials in {time.process_time() - started:.0f} s of a core, {failed} failed")
    for note, times in notes.most_common():
        print(f"{times:7} excused: {note}")
    for kind, where in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(where):7} {kind}: {sorted(where)[:3]}")
    return failed


def replay(seed: int, engine: Engine) -> int:
    """Print a trial, its results and its failures; return the number of failures."""
    trial = make_trial(seed)
    problem = make_problem(trial)
    print(f"{engine}\n{trial}")
    for name, arg in problem.args.items():
        print(f"  {name:<11}{list(arg.shape)} strides {arg.stride()}")
    failures = check(seed, engine, notes := Counter())
    with engine.installed(seed), patch.dict(reference.NONLINEARITIES, DEFINITIONS):
        wide = run(reference.rnn, trial, problem.map(Tensor.double))
        for name, *found in zip(
            trial.results,
            run(fusedrnn.rnn, trial, problem),
            run(reference.rnn, trial, problem),
            wide,
        ):
            print(
                *(
                    f"{name}, {whose}: {t.detach()}"
                    for whose, t in zip(("ours", "torch's", "float64"), found)
                ),
                sep="\n",
            )
    print(*(f"FAILED {kind}: {detail}" for kind, detail in failures), dict(notes), sep="\n")
    return len(failures)


def accuracy(count: int, seed: int) -> None:
    """Print how our largest error in float32 compares with torch.nn.RNN's, over random shapes."""
    rng = random.Random(seed)
    ratios: dict[str, list[float]] = defaultdict(list)
    for _ in range(count):
        T, B, H = (round(2 ** rng.uniform(0, log2(most))) for most in (64, 128, 512))
        I, layers, phi = rng.choice((1, 16, H)), rng.choice((1, 2)), rng.choice(("tanh", "relu"))
        torch.manual_seed(rng.randrange(1 << 30))
        ours, theirs = pair(I, H, layers, phi)
        inputs = torch.randn(T, B, I), torch.randn(layers, B, H)
        cotangents = torch.randn(T, B, H), torch.randn(layers, B, H)
        names = ["output", "h_n", "dx", "dh0"]
        names += [f"d{name.split('_l')[0]}" for name, _ in theirs.named_parameters()]

        def results(module: torch.nn.Module, args: Iterable[Tensor], c: Any) -> list[Tensor]:
            leaves = [*(t.detach().requires_grad_() for t in args), *module.parameters()]
            outputs = module(*leaves[:2])
            return [*outputs, *torch.autograd.grad(outputs, leaves, c)]

        both = [results(module, inputs, cotangents) for module in (ours, theirs)]
        wide = [[t.double() for t in tensors] for tensors in (inputs, cotangents)]
        for name, our, their, truth in zip(names, *both, results(theirs.double(), *wide)):
            error, least = ((t.double() - truth).abs().max().item() for t in (our, their))
            if least > 0 and truth.numel() >= 100:  # with few values, the largest error is chance
                ratios[f"{layers}       {name}"].append(error / least)
    print("layers  of             n  median    90 %     max")
    for kind, found in sorted(ratios.items()):
        found.sort()
        middle, ninth, most = (found[int(q * (len(found) - 1))] for q in (0.5, 0.9, 1))
        print(f"{kind:20}{len(found):4}{middle:8.2f}{ninth:8.2f}{most:8.2f}")


def main() -> int:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--count", type=int)
    parser.add_argument("--case", type=int)
    parser.add_argument(
        "--accuracy", action="store_true", help="takes --seed, --count and --engine"
    )
    parser.add_argument("--engine", choices=[*map(str, ENGINES)])
    args = parser.parse_args()
    _C.use_cores(1024)  # several threads even on one core
    engines = available(args.engine)
    if args.case is not None:
        return replay(args.case, engines[args.case % len(engines)])
    if args.accuracy:
        torch.set_num_threads(1)
        for engine in engines:
            print(engine)
            with engine.installed():
                accuracy(args.count or 120, args.seed or 0)
        return 0
    first = random.SystemRandom().randrange(1 << 40) if args.seed is None else args.seed
    print(f"--seed {first}, engines {', '.join(map(str, engines))}", flush=True)
    return search(range(first, first + (args.count or 1 << 40)), engines, args.minutes)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
