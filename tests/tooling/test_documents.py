"""Documents name files, tests, make targets and numbers that exist, and their examples run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import charts
import pytest
import torch
from paths import ROOT
from torch import nn
from torch.nn.utils import parametrize

import fusedrnn

PATTERNS = ("*.md", "bench/README.md", "docs/*.md", "tests/**/*.md")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


@each_document
def test_links_lead_to_files_that_exist(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@each_document
def test_tests_that_a_document_names_exist(document: Path) -> None:
    file, missing = "", []
    for named, test in re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)?::(\w+)`", document.read_text()):
        file = named or file  # `::test_name` belongs to the file named before
        (path,) = (ROOT / "tests").glob(f"*/{file}")
        if f"def {test}(" not in path.read_text():
            missing.append(f"{file}::{test}")
    assert not missing


@each_document
def test_make_targets_that_a_document_names_exist(document: Path) -> None:
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    named = re.findall(r"(?:`|^    )make ([\w-]+)", document.read_text(), re.MULTILINE)
    assert set(named) <= targets


def given() -> dict[str, Any]:
    """Return the tensors and the model that README's examples assume."""
    T, B, I, H = 6, 3, 10, 50
    return {
        "torch": torch,
        "x": torch.randn(T, B, I),
        "u": torch.randn(T, B, H),
        "h0": torch.randn(B, H),
        "w_ih": torch.randn(H, I),
        "w_hh": torch.randn(H, H) / H,
        "b_ih": torch.randn(H),
        "b_hh": torch.randn(H),
        "episode_starts": torch.rand(T, B) < 0.5,
        "learned_state": torch.randn(H),
        "model": nn.ModuleList([nn.RNN(I, H), nn.RNNCell(I, H)]),
    }


def blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "document",
    [ROOT / "README.md", *filter(blocks, sorted(ROOT.glob("docs/*.md")))],
    ids=lambda path: path.name,
)
def test_examples_of_a_document_run_in_order(document: Path) -> None:
    names = given() if document.name == "README.md" else {}
    for block in blocks(document):
        exec(compile(block, document.name, "exec"), names)


class AnyOutputUnlessShown(doctest.OutputChecker):
    """Accept the output of an example that does not show any."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize(
    "module", [name for _, name, _ in pkgutil.walk_packages(fusedrnn.__path__, "fusedrnn.")]
)
def test_examples_of_docstrings_run(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # one example writes a file
    names = {
        "torch": torch,
        "fusedrnn": fusedrnn,
        "parametrize": parametrize,
        "model": nn.Sequential(fusedrnn.RNN(10, 20)),
        "x": torch.randn(5, 3, 10),
    }
    runner = doctest.DocTestRunner(AnyOutputUnlessShown(), optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder().find(importlib.import_module(module), extraglobs=names):
        runner.run(example)
    assert runner.failures == 0  # what failed is in the captured output


def test_chart_and_tables_have_the_numbers_of_the_results() -> None:
    cpu, gpu = charts.load("main.json"), charts.load("gpu-h200/speed-bench.json")
    assert charts.CHART.read_text() == charts.draw(cpu, gpu)
    for document in charts.TABLES:
        for mode in charts.MODES:
            assert charts.table(cpu, mode, document) in (ROOT / document).read_text()


def test_the_citation_has_the_version_of_the_package() -> None:
    assert f"version: {fusedrnn.__version__}\n" in (ROOT / "CITATION.cff").read_text()
