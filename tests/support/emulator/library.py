"""The Python interface of a built library: settings, counters, and direct launches of kernels."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .build import build_library

COUNTERS = (
    *("launches", "cooperative_launches", "cluster_launches", "failed_launches"),
    *("synchronizations", "copies", "allocations", "frees"),
)
DEVICES = ("h100", "h200", "b200", "a100", "rtx4090", "rtx3090", "t4", "tiny")
ORDERS = ("forward", "reverse", "random")


class Library:
    """A library that `build_library` made. Settings apply to this library alone."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.c = ctypes.CDLL(str(path))
        self.c.cudaemu_last_failure.restype = ctypes.c_char_p
        self.c.cudaemu_kernel_name.restype = ctypes.c_char_p
        self.c.cudaemu_kernel_launches.restype = ctypes.c_ulonglong
        self.c.cudaemu_launch.restype = ctypes.c_char_p

    def use_device(self, name: str) -> None:
        """Emulate another GPU from now on; see DEVICES."""
        if not self.c.cudaemu_use_device(name.encode()):
            raise ValueError(f"no device {name!r}, only {', '.join(DEVICES)}")

    def schedule(
        self, order: str = "forward", seed: int = 1, yield_probability: float = 0.0
    ) -> None:
        """Set the order in which threads run between barriers.

        `random` finds missing barriers best. With it, `yield_probability` is the chance that a
        thread is interrupted at an atomic operation, a fence or a volatile access.
        """
        if order not in ORDERS:
            raise ValueError(f"no order {order!r}, only {', '.join(ORDERS)}")
        self.c.cudaemu_schedule(
            order.encode(), ctypes.c_ulonglong(seed), ctypes.c_double(yield_probability)
        )

    def counters(self) -> dict[str, int]:
        """Return how often each kind of call was made since `reset_counters`."""
        values = (ctypes.c_ulonglong * len(COUNTERS))()
        self.c.cudaemu_counters(values)
        return dict(zip(COUNTERS, values))

    def reset_counters(self) -> None:
        self.c.cudaemu_reset_counters()

    def fail_next_launch(self, code: int) -> None:
        """Make the next launch return this cudaError instead of running."""
        self.c.cudaemu_fail_next_launch(code)

    def last_failure(self) -> str:
        """Return why the last launch failed, such as a deadlock or an access out of bounds."""
        return self.c.cudaemu_last_failure().decode()

    def clear_failure(self) -> None:
        self.c.cudaemu_clear_failure()

    def kernels(self) -> list[str]:
        """Return the kernels' mangled names."""
        names: list[str] = []
        while name := self.c.cudaemu_kernel_name(ctypes.c_size_t(len(names))):
            names.append(name.decode())
        return names

    def kernel_info(self, name: str) -> dict[str, int]:
        values = (ctypes.c_uint * 4)()
        if not self.c.cudaemu_kernel_info(name.encode(), values):
            raise ValueError(f"no kernel {name}")
        return dict(zip(("parameter_bytes", "static_shared", "registers", "local_bytes"), values))

    def launched(self) -> dict[str, int]:
        """Return how many launches by host code each kernel has completed since loading."""
        return {name: self.c.cudaemu_kernel_launches(name.encode()) for name in self.kernels()}


def _packed(argument: Any) -> tuple[bytes, int]:
    """Return an argument's bytes and alignment."""
    if hasattr(argument, "data_ptr"):  # torch.Tensor
        return struct.pack("<Q", argument.data_ptr()), 8
    if hasattr(argument, "ctypes"):  # numpy.ndarray
        return struct.pack("<Q", argument.ctypes.data), 8
    if argument is None:
        return struct.pack("<Q", 0), 8
    if isinstance(argument, ctypes.Array):
        return struct.pack("<Q", ctypes.addressof(argument)), 8
    if isinstance(argument, (ctypes.Structure, ctypes._SimpleCData)):
        return bytes(argument), ctypes.alignment(argument)
    if isinstance(argument, bytes):
        return argument, 1
    if isinstance(argument, float):
        return struct.pack("<f", argument), 4
    return struct.pack("<i", argument), 4


def _three(size: int | Sequence[int]) -> Any:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return (ctypes.c_uint * 3)(*(*sizes, 1, 1)[:3])


class Kernels(Library):
    """The kernels of one .cu file, launched without host code and without a device's checks."""

    def __init__(
        self,
        source: str | Path,
        arch: int | str = 90,
        flags: Sequence[str] = (),
        cxx_flags: Sequence[str] = (),
        include: Sequence[str | Path] = (),
    ):
        super().__init__(
            build_library(
                [source],
                name=Path(source).stem,
                arch=arch,
                nvcc_flags=flags,
                cxx_flags=cxx_flags,
                include=include,
            )
        )
        self.names = self.kernels()

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *args: Any,
        smem: int = 0,
        cluster: int | Sequence[int] = 1,
        cooperative: bool = False,
    ) -> None:
        """Run the kernel whose mangled name is, or contains, `name`.

        Tensors and arrays become pointers; int and float have 32 bits. Pass anything else as a
        ctypes value or structure, or as packed `bytes`. Raises RuntimeError if the kernel fails.
        """
        matches = [n for n in self.names if n == name] or [n for n in self.names if name in n]
        if len(matches) != 1:
            raise ValueError(f"{name!r} names {len(matches)} of {self.names}")
        packed = b""
        for argument in args:
            value, alignment = _packed(argument)
            packed += b"\0" * (-len(packed) % alignment) + value
        expected = self.kernel_info(matches[0])["parameter_bytes"]
        if len(packed) != expected:
            raise ValueError(f"{len(packed)} bytes of arguments instead of {expected}")
        buffer = ctypes.create_string_buffer(packed, len(packed) + 64)
        aligned = -(-ctypes.addressof(buffer) // 16) * 16
        ctypes.memmove(aligned, packed, len(packed))
        failure = self.c.cudaemu_launch(
            matches[0].encode(),
            *(_three(grid), _three(block), _three(cluster)),
            *(ctypes.c_size_t(smem), int(cooperative), ctypes.c_void_p(aligned)),
        )
        if failure:
            raise RuntimeError(failure.decode())
