"""Balance a pole without seeing velocities: PPO with an RNN, and episodes inside the sequence.

    pip install fusedrnn[examples]
    python examples/recurrent_ppo.py

The policy sees only the two positions of CartPole, so the RNN must estimate the velocities. A
rollout holds parts of several episodes for each environment. ``reset`` marks where episodes begin,
so that the update runs the RNN over all steps of a rollout with one call. The usual way is a loop
that applies a mask to the state at each step. The end of the output compares the two.

Source: Schulman, Wolski, Dhariwal, Radford and Klimov, "Proximal policy optimization algorithms",
arXiv:1707.06347, 2017.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import fusedrnn

ENVIRONMENTS, STEPS, UNITS = 16, 128, 64
DISCOUNT, LAMBDA, CLIP, EPOCHS, MINIBATCHES = 0.99, 0.95, 0.2, 4, 4
SCALE = torch.tensor([0.5, 0.03])  # of the position of the cart and the angle of the pole


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fusedrnn.RNN(2, UNITS)
        self.policy, self.value = nn.Linear(UNITS, 2), nn.Linear(UNITS, 1)
        nn.init.zeros_(self.policy.weight)

    def heads(self, h: Tensor) -> tuple[Categorical, Tensor]:
        return Categorical(logits=self.policy(h)), self.value(h).squeeze(-1)

    def forward(self, x: Tensor, state: Tensor, starts: Tensor) -> tuple[Categorical, Tensor]:
        """Return the policy and the value of each step of a rollout."""
        h, _ = self.rnn(x, state, reset=starts)
        return self.heads(h)


class Rollout(NamedTuple):
    """The steps of all environments; every tensor is ``[STEPS, ENVIRONMENTS, ...]``."""

    x: Tensor
    starts: Tensor  # whether an episode begins at the step
    actions: Tensor
    log_probabilities: Tensor
    advantages: Tensor
    returns: Tensor


class Player:
    """Play the environments. When an episode ends, the next one begins in the same step."""

    def __init__(self, agent: Agent, seed: int) -> None:
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        self.environments = gymnasium.make_vec(
            "CartPole-v1", ENVIRONMENTS, "sync", vector_kwargs={"autoreset_mode": mode}
        )
        self.agent = agent
        self.x = self.positions(self.environments.reset(seed=seed)[0])
        self.start = torch.ones(ENVIRONMENTS, dtype=torch.bool)
        self.state = agent.rnn.init_state(ENVIRONMENTS)
        self.scores = np.zeros(ENVIRONMENTS)  # of the current episodes
        self.finished: list[float] = []

    @staticmethod
    def positions(observations: np.ndarray) -> Tensor:
        return torch.from_numpy(observations[:, [0, 2]]) / SCALE

    def step(self) -> tuple[Categorical, Tensor]:
        self.state = torch.where(self.start[:, None], 0.0, self.state)
        h, self.state = self.agent.rnn.step(self.x, self.state)
        return self.agent.heads(h)

    @torch.no_grad()
    def play(self) -> tuple[Rollout, Tensor]:
        """Return a rollout and the state before it."""
        before, rows = self.state, []
        rewards, values = (
            torch.full((STEPS, ENVIRONMENTS), 1 - DISCOUNT),
            torch.zeros(STEPS + 1, ENVIRONMENTS),
        )
        for t in range(STEPS):
            x, start = self.x, self.start
            policy, values[t] = self.step()
            actions = policy.sample()
            observations, _, ended, cut, _ = self.environments.step(actions.numpy())
            rows.append((x, start, actions, policy.log_prob(actions)))
            self.x, self.start = self.positions(observations), torch.from_numpy(ended | cut)
            self.scores += 1
            self.finished += self.scores[ended | cut].tolist()
            self.scores[ended | cut] = 0
        state = self.state
        values[STEPS] = self.step()[1]
        self.state = state
        x, starts, actions, log_probabilities = map(torch.stack, zip(*rows))
        goes_on = (~torch.cat([starts[1:], self.start[None]])).float()
        advantages, advantage = torch.zeros_like(rewards), torch.zeros(ENVIRONMENTS)
        for t in reversed(range(STEPS)):  # generalised advantage estimation
            error = rewards[t] + DISCOUNT * goes_on[t] * values[t + 1] - values[t]
            advantage = error + DISCOUNT * LAMBDA * goes_on[t] * advantage
            advantages[t] = advantage
        returns = advantages + values[:-1]
        return Rollout(x, starts, actions, log_probabilities, advantages, returns), before


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, before: Tensor
) -> None:
    for _ in range(EPOCHS):
        for rows in torch.randperm(ENVIRONMENTS).chunk(MINIBATCHES):
            x, starts, actions, old, advantages, returns = (part[:, rows] for part in rollout)
            policy, values = agent(x, before[:, rows], starts)
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            ratio = (policy.log_prob(actions) - old).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            gain = torch.minimum(ratio * advantages, clipped * advantages).mean()
            error = (values - returns).square().mean()
            loss = -gain + error - 0.01 * policy.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()


def loop_with_masks(rnn: fusedrnn.RNN, x: Tensor, state: Tensor, starts: Tensor) -> Tensor:
    outputs, h = [], state[0]
    for x_t, start in zip(x, starts):
        h = torch.where(start[:, None], 0.0, h)
        h = torch.rnn_tanh_cell(x_t, h, *rnn._flat_weights)
        outputs.append(h)
    return torch.stack(outputs)


def compare(agent: Agent, rollout: Rollout, before: Tensor) -> tuple[float, float]:
    """Return the steps a second, forward and backward, of the RNN and of the loop with masks."""
    rnn, rates = agent.rnn, []
    for run in (
        lambda: rnn(rollout.x, before, reset=rollout.starts)[0],
        lambda: loop_with_masks(rnn, rollout.x, before, rollout.starts),
    ):
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            torch.autograd.grad(run().sum(), list(rnn.parameters()))
            times.append(time.perf_counter() - begin)
        rates.append(STEPS * ENVIRONMENTS / min(times))
    return rates[0], rates[1]


def main(updates: int = 150, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Train; return the mean score of the last 50 episodes and the rates of :func:`compare`."""
    torch.manual_seed(seed)
    agent = Agent()
    player = Player(agent, seed)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5)
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - i / updates)
        rollout, before = player.play()
        update(agent, optimizer, rollout, before)
        if (i + 1) % 10 == 0:
            steps = (i + 1) * STEPS * ENVIRONMENTS
            print(f"{steps:7d} steps: mean score {np.mean(player.finished[-50:] or [0]):5.1f}")
    return float(np.mean(player.finished[-50:] or [0])), compare(agent, rollout, before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads would mostly wait for each other
    score, (fused, loop) = main(options.updates)
    print(f"\nmean score of the last 50 episodes: {score:.1f} of 500")
    print(f"RNN with reset: {fused:9.0f} steps a second, forward and backward")
    print(f"loop with masks: {loop:8.0f} steps a second ({fused / loop:.1f} times as fast)")
