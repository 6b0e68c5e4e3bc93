"""Load the engine's ops.

Their schemas are in ``csrc/schemas.cpp``, their kernels in ``csrc/cpu`` and ``csrc/cuda``. Each of
the other files of this folder, when imported, registers with torch what torch applies to the ops:
derivatives, autocast, vmap and so on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_BUILD = "pip install --no-build-isolation"


def _not_built(reason: str) -> ImportError:
    where = Path(__file__).parents[2]
    return ImportError(f"fusedrnn is not built{reason}: run `{_BUILD} -e .` in {where}")


try:
    from .. import _build_info
except ImportError:
    raise _not_built("") from None

if torch.__version__ != _build_info.TORCH_VERSION:
    raise ImportError(
        f"fusedrnn was built with torch {_build_info.TORCH_VERSION}, but this is torch "
        f"{torch.__version__}: "
        f"build it again with `{_BUILD} --force-reinstall --no-deps .` in its checkout"
    )

try:
    from .. import _C  # type: ignore[attr-defined]  # loading it registers torch.ops.fusedrnn
except ImportError as error:  # built for another Python, or the build did not finish
    raise _not_built(f" for this Python ({error})") from error

activation: Any = torch.ops.fusedrnn.activation.default
tangent: Any = torch.ops.fusedrnn.tangent.default
adjoint: Any = torch.ops.fusedrnn.adjoint.default
step: Any = torch.ops.fusedrnn.step.default
bptt: Any = torch.ops.fusedrnn.bptt.default
previous: Any = torch.ops.fusedrnn.previous.default
following: Any = torch.ops.fusedrnn.following.default
following_first: Any = torch.ops.fusedrnn.following_first.default
recurrent_product: Any = torch.ops.fusedrnn.recurrent_product.default

saving_z = _C.saving_z  # the nonlinearities for which the forward pass saves z
LIBRARY: torch.library.Library = torch.library.Library(
    "fusedrnn", "IMPL"
)  # the registrations last as long as this object


def build_info() -> dict[str, Any]:
    """Return how the extension was built and which instruction set the CPU engine uses here."""
    return {
        "torch_built": _build_info.TORCH_VERSION,
        "cuda": _build_info.CUDA,
        **_C.build_info(),
    }
