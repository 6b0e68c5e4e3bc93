r"""Parametrizations of weights for ``torch.nn.utils.parametrize``, and an initialisation.

They constrain the recurrent weight of :class:`fusedrnn.RNN` and the other modules, and work for any
weight ``[H, J]`` whose columns belong to the presynaptic units. Several can be registered for one
weight; they apply in the order of their registration::

    >>> rnn = fusedrnn.LeakyRNN(10, 100, nonlinearity="relu", alpha=0.2)
    >>> signs = torch.cat([torch.ones(80), -torch.ones(20)])
    >>> mask = torch.rand(100, 100) < 0.1
    >>> parametrize.register_parametrization(rnn, "weight_hh_l0", Dale(signs))
    >>> parametrize.register_parametrization(rnn, "weight_hh_l0", Masked(mask))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dale", "LowRank", "Masked", "spectral_radius_"]


class Dale(nn.Module):
    r"""Dale's principle: every unit is either excitatory or inhibitory.

    .. math::
        W = |V| \, \mathrm{diag}(s)

    All outgoing weights of unit j, column j of W, have the sign :math:`s_j`. V is the parameter. A
    weight that is registered or assigned keeps its magnitudes. An element of V that is exactly 0
    has the gradient 0.

    Source: Song, Yang and Wang, "Training excitatory-inhibitory recurrent neural networks for
    cognitive tasks: a simple and flexible framework", PLOS Computational Biology 12(2), 2016.
    They rectify V; here its absolute value is used.

    Args:
        signs: ``[J]``, +1 for an excitatory and -1 for an inhibitory unit.

    Raises:
        TypeError: ``signs`` is not a tensor.
        ValueError: ``signs`` is not 1-D or has values other than +1 and -1; or, when registered, it
            does not have as many elements as the weight has columns.

    Example::

        >>> rnn = fusedrnn.RNN(10, 20)
        >>> signs = torch.cat([torch.ones(16), -torch.ones(4)])
        >>> parametrize.register_parametrization(rnn, "weight_hh_l0", Dale(signs))
    """

    signs: Tensor

    def __init__(self, signs: Tensor) -> None:
        super().__init__()
        _check_tensor("signs", signs)
        if signs.dim() != 1:
            raise ValueError(f"fusedrnn: signs must be 1-D, got {list(signs.shape)}")
        if not (signs.abs() == 1).all():
            raise ValueError(f"fusedrnn: signs must be +1 or -1, got {_other_than(signs, -1, 1)}")
        # An integer tensor does not promote the dtype of the weight.
        self.register_buffer("signs", signs.detach().to(torch.int8, copy=True))

    def forward(self, v: Tensor) -> Tensor:
        """Return W."""
        if v.size(-1) != self.signs.size(0):
            raise ValueError(
                f"fusedrnn: signs must have {v.size(-1)} elements like a row of the weight, "
                f"got {self.signs.size(0)}"
            )
        return v.abs() * self.signs

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return V for a weight."""
        return weight

    def extra_repr(self) -> str:
        return f"{self.signs.size(0)}"


class Masked(nn.Module):
    r"""Fixed sparsity: only some connections exist.

    .. math::
        W = M \odot V

    V is the parameter. Where M is 0, the gradient of V is 0.

    Source: the connectivity masks of Song, Yang and Wang, "Training excitatory-inhibitory
    recurrent neural networks for cognitive tasks: a simple and flexible framework", PLOS
    Computational Biology 12(2), 2016.

    Args:
        mask: ``[H, J]``, in the shape of the weight: bool, or 0 and 1.

    Raises:
        TypeError: ``mask`` is not a tensor.
        ValueError: ``mask`` has values other than 0 and 1; or, when registered, another shape than
            the weight.

    Example::

        >>> rnn = fusedrnn.RNN(10, 20)
        >>> mask = torch.rand(20, 20) < 0.1
        >>> parametrize.register_parametrization(rnn, "weight_hh_l0", Masked(mask))
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        _check_tensor("mask", mask)
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"fusedrnn: mask must be 0 or 1, got {_other_than(mask, 0, 1)}")
        self.register_buffer("mask", mask.detach().to(torch.bool, copy=True))

    def forward(self, v: Tensor) -> Tensor:
        """Return W."""
        if v.shape[-2:] != self.mask.shape:
            raise ValueError(
                f"fusedrnn: mask must be {list(v.shape[-2:])} like the weight, "
                f"got {list(self.mask.shape)}"
            )
        return v * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return V for a weight."""
        return weight

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.mask.shape))


class LowRank(nn.Module):
    r"""A weight of low rank R.

    .. math::
        W = \frac{1}{N} m n^T

    The parameters are m ``[H, R]`` and n ``[N, R]``, which ``parametrize`` names ``original0`` and
    ``original1``. A weight that is registered or assigned is replaced by the nearest one of rank R,
    by a singular value decomposition.

    Source: Mastrogiuseppe and Ostojic, "Linking connectivity, dynamics, and computations in
    low-rank recurrent neural networks", Neuron 99(3), 2018, without the random part of the weight.

    Args:
        rank: R, at least 1.

    Raises:
        TypeError: ``rank`` is not an int.
        ValueError: ``rank`` is below 1; or, when registered, larger than the weight's sizes.

    Example::

        >>> rnn = fusedrnn.RNN(10, 20)
        >>> parametrize.register_parametrization(rnn, "weight_hh_l0", LowRank(2))
        >>> with torch.no_grad():  # Gaussian vectors m and n
        ...     rnn.parametrizations.weight_hh_l0.original0.normal_()
        ...     rnn.parametrizations.weight_hh_l0.original1.normal_()
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        if not isinstance(rank, int):
            raise TypeError(f"fusedrnn: rank must be an int, got {type(rank).__name__}")
        if rank < 1:
            raise ValueError(f"fusedrnn: rank must be at least 1, got {rank}")
        self.rank = rank

    def forward(self, m: Tensor, n: Tensor) -> Tensor:
        """Return W."""
        return m @ (n / n.size(-2)).mT

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and n of the nearest weight of rank R."""
        if self.rank > min(weight.shape[-2:]):
            raise ValueError(
                f"fusedrnn: rank must be at most {min(weight.shape[-2:])} for a weight "
                f"{list(weight.shape)}, got {self.rank}"
            )
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        scale = (s[..., None, : self.rank] * weight.size(-1)).sqrt()
        m = u[..., :, : self.rank] * scale
        n = vh[..., : self.rank, :].mT * scale
        return m.to(weight.dtype), n.to(weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.rank}"


@torch.no_grad()
def spectral_radius_(
    weight: Tensor, rho: float, generator: torch.Generator | None = None
) -> Tensor:
    r"""Initialise a square weight, in place, with Gaussian values and the spectral radius ``rho``.

    .. math::
        W = \rho \, W_0 / \max_i |\lambda_i(W_0)|

    The eigenvalues :math:`\lambda_i` of :math:`W_0` are computed in float64 on the CPU, which takes
    O(N³). This is how the reservoir of an echo state network is initialised; a ``rho`` of 1 or
    slightly less is common.

    Source: Jaeger, "The 'echo state' approach to analysing and training recurrent neural networks",
    GMD report 148, 2001.

    Args:
        weight: ``[N, N]``, changed in place.
        rho: Spectral radius, at least 0.
        generator: Source of the values, on the device of ``weight``; None means torch's default
            generator.

    Returns:
        ``weight``.

    Raises:
        TypeError: ``weight`` is not a tensor.
        ValueError: ``weight`` is not square, or ``rho`` is negative or not finite.

    Example::

        >>> rnn = fusedrnn.RNN(10, 20)
        >>> spectral_radius_(rnn.weight_hh_l0, 0.9)
    """
    _check_tensor("weight", weight)
    if weight.dim() != 2 or weight.size(0) != weight.size(1):
        raise ValueError(f"fusedrnn: weight must be [N, N], got {list(weight.shape)}")
    if not 0 <= rho < float("inf"):
        raise ValueError(f"fusedrnn: rho must be at least 0 and finite, got {rho}")
    weight.normal_(generator=generator)
    if weight.is_meta or weight.numel() == 0:
        return weight
    radius = torch.linalg.eigvals(weight.to("cpu", torch.float64)).abs().max().item()
    return weight.mul_(rho / radius)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"fusedrnn: {name} must be a tensor, got {type(value).__name__}")


def _other_than(tensor: Tensor, *allowed: int) -> float:
    """Return the first value that is not allowed."""
    return next(value for value in tensor.flatten().tolist() if value not in allowed)
