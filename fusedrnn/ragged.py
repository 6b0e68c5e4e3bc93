"""Pack ragged batches by one gather before the layers, and unpack the results by another one.

The engine takes packed sequences: step 0 of every row, the longest row first, then step 1 of the
rows that have one, and so on. In a padded tensor and in a jagged nested one, step t of row b is row
``starts[b] + t * stride`` of a matrix. Rows of length 0 are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import checks
from .torch_state import compiling, torch_check


class Ragged:
    """The packing of a padded input with lengths, or of a jagged input without.

    ``batch`` is B, ``order`` has the indices of the rows that are not empty, the longest first, and
    ``count`` is the total number of their steps.
    """

    def __init__(
        self,
        input: Any,
        lengths: Any,
        batch_first: bool,
        padding_value: float,
        name: str = "input",
    ) -> None:
        checks.check_ragged(input, lengths, batch_first, padding_value, name)
        self.padding_value = padding_value
        self.jagged = lengths is None
        if self.jagged:
            self.layout = (input.offsets(), input.lengths())
            starts = input.offsets().cpu()
            lengths = starts.diff() if input.lengths() is None else input.lengths().cpu()
            starts, stride, rows = starts[:-1], 1, input.values().size(0)
            steps = None
        else:
            self.layout = input.shape[:2]
            batch, steps = self.layout if batch_first else self.layout[::-1]
            starts, stride, rows = torch.arange(batch, device="cpu"), batch, batch * steps
            if batch_first:
                starts, stride = starts * steps, 1
            lengths = lengths.to("cpu", torch.int64)
        self.batch = lengths.size(0)
        lengths, order = lengths.sort(descending=True, stable=True)
        time = torch.arange(checks.longest(lengths, steps), device="cpu")
        self.batch_sizes = torch.searchsorted(-lengths, -time)  # how many lengths are above time
        time = time.unsqueeze(1)
        self.order = order[lengths > 0].to(input.device)
        index = (starts[order] + stride * time)[time < lengths].to(input.device)
        self.index = index
        self.count = index.size(0)
        if compiling():
            torch_check(self.count > 0, lambda: "fusedrnn: one of the lengths must be above 0")
        # Position of each row of the matrix in the packed data. Padding is one row after the last.
        self.place = torch.full((rows,), self.count, device=index.device)
        self.place.index_copy_(0, index, torch.arange(self.count, device=index.device))

    def check(self, series: Any, name: str, widths: Sequence[int]) -> None:
        """Check a series that comes with a jagged input."""
        if not isinstance(series, Tensor) or series.layout != torch.jagged:
            got = series.layout if isinstance(series, Tensor) else type(series).__name__
            raise TypeError(f"fusedrnn: {name} must be nested like input, got {got}")
        nested: Any = series  # torch declares no methods of nested tensors
        if nested.offsets() is not self.layout[0] or nested.lengths() is not self.layout[1]:
            raise ValueError(
                f"fusedrnn: {name} must have the offsets of input; create it with "
                "torch.nested.nested_tensor_from_jagged(values, input.offsets(), input.lengths())"
            )
        wanted = [(), *((width,) for width in widths)]
        got = nested.values().shape[1:]
        if got not in wanted:
            first = f"[{nested.size(0)}, lengths"
            sizes = [", ".join([first, *map(str, size)]) + "]" for size in (*wanted, got)]
            raise RuntimeError(
                f"fusedrnn: {name} must have sizes {' or '.join(sizes[:-1])}, got {sizes[-1]}"
            )

    def pack(self, series: Any) -> PackedSequence:
        """Pack a series in the layout of the input. Values in the padding are not read."""
        rows = series.values() if self.jagged else series.flatten(0, 1)
        return PackedSequence(rows.index_select(0, self.index), self.batch_sizes)

    def unpack(self, packed: PackedSequence) -> Tensor:
        """Return a packed series in the layout of the input."""
        data = packed.data
        padding = data.new_full((1, data.size(1)), self.padding_value)
        rows = torch.cat([data, padding]).index_select(0, self.place)
        if self.jagged:
            return torch.nested.nested_tensor_from_jagged(rows, *self.layout)
        return rows.unflatten(0, self.layout)
