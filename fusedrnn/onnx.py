"""Export a layer as an ONNX ``RNN`` node.

``torch.onnx.export(model, ...)`` works without preparation: during the export, :func:`fusedrnn.rnn`
emits this node instead of its own op. A program that was made by ``torch.export`` beforehand
contains that op; :func:`decompositions` converts it to the node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import ops
from .ops.onnx import activation

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., object]]:
    """Return decompositions that prepare a ``torch.export`` program for ``torch.onnx.export``.

    Example::

        >>> program = torch.export.export(model, (x,))
        >>> program = program.run_decompositions(fusedrnn.onnx.decompositions())
        >>> torch.onnx.export(program, f="model.onnx")
    """
    return {ops.activation: activation}
