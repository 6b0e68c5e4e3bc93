"""The emulator itself: its instructions and CUDA runtime, and the mistakes that it must detect."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import emulator
import pytest
import torch
from torch import Tensor

KERNELS = Path(emulator.__file__).parent / "kernels"
QUIET = ("-diag-suppress", "20054")  # shared memory of cuda::barrier has a constructor

pytestmark = pytest.mark.skipif(emulator.cuda_home() is None, reason="no nvcc on this machine")


@pytest.fixture(scope="module", params=[75, 80, 90])
def features(request: pytest.FixtureRequest) -> emulator.Kernels:
    return emulator.Kernels(KERNELS / "features.cu", arch=request.param, flags=QUIET)


@pytest.fixture(params=emulator.ORDERS)
def kernels(features: emulator.Kernels, request: pytest.FixtureRequest) -> emulator.Kernels:
    """The kernels of features.cu, for each architecture and in each order."""
    features.schedule(request.param, seed=3, yield_probability=0.1)
    return features


def arch_of(kernels: emulator.Kernels) -> int:
    return 80 if any(n == "multiply_bf16" for n in kernels.names) else 75


@pytest.fixture(scope="module")
def hopper() -> emulator.Kernels:
    return emulator.Kernels(KERNELS / "hopper.cu", arch=90)


@pytest.fixture(scope="module")
def launchers() -> emulator.Library:
    sources = [KERNELS / f"{n}.cu" for n in ("launchers", "same_name_1", "same_name_2")]
    return emulator.Library(emulator.build_library(sources, name="launchers"))


@pytest.fixture
def library(launchers: emulator.Library) -> emulator.Library:
    """The launchers on an H100, without state from the previous test."""
    launchers.use_device("h100")
    launchers.schedule("random", seed=1, yield_probability=0.1)
    launchers.reset_counters()
    launchers.clear_failure()
    return launchers


@pytest.fixture(scope="module")
def mistakes() -> emulator.Library:
    return emulator.Library(
        emulator.build_library([KERNELS / "mistakes.cu"], name="mistakes", arch=80)
    )


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def relative_error(found: Tensor, truth: Tensor) -> float:
    scale = truth.double().abs().clamp_min(1e-2)
    return ((found.double() - truth.double()).abs() / scale).max().item()


# --- Instructions ---


def test_parameters_as_a_structure(kernels):
    x, y = torch.randn(100), torch.zeros(100)
    packed = struct.pack("<QQixxxxd", x.data_ptr(), y.data_ptr(), 100, 2.5)
    kernels.launch("structure", 2, 64, packed)
    torch.testing.assert_close(y, (2.5 * x.double()).float(), rtol=0, atol=0)


def test_functions_of_f32(kernels):
    x = torch.randn(64) * 2
    y = torch.zeros(11, 64)
    kernels.launch("functions_f32", 1, 64, x, y, 64)
    v = x.double()
    truth = [v.exp(), v.tanh(), v.sigmoid(), (v.abs() + 1e-3).log(), (v * 30).sin()]
    truth += [(v.abs() + 1).rsqrt(), v.erf(), v.exp(), v.abs() ** 1.7, v.exp().log1p(), v.expm1()]
    for i, expected in enumerate(truth):
        # The kernel rounds the arguments of log and sin to f32 first, hence the larger tolerance.
        assert relative_error(y[i], expected) < {3: 1e-5, 4: 1e-3}.get(i, 5e-7)


def test_functions_of_f64(kernels):
    v = torch.randn(64).double() * 2
    y = torch.zeros(7, 64).double()
    kernels.launch("functions_f64", 1, 64, v, y, 64)
    truth = [v.exp(), v.tanh(), v.sigmoid(), (v.abs() + 1e-3).log(), v.abs().sqrt(), v / 3]
    for row, expected in zip(y, [*truth, v.expm1()]):
        assert relative_error(row, expected) < 2e-15


def test_approximations_are_not_better_than_the_hardware(kernels):
    x = torch.linspace(-3, 3, 64) + 1e-4
    y = torch.zeros(3, 64)
    kernels.launch("approximate", 1, 64, x, y, 64)
    assert 1e-5 < relative_error(y[0], x.double().tanh()) < 2**-10
    assert relative_error(y[1], x.double().exp2()) < 2**-21
    assert relative_error(y[2], 1 / x.double()) < 2**-21


def test_directed_rounding(kernels):
    a, b = torch.randn(64), torch.randn(64) * 1e-5
    d = torch.randn(64).double()
    y = torch.zeros(11, 64)
    kernels.launch("rounding", 1, 64, a, b, d, y, 64)

    def directed(exact: Tensor, up: Tensor) -> Tensor:
        nearest = exact.float()
        wrong = torch.where(up, nearest.double() < exact, nearest.double() > exact)
        return torch.where(
            wrong, torch.nextafter(nearest, torch.where(up, torch.inf, -torch.inf)), nearest
        )

    up, down = torch.ones(64, dtype=torch.bool), torch.zeros(64, dtype=torch.bool)
    total, product = a.double() + b.double(), a.double() * b.double()
    assert torch.equal(y[0], directed(total, down))
    assert torch.equal(y[1], directed(total, up))
    assert torch.equal(y[2], directed(total, total < 0))
    assert torch.equal(y[3], directed(product, down))
    assert torch.equal(y[4], directed(product, up))
    # Exact in f64 except for an error far below half a unit of f32
    assert (y[5] <= (product + 1).float()).all()
    assert torch.equal(y[6], directed(d, down))
    assert torch.equal(y[7], directed(d, up))
    assert torch.equal(y[8], a.clamp(0, 1))
    assert torch.equal(y[9], (a * 10).round())
    assert torch.equal(y[10], (a * 10).floor())


def test_integers(kernels):
    a = torch.randint(-(2**31), 2**31 - 1, (64,)).int()
    q = torch.zeros(9, 64).int()
    kernels.launch("integers", 1, 64, a, q, 64)

    def divide(x: int, y: int) -> int:  # towards zero, as C does
        return abs(x) // y * (1 if x >= 0 else -1)

    for i, x in enumerate(a.tolist()):
        bits = format(x & 0xFFFFFFFF, "032b")
        square = x * x // 1000 & 0xFFFFFFFF
        assert q[:, i].tolist() == [
            divide(x, 7),
            x - 13 * divide(x, 13),
            32 - len(bits.lstrip("0")),
            int(bits[::-1], 2) - (2**32 if bits[-1] == "1" else 0),
            divide(x, i + 1),
            x * 123456789 >> 32,
            bits.count("1"),
            bits[::-1].find("1") + 1,
            square - (2**32 if square >= 2**31 else 0),
        ]


def test_halves(kernels):
    x = torch.randn(32).half()
    y = torch.zeros(6, 32).half()
    kernels.launch("halves", 1, 32, x, y, 32)
    v = x.double()
    assert relative_error(y[0], v.exp()) < 2**-10
    assert relative_error(y[1], v / 3) < 2**-10
    for row, expected in zip(y[2:], [v * v, v * v + v, v + 1, v + 2]):
        torch.testing.assert_close(row, expected.half(), rtol=0, atol=0)


def test_brain_floats(kernels):
    x = torch.randn(32).bfloat16()
    y = torch.zeros(4, 32).bfloat16()
    kernels.launch("brain_floats", 1, 32, x, y, 32)
    v = x.float()
    expected = [v * 3, v + 1e-3]
    if arch_of(kernels) >= 80:
        expected += [v * v + v, v.relu()]
    for row, value in zip(y, expected):
        torch.testing.assert_close(row, value.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "dtype", "rows", "depth", "least"),
    [
        ("multiply_f16", torch.float16, 16, 16, 75),
        ("multiply_bf16", torch.bfloat16, 16, 16, 80),
        ("multiply_tf32", torch.float32, 16, 8, 80),
        ("multiply_f64", torch.float64, 8, 4, 80),
    ],
)
def test_matrix_products(kernels, name, dtype, rows, depth, least):
    if arch_of(kernels) < least:
        pytest.skip(f"needs sm_{least}")
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(8, depth).to(dtype)
    if name == "multiply_tf32":  # values that tf32 holds exactly
        a, b = a.bfloat16().float(), b.bfloat16().float()
    c = torch.zeros(rows, 8, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    kernels.launch(name, 1, 32, a, b, c)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-6, atol=2e-6)


def test_wmma(kernels):
    if arch_of(kernels) < 80:
        pytest.skip("needs sm_80")
    a, b = torch.randn(16, 48).bfloat16(), torch.randn(16, 48).bfloat16()
    c = torch.zeros(16, 16)
    kernels.launch("multiply_wmma", 1, 32, a, b, c, 48)
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


def test_ldmatrix_transposed(kernels):
    x, y = torch.randn(8, 8).half(), torch.zeros(8, 8).half()
    kernels.launch("transpose", 1, 32, x, y)
    assert torch.equal(y, x.T)


def test_atomics(kernels):
    f, i, d = torch.zeros(1), torch.zeros(1).int(), torch.zeros(1).double()
    most, wrapped, chosen = torch.zeros(1).int(), torch.zeros(1).int(), torch.zeros(1).long()
    kernels.launch("atomics", 2, 64, f, i, d, most, wrapped, chosen)
    assert [f.item(), i.item(), d.item(), most.item()] == [128, 256, 64, 63]
    assert wrapped.item() == 128 % 10
    assert 1 <= chosen.item() <= 64


def test_warps(kernels):
    x, y = torch.randn(64), torch.zeros(2, 4)
    kernels.launch("warps", 1, 64, x, y)
    for row, part in zip(y, x.split(32)):
        expected = torch.tensor([part.sum(), (part > 0).sum(), part.sum(), 0x11111111])
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_a_shuffle_of_some_lanes(kernels):
    y = torch.zeros(32)
    kernels.launch("half_a_warp", 1, 32, y)
    assert y[8:16].tolist() == [9, 8, 11, 10, 13, 12, 15, 14]


def test_local_memory(kernels):
    index = torch.randint(0, 16, (16,)).int()
    y = torch.zeros(32)
    kernels.launch("local_memory", 1, 32, index, y)
    for t in range(32):
        a = [float(i * t) for i in range(16)]
        for i in index.tolist():
            a[i] += 1
        assert y[t] == sum(a[i] for i in index.tolist())


def test_barriers_within_a_block(kernels):
    out = torch.zeros(64).int()
    kernels.launch("arrive_and_wait", 1, 64, out)
    assert out.tolist() == list(range(63, -1, -1))
    out = torch.zeros(5, 64).int()
    kernels.launch("named_barriers", 1, 128, out, 5)
    assert torch.equal(out, 127 - torch.arange(64) + torch.arange(5).view(5, 1))
    out = torch.zeros(3, 64).int()
    kernels.launch("counting_barrier", 1, 64, out)
    assert out.unique(dim=1).flatten().tolist() == [22, 0, 1]


def test_the_barrier_of_a_grid(kernels):
    x, y = torch.zeros(256).int(), torch.zeros(256).int()
    kernels.launch("grid_sync", 4, 64, x, y, 3, cooperative=True)
    assert torch.equal(y, (torch.arange(256) + 64) % 256 + 2)
    with pytest.raises(RuntimeError, match="grid_sync"):
        kernels.launch("grid_sync", 4, 64, x, y, 3)  # not cooperative, so the grid is not valid


def test_calls_variables_and_vectors(kernels):
    x, y = torch.randn(40), torch.zeros(32)
    kernels.launch("call", 1, 32, x, y)
    torch.testing.assert_close(y, x.unfold(0, 8, 1)[:32].sum(1))
    kernels.launch("variables", 1, 32, y)
    assert y[:4].tolist() == [8.5, 9.5, 10.5, 11.5]
    x, y = torch.randn(32, 4), torch.zeros(32, 4)
    a, b = torch.arange(32).short() - 16, torch.zeros(32).short()
    kernels.launch("vectors", 1, 32, x, y, a, b)
    assert torch.equal(b, a * 2 - 1)
    assert torch.equal(y[:, 0], x[:, 0] + x[:, 3])
    assert torch.equal(y[:, 1:], x[:, 1:])


def test_the_clock_advances(kernels):
    y = torch.zeros(32).long()
    kernels.launch("wait_a_while", 1, 32, y)
    assert (y > 100000).all()


def test_memory_that_was_never_written_is_nan(kernels):
    y = torch.zeros(32)
    kernels.launch("never_written", 1, 32, y, smem=128)
    assert y.isnan().all()


def test_asynchronous_copies_arrive_when_waited_for(kernels):
    if arch_of(kernels) < 80:
        pytest.skip("needs sm_80")
    x, y = torch.randn(96), torch.zeros(96)
    kernels.launch("copies", 1, 32, x, y, 1)
    assert torch.equal(y[:94], x[:94])
    assert y[94:].tolist() == [0, 0]  # the source was 8 bytes, the rest is filled with zeros
    kernels.launch("copies", 1, 32, x, y, 0)
    assert y.isnan().all(), "nothing waited for the copies"


def test_reductions_over_a_warp(kernels):
    if arch_of(kernels) < 80:
        pytest.skip("needs sm_80")
    y = torch.zeros(64).int()
    kernels.launch("reduce_warp", 1, 32, y)
    assert y.view(2, 32).unique(dim=1).flatten().tolist() == [-9, 496]


# --- Clusters ---


@pytest.fixture(params=emulator.ORDERS)
def clusters(hopper: emulator.Kernels, request: pytest.FixtureRequest) -> emulator.Kernels:
    hopper.schedule(request.param, seed=5, yield_probability=0.2)
    return hopper


def test_shared_memory_of_other_blocks(clusters):
    out = torch.zeros(2, 8).int()
    clusters.launch("neighbours", 8, 32, out, cluster=4)
    assert out.tolist() == [[101, 102, 103, 100] * 2] * 2
    out = torch.zeros(8, 4).int()
    clusters.launch("scatter", 8, 32, out, cluster=4)
    assert torch.equal(out[:4], 10 * torch.arange(4) + torch.arange(4).view(4, 1))
    assert torch.equal(out[:4], out[4:])


@pytest.mark.parametrize("rounds", [1, 2, 3, 8])
def test_asynchronous_stores_around_a_ring(clusters, rounds):
    out = torch.zeros(4, 64)
    clusters.launch("ring", 4, 64, out, rounds, 0, cluster=4)
    value = 100.0 * torch.arange(4).view(4, 1) + torch.arange(64)
    for _ in range(rounds):
        even = value[:, ::2].roll(1, 0)
        value = torch.stack([even, even + 1], 2).view(4, 64) + 1000
    assert torch.equal(out, value)


def test_a_store_without_a_wait_is_late(hopper):
    hopper.schedule("forward")
    out = torch.zeros(4, 64)
    hopper.launch("ring", 4, 64, out, 1, 1, cluster=4)
    assert out.isnan().any()


def test_bulk_copies(clusters):
    x, y = torch.randn(256), torch.zeros(256)
    clusters.launch("bulk", 1, 256, x, y)
    assert torch.equal(y, 2 * x)
    x, y = torch.randn(4, 64), torch.zeros(4, 64)
    clusters.launch("bulk_to_peer", 4, 64, x, y, cluster=2)
    assert torch.equal(y, x[[1, 0, 3, 2]])


def test_one_lane_is_elected_and_matrices_are_stored(clusters):
    out = torch.zeros(32).int()
    clusters.launch("elected", 1, 32, out)
    assert out.sum() == 1
    x, y = torch.randn(32), torch.zeros(32)
    clusters.launch("store_matrix", 1, 32, x, y)
    assert torch.equal(x, y)


def test_reading_memory_of_a_block_that_has_exited_is_an_error(clusters):
    with pytest.raises(RuntimeError, match=r"has exited, at .*hopper\.cu:\d+"):
        clusters.launch("leave_early", 2, 32, torch.zeros(2).int(), cluster=2)


def test_unknown_instructions_are_named_with_their_line():
    with pytest.raises(emulator.UnsupportedError, match=r"unsupported\.cu:4: vadd2\.u32"):
        emulator.Kernels(KERNELS / "unsupported.cu")


def test_compile_errors_show_what_nvcc_said(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void kernel() { undeclared = 1; }\n")
    with pytest.raises(emulator.BuildError, match="undeclared"):
        emulator.Kernels(source)


# --- Launchers ---


def test_launches(library):
    x, y = torch.randn(1000), torch.zeros(1000)
    n, factor = ctypes.c_longlong(1000), ctypes.c_float(2.5)
    assert library.c.launch_scale(pointer(x), pointer(y), factor, n) == 0
    assert torch.equal(y, 2.5 * x)
    x, y = x.double(), y.double()
    assert library.c.launch_scale_f64(pointer(x), pointer(y), ctypes.c_double(0.1), n) == 0
    assert torch.equal(y, 0.1 * x)
    x, y = torch.randn(50), torch.zeros(50)
    assert library.c.launch_structure(pointer(x), pointer(y), ctypes.c_longlong(50)) == 0
    assert torch.equal(y, x * 0.5 + 1)
    assert library.counters() == {
        **dict.fromkeys(emulator.library.COUNTERS, 0),
        "launches": 3,
    }


def test_kernels_of_one_name_in_two_files(library):
    out = torch.zeros(3).int()
    library.c.launch_1(pointer(out))
    assert out.tolist() == [1, 10, 7]
    library.c.launch_2(pointer(out))
    assert out.tolist() == [2, 20, 7]


def test_cooperative_launches(library):
    x = torch.zeros(64 * 132).int()
    assert library.c.launch_cooperative(pointer(x), 132) == 0
    assert (x == 1).all()
    assert library.c.launch_cooperative(pointer(x), 132 * 32 + 1) == 720
    assert "resident" in library.last_failure()
    assert library.counters()["cooperative_launches"] == 2


def test_large_shared_memory_must_be_requested(library):
    y = torch.zeros(256)
    assert library.c.launch_fill(pointer(y), 256, 48 << 10, 0) == 0
    assert library.c.launch_fill(pointer(y), 256, (48 << 10) + 4, 0) == 1
    assert "cudaFuncSetAttribute" in library.last_failure()
    assert library.c.launch_fill(pointer(y), 256, 227 << 10, 227 << 10) == 0
    assert library.c.launch_fill(pointer(y), 256, 1024, 228 << 10) == 1
    assert library.c.launch_fill(pointer(y), 2048, 1024, 0) == 9
    library.use_device("a100")
    assert library.c.launch_fill(pointer(y), 256, 1024, 0) == 209  # compiled for sm_90


def test_clusters(library):
    y = torch.zeros(32).int()
    launch = library.c.launch_cluster
    assert launch(pointer(y), 8, 4, 0, 0) == 0
    assert y[:8].tolist() == [400, 401, 402, 403] * 2
    assert launch(pointer(y), 32, 8, 0, 1) == 0
    assert launch(pointer(y), 16, 16, 0, 0) == 912
    assert launch(pointer(y), 16, 16, 1, 0) == 0
    assert launch(pointer(y), 6, 4, 0, 0) == 9
    assert library.counters()["cluster_launches"] == 5
    library.use_device("tiny")
    assert launch(pointer(y), 8, 4, 0, 0) == 0
    assert launch(pointer(y), 8, 8, 0, 0) == 912


def test_occupancy(library):
    c = library.c
    assert c.blocks_per_multiprocessor(1024, 0) == 2
    assert c.blocks_per_multiprocessor(256, 0) == 8
    assert c.blocks_per_multiprocessor(64, 0) == 32
    assert c.blocks_per_multiprocessor(64, 100 << 10) == 2
    assert c.blocks_per_multiprocessor(64, 227 << 10) == 1
    # With one block per multiprocessor: 6 GPCs of 16 and 2 of 18.
    assert c.most_clusters(4, 0, 200 << 10) == 32
    assert c.most_clusters(16, 1, 200 << 10) == 8
    assert c.most_clusters(16, 0, 200 << 10) == -912
    assert 1 < c.registers() < 128
    assert c.largest_block() == 128
    library.use_device("a100")
    assert c.most_clusters(4, 0, 0) < 0


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("h100", [132, 90, 232448, 232448, 50 << 20, 1]),
        ("a100", [108, 80, 166912, 166912, 40 << 20, 0]),
        ("rtx4090", [128, 89, 101376, 101376, 72 << 20, 0]),
        ("rtx3090", [82, 86, 101376, 101376, 6 << 20, 0]),
        ("t4", [40, 75, 65536, 65536, 4 << 20, 0]),
        ("b200", [148, 100, 232448, 232448, 126 << 20, 1]),
        ("tiny", [8, 90, 49152, 49152, 1 << 20, 1]),
    ],
)
def test_devices(library, name, figures):
    library.use_device(name)
    values = (ctypes.c_int * 6)()
    assert library.c.device_figures(values) == 0
    assert list(values) == figures


def test_memory_streams_and_events(library):
    x = torch.randn(300)
    expected = 3 * x
    assert library.c.round_trip(pointer(x), 300) == 0
    assert torch.equal(x, expected)
    assert library.counters() == {
        **dict.fromkeys(emulator.library.COUNTERS, 0),
        "launches": 1,
        "copies": 2,
        "allocations": 2,
        "frees": 2,
        "synchronizations": 4,  # cudaMalloc, cudaFree, cudaStreamSynchronize, ...DeviceSynchronize
    }
    assert library.c.through_symbols() == 8 * 2 * 4


def test_a_launch_can_be_made_to_fail(library):
    library.c.error_text.restype = ctypes.c_char_p
    x = torch.randn(4)
    library.fail_next_launch(719)
    n, factor = ctypes.c_longlong(4), ctypes.c_float(1)
    assert library.c.launch_scale(pointer(x), pointer(x), factor, n) == 719
    assert b"cudaErrorLaunchFailure" in library.c.error_text(719)
    assert library.c.launch_scale(pointer(x), pointer(x), factor, n) == 0
    assert library.counters()["failed_launches"] == 1


def test_launches_are_cheap(library):
    """Gradient checks launch thousands of tiny kernels. A launch takes about 50 µs."""
    y = torch.zeros(256)
    library.schedule("forward")
    library.c.launch_often(pointer(y), 100)
    start = time.process_time()
    library.c.launch_often(pointer(y), 1000)
    assert time.process_time() - start < 1


def test_a_second_build_compiles_nothing():
    start = time.perf_counter()
    emulator.build_library([KERNELS / "mistakes.cu"], name="mistakes", arch=80)
    emulator.build_library([KERNELS / "mistakes.cu"], name="mistakes", arch=80)
    first = time.perf_counter() - start
    start = time.perf_counter()
    emulator.build_library([KERNELS / "mistakes.cu"], name="mistakes", arch=80)
    assert time.perf_counter() - start <= first


def test_a_changed_header_is_compiled_anew(tmp_path):
    header, source = tmp_path / "value.h", tmp_path / "kernel.cu"
    source.write_text('#include "value.h"\n__global__ void kernel(int* y) { *y = VALUE; }\n')
    y = torch.zeros(1).int()
    for value in (1, 2, 1):
        header.write_text(f"#define VALUE {value}\n")
        time.sleep(0.02)  # a file edited while it compiles counts as changed
        emulator.Kernels(source).launch("kernel", 1, 1, y)
        assert y.item() == value


# --- Mistakes that must be detected ---


def runs_under(library: emulator.Library, run) -> list[bool]:
    """Return whether `run` succeeds, for several orders and seeds."""
    outcomes = []
    for order, seed in [("forward", 1), ("reverse", 1), *zip(["random"] * 5, range(5))]:
        library.schedule(order, seed, 0.2 if order == "random" else 0)
        outcomes.append(run())
    return outcomes


def test_a_missing_barrier_shows(mistakes):
    x, y = torch.randn(64), torch.zeros(64)

    def correct(broken: int) -> bool:
        mistakes.c.missing_barrier_launch(broken, pointer(x), pointer(y))
        return torch.equal(y, x.roll(-33))

    def chain(broken: int) -> bool:
        mistakes.c.overwritten_too_soon_launch(broken, pointer(x), pointer(y), 4)
        return torch.equal(y, x.roll(-4))

    assert all(runs_under(mistakes, lambda: correct(0)))
    assert not any(runs_under(mistakes, lambda: correct(1)))
    assert all(runs_under(mistakes, lambda: chain(0)))
    assert not all(runs_under(mistakes, lambda: chain(1)))


@pytest.mark.parametrize(
    ("kernel", "text", "code"),
    [
        ("beyond_shared", r"out of bounds: 4 bytes at 256 of 256", 719),
        ("wild_pointer", r"illegal address 0x", 700),
        ("divergent_barrier", r"different __syncthreads\(\): some at .*:\d+", 719),
        ("waits_for_ever", r"livelock.*", 719),
        (
            "half_of_a_barrier",
            r"deadlock: no thread can go on[\s\S]*63 threads: __syncthreads at",
            719,
        ),
        ("bad_mask", r"not in the mask of a warp operation", 719),
        ("misaligned", r"misaligned access of 16 bytes", 719),
    ],
)
def test_mistakes_are_reported_with_their_line(mistakes, kernel, text, code):
    buffer = torch.zeros(128)
    launch = getattr(mistakes.c, f"{kernel}_launch")
    for order in emulator.ORDERS:
        mistakes.schedule(order)
        buffer.zero_()
        assert launch(0, pointer(buffer)) == 0, mistakes.last_failure()
        buffer.zero_()
        assert launch(1, pointer(buffer)) == code
        assert mistakes.last_failure().startswith(f"kernel _Z{len(kernel)}{kernel}")
        assert re.search(text + r"[\s\S]*mistakes\.cu:\d+", mistakes.last_failure())
        buffer.zero_()
        assert launch(0, pointer(buffer)) == 0, "a failure must leave nothing behind"


def test_failures_in_a_program_that_goes_on(mistakes):
    """The process continues, and fault handlers set by other code still work."""
    code = f"""
import ctypes, faulthandler
faulthandler.enable()
library = ctypes.CDLL({str(mistakes.path)!r})
buffer = (ctypes.c_float * 128)()
for _ in range(3):
    assert library.wild_pointer_launch(1, buffer) == 700
    assert library.wild_pointer_launch(0, buffer) == 0
print("alive", flush=True)
ctypes.string_at(0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "alive\n"
    assert "Segmentation fault" in result.stderr


def program(sanitizer: str) -> Path:
    if shutil.which("setarch") is None:
        pytest.skip("no setarch")
    return emulator.build_program(
        [KERNELS / "mistakes.cu"],
        KERNELS / "mistakes_main.cpp",
        name=f"mistakes-{sanitizer}",
        arch=80,
        sanitizer=sanitizer,
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("kernel", ["missing_barrier", "overwritten_too_soon", "missing_fence"])
def test_thread_sanitizer_finds_races(kernel, order):
    path = program("thread")
    good = emulator.run_program(path, kernel, "0", order)
    assert good.returncode == 0, good.stdout + good.stderr
    bad = emulator.run_program(path, kernel, "1", order)
    assert "ThreadSanitizer: data race" in bad.stderr, bad.stdout + bad.stderr
    assert "mistakes.cu:" in bad.stderr


@pytest.mark.slow
def test_address_sanitizer_finds_accesses_out_of_bounds():
    path = program("address")
    for kernel in ("beyond_global", "beyond_shared", "missing_barrier", "missing_fence"):
        good = emulator.run_program(path, kernel, "0")
        assert good.returncode == 0, good.stdout + good.stderr
    bad = emulator.run_program(path, "beyond_global", "1")
    assert "heap-buffer-overflow" in bad.stderr, bad.stdout + bad.stderr
    assert "mistakes.cu:" in bad.stderr
    bad = emulator.run_program(path, "beyond_shared", "1")
    assert bad.returncode == 1
    assert "out of bounds" in bad.stdout


def test_every_launch_has_its_own_schedule(mistakes):
    """A seed determines the results of a series of launches, but each has its own order."""
    x = torch.randn(64)

    def results(count: int) -> list[Tensor]:
        mistakes.schedule("random", 1)
        outputs = []
        for _ in range(count):
            y = torch.zeros(64)
            mistakes.c.overwritten_too_soon_launch(1, pointer(x), pointer(y), 4)
            outputs.append(y)
        return outputs

    first, second = results(3), results(3)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not all(torch.equal(a, b) for a, b in itertools.pairwise(first))
