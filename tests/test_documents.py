"""Documents name files, tests and make targets that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fusedrnn

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), ROOT / "bench" / "README.md", *ROOT.glob("tests/**/*.md")])
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


def test_the_citation_has_the_version_of_the_package() -> None:
    assert f"version: {fusedrnn.__version__}\n" in (ROOT / "CITATION.cff").read_text()
