"""The checkout, and the CUDA toolkit of this machine."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import emulator

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


@functools.cache
def toolkit() -> Path | None:
    """Return the CUDA toolkit of this machine, if there is one."""
    home = emulator.cuda_home()
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # for other code that looks for it
    return home
