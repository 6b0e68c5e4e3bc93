"""Run the kernels of probes.cu: the latencies of block, cluster and grid barriers, and more.

Each kernel gives a row: its name, and the nanoseconds and cycles of one repetition, or the error.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import capture, is_fatal, timer_for
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cu")
SHARED = 200 << 10  # bytes per block in the occupancy probe
THREADS = 256
Row = dict[str, Any] | None  # None: left out
LINE = 32  # int32 elements in a cache line of 128 bytes


@dataclass
class Setting:
    """How much to run: enough for a GPU, or little enough for the emulator."""

    device: torch.device
    blocks: int  # in the probes of the whole grid: one per SM
    repetitions: int = 4000
    rounds: int = 5
    cluster_sizes: tuple[int, ...] = (2, 4, 8, 16)
    ring_lines: int = 1 << 15  # 4 MB: within L2
    emulated: bool = False

    @classmethod
    def on_gpu(cls) -> Setting:
        device = torch.device("cuda", torch.cuda.current_device())
        return cls(device, torch.cuda.get_device_properties(device).multi_processor_count)

    @classmethod
    def on_emulator(cls) -> Setting:
        return cls(torch.device("cpu"), 4, 3, 1, (2, 4), 16, emulated=True)


def nvcc() -> str | None:
    """Find the compiler: on PATH, or in the toolkit that torch finds."""
    from torch.utils.cpp_extension import CUDA_HOME

    for place in (shutil.which("nvcc"), CUDA_HOME and f"{CUDA_HOME}/bin/nvcc"):
        if place and Path(place).exists():
            return place
    return None


def build(folder: Path) -> ctypes.CDLL:
    """Compile the launchers of probes.cu for the GPU of this machine."""
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("no nvcc: neither on PATH nor in CUDA_HOME")
    major, minor = torch.cuda.get_device_capability()
    library = folder / "libprobes.so"
    command = [
        compiler, "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-shared",
        "-Xcompiler", "-fPIC", str(SOURCE), "-o", str(library),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
    return ctypes.CDLL(str(library))


def build_emulated() -> ctypes.CDLL:
    """Build the same launchers with kernels that run on the CPU (tests/support/emulator)."""
    sys.path.append(str(SOURCE.parents[1] / "tests" / "support"))
    import emulator  # type: ignore[import-not-found]
    import paths  # type: ignore[import-not-found]

    paths.toolkit()  # sets CUDA_HOME for the emulator
    path = emulator.build_library([SOURCE], name="probes", arch=90)
    return emulator.Library(path).c


@dataclass
class Probes:
    library: ctypes.CDLL
    setting: Setting
    without: Container[str] = ()  # names of probes to leave out
    announce: Callable[[str], None] = lambda name: None  # gets the name of each probe that begins
    out: Tensor = field(init=False)
    sink: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.out = self.zeros(2, torch.int64)
        self.sink = self.zeros(1024, torch.float32)
        self.library.probe_error.restype = ctypes.c_char_p

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.setting.device)

    def call(self, launcher: str, *arguments: Any) -> None:
        """Call a launcher on the current stream; Python ints are passed as C int."""
        converted = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor)
            else ctypes.c_bool(a) if isinstance(a, bool)
            else ctypes.c_int(a) if isinstance(a, int)
            else a
            for a in arguments
        ]  # fmt: skip
        stream = 0
        if self.setting.device.type == "cuda":
            stream = torch.cuda.current_stream(self.setting.device).cuda_stream
        self.check(getattr(self.library, launcher)(*converted, ctypes.c_void_p(stream)))

    def check(self, error: int) -> None:
        if error:
            raise RuntimeError(self.library.probe_error(error).decode())

    def synchronize(self) -> None:
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize(self.setting.device)

    def kernel(
        self, name: str, launch: Callable[[int], None], *, per: float = 1, **more: Any
    ) -> Row:
        """Time `launch(n)`, whose kernel writes cycles and ns; `per`: operations per repetition."""

        def row() -> dict[str, Any]:
            n = self.setting.repetitions
            launch(max(1, n // 10))  # warms up the instruction cache and the clock
            found = []
            for _ in range(self.setting.rounds):
                launch(n)
                self.synchronize()
                found.append([value / n / per for value in self.out.tolist()])
            cycles, ns = (statistics.median(values) for values in zip(*found))
            return {"ns": ns, "cycles": cycles}

        return self.row(name, row, more)

    def row(self, name: str, measure: Callable[[], dict[str, Any]], more: dict[str, Any]) -> Row:
        if name in self.without:
            return None
        self.announce(name)
        try:
            return {"probe": name, **more, **measure()}
        except (RuntimeError, AttributeError) as error:  # unsupported by the GPU or the emulator
            if is_fatal(error, self.setting.device):
                raise
            return {"probe": name, **more, "error": str(error)}

    def run(self) -> Iterator[dict[str, Any]]:
        self.warm_up()
        for group in (
            self.blocks, self.tensor_cores, self.l2, self.clusters, self.grids, self.launches,
            self.occupancy,
        ):  # fmt: skip
            yield from filter(None, group())

    def warm_up(self) -> None:
        """Keep the GPU busy for half a second, because an idle clock takes a while to rise."""
        if self.setting.device.type == "cuda":
            a = torch.ones(4096, 4096, device=self.setting.device, dtype=torch.bfloat16)
            end = time.perf_counter() + 0.5
            while time.perf_counter() < end:
                (a @ a).sum().item()

    def blocks(self) -> Iterator[Row]:
        for warps in (8, 16):
            yield self.kernel(
                f"__syncthreads, {warps} warps",
                lambda n: self.call("probe_block_barrier", 32 * warps, n, self.out),  # noqa: B023
                warps=warps,
            )

    def tensor_cores(self) -> Iterator[Row]:
        def launch(chains: int, warps: int) -> Callable[[int], None]:
            return lambda n: self.call(
                "probe_tensor_core", chains, 32 * warps, n, self.out, self.sink
            )

        yield self.kernel("mma m16n8k16 bf16, each waits for the last", launch(1, 1), warps=1)
        for warps in (4, 8):
            yield self.kernel(
                f"mma m16n8k16 bf16, {warps} warps of an SM, one product",
                launch(8, warps),
                per=8 * warps,
                warps=warps,
            )

    def l2(self) -> Iterator[Row]:
        lines = self.setting.ring_lines
        order = torch.randperm(lines, generator=torch.Generator().manual_seed(0)) * LINE
        ring = torch.zeros(lines * LINE, dtype=torch.int32)
        ring[order] = order.roll(-1).int()
        ring = ring.to(self.setting.device)
        size = ctypes.c_int64(ring.numel())
        yield self.kernel(
            "load that hits L2", lambda n: self.call("probe_l2", size, n, self.out, ring, self.sink)
        )

    def clusters(self) -> Iterator[Row]:
        for size in self.setting.cluster_sizes:
            for name, launcher, *flag in (
                ("barrier, release", "probe_cluster_barrier", False),
                ("barrier, relaxed", "probe_cluster_barrier", True),
                ("neighbour to neighbour, store + barrier", "probe_cluster_exchange"),
                ("all to all, 1 KB a block, store + barrier", "probe_cluster_gather", False),
                ("all to all, 1 KB a block, st.async + mbarrier", "probe_cluster_gather", True),
            ):
                results = [self.out] if "barrier, r" in name else [self.out, self.sink]
                launch = functools.partial(self.call, launcher, *flag, size, THREADS)
                yield self.kernel(
                    f"cluster of {size}: {name}",
                    lambda n: launch(n, *results),  # noqa: B023
                    cluster=size,
                )
            for name, *pattern in (
                ("16 bytes a row", False, 1, 16),
                ("32 bytes a row", False, 2, 16),
                ("32 bytes a row, aligned", False, 2, 32),
                ("128 bytes a row, aligned", False, 8, 0),
                ("bulk copies", True, 1, 0),
            ):
                send = functools.partial(self.call, "probe_cluster_send", *pattern, size, THREADS)
                yield self.kernel(
                    f"cluster of {size}: all to all, 1 KB a block, 16 bytes a lane, {name}",
                    lambda n: send(n, self.out, self.sink),  # noqa: B023
                    cluster=size,
                )
        for name, launcher in (
            ("st.async + mbarrier, one way", "probe_async_ping_pong"),
            ("remote st.release + ld.acquire, one way", "probe_flag_ping_pong"),
        ):
            yield self.kernel(
                name,
                lambda n: self.call(launcher, n, self.out, self.sink),  # noqa: B023
                per=2,
            )

    def grids(self) -> Iterator[Row]:
        blocks, out = self.setting.blocks, self.out
        yield self.kernel(
            f"grid barrier, {blocks} blocks, cooperative groups",
            lambda n: self.call("probe_cooperative_barrier", blocks, THREADS, n, out),
        )
        yield self.kernel(
            f"grid barrier, {blocks} blocks, red.release + ld.acquire",
            lambda n: self.call(
                "probe_counter_barrier", blocks, THREADS, n, out, self.zeros(1, torch.int32)
            ),
        )
        yield self.kernel(
            f"grid exchange, {blocks} blocks, flag in the data",
            lambda n: self.call(
                "probe_flag_in_data", blocks, THREADS, n, out,
                self.zeros(2 * blocks, torch.int64), self.sink,
            ),
        )  # fmt: skip

    def launches(self) -> Iterator[Row]:
        count = 1000 if not self.setting.emulated else 3
        timer = timer_for(self.setting.device)

        def launch() -> None:
            self.call("probe_launches", count)

        def per_launch(call: Callable[[], Any]) -> dict[str, Any]:
            call()
            times = [timer(call, 1) for _ in range(self.setting.rounds)]
            return {"ns": statistics.median(times) / count * 1e9}

        yield self.row("empty kernel in a stream", lambda: per_launch(launch), {})
        graph = "empty kernel in a CUDA graph"
        if self.setting.device.type != "cuda":
            graph += " (none here: in a stream)"
        yield self.row(graph, lambda: per_launch(capture(lambda: launch, self.setting.device)), {})

    def occupancy(self) -> Iterator[Row]:
        for size in self.setting.cluster_sizes:
            yield self.row(
                f"clusters of {size} at once, {THREADS} threads, {SHARED >> 10} KB each",
                lambda: self.clusters_at_once(size),  # noqa: B023
                {"cluster": size},
            )

    def clusters_at_once(self, size: int) -> dict[str, Any]:
        count, registers = ctypes.c_int(), ctypes.c_int()
        self.check(
            self.library.probe_occupancy(
                size, ctypes.c_int64(SHARED), ctypes.byref(count), ctypes.byref(registers)
            )
        )
        return {"clusters": count.value, "registers": registers.value}
