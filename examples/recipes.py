"""Compute update equations of public codebases, by a plain Python loop and by a call of fusedrnn.

    python examples/recipes.py

docs/recipes.md explains them. Every loop multiplies all inputs by W_in at once, although most of
the codebases do this step by step. Letters: x inputs, h rate, v potential (the codebases call it h,
x or state), r = φ(v), u = W_in x + b, α = dt / τ, ξ noise with variance 1, σ its scale, ⊙ the
elementwise product.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import softplus

from fusedrnn import recurrence, rnn


@dataclass(frozen=True)
class Recipe:
    name: str
    source: str
    equation: str
    loop: Callable[..., Any]  # returns the output of every step, [T, B, H], and the last state
    call: Callable[..., Any]  # returns the same, computed by fusedrnn
    note: str = ""  # how the codebase differs from the equation

    def make(self, T: int, B: int, I: int, H: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return random arguments for ``loop`` and ``call``, by the names of the parameters."""
        names = inspect.signature(self.loop).parameters
        values = {name: ARGUMENTS[name](T, B, I, H) for name in names}
        return {k: v.to(dtype) if is_float(v) else v for k, v in values.items()}


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


ARGUMENTS: dict[str, Callable[[int, int, int, int], Any]] = {
    "x": lambda T, B, I, H: torch.randn(T, B, I),
    "w_ih": lambda T, B, I, H: torch.randn(H, I) / I**0.5,
    "w_hh": lambda T, B, I, H: torch.randn(H, H) / H**0.5,
    "w_ei": lambda T, B, I, H: torch.randn(H, H) / H**0.5 * (1 + 3 * (torch.arange(H) >= 0.8 * H)),
    **dict.fromkeys(("m", "n"), lambda T, B, I, H: torch.randn(H, 2)),
    "b": lambda T, B, I, H: 0.1 * torch.randn(H),
    "h0": lambda T, B, I, H: 0.5 * torch.randn(B, H),
    "v0": lambda T, B, I, H: torch.randn(B, H),
    "xi": lambda T, B, I, H: torch.randn(T, B, H),  # noise
    "sigma": lambda T, B, I, H: 0.05,
    "alpha": lambda T, B, I, H: 0.2,
    "alphas": lambda T, B, I, H: 0.1 + 0.8 * torch.rand(H),  # one per unit
    "dt": lambda T, B, I, H: 10.0,
    "dts": lambda T, B, I, H: 40 * torch.rand(T, B),  # time since the last sample, in each row
    "tau": lambda T, B, I, H: torch.tensor(50.0),
    "taus": lambda T, B, I, H: 20 + 80 * torch.rand(H),  # one per unit
    "mask": lambda T, B, I, H: 1 - torch.eye(H, dtype=torch.int8),  # no self-connections
    "signs": lambda T, B, I, H: torch.where(torch.arange(H) < 0.8 * H, 1, -1),
    "starts": lambda T, B, I, H: torch.rand(T, B) < 0.1,  # is_init, is_first, episode_starts
    "s": lambda T, B, I, H: torch.randn(H),
}
RELU_POTENTIAL = {"nonlinearity": "relu", "form": "potential"}


def flexible_multitask_loop(x, w_ih, w_hh, b, h0, alpha, xi, sigma):
    h = [h0]
    for u in (x @ w_ih.T + b + (2 / alpha) ** 0.5 * sigma * xi).unbind(0):
        h.append((1 - alpha) * h[-1] + alpha * softplus(h[-1] @ w_hh.T + u))
    return torch.stack(h[1:]), h[-1]


def flexible_multitask(x, w_ih, w_hh, b, h0, alpha, xi, sigma):
    u = x @ w_ih.T + b + (2 / alpha) ** 0.5 * sigma * xi
    return recurrence(u, h0, w_hh, nonlinearity="softplus", alpha=alpha)


def mrnntorch_loop(x, w_ih, w_ei, b, v0, alpha, mask, signs, xi, sigma):
    w, v, r = mask * w_ei.abs() * signs, v0, [torch.relu(v0)]
    for u in (x @ w_ih.T + b + sigma * xi).unbind(0):
        v = (1 - alpha) * v + alpha * (r[-1] @ w.T + u)
        r.append(torch.relu(v))
    return torch.stack(r[1:]), v


def mrnntorch(x, w_ih, w_ei, b, v0, alpha, mask, signs, xi, sigma):
    u, w = x @ w_ih.T + b + sigma * xi, mask * w_ei.abs() * signs
    return recurrence(u, v0, w, alpha=alpha, **RELU_POTENTIAL)


def trainrnnbrain_loop(x, w_ih, w_hh, b, v0, alpha):
    v, r = v0, [torch.tanh(v0)]
    for u in (x @ w_ih.T + b).unbind(0):
        v = (1 - alpha) * v + alpha * (r[-1] @ w_hh.T + u)
        r.append(torch.tanh(v))
    return torch.stack(r[1:]), v


def trainrnnbrain(x, w_ih, w_hh, b, v0, alpha):
    return rnn(x, w_ih, w_hh, b, None, v0, form="potential", alpha=alpha)


def nn4n_loop(x, w_ih, w_hh, b, v0, alphas, xi, sigma):
    v, r, left = v0, [torch.relu(v0)], 1 - alphas
    for u, noise in zip((x @ w_ih.T + b).unbind(0), (sigma * xi).unbind(0)):
        v = left * v + alphas * (r[-1] @ w_hh.T + u) + noise
        r.append(torch.relu(v))
    return torch.stack(r[1:]), v


def nn4n(x, w_ih, w_hh, b, v0, alphas, xi, sigma):
    return rnn(x, w_ih, w_hh, b, None, v0, alpha=alphas, state_input=sigma * xi, **RELU_POTENTIAL)


def lowrank_loop(x, w_ih, m, n, b, v0, alpha, xi, sigma):
    v, r = v0, [torch.tanh(v0 + b)]
    for u, noise in zip((x @ w_ih.T).unbind(0), (sigma * xi).unbind(0)):
        v = (1 - alpha) * v + alpha * (r[-1] @ n @ m.T / len(n) + u) + noise
        r.append(torch.tanh(v + b))
    return torch.stack(r[1:]), v


def lowrank(x, w_ih, m, n, b, v0, alpha, xi, sigma):  # the state is v + b
    w, options = m @ n.T / len(n), {"form": "potential", "state_input": sigma * xi}
    output, last = rnn(x, w_ih, w, b, None, v0 + b, alpha=alpha, **options)
    return output, last - b


def smc_rnns_loop(x, w_ih, w_hh, v0, dt, taus, xi, sigma):
    v, r, alphas = v0, [torch.tanh(v0)], dt / taus
    left, noises = 1 - alphas, (2 * alphas).sqrt() * sigma * xi
    for u, noise in zip((x @ w_ih.T).unbind(0), noises.unbind(0)):
        v = left * v + alphas * (r[-1] @ w_hh.T + u) + noise
        r.append(torch.tanh(v))
    return torch.stack(r[1:]), v


def smc_rnns(x, w_ih, w_hh, v0, dt, taus, xi, sigma):
    noise = (2 * dt / taus).sqrt() * sigma * xi
    return rnn(x, w_ih, w_hh, h0=v0, form="potential", alpha=dt / taus, state_input=noise)


def ei_rnn_loop(x, w_ih, w_ei, b, v0, alpha, mask, signs, xi, sigma):
    w, v, r = mask * w_ei.abs() * signs, v0, [torch.relu(v0)]
    noises = (2 * alpha) ** 0.5 * sigma * xi
    for u, noise in zip((x @ w_ih.T + b).unbind(0), noises.unbind(0)):
        v = (1 - alpha) * v + alpha * (r[-1] @ w.T + u) + noise
        r.append(torch.relu(v))
    return torch.stack(r[1:]), v


def ei_rnn(x, w_ih, w_ei, b, v0, alpha, mask, signs, xi, sigma):
    w, noise = mask * w_ei.abs() * signs, (2 * alpha) ** 0.5 * sigma * xi
    return rnn(x, w_ih, w, b, None, v0, alpha=alpha, state_input=noise, **RELU_POTENTIAL)


def ctrnn_loop(x, w_ih, w_hh, b, h0, alpha):
    h = [h0]
    for u in (x @ w_ih.T + b).unbind(0):
        h.append(torch.relu((1 - alpha) * h[-1] + alpha * (h[-1] @ w_hh.T + u)))
    return torch.stack(h[1:]), h[-1]


def ctrnn(x, w_ih, w_hh, b, h0, alpha):
    return rnn(x, w_ih, w_hh, b, None, h0, nonlinearity="relu", form="inside", alpha=alpha)


def resets_loop(x, w_ih, w_hh, b, h0, starts, s):
    h, learned = [h0], torch.tanh(s)
    for u, start in zip((x @ w_ih.T + b).unbind(0), starts.unsqueeze(-1).unbind(0)):
        h.append(torch.tanh(torch.where(start, learned, h[-1]) @ w_hh.T + u))
    return torch.stack(h[1:]), h[-1]


def resets(x, w_ih, w_hh, b, h0, starts, s):
    return rnn(x, w_ih, w_hh, b, None, h0, reset=starts, reset_to=torch.tanh(s))


def irregular_loop(x, w_ih, w_hh, b, h0, dts, tau):
    h, alphas = [h0], (dts / tau).unsqueeze(-1)
    for u, alpha in zip((x @ w_ih.T + b).unbind(0), alphas.unbind(0)):
        h.append((1 - alpha) * h[-1] + alpha * torch.tanh(h[-1] @ w_hh.T + u))
    return torch.stack(h[1:]), h[-1]


def irregular(x, w_ih, w_hh, b, h0, dts, tau):
    return rnn(x, w_ih, w_hh, b, None, h0, alpha=dts / tau)


def state_noise_loop(x, w_ih, w_hh, b, h0, alpha, xi, sigma):
    h, noises = [h0], (2 * alpha) ** 0.5 * sigma * xi
    for u, noise in zip((x @ w_ih.T + b).unbind(0), noises.unbind(0)):
        h.append((1 - alpha) * h[-1] + alpha * torch.tanh(h[-1] @ w_hh.T + u) + noise)
    return torch.stack(h[1:]), h[-1]


def state_noise(x, w_ih, w_hh, b, h0, alpha, xi, sigma):
    noise = (2 * alpha) ** 0.5 * sigma * xi
    return rnn(x, w_ih, w_hh, b, None, h0, alpha=alpha, state_input=noise)


DALE = "W = mask ⊙ |W_ei| diag(signs)"
RECIPES = [
    Recipe("flexible_multitask", "lauradriscoll/flexible_multitask",
           "h ← (1-α) h + α softplus(W h + u + √(2/α) σ ξ)",
           flexible_multitask_loop, flexible_multitask),
    Recipe("mRNNTorch", "JohnLazzari/mRNNTorch",
           f"v ← (1-α) v + α (W relu(v) + u + σ ξ), {DALE}", mrnntorch_loop, mrnntorch),
    Recipe("trainRNNbrain h", "engellab/trainRNNbrain, equation_type h",
           "v ← (1-α) v + α (W tanh(v) + u)", trainrnnbrain_loop, trainrnnbrain,
           "the first state is the initial one: T states for T - 1 inputs"),
    Recipe("nn4n", "NN4Neurosim/nn4n",
           "v ← (1-α) v + α (W relu(v) + u) + σ ξ, α per unit", nn4n_loop, nn4n),
    Recipe("lowrank_inference", "adrian-valente/lowrank_inference",
           "v ← (1-α) v + α (m nᵀ tanh(v + b) / N + W_in x) + σ ξ", lowrank_loop, lowrank,
           "b is omitted in the first step, and the readout is of φ(v)"),
    Recipe("smc_rnns", "mackelab/smc_rnns",
           "v ← (1-α) v + α (W tanh(v) + W_in x) + √(2α) σ ξ, α = dt / τ per unit",
           smc_rnns_loop, smc_rnns, "what it calls rates is v, not φ(v)"),
    Recipe("nn-brain EI_RNN", "gyyang/nn-brain, EI_RNN.ipynb",
           f"v ← (1-α) v + α (W relu(v) + u) + √(2α) σ ξ, {DALE}", ei_rnn_loop, ei_rnn),
    Recipe("PsychRNN", "murraylab/PsychRNN", f"v ← (1-α) v + α (W relu(v) + u) + √(2ασ²) ξ, {DALE}",
           ei_rnn_loop, ei_rnn, "the states it returns are v"),
    Recipe("neurogym CTRNN", "neurogym/ngym_usage, gyyang/nn-brain",
           "h ← relu((1-α) h + α (W h + u))", ctrnn_loop, ctrnn),
    Recipe("TorchRL, Dreamer", "pytorch/rl, danijar/dreamerv3",
           "h ← tanh(W k + u), k = tanh(s) where an episode starts, else h", resets_loop, resets,
           "the cell is a GRU or an LSTM"),
    Recipe("irregular sampling", "time-aware RNNs",
           "h ← (1-α) h + α tanh(W h + u), α = dt / τ of each step", irregular_loop, irregular),
    Recipe("state noise", "engellab/trainRNNbrain, equation_type s",
           "h ← (1-α) h + α tanh(W h + u) + √(2α) σ ξ", state_noise_loop, state_noise),
]  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    for recipe in RECIPES:
        arguments = recipe.make(50, 4, 3, 20, torch.float64)
        pairs = zip(recipe.loop(**arguments), recipe.call(**arguments))
        difference = max((a - b).abs().max().item() for a, b in pairs)
        note = f"\n    in {recipe.source}: {recipe.note}" if recipe.note else ""
        print(f"{recipe.name}: {recipe.equation}; difference {difference:.1e}{note}")


if __name__ == "__main__":
    main()
