"""Documents name files, tests and make targets that exist, and their examples run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusedrnn

ROOT = Path(__file__).resolve().parents[1]
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
    for named, test in re.findall(r"`(?:tests/)?(test_\w+\.py)?::(\w+)`", document.read_text()):
        file = named or file  # `::test_name` belongs to the file named before
        if f"def {test}(" not in (ROOT / "tests" / file).read_text():
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


@pytest.mark.parametrize("name", ["README.md", "docs/recipes.md"])
def test_examples_of_a_document_run_in_order(name: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)
    assert blocks
    names = given() if name == "README.md" else {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)


def test_the_citation_has_the_version_of_the_package() -> None:
    assert f"version: {fusedrnn.__version__}\n" in (ROOT / "CITATION.cff").read_text()
