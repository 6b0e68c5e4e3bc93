from . import reference
from .functional import recurrence, rnn
__all__ = ["recurrence", "reference", "rnn"]
