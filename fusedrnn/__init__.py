from . import reference
from .functional import recurrence, rnn
from .modules import RNN, RNNCell, replace

__all__ = ["RNN", "RNNCell", "recurrence", "reference", "replace", "rnn"]
