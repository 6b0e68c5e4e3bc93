"""The mutation tester: its changes to lines, and which mutants count as killed or surviving."""

from __future__ import annotations

import mutants
import pytest
from mutants import Mutant


def mutated(line: str, python: bool) -> set[str]:
    code = mutants.code_of(line, python)[0]
    changes = mutants.changes(line, code, python)
    return {" ".join((line[:a] + new + line[b:]).split()) for a, b, new in changes}


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("if not 0 < alpha <= 1:", ["if not 0 <= alpha <= 1:", "if not (not 0 < alpha <= 1):"]),
        ("y = a - b * c", ["y = a", "y = b * c", "y = b * c - a", "y = a - b", "y = a + b * c"]),
        ("x = yes if a and b else no", ["x = yes", "x = no", "x = yes if b else no"]),
        ("if h is None or x.dim() == 2:", ["if h is not None or x.dim() == 2:"]),
        ("loss.backward()", ["pass"]),
        ('raise ValueError("a < b, 1 + 1")  # a < b', []),
    ],
)
def test_a_line_of_python_is_mutated(line, some):
    found = mutated(line, python=True)
    assert found >= set(some)
    assert bool(found) == bool(some)


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("if (n[t] > 0) return;", ["if (n[t] >= 0) return;", "if (!(n[t] > 0)) return;"]),
        ("return s == 0 || gone(b) || on;", ["return s == 0 || on;", "return s == 0 || gone(b);"]),
        ("const C* p = adjoint ? last : first;", ["const C* p = last;", "const C* p = first;"]),
        ("barrier.wait(n - 1);", [";", "barrier.wait(n + 1);", "barrier.wait(n - 2);"]),
        ("std::vector<C*> list;", []),
    ],
)
def test_a_line_of_cpp_is_mutated(line, some):
    found = mutated(line, python=False)
    assert found >= set(some)
    assert bool(found) == bool(some)


def test_the_sample_does_not_depend_on_where_a_line_stands():
    file = "csrc/checks.h"
    found = mutants.shuffled([file], seed=1)
    assert found == mutants.shuffled([file], seed=1)
    assert found != mutants.shuffled([file], seed=2)
    moved = [Mutant(m.file, m.line + 9, m.original, m.mutated) for m in found]
    assert [m.rank(1) for m in moved] == sorted(m.rank(1) for m in moved)


@pytest.mark.parametrize("listed", ["equivalent_mutants.txt", "fixed_mutants.txt"])
def test_listed_mutants_are_mutants_of_the_code(listed):
    """If a listed line has changed, rewrite its entry or remove it."""
    every = {
        (mutant.file, mutant.original, text)
        for file in mutants.files_named(mutants.TESTS)
        for mutant in mutants.mutants_of(file)
        for text in ("*", mutant.mutated)
    }
    found = dict(mutants.records(mutants.EQUIVALENT.with_name(listed)))
    assert set(found) <= every
    assert all(found.values()) == (listed == "equivalent_mutants.txt")  # only these have reasons


def planted(file: str, old: str, new: str, test: str) -> tuple[Mutant, list[str]]:
    lines = (mutants.ROOT / file).read_text().split("\n")
    number, line = next((i, line.strip()) for i, line in enumerate(lines, 1) if old in line)
    return Mutant(file, number, line, line.replace(old, new)), [test]


def of_alpha(new: str, test: str) -> tuple[Mutant, list[str]]:
    return planted("fusedrnn/forms.py", "0 < alpha <= 1", new, f"tests/api/test_ops.py::{test}")


def of_engine(old: str, new: str, file: str = "run") -> tuple[Mutant, list[str]]:
    test = "tests/engine/test_recurrence.py::test_any_strides"
    return planted(f"csrc/cpu/{file}.h", old, new, test)


@pytest.mark.slow
def test_planted_mutants_have_the_expected_outcomes():
    if not list(mutants.ROOT.glob("build/temp*/build.ninja")):
        pytest.skip("needs the objects of `make build`")
    fits = "test_alpha_as_a_number_is_above_0_and_at_most_1"
    expected = [
        (of_alpha("0 <= alpha <= 1", fits), f"tests/api/test_ops.py::{fits}"),
        (of_alpha("0 <= alpha <= 1", "test_an_unknown_nonlinearity_is_named"), None),
        (of_alpha("0 < alpha <", fits), ""),
        (of_engine("[s & 1]", "[1]"), "tests/engine/test_recurrence.py::test_any_strides"),
        (of_engine("kMinSpins = 32", "kMinSpins = 33", "barrier"), None),
        (of_engine("[s & 1]", "[s & one]"), ""),
        (of_engine("i < 3", "i <= 2"), ""),  # the same machine code
        (of_alpha("0 < alpha <= 1", fits), None),  # the earlier mutants leave no trace
    ]
    with mutants.workers(1, timeout=1000) as pool:
        found = [pool.submit(mutants.outcome, *mutant).result()[0] for mutant, _ in expected]
    assert [text and text.partition("[")[0] for text in found] == [text for _, text in expected]
