"""The CPU planner as a table: what it decides at the shapes people use, and what it never does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedrnn import _C

plan_cpu = _C.plan_cpu


@pytest.mark.parametrize(
    ("shape", "threads", "groups"),
    [
        # (T, B, I, H), threads -> groups that split the batch, groups that split the units
        ((256, 1, 64, 64), 2, (1, 1)),  # a step is shorter than a barrier
        ((256, 16, 128, 256), 2, (2, 1)),  # rows of the batch never meet
        ((100, 32, 256, 512), 2, (2, 1)),
        ((100, 32, 256, 512), 8, (8, 1)),
        ((256, 1, 64, 1024), 2, (1, 2)),  # one row: only its units can be split
        ((256, 1, 64, 1024), 8, (1, 8)),
        ((1, 1, 10, 20), 8, (1, 1)),  # not worth waking anybody
        ((8, 0, 10, 20), 8, (1, 1)),
    ],
)
def test_how_work_is_divided(shape, threads, groups):
    T, B, I, H = shape
    plan = plan_cpu(T=T, B=B, I=I, H=H, threads=threads)
    assert (plan["batch_groups"], plan["hidden_groups"]) == groups


def test_few_rows_are_multiplied_with_the_weights_as_they_lie():
    assert not plan_cpu(T=1, B=1, I=64, H=64, threads=1)["pack"]
    assert plan_cpu(T=1, B=1, I=64, H=64, threads=1, rows_to_pack=0)["pack"]
    assert plan_cpu(T=100, B=1, I=64, H=64, threads=1)["pack"]


def test_the_input_of_small_batches_is_multiplied_ahead():
    assert plan_cpu(T=100, B=1, I=64, H=64, threads=1)["project_ahead"]
    assert not plan_cpu(T=100, B=16, I=64, H=64, threads=1)["project_ahead"]
    assert not plan_cpu(T=100, B=1, I=0, H=64, threads=1)["project_ahead"]


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
