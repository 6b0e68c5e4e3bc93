"""Per-sample gradients through torch's older API, ``call_for_per_sample_grads``, as in nn.RNN.

That API calls the module with every weight wrapped in an ``ExpandedWeight``. The gradient of
each sample, that is, of each row of the batch, is stored in ``weight.grad_sample``.
(``vmap(grad(...))`` does not use this module.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .. import ops
from ..torch_state import (
    ExpandedWeight,
    implements_per_sample_grads,
    set_grad_sample_if_exists,
    unpack_expanded_weight_or_tensor,
)


def _plain(argument: Any) -> Any:
    is_expanded = isinstance(argument, ExpandedWeight)
    return unpack_expanded_weight_or_tensor(argument) if is_expanded else argument


@implements_per_sample_grads(ops.activation)
class PerSampleActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Any, op: Any, *args: Any) -> Any:  # type: ignore[override]
        h, h_n, saved = op(*map(_plain, args))
        *_, form, _, _ = args
        if form != "rate":
            raise NotImplementedError(
                f"fusedrnn: form must be 'rate' with call_for_per_sample_grads, got {form!r}; use "
                "torch.func: vmap(grad(...))"
            )
        for weight in args:
            if isinstance(weight, ExpandedWeight) and weight.batch_size != h_n.size(0):
                raise RuntimeError(
                    f"fusedrnn: batch_size must be {h_n.size(0)}, the number of rows, got "
                    f"{weight.batch_size}"
                )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, h if saved.numel() == 0 else saved)
        ctx.args = args
        return h, h_n, saved

    @staticmethod
    def backward(ctx: Any, g: Any, g_n: Any, _: Any) -> Any:  # type: ignore[override]
        x, w_ih, b_ih, b_hh, h0, _, w_hh, alpha, _, reset, batch_sizes, *options = ctx.args
        h, saved = ctx.saved_tensors
        to_h0 = ctx.needs_input_grad[6]
        delta, dh0, *_ = ops.adjoint(
            g, None, None, g_n, saved, _plain(w_hh), unpack_expanded_weight_or_tensor(alpha), reset,
            batch_sizes, *options, to_h0, False,
        )  # fmt: skip

        def by_sample(series: Tensor) -> Tensor:
            if batch_sizes is None:
                return series
            return pad_packed_sequence(PackedSequence(series, batch_sizes))[0]

        def product(other: Tensor) -> Tensor:
            return torch.einsum("tbh,tbi->bhi", by_sample(delta), by_sample(other))

        before = ops.previous(h, h0, reset, batch_sizes, options[2])
        set_grad_sample_if_exists(w_ih, lambda _: product(x))
        set_grad_sample_if_exists(w_hh, lambda _: product(before))
        for bias in (b_ih, b_hh):
            set_grad_sample_if_exists(bias, lambda _: by_sample(delta).sum(0))
        dx = delta if w_ih is None else delta @ _plain(w_ih)
        return (None, None, dx, None, None, None, dh0 if to_h0 else None, *(None,) * 10)
