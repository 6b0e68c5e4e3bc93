"""The CPU planner: a table of its decisions for common shapes, and limits it must not exceed."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedrnn import _C

plan_cpu = functools.partial(_C.plan_cpu, isa="avx512")


@pytest.mark.parametrize(
    ("shape", "threads", "groups"),
    [
        # (T, B, I, H), threads -> (batch_groups, hidden_groups)
        ((256, 1, 64, 64), 2, (1, 1)),  # a step takes less time than a barrier
        ((256, 16, 128, 256), 2, (2, 1)),  # rows of the batch are independent
        ((100, 32, 256, 512), 2, (2, 1)),
        ((100, 32, 256, 512), 8, (8, 1)),
        ((256, 1, 64, 1024), 2, (1, 2)),  # one row: only its units can be split
        ((256, 1, 64, 1024), 8, (1, 8)),
        ((1, 1, 10, 20), 8, (1, 1)),  # not worth waking another thread
        ((8, 0, 10, 20), 8, (1, 1)),  # an empty batch
    ],
)
def test_common_shapes_are_split_as_listed(shape, threads, groups):
    T, B, I, H = shape
    plan = plan_cpu(T=T, B=B, I=I, H=H, threads=threads)
    assert (plan["batch_groups"], plan["hidden_groups"]) == groups


def test_weights_are_not_packed_for_few_rows():
    assert not plan_cpu(T=1, B=1, I=64, H=64, threads=1)["pack"]
    assert _C.plan_cpu(adjoint=True, dtype="bfloat16", T=1, B=1, I=64, H=64, threads=1)["pack"]
    assert not plan_cpu(T=12, B=1, I=64, H=64, threads=1)["pack"]
    assert plan_cpu(T=13, B=1, I=64, H=64, threads=1)["pack"]


def test_idle_threads_help_with_the_gradient_gemms():
    shape = {"T": 100, "B": 1, "I": 64, "H": 64, "threads": 2}
    assert plan_cpu(**shape)["threads"] == 1
    plan = plan_cpu(adjoint=True, **shape)
    assert plan["gemms"]
    assert plan["threads"] == 2
    assert plan["batch_groups"] * plan["hidden_groups"] == 1


def test_torch_runs_large_gemms_on_avx2():
    large = {"adjoint": True, "T": 9, "B": 9, "I": 256, "H": 512, "threads": 2}
    assert plan_cpu(**large)["gemms"]
    assert not _C.plan_cpu(isa="avx2", **large)["gemms"]
    assert _C.plan_cpu(isa="avx2", dtype="bfloat16", **large)["gemms"]
    assert _C.plan_cpu(isa="avx2", **{**large, "H": 64})["gemms"]


def test_input_products_of_small_batches_are_computed_ahead():
    assert plan_cpu(T=100, B=1, I=64, H=64, threads=1)["project_ahead"]
    assert not plan_cpu(T=100, B=16, I=64, H=64, threads=1)["project_ahead"]
    assert plan_cpu(T=100, B=1, I=1, H=64, threads=1)["project_ahead"]
    assert not plan_cpu(T=100, B=1, I=0, H=64, threads=1)["project_ahead"]


def test_a_large_step_is_a_chunk_of_its_own():
    assert plan_cpu(T=100, B=16, I=1, H=2048, threads=2)["chunk"] == 1


sizes = st.integers(1, 5000)


@given(
    T=sizes, B=st.integers(0, 5000), I=st.integers(0, 5000), H=sizes, threads=st.integers(1, 128)
)
def test_no_plan_exceeds_a_limit(T, B, I, H, threads):
    plan = plan_cpu(T=T, B=B, I=I, H=H, threads=threads)
    assert 1 <= plan["batch_groups"] * plan["hidden_groups"] <= threads
    assert plan["batch_groups"] <= max(B, 1)
    assert plan["hidden_groups"] <= -(-H // 16)
    assert 1 <= plan["chunk"] <= T


# ---- the full table, which changes whenever the cost model is tuned ----

TABLE_FILE = Path(__file__).with_name("plan_cpu.txt")
HEAD = """\
The CPU planner's decisions for B = 1 to 256 (rows) and H = 8 to 2048 (columns): batch groups x
hidden groups; "-": the weights are not packed; "+n": the input products of n steps in one GEMM. A
test compares this table, so that every change of the planner or its cost model is visible;
`python tests/engine/test_plan.py` rewrites it.
"""
BATCHES = (1, 2, 4, 7, 16, 64, 256)
UNITS = (8, 17, 64, 200, 449, 800, 2048)
INSTRUCTIONS = {"float32": "avx512", "float64": "avx2"}


def decision(**problem: Any) -> str:
    plan = _C.plan_cpu(**problem)
    groups = f"{plan['batch_groups']}x{plan['hidden_groups']}"
    ahead = f"+{plan['chunk']}" if plan["project_ahead"] else ""
    return groups + ("" if plan["pack"] else "-") + ahead


def details(dtype: str, inputs: int, T: int, threads: int) -> str:
    lines = [f"{dtype}, {threads} threads, T={T}, I={'H' if inputs else 0}"]
    isa = INSTRUCTIONS[dtype]
    for B in BATCHES:
        cells = [
            decision(dtype=dtype, isa=isa, T=T, B=B, I=inputs * H, H=H, threads=threads)
            for H in UNITS
        ]
        lines.append(f"{B:4}: " + " ".join(cell.ljust(7) for cell in cells).rstrip())
    return "\n".join(lines) + "\n"


EVERY = list(itertools.product(INSTRUCTIONS, (0, 1), (1, 2, 100), (2, 6, 32)))


def table() -> str:
    return "\n".join([HEAD, *(details(*each) for each in EVERY)])


def test_decisions_match_the_table_file():
    assert table() == TABLE_FILE.read_text(), (
        "the plans differ from plan_cpu.txt; if intended, run `python tests/engine/test_plan.py`"
    )


if __name__ == "__main__":
    TABLE_FILE.write_text(table())
