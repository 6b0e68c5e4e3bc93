"""Functions that run in place of the op ``activation`` in the two exporters of torch.onnx."""

from __future__ import annotations

import torch
from torch import Tensor

# The nonlinearities that ONNX has, with their ONNX parameters.
_ACTIVATIONS: dict[str, tuple[str, dict[str, float]]] = {
    "tanh": ("Tanh", {}),
    "relu": ("Relu", {}),
    "identity": ("Affine", {"alpha": 1.0, "beta": 0.0}),
    "sigmoid": ("Sigmoid", {}),
    "softplus": ("Softplus", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
    "elu": ("Elu", {"alpha": 1.0}),
}


def check(
    alpha: Tensor | None,
    q: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    nonlinearity: str,
    form: str,
) -> None:
    """Raise NotImplementedError if a layer uses a feature that ONNX's RNN does not have."""
    lacks = None
    if alpha is not None:
        lacks = "no leak (alpha)"
    elif form == "potential":
        lacks = "no form 'potential'"
    elif q is not None:
        lacks = "nothing added to the state (state_input)"
    elif reset is not None:
        lacks = "no resets (reset)"
    elif batch_sizes is not None:
        lacks = "no packed sequences"
    elif nonlinearity not in _ACTIVATIONS:
        lacks = f"no nonlinearity {nonlinearity!r}, only {', '.join(_ACTIVATIONS)}"
    if lacks is not None:
        raise NotImplementedError(f"fusedrnn: ONNX cannot express this layer: its RNN has {lacks}")


def activation(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    v0: Tensor | None,
    w_hh: Tensor,
    alpha: Tensor | None,
    q: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    nonlinearity: str,
    form: str,
    reverse: bool,
    grad_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Emit an ONNX node in place of the op of the same name, while tracing; compute nothing."""
    check(alpha, q, reset, batch_sizes, nonlinearity, form)
    steps, rows, _ = x.shape
    size = w_hh.size(0)
    if w_ih is None:  # x is already the input product
        w_ih = torch.eye(size, dtype=x.dtype, device=x.device)
    biases = None
    if b_ih is not None or b_hh is not None:
        zeros = x.new_zeros(size)
        biases = torch.cat([zeros if b is None else b for b in (b_ih, b_hh)]).unsqueeze(0)
    name, parameters = _ACTIVATIONS[nonlinearity]
    h, h_n = torch.onnx.ops.symbolic_multi_out(
        "RNN",
        (
            x,
            w_ih.unsqueeze(0),
            w_hh.unsqueeze(0),
            biases,
            None,  # sequence_lens
            None if h0 is None else h0.unsqueeze(0),
        ),
        {
            "activations": [name],
            **{f"activation_{key}": [value] for key, value in parameters.items()},
            "direction": "reverse" if reverse else "forward",
            "hidden_size": size,
        },
        dtypes=(x.dtype, x.dtype),
        shapes=((steps, 1, rows, size), (1, rows, size)),  # 1: the direction
    )
    return h.squeeze(1), h_n.squeeze(0), x.new_empty(0)


def traced_activation(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    v0: Tensor | None,
    w_hh: Tensor,
    alpha: Tensor | None,
    q: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    nonlinearity: str,
    form: str,
    reverse: bool,
    grad_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run torch's own RNN op, which the old TorchScript exporter supports, in place of ours."""
    check(alpha, q, reset, batch_sizes, nonlinearity, form)
    if nonlinearity not in ("tanh", "relu"):
        raise NotImplementedError(
            "fusedrnn: nonlinearity must be 'tanh' or 'relu' for torch.onnx.export(dynamo=False), "
            f"got {nonlinearity!r}"
        )
    size = w_hh.size(0)
    if w_ih is None:
        w_ih = torch.eye(size, dtype=x.dtype, device=x.device)
    weights = [w_ih, w_hh]
    if b_ih is not None or b_hh is not None:
        zeros = x.new_zeros(size)
        weights += [zeros if b is None else b for b in (b_ih, b_hh)]
    h0 = x.new_zeros(1, x.size(1), size) if h0 is None else h0.unsqueeze(0)
    run = torch.rnn_tanh if nonlinearity == "tanh" else torch.rnn_relu
    x = x.flip(0) if reverse else x
    h, h_n = run(x, h0, weights, len(weights) == 4, 1, 0.0, False, False, False)
    return h.flip(0) if reverse else h, h_n.squeeze(0), x.new_empty(0)
