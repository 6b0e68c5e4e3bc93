"""The functions behind the modules. (Being built: for now they are the reference.)"""
from .reference import recurrence, rnn  # noqa: F401
