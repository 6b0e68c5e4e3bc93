"""fusedrnn: a fused, drop-in replacement for ``torch.nn.RNN`` and ``torch.nn.RNNCell``."""

from . import onnx, reference
from .explain import explain
from .functional import recurrence, rnn
from .modules import RNN, RNNCell, replace, restore

__version__ = "0.1.0"
__all__ = [
    "RNN",
    "RNNCell",
    "explain",
    "onnx",
    "recurrence",
    "reference",
    "replace",
    "restore",
    "rnn",
]
