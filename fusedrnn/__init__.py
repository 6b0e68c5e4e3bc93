"""fusedrnn: a fused, drop-in replacement for ``torch.nn.RNN`` and ``torch.nn.RNNCell``."""

from . import onnx, parametrizations, reference
from .dynamics import FixedPoints, fixed_points, jacobian
from .explain import explain
from .functional import recurrence, rnn
from .leaky import LeakyRNN, LeakyRNNCell
from .modules import RNN, RNNCell, replace, restore
from .trace import LayerTrace, Trace, trace

__version__ = "0.1.0"
__all__ = [
    "RNN",
    "FixedPoints",
    "LayerTrace",
    "LeakyRNN",
    "LeakyRNNCell",
    "RNNCell",
    "Trace",
    "explain",
    "fixed_points",
    "jacobian",
    "onnx",
    "parametrizations",
    "recurrence",
    "reference",
    "replace",
    "restore",
    "rnn",
    "trace",
]
