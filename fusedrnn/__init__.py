"""fusedrnn: a fused, drop-in replacement for ``torch.nn.RNN`` and ``torch.nn.RNNCell``."""

from . import onnx, parametrizations, reference
from .explain import explain
from .functional import recurrence, rnn
from .leaky import LeakyRNN, LeakyRNNCell
from .modules import RNN, RNNCell, replace, restore
from .trace import LayerTrace, Trace, trace

__version__ = "0.1.0"
__all__ = [
    "RNN",
    "LayerTrace",
    "LeakyRNN",
    "LeakyRNNCell",
    "RNNCell",
    "Trace",
    "explain",
    "onnx",
    "parametrizations",
    "recurrence",
    "reference",
    "replace",
    "restore",
    "rnn",
    "trace",
]
