"""Our module and torch's, with the same weights."""

from __future__ import annotations

from typing import Any

from torch import nn

import fusedrnn


def pair(*sizes: Any, name: str = "RNN", **options: Any) -> tuple[Any, Any]:
    """Return ``fusedrnn.<name>(...)`` and ``torch.nn.<name>(...)``, with the same weights."""
    theirs = getattr(nn, name)(*sizes, **options)
    ours = getattr(fusedrnn, name)(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs
