"""Analyse cells and layers as dynamical systems: the Jacobian of a step, and fixed points.

With a constant input, a cell is a map from one state to the next, ``h -> F(h)``. The points where
``F(h) = h``, and the Jacobian of F at these points, often show what the cell computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forms import drive
from .leaky import LeakyRNNCell, _Leaky
from .modules import Layers, _tensors
from .ops.autograd import slope
from .reference import NONLINEARITIES


class _Step:
    """A step of a cell with a constant input, as a map of states ``[..., H]``, without noise."""

    def __init__(self, cell: Any, x: Any, dtype: torch.dtype | None = None) -> None:
        names: Any = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        if isinstance(cell, Layers):
            if cell.num_layers != 1 or cell.bidirectional:
                directions = 2 if cell.bidirectional else 1
                raise ValueError(
                    "fusedrnn: cell must be one layer in one direction, got "
                    f"num_layers={cell.num_layers}, {directions} direction(s)"
                )
            cell._check_no_rates("for a Jacobian", ("zoneout",))
            names = cell._all_weights[0]
        elif not isinstance(cell, (nn.RNNCell, LeakyRNNCell)):
            raise TypeError(
                "fusedrnn: cell must be RNNCell, LeakyRNNCell, RNN or LeakyRNN, got "
                f"{type(cell).__name__}"
            )
        weights: list[Any] = [*_tensors(cell, names), None, None]
        w_ih, w_hh, b_ih, b_hh = weights[:4]
        self.inputs, self.size = w_ih.size(1), w_hh.size(0)
        self.dtype, self.device = w_hh.dtype, w_hh.device
        self.check("x", x, self.inputs)
        alpha = cell._alpha_of(0) if isinstance(cell, _Leaky) else None
        if dtype is not None:
            x, w_ih, w_hh, b_ih, b_hh, alpha = (
                None if t is None else t.detach().to(dtype)
                for t in (x, w_ih, w_hh, b_ih, b_hh, alpha)
            )
        self.u, self.w_hh, self.alpha = drive(x, w_ih, b_ih, b_hh), w_hh, alpha
        self.nonlinearity = cell.nonlinearity
        self.form = getattr(cell, "form", "rate")

    def check(self, name: str, tensor: Any, size: int) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"fusedrnn: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() not in (1, 2) or tensor.size(-1) != size:
            raise ValueError(
                f"fusedrnn: {name} must be [{size}] or [B, {size}], got {list(tensor.shape)}"
            )
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise RuntimeError(
                f"fusedrnn: {name} must be {self.dtype} on {self.device} like the weights, got "
                f"{tensor.dtype} on {tensor.device}"
            )

    def _argument(self, h: Tensor) -> Tensor:
        """Return the argument of phi; in the form "potential", that is the next state."""
        phi = NONLINEARITIES[self.nonlinearity]
        z = self.u + (phi(h) if self.form == "potential" else h) @ self.w_hh.mT
        if self.alpha is None or self.form == "rate":
            return z
        return (1 - self.alpha) * h + self.alpha * z

    def __call__(self, h: Tensor) -> Tensor:
        after = self._argument(h)
        if self.form != "potential":
            after = NONLINEARITIES[self.nonlinearity](after)
        if self.alpha is None or self.form != "rate":
            return after
        return (1 - self.alpha) * h + self.alpha * after

    def jacobian(self, h: Tensor) -> Tensor:
        potential = self.form == "potential"
        slopes = slope(h if potential else self._argument(h), self.nonlinearity)
        product = self.w_hh
        if potential:
            product = product * slopes.unsqueeze(-2)
        elif self.form == "rate":
            product = slopes.unsqueeze(-1) * product
        if self.alpha is not None:
            alpha = self.alpha.expand(self.size)
            product = torch.diag(1 - alpha) + alpha.unsqueeze(-1) * product
        return slopes.unsqueeze(-1) * product if self.form == "inside" else product


def jacobian(cell: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    r"""Return the Jacobian of a step, :math:`\partial h' / \partial h`, in closed form.

    In each form of the cell, it is

    .. math::
        \text{rate:} \quad & (1 - \alpha) I + \alpha \, \mathrm{diag}(\phi') W_{hh} \\
        \text{potential:} \quad & (1 - \alpha) I + \alpha W_{hh} \, \mathrm{diag}(\phi'(h)) \\
        \text{inside:} \quad & \mathrm{diag}(\phi') ((1 - \alpha) I + \alpha W_{hh})

    where :math:`\phi'` without an argument is the slope at the argument of :math:`\phi` in the step
    from h, and :math:`\alpha` is 1 if the cell has no leak. The result is differentiable, and does
    not include noise.

    Args:
        cell: ``RNNCell``, ``LeakyRNNCell``, or ``RNN`` or ``LeakyRNN`` of one layer and direction.
        x: Input of the step, ``[B, I]`` or ``[I]``.
        h: State before the step, ``[B, H]`` or ``[H]``; v in the form ``"potential"``.

    Returns:
        ``[B, H, H]``, or ``[H, H]`` if both are unbatched; row i holds the derivatives of unit i.

    Raises:
        TypeError: ``cell`` is another module, or ``x`` or ``h`` is not a tensor.
        ValueError: ``x`` or ``h`` has a wrong shape, or ``cell`` has ``zoneout`` or more than one
            layer or direction.
        RuntimeError: ``x`` or ``h`` has another dtype or device than the weights, or their B
            differ.

    Example::

        >>> cell = fusedrnn.RNNCell(10, 20)
        >>> fusedrnn.jacobian(cell, torch.randn(3, 10), torch.randn(3, 20)).shape
        torch.Size([3, 20, 20])
    """
    step = _Step(cell, x)
    step.check("h", h, step.size)
    result = step.jacobian(h)
    shape = torch.broadcast_shapes(step.u.shape, h.shape)
    return result.expand(*shape, step.size)


@dataclass(frozen=True, repr=False)
class FixedPoints:
    """The K fixed points of a cell that :func:`fixed_points` found.

    Attributes:
        points: The states, ``[K, H]``, in descending order of ``counts``.
        residuals: The largest change of a unit in a step from each point, ``[K]``.
        counts: How many starts led to each point, ``[K]``.
        eigenvalues: Eigenvalues of the Jacobian at each point, complex ``[K, H]``, in descending
            order of magnitude.
        starts: The number of starts.
    """

    points: Tensor
    residuals: Tensor
    counts: Tensor
    eigenvalues: Tensor
    starts: int

    @property
    def unstable(self) -> Tensor:
        """Return how many eigenvalues of each point have a magnitude above 1, ``[K]``."""
        return (self.eigenvalues.abs() > 1).sum(-1)

    @property
    def stable(self) -> Tensor:
        """Return whether each point attracts the states around it, ``[K]``."""
        return (self.eigenvalues.abs() < 1).all(-1)

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        lines = [f"FixedPoints: {len(self)} from {int(self.counts.sum())} of {self.starts} starts"]
        columns = (self.counts, self.residuals, self.eigenvalues.abs().amax(-1), self.unstable)
        rows = zip(*(column.tolist() for column in columns))
        if len(self):
            lines.append("starts  residual  largest eigenvalue  unstable directions")
        lines += [f"{n:6d}  {r:8.1e}  {e:18.6f}  {u:19d}" for n, r, e, u in rows]
        return "\n".join(lines)


@torch.no_grad()
def fixed_points(
    cell: nn.Module,
    x: Tensor,
    starts: Tensor,
    *,
    tolerance: float = 1e-9,
    distance: float = 1e-4,
    iterations: int = 200,
) -> FixedPoints:
    r"""Find fixed points :math:`F(h) = h` of a cell with constant input.

    All starts are optimised at once, in float64. An iteration solves, with the residual
    :math:`r = F(h) - h` and :math:`A = \partial F / \partial h - I`,

    .. math:: (A^T A + \lambda I) \, d = -A^T r

    and takes the step d if it reduces :math:`|r|`. The damping :math:`\lambda` of each start falls
    after a step that was taken and rises after one that was not, so the steps range from Newton's
    to short ones down the gradient (Levenberg 1944, Marquardt 1963). A may thus be singular, as it
    is on a line of fixed points.

    Sources: Sussillo and Barak, "Opening the black box: low-dimensional dynamics in
    high-dimensional recurrent neural networks", Neural Computation 25(3), 2013; Golub and Sussillo,
    "FixedPointFinder: a Tensorflow toolbox for identifying and characterizing fixed points in
    recurrent neural networks", Journal of Open Source Software 3(31), 2018.

    Args:
        cell: As in :func:`jacobian`.
        x: The input, ``[I]``.
        starts: States to start from, ``[N, H]``: for example states that occur during a trial, with
            noise added. A point that no start leads to is not found.
        tolerance: A point is kept if no unit changes by more than this in a step. A larger value
            also keeps slow points.
        distance: Two points count as the same if no unit differs by more than this.
        iterations: Maximum number of iterations for each start.

    Returns:
        A :class:`FixedPoints`, in the dtype of the weights.

    Raises:
        TypeError, ValueError, RuntimeError: As in :func:`jacobian`; also ValueError if
            ``tolerance``, ``distance`` or ``iterations`` is not positive.

    Example::

        >>> cell = fusedrnn.RNNCell(1, 1, bias=False)
        >>> _ = cell.weight_hh.data.fill_(2.0)
        >>> found = fusedrnn.fixed_points(cell, torch.zeros(1), torch.linspace(-1, 1, 9)[:, None])
        >>> len(found), int(found.stable.sum())
        (3, 2)
    """
    positive = {"tolerance": tolerance, "distance": distance, "iterations": iterations}
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"fusedrnn: {name} must be above 0, got {value}")
    step = _Step(cell, x, torch.float64)
    if x.dim() != 1:
        raise ValueError(f"fusedrnn: x must be [{step.inputs}], got {list(x.shape)}")
    step.check("starts", starts, step.size)
    h = starts.detach().double().reshape(-1, step.size)
    residual = step(h) - h
    damping = torch.full_like(h[:, 0], 1e-3)
    identity = torch.eye(step.size, dtype=h.dtype, device=h.device)
    for _ in range(iterations):
        (active,) = (residual.abs().amax(-1) > tolerance).nonzero(as_tuple=True)
        if active.numel() == 0:
            break
        before, r, weight = h[active], residual[active], damping[active]
        a = step.jacobian(before) - identity
        system = a.mT @ a + weight[:, None, None] * identity
        after = before - torch.linalg.solve_ex(system, (a.mT @ r.unsqueeze(-1)))[0].squeeze(-1)
        r_after = step(after) - after
        taken = r_after.square().sum(-1) < r.square().sum(-1)  # False for NaN
        h[active] = torch.where(taken.unsqueeze(-1), after, before)
        residual[active] = torch.where(taken.unsqueeze(-1), r_after, r)
        damping[active] = torch.where(taken, weight / 10, weight * 10).clamp(1e-14, 1e14)
    sizes = residual.abs().amax(-1)
    h, sizes = h[sizes <= tolerance], sizes[sizes <= tolerance]
    first, counts = _distinct(h, sizes, distance)
    h = h[first]
    eigenvalues = torch.linalg.eigvals(step.jacobian(h))
    order = eigenvalues.abs().argsort(-1, descending=True)
    eigenvalues = eigenvalues.gather(-1, order)
    return FixedPoints(
        h.to(step.dtype), sizes[first].to(step.dtype), counts, eigenvalues, len(residual)
    )


def _distinct(points: Tensor, residuals: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """Return the indices of the distinct points, and how many points are the same as each of them.

    Of points that are the same, the one with the smallest residual is kept.
    """
    left = torch.ones_like(residuals, dtype=torch.bool)
    found, counts = [], []
    for i in residuals.argsort(stable=True).tolist():
        if left[i]:
            same = left & ((points - points[i]).abs().amax(-1) <= distance)
            left &= ~same
            found.append(i)
            counts.append(int(same.sum()))
    order = sorted(range(len(found)), key=lambda k: -counts[k])
    device = points.device
    return (
        torch.tensor([found[k] for k in order], dtype=torch.int64, device=device),
        torch.tensor([counts[k] for k in order], dtype=torch.int64, device=device),
    )
