"""The CUDA planner: its decisions, its limits, and its model of time.

Decisions for common GPUs and shapes are compared with a table, limits are never exceeded, and the
model is compared with measurements on an H200. No GPU is needed: the planner is a pure function.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))  # as a script

from engines import REGIMES, TILES
from gpus import A100, H100, H200, KB, RTX4090, T4, TINY
from paths import BENCH

from fusedrnn import _C

REAL = {d["name"]: d for d in (H100, H200, A100, RTX4090, T4)}
DEVICES = {**REAL, "tiny": TINY}  # on tiny, small shapes reach the limits
DTYPES = ("float32", "tf32", "float64", "bfloat16", "float16")
BF16, F16, F32, F64 = "bfloat16", "float16", "float32", "float64"


def plan(device: dict[str, Any], dtype: str, B: int, I: int, H: int, **rest: Any) -> dict[str, Any]:
    """Plan one problem; ``tf32`` is float32 where torch allows TF32."""
    return _C.plan_cuda(
        **{"T": 256, **rest},
        B=B,
        I=I,
        H=H,
        device=device,
        dtype=F32 if dtype == "tf32" else dtype,
        tf32=dtype == "tf32",
    )


def total(plan: dict[str, Any]) -> float:
    return plan["microseconds"] + plan["input_microseconds"]


def shape_of(plan: dict[str, Any]) -> tuple[str, int, int]:
    return plan["regime"], plan["blocks"], plan["batch_groups"]


# ---- what is decided ----

SHAPES = [(1, 64, 64), (256, 64, 64), (16, 128, 256), (1, 512, 512), (32, 256, 512)]
SHAPES += [(64, 512, 512), (64, 1024, 1024), (4096, 64, 64), (128, 2048, 2048)]
# The first letter of the regime for each shape
TABLE = [
    (H100, BF16, "bbcccccbg"),
    (H100, F16, "bbcccccbg"),
    (H100, F32, "bbccccgbs"),
    (H100, F64, "bbccccsbs"),
    (H200, BF16, "bbcccccbg"),
    (H200, F16, "bbcccccbg"),
    (H200, F32, "bbcccggbs"),
    (H200, F64, "bbcccgsbs"),
    (A100, BF16, "bbbggggbg"),
    (A100, F16, "bbbggggbg"),
    (A100, F32, "bbgggggbs"),
    (A100, F64, "bbggggsbs"),
    (RTX4090, BF16, "bbbggggbg"),
    (RTX4090, F16, "bbbggggbg"),
    (RTX4090, F32, "bbgggggbs"),
    (RTX4090, F64, "bbgssssss"),
    (T4, BF16, "bbggggsbs"),
    (T4, F16, "bbbggggbs"),
    (T4, F32, "bbggggsbs"),
    (T4, F64, "bsgssssss"),
]


@pytest.mark.parametrize(
    ("device", "dtype", "expected"), TABLE, ids=[f"{d['name']}-{t}" for d, t, _ in TABLE]
)
def test_common_shapes_run_in_the_regimes_listed(device, dtype, expected):
    found = "".join(plan(device, dtype, *shape)["regime"][0] for shape in SHAPES)
    assert dict(zip(SHAPES, found)) == dict(zip(SHAPES, expected))


def largest(device: dict[str, Any], dtype: str, regime: str) -> int:
    """Return the largest H that a regime can run, with one row and no inputs."""
    possible = [
        plan(device, dtype, 1, 0, H, T=1000, regime=regime)["regime"] == regime
        for H in range(1, 4000)
    ]
    if True not in possible:
        return 0
    return len(possible) - possible[::-1].index(True)


# ---- the full table, which changes whenever the cost model is tuned ----

TABLE_FILE = Path(__file__).with_name("plan_cuda.txt")
HEAD = """\
What the CUDA planner decides and predicts for 256 steps. Tests compare it, so that every change
of the planner or of its model shows; `python tests/cuda/test_plan_cuda.py` writes it anew.
"""


def details(device: dict[str, Any], dtype: str) -> str:
    lines = [f"{device['name']}, {dtype}"]
    for shape in SHAPES:
        p = plan(device, dtype, *shape)
        tile = TILES[p["tile"]]
        how = f"{tile.arithmetic} {tile.units}x{tile.rows}" + (f"/{p['split']}" if tile.mma else "")
        words = [
            "  B={} I={} H={}: ".format(*shape).ljust(28),
            "{} {}x{}".format(*shape_of(p)).ljust(14),
            ("" if p["regime"] == "step" else how).ljust(16),
            f"{p['microseconds']:.3g} µs",
            "" if p["fuse_input"] else f" + {p['input_microseconds']:.3g} for inputs",
        ]
        lines.append("".join(words).rstrip())
    reach = [(regime, largest(device, dtype, regime)) for regime in REGIMES[1:]]
    lines.append("  largest H: " + ", ".join(f"{regime} {H}" for regime, H in reach if H))
    return "\n".join(lines) + "\n"


EVERY = [(d, t) for d in REAL.values() for t in DTYPES]


@pytest.mark.parametrize(("device", "dtype"), EVERY, ids=[f"{d['name']}-{t}" for d, t in EVERY])
def test_decisions_match_the_table_file(device, dtype):
    found = details(device, dtype)
    title = found.splitlines()[0]
    sections = TABLE_FILE.read_text().split("\n\n")
    (expected,) = (s.strip() for s in sections if s.strip().splitlines()[0] == title)
    assert found.strip() == expected, f"`python {Path(__file__).name}` writes the table anew"


def test_layers_that_fit_onto_one_sm_use_a_cluster_if_it_is_faster():
    assert plan(H100, BF16, 1, 0, 128)["regime"] == "block"
    assert plan(H100, BF16, 1, 0, 256)["regime"] == "cluster"
    assert plan(A100, BF16, 1, 0, 256)["regime"] == "block"


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_larger_than_the_chip_use_the_step_regime(device, dtype):
    found = plan(device, dtype, 64, 64, 8192)
    assert found["regime"] == "step"
    assert "reads the weights through L2" in found["words"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_cores_are_used_only_for_dtypes_that_they_support(dtype):
    for device in DEVICES.values():
        old = device["architecture"] < 80
        computed = {BF16: F32, "tf32": F32}.get(dtype, dtype) if old else dtype
        for B, H in itertools.product((1, 64), (32, 64, 200)):
            found = plan(device, dtype, B, 16, H)
            if found["regime"] == "step":
                continue
            # where TF32 is allowed, plain float32 is too
            assert TILES[found["tile"]].dtype in (computed, F32 if dtype == "tf32" else computed)


def test_a_cell_is_no_slower_than_one_fused_step():
    for device, dtype in itertools.product(DEVICES.values(), DTYPES):
        for B, I, H in [(1, 1, 1), (1, 64, 64), (64, 512, 512), (4096, 64, 64)]:
            free, step = (plan(device, dtype, B, I, H, T=1, regime=r) for r in (None, "step"))
            assert total(free) <= total(step)
    assert plan(H100, F32, 1, 1, 1, T=1)["regime"] == "step"  # one step: no weights to keep
    assert plan(H100, F32, 4096, 64, 64, T=1)["regime"] == "step"


@pytest.mark.parametrize("regime", [None, *REGIMES])
@pytest.mark.parametrize(("B", "H"), [(0, 64), (4, 0), (0, 0)])
def test_empty_problems_launch_no_blocks(regime, B, H):
    found = plan(H100, F32, B, 16, H, regime=regime)
    assert found["regime"] == "step"
    assert found["blocks"] * found["batch_groups"] == 0
    assert total(found) == 0


def test_the_smallest_layer_runs_in_one_block():
    for device, dtype in itertools.product(DEVICES.values(), DTYPES):
        for I in (0, 1):
            assert shape_of(plan(device, dtype, 1, I, 1)) == ("block", 1, 1)


# ---- overrides ----


def devices_for(regime: str) -> list[dict[str, Any]]:
    return [d for d in DEVICES.values() if regime != "cluster" or d["architecture"] >= 90]


@pytest.mark.parametrize("regime", REGIMES[1:])
@pytest.mark.parametrize("tile", range(len(TILES)))
def test_overrides_are_satisfied_if_such_a_plan_can_run_the_problem(regime, tile):
    for device in devices_for(regime):
        dtype = TILES[tile].dtype
        known = dtype not in (BF16, "tf32") or device["architecture"] >= 80
        for split, fuse in itertools.product(TILES[tile].splits, (True, False)):
            overrides = {"regime": regime, "tile": tile, "split": split, "fuse_input": fuse}
            found = plan(device, dtype, 5, 7, 16, **overrides)
            satisfied = {name: found[name] for name in overrides} == overrides
            assert satisfied == known, (device["name"], overrides, found)


def test_the_planner_chooses_what_the_overrides_leave_open():
    assert plan(H100, BF16, 64, 64, 512, regime="step")["regime"] == "step"
    assert plan(H100, BF16, 64, 64, 512, regime="grid")["regime"] == "grid"
    for fuse in (True, False):
        found = plan(H100, BF16, 64, 64, 512, fuse_input=fuse)
        assert (found["regime"], found["fuse_input"]) == ("cluster", fuse)
        # without inputs there is nothing to fuse, and the rest of the override applies
        overrides = {"regime": "grid", "tile": 7, "split": 2}
        found = plan(H100, BF16, 4, 0, 64, **overrides, fuse_input=fuse)
        assert {name: found[name] for name in overrides} == overrides


def test_overrides_that_no_plan_satisfies_are_ignored():
    for overrides in (
        {"regime": "block"},  # H is too large for it
        {"regime": "cluster", "tile": 0},  # float32
        {"regime": "cluster", "split": 16},
    ):
        assert plan(H100, BF16, 4, 4, 1000, **overrides) == plan(H100, BF16, 4, 4, 1000)
    assert plan(A100, BF16, 4, 4, 100, regime="cluster") == plan(A100, BF16, 4, 4, 100)


# ---- the model ----

RESULTS = BENCH / "results" / "gpu-h200"
SHORT = 400  # µs: shorter backward calls are bound by Python, not by the GPU


def measured() -> Iterator[tuple[str, dict[str, Any], float]]:
    """Yield what was run on the H200: its name, the problem with the plan, and µs per step.

    Runs whose plan differs from what the planner now makes for the same overrides are left out.
    """
    for file in ("speed-bench.json", "tune-bench.json"):
        for result in json.loads((RESULTS / file).read_text())["results"]:
            shape, precision = result["shape"], result["precision"]
            runs = [
                (way, run["plan"], run["seconds"], True)
                for ways in result.get("regimes", {}).values()
                for way, run in ways.items()
                if "plan" in run
            ]
            runs += [
                (way, result["predicted"][way], seconds, False)
                for way, seconds in result.get("chains", {}).items()
            ]
            for way, ran, seconds, with_input in runs:
                adjoint = way == "backward"
                us = statistics.median(seconds) * 1e6
                if ran["regime"] == "slices" or (adjoint and not with_input and us < SHORT):
                    continue  # that regime was deleted
                if with_input and not adjoint and ran["fuse_input"] and ran["regime"] != "step":
                    continue  # ran plain kernels with a fused input product, since deleted
                problem = {
                    **shape, "dtype": {"bf16": BF16, "f32": F32}[precision], "adjoint": adjoint,
                    "I": shape["I"] if with_input and not adjoint else 0, "regime": ran["regime"],
                }  # fmt: skip
                if ran["regime"] != "step":
                    problem |= {"tile": ran["tile"], "split": ran["split"]}
                if with_input:
                    problem["fuse_input"] = ran["fuse_input"]
                now = plan(H200, **problem)
                if all(now[name] == ran[name] for name in ("blocks", "rows", "units")):
                    yield f"{precision} {ran['regime']} {way} {shape}", problem, us / shape["T"]


def test_the_model_agrees_with_an_h200():
    runs = list(measured())
    assert len(runs) > 80
    ratios = {name: total(plan(H200, **problem)) / us for name, problem, us in runs}
    assert {name: ratio for name, ratio in ratios.items() if not 0.65 < ratio < 1.5} == {}
    assert statistics.geometric_mean(ratios.values()) == pytest.approx(1, abs=0.05)


def test_the_planner_chooses_what_was_fastest_on_an_h200():
    """It may also choose what took at most a fifth longer."""
    for result in json.loads((RESULTS / "tune-bench.json").read_text())["results"]:
        if result["group"] != "regimes":
            continue
        shape, dtype = result["shape"], {"bf16": BF16, "f32": F32}[result["precision"]]
        for way in ("forward", "backward"):
            took = {
                regime: statistics.median(ways[way]["seconds"])
                for regime, ways in result["regimes"].items()
                if "seconds" in ways.get(way, {})
            }
            adjoint = way == "backward"
            of = {**shape, "I": 0} if adjoint else shape
            chosen = plan(H200, dtype, **of, adjoint=adjoint)["regime"]
            assert took[chosen] <= 1.2 * min(took.values()), (shape, dtype, way, chosen, took)


GROWING = {
    "H": [{"B": B, "I": I} for B in (1, 16, 64, 500) for I in (0, 64)],
    "B": [{"H": H, "I": I} for H in (32, 64, 128, 200, 256, 500, 512, 1024, 2048) for I in (0, 64)],
    "I": [{"B": B, "H": H} for B in (1, 16, 100) for H in (64, 256, 1024)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", GROWING)
def test_larger_problems_are_never_predicted_to_take_less_time(what, dtype):
    for device, T, others in itertools.product(REAL.values(), (1, 100, 1000), GROWING[what]):
        before = 0.0
        for size in (*range(1, 40, 3), *range(40, 2200, 37)):
            now = total(plan(device, dtype, T=T, **{what: size}, **others))
            assert now >= before * (1 - 1e-9), (device["name"], T, others, size)
            before = now


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_longer_sequence_takes_longer_but_less_time_per_step(dtype):
    for device, (B, I, H) in itertools.product(DEVICES.values(), SHAPES):
        lengths = (1, 2, 3, 5, 16, 100, 1000, 10000)
        each = [total(plan(device, dtype, B, I, H, T=T)) for T in lengths]
        assert each == sorted(each, reverse=True)
        whole = [T * time for T, time in zip(lengths, each)]
        assert whole == sorted(whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", REGIMES[1:])
def test_a_regime_that_fits_more_rows_also_fits_fewer(dtype, regime):
    for device, H, leaky in itertools.product(DEVICES.values(), (30, 64, 250, 512), (False, True)):
        fits = [
            plan(device, dtype, B, 0, H, regime=regime, leaky=leaky, T=9)["regime"] == regime
            for B in (1, 2, 9, 33, 100, 1000, 30000, 1000000)
        ]
        assert fits == sorted(fits, reverse=True), (device["name"], H)
        if regime != "grid":  # a grid must run at once; the others can run in waves
            assert len({*fits[3:]}) == 1, (device["name"], H)


def test_with_fixed_overrides_more_rows_never_need_less_of_the_device():
    """All overrides are fixed, and only the number of rows grows.

    Rows come in whole tiles, so there may be fewer batch groups, but not less room (batch groups
    times rows).
    """
    for (place, tile), regime in itertools.product(enumerate(TILES), REGIMES[1:]):
        overrides = {"tile": place, "regime": regime, "split": 1, "fuse_input": True}
        for H, leaky in itertools.product((16, 60), (False, True)):
            before = {"shared_memory": 0, "room": 0}
            for B in (*range(1, 70), 128, 200, 700, 1056, 1057, 1064):
                found = plan(H100, tile.dtype, B, 8, H, leaky=leaky, **overrides)
                assert found["regime"] == regime
                now = {
                    "shared_memory": found["shared_memory"],
                    "room": found["batch_groups"] * found["rows"],
                }
                at_once = found["blocks"] * found["batch_groups"] <= H100["sms"]
                if not at_once:
                    break
                assert now["room"] >= before["room"]
                assert now["room"] < B + found["rows"]
                assert now["shared_memory"] >= before["shared_memory"]
                before = now


def test_the_grid_regime_needs_cooperative_launches():
    for device, dtype, shape in itertools.product(REAL.values(), DTYPES, SHAPES):
        found = plan({**device, "cooperative": False}, dtype, *shape)
        assert found["regime"] in ("step", "block", "cluster")


# ---- limits ----


def check_limits(device: dict[str, Any], dtype: str, B: int, I: int, H: int, **rest: Any) -> None:
    found = plan(device, dtype, B, I, H, **rest)
    blocks, groups, units, rows = (found[k] for k in ("blocks", "batch_groups", "units", "rows"))
    assert 0 < total(found) < 1e12
    assert units * blocks >= H
    assert rows * groups >= B
    assert rows * (groups - 1) < B  # no batch group without rows
    for number in (blocks, groups, units, rows, blocks * groups):
        assert 1 <= number < 2**31
    assert I > 0 or (found["fuse_input"] and found["input_microseconds"] == 0)
    assert (found["input_microseconds"] > 0) == (not found["fuse_input"])
    assert found["words"].endswith(f"on {device['name']}")
    each = f"each with {rows} batch row{'s' * (rows > 1)};"
    assert (each in found["words"]) == (found["regime"] != "step")
    if found["regime"] == "step":
        assert (units, rows) == (64, 32)  # kStepUnits, kStepRows
        assert found["shared_memory"] == found["counters"] == 0
        return

    tile, split = TILES[found["tile"]], found["split"]
    old = device["architecture"] < 80
    assert tile.dtype in {
        BF16: (F32,) if old else (BF16,),
        "tf32": (F32,) if old else (F32, "tf32"),
    }.get(dtype, (dtype,))
    assert split in tile.splits
    assert units <= tile.block_units // split
    assert units * tile.number_size % 16 == 0  # sent 16 bytes at a time
    assert found["chunks"] % split == 0
    assert rows == B or rows % tile.rows == 0

    # shared memory holds at least the states and the weights that do not fit into registers
    grid = found["regime"] == "grid"
    chunks = -(-H // tile.chunk) + (-(-I // tile.chunk) if found["fuse_input"] else 0)
    buffers = 2 * (tile.rows if grid else -(-rows // tile.rows) * tile.rows)
    partial = 8192 * tile.units if split > 1 else 0
    spilled = max(0, -(-chunks // split) - tile.held) * tile.chunk_bytes
    states = buffers * chunks * tile.chunk * tile.number_size
    carries = rest.get("leaky") or rest.get("adjoint")
    wide = 8 if dtype == F64 else 4
    needed = spilled + states + partial + 2 * units * wide + (rows * units * wide * bool(carries))
    assert needed <= found["shared_memory"] <= device["shared_memory"]

    # blocks that wait for each other must be resident at the same time, to avoid a deadlock
    at_once = -(-groups // found["waves"])
    assert found["counters"] == (groups if grid else 0)
    if grid:
        assert blocks * at_once <= device["sms"]
    elif found["regime"] == "block":
        assert blocks == 1
    else:
        assert blocks in (2, 4, 8, 16)
        assert device["clusters"][blocks.bit_length() - 1] > 0


OVERRIDES = {
    "regime": st.none() | st.sampled_from(REGIMES),
    "tile": st.none() | st.integers(0, len(TILES) - 1),
    "split": st.none() | st.sampled_from((1, 2, 4, 8)),
    "fuse_input": st.none() | st.booleans(),
}


def sizes(most: int) -> st.SearchStrategy[int]:
    """Draw each order of magnitude equally often."""
    return st.integers(0, most.bit_length() - 1).flatmap(
        lambda bits: st.integers(1 << bits, min(most, 2 << bits))
    )


@settings(max_examples=1000)
@given(
    device=st.sampled_from(list(DEVICES.values())),
    dtype=st.sampled_from(DTYPES),
    T=sizes(10**6),
    B=sizes(10**7),
    I=st.just(0) | sizes(10**5),
    H=sizes(10**5),
    leaky=st.booleans(),
    adjoint=st.booleans(),
    overrides=st.fixed_dictionaries(OVERRIDES),
)
def test_no_plan_exceeds_a_limit(device, dtype, B, I, H, overrides, **rest):
    check_limits(device, dtype, B, 0 if rest["adjoint"] else I, H, **rest, **overrides)


def test_no_plan_exceeds_a_limit_on_any_device():
    """Invented devices, and many more shapes of common sizes."""
    draw = random.Random(0)
    for _ in range(20000):
        sms = draw.randint(1, 200)
        clusters = [sms // n if draw.random() < 0.8 else 0 for n in (2, 4, 8, 16)]
        architecture = draw.choice((75, 80, 86, 89, 90, 100, 120))
        device = {
            "name": "invented",
            "architecture": architecture,
            "sms": sms,
            "shared_memory": draw.randint(16 * KB, 228 * KB),
            "clock": draw.uniform(0.5, 3),
            "memory_bandwidth": draw.uniform(50, 8000),
            "clusters": [sms, *(clusters if architecture >= 90 else [0] * 4)],
        }
        adjoint = draw.random() < 0.3
        check_limits(
            device,
            draw.choice(DTYPES),
            draw.randint(1, draw.choice((4, 100, 10000))),
            0 if adjoint or draw.random() < 0.2 else draw.randint(1, draw.choice((10, 3000))),
            draw.randint(1, draw.choice((30, 300, 4000))),
            T=draw.randint(1, draw.choice((4, 2000))),
            adjoint=adjoint,
            leaky=draw.random() < 0.3,
            regime=draw.choice((None, None, *REGIMES)),
        )


def test_planning_is_quick():
    """The planner runs on every call, so it may take only a few microseconds, like a launch."""
    calls = [(H100, d, *shape) for d in DTYPES for shape in SHAPES]
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for call in calls:
            plan(*call)
        fastest = min(fastest, (time.perf_counter() - start) / len(calls))
    assert fastest < 200e-6  # 20 µs on an idle machine, half of them in Python


if __name__ == "__main__":
    TABLE_FILE.write_text("\n".join([HEAD, *(details(*each) for each in EVERY)]))
